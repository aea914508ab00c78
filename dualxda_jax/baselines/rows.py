"""Per-sample gradients as rows: a dict from a parameter's path to its gradients of b samples.

An entry is an array [b, *shape of the parameter], or an `Outer` where the gradient of a matrix is an outer product.
Sums over parameters are taken entry by entry: the [b, p] matrix of all gradients is never held unless asked for.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.types import Array

_HIGHEST = lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """Gradients of a matrix [r, c] that are outer products.

    Attributes:
        left: [b, r].
        right: [b, c]; the gradient of sample i is left_i ⊗ right_i.
    """

    left: Array
    right: Array


Rows = dict[str, Array | Outer]


def dense(rows: Rows) -> dict[str, Array]:
    """Every entry as an array [b, *shape]."""
    return {
        name: entry.left[:, :, None] * entry.right[:, None, :] if isinstance(entry, Outer) else entry
        for name, entry in rows.items()
    }


def flat(rows: Rows) -> Array:
    """[b, p]: parameters in the order of their sorted paths, each in row-major order."""
    entries = dense(rows)
    return jnp.concatenate([entries[n].reshape(entries[n].shape[0], -1) for n in sorted(entries)], axis=1)


def count(rows: Rows) -> int:
    """b, how many samples."""
    return jax.tree.leaves(rows)[0].shape[0]


def nbytes(rows: Rows) -> int:
    """Bytes of the rows as they are held, also for the shapes that `jax.eval_shape` gives."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(rows))


def accumulator(rows: Rows) -> jnp.dtype:
    """float32, or float64 where any entry is."""
    return wide(*(a.dtype for a in jax.tree.leaves(rows)))


def wide(*dtypes: Any) -> jnp.dtype:
    """float32, or float64 where any of the dtypes is."""
    return jnp.dtype(jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32)


def dot(left: Rows, right: Rows) -> Array:
    """Inner products ⟨left_i, right_j⟩ of all gradients, [q, n], accumulated in float32 or wider."""
    dtype = accumulator(left | right)
    total = jnp.zeros((count(left), count(right)), dtype)
    for name, a in left.items():
        b = right[name]
        if isinstance(a, Outer) and isinstance(b, Outer):
            total += products(a.left, b.left, dtype) * products(a.right, b.right, dtype)
        else:
            a, b = (dense({name: entry})[name] for entry in (a, b))
            total += products(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1), dtype)
    return total


def squared_norms(rows: Rows) -> Array:
    """‖gradient‖² of every sample, [b], accumulated in float32 or wider."""
    dtype = accumulator(rows)
    total = jnp.zeros(count(rows), dtype)
    for entry in rows.values():
        if isinstance(entry, Outer):
            total += _squares(entry.left, dtype) * _squares(entry.right, dtype)
        else:
            total += _squares(entry, dtype)
    return total


def products(left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """Products left · rightᵀ of [q, d] and [n, d] at the highest precision, in `dtype`."""
    if left.dtype != right.dtype:
        left, right = left.astype(dtype), right.astype(dtype)
    return jnp.matmul(left, right.T, precision=_HIGHEST, preferred_element_type=dtype)


def _squares(entry: Array, dtype: jnp.dtype) -> Array:
    return jnp.square(entry.astype(dtype)).sum(axis=tuple(range(1, entry.ndim)))
