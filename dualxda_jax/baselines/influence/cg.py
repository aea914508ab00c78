"""Influence functions by conjugate gradients: one linear solve for every query."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.influence import checks, hvp, solved
from dualxda_jax.baselines.protocol import Method
from dualxda_jax.baselines.select import Filter
from dualxda_jax.baselines.settings import dtype_name
from dualxda_jax.types import Array


class NotConvergedWarning(UserWarning):
    """Some linear solves ended before their tolerance; their scores are those of the last iterate."""


@dataclasses.dataclass(frozen=True)
class Config(hvp.Config):
    """Options of conjugate gradients, see `influence_cg`."""

    max_iterations: int


def influence_cg(
    *,
    params: Filter = "all",
    damping: float = 1e-3,
    hessian: str = "ggn",
    tolerance: float = 1e-5,
    max_iterations: int = 200,
    chunk: int = 512,
    vectors: int = 32,
    dtype: Any = None,
) -> Method:
    """Influence functions that solve (H + λ) s = g by conjugate gradients for every query.

    The score of sample i is sᵀ g_i with the signs, the mean and the meaning of `influence_explicit`. Conjugate
    gradients need a positive definite H + λ: a solve that meets negative curvature stops before it and keeps what it
    has. `self_influence` takes one solve for every training sample: n times the cost of a query.

    Args:
        params: which parameters, see `select`; the others count as fixed.
        damping: λ, added to the diagonal.
        hessian: "ggn" for the Gauss-Newton matrix, which is never indefinite for cross-entropy, or "exact". The same
            for a model whose logits are linear in the chosen parameters.
        tolerance: a solve ends at ‖(H + λ) s − g‖ ≤ tolerance · ‖g‖.
        max_iterations: products with H for a solve, at most.
        chunk: samples at a time in a product with H.
        vectors: queries that are solved for at a time; each takes memory for four vectors of parameters. For
            `self_influence` over a mesh, rounded up to a multiple of the devices. Queries that lie over a mesh
            themselves need a multiple on jax 0.8.
        dtype: as in `influence_explicit`.

    Returns:
        Method "influence_cg"; outside of a trace it warns (`NotConvergedWarning`) of solves that missed the tolerance.

    Raises:
        ValueError: a bad argument.

    Source: Martens 2010 (Hessian-free optimization); Koh and Liang 2017, arXiv 1703.04730.
    """
    damping = checks.nonnegative("damping", damping)
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    tolerance = checks.positive("tolerance", tolerance)
    for name, value in (("max_iterations", max_iterations), ("chunk", chunk), ("vectors", vectors)):
        _check.positive_integer(name, value)
    config = Config(params, hessian, chunk, vectors, max_iterations, dtype=dtype_name(dtype))
    numbers = {"damping": damping, "tolerance": tolerance}
    return solved.method("influence_cg", config, numbers, solve, _report)


class _State(NamedTuple):
    solution: Array  # [m, p]
    residual: Array  # [m, p]
    direction: Array  # [m, p]
    squared: Array  # [m] squared norm of the residual
    status: Array  # [m] 0 running, 1 converged, 2 met negative curvature
    iteration: Array


def solve(config: Config, numbers: solved.Numbers, fitted: solved.Fitted, targets: Array) -> tuple[Array, Array]:
    """Solve (H + λ) s = g for all g at once.

    Args:
        config: options.
        numbers: "damping" and "tolerance".
        fitted: the network and its training set.
        targets: [m, p] right-hand sides g.

    Returns:
        [m, p] solutions and [m] how each ended: 0 out of iterations, 1 converged, 2 negative curvature.
    """

    def multiply(vectors: Array) -> Array:
        return hvp.product(fitted.context, config, numbers["damping"], vectors)

    # So that derivatives are those of a solution, by another solve, and not of the loop.
    return jax.lax.custom_linear_solve(
        multiply, targets, lambda multiply, targets: _iterate(config, numbers["tolerance"], multiply, targets),
        symmetric=True, has_aux=True,
    )  # fmt: skip


def _iterate(config: Config, tolerance: Any, multiply: Callable[[Array], Array], targets: Array) -> tuple[Array, Array]:
    goal = tolerance**2 * _norms(targets)

    def running(state: _State) -> Array:
        return (state.iteration < config.max_iterations) & (state.status == 0).any()

    def step(state: _State) -> _State:
        product = multiply(state.direction)
        curvature = jnp.sum(state.direction * product, axis=1)
        positive = curvature > 0
        active = (state.status == 0) & positive
        length = jnp.where(active, state.squared / jnp.where(positive, curvature, 1.0), 0.0)
        solution = state.solution + length[:, None] * state.direction
        residual = state.residual - length[:, None] * product
        squared = _norms(residual)
        growth = jnp.where(active, squared / jnp.where(active, state.squared, 1.0), 0.0)
        direction = jnp.where(active[:, None], residual + growth[:, None] * state.direction, state.direction)
        ended = jnp.where(squared <= goal, 1, 0)
        status = jnp.where(state.status != 0, state.status, jnp.where(positive, ended, 2)).astype(jnp.int32)
        return _State(solution, residual, direction, squared, status, state.iteration + 1)

    squared = _norms(targets)
    status = (squared == 0).astype(jnp.int32)
    first = _State(jnp.zeros_like(targets), targets, targets, squared, status, jnp.int32(0))
    last = jax.lax.while_loop(running, step, first)
    return last.solution, last.status


def _norms(vectors: Array) -> Array:
    return jnp.sum(jnp.square(vectors), axis=1)


def _report(status: Array) -> None:
    if _check.is_traced(status):
        return
    missed, negative = int((status != 1).sum()), int((status == 2).sum())
    if missed:
        warnings.warn(
            f"{missed} of {status.size} solves missed the tolerance, {negative} of them at negative curvature: "
            'raise damping, or take hessian="ggn"' + ("" if negative == missed else ", or more max_iterations"),
            NotConvergedWarning,
            stacklevel=3,
        )
