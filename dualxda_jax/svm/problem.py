"""The dual problem in scaled variables, and what one pass over the features tells about it.

The dual variables of sample i are kept as a point q_i of the probability simplex, α_i = C_i (e_{y_i} − q_i), so that costs
enter as weights only and a sample without cost drops out by itself. With z = scores + 1[c ≠ y] and m_i = max_c z_ic,

    primal(W) − dual(α) = Σ_i C_i Σ_c q_ic (m_i − z_ic) + ½‖W − W(α)‖²                                              (1)

whose terms are all non-negative: the gap is summed without cancellation, which the plain difference of the objectives
suffers from as soon as they agree in most of their digits.

Weights carry the constant feature b (`intercept_scaling`) as one more column: [k, d + 1].

Source: Crammer & Singer, JMLR 2001, for the problem; (1) by summing its optimality conditions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

EXACT = lax.Precision.HIGHEST
TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The data of one solve.

    Attributes:
        features: [n, d] in the dtype that came in; cast chunk by chunk to the working dtype.
        labels: [n] int32.
        cost: [n] in the working dtype, cost times sample weight.
        intercept_scaling: static, b.
        chunk: static, rows that a pass holds at once.
    """

    features: Array
    labels: Array
    cost: Array
    intercept_scaling: float = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})


class Chunk(NamedTuple):
    """Some rows of a problem: features [b, d], labels [b], cost [b] (0 for rows already seen), one-hot labels [b, k]."""

    features: Array
    cost: Array
    one_hot: Array


def contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Matrix product over one axis of each, at full precision."""
    # Not einsum: it names a result dtype, which vmap around jit checks where x64 is off and float64 therefore unknown.
    return lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), precision=EXACT)


def scores(chunk: Chunk, weights: Array, scaling: float) -> Array:
    """[b, k] scores of a chunk for weights [k, d + 1]."""
    products = contract(chunk.features, weights[:, :-1], 1, 1)
    return products if scaling == 0.0 else products + (scaling * weights[:, -1])[None, :]


def outer(coefficients: Array, chunk: Chunk, scaling: float) -> Array:
    """[k, d + 1] = Σ coefficients_i ⊗ (features_i, b)."""
    main = contract(coefficients, chunk.features, 0, 0)
    return jnp.concatenate([main, scaling * jnp.sum(coefficients, axis=0)[:, None]], axis=1)


def rows_of(problem: Problem, rows: Array, valid: Array, num_classes: int) -> Chunk:
    """Gather rows [b] of a problem; those that are not valid [b] get no cost."""
    dtype = problem.cost.dtype
    one_hot = problem.labels[rows][:, None] == jnp.arange(num_classes, dtype=jnp.int32)[None, :]
    cost = jnp.where(valid, problem.cost[rows], 0.0)
    return Chunk(problem.features[rows].astype(dtype), cost, one_hot.astype(dtype))


def over_rows(problem: Problem, num_classes: int, body: Callable[[Chunk, Array, Any], Any], carry: Any) -> Any:
    """Fold `body(chunk, start, carry)` over all rows in chunks of one size.

    The last chunk is moved up to end with the last row; the rows that it sees a second time have no cost there.
    """
    n = problem.features.shape[0]
    size = min(problem.chunk, n)
    dtype = problem.cost.dtype

    def one(i: Array, carry: Any) -> Any:
        start = jnp.minimum(i * size, n - size)
        take = lambda a: lax.dynamic_slice_in_dim(a, start, size)  # noqa: E731
        one_hot = take(problem.labels)[:, None] == jnp.arange(num_classes, dtype=jnp.int32)[None, :]
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= i * size
        cost = jnp.where(fresh, take(problem.cost), 0.0)
        return body(Chunk(take(problem.features).astype(dtype), cost, one_hot.astype(dtype)), start, carry)

    return lax.fori_loop(jnp.asarray(0, jnp.int32), jnp.asarray(-(-n // size), jnp.int32), one, carry)


def weights_of(problem: Problem, simplex: Array) -> Array:
    """[k, d + 1] = W(α) for α = C (e_y − q), q = simplex [n, k]."""
    k = simplex.shape[1]

    def add(chunk: Chunk, start: Array, total: Array) -> Array:
        q = lax.dynamic_slice_in_dim(simplex, start, chunk.cost.shape[0])
        return total + outer(chunk.cost[:, None] * (chunk.one_hot - q), chunk, problem.intercept_scaling)

    return over_rows(problem, k, add, jnp.zeros((k, problem.features.shape[1] + 1), simplex.dtype))


def row_gap(chunk: Chunk, margins: Array, q: Array) -> Array:
    """[b] terms of the sum in (1)."""
    return chunk.cost * jnp.sum(q * (jnp.max(margins, axis=1, keepdims=True) - margins), axis=1)


def primal_and_gap(problem: Problem, weights: Array, simplex: Array) -> tuple[Array, Array]:
    """The primal objective at W and the absolute duality gap of (W, α), less ½‖W − W(α)‖².

    Args:
        problem: the data.
        weights: [k, d + 1].
        simplex: [n, k].
    """
    k = simplex.shape[1]

    def add(chunk: Chunk, start: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        q = lax.dynamic_slice_in_dim(simplex, start, chunk.cost.shape[0])
        plain = scores(chunk, weights, problem.intercept_scaling)
        margins = plain + (1.0 - chunk.one_hot)
        hinge = jnp.max(margins, axis=1) - jnp.sum(plain * chunk.one_hot, axis=1)
        return total[0] + jnp.sum(chunk.cost * hinge), total[1] + jnp.sum(row_gap(chunk, margins, q))

    zero = jnp.zeros((), simplex.dtype)
    loss, gap = over_rows(problem, k, add, (zero, zero))
    return 0.5 * jnp.sum(weights * weights) + loss, gap


def relative(gap: Array, primal: Array) -> Array:
    """Gap / max(|primal|, tiny)."""
    return gap / jnp.maximum(jnp.abs(primal), TINY)


def to_coefficients(simplex: Array, labels: Array, cost: Array) -> Array:
    """[n, k] α = C (e_y − q), with rows that sum to zero and a box that holds to the last bit."""
    k = simplex.shape[1]
    at_label = labels[:, None] == jnp.arange(k, dtype=jnp.int32)[None, :]
    others = jnp.where(at_label, 0.0, cost[:, None] * simplex)
    return jnp.where(at_label, jnp.minimum(jnp.sum(others, axis=1), cost)[:, None], -others)


def from_coefficients(coefficients: Array, labels: Array, cost: Array) -> Array:
    """[n, k] q of the nearest feasible dual variables: what is outside of the box (other cost, other label) is brought in."""
    k = coefficients.shape[1]
    at_label = labels[:, None] == jnp.arange(k, dtype=jnp.int32)[None, :]
    others = jnp.where(at_label, 0.0, jnp.maximum(-coefficients, 0.0))
    others = others / jnp.where(cost > 0.0, cost, 1.0)[:, None]
    total = jnp.sum(others, axis=1, keepdims=True)
    others = jnp.where((cost > 0.0)[:, None], others / jnp.maximum(total, 1.0), 0.0)
    return jnp.where(at_label, jnp.maximum(1.0 - jnp.sum(others, axis=1, keepdims=True), 0.0), others)


def host_objectives(
    features: np.ndarray, labels: np.ndarray, alpha: np.ndarray, cost: np.ndarray, scaling: float, chunk: int = 8192
) -> tuple[float, float]:
    """Primal and dual objective in float64 NumPy, chunk by chunk: (primal at W(α), dual at α)."""
    n, k = alpha.shape
    weights, bias, linear = np.zeros((k, features.shape[1])), np.zeros(k), 0.0
    parts = [slice(i, i + chunk) for i in range(0, n, chunk)]
    for part in parts:
        a = np.asarray(alpha[part], np.float64)
        weights += a.T @ np.asarray(features[part], np.float64)
        bias += scaling * a.sum(axis=0)
        linear += a.sum() - a[np.arange(len(a)), labels[part]].sum()
    norm = 0.5 * (float(np.sum(weights**2)) + float(np.sum(bias**2)))
    loss = 0.0
    for part in parts:
        z = np.asarray(features[part], np.float64) @ weights.T + scaling * bias
        true = z[np.arange(len(z)), labels[part]].copy()
        z += 1.0
        z[np.arange(len(z)), labels[part]] -= 1.0
        loss += float(np.sum(cost[part] * (z.max(axis=1) - true)))
    return norm + loss, -norm - linear
