"""Running any method: fits that resume, scores of many queries, the best samples without the whole matrix."""

import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check, checkpoint
from dualxda_jax.baselines.placement import automatic
from dualxda_jax.baselines.protocol import Context, Method
from dualxda_jax.baselines.rows import Outer
from dualxda_jax.types import Array, Progress, TopK


@automatic
def fit_resumable(
    method: Method, key: Array, context: Context, folder: str | os.PathLike, *, progress: Progress | None = None
) -> Any:
    """`method.fit`, keeping each part in a folder as it is done; parts that are there already are not computed again.

    Args:
        method: one that has stages, as TRAK and TracIn.
        key: typed key.
        context: what to learn from.
        folder: where the parts are kept, one checkpoint each, named after the method: several methods may share it.
        progress: called with (parts done, parts in all).

    Returns:
        What `method.fit(key, context)` returns.

    Raises:
        ValueError: a method without stages, a folder that is a file.
        StaleCheckpoint: the folder holds parts of this method with other hyper-parameters, key, data or network.
    """
    stages = method.stages
    if stages is None:
        _check.fail("method", repr(method.name), "one with stages; this one's fit takes no time worth keeping")
    _check.key("key", key)
    if Path(folder).exists() and not Path(folder).is_dir():
        _check.fail("folder", f"the file {os.fspath(folder)!r}", "a folder")
    made_by = _fingerprint(method, key, context)
    count = stages.count(context)
    parts: tuple[Any, ...] = ()
    for number in range(count):
        path = Path(folder) / f"{method.name}-{number:04d}"
        part = _load(path, made_by)
        if part is None:
            part = stages.part(key, context, parts)
            checkpoint.save(path, _packed(part), fingerprint=made_by, overwrite=True)
        parts = (*parts, part)
        if progress is not None:
            progress(number + 1, count)
    return stages.join(key, context, parts)


