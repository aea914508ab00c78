"""One pass over all samples at some W: their leads, the objectives, W(α)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.problem import (
    Array,
    Chunk,
    Problem,
    alpha_of,
    columns,
    one_hot_of,
    outer,
    over_rows,
    scores,
    summed,
)

# What a sample on several classes is behind at least, and what one that has no say leads by.
BARELY, SURE = 1e-12, 1e38


def norms_of(problem: Problem) -> Array:
    """[n] ‖(φ_i, b)‖ in float32."""

    def add(chunk: Chunk, start: Array, norms: Array) -> Array:
        square = jnp.sum(chunk.features * chunk.features, axis=1) + problem.intercept_scaling**2
        return lax.dynamic_update_slice_in_dim(norms, jnp.sqrt(square).astype(norms.dtype), start, 0)

    n = problem.features.shape[0]
    return over_rows(problem, problem.offset.shape[0], add, jnp.zeros(n, jnp.float32))


def survey(problem: Problem, weights: Array, q: Array, *, assign: bool, exact: bool = False) -> dict[str, Array]:
    """One pass over all samples at W: the fields of `SolverState` that it gives.

    Args:
        problem: the data; its `cost` has the precision that the pass runs in.
        weights: [k, D].
        q: [k, n].
        assign: put every sample on the class that leads first, whatever q says.
        exact: W is W(α), which need not be made anew.
    """
    low = problem.cost.dtype
    weights_low = weights.astype(low)

    def add(chunk: Chunk, start: Array, carry: Any) -> Any:
        q, lead, made, sums = carry
        given = None if assign else columns(q, start, chunk).astype(low)
        at = standing(chunk, given, weights_low, problem.margin, problem.intercept_scaling)
        if assign:
            q = lax.dynamic_update_slice_in_dim(q, at.simplex.astype(q.dtype), start, 1)
        if not exact:
            alpha = alpha_of(at.simplex, chunk.one_hot, chunk.cost)
            made = made + outer(alpha, chunk, problem.intercept_scaling).astype(made.dtype)
        sums = sums + jnp.stack([jnp.sum(chunk.cost * at.hinge), jnp.sum(chunk.cost * at.slack)]).astype(sums.dtype)
        return q, lax.dynamic_update_slice_in_dim(lead, at.lead.astype(lead.dtype), start, 0), made, sums

    n = q.shape[1]
    first = (q, jnp.zeros(n, jnp.float32), jnp.zeros_like(problem.offset), jnp.zeros(2, weights.dtype))
    q, lead, made, sums = over_rows(problem, q.shape[0], add, first)
    lead = without_cost(problem, lead)
    made, sums = weights if exact else problem.offset + summed(made, problem.axis), summed(sums, problem.axis)
    primal = 0.5 * jnp.sum(weights * weights) + sums[0]
    return {"simplex": q, "lead": lead, "made": made, "primal": primal, "slack": sums[1]}


def without_cost(problem: Problem, lead: Array) -> Array:
    """Leads [n] with those of samples without a cost beyond all doubt, whichever class they are on; NaN stays."""
    return jnp.where((problem.cost == 0.0) & ~jnp.isnan(lead), SURE, lead)


class Standing(NamedTuple):
    """How the samples of a chunk stand to some W.

    Attributes:
        simplex: [k, b] q.
        hinge: [b] the loss, per cost.
        slack: [b] what q falls short of the highest score, per cost.
        lead: [b] as in `SolverState`.
    """

    simplex: Array
    hinge: Array
    slack: Array
    lead: Array


def standing(chunk: Chunk, q: Array | None, weights: Array, margin: Array, scaling: float) -> Standing:
    """How samples with q [k, b] stand to W [k, D]; None puts each on the first class that leads."""
    plain = scores(chunk, weights, scaling)
    z = plain + margin.astype(weights.dtype) * (1.0 - chunk.one_hot)
    highest = jnp.max(z, axis=0)
    if q is None:
        k = z.shape[0]
        classes = jnp.arange(k, dtype=jnp.int32)[:, None]
        first = jnp.min(jnp.where(z == highest[None, :], classes, k), axis=0)
        q = one_hot_of(first, k, weights.dtype)
    hinge = highest - jnp.sum(plain * chunk.one_hot, axis=0)
    slack = jnp.sum(q * (highest[None, :] - z), axis=0)
    return Standing(q, hinge, slack, _lead(q, z))


def _lead(q: Array, z: Array) -> Array:
    inside = q > 0.0
    single = jnp.sum(inside.astype(jnp.int32), axis=0, dtype=jnp.int32) == 1
    least = jnp.min(jnp.where(inside, z, jnp.inf), axis=0)
    ahead = least - jnp.max(jnp.where(inside, -jnp.inf, z), axis=0)
    return jnp.where(single, ahead, jnp.minimum(least - jnp.max(z, axis=0), -BARELY))
