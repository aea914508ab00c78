"""Conjugate gradients on the face by Gram matrices, one for each class.

Steps of two samples meet only in the scores of classes that both are on. With many classes, each of which few of the
free samples are on, the products of those that share one are few numbers beside the features times the classes: an
iteration by them is about ten times cheaper (37,322 × 2,048 × 50), and making them costs as much as eight without.

The steps are kept in slots: the free samples of the first class, those of the second, and so on, each class padded to
whole tiles. A Gram matrix is kept as its tiles on the diagonal and above.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import conjugate
from dualxda_jax.svm.coordinate import FEW_CLASSES
from dualxda_jax.svm.problem import Array, contract

# Rows of a tile at most, and at least; slots that there is room for in terms of samples, padding aside, and how many of
# them can be expected to be taken.
TILE, LEAST_TILE, SLOTS, EXPECTED = 128, 32, 4, 2
# Multiply-adds of products of matrices in the time that an iteration takes for a tile of any size.
TILE_COST = 4e5


class Slots(NamedTuple):
    """Where the free samples are, class by class.

    Attributes:
        place: [k, p] int32 slot of a sample on a class.
        sample: [s] int32 which of the free samples is in a slot.
        label: [s] int32 which class.
        taken: [s] bool, whether any is.
        last: [b] int32 the last tile of rows of the same class, for each tile of rows.
        rows: scalar int32, tiles of rows in use.
        tiles: scalar int32, tiles of all Gram matrices.
    """

    place: Array
    sample: Array
    label: Array
    taken: Array
    last: Array
    rows: Array
    tiles: Array


class Grams(NamedTuple):
    """Tiles [t, T, T] with the tiles of rows [t] and of columns [t] that they are products of."""

    tile: Array
    row: Array
    column: Array


def tile_of(samples: int, classes: int) -> int:
    """Rows of a tile: hardly more than a class can expect."""
    size = LEAST_TILE
    while size < TILE and size * classes < EXPECTED * samples:
        size *= 2
    return size


def room(samples: int, width: int, classes: int) -> int:
    """Tiles that there is room for: as much as the features take."""
    return samples * width // tile_of(samples, classes) ** 2


def may_pay(samples: int, width: int, classes: int) -> bool:
    """Whether `pays` can ever be: few classes have large Gram matrices."""
    return classes > FEW_CLASSES and room(samples, width, classes) >= classes


def slots_of(active: Array) -> Slots:
    """The slots for active [k, p] bool."""
    k, p = active.shape
    size = tile_of(p, k)
    capacity = -(-SLOTS * p // size) + k
    counts = jnp.sum(active, axis=1, dtype=jnp.int32)
    blocks = (counts + size - 1) // size
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    first = ends - blocks
    place = first[:, None] * size + jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    target = jnp.where(active, place, capacity * size)
    empty = jnp.zeros(capacity * size, jnp.int32)
    shape = (k, p)
    sample = empty.at[target].set(jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None, :], shape), mode="drop")
    label = empty.at[target].set(jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[:, None], shape), mode="drop")
    taken = jnp.zeros(capacity * size, bool).at[target].set(True, mode="drop")
    mine = jnp.searchsorted(ends, jnp.arange(capacity, dtype=jnp.int32), side="right")
    last = ends[jnp.minimum(mine, k - 1)] - 1
    return Slots(place, sample, label, taken, last, ends[-1], jnp.sum(blocks * (blocks + 1) // 2, dtype=jnp.int32))


def pays(slots: Slots, samples: Array, width: int, limit: Array | int) -> Array:
    """Whether there is room, and `limit` iterations take less time than by reading `samples` rows of features."""
    k, p = slots.place.shape
    size = tile_of(p, k)
    fits = (slots.rows <= slots.last.shape[0]) & (slots.tiles <= room(p, width, k))
    tiles, limit = slots.tiles.astype(jnp.float32), jnp.asarray(limit, jnp.float32)
    price = tiles * (size * size * width + limit * TILE_COST)
    return fits & (price < limit * samples.astype(jnp.float32) * (2.0 * width * k))


def _grams_of(features: Array, slots: Slots, classes: int) -> Grams:
    """The Gram matrices of features [p, D]."""
    p, width = features.shape
    size, most = tile_of(p, classes), room(p, width, classes)
    take = lambda j: features[lax.dynamic_slice_in_dim(slots.sample, j * size, size)]  # noqa: E731

    def rows(i: Array, carry: Any) -> Any:
        mine = take(i)

        def columns(j: Array, carry: Any) -> Any:
            (tile, row, column), t = carry
            made = contract(mine, take(j), 1, 1)
            return Grams(tile.at[t].set(made), row.at[t].set(i), column.at[t].set(j)), t + 1

        return lax.fori_loop(i, slots.last[i] + 1, columns, carry)

    none = jnp.asarray(0, jnp.int32)
    empty = Grams(jnp.zeros((most, size, size), features.dtype), jnp.zeros(most, jnp.int32), jnp.zeros(most, jnp.int32))
    return lax.fori_loop(none, slots.rows, rows, (empty, none))[0]


def solve(
    features: Array, active: Array, slots: Slots, slope: Array, limit: Array, forcing: float
) -> tuple[Array, Array]:
    """Conjugate gradients for J X Xᵀ J u = slope, J the removal of the mean over the active classes of a sample.

    Args:
        features: [p, D] X, the free samples at norm 1.
        active: [k, p] bool, the classes that they are on.
        slots: where.
        slope: [k, p] balanced.
        limit: scalar int32, iterations at most.
        forcing: part of the residual that may be left.

    Returns:
        u [k, p], and a direction without curvature or zero.
    """
    k, p = active.shape
    size = tile_of(p, k)
    grams = _grams_of(features, slots, k)
    number = jnp.maximum(jnp.sum(active, axis=0, dtype=jnp.int32), 1).astype(features.dtype)

    def balanced(values: Array) -> Array:
        values = jnp.where(slots.taken, values, 0.0)
        mean = jnp.zeros(p, values.dtype).at[slots.sample].add(values) / number
        return jnp.where(slots.taken, values - mean[slots.sample], 0.0)

    def product(values: Array) -> Array:
        def one(t: Array, out: Array) -> Array:
            tile, i, j = grams.tile[t], grams.row[t] * size, grams.column[t] * size
            take = lambda a, at: lax.dynamic_slice_in_dim(a, at, size)  # noqa: E731
            out = lax.dynamic_update_slice_in_dim(out, take(out, i) + contract(tile, take(values, j), 1, 0), i, 0)
            other = jnp.where(i == j, 0.0, contract(tile, take(values, i), 0, 0))
            return lax.dynamic_update_slice_in_dim(out, take(out, j) + other, j, 0)

        return lax.fori_loop(jnp.asarray(0, jnp.int32), slots.tiles, one, jnp.zeros_like(values))

    start = jnp.where(slots.taken, slope.astype(features.dtype)[slots.label, slots.sample], 0.0)
    u, level = conjugate.solve(lambda towards: balanced(product(towards)), start, limit, forcing)
    back = lambda values: jnp.where(active, values[slots.place], 0.0).astype(slope.dtype)  # noqa: E731
    return back(u), back(level)
