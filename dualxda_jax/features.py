"""Penultimate features of a whole data set: batched in one compiled shape, sharded, resumable."""

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check, checkpoint
from dualxda_jax.types import Array, FeatureFn, Features, Params, Progress

_CACHE_ROWS = 16384


def extract(
    feature_fn: FeatureFn,
    params: Params,
    batches: Iterable[Any],
    *,
    batch_size: int,
    sharding: NamedSharding | None = None,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
    cache: str | os.PathLike | None = None,
    fingerprint: str | None = None,
) -> Features:
    """Features of all samples, in the order in which they come.

    Batches larger than `batch_size` are split, smaller ones padded: one shape is compiled, once per `feature_fn`.

    Args:
        feature_fn: (params, x[b, ...]) -> [b, d], row by row independent of the other rows.
        params: its parameters.
        batches: tuples (inputs[b, ...], labels[b]) or objects with `inputs`, `labels` and `mask[b]`; rows whose mask is
            False are dropped.
        batch_size: rows that the device sees at once.
        sharding: the first axis of its spec splits a batch over its mesh (axes of any type); the parameters are
            replicated. None computes where the parameters are.
        dtype: of the result, float32 or bfloat16.
        progress: called with (batches read, batches in all if `batches` has a length).
        cache: folder to keep finished parts in, so that an interrupted extraction goes on from there.
        fingerprint: what made the batches and `feature_fn`, needed with `cache`; `params` and `dtype` are added to it.

    Returns:
        Features(values [n, d], labels [n]).

    Raises:
        ValueError: no function, no batches, no samples, rows of several shapes, labels that are no integers or
            negative, lengths that differ, `batch_size` not positive or not a multiple of the devices that share a
            batch, features that are not [b, d], NaN or Inf among them.
        StaleCheckpoint: `cache` was made by something else.
    """
    _check_options(batch_size, sharding, dtype, cache, fingerprint)
    if not callable(feature_fn):
        _check.fail("feature_fn", f"a {type(feature_fn).__name__}", "a function (params, x) -> features")
    if not isinstance(batches, Iterable):
        _check.fail("batches", f"a {type(batches).__name__}", "an iterable of batches")
    name = None if cache is None else checkpoint.fingerprint(fingerprint, params, jnp.dtype(dtype).name)
    if sharding is not None:
        params = jax.device_put(params, NamedSharding(sharding.mesh, PartitionSpec()))

    def run(x: Any) -> Array:
        x = x if sharding is None else jax.device_put(x, sharding)
        return _forward(feature_fn, sharding, jnp.dtype(dtype).name, params, x)

    parts = _read_cache(cache, name)
    written = len(parts)
    known = np.concatenate([np.asarray(part.labels) for part in parts]) if parts else np.zeros(0, np.int32)
    fresh: list[Features] = []
    stream = _after(_chunks(batches, batch_size, progress), known)
    for values, labels in _computed(run, stream, batch_size):
        fresh.append(Features(values, labels))  # type: ignore[arg-type]  # on the host still
        if cache is not None and sum(len(part.labels) for part in fresh) >= _CACHE_ROWS:
            parts.append(_join(fresh))
            checkpoint.save(_part(cache, written), parts[-1], fingerprint=name, overwrite=True)
            written, fresh = written + 1, []
    if cache is not None and fresh:
        checkpoint.save(_part(cache, written), _join(fresh), fingerprint=name, overwrite=True)
    return _join(parts + fresh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(feature_fn: FeatureFn, sharding: NamedSharding | None, dtype: Any, params: Params, x: Array) -> Array:
    if sharding is not None:
        # Manual over the batch, so that no operation of the network needs a sharding rule of its own.
        rows = PartitionSpec(*sharding.spec[:1])
        feature_fn = jax.shard_map(
            feature_fn,
            mesh=sharding.mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            check_vma=False,
        )
    values = feature_fn(params, x)
    if jnp.ndim(values) != 2 or values.shape[0] != x.shape[0]:
        _check.fail("feature_fn", f"an output of shape {jnp.shape(values)} for {x.shape[0]} inputs", "[b, d]")
    return values.astype(dtype)


def _check_options(batch_size: int, sharding: Any, dtype: Any, cache: Any, fingerprint: str | None) -> None:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        _check.fail("batch_size", batch_size, "an integer, at least 1")
    _check.floating_name("dtype", dtype)
    if cache is not None and fingerprint is None:
        _check.fail("fingerprint", None, "what made the batches, where a cache is given")
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding):
        _check.fail("sharding", type(sharding).__name__, "a jax.sharding.NamedSharding over the batch axis")
    first = sharding.spec[0] if len(sharding.spec) else None
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if batch_size % devices:
        _check.fail("batch_size", batch_size, f"a multiple of {devices}, the devices that share a batch")


