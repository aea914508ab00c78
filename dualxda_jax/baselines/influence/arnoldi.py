"""Influence functions in the space of the Hessian's dominant eigenvectors (Schioppa et al.)."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.influence import checks, hvp
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.select import Filter
from dualxda_jax.baselines.settings import dtype_name
from dualxda_jax.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST
_RANK, _KRYLOV = 128, 150


@dataclasses.dataclass(frozen=True)
class Config(hvp.Config):
    """Options of Arnoldi, see `influence_arnoldi`."""

    rank: int
    krylov: int
    samples: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        vectors: [rank, p] orthonormal directions, zero where there are fewer.
        inverses: [rank] 1 / (eigenvalue + regularization), 0 where there are fewer.
        training: [n, rank] gradients of the training samples along the directions.
    """

    context: Context
    vectors: Array
    inverses: Array
    training: Array


def influence_arnoldi(
    *,
    params: Filter = "all",
    rank: int | None = None,
    krylov: int | None = None,
    samples: int = 10_000,
    tolerance: float = 0.1,
    regularization: float = 1e-3,
    inverse_tolerance: float = 1e-4,
    hessian: str = "exact",
    chunk: int = 512,
    dtype: Any = None,
) -> Method:
    """Influence functions in the space of the dominant eigenvectors of the Hessian, found by Arnoldi's iteration.

    The score of sample i for target c at x is Σ_r (g·v_r)(g_i·v_r) / (h_r + regularization) over the `rank` largest
    eigenvalues h_r, with the signs, the mean and the meaning of `influence_explicit`. What the gradients hold besides
    these directions counts for nothing. Training gradients are kept as [n, rank] numbers, so that a query costs one
    gradient and one small product.

    Args:
        params: which parameters, see `select`; the others count as fixed.
        rank: how many eigenvectors to keep; None for 128, or as many as there can be.
        krylov: steps of the iteration, each one product with the Hessian; the basis takes krylov · p numbers. None
            for 150, or the number of parameters if that is less.
        samples: how many training samples the Hessian is the mean of, drawn at random if there are more.
        tolerance: the iteration ends where the next direction is shorter than this before it is normalised: a length
            in units of the Hessian's eigenvalues. Of a network that is certain of its training samples most are so
            small that the default may end the iteration at once; a warning says so.
        regularization: added to the eigenvalues.
        inverse_tolerance: regularised eigenvalues up to this are left out, negative ones with them.
        hessian: "exact", or "ggn" for the Gauss-Newton matrix, which is never indefinite for cross-entropy.
        chunk: samples at a time.
        dtype: what gradients, and the directions along which they are taken, are rounded to, as "bfloat16"; products
            accumulate in float32 or wider. The iteration itself is not rounded. By default nothing is.

    Returns:
        Method "influence_arnoldi".

    Raises:
        ValueError: a bad argument; and in `fit`: a rank or a Krylov dimension above the number of parameters; outside
            of a trace, no eigenvalue above `inverse_tolerance`.

    Source: Schioppa et al. 2022, arXiv 2112.03052; names and defaults after captum's ArnoldiInfluenceFunction.
    """
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    reals = {"tolerance": tolerance, "regularization": regularization, "inverse_tolerance": inverse_tolerance}
    numbers = {name: checks.nonnegative(name, value) for name, value in reals.items()}
    for name, number in {"rank": rank, "krylov": krylov, "samples": samples, "chunk": chunk}.items():
        if number is not None:
            _check.positive_integer(name, number)
    if rank is not None and rank > (krylov or _KRYLOV):
        _check.fail("rank", rank, f"at most krylov={krylov or _KRYLOV}")
    config = Config(params, hessian, chunk, 1, 0, 0, samples, dtype=dtype_name(dtype))

    def fit(key: Array, context: Context) -> Fitted:
        p = hvp.size(context, config)
        for name, number in (("rank", rank), ("krylov", krylov)):
            if number is not None and number > p:
                _check.fail(name, number, f"at most {p}, the number of parameters")
        steps = krylov or min(_KRYLOV, p)
        sized = dataclasses.replace(config, krylov=steps, rank=rank or min(_RANK, steps))
        fitted = _fit(sized, numbers, key, context)
        checks.finite_training(context, config, fitted.training, fitted.inverses)
        if not _check.is_traced(fitted.inverses) and not bool((fitted.inverses > 0).any()):
            _check.fail(
                "inverse_tolerance", inverse_tolerance, "below the largest eigenvalue of the Hessian, regularised"
            )
        checks.finite_samples(fitted.training.sum(axis=1))
        _warn_if_alone(fitted.inverses, sized.rank, tolerance)
        return fitted

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        return checks.finite_scores(_scores(config, fitted, jnp.asarray(x), targets))

    return Method("influence_arnoldi", fit, scores, _self_influence)


