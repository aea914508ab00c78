"""Random projections of per-sample gradients, made block by block from the key; no [p, P] matrix is ever held.

E⟨project(a), project(b)⟩ = ⟨a, b⟩ for every kind. The standard error relative to ‖a‖‖b‖ is at most √(2/P) for the dense
kinds and √(8/P) for "sjlt"; measured on a network's gradients they are equal.

- "gaussian", "rademacher": independent entries, normal or ±1, over √P. Cost n · p · P.
- "sjlt": a count-sketch, that is a sparse Johnson-Lindenstrauss transform with one entry a column: parameter (i, j)
  of a matrix goes with the sign s(i) t(j) to the place h(i) + g(j) mod P. An outer product's sketch is then the
  circular convolution of the sketches of its two factors, so that it is never multiplied out. Cost n · p for other
  gradients.

Sources: Johnson & Lindenstrauss 1984; Achlioptas 2003; Charikar, Chen & Farach-Colton 2002; Pham & Pagh 2013.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax import _check
from dualxda_jax.baselines.rows import Outer, Rows, accumulator, flat
from dualxda_jax.types import Array

KINDS = ("gaussian", "rademacher", "sjlt")

# Entries of the random matrix that are held at once.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Projection:
    """To how many dimensions, and how.

    Attributes:
        size: P.
        kind: "gaussian", "rademacher" or "sjlt".
    """

    size: int
    kind: str = "sjlt"

    def __post_init__(self) -> None:
        _check.positive_integer("projection", self.size)
        object.__setattr__(self, "size", int(self.size))  # of NumPy's, too: it is a part of fingerprints
        if self.kind not in KINDS:
            _check.fail("projection_kind", repr(self.kind), f"one of {', '.join(KINDS)}")


def check_size(projection: Projection, parameters: int) -> None:
    """Refuse to project to more dimensions than there are.

    Raises:
        ValueError: with both numbers.
    """
    if projection.size > parameters:
        _check.fail("projection", projection.size, f"at most {parameters}, the number of chosen parameters")


def project(key: Array, projection: Projection, rows: Rows) -> Array:
    """Project the gradients of b samples; the same key gives the same projection, whether they are `Outer` or not.

    Args:
        key: typed key.
        projection: how.
        rows: per-sample gradients.

    Returns:
        [b, P] in float32, or float64 where the gradients are.
    """
    return (_sketched if projection.kind == "sjlt" else _dense)(key, projection, rows, accumulator(rows))


def _dense(key: Array, projection: Projection, rows: Rows, dtype: jnp.dtype) -> Array:
    # Matrices one by one, all else together: every loop costs time to compile.
    entries = [rows[name] for name in sorted(rows) if _is_matrix(rows[name])]
    others = {name: entry for name, entry in rows.items() if not _is_matrix(entry)}
    if others:
        entries.append(flat(others)[:, :, None])
    keys = (jax.random.fold_in(key, i) for i in range(len(entries)))
    parts = (_blockwise(k, projection, entry, dtype) for k, entry in zip(keys, entries, strict=True))
    return functools.reduce(jnp.add, parts)


def _blockwise(key: Array, projection: Projection, entry: Array | Outer, dtype: jnp.dtype) -> Array:
    parameters = math.prod(_shape(entry))
    block = min(parameters, max(1, _BLOCK // projection.size))
    scale = 1 / math.sqrt(projection.size)

    def part(number: Array) -> Array:
        columns = _columns(entry, number * block + jnp.arange(block, dtype=jnp.int32))
        random = _random_block(jax.random.fold_in(key, number), block, projection).astype(columns.dtype)
        return scale * jnp.matmul(columns, random, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)

    if block == parameters:
        return part(jnp.int32(0))
    count = -(-parameters // block)
    b = jax.tree.leaves(entry)[0].shape[0]
    start = jnp.zeros((b, projection.size), dtype)
    return lax.scan(lambda sum, i: (sum + part(i), None), start, jnp.arange(count, dtype=jnp.int32))[0]


def _random_block(key: Array, rows: int, projection: Projection) -> Array:
    if projection.kind == "gaussian":
        return jax.random.normal(key, (rows, projection.size), jnp.float32)
    # 32 signs from every random word.
    words = jax.random.bits(key, (rows, -(-projection.size // 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
    return 1.0 - 2.0 * bits.reshape(rows, -1)[:, : projection.size].astype(jnp.float32)


def _columns(entry: Array | Outer, index: Array) -> Array:
    """[b, block] gradients of the parameters at these places in row-major order; 0 beyond the last."""
    if isinstance(entry, Outer):
        width = entry.right.shape[1]
        left = jnp.take(entry.left, index // width, axis=1, mode="fill", fill_value=0)
        return left * jnp.take(entry.right, index % width, axis=1)
    values = entry.reshape(entry.shape[0], -1)
    return jnp.take(values, index, axis=1, mode="fill", fill_value=0)


def _sketched(key: Array, projection: Projection, rows: Rows, dtype: jnp.dtype) -> Array:
    shapes = {name: _shape(rows[name]) for name in sorted(rows)}
    # One draw for all parameters: its lowest bit is the sign, the others are the place.
    words = jax.random.bits(key, (sum(sum(shape) for shape in shapes.values()),), jnp.uint32)
    parts = []
    for name, (height, width) in shapes.items():
        of_rows, of_columns, words = words[:height], words[height : height + width], words[height + width :]
        parts.append(_sketch(rows[name], (of_rows, of_columns), projection.size, dtype))
    return functools.reduce(jnp.add, parts)


def _sketch(entry: Array | Outer, words: tuple[Array, Array], size: int, dtype: jnp.dtype) -> Array:
    places = [((w >> 1) % jnp.uint32(size)).astype(jnp.int32) for w in words]
    signs = [1 - 2 * (w & 1).astype(dtype) for w in words]

    def count_sketch(values: Array, places: Array, signs: Array) -> Array:
        signed = values.astype(dtype) * signs[None, :]
        return jnp.zeros((size, values.shape[0]), dtype).at[places].add(signed.T).T

    if isinstance(entry, Outer):
        left, right = (count_sketch(v, p, s) for v, p, s in zip((entry.left, entry.right), places, signs, strict=True))
        return jnp.fft.irfft(jnp.fft.rfft(left) * jnp.fft.rfft(right), n=size)
    both = ((places[0][:, None] + places[1][None, :]) % size).reshape(-1)
    return count_sketch(entry.reshape(entry.shape[0], -1), both, (signs[0][:, None] * signs[1][None, :]).reshape(-1))


def _is_matrix(entry: Array | Outer) -> bool:
    return isinstance(entry, Outer) or entry.ndim == 3


def _shape(entry: Array | Outer) -> tuple[int, int]:
    """A parameter as a matrix: all axes but the last, and the last; a vector stands upright."""
    if isinstance(entry, Outer):
        return entry.left.shape[1], entry.right.shape[1]
    width = entry.shape[-1] if entry.ndim > 2 else 1
    return math.prod(entry.shape[1:]) // max(width, 1), width
