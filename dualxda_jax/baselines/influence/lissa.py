"""Influence functions by the stochastic Neumann series of Agarwal et al. (LiSSA)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import map_chunks
from dualxda_jax.baselines.influence import checks, hvp
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.select import Filter
from dualxda_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Config(hvp.Config):
    """Options of LiSSA, see `influence_lissa`."""

    scale: float
    repeats: int
    depth: int
    batch: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        key: for the draws of batches.
    """

    context: Context
    key: Array


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

    Returns:
        Method "influence_lissa".

    Raises:
        ValueError: a bad argument; and in `scores` and `self_influence`, outside of a trace: the series diverged. In
            a trace scores that diverged are NaN.

    Source: Agarwal, Bullins and Hazan 2017; Koh and Liang 2017, arXiv 1703.04730.
    """
    checks.nonnegative("damping", damping)
    checks.positive("scale", scale)
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    numbers = {"repeats": repeats, "depth": depth, "batch": batch, "chunk": chunk, "vectors": vectors}
    for name, value in numbers.items():
        checks.positive_integer(name, value)
    config = Config(params, hessian, damping, chunk, vectors, scale, repeats, depth, batch)

    def fit(key: Array, context: Context) -> Fitted:
        hvp.selected(context, config)
        return Fitted(context, key)

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        result, growth = _scores(config, fitted, jnp.asarray(x), targets)
        _report(config, growth)
        return checks.finite_scores(result)

    def self_influence(fitted: Fitted) -> Array:
        result, growth = _self_influence(config, fitted)
        _report(config, growth)
        return checks.finite_samples(result)

    return Method("influence_lissa", fit, scores, self_influence)


def series(config: Config, context: Context, key: Array, targets: Array) -> tuple[Array, Array]:
    """Estimate (H + λ)⁻¹ g for all g at once.

    Args:
        config: options.
        context: the network and its training set.
        key: for the draws.
        targets: [m, p] vectors g.

    Returns:
        [m, p] estimates, NaN where the series diverged, and [m] the largest ‖s‖ / ((depth + 1) ‖g‖) of any run: above 1
        some step was no contraction, since none lets ‖s‖ grow by more than ‖g‖.
    """
    n = context.inputs.shape[0]

    def run(key: Array) -> tuple[Array, Array]:
        def step(number: Array, current: Array) -> Array:
            drawn = jax.random.randint(jax.random.fold_in(key, number), (config.batch,), 0, n, dtype=jnp.int32)
            samples = context.inputs[drawn], context.labels[drawn]
            return targets + current - hvp.product(context, config, current, samples) / config.scale

        last = jax.lax.fori_loop(0, config.depth, step, targets)
        size, start = jnp.linalg.norm(last, axis=1), jnp.linalg.norm(targets, axis=1)
        growth = jnp.where(start > 0, size / jnp.where(start > 0, start, 1.0), 0.0) / (config.depth + 1)
        return last / config.scale, growth

    def add(total: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        estimate, growth = run(jax.random.fold_in(key, number))
        # A NaN has to survive the maximum, which jnp.maximum lets it.
        return (total[0] + estimate, jnp.maximum(total[1], growth)), None

    zero = jnp.zeros_like(targets), jnp.zeros(targets.shape[0], targets.dtype)
    (total, growth), _ = jax.lax.scan(add, zero, jnp.arange(config.repeats, dtype=jnp.int32))
    return jnp.where(diverged(growth)[:, None], jnp.nan, total / config.repeats), growth


def diverged(growth: Array) -> Array:
    """Whether a run grew by more than contractions can, rounding aside; NaN counts."""
    return ~(growth <= 1.0 + 1e-3)


def _report(config: Config, growth: Array) -> None:
    if _check.is_traced(growth):
        return
    bad = np.flatnonzero(np.asarray(diverged(growth)))
    if bad.size:
        was = f"{config.scale} at damping {config.damping}, with which {bad.size} of {growth.shape[0]} series diverged"
        must = "above half the largest eigenvalue of H_batch + damping, which must be positive definite"
        _check.fail("scale", was, must)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Config, fitted: Fitted, x: Array, targets: Array) -> tuple[Array, Array]:
    context = fitted.context

    def some(x: Array, targets: Array) -> tuple[Array, Array]:
        estimate, growth = series(config, context, fitted.key, hvp.gradients(context, config, x, targets))
        return hvp.against_training(context, config, estimate), growth

    return map_chunks(some, (x, targets), config.vectors)


@functools.partial(jax.jit, static_argnums=0)
def _self_influence(config: Config, fitted: Fitted) -> tuple[Array, Array]:
    context = fitted.context

    def some(x: Array, labels: Array) -> tuple[Array, Array]:
        vectors = hvp.gradients(context, config, x, labels)
        estimate, growth = series(config, context, fitted.key, vectors)
        return jnp.sum(vectors * estimate, axis=1), growth

    return map_chunks(some, (context.inputs, context.labels), config.vectors)