def scores_to(
    method: Method,
    fitted: Any,
    x: Any,
    targets: Any,
    out: str | os.PathLike | None = None,
    *,
    chunk: int = 128,
    progress: Progress | None = None,
) -> np.ndarray:
    """Scores of many queries, a chunk of them at a time, to memory or to a file.

    Args:
        method: any.
        fitted: what its `fit` returned.
        x: [q, ...] queries, jax or numpy, perhaps memory-mapped.
        targets: [q] integers in 0..k-1.
        out: path of a .npy file to write into, memory-mapped; None for memory. The file appears when it is complete.
        chunk: queries at a time; the last chunk is filled up, so that all have one compiled shape.
        progress: called with (queries done, q).

    Returns:
        [q, n] on the host; the memory-mapped file, open for reading, if `out` is given.

    Raises:
        ValueError: what the method's `scores` refuses; a score that is not finite, naming the first query; an `out`
            that is no .npy file, or in a folder that is not there.
        OSError: the disk has no space for `out`.
    """
    if out is not None and not os.fspath(out).endswith(".npy"):
        _check.fail("out", repr(os.fspath(out)), "the path of a .npy file")
    if out is not None and not Path(out).parent.is_dir():
        _check.fail("out", repr(os.fspath(out)), "in a folder that is there")
    if out is not None and Path(out).is_dir():
        _check.fail("out", f"the folder {os.fspath(out)!r}", "the path of a .npy file")
    blocks = _blocks(method.scores, fitted, x, targets, chunk)
    result: Any = None
    partial = None if out is None else Path(os.fspath(out) + ".partial")
    q = np.shape(x)[0]
    for start, block in blocks:
        values = np.asarray(block)
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
        if bad.size:
            _check.fail("scores", f"NaN or Inf for query {start + int(bad[0])}", "finite")
        if result is None:
            shape, dtype = (q, values.shape[1]), values.dtype
            result = np.empty(shape, dtype) if partial is None else _mapped(partial, shape, dtype)
        result[start : start + len(values)] = values
        if progress is not None:
            progress(start + len(values), q)
    if partial is None:
        return result
    result.flush()
    del result
    os.replace(partial, os.fspath(out))  # type: ignore[arg-type]
    return np.load(os.fspath(out), mmap_mode="r")  # type: ignore[arg-type]


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new .npy file, memory-mapped, whose space on the disk is its own: a write without space ends the process."""
    found = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink()
                raise
            # A file system that cannot promise space.
    return found


def top_k(method: Method, fitted: Any, x: Any, targets: Any, *, k: int, largest: bool = True, chunk: int = 128) -> TopK:
    """The k best training samples of every query; only the scores of a chunk of queries are held.

    Args:
        method: any.
        fitted: what its `fit` returned.
        x: [q, ...] queries.
        targets: [q] integers in 0..k-1.
        k: how many to keep, from 1 to n.
        largest: True for proponents (highest first), False for opponents (lowest first).
        chunk: queries at a time.

    Returns:
        TopK(scores [q, k], best first, and index [q, k] into the training set); equal scores in the order of the
        training set.

    Raises:
        ValueError: k outside 1..n, and what the method's `scores` refuses; NaN among a query's scores.
    """
    if not (isinstance(k, int | np.integer) and k >= 1):
        _check.fail("k", k, "an integer, 1 or more")
    parts = [_best(start, block, int(k), largest) for start, block in _blocks(method.scores, fitted, x, targets, chunk)]
    return TopK(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _best(start: int, block: Array, k: int, largest: bool) -> tuple[Array, Array]:
    if k > block.shape[1]:
        _check.fail("k", k, f"an integer in 1..{block.shape[1]} (the number of training samples)")
    # NaN ranks above all others, if its sign is positive.
    values, index = _top(jnp.where(jnp.isnan(block), jnp.nan, block if largest else -block), k)
    bad = np.flatnonzero(~np.isfinite(np.asarray(values[:, 0]).astype(np.float32)))
    if bad.size:
        _check.fail("scores", f"NaN or Inf for query {start + int(bad[0])}", "finite")
    return (values if largest else -values), index


@functools.partial(jax.jit, static_argnums=1)
def _top(block: Array, k: int) -> tuple[Array, Array]:
    values, index = jax.lax.top_k(block, k)
    return values, index


def _blocks(scores: Callable[..., Any], fitted: Any, x: Any, targets: Any, chunk: int) -> Iterator[tuple[int, Array]]:
    """(first query, scores of a chunk)."""
    if not (isinstance(chunk, int | np.integer) and chunk >= 1):
        _check.fail("chunk", chunk, "an integer, 1 or more")
    q = np.shape(x)[0]
    if q == 0:
        _check.fail("x", "no queries", "at least one")
    _check.shape("targets", targets, (q,))
    size = min(int(chunk), q)
    for start in range(0, q, size):
        rows = [np.asarray(a[start : start + size]) for a in (x, targets)]
        missing = size - len(rows[0])
        filled = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) if missing else a for a in rows]
        try:
            found = scores(fitted, jnp.asarray(filled[0]), jnp.asarray(filled[1]))
        except ValueError as error:
            if not start:
                raise
            # A method counts the queries that it is given.
            raise ValueError(f"{error} (in the chunk of queries from {start})") from error
        yield start, found[: size - missing]


def _load(path: Path, made_by: str) -> Any:
    """The part that is there, or None where there is none or an interrupted one."""
    if not path.exists():
        return None
    try:
        return _unpacked(checkpoint.load(path, fingerprint=made_by))
    except checkpoint.StaleCheckpoint:
        raise
    except checkpoint.CheckpointError:
        return None


def _packed(part: Any) -> Any:
    """The part with dicts in place of `Outer`, which checkpoints do not know."""
    is_outer = lambda node: isinstance(node, Outer)  # noqa: E731
    replace = lambda node: {"outer": [node.left, node.right]} if is_outer(node) else node  # noqa: E731
    return jax.tree.map(replace, part, is_leaf=is_outer)


def _unpacked(part: Any) -> Any:
    # A parameter may have that name too; what is kept of it is no list.
    is_packed = lambda node: isinstance(node, dict) and set(node) == {"outer"} and isinstance(node["outer"], list)  # noqa: E731
    replace = lambda node: Outer(*node["outer"]) if is_packed(node) else node  # noqa: E731
    return jax.tree.map(replace, part, is_leaf=is_packed)


def _fingerprint(method: Method, key: Array, context: Context) -> str:
    """What a fit depends on. Of the network and the loss, which are functions, the equations that they trace to."""
    traced = jax.make_jaxpr(lambda p, x, y: context.loss(context.logits(p, x)[0], y[0]))(
        context.params, context.inputs[:1], context.labels[:1]
    )
    # Where a function lies in memory changes from run to run.
    equations = re.sub(r"0x[0-9a-f]+", "", str(traced))
    arrays = (context.inputs, context.labels, context.checkpoints, context.learning_rates)
    return checkpoint.fingerprint(method.name, method.stages.settings, key, arrays, context.head, equations)  # type: ignore[union-attr]
