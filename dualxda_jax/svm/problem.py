"""The dual problem in scaled variables, and what one pass over the features tells about it.

The dual variables of sample i are kept as a point q_i of the probability simplex, α_i = C_i (e_{y_i} − q_i), so that
costs enter as weights only and a sample without cost drops out by itself. With z = scores + 1[c ≠ y], m_i = max_c z_ic,

    primal(W) − dual(α) = Σ_i C_i Σ_c q_ic (m_i − z_ic) + ½‖W − W(α)‖²                                     (1)

whose terms are all non-negative: the gap is summed without cancellation, which the plain difference of the objectives
suffers from as soon as they agree in most of their digits.

Layout: everything per sample and class is class-major, [k, n], so that reductions over few classes run over long rows.
Weights are [k, D]: with a constant feature b (`intercept_scaling`) D = d + 1, its column last, and D = d without.

Source: Crammer & Singer, JMLR 2001, for the problem; (1) by summing its optimality conditions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.config import SolverConfig

Array = jax.Array

Axis = str | tuple[str, ...] | None

TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The data of one solve, or of a part of one in which the other samples are held fixed.

    Attributes:
        features: [n, d] in any dtype; cast chunk by chunk to the working dtype.
        labels: [n] int32.
        cost: [n] in the working dtype, cost times sample weight.
        rows: scalar int32, the leading rows that count.
        offset: [k, D] what the samples held fixed add to W(α).
        margin: scalar, the margin asked for; 1 but where rounding needs slack.
        intercept_scaling: static, b.
        chunk: static, rows that a pass holds at once.
        axis: static, the mesh axes that the rows lie over where this is one device's part of them, inside of shard_map.
    """

    features: Array
    labels: Array
    cost: Array
    rows: Array
    offset: Array
    margin: Array
    intercept_scaling: float = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})
    axis: Axis = dataclasses.field(default=None, metadata={"static": True})

    @property
    def count(self) -> int:
        """All samples, those of other devices included."""
        return int(self.features.shape[0]) * (1 if self.axis is None else lax.psum(1, self.axis))


def summed(value: Any, axis: Axis) -> Any:
    """The sum over the devices that the rows lie over."""
    return value if axis is None else lax.psum(value, axis)


def taken(array: Array, index: Array, axis: Axis, dimension: int = 0) -> Array:
    """Entries of an array over samples, wherever they are, on every device."""
    if axis is None:
        return jnp.take(array, index, axis=dimension)
    place, here = place_of(index, array.shape[dimension], axis)
    shape = [-1 if i == dimension else 1 for i in range(array.ndim)]
    mine = jnp.take(array, jnp.where(here, place, 0), axis=dimension)
    return lax.psum(jnp.where(here.reshape(shape), mine, jnp.zeros((), array.dtype)), axis)


def place_of(index: Array, n: int, axis: Axis) -> tuple[Array, Array]:
    """Places of samples among the n of this device, and which of them it has."""
    if axis is None:
        return index, jnp.full(index.shape, True)
    place = index - lax.axis_index(axis).astype(index.dtype) * n
    return place, (place >= 0) & (place < n)


def problem_of(features: Array, labels: Array, costs: Array, num_classes: int, config: SolverConfig) -> Problem:
    """The data of a solve, in float64 but for the features."""
    n, d = features.shape
    return Problem(
        features,
        labels,
        costs.astype(jnp.float64),
        jnp.asarray(n, jnp.int32),
        jnp.zeros((num_classes, d + (config.intercept_scaling != 0.0)), jnp.float64),
        jnp.ones((), jnp.float64),
        config.intercept_scaling,
        config.chunk,
        config.axis,
    )


class Chunk(NamedTuple):
    """Some rows: features [b, d], cost [b] (0 for rows that do not count), one-hot labels [k, b]."""

    features: Array
    cost: Array
    one_hot: Array


def contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Matrix product over one axis of each, at full precision."""
    # Not einsum: it names a result dtype, which vmap around jit checks where x64 is off and float64 therefore unknown.
    return lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), precision=lax.Precision.HIGHEST)


def with_constant(features: Array, scaling: float) -> Array:
    """[b, D] features with the constant one behind them, where there is one."""
    if scaling == 0.0:
        return features
    return jnp.concatenate([features, jnp.full_like(features[:, :1], scaling)], axis=1)


def scores(chunk: Chunk, weights: Array, scaling: float) -> Array:
    """[k, b] scores of a chunk for weights [k, D]."""
    if scaling == 0.0:
        return contract(weights, chunk.features, 1, 1)
    return contract(weights[:, :-1], chunk.features, 1, 1) + (scaling * weights[:, -1])[:, None]


def outer(coefficients: Array, chunk: Chunk, scaling: float) -> Array:
    """[k, D] = Σ coefficients_i ⊗ (features_i, b) for coefficients [k, b]."""
    main = contract(coefficients, chunk.features, 1, 0)
    if scaling == 0.0:
        return main
    return jnp.concatenate([main, scaling * jnp.sum(coefficients, axis=1)[:, None]], axis=1)


def one_hot_of(labels: Array, k: int, dtype: Any) -> Array:
    """[k, b] one-hot labels."""
    return (labels[None, :] == jnp.arange(k, dtype=jnp.int32)[:, None]).astype(dtype)


def over_rows(problem: Problem, k: int, body: Callable[[Chunk, Array, Any], Any], carry: Any) -> Any:
    """Fold `body(chunk, start, carry)` over all rows that count, in chunks of one size.

    The last chunk is moved up to end with the last row; the rows that it sees a second time have no cost there.
    """
    n = problem.features.shape[0]
    size = min(problem.chunk, n)
    dtype = problem.cost.dtype

    def one(i: Array, carry: Any) -> Any:
        start = jnp.minimum(i * size, n - size)

        def take(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size)

        place = start + jnp.arange(size, dtype=jnp.int32)
        counts = (place >= i * size) & (place < problem.rows)
        cost = jnp.where(counts, take(problem.cost), 0.0)
        return body(
            Chunk(take(problem.features).astype(dtype), cost, one_hot_of(take(problem.labels), k, dtype)), start, carry
        )

    return lax.fori_loop(jnp.asarray(0, jnp.int32), (problem.rows + size - 1) // size, one, carry)


def columns(array: Array, start: Array, chunk: Chunk) -> Array:
    """The part of a [k, n] array that belongs to a chunk."""
    return lax.dynamic_slice_in_dim(array, start, chunk.cost.shape[0], axis=1)


def largest_curvature(problem: Problem) -> Array:
    """The largest C_i (‖φ_i‖² + b²)."""

    def add(chunk: Chunk, start: Array, largest: Array) -> Array:
        square = jnp.sum(chunk.features * chunk.features, axis=1) + problem.intercept_scaling**2
        return jnp.maximum(largest, jnp.max(chunk.cost * square))

    largest = over_rows(problem, problem.offset.shape[0], add, jnp.zeros((), problem.cost.dtype))
    return largest if problem.axis is None else lax.pmax(largest, problem.axis)


def weights_of(problem: Problem, simplex: Array) -> Array:
    """[k, D] = W(α) for α = C (e_y − q), q = simplex [k, n]."""

    def add(chunk: Chunk, start: Array, total: Array) -> Array:
        alpha = alpha_of(columns(simplex, start, chunk).astype(chunk.cost.dtype), chunk.one_hot, chunk.cost)
        return total + outer(alpha, chunk, problem.intercept_scaling).astype(total.dtype)

    total = over_rows(problem, simplex.shape[0], add, jnp.zeros_like(problem.offset))
    return problem.offset + summed(total, problem.axis)


def primal_and_gap(problem: Problem, weights: Array, simplex: Array) -> tuple[Array, Array]:
    """The primal objective at W and the absolute duality gap of (W, α), less ½‖W − W(α)‖².

    Args:
        problem: the data.
        weights: [k, D].
        simplex: [k, n].
    """

    def add(chunk: Chunk, start: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        q = columns(simplex, start, chunk)
        plain = scores(chunk, weights, problem.intercept_scaling)
        z = plain + problem.margin * (1.0 - chunk.one_hot)
        highest = jnp.max(z, axis=0)
        hinge = highest - jnp.sum(plain * chunk.one_hot, axis=0)
        slack = jnp.sum(q * (highest[None, :] - z), axis=0)
        return total[0] + jnp.sum(chunk.cost * hinge), total[1] + jnp.sum(chunk.cost * slack)

    zero = jnp.zeros((), simplex.dtype)
    loss, gap = summed(over_rows(problem, simplex.shape[0], add, (zero, zero)), problem.axis)
    return 0.5 * jnp.sum(weights * weights) + loss, gap


def alpha_of(q: Array, one_hot: Array, cost: Array) -> Array:
    """[k, b] α of q [k, b]; as in `to_coefficients`, what is at the label is what the others leave."""
    others = (1.0 - one_hot) * q
    return cost[None, :] * (one_hot * jnp.sum(others, axis=0, keepdims=True) - others)


def relative(gap: Array, primal: Array) -> Array:
    """Gap / max(|primal|, tiny)."""
    return gap / jnp.maximum(jnp.abs(primal), TINY)


def to_coefficients(simplex: Array, labels: Array, cost: Array, dtype: Any) -> Array:
    """[n, k] α = C (e_y − q), with rows that sum to zero and a box that holds to the last bit, in `dtype`."""
    at_label = one_hot_of(labels, simplex.shape[0], jnp.bool_)
    cost = cost.astype(dtype)
    others = jnp.where(at_label, 0.0, cost[None, :] * jnp.maximum(simplex.astype(dtype), 0.0))
    # In the precision of q: over many classes, rounding of a sum in a narrower one adds up.
    total = jnp.sum(others.astype(jnp.asarray(simplex).dtype), axis=0).astype(others.dtype)
    return jnp.where(at_label, jnp.minimum(total, cost)[None, :], -others).T


def normalised(simplex: Array, dtype: Any) -> Array:
    """[k, n] q in a wider dtype, with columns that sum to one there as well."""
    q = simplex.astype(dtype)
    return q if simplex.dtype == dtype else q / jnp.sum(q, axis=0, keepdims=True)


def from_coefficients(coefficients: Array, labels: Array, cost: Array) -> Array:
    """[k, n] q of the nearest feasible dual variables [n, k]: what is outside of the box is brought in."""
    alpha = coefficients.T
    at_label = one_hot_of(labels, alpha.shape[0], jnp.bool_)
    # Divided by once for a sample rather than for each of its classes.
    per = jnp.where(cost > 0.0, 1.0 / jnp.where(cost > 0.0, cost, 1.0), 0.0)
    others = jnp.where(at_label, 0.0, jnp.maximum(-alpha, 0.0)) * per[None, :]
    total = jnp.sum(others, axis=0)
    others = others * (1.0 / jnp.maximum(total, 1.0))[None, :]
    return jnp.where(at_label, (1.0 - jnp.minimum(total, 1.0))[None, :], others)


def places(chosen: Array, size: int, fill: int) -> Array:
    """[size] int32 places of the true entries of [n] in order, filled up; `jnp.nonzero` wants int64 where x64 is on."""
    n = chosen.shape[0]
    rank = jnp.cumsum(chosen.astype(jnp.int32), dtype=jnp.int32) - 1
    target = jnp.where(chosen, rank, size)
    return jnp.full(size, fill, jnp.int32).at[target].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
