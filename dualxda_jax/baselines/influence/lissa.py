"""Influence functions by the stochastic Neumann series of Agarwal et al. (LiSSA)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines.influence import checks, hvp, solved
from dualxda_jax.baselines.protocol import Method
from dualxda_jax.baselines.select import Filter
from dualxda_jax.baselines.settings import dtype_name
from dualxda_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Config(hvp.Config):
    """Options of LiSSA, see `influence_lissa`."""

    repeats: int
    depth: int
    batch: int


def influence_lissa(
    *,
    params: Filter = "head",
    damping: float = 1e-3,
    scale: float = 10.0,
    repeats: int = 10,
    depth: int = 5000,
    batch: int = 32,
    hessian: str = "exact",
    chunk: int = 512,
    vectors: int = 128,
    dtype: Any = None,
) -> Method:
    """Influence functions by LiSSA, a stochastic Neumann series for the inverse Hessian.

    A run takes `depth` steps s ← g + s − (H_batch + λ) s / scale from s = g, and the last s of all runs are averaged.
    The score of sample i is sᵀ g_i / scale with the signs, the mean and the meaning of `influence_explicit`, which it
    tends to. Every query has its own s, which starts anew in every run; the batches, drawn with replacement, are the
    same for all queries. The series converges where all eigenvalues of H_batch + λ lie in (0, 2 · scale).
    `self_influence` runs the series for every training sample: n times the cost of a query.

    Args:
        params: which parameters, see `select`; the others count as fixed. The paper took the final layer.
        damping: λ, added to the diagonal of the Hessian (not multiplied by scale).
        scale: larger is safer, and slower: directions of curvature h need depth ≫ scale / (h + λ).
        repeats: independent runs that are averaged.
        depth: steps of a run.
        batch: samples that a step's Hessian is the mean of.
        hessian: "exact", or "ggn" for the Gauss-Newton matrix, which is never indefinite for cross-entropy.
        chunk: samples at a time in the pass over the training set.
        vectors: queries at a time.
        dtype: as in `influence_explicit`.

    Returns:
        Method "influence_lissa".

    Raises:
        ValueError: a bad argument; and in `scores` and `self_influence`, outside of a trace: the series diverged. In
            a trace scores that diverged are NaN.

    Source: Agarwal, Bullins and Hazan 2017; Koh and Liang 2017, arXiv 1703.04730.
    """
    damping, scale = checks.nonnegative("damping", damping), checks.positive("scale", scale)
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    numbers = {"repeats": repeats, "depth": depth, "batch": batch, "chunk": chunk, "vectors": vectors}
    for name, value in numbers.items():
        _check.positive_integer(name, value)
    config = Config(params, hessian, chunk, vectors, repeats, depth, batch, dtype=dtype_name(dtype))
    report = functools.partial(_report, scale, damping)
    return solved.method("influence_lissa", config, {"damping": damping, "scale": scale}, series, report)


def series(config: Config, numbers: solved.Numbers, fitted: solved.Fitted, targets: Array) -> tuple[Array, Array]:
    """Estimate (H + λ)⁻¹ g for all g at once.

    Args:
        config: options.
        numbers: "damping" and "scale".
        fitted: the network, its training set and the key for the draws.
        targets: [m, p] vectors g.

    Returns:
        [m, p] estimates, NaN where the series diverged, and [m] the largest ‖s‖ / ((depth + 1) ‖g‖) of any run: above 1
        some step was no contraction, since none lets ‖s‖ grow by more than ‖g‖.
    """
    context, damping, scale = fitted.context, numbers["damping"], numbers["scale"]
    n = context.inputs.shape[0]

    def run(key: Array) -> tuple[Array, Array]:
        def step(number: Array, current: Array) -> Array:
            drawn = jax.random.randint(jax.random.fold_in(key, number), (config.batch,), 0, n, dtype=jnp.int32)
            samples = context.inputs[drawn], context.labels[drawn]
            return targets + current - hvp.product(context, config, damping, current, samples) / scale

        last = jax.lax.fori_loop(0, config.depth, step, targets)
        size, start = jnp.linalg.norm(last, axis=1), jnp.linalg.norm(targets, axis=1)
        growth = jnp.where(start > 0, size / jnp.where(start > 0, start, 1.0), 0.0) / (config.depth + 1)
        return last / scale, growth

    def add(total: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        estimate, growth = run(jax.random.fold_in(fitted.key, number))
        # A NaN has to survive the maximum, which jnp.maximum lets it.
        return (total[0] + estimate, jnp.maximum(total[1], growth)), None

    zero = jnp.zeros_like(targets), jnp.zeros(targets.shape[0], targets.dtype)
    (total, growth), _ = jax.lax.scan(add, zero, jnp.arange(config.repeats, dtype=jnp.int32))
    return jnp.where(diverged(growth)[:, None], jnp.nan, total / config.repeats), growth


def diverged(growth: Array) -> Array:
    """Whether a run grew by more than contractions can, rounding aside; NaN counts."""
    return ~(growth <= 1.0 + 1e-3)


def _report(scale: float, damping: float, growth: Array) -> None:
    if _check.is_traced(growth):
        return
    bad = np.flatnonzero(np.asarray(diverged(growth)))
    if bad.size:
        was = f"{scale} at damping {damping}, with which {bad.size} of {growth.shape[0]} series diverged"
        must = "above half the largest eigenvalue of H_batch + damping, which must be positive definite"
        _check.fail("scale", was, must)
