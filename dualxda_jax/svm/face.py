"""A step for all free samples at once: conjugate gradients on the face of the simplices that q lies on.

Coordinate ascent soon finds which classes each q_i is on, and then takes long to balance them. On that face the dual is
a quadratic in the free q_i, whose scores must become equal over the classes of each: the equation is solved by
conjugate gradients, the step is brought back onto the simplices, and as much of it is taken as gains most. The dual
objective cannot fall.

An iteration reads the free rows once: with u the step in units of 1/(C_i ‖φ_i‖) and X the free rows at norm 1, the
matrix is J X Xᵀ J, J the removal of the mean over the classes of a sample; the curvature along p is ‖Xᵀp‖², known
before the rows are read for X(Xᵀp), after which the new residual is there for Xᵀr.

Conjugate gradients may run in a lower precision, as a direction need not be exact: the slope that they start from, the
point that is taken and its W are in the precision of the weights, so that steps refine each other.

Where more is free than W has room for, the quadratic is flat in some directions and the dual may rise along them
without end, up to the border of the simplices. Conjugate gradients run into such a direction once the rest is solved:
there they stop, and the direction is followed as far as it gains.

Source: Moré & Toraldo, On the solution of large quadratic programming problems with bound constraints (1991), with
coordinate ascent in the place of gradient projection.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import classwise, reduced, simplex
from dualxda_jax.svm.grouped import Block
from dualxda_jax.svm.problem import Array, contract, places

PART = 256
# Part of the residual that is left, the shares of the step that are tried, and the part of the gain that was promised
# from which on no smaller share is tried.
FORCING, SHARES, PROMISE = 0.1, (1.0, 0.3, 0.1, 0.03, 0.01), 0.5
# By Gram matrices so many times the iterations, and at most.
LONGER, MOST = 4, 300
# Curvature per squared length that counts as none; how far to go along such a direction, in terms of where the first q
# ends at zero.
FLAT, REACHES = 1e-7, (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)


class Face(NamedTuple):
    """The free samples side by side, p of them, padded to whole parts.

    Attributes:
        order: [p] int32 their places among all.
        parts: scalar int32, parts that hold any.
        features: [p, D] at norm 1, in the precision of conjugate gradients; zero beyond the free ones.
        weight: [p] C_i ‖φ_i‖; 0 beyond.
        norms: [p] ‖φ_i‖; 1 beyond.
        q: [k, p].
        active: [k, p] bool, q > 0.
    """

    order: Array
    parts: Array
    features: Array
    weight: Array
    norms: Array
    q: Array
    active: Array


def improve(block: Block, change: Array, q: Array, limit: Array | int) -> tuple[Array, Array, Array]:
    """Step on the face.

    Args:
        block: the samples.
        change: [k, D] of W since the block started.
        q: [k, m], in the precision of the change or a wider one.
        limit: iterations to take at most.

    Returns:
        The change and q after the step, and whether it kept its promise: that nothing much was in its way.
    """
    face = _face_of(block, q)

    def gradient(i: Array, slope: Array) -> Array:
        """In u: the scores at norm 1, the margin with them."""
        order = lax.dynamic_slice_in_dim(face.order, i * PART, PART)
        z = block.base[:, order] + contract(change, block.features[order], 1, 1)
        active, norms = _part(face.active, i), lax.dynamic_slice_in_dim(face.norms, i * PART, PART)
        mine = _balanced(active, z.astype(q.dtype) / norms[None, :])
        return lax.dynamic_update_slice_in_dim(slope, mine, i * PART, 1)

    slope = _over(face, gradient, jnp.zeros_like(face.q))
    step, flat = _step_on(face, slope, limit)
    promised = 0.5 * jnp.sum(slope * step)
    moved, towards, gain = _search(face, slope, face.q, step, jnp.asarray(SHARES, q.dtype), promised)

    def follow() -> tuple[Array, Array]:
        now = face.q + moved
        rest = slope - _seen(face, towards)
        delta = flat / jnp.where(face.weight > 0.0, face.weight, 1.0)[None, :]
        first = jnp.min(jnp.where(face.active & (delta < 0.0), now / jnp.where(delta < 0.0, -delta, 1.0), jnp.inf))
        reaches = jnp.where(jnp.isfinite(first), first, 0.0) * jnp.asarray(REACHES, q.dtype)
        more, further, _ = _search(face, rest, now, flat, reaches, jnp.asarray(jnp.inf, q.dtype))
        return moved + more, towards + further

    moved, towards = lax.cond(jnp.any(flat != 0.0), follow, lambda: (moved, towards))

    def put(i: Array, q: Array) -> Array:
        order, weight = (lax.dynamic_slice_in_dim(a, i * PART, PART) for a in (face.order, face.weight))
        place = jnp.where(weight > 0.0, order, q.shape[1])
        return q.at[:, place].set(_part(face.q, i) + _part(moved, i), mode="drop")

    return change - towards, _over(face, put, q), gain >= PROMISE * promised


def _step_on(face: Face, slope: Array, limit: Array | int) -> tuple[Array, Array]:
    """As `_solve`, the cheapest way: by one matrix where little is free, else by Gram matrices of the classes."""
    limit = jnp.asarray(limit, jnp.int32)

    def by_one() -> tuple[Array, Array]:
        more = jnp.minimum(reduced.LONGER * limit, reduced.MOST)
        return reduced.solve(face.features, face.active, slope, more, FORCING)

    few = reduced.count(face.active) <= reduced.ROOM
    return lax.cond(few, by_one, lambda: _step_on_many(face, slope, limit))


def _step_on_many(face: Face, slope: Array, limit: Array) -> tuple[Array, Array]:
    """As `_solve`, on a CPU by Gram matrices where they are small, and then with more iterations."""
    (k, p), width = slope.shape, face.features.shape[1]
    without = lambda: _solve(face, slope, limit)  # noqa: E731
    if not classwise.may_pay(p, width, k):
        return without()

    def choose() -> tuple[Array, Array]:
        slots = classwise.slots_of(face.active)
        more = jnp.minimum(LONGER * limit, MOST)
        by_class = lambda: classwise.solve(face.features, face.active, slots, slope, more, FORCING)  # noqa: E731
        return lax.cond(classwise.pays(slots, face.parts * PART, width, limit), by_class, without)

    # Hundreds of small products one after another are nothing for an accelerator.
    return lax.platform_dependent(cpu=choose, default=without)


def _seen(face: Face, image: Array) -> Array:
    """[k, p] what Σ u_i ⊗ x_i = image changes in the slope."""

    def one(i: Array, out: Array) -> Array:
        seen = contract(image, _rows(face, i), 1, 1).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, seen, i * PART, 1)

    return _balanced(face.active, _over(face, one, jnp.zeros_like(face.q)))


def _over(face: Face, body: Any, carry: Any) -> Any:
    """Fold `body(i, carry)` over the parts that hold free samples."""
    return lax.fori_loop(jnp.asarray(0, jnp.int32), face.parts, body, carry)


def _part(values: Array, i: Array) -> Array:
    """Columns [k, PART] of part i."""
    return lax.dynamic_slice_in_dim(values, i * PART, PART, 1)


def _rows(face: Face, i: Array) -> Array:
    """Features [PART, D] of part i."""
    return lax.dynamic_slice_in_dim(face.features, i * PART, PART)


def _face_of(block: Block, q: Array) -> Face:
    dtype, m, width = block.features.dtype, q.shape[1], block.features.shape[1]
    padded = -(-m // PART) * PART
    counts = jnp.arange(m, dtype=jnp.int32) < block.rows
    free = (jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1) & (block.cost[:m] > 0.0) & counts
    total = jnp.sum(free, dtype=jnp.int32)
    order = jnp.pad(places(free, m, 0), (0, padded - m))
    counts = jnp.arange(padded, dtype=jnp.int32) < total
    parts = (total + PART - 1) // PART

    def lay(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        mine = lax.dynamic_slice_in_dim(order, i * PART, PART)
        x = block.features[mine]
        norm = jnp.sqrt(jnp.sum(x * x, axis=1))
        there = lax.dynamic_slice_in_dim(counts, i * PART, PART) & (norm > 0.0)
        x = jnp.where(there[:, None], x / jnp.where(there, norm, 1.0)[:, None], 0.0)
        wide = norm.astype(q.dtype)
        weight = jnp.where(there, block.cost[mine].astype(q.dtype) * wide, 0.0)
        laid = (x, weight, jnp.where(there, wide, 1.0), jnp.where(there[None, :], q[:, mine], 0.0))
        put = lambda a, b, axis: lax.dynamic_update_slice_in_dim(a, b, i * PART, axis)  # noqa: E731
        return tuple(map(put, carry, laid, (0, 0, 0, 1)))

    rows, columns = jnp.zeros((padded, width), dtype), jnp.zeros((q.shape[0], padded), q.dtype)
    start = rows, jnp.zeros(padded, q.dtype), jnp.ones(padded, q.dtype), columns
    features, weight, norms, mine = lax.fori_loop(jnp.asarray(0, jnp.int32), parts, lay, start)
    return Face(order, parts, features, weight, norms, mine, mine > 0.0)


def _balanced(active: Array, values: Array) -> Array:
    """Values [k, b] on the active classes less their mean over them."""
    inside = jnp.where(active, values, 0.0)
    count = jnp.maximum(jnp.sum(active, axis=0, keepdims=True, dtype=jnp.int32), 1).astype(values.dtype)
    return jnp.where(active, inside - jnp.sum(inside, axis=0, keepdims=True) / count, 0.0)


def _solve(face: Face, slope: Array, limit: Array | int) -> tuple[Array, Array]:
    """The step [k, p] in u by conjugate gradients, and a direction without curvature or zero."""
    dtype, slope = slope.dtype, slope.astype(face.features.dtype)

    def over_parts(image: Array, share: Array, state: tuple[Array, Array, Array]) -> Any:
        """U and r after a step along p, with Xᵀr and ‖r‖² of the new r."""

        def one(i: Array, carry: Any) -> Any:
            u, r, p, seen, square = carry
            put = lambda a, b: lax.dynamic_update_slice_in_dim(a, b, i * PART, 1)  # noqa: E731
            x = _rows(face, i)
            mine = _part(r, i) - share * _balanced(_part(face.active, i), contract(image, x, 1, 1))
            u = put(u, _part(u, i) + share * _part(p, i))
            return u, put(r, mine), p, seen + contract(mine, x, 1, 0), square + jnp.sum(mine * mine)

        return _over(face, one, (*state, jnp.zeros_like(image), jnp.zeros((), image.dtype)))

    def unfinished(state: Any) -> Array:
        *_, square, i = state
        return (square > goal) & (i < limit)

    def iterate(state: Any) -> Any:
        u, r, p, image, square, i = state
        curvature = jnp.sum(image * image)
        level = curvature <= FLAT * jnp.sum(p * p)
        share = jnp.where(level, 0.0, square / jnp.where(level, 1.0, curvature))
        u, r, p, seen, new = over_parts(image, share, (u, r, p))
        ratio = jnp.where(level, 0.0, new / square)
        # Where it is level, p stays for the caller and the loop ends.
        return u, r, jnp.where(level, p, r + ratio * p), seen + ratio * image, jnp.where(level, -1.0, new), i + 1

    nothing = jnp.zeros_like(slope)
    width = face.features.shape[1]
    blank = jnp.zeros((slope.shape[0], width), slope.dtype)
    _, _, _, image, square = over_parts(blank, jnp.zeros((), slope.dtype), (nothing, slope, nothing))
    goal = FORCING**2 * square
    first = (nothing, slope, slope, image, square, jnp.asarray(0, jnp.int32))
    u, _, p, _, square, _ = lax.while_loop(unfinished, iterate, first)
    return u.astype(dtype), jnp.where(square < 0.0, p, 0.0).astype(dtype)


def _search(
    face: Face, slope: Array, q: Array, step: Array, shares: Array, promised: Array
) -> tuple[Array, Array, Array]:
    """The change of q [k, p], Σ C_i change_i ⊗ φ_i, and the gain: of the share that gains most once on the simplices.

    Args:
        face: the free samples.
        slope: [k, p] the gradient in u.
        q: [k, p] where they are.
        step: [k, p] in u.
        shares: [t] to try, one after another until one keeps the promise.
        promised: scalar, what the whole step would gain if nothing were in its way.
    """

    def attempt(state: Any) -> Any:
        best, change, image, j = state

        def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            moved, seen, rise = carry
            old, active = _part(q, i), _part(face.active, i)
            weight = lax.dynamic_slice_in_dim(face.weight, i * PART, PART)[None, :]
            point = old + shares[j] * _part(step, i) / jnp.where(weight > 0.0, weight, 1.0)
            # Columns beyond the free ones have no active class.
            inside = jnp.any(active, axis=0, keepdims=True)
            point = simplex.project(jnp.where(inside, jnp.where(active, point, -jnp.inf), 0.0), axis=0)
            mine = jnp.where(active, point - old, 0.0)
            seen = seen + contract((weight * mine).astype(seen.dtype), _rows(face, i), 1, 0)
            rise = rise + jnp.sum(_part(slope, i) * weight * mine)
            return lax.dynamic_update_slice_in_dim(moved, mine, i * PART, 1), seen, rise

        moved, seen, rise = _over(face, add, (jnp.zeros_like(step), jnp.zeros_like(image), zero))
        square = jnp.sum(seen * seen).astype(slope.dtype)
        length = jnp.clip(rise / jnp.where(square > 0.0, square, 1.0), 0.0, 1.0)
        gain = length * rise - 0.5 * length * length * square
        pick = lambda new, old: jnp.where(gain > best, new, old)  # noqa: E731
        return pick(gain, best), pick(length * moved, change), pick(length.astype(seen.dtype) * seen, image), j + 1

    def unfinished(state: Any) -> Array:
        best, _, _, j = state
        share = shares[jnp.maximum(j - 1, 0)]
        return (j < len(shares)) & ((j == 0) | (best < PROMISE * share * (2.0 - share) * promised))

    zero = jnp.zeros((), slope.dtype)
    blank = jnp.zeros((slope.shape[0], face.features.shape[1]), face.features.dtype)
    first = (zero, jnp.zeros_like(step), blank, jnp.asarray(0, jnp.int32))
    gain, change, image, _ = lax.while_loop(unfinished, attempt, first)
    return change, image, gain
