"""The subspace step: all free samples of a working set at once, by conjugate gradients.

Coordinate ascent soon finds the active classes of each sample and then takes long to balance them. On fixed active
classes the dual is a quadratic in the free q_i, whose g_i = z_i − γ q_i must become equal over the classes of each:

    (T K T + shift) u = T g,    K = X Xᵀ,    shift_i = γ / (C_i ‖φ_i‖²),

with T the removal of the mean over a sample's active classes, X the free rows at norm 1 and u the step in units of
1 / (C_i ‖φ_i‖). The step is cut at the border of the simplices, and as much of it is taken as gains most: the dual
objective cannot fall.

Source: Moré & Toraldo, On the solution of large quadratic programming problems with bound constraints (1991), with
coordinate ascent in the place of gradient projection.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.ascent import INT, Block, columns, count_true, over, put_columns, put_rows, rows, true_indices
from dualxda_jax.svm.config import Heuristics
from dualxda_jax.svm.problem import Array, contract


class FreeSet(NamedTuple):
    """The free samples side by side, in whole parts.

    Attributes:
        order: [p] int32 where they are in the working set.
        number: scalar int32, how many there are.
        parts: scalar int32, parts that hold any.
        features: [p, D] at norm 1.
        weight: [p] C_i ‖φ_i‖; 1 beyond.
        shift: [p].
        simplex: [k, p] q; 0 beyond.
        slope: [k, p] T g in units of u.
    """

    order: Array
    number: Array
    parts: Array
    features: Array
    weight: Array
    shift: Array
    simplex: Array
    slope: Array


def balance(active: Array, values: Array) -> Array:
    """T: values [k, b] on the active classes less their mean over them."""
    inside = jnp.where(active, values, 0.0)
    mean = jnp.sum(inside, axis=0) / jnp.maximum(count_true(active, values.dtype, axis=0), 1.0)
    return jnp.where(active, inside - mean[None, :], 0.0)


def gather_free(block: Block, change: Array, simplex: Array, part: int, heuristics: Heuristics) -> FreeSet:
    """The free samples of a working set, where W has changed and q is `simplex`."""
    (k, m), width, dtype = simplex.shape, block.features.shape[1], block.features.dtype
    padded = -(-min(max(int(heuristics.free_room * m), heuristics.least_free), m) // part) * part
    free = (count_true(simplex > 0.0, dtype, axis=0) > 1.0) & (block.cost > 0.0)
    order, count, _ = true_indices(free, padded)
    parts = (count + part - 1) // part

    def lay(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, there = columns(order, j, part), j * part + jnp.arange(part, dtype=INT) < count
        take = lambda a, axis: jnp.take(a, i, axis=axis, mode="clip")  # noqa: E731
        x, cost = take(block.features, 0), take(block.cost, 0)
        norm = jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=1)), float(jnp.finfo(dtype).tiny) ** 0.5)
        old = jnp.where(there[None, :], take(simplex, 1), 0.0)
        moved = block.smoothing * (old - take(block.start, 1))
        g = take(block.base, 1) + contract(change, x, 1, 1) - moved.astype(dtype)
        weight = jnp.where(there, cost * norm, 1.0)
        shift = block.smoothing.astype(dtype) / jnp.maximum(weight * norm, heuristics.least_curvature)
        laid = x / norm[:, None], weight, shift, old, balance(old > 0.0, g) / norm[None, :]
        ways = put_rows, put_columns, put_columns, put_columns, put_columns
        return tuple(put(a, b, j) for put, a, b in zip(ways, carry, laid, strict=True))

    line, flat = jnp.ones(padded, dtype), jnp.zeros((k, padded), dtype)
    blank = jnp.zeros((padded, width), dtype), line, line, jnp.zeros((k, padded), simplex.dtype), flat
    return FreeSet(order, count, parts, *over(parts, lay, blank))


def conjugate_gradients(free: FreeSet, limit: Array, part: int, heuristics: Heuristics) -> Array:
    """[k, p] u by conjugate gradients from zero.

    An iteration reads the rows once: the curvature along p is ‖Xᵀp‖² + ⟨p, shift p⟩, known before they are read for
    X (Xᵀp), after which the new residual is there for Xᵀr.

    Args:
        free: the free samples.
        limit: scalar int32, iterations at most.
        part: rows read at once.
        heuristics: constants.
    """
    dtype, flat = free.slope.dtype, jnp.zeros_like(free.slope)

    def iterate(carry: Any) -> Any:
        u, r, p, image, square, i, first, _ = carry
        curvature = jnp.sum(image * image) + jnp.sum(free.shift[None, :] * p * p)
        level = curvature <= heuristics.flat * jnp.sum(p * p)
        share = jnp.where(level, 0.0, square / jnp.where(level, 1.0, curvature))

        def one(j: Array, c: tuple[Array, ...]) -> tuple[Array, ...]:
            u, r, seen, new = c
            x, towards = rows(free.features, j, part), columns(p, j, part)
            mine = balance(columns(free.simplex, j, part) > 0.0, contract(image, x, 1, 1))
            left = columns(r, j, part) - share * (mine + columns(free.shift, j, part)[None, :] * towards)
            u = put_columns(u, columns(u, j, part) + share * towards, j)
            return u, put_columns(r, left, j), seen + contract(left, x, 1, 0), new + jnp.sum(left * left)

        u, r, seen, new = over(free.parts, one, (u, r, jnp.zeros_like(image), jnp.zeros((), dtype)))
        ratio = jnp.where(i == 0, 0.0, new / square)
        first = jnp.where(i == 0, new, first)
        return u, r, r + ratio * p, seen + ratio * image, new, i + 1, first, level & (i > 0)

    def unfinished(carry: Any) -> Array:
        *_, square, i, first, level = carry
        return (square > heuristics.cg_forcing**2 * first) & (i < limit) & ~level

    # The first turn takes no step, as p and its image are zero: it computes the image of the slope.
    blank = jnp.zeros((flat.shape[0], free.features.shape[1]), dtype)
    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
    first = (flat, free.slope, flat, blank, one, jnp.asarray(0, INT), zero, jnp.asarray(False))
    return lax.while_loop(unfinished, iterate, first)[0]


class Trial(NamedTuple):
    """A share of the step that was tried.

    Attributes:
        poor: scalar bool, whether it gained too little of what it promised.
        share: scalar, the next share to try.
        length: scalar, how much of `moved` gains most.
        seen: [k, D] what `moved` takes from W.
        moved: [k, p] change of q.
    """

    poor: Array
    share: Array
    length: Array
    seen: Array
    moved: Array


def search(free: FreeSet, u: Array, part: int, heuristics: Heuristics) -> Trial:
    """The share of the step u whose projection onto the simplices gains enough; shares fall until one does."""
    dtype = u.dtype
    promised = 0.5 * jnp.sum(free.slope * u)
    blank = jnp.zeros((u.shape[0], free.features.shape[1]), dtype)

    def attempt(trial: Trial) -> Trial:
        share = trial.share

        def one(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            moved, seen, rise, bend = carry
            old, weight = columns(free.simplex, j, part), columns(free.weight, j, part)
            whole = (share * columns(u, j, part) / weight[None, :]).astype(old.dtype)
            point = jnp.where(old > 0.0, jnp.maximum(old + whole, 0.0), 0.0)
            total = jnp.maximum(jnp.sum(point, axis=0), float(jnp.finfo(dtype).tiny))
            step = jnp.where(old > 0.0, point / total[None, :] - old, 0.0)
            low = weight[None, :] * step.astype(dtype)
            seen = seen + contract(low, rows(free.features, j, part), 1, 0)
            rise = rise + jnp.sum(columns(free.slope, j, part) * low)
            bend = bend + jnp.sum(columns(free.shift, j, part)[None, :] * low * low)
            return put_columns(moved, step, j), seen, rise, bend

        zero = jnp.zeros((), dtype)
        moved, seen, rise, bend = over(free.parts, one, (trial.moved, jnp.zeros_like(blank), zero, zero))
        square = jnp.sum(seen * seen) + bend
        length = jnp.clip(rise / jnp.maximum(square, float(jnp.finfo(dtype).tiny)), 0.0, 1.0)
        gain = length * rise - 0.5 * length * length * square
        poor = gain < heuristics.promise * share * (2.0 - share) * promised
        return Trial(poor, heuristics.share_fall * share, length, seen, moved)

    zero = jnp.zeros((), dtype)
    first = Trial(jnp.asarray(True), zero + 1.0, zero, blank, jnp.zeros_like(free.simplex))
    return lax.while_loop(lambda t: t.poor & (t.share > heuristics.least_share), attempt, first)


def subspace_step(
    block: Block, change: Array, simplex: Array, limit: Array, heuristics: Heuristics
) -> tuple[Array, Array, Array]:
    """A step for all free samples of a working set.

    Args:
        block: the working set.
        change: [k, D] of W since it started.
        simplex: [k, m] q.
        limit: scalar int32, conjugate gradient iterations at most.
        heuristics: constants.

    Returns:
        The change of W and q after the step, and whether all of it could be taken.
    """
    part, m = min(heuristics.part, simplex.shape[1]), simplex.shape[1]
    free = gather_free(block, change, simplex, part, heuristics)
    u = conjugate_gradients(free, limit, part, heuristics)
    trial = search(free, u, part, heuristics)

    def back(j: Array, q: Array) -> Array:
        there = j * part + jnp.arange(part, dtype=INT) < free.number
        length = trial.length.astype(q.dtype)
        new = columns(free.simplex, j, part) + length * columns(trial.moved, j, part)
        return q.at[:, jnp.where(there, columns(free.order, j, part), m)].set(new, mode="drop")

    whole = trial.share >= heuristics.share_fall
    return change - trial.length * trial.seen, over(free.parts, back, simplex), whole
