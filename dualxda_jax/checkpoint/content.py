"""What a pytree holds, as bytes: fingerprints and checksums."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


def fingerprint(*parts: Any) -> str:
    """Name what made a result by its content; the same on every machine and in every process.

    Args:
        *parts: pytrees of arrays, dataclasses, dicts, lists, tuples, strings, bytes, numbers, None, paths, dtypes.
            Order, types, dtypes and shapes count; whether an array is JAX's or NumPy's does not.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        CheckpointError: a part whose content cannot be read, such as a function.
    """
    digest = hashlib.sha256()
    for piece in _pieces(parts, "part"):
        digest.update(piece)
    return digest.hexdigest()


def digest(array: np.ndarray) -> str:
    """Checksum of an array's bytes."""
    found = hashlib.sha256()
    for chunk in _chunks(array):
        found.update(chunk)
    return found.hexdigest()


def _pieces(value: Any, where: str) -> Iterator[bytes]:
    """The value as bytes that no other value has: each piece says its type and its length."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        yield f"dataclass {type(value).__qualname__} {len(fields)};".encode()
        for name, field in fields:
            yield f"{name}=".encode()
            yield from _pieces(field, f"{where}.{name}")
    elif isinstance(value, dict):
        yield f"dict {len(value)};".encode()
        for key in sorted(value, key=lambda k: (type(k).__name__, repr(k))):
            yield from _pieces(key, where)
            yield from _pieces(value[key], f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)};".encode()
        for i, item in enumerate(value):
            yield from _pieces(item, f"{where}[{i}]")
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        impl, array = to_numpy(value)
        yield f"array {impl} {array.dtype.name} {array.shape};".encode()
        yield from _chunks(array)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | os.PathLike | np.dtype):
        kind = "path" if isinstance(value, os.PathLike) else type(value).__name__
        text = value if isinstance(value, bytes) else repr(str(value) if kind == "path" else value).encode()
        yield f"{kind} {len(text)};".encode() + text
    else:
        leaves, structure = jax.tree.flatten(value)
        if jax.tree_util.all_leaves([value]):
            raise CheckpointError(f"{where}: a {type(value).__name__} has no content to take a fingerprint of")
        yield f"pytree {structure};".encode()
        for i, leaf in enumerate(leaves):
            yield from _pieces(leaf, f"{where}.leaves[{i}]")


def _chunks(array: np.ndarray) -> Iterator[bytes]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].tobytes()


def to_numpy(array: Any) -> tuple[str, np.ndarray]:
    """The array's content, and the generator's name if it holds typed keys."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(array)), np.asarray(jax.random.key_data(array))
    return "", np.asarray(array)
