"""Sweeps over a block of samples that is swept many times: as `coordinate.sweep`, with less to do for each visit.

Groups are of the same samples in every sweep, so that their Gram matrices are made once. Scores are those at the W that
the block started from, made in the precision of that W and less the highest of the sample, plus those of the change
of W since then. Both are small near the solution, and so is what float32 loses on them: sweeps in float32 refine a
solution in float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import coordinate
from dualxda_jax.svm.problem import Array, Problem, contract, one_hot_of, places

# Samples of a group. A visit costs more in a larger one, a product less.
GROUP = 128


class Block(NamedTuple):
    """Samples to solve for, the others held fixed; the leading `rows` of them count. Padded to p, that is whole groups.

    Attributes:
        features: [p, D] with the constant feature among them, in the precision to sweep in.
        cost: [p].
        rows: scalar int32.
        base: [k, p] scores with the margin where the block starts, less the highest of each sample.
        gram: [g, b, b] products of the features within each group.
    """

    features: Array
    cost: Array
    rows: Array
    base: Array
    gram: Array


def block_of(problem: Problem, weights: Array) -> Block:
    """A block.

    Args:
        problem: dense rows, in the precision to sweep in, with the constant feature among them.
        weights: [k, D] W(α) of all samples, in the precision to take the first scores in.
    """
    (m, _), k, dtype = problem.features.shape, weights.shape[0], problem.cost.dtype
    size, chunk = min(GROUP, m), min(problem.chunk, m)
    groups = -(-m // size)
    features = _padded(problem.features, groups * size, 0)

    def score(i: Array, base: Array) -> Array:
        start = jnp.minimum(i * chunk, m - chunk)
        x = lax.dynamic_slice_in_dim(problem.features, start, chunk).astype(weights.dtype)
        labels = one_hot_of(lax.dynamic_slice_in_dim(problem.labels, start, chunk), k, weights.dtype)
        z = contract(weights, x, 1, 1) + problem.margin.astype(weights.dtype) * (1.0 - labels)
        return lax.dynamic_update_slice_in_dim(base, (z - jnp.max(z, axis=0)[None, :]).astype(dtype), start, 1)

    def multiply(j: Array, gram: Array) -> Array:
        x = lax.dynamic_slice_in_dim(features, j * size, size)
        return gram.at[j].set(contract(x, x, 1, 1))

    nothing = jnp.asarray(0, jnp.int32)
    base = lax.fori_loop(nothing, _parts(problem.rows, chunk), score, jnp.zeros((k, groups * size), dtype))
    gram = lax.fori_loop(nothing, _parts(problem.rows, size), multiply, jnp.zeros((groups, size, size), dtype))
    return Block(features, _padded(problem.cost, groups * size, 0), problem.rows, base, gram)


def _parts(rows: Array, size: int) -> Array:
    return (rows + size - 1) // size


def _padded(values: Array, size: int, axis: int) -> Array:
    """Values with zeros appended along an axis."""
    widths = [(0, size - length if i == axis else 0) for i, length in enumerate(values.shape)]
    return jnp.pad(values, widths)


def sweep(block: Block, change: Array, simplex: Array, skip: Array) -> coordinate.Swept:
    """Visit every sample once whose q could gain.

    Args:
        block: the samples.
        change: [k, D] of W since the block started.
        simplex: [k, m] q, in the precision of the change or a wider one.
        skip: scalar, leave a sample alone whose classes in q miss the highest score by no more than this.

    Returns:
        The change of W and q after the sweep, and what it saw.
    """
    m, size = simplex.shape[1], block.gram.shape[1]
    # Each group is visited once, so that what it was is read from outside of the loop: what a loop both reads and
    # updates is copied each time.
    before = _padded(simplex, block.features.shape[0], 1)

    def visit(j: Array, carry: coordinate.Swept) -> coordinate.Swept:
        start = j * size
        counts = start + jnp.arange(size, dtype=jnp.int32) < block.rows
        x = lax.dynamic_slice_in_dim(block.features, start, size)
        cost = jnp.where(counts, lax.dynamic_slice_in_dim(block.cost, start, size), 0.0)
        old = lax.dynamic_slice_in_dim(before, start, size, 1)
        z = lax.dynamic_slice_in_dim(block.base, start, size, 1) + contract(carry.weights, x, 1, 1)
        slack, moving = coordinate.movers(z, old, cost, skip)
        count = jnp.sum(moving, dtype=jnp.int32)

        def moved() -> tuple[Array, Array]:
            new = coordinate.visited(block.gram[j], cost, z, old, places(moving, size, 0), count)
            return carry.weights + contract(cost[None, :] * (old - new).astype(z.dtype), x, 1, 0), new

        weights, new = lax.cond(count > 0, moved, lambda: (carry.weights, old))
        q = lax.dynamic_update_slice_in_dim(carry.simplex, new, start, 1)
        return coordinate.Swept(weights, q, carry.slack + slack, carry.moved + count)

    first = coordinate.Swept(change, before, jnp.zeros((), change.dtype), jnp.asarray(0, jnp.int32))
    swept = lax.fori_loop(jnp.asarray(0, jnp.int32), _parts(block.rows, size), visit, first)
    return swept._replace(simplex=swept.simplex[:, :m])