def _warn_if_alone(inverses: Array, rank: int, tolerance: float) -> None:
    """Warn if a single direction is all that is left of several."""
    if rank > 1 and not _check.is_traced(inverses) and int((inverses > 0).sum()) == 1:
        warnings.warn(
            f"influence_arnoldi: one direction of {rank}, so that all scores are multiples of one row; the Hessian may "
            f"be small beside tolerance={tolerance}",
            UserWarning,
            stacklevel=3,
        )


class _State(NamedTuple):
    basis: Array  # [krylov + 1, p] orthonormal rows, zero after the last
    projected: Array  # [krylov + 1, krylov]
    known: Array  # rows of the basis whose products are known
    ended: Array


def iterate(
    product: Callable[[Array], Array], start: Array, *, krylov: int, tolerance: Any
) -> tuple[Array, Array, Array]:
    """Arnoldi's iteration for a symmetric matrix.

    Args:
        product: v [p] -> H v.
        start: [p] where to start from, not zero.
        krylov: steps at most.
        tolerance: end where the next direction is shorter than this.

    Returns:
        An orthonormal basis [krylov, p], zero after the last row; H in that basis [krylov, krylov], symmetric, zero
        after the last row and column; how many rows there are.
    """
    basis = jnp.zeros((krylov + 1, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))

    def running(state: _State) -> Array:
        return (state.known < krylov) & ~state.ended

    def step(state: _State) -> _State:
        basis = state.basis
        vector = product(basis[state.known])
        column = jnp.zeros(krylov + 1, vector.dtype)
        # Gram-Schmidt twice is as good as can be, and a product with the whole basis each time.
        for _ in range(2):
            parts = jnp.matmul(basis, vector, precision=_HIGHEST)
            vector = vector - jnp.matmul(parts, basis, precision=_HIGHEST)
            column = column + parts
        length = jnp.linalg.norm(vector)
        ended = ~(length > tolerance)
        following = jnp.where(ended, jnp.zeros_like(vector), vector / jnp.where(ended, 1.0, length))
        column = column.at[state.known + 1].set(jnp.where(ended, 0.0, length))
        projected = state.projected.at[:, state.known].set(column)
        return _State(basis.at[state.known + 1].set(following), projected, state.known + 1, ended)

    first = _State(basis, jnp.zeros((krylov + 1, krylov), start.dtype), jnp.int32(0), jnp.bool_(False))
    last = jax.lax.while_loop(running, step, first)
    known = jnp.arange(krylov, dtype=jnp.int32) < last.known
    projected = last.projected[:krylov]
    projected = jnp.where(known[:, None] & known[None, :], (projected + projected.T) / 2, 0.0)
    return jnp.where(known[:, None], last.basis[:krylov], 0.0), projected, last.known


@functools.partial(jax.jit, static_argnums=0)
def _fit(config: Config, numbers: dict[str, Array], key: Array, context: Context) -> Fitted:
    n = context.inputs.shape[0]
    draw, begin = jax.random.split(key)
    samples = context.inputs, context.labels
    if n > config.samples:
        chosen = jax.random.permutation(draw, n)[: config.samples]
        samples = context.inputs[chosen], context.labels[chosen]
    start = jax.random.normal(begin, (hvp.size(context, config),), hvp.dtype(context))
    basis, projected, count = iterate(
        # The regularisation shifts eigenvalues and leaves the iteration as it is.
        lambda v: hvp.product(context, config, 0.0, v[None], samples)[0],
        start,
        krylov=config.krylov,
        tolerance=numbers["tolerance"],
    )
    # Rows after the last get an eigenvalue below all others, so that no eigenvector mixes them with real ones.
    floor = 1.0 + 2.0 * jnp.linalg.norm(projected)
    unused = jnp.arange(config.krylov, dtype=jnp.int32) >= count
    values, within = jnp.linalg.eigh(projected - jnp.diag(jnp.where(unused, floor, 0.0)))
    real = values > -floor / 2
    shifted = values + numbers["regularization"]
    order = jnp.argsort(values, descending=True)[: config.rank]
    kept = (real & (shifted > numbers["inverse_tolerance"]))[order]
    vectors = jnp.matmul(within[:, order].T, basis, precision=_HIGHEST)
    vectors = jnp.where(kept[:, None], vectors, 0.0)
    inverses = jnp.where(kept, 1.0 / jnp.where(kept, shifted[order], 1.0), 0.0)
    return Fitted(context, vectors, inverses, hvp.against_training(context, config, vectors).T)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    context = fitted.context
    along = hvp.along(context, config, fitted.vectors, x, targets)
    return jnp.matmul(along * fitted.inverses[None], fitted.training.T, precision=_HIGHEST)


@jax.jit
def _self_influence(fitted: Fitted) -> Array:
    return jnp.matmul(jnp.square(fitted.training), fitted.inverses, precision=_HIGHEST)
