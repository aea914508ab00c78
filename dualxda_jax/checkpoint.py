"""Pytrees on disk, in Orbax's format, with a fingerprint of what made them.

A checkpoint is a folder: `manifest.json` (structure, checksums, fingerprint) and the folder of Orbax that it names.
The manifest is put in place last and in one step: without it nothing loads, and an older checkpoint at the same path
stays whole until that moment.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import types

_FORMAT = "dualxda-checkpoint-1"
_MANIFEST = "manifest.json"
_ARRAYS = "arrays-"
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


class StaleCheckpoint(CheckpointError):
    """A checkpoint that something else has made: another model, data set or configuration."""


def save(path: str | os.PathLike, tree: Any, *, fingerprint: str | None = None, overwrite: bool = False) -> None:
    """Write a pytree.

    Args:
        path: the folder to make.
        tree: pytree of arrays (JAX or NumPy, keys and bfloat16 included) and plain numbers, strings and None.
        fingerprint: what made it, from `fingerprint`; `load` can ask for it.
        overwrite: replace a checkpoint that is at `path`; it stays whole until the new one is complete.

    Raises:
        CheckpointError: there is something at `path` already, or a leaf that cannot be stored.
    """
    folder = Path(path)
    _refuse_foreign(folder, overwrite)
    arrays: list[np.ndarray] = []
    structure = _encode(tree, arrays, "tree")
    folder.mkdir(parents=True, exist_ok=True)
    place = f"{_ARRAYS}{secrets.token_hex(4)}"
    # Orbax stores no arrays of size zero; those are in the manifest alone.
    stored = {str(i): a for i, a in enumerate(arrays) if a.size}
    if stored:
        with _checkpointer() as orbax:
            orbax.save((folder / place).absolute(), stored)
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "arrays": place,
        "structure": structure,
        "checksums": [_digest(a) for a in arrays],
    }
    partial = folder / f"{place}.json"
    with partial.open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / _MANIFEST)
    for old in folder.glob(f"{_ARRAYS}*"):
        if old.name != place:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def load(path: str | os.PathLike, like: Any = None, *, fingerprint: str | None = None) -> Any:
    """Read a pytree.

    Args:
        path: the folder that `save` made.
        like: a pytree of the same structure (arrays or `jax.ShapeDtypeStruct`); needed where the tree holds types that
            this package does not know, such as optimizer states. Arrays go where its arrays are sharded to.
        fingerprint: raise unless this is what was given to `save`; None does not ask.

    Returns:
        The pytree, with the types that were saved: dataclasses of `dualxda_jax.types` with their static fields, dicts,
        lists, tuples, JAX and NumPy arrays, typed keys.

    Raises:
        CheckpointError: nothing there, not a checkpoint, half-written or damaged, or another structure than `like`.
        StaleCheckpoint: another fingerprint.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise StaleCheckpoint(
            f"{folder}: made by something else (fingerprint {_short(manifest['fingerprint'])}, "
            f"expected {_short(fingerprint)})"
        )
    if like is not None:
        expected = _encode(like, [], "like")
        where = _difference(manifest["structure"], expected, "tree")
        if where:
            raise CheckpointError(f"{folder}: another structure than `like`: {where}")
    arrays = _restore(folder, manifest)
    try:
        return _decode(manifest["structure"], arrays, like)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


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
        impl, array = _to_numpy(value)
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


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(array):
        digest.update(chunk)
    return digest.hexdigest()


def _short(name: str | None) -> str:
    return name[:12] if name else "none"


