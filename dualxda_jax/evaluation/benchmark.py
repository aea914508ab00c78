"""The core of a benchmark of attribution methods: which metrics there are, what a method costs, and who is ahead.

Everything here works on arrays and on methods behind `baselines.Method`; what trains networks, keeps results and draws
is `pipeline` and `report`.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines import Context, Method
from dualxda_jax.types import Array, Progress

LONG = 30.0
"""Seconds. A preparation that takes longer than this is not run again without its compilation, which it dwarfs."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column of the table.

    Attributes:
        name: short, as the command takes it.
        title: as the table shows it.
        higher: whether a higher value is the better one.
        says: what is measured, in a line.
    """

    name: str
    title: str
    higher: bool
    says: str


_AGAINST = "against the original network's predictions"

METRICS = {
    name: Metric(name, title, higher, says)
    for name, title, higher, says in (
        ("class", "Class detection", True, "share of the 5 top samples that carry the predicted class"),
        ("subclass", "Subclass detection", True, "the same for the true fine class, after training on merged ones"),
        ("shortcut", "Shortcut detection", True, "average precision of the scores in finding the training samples that "
         "carry a mark, over queries that the mark misled"),
        ("mislabel", "Mislabelling detection", True, "how early flipped labels are met by falling self-influence: "
         "1 is first of all, 0.5 is chance"),
        ("lds", "LDS", True, "rank correlation of summed scores with what networks retrained on random halves say"),
        ("coreset", "Coreset selection", False, f"cross-entropy of networks retrained on the top samples, {_AGAINST}"),
        ("pruning", "Data pruning", True, f"cross-entropy of networks retrained without the top samples, {_AGAINST}"),
    )
}  # fmt: skip


class Cost(NamedTuple):
    """What a method took.

    Attributes:
        prepare: seconds of `fit`, from the network and the training set to all that scores need, arrays ready.
        explain: seconds of `scores` for all queries, from their inputs to [q, n] scores, arrays ready.
        queries: q.
        kept: bytes of the arrays that `fit` returns, the network and the training set not counted.
        compiled: False where `prepare` includes compilation, because a second run would have taken too long.
    """

    prepare: float
    explain: float
    queries: int
    kept: int
    compiled: bool


def prepare(method: Method, key: Array, context: Context, *, timed: bool = False) -> tuple[Any, float, bool]:
    """Fit a method, and say how long that took.

    Args:
        method: any.
        key: typed key.
        context: what to learn from.
        timed: run it again without compilation, unless the first run took longer than `LONG`.

    Returns:
        What `method.fit` returned, seconds, and whether they are without compilation.
    """
    fitted, seconds = _timed(lambda: method.fit(key, context))
    if not timed or seconds > LONG:
        return fitted, seconds, False
    _, seconds = _timed(lambda: method.fit(key, context))
    return fitted, seconds, True


def score_blocks(
    method: Method, fitted: Any, x: Any, targets: Any, *, chunk: int = 100, timed: bool = True,
    progress: Progress | None = None,
) -> Iterator[tuple[slice, Array, float]]:  # fmt: skip
    """Scores of many queries, a block at a time, with the seconds that each block took.

    Args:
        method: any.
        fitted: what its `fit` returned.
        x: [q, ...] queries as the network takes them.
        targets: [q] classes to explain.
        chunk: queries in a block; all blocks have one shape, the last is filled up.
        timed: compute the first block twice, so that its seconds are without compilation.
        progress: called with (queries done, q).

    Returns:
        (which queries, scores [b, n], seconds), block by block.

    Raises:
        ValueError: what the method refuses; a score that is not finite, with the method and the query.
    """
    q = len(targets)
    size = min(chunk, q)
    for start in range(0, q, size):
        part = slice(start, min(start + size, q))
        take = np.minimum(np.arange(start, start + size), q - 1)
        xs, ts = jnp.asarray(np.asarray(x)[take]), jnp.asarray(np.asarray(targets)[take], jnp.int32)
        if start == 0 and timed:
            jax.block_until_ready(method.scores(fitted, xs, ts))
        found, seconds = _timed(lambda xs=xs, ts=ts: method.scores(fitted, xs, ts))
        found = found[: part.stop - start]
        bad = np.flatnonzero(~np.isfinite(np.asarray(found, np.float32)).all(axis=1))
        if bad.size:
            _check.fail(f"scores of {method.name}", f"NaN or Inf for query {start + bad[0]}", "finite")
        # A block that was filled up is billed for its own queries.
        yield part, found, seconds * (part.stop - start) / size
        if progress is not None:
            progress(part.stop, q)


def kept_bytes(fitted: Any, context: Context) -> int:
    """Bytes of the arrays of a fit that are not those of the context.

    Args:
        fitted: what `fit` returned.
        context: what it learned from.
    """
    known = {id(leaf) for leaf in jax.tree.leaves(context)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(fitted) if hasattr(leaf, "nbytes") and id(leaf) not in known)


def ranks(values: Any, higher: Sequence[bool]) -> np.ndarray:
    """Places of methods, metric by metric.

    Args:
        values: [r, t] of r methods in t metrics; nan where a method has no value.
        higher: [t] whether a higher value is better.

    Returns:
        [r, t] from 1, the best. Equal values share the mean of their places; methods without a value share the last
        ones. A metric in which no method has a value is nan.

    Raises:
        ValueError: values that are not [r, t].
    """
    values = np.asarray(values, np.float64)
    _check.shape("values", values, ("r", len(higher)))
    signed = np.where(np.isnan(values), -np.inf, np.where(np.asarray(higher), values, -values))
    places = np.empty(values.shape)
    for column, out in zip(signed.T, places.T, strict=True):
        better = (column[None, :] > column[:, None]).sum(axis=1)
        equal = (column[None, :] == column[:, None]).sum(axis=1)
        out[:] = better + (equal + 1) / 2
    places[:, np.isnan(values).all(axis=0)] = np.nan
    return places


def _timed(run: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    found = jax.block_until_ready(run())
    return found, time.perf_counter() - start
