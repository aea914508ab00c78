"""Derivatives of the dual solution by implicit differentiation, matrix-free.

Write P_i = C_i e_{y_i} − α_i, a point of the simplex of size C_i, and A_i for its positive entries. At a non-degenerate
optimum the margins z_ic = ⟨w_c, φ_i⟩ + b² Σ_j α_jc + 1[c ≠ y_i] are equal over A_i and smaller elsewhere, and A_i stays
as it is in a neighbourhood. With T_i the projection onto {v : v = 0 off A_i, Σ v = 0}, s_i the indicator of A_i and
K_ij = ⟨φ_i, φ_j⟩ + b², differentiating T_i z_i = 0 gives

    dα_i = dC_i (e_{y_i} − s_i/|s_i|) − u_i,    u_i in the range of T_i,
    T K T u = T (K D + α-weighted dφ + W dφ),   D_i = dC_i (e_{y_i} − s_i/|s_i|).                          (1)

With smoothing γ, z_i − γ q_i with q_i = P_i / C_i takes the place of z_i. Then s_i/|s_i| becomes q_i, the operator
T K T + γ/C, and the right-hand side has T (− q dγ) in addition: the solution is unique, and conditioned by γ/C.

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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax import _check
from dualxda_jax.svm import implicit_rows as rows
from dualxda_jax.svm import simplex
from dualxda_jax.svm.problem import contract

Array = jax.Array

# An entry of P_i counts as positive above this share of C_i; below lies what rounding leaves of a zero.
_POSITIVE = 1e-9
_POSITIVE_ULPS = 64
_CHUNK = 4096


def attach(
    coefficients: Array,
    features: Array,
    labels: Array,
    cost: Array,
    smoothing: Array | float = 0.0,
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
        smoothing: scalar γ of the solve.
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
    smoothing = jnp.asarray(smoothing, coefficients.dtype)
    return _attach(coefficients, features, labels, cost, smoothing, float(intercept_scaling))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _attach(
    coefficients: Array, features: Array, labels: Array, cost: Array, smoothing: Array, intercept_scaling: float
) -> Array:
    return coefficients


@_attach.defjvp
def _attach_jvp(intercept_scaling: float, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    at = rows.Point(*map(_first_order, primals))
    static = rows.Static(intercept_scaling, _capacity(at), _CHUNK)

    # The derivative is a linear map L of (dφ, dC). As the solution of the triangular system x = (dφ, dC), y − L x = 0
    # it can be given to JAX together with its adjoint: jvp, vjp and vmap follow, and no loop is unrolled.
    def solve(_: Any, right: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.enable_x64(True):
            change = _push(at, right[0], right[1], right[3], static=static)
        return right[0], right[1], right[2] + change, right[3]

    def transpose_solve(_: Any, right: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.enable_x64(True):
            by_features, by_cost, by_smoothing = _pull(at, right[2], static=static)
        return right[0] + by_features, right[1] + by_cost, right[2], right[3] + by_smoothing

    # JAX transposes the system only where all of its right-hand side depends on what is differentiated by.
    link = _zero_of(tangents[1]) + _zero_of(tangents[3]) + _zero_of(tangents[4])
    given = tangents[1], tangents[3], jnp.zeros_like(primals[0]), tangents[4]
    right = tuple(part + link.astype(part.dtype) for part in given)
    # The system's matrix itself is only needed for derivatives by what it is made of, which `_first_order` forbids.
    solved = lax.custom_linear_solve(lambda x: x, right, solve, transpose_solve)
    return primals[0], solved[2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def attach_weights(
    weights: Array, intercept: Array, coefficients: Array, features: Array, intercept_scaling: float
) -> tuple[Array, Array]:
    """Weights [k, d] and intercept [k] of coefficients [n, k], summed in float64, with their derivatives."""
    return weights, intercept


@attach_weights.defjvp
def _attach_weights_jvp(intercept_scaling: float, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
    weights, intercept, coefficients, features = primals
    _, _, change, by_features = tangents
    dtype = coefficients.dtype
    moved = rows.sum_rows(change, features.astype(dtype)) + rows.sum_rows(coefficients, by_features.astype(dtype))
    return (weights, intercept), (moved, intercept_scaling**2 * jnp.sum(change, axis=0))


def _zero_of(tangent: Array) -> Array:
    """A float32 zero that is a linear function of the tangent."""
    return jnp.sum(jnp.where(False, tangent, 0.0)).astype(jnp.float32)


@jax.custom_jvp
def _first_order(value: Array) -> Array:
    return value


@_first_order.defjvp
def _first_order_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    _check.fail("svm.solve", "a second derivative", "differentiated once")


@functools.partial(jax.jit, static_argnames="static")
def _push(at: rows.Point, by_features: Array, by_cost: Array, by_smoothing: Array, *, static: rows.Static) -> Array:
    """Forward derivative: dα [n, k] from dφ [n, d], dC [n] and dγ."""
    face = _face(at, static)
    d = at.features.shape[1]
    moved = face.direction * by_cost.astype(jnp.float64)[:, None]
    weights = rows.outer(moved, at.features, static.intercept_scaling, static.chunk)
    weights = weights.at[:, :d].add(rows.outer(face.alpha, by_features, 0.0, static.chunk))
    margins = rows.scores(at.features, weights, static.intercept_scaling, static.chunk) + rows.scores(
        by_features, face.weights[:, :d], 0.0, static.chunk
    )
    margins = margins - by_smoothing.astype(jnp.float64) * face.simplex
    change = moved - rows.solve(at, face, rows.tangent(face.active, margins), static)
    return change.astype(at.coefficients.dtype)


@functools.partial(jax.jit, static_argnames="static")
def _pull(at: rows.Point, cotangent: Array, *, static: rows.Static) -> tuple[Array, Array, Array]:
    """Reverse derivative: by φ [n, d], C [n] and γ from the cotangent [n, k] of α."""
    face = _face(at, static)
    d = at.features.shape[1]
    cotangent = cotangent.astype(jnp.float64)
    adjoint = rows.solve(at, face, rows.tangent(face.active, -cotangent), static)
    weights = rows.outer(adjoint, at.features, static.intercept_scaling, static.chunk)
    by_features = contract(face.alpha, weights[:, :d], 1, 0) + contract(adjoint, face.weights[:, :d], 1, 0)
    by_cost = jnp.sum(
        face.direction * (cotangent + rows.scores(at.features, weights, static.intercept_scaling, static.chunk)), axis=1
    )
    by_smoothing = -jnp.sum(adjoint * face.simplex).astype(at.smoothing.dtype)
    return by_features.astype(at.features.dtype), by_cost.astype(at.cost.dtype), by_smoothing


def _face(at: rows.Point, static: rows.Static) -> rows.Face:
    k = at.coefficients.shape[1]
    alpha, cost = at.coefficients.astype(jnp.float64), at.cost.astype(jnp.float64)
    one_hot = _one_hot(at.labels, k)
    positive = _positive(at)
    weights = rows.outer(alpha, at.features, static.intercept_scaling, static.chunk)
    # A row without cost has no positive entry: were its cost to rise, all of P would go to its largest margin.
    margins = rows.scores(at.features, weights, static.intercept_scaling, static.chunk) + (1.0 - one_hot)
    # Not argmax: its float64 form cannot be compiled for callers that have x64 off.
    classes = jnp.arange(k, dtype=jnp.int32)[None, :]
    highest = margins == jnp.max(margins, axis=1, keepdims=True)
    entering = _one_hot(jnp.min(jnp.where(highest, classes, k), axis=1), k)
    active = jnp.where((cost > 0.0)[:, None], positive.astype(jnp.float64), entering)
    size = jnp.sum(active, axis=1)
    gamma, weighs = at.smoothing.astype(jnp.float64), (cost > 0.0)[:, None]
    # With smoothing a row without cost has its q all the same, and may have several active classes.
    q = simplex.project(margins / jnp.where(gamma > 0.0, gamma, 1.0))
    q = jnp.where(weighs, one_hot - alpha / jnp.where(weighs, cost[:, None], 1.0), jnp.where(gamma > 0.0, q, active))
    q = jnp.where(active > 0.0, jnp.maximum(q, 0.0), jnp.where(weighs, 0.0, q))
    # As its cost grows, α_i follows e_y − q; without smoothing any point of the face does, and the mean loses least.
    towards = jnp.where(gamma > 0.0, q, active / jnp.maximum(size, 1.0)[:, None])
    return rows.Face(active, size >= 2.0, one_hot - towards, alpha, weights, q)


def _positive(at: rows.Point) -> Array:
    """[n, k] where P is positive."""
    cost = at.cost.astype(jnp.float64)[:, None]
    left = cost * _one_hot(at.labels, at.coefficients.shape[1]) - at.coefficients.astype(jnp.float64)
    rounding = _POSITIVE_ULPS * float(jnp.finfo(at.coefficients.dtype).eps)
    return left > max(_POSITIVE, rounding) * cost


def _capacity(at: rows.Point) -> int | None:
    """Rows to reserve for the free ones: a power of two where they can be counted, all of them in a trace."""
    if _check.is_traced(at):
        return None
    with jax.enable_x64(True):
        free = int(_count_free(at))
    return 1 << max(free - 1, 0).bit_length()


@jax.jit
def _count_free(at: rows.Point) -> Array:
    return jnp.sum(jnp.sum(_positive(at), axis=1, dtype=jnp.int32) >= 2, dtype=jnp.int32)


def _one_hot(labels: Array, k: int) -> Array:
    return (labels[:, None] == jnp.arange(k, dtype=labels.dtype)[None, :]).astype(jnp.float64)