def _to_numpy(array: Any) -> tuple[str, np.ndarray]:
    """The array's content, and the generator's name if it holds typed keys."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(array)), np.asarray(jax.random.key_data(array))
    return "", np.asarray(array)


def _encode(tree: Any, arrays: list[np.ndarray], where: str) -> Any:
    """The structure as JSON; appends the arrays in the order in which they are met."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"plain": type(tree).__name__, "value": tree}
    if type(tree) is dict and all(isinstance(key, str | int) for key in tree):
        return {"dict": [[key, _encode(tree[key], arrays, f"{where}[{key!r}]")] for key in tree]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_encode(item, arrays, f"{where}[{i}]") for i, item in enumerate(tree)]}
    if dataclasses.is_dataclass(tree) and getattr(types, type(tree).__name__, None) is type(tree):
        fields = dataclasses.fields(tree)
        return {
            "dataclass": type(tree).__name__,
            "fields": [[f.name, _encode(getattr(tree, f.name), arrays, f"{where}.{f.name}")] for f in fields],
            "static": [f.name for f in fields if f.metadata.get("static")],
        }
    if isinstance(tree, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return _encode_array(tree, arrays)
    if jax.tree_util.all_leaves([tree]):
        raise CheckpointError(f"{where}: a {type(tree).__name__} cannot be stored, only arrays and plain values")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [[jax.tree_util.keystr(key), _encode(leaf, arrays, f"{where}.leaf")] for key, leaf in leaves]
    return {"pytree": type(tree).__name__, "leaves": named}


def _encode_array(leaf: Any, arrays: list[np.ndarray]) -> dict[str, Any]:
    kind = "numpy" if isinstance(leaf, np.ndarray | np.generic) else "jax"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return {"array": -1, "kind": kind, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    impl, array = _to_numpy(leaf)
    arrays.append(array)
    encoded = {"array": len(arrays) - 1, "kind": kind, "dtype": str(leaf.dtype), "shape": list(np.shape(leaf))}
    return encoded | {"impl": impl, "data": [array.dtype.name, list(array.shape)]}


def _difference(saved: Any, expected: Any, where: str) -> str:
    """The first place in which two structures differ, or nothing."""
    names = [key for key in ("array", "plain", "dict", "list", "tuple", "dataclass", "pytree") if key in saved]
    kind = names[0]
    if kind not in expected:
        other = next(iter(expected))
        return f"{where} is saved as {kind}, `like` has {other}"
    if kind == "array":
        mine, theirs = ((s["dtype"], s["shape"]) for s in (saved, expected))
        return "" if mine == theirs else f"{where} is saved as {mine[0]}{mine[1]}, `like` has {theirs[0]}{theirs[1]}"
    if kind == "plain":
        same = saved["plain"] == expected["plain"]
        return "" if same else f"{where} is saved as {saved['plain']}, `like` has {expected['plain']}"
    if kind in ("dataclass", "pytree") and saved[kind] != expected[kind]:
        return f"{where} is saved as {saved[kind]}, `like` has {expected[kind]}"
    ours, others = _children(saved, kind), _children(expected, kind)
    if sorted(ours, key=str) != sorted(others, key=str):
        return f"{where} is saved with {list(ours)}, `like` has {list(others)}"
    for name in saved.get("static", ()):
        if ours[name]["value"] != others[name]["value"]:
            return f"{where}.{name} is saved as {ours[name]['value']}, `like` has {others[name]['value']}"
    found = (_difference(ours[name], others[name], f"{where}[{name!r}]") for name in ours)
    return next((text for text in found if text), "")


def _children(node: Any, kind: str) -> dict[Any, Any]:
    entries = node[{"dataclass": "fields", "pytree": "leaves"}.get(kind, kind)]
    return dict(enumerate(entries)) if kind in ("list", "tuple") else dict(entries)


def _decode(node: Any, arrays: list[np.ndarray], like: Any) -> Any:
    if "array" in node:
        return _decode_array(node, arrays[node["array"]], like)
    if "plain" in node:
        return node["value"]
    if "dict" in node:
        return {key: _decode(child, arrays, None if like is None else like[key]) for key, child in node["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in node:
            items = node[kind.__name__]
            return kind(_decode(item, arrays, None if like is None else like[i]) for i, item in enumerate(items))
    if "dataclass" in node:
        children = {f: _decode(c, arrays, None if like is None else getattr(like, f)) for f, c in node["fields"]}
        return getattr(types, node["dataclass"])(**children)
    if like is None:
        raise CheckpointError(f"holds a {node['pytree']}, a type that only `like` can tell")
    leaves, structure = jax.tree.flatten(like)
    decoded = [_decode(child, arrays, leaf) for (_, child), leaf in zip(node["leaves"], leaves, strict=True)]
    return jax.tree.unflatten(structure, decoded)


def _decode_array(node: Any, array: np.ndarray, like: Any) -> Any:
    if node["kind"] == "numpy":
        return array
    if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        raise CheckpointError(f"holds {array.dtype.name} arrays of JAX, which need jax_enable_x64")
    value = jnp.asarray(array)
    if node["impl"]:
        value = jax.random.wrap_key_data(value, impl=node["impl"])
    sharding = getattr(like, "sharding", None)
    return value if sharding is None else jax.device_put(value, sharding)


def _refuse_foreign(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is in the way")
    if not overwrite:
        raise CheckpointError(f"{folder}: exists already, overwrite=True replaces it")
    foreign = [p.name for p in folder.iterdir() if p.name != _MANIFEST and not p.name.startswith(_ARRAYS)]
    if foreign:
        raise CheckpointError(f"{folder}: not a checkpoint (it holds {sorted(foreign)[0]!r}), will not be overwritten")


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"{folder}: no checkpoint there")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file, not a checkpoint")
    if not (folder / _MANIFEST).exists():
        half = any(p.name.startswith(_ARRAYS) for p in folder.iterdir())
        raise CheckpointError(f"{folder}: {'half-written, save it again' if half else 'not a checkpoint'}")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        known = manifest["format"] == _FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(f"{folder}: not a checkpoint, its {_MANIFEST} is not one of {_FORMAT}")
    return manifest


def _restore(folder: Path, manifest: dict[str, Any]) -> list[np.ndarray]:
    nodes: list[Any] = [None] * len(manifest["checksums"])
    _collect(manifest["structure"], nodes)
    arrays = [np.empty(node["data"][1], jnp.dtype(node["data"][0])) for node in nodes]
    wanted = [i for i, array in enumerate(arrays) if array.size]
    if wanted:
        for i, array in _read(folder / manifest["arrays"], wanted).items():
            arrays[i] = array
    for i, array in enumerate(arrays):
        described = [array.dtype.name, list(array.shape)] == nodes[i]["data"]
        if not described or _digest(array) != manifest["checksums"][i]:
            raise CheckpointError(f"{folder}: damaged, array {i} is not what was saved")
    return arrays


def _read(place: Path, wanted: list[int]) -> dict[int, np.ndarray]:
    import orbax.checkpoint as ocp

    as_numpy = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i in wanted}
    try:
        with _checkpointer() as orbax:
            restored = orbax.restore(place.absolute(), restore_args=as_numpy)
        return {i: np.asarray(restored[str(i)]) for i in wanted}
    except Exception as error:  # Orbax and TensorStore raise whatever the file systems and the codecs raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(f"{place.parent}: damaged, its arrays cannot be read ({reason})") from None


def _collect(node: Any, nodes: list[Any]) -> None:
    if isinstance(node, dict) and "array" in node:
        nodes[node["array"]] = node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            _collect(child, nodes)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax, without its lines of log for every array."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(logging.WARNING, level))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)