def _chunks(batches: Any, size: int, progress: Progress | None) -> Iterator[tuple[Any, np.ndarray]]:
    """Kept rows, at most `size` at once."""
    total = len(batches) if hasattr(batches, "__len__") else None
    expected: tuple[int, ...] | None = None
    for done, batch in enumerate(batches, 1):
        inputs, labels, mask = _unpack(batch)
        if mask is not None and not mask.all():
            inputs, labels = inputs[mask], labels[mask]
        expected = inputs.shape[1:] if expected is None else expected
        if inputs.shape[1:] != expected:
            _check.fail("batches", f"inputs of shape {inputs.shape[1:]} in batch {done}", f"of {expected} as before")
        if labels.size and labels.min() < 0:
            _check.fail("labels", f"{labels.min()} in batch {done}", "0 or more")
        for start in range(0, len(labels), size):
            yield inputs[start : start + size], labels[start : start + size]
        if progress is not None:
            progress(done, done if total is None else total)


def _unpack(batch: Any) -> tuple[Any, np.ndarray, np.ndarray | None]:
    if hasattr(batch, "inputs"):
        inputs, labels, mask = batch.inputs, batch.labels, getattr(batch, "mask", None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        (inputs, labels), mask = batch, None
    else:
        _check.fail("batches", type(batch).__name__, "tuples (inputs, labels) or objects with inputs, labels and mask")
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    _check.integers("labels", labels)
    _check.shape("labels", labels, [len(inputs)])
    if mask is None:
        return inputs, labels, None
    mask = np.asarray(mask)
    _check.shape("mask", mask, [len(inputs)])
    return inputs, labels, mask.astype(bool)


def _pad(inputs: np.ndarray, size: int) -> np.ndarray:
    if len(inputs) == size:
        return inputs
    return np.concatenate([inputs, np.zeros((size - len(inputs), *inputs.shape[1:]), inputs.dtype)])


def _after(stream: Iterator[tuple[Any, np.ndarray]], known: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """The stream without the rows that the cache holds."""
    row = 0
    for inputs, labels in stream:
        cached = known[row : row + len(labels)]
        row += len(labels)
        if not np.array_equal(cached, labels[: len(cached)]):
            raise checkpoint.StaleCheckpoint(
                "cache: its labels are not those of the batches; it was made by other data"
            )
        if len(cached) < len(labels):
            yield inputs[len(cached) :], labels[len(cached) :]
    if row < len(known):
        raise checkpoint.StaleCheckpoint(f"cache: holds {len(known)} rows, the batches only {row}; made by other data")


def _computed(
    run: Callable[[Any], Array], stream: Iterator[tuple[Any, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values, labels) on the host; one batch stays in flight while the next one is read."""
    pending: tuple[Array, np.ndarray] | None = None
    for inputs, labels in stream:
        values = run(_pad(inputs, size))
        if pending is not None:
            yield np.asarray(pending[0])[: len(pending[1])], pending[1]
        pending = values, labels
    if pending is not None:
        yield np.asarray(pending[0])[: len(pending[1])], pending[1]


def _read_cache(cache: str | os.PathLike | None, name: str | None) -> list[Features]:
    parts: list[Features] = []
    while cache is not None and _part(cache, len(parts)).exists():
        try:
            parts.append(checkpoint.load(_part(cache, len(parts)), fingerprint=name))
        except checkpoint.StaleCheckpoint:
            raise
        except checkpoint.CheckpointError:
            break  # the write that an interruption cut off; computed again
    # Parts behind a gap go: new ones may end at other rows, as with another batch_size, and after another interruption
    # old ones would follow them.
    for path in sorted(Path(cache).glob("part-*"))[len(parts) :] if cache is not None else ():
        shutil.rmtree(path)
    return parts


def _part(cache: str | os.PathLike, number: int) -> Path:
    return Path(cache) / f"part-{number:06d}"


def _join(parts: list[Features]) -> Features:
    if not sum(len(part.labels) for part in parts):
        _check.fail("batches", "no samples", "at least one")
    values = np.concatenate([np.asarray(part.values) for part in parts])
    bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
    if bad.size:
        rows = ", ".join(map(str, bad[:5]))
        _check.fail("features", f"NaN or Inf in {bad.size} of {len(values)} rows (first: {rows})", "finite")
    return Features(jnp.asarray(values), jnp.asarray(np.concatenate([np.asarray(part.labels) for part in parts])))
