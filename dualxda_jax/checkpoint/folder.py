"""The folder on disk: written so that it is whole or not there, checked when it is read."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualxda_jax.checkpoint.content import CheckpointError, digest
from dualxda_jax.checkpoint.structure import array_nodes, decode, difference, encode

_FORMAT = "dualxda-checkpoint-2"
_WITHOUT_CHECKSUM = "dualxda-checkpoint-1"
_ENTRIES = {"format", "fingerprint", "arrays", "structure", "checksums"}
_MANIFEST = "manifest.json"
_ARRAYS = "arrays-"


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
        CheckpointError: there is something at `path` already, a leaf that cannot be stored, or arrays that cannot be
            written, as on a full disk.
    """
    folder = Path(path)
    _refuse_foreign(folder, overwrite)
    arrays: list[np.ndarray] = []
    structure = encode(tree, arrays, "tree")
    folder.mkdir(parents=True, exist_ok=True)
    place = f"{_ARRAYS}{secrets.token_hex(4)}"
    # Orbax stores no arrays of size zero; those are in the manifest alone.
    stored = {str(i): a for i, a in enumerate(arrays) if a.size}
    if stored:
        _write(folder / place, stored)
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "arrays": place,
        "structure": structure,
        "checksums": [digest(a) for a in arrays],
    }
    partial = folder / f"{place}.json"
    with partial.open("w") as file:
        json.dump(manifest | {"checksum": _checksum(manifest)}, file)
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
    try:
        return _loaded(folder, manifest, like, fingerprint)
    except CheckpointError:
        raise
    except Exception as error:  # a manifest without a checksum may say anything
        raise CheckpointError(f"{folder}: cannot be read as its {_MANIFEST} says ({_reason(error)})") from error


def _write(place: Path, stored: dict[str, np.ndarray]) -> None:
    # Asked first: on a full disk, TensorStore's threads print a traceback for each of its writes.
    needed, free = sum(a.nbytes for a in stored.values()), shutil.disk_usage(place.parent).free
    if needed > free:
        raise CheckpointError(f"{place.parent}: no space, its arrays take {needed:,} bytes and {free:,} are free")
    try:
        with _checkpointer() as orbax:
            orbax.save(place.absolute(), stored)
    except OSError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever the file systems raise
        raise CheckpointError(f"{place.parent}: its arrays cannot be written ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _loaded(folder: Path, manifest: dict[str, Any], like: Any, fingerprint: str | None) -> Any:
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise StaleCheckpoint(
            f"{folder}: made by something else (fingerprint {_short(manifest['fingerprint'])}, "
            f"expected {_short(fingerprint)})"
        )
    if like is not None:
        expected = encode(like, [], "like")
        where = difference(manifest["structure"], expected, "tree")
        if where:
            raise CheckpointError(f"{folder}: another structure than `like`: {where}")
    arrays = _restore(folder, manifest)
    try:
        return decode(manifest["structure"], arrays, like)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _short(name: str | None) -> str:
    return name[:12] if name else "none"


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


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
        known = manifest["format"] in (_FORMAT, _WITHOUT_CHECKSUM)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(f"{folder}: not a checkpoint, its {_MANIFEST} is not one of {_FORMAT}")
    checksum = manifest.pop("checksum", None)
    whole = manifest["format"] == _WITHOUT_CHECKSUM or checksum == _checksum(manifest)
    if not whole or set(manifest) != _ENTRIES:
        raise CheckpointError(f"{folder}: damaged, its {_MANIFEST} is not what was saved")
    return manifest


def _restore(folder: Path, manifest: dict[str, Any]) -> list[np.ndarray]:
    nodes: list[Any] = [None] * len(manifest["checksums"])
    array_nodes(manifest["structure"], nodes)
    arrays = [np.empty(node["data"][1], jnp.dtype(node["data"][0])) for node in nodes]
    wanted = [i for i, array in enumerate(arrays) if array.size]
    if wanted:
        for i, array in _read(folder / manifest["arrays"], wanted).items():
            arrays[i] = array
    for i, array in enumerate(arrays):
        described = [array.dtype.name, list(array.shape)] == nodes[i]["data"]
        if not described or digest(array) != manifest["checksums"][i]:
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
        raise CheckpointError(f"{place.parent}: damaged, its arrays cannot be read ({_reason(error)})") from None


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax, without its lines of log for every array, and for errors, which it raises as well."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(logging.CRITICAL, level))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)
