"""Derivatives of the dual solution by implicit differentiation, matrix-free.

Write P_i = C_i e_{y_i} − α_i, a point of the simplex of size C_i, and A_i for its positive entries. At a non-degenerate
optimum the margins z_ic = ⟨w_c, φ_i⟩ + b² Σ_j α_jc + 1[c ≠ y_i] are equal over A_i and smaller elsewhere, and A_i stays
as it is in a neighbourhood. With T_i the projection onto {v : v = 0 off A_i, Σ v = 0}, s_i the indicator of A_i and
K_ij = ⟨φ_i, φ_j⟩ + b², differentiating T_i z_i = 0 gives

    dα_i = dC_i (e_{y_i} − s_i/|s_i|) − u_i,    u_i in the range of T_i,
    T K T u = T (K D + α-weighted dφ + W dφ),   D_i = dC_i (e_{y_i} − s_i/|s_i|).                          (1)

The operator of (1) is symmetric and positive semidefinite; only rows with two or more positive entries take part, a
few hundred of 60,000. It is solved by conjugate residuals on rows scaled to unit norm, two products a step. The adjoint
needs one solve with the same operator. Everything runs in float64, whatever dtype comes in and whether or
not x64 is enabled; memory does not depend on how the solution was found.

The derivative does not exist where the pattern A changes (an entry of P_i that is 0 although its margin is at the
maximum, box corners) and where α is not unique (duplicated or linearly dependent free samples): there a least-squares
solution of (1) takes its place, whose effect on α is one of many. It is as exact as the solution is: the pattern must
be that of the optimum, so solve to a small gap first. A sample that is left out (cost 0) does not move with its
features; its derivative by cost is the one-sided one, as the cost rises from 0.

Source: the implicit function theorem on the optimality conditions of Crammer & Singer, JMLR 2001; conjugate residuals:
Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 6.20.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check

Array = jax.Array

# An entry of P_i counts as positive above this share of C_i; below lies what rounding leaves of a zero.
_POSITIVE = 1e-9
_POSITIVE_ULPS = 64
_CHUNK = 4096
_MAX_ITERATIONS = 5000


def attach(
    coefficients: Array,
    features: Array,
    labels: Array,
    cost: Array,
    *,
    num_classes: int,
    intercept_scaling: float,
) -> Array:
    """Give dual variables the derivatives of the optimum that they stand for.

    The value is `coefficients` itself. Forward and reverse derivatives by features and cost are those of the optimum
    (see the module's docstring for where they do not exist); what derivative `coefficients` carried is dropped.
    Only first derivatives: a second one is a ValueError.

    Args:
        coefficients: [n, k] the dual variables of a solve, to a small gap.
        features: [n, d] what was solved for.
        labels: [n] integers in 0..k-1.
        cost: [n] the cost of every sample, its weight included.
        num_classes: k.
        intercept_scaling: b.

    Returns:
        [n, k] coefficients.

    Raises:
        ValueError: shapes that do not belong together.
    """
    n = features.shape[0]
    _check.shape("coefficients", coefficients, (n, num_classes))
    _check.shape("labels", labels, (n,))
    _check.shape("cost", cost, (n,))
    return _attach(coefficients, features, labels, cost, float(intercept_scaling))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _attach(coefficients: Array, features: Array, labels: Array, cost: Array, intercept_scaling: float) -> Array:
    return coefficients


@_attach.defjvp
def _attach_jvp(intercept_scaling: float, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    at = Point(*map(_first_order, primals))
    static = Static(intercept_scaling, _capacity(at), _CHUNK)

    # The derivative is a linear map L of (dφ, dC). As the solution of the triangular system x = (dφ, dC), y − L x = 0
    # it can be given to JAX together with its adjoint: jvp, vjp and vmap follow, and no loop is unrolled.
    def solve(_: Any, right: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.enable_x64(True):
            change = _push(at, right[0], right[1], static=static)
        return right[0], right[1], right[2] + change

    def transpose_solve(_: Any, right: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.enable_x64(True):
            by_features, by_cost = _pull(at, right[2], static=static)
        return right[0] + by_features, right[1] + by_cost, right[2]

    # JAX transposes the system only where all of its right-hand side depends on what is differentiated by.
    link = _zero_of(tangents[1]) + _zero_of(tangents[3])
    right = tuple(part + link.astype(part.dtype) for part in (tangents[1], tangents[3], jnp.zeros_like(primals[0])))
    # The system's matrix itself is only needed for derivatives by what it is made of, which `_first_order` forbids.
    solved = lax.custom_linear_solve(lambda x: x, right, solve, transpose_solve)
    return primals[0], solved[2]


def _zero_of(tangent: Array) -> Array:
    """A float32 zero that is a linear function of the tangent."""
    return jnp.sum(jnp.where(False, tangent, 0.0)).astype(jnp.float32)


@jax.custom_jvp
def _first_order(value: Array) -> Array:
    return value


@_first_order.defjvp
def _first_order_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    _check.fail("svm.solve", "a second derivative", "differentiated once")


class Point(NamedTuple):
    """A solved problem: coefficients [n, k], features [n, d], labels [n], cost [n]."""

    coefficients: Array
    features: Array
    labels: Array
    cost: Array


class Static(NamedTuple):
    """What a program is compiled for: b, rows reserved for the free ones (None: all) and rows cast at once."""

    intercept_scaling: float
    capacity: int | None
    chunk: int


class Face(NamedTuple):
    """What the pattern of a solution gives, in float64.

    Attributes:
        active: [n, k] 1 at the positive entries of P, one or more a row.
        free: [n] rows with two or more of them.
        direction: [n, k] e_y − s/|s|: how α moves with the cost, but for u.
        alpha: [n, k] the coefficients.
        weights: [k, d] or, with an intercept, [k, d + 1].
    """

    active: Array
    free: Array
    direction: Array
    alpha: Array
    weights: Array


@functools.partial(jax.jit, static_argnames="static")
def _push(at: Point, by_features: Array, by_cost: Array, *, static: Static) -> Array:
    """Forward derivative: dα [n, k] from dφ [n, d] and dC [n]."""
    face = _face(at, static)
    d = at.features.shape[1]
    moved = face.direction * by_cost.astype(jnp.float64)[:, None]
    weights = _outer(moved, at.features, static.intercept_scaling, static.chunk)
    weights = weights.at[:, :d].add(_outer(face.alpha, by_features, 0.0, static.chunk))
    margins = _scores(at.features, weights, static.intercept_scaling, static.chunk) + _scores(
        by_features, face.weights[:, :d], 0.0, static.chunk
    )
    change = moved - _solve(at, face, _tangent(face.active, margins), static)
    return change.astype(at.coefficients.dtype)


@functools.partial(jax.jit, static_argnames="static")
def _pull(at: Point, cotangent: Array, *, static: Static) -> tuple[Array, Array]:
    """Reverse derivative: by φ [n, d] and C [n] from the cotangent [n, k] of α."""
    face = _face(at, static)
    d = at.features.shape[1]
    cotangent = cotangent.astype(jnp.float64)
    adjoint = _solve(at, face, _tangent(face.active, -cotangent), static)
    weights = _outer(adjoint, at.features, static.intercept_scaling, static.chunk)
    by_features = _dot(face.alpha, weights[:, :d]) + _dot(adjoint, face.weights[:, :d])
    by_cost = jnp.sum(
        face.direction * (cotangent + _scores(at.features, weights, static.intercept_scaling, static.chunk)), axis=1
    )
    return by_features.astype(at.features.dtype), by_cost.astype(at.cost.dtype)


def _face(at: Point, static: Static) -> Face:
    k = at.coefficients.shape[1]
    alpha, cost = at.coefficients.astype(jnp.float64), at.cost.astype(jnp.float64)
    one_hot = _one_hot(at.labels, k)
    positive = _positive(at)
    weights = _outer(alpha, at.features, static.intercept_scaling, static.chunk)
    # A row without cost has no positive entry: were its cost to rise, all of P would go to its largest margin.
    margins = _scores(at.features, weights, static.intercept_scaling, static.chunk) + (1.0 - one_hot)
    # Not argmax: its float64 form cannot be compiled for callers that have x64 off.
    classes = jnp.arange(k, dtype=jnp.int32)[None, :]
    highest = margins == jnp.max(margins, axis=1, keepdims=True)
    entering = _one_hot(jnp.min(jnp.where(highest, classes, k), axis=1), k)
    active = jnp.where((cost > 0.0)[:, None], positive.astype(jnp.float64), entering)
    size = jnp.sum(active, axis=1)
    direction = one_hot - active / jnp.maximum(size, 1.0)[:, None]
    return Face(active, size >= 2.0, direction, alpha, weights)


def _positive(at: Point) -> Array:
    """[n, k] where P is positive."""
    cost = at.cost.astype(jnp.float64)[:, None]
    simplex = cost * _one_hot(at.labels, at.coefficients.shape[1]) - at.coefficients.astype(jnp.float64)
    rounding = _POSITIVE_ULPS * float(jnp.finfo(at.coefficients.dtype).eps)
    return simplex > max(_POSITIVE, rounding) * cost


def _one_hot(labels: Array, k: int) -> Array:
    return (labels[:, None] == jnp.arange(k, dtype=labels.dtype)[None, :]).astype(jnp.float64)


def _tangent(active: Array, values: Array) -> Array:
    """T: keep the active entries of each row and subtract their mean."""
    kept = jnp.where(active > 0.0, values, 0.0)
    mean = jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(active, axis=1), 1.0)
    return jnp.where(active > 0.0, kept - mean[:, None], 0.0)


def _capacity(at: Point) -> int | None:
    """Rows to reserve for the free ones: a power of two where they can be counted, all of them in a trace."""
    if _check.is_traced(at):
        return None
    with jax.enable_x64(True):
        free = int(_count_free(at))
    return 1 << max(free - 1, 0).bit_length()


@jax.jit
def _count_free(at: Point) -> Array:
    return jnp.sum(jnp.sum(_positive(at), axis=1, dtype=jnp.int32) >= 2, dtype=jnp.int32)


def _dot(left: Array, right: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    # Not einsum or matmul: they name a result dtype, which vmap around jit checks where float64 is unknown.
    return lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), precision=lax.Precision.HIGHEST)


def sum_rows(left: Array, right: Array) -> Array:
    """Product leftᵀ · right, replicated: rows across an Explicit mesh axis end in one sum over the devices."""
    if not _row_sharded(right):
        return _dot(left, right, (0, 0))
    everywhere = NamedSharding(jax.typeof(right).sharding.mesh, PartitionSpec(None, None))
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=lax.Precision.HIGHEST, out_sharding=everywhere)


def _extended(features: Array, scaling: float) -> Array:
    """Rows in float64, with the constant feature where there is one."""
    features = features.astype(jnp.float64)
    if scaling == 0.0:
        return features
    return jnp.concatenate([features, jnp.full_like(features[:, :1], scaling)], axis=1)


def _outer(left: Array, features: Array, scaling: float, chunk: int) -> Array:
    """Σ_i left_i ⊗ (φ_i, b): [k, d] or [k, d + 1]; float64 rows are made chunk by chunk."""
    n, k = left.shape
    width = features.shape[1] + (scaling != 0.0)
    if _whole(features, chunk):
        return sum_rows(left, _extended(features, scaling))

    def add(number: Array, total: Array) -> Array:
        start = jnp.minimum(number * chunk, n - chunk)
        fresh = start + jnp.arange(chunk, dtype=jnp.int32) >= number * chunk
        rows = jnp.where(fresh[:, None], lax.dynamic_slice_in_dim(left, start, chunk), 0.0)
        return total + _dot(rows, _extended(lax.dynamic_slice_in_dim(features, start, chunk), scaling), (0, 0))

    return lax.fori_loop(*_count(-(-n // chunk)), add, jnp.zeros((k, width), jnp.float64))


def _scores(features: Array, weights: Array, scaling: float, chunk: int) -> Array:
    """[n, k] (φ_i, b) · weightsᵀ, chunk by chunk."""
    n, k = features.shape[0], weights.shape[0]
    if _whole(features, chunk):
        return _dot(_extended(features, scaling), weights, (1, 1))

    def write(number: Array, out: Array) -> Array:
        start = jnp.minimum(number * chunk, n - chunk)
        rows = _dot(_extended(lax.dynamic_slice_in_dim(features, start, chunk), scaling), weights, (1, 1))
        return lax.dynamic_update_slice_in_dim(out, rows, start, 0)

    return lax.fori_loop(*_count(-(-n // chunk)), write, jnp.zeros((n, k), jnp.float64))


def _row_sharded(array: Array) -> bool:
    """Rows lie across an Explicit mesh axis: they are neither sliced nor gathered."""
    spec = jax.typeof(array).sharding.spec
    return len(spec) > 0 and spec[0] is not None


def _whole(features: Array, chunk: int) -> bool:
    return features.shape[0] <= chunk or _row_sharded(features)


def _count(number: Array | int) -> tuple[Array, Array]:
    """Bounds of a loop in int32 whether or not x64 is enabled."""
    return jnp.asarray(0, jnp.int32), jnp.asarray(number, jnp.int32)


def _solve(at: Point, face: Face, right: Array, static: Static) -> Array:
    """Solve T K T u = right for u [n, k] in the range of T; right is in that range."""
    n, k = right.shape
    scaling = static.intercept_scaling
    # T of every row with one active entry is 0: in the order of the whole, such rows do no harm.
    if _row_sharded(at.features):
        scale = _unit_scale(_extended(at.features, scaling))
        rows = _extended(at.features, scaling) * scale

        def apply_all(u: Array) -> Array:
            return _tangent(face.active, _dot(rows, sum_rows(u, rows), (1, 1)))

        return scale * _conjugate_residuals(apply_all, scale * right, _limit(face))

    capacity = n if static.capacity is None else min(static.capacity, n)
    block = min(capacity, static.chunk)
    capacity = -(-capacity // block) * block
    where = _places(face.free, capacity)
    blocks = -(-jnp.sum(face.free, dtype=jnp.int32) // block)
    inside = jnp.minimum(where, n - 1)
    active = jnp.where((where < n)[:, None], face.active[inside], 0.0)

    def rows_of(number: Array) -> tuple[Array, Array]:
        part = lax.dynamic_slice_in_dim(inside, number * block, block)
        rows = _extended(at.features[part], scaling)
        scale = _unit_scale(rows)
        return rows * scale, scale

    def apply(u: Array) -> Array:
        def add(number: Array, total: Array) -> Array:
            part = lax.dynamic_slice_in_dim(u, number * block, block)
            return total + _dot(part, rows_of(number)[0], (0, 0))

        def write(number: Array, out: Array) -> Array:
            part = _tangent(
                lax.dynamic_slice_in_dim(active, number * block, block), _dot(rows_of(number)[0], weights, (1, 1))
            )
            return lax.dynamic_update_slice_in_dim(out, part, number * block, 0)

        weights = lax.fori_loop(*_count(blocks), add, jnp.zeros_like(face.weights))
        return lax.fori_loop(*_count(blocks), write, jnp.zeros_like(u))

    def scales(number: Array, out: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(out, rows_of(number)[1], number * block, 0)

    scale = lax.fori_loop(*_count(blocks), scales, jnp.ones((capacity, 1), jnp.float64))
    gathered = jnp.where(active > 0.0, scale * right[inside], 0.0)
    u = scale * _conjugate_residuals(apply, gathered, _limit(face))
    return jnp.zeros((n, k), jnp.float64).at[where].set(u, mode="drop")


def _places(chosen: Array, capacity: int) -> Array:
    """[capacity] places of the chosen rows, ascending; n beyond the last."""
    n = chosen.shape[0]
    rank = jnp.cumsum(chosen, dtype=jnp.int32) - 1
    slot = jnp.where(chosen, rank, capacity)
    return jnp.full(capacity, n, jnp.int32).at[slot].set(jnp.arange(n, dtype=jnp.int32), mode="drop")


def _unit_scale(rows: Array) -> Array:
    """[rows, 1] what brings each row to norm 1; 1 for a row of zeros."""
    squared = jnp.sum(rows * rows, axis=1, keepdims=True)
    return jnp.where(squared > 0.0, 1.0 / jnp.sqrt(jnp.where(squared > 0.0, squared, 1.0)), 1.0)


def _limit(face: Face) -> Array:
    """Steps allowed: exact arithmetic needs at most one for each free coordinate."""
    coordinates = jnp.sum(jnp.where(face.free, jnp.sum(face.active, axis=1) - 1.0, 0.0))
    return jnp.minimum(4.0 * coordinates + 20.0, float(_MAX_ITERATIONS))


def _conjugate_residuals(apply: Callable[[Array], Array], right: Array, limit: Array) -> Array:
    """Minimise ‖right − A x‖ from x = 0, A symmetric and positive semidefinite.

    Conjugate residuals rather than gradients: on a singular system without solution they still settle.
    """
    first = apply(right)
    energy = jnp.sum(right * first)
    floor = 1e-32 * energy
    small = 1e-30 * jnp.sum(right * right)

    def unfinished(state: Any) -> Array:
        step, _, residual, _, _, energy = state
        return (step < limit) & (energy > floor) & (jnp.sum(residual * residual) > small)

    def advance(state: Any) -> Any:
        step, x, residual, search, image, energy = state
        squared = jnp.sum(image * image)
        length = jnp.where(squared > 0.0, energy / jnp.where(squared > 0.0, squared, 1.0), 0.0)
        x, residual = x + length * search, residual - length * image
        applied = apply(residual)
        after = jnp.sum(residual * applied)
        ratio = after / energy
        return step + 1.0, x, residual, residual + ratio * search, applied + ratio * image, after

    start = (jnp.zeros_like(limit), jnp.zeros_like(right), right, right, first, energy)
    return lax.while_loop(unfinished, advance, start)[1]
