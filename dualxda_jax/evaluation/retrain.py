"""Many networks of one kind, each trained on its own subset of one training set.

`many` is the pure core: parameters of all networks, stacked. `logits` drives it: it trains in chunks that fit the
memory, keeps what each finished network says of the queries, and after an interruption goes on with the others.
Network i is the one that `models.training.fit` trains on its subset alone with the same key, up to rounding.

Every step gathers a batch of the subset's own samples from the uint8 images on the device, so no left-out sample is
computed, and a whole training is one call. On a GPU or TPU the networks of a chunk run side by side (`vmap` over
parameters, optimizer states and batches). On a CPU each has the cores' full attention in turn, one thread a core:
there, batched products of small matrices gain nothing, and side by side the networks would drive each other out of
the caches. Measured in `benchmarks/retrain.py`.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dualxda_jax import _check, checkpoint
from dualxda_jax.evaluation import programs
from dualxda_jax.models import training
from dualxda_jax.types import Array, Params, Progress

_VERSION = "retrain-1"
_MEMORY = 2 << 30


def many(
    key: Array,
    module: Any,
    images: Any,
    labels: Any,
    subsets: Any,
    *,
    config: training.TrainConfig,
    across: str | None = None,
    sharding: NamedSharding | None = None,
) -> Params:
    """Train m networks, each on its subset.

    All take `config.steps` steps, whatever their subset's size; a pass over a small subset is short.

    Args:
        key: typed key, from which network i gets `jax.random.fold_in(key, i)`; or [m] keys, one each.
        module: a linen module as for `models.training.fit`.
        images: [n, ...] uint8 images or floats, shared by all.
        labels: [n] integers.
        subsets: [m, n] bool, known outside of jit.
        config: how each is trained.
        across: "vmap" trains all side by side, "map" one after another in the same program; None takes "map" on CPUs
            and "vmap" elsewhere.
        sharding: the first axis of its spec splits the networks over its mesh; m must be a multiple of those devices.

    Returns:
        The variables of `module`, each leaf with a leading m axis.

    Raises:
        ValueError: shapes that do not fit, labels that are no integers or outside 0..k-1, `subsets` not bool or one
            without members.
        FloatingPointError: a loss that is not finite, with the first network that has it and, if that is why, the first
            sample with NaN or Inf.
    """
    problem = _problem(key, module, images, labels, subsets)
    mine = problem.keys, programs.rows(problem.keys, problem.subsets, config)
    mine, shared = programs.placed(sharding, mine, (problem.images, problem.labels))
    variables, losses = programs.train(module, config, programs.across_or_default(across), sharding, shared, mine)
    _finite(np.asarray(losses), np.arange(len(problem.subsets)), problem)
    return variables


def logits(
    key: Array,
    module: Any,
    images: Any,
    labels: Any,
    subsets: Any,
    queries: Any,
    *,
    config: training.TrainConfig,
    folder: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    across: str | None = None,
    workers: int | None = None,
    sharding: NamedSharding | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """What networks trained on subsets say of the queries; resumable.

    A network is kept under the fingerprint of all that makes it (its key, its samples, the data, the module, the
    configuration and the queries), each by itself: other subsets may come and go, and chunks may change, without any
    network being trained twice. Equal (key, subset) pairs are trained once.

    Args:
        key: as in `many`.
        module: as in `many`.
        images: as in `many`.
        labels: as in `many`.
        subsets: as in `many`.
        queries: [q, ...] images of the kind of `images`.
        config: as in `many`.
        folder: where finished networks' logits are kept; None keeps nothing.
        memory: bytes that a chunk of networks may take at once; None takes half of what the device says it has, or
            2 GiB. CPUs train one network a chunk.
        across: as in `many`.
        workers: chunks trained at the same time by threads; None takes one a core on CPUs and 1 elsewhere.
        sharding: as in `many`, but m may be any number.
        progress: called with (networks done, m).

    Returns:
        [m, q, k] float32 on the host.

    Raises:
        ValueError: as `many`; no query.
        FloatingPointError: a loss that is not finite; finished networks stay kept.
        OSError: the folder cannot be written.
    """
    problem = _problem(key, module, images, labels, subsets)
    if len(np.shape(queries)) != len(np.shape(images)) or np.shape(queries)[1:] != np.shape(images)[1:]:
        _check.fail("queries", f"shape {np.shape(queries)}", f"[q, ...] like images {np.shape(images)}")
    if not len(queries):
        _check.fail("queries", "none", "at least one")
    across = programs.across_or_default(across)
    names = _names(problem, module, config, queries)
    kept = {name: found for name in names if (found := _recall(folder, name)) is not None}
    missing = list({name: i for i, name in enumerate(names) if name not in kept}.values())
    _, shared = programs.placed(sharding, (), (problem.images, problem.labels, jnp.asarray(queries)))
    ask = functools.partial(_ask, module, config, across, sharding, problem, shared)
    size = _chunk_size(module, problem, config, across, sharding, memory)
    chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
    done = sum(name in kept for name in names)
    report = progress or (lambda done, total: None)
    report(done, len(names))
    for chunk, answers in _computed(ask, chunks, _workers(workers, sharding)):
        for i, answer in zip(chunk, answers, strict=True):
            kept[names[i]] = answer
            if folder is not None:
                checkpoint.save(Path(folder) / names[i], answer, fingerprint=names[i], overwrite=True)
        done = sum(name in kept for name in names)
        report(done, len(names))
    return np.stack([kept[name] for name in names])


class _Problem(NamedTuple):
    """Checked arguments: keys [m], images [n, ...] and labels [n] on the device, subsets [m, n] on the host."""

    keys: Array
    images: Array
    labels: Array
    subsets: np.ndarray


def _problem(key: Array, module: Any, images: Any, labels: Any, subsets: Any) -> _Problem:
    if _check.is_traced(subsets):
        _check.fail("subsets", "a traced array", "known: which samples a network sees is decided outside of jit")
    subsets = np.asarray(subsets)
    if len(np.shape(images)) < 2 or np.shape(images)[0] == 0:
        _check.fail("images", f"shape {np.shape(images)}", "[n, ...] with n of 1 or more")
    n = np.shape(images)[0]
    _check.shape("labels", labels, (n,))
    _check.integers("labels", labels)
    training.check_labels(module, images[:1], labels)
    _check.shape("subsets", subsets, ("m", n))
    if subsets.dtype != np.bool_:
        _check.fail("subsets", f"dtype {subsets.dtype}", "bool")
    empty = np.flatnonzero(~subsets.any(axis=1))
    if len(subsets) == 0:
        _check.fail("subsets", "no rows", "at least one, one a network")
    if empty.size:
        _check.fail("subsets", f"{empty.size} without members, first in row {empty[0]}", "subsets with members")
    _check.key("key", key, many=len(subsets))
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(len(subsets))) if key.shape == () else key
    return _Problem(keys, jnp.asarray(images), jnp.asarray(labels).astype(jnp.int32), subsets)


def _ask(
    module: Any, config: training.TrainConfig, across: str, sharding: NamedSharding | None, problem: _Problem,
    shared: tuple[Array, Array, Array], chunk: list[int],
) -> np.ndarray:  # fmt: skip
    """[c, q, k] what the networks of a chunk say."""
    # Filled up with its last one, so that all devices have as many.
    filled = np.asarray(chunk + chunk[-1:] * (-len(chunk) % programs.devices_of(sharding)))
    part = problem._replace(keys=problem.keys[filled], subsets=problem.subsets[filled])
    mine, _ = programs.placed(sharding, (part.keys, programs.rows(part.keys, part.subsets, config)), ())
    answers, losses = programs.train_and_ask(module, config, across, sharding, shared, mine)
    _finite(np.asarray(losses), filled, problem)
    return np.asarray(answers)[: len(chunk)]


def _finite(losses: np.ndarray, which: np.ndarray, problem: _Problem) -> None:
    bad = which[~np.isfinite(losses)]
    if not bad.size:
        return
    rows = _check.rows_not_finite(problem.images)
    rows = rows[problem.subsets[bad[0], rows]]
    why = f"images: NaN or Inf in {rows.size} of its samples, first in row {rows[0]}" if rows.size else ""
    raise FloatingPointError(
        f"the loss is not finite in network {bad[0]} ({bad.size} in all): {why or 'lower learning_rate'}"
    )


def _workers(workers: int | None, sharding: NamedSharding | None) -> int:
    if workers is None:
        alone = jax.default_backend() != "cpu" or sharding is not None
        return 1 if alone else os.cpu_count() or 1
    if workers < 1:
        _check.fail("workers", workers, "1 or more")
    return workers


def _chunk_size(
    module: Any, problem: _Problem, config: training.TrainConfig, across: str, sharding: NamedSharding | None,
    memory: int | None,
) -> int:  # fmt: skip
    if memory is not None and memory < 1:
        _check.fail("memory", memory, "1 byte or more")
    devices = programs.devices_of(sharding)
    if across == "map":
        return devices
    if memory is None:
        stats = jax.devices()[0].memory_stats() or {}
        memory = stats.get("bytes_limit", 2 * _MEMORY) // 2
    return devices * max(1, memory // programs.bytes_of_step(module, problem.images, config))


def _computed(
    ask: Callable[[list[int]], np.ndarray], chunks: list[list[int]], workers: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(chunk, answers) as they are ready; in threads where there are several workers."""
    if min(workers, len(chunks)) < 2:
        for chunk in chunks:
            yield chunk, ask(chunk)
        return
    wide = bool(jax.config.read("jax_enable_x64"))

    def threaded(chunk: list[int]) -> np.ndarray:
        with jax.enable_x64(wide):  # a caller's `with` does not reach into other threads by itself
            return ask(chunk)

    # Compiled here, once; two threads that met a new program would both compile it.
    first = ask(chunks[0])
    with ThreadPoolExecutor(workers) as threads:
        running: dict[Future[np.ndarray], list[int]] = {threads.submit(threaded, c): c for c in chunks[1:]}
        try:
            yield chunks[0], first
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _names(problem: _Problem, module: Any, config: training.TrainConfig, queries: Any) -> list[str]:
    common = checkpoint.fingerprint(_VERSION, repr(module), config, problem.images, problem.labels, np.asarray(queries))
    return [
        checkpoint.fingerprint(common, key, np.packbits(subset))[:32]
        for key, subset in zip(problem.keys, problem.subsets, strict=True)
    ]


def _recall(folder: str | os.PathLike[str] | None, name: str) -> np.ndarray | None:
    if folder is None or not (Path(folder) / name).exists():
        return None
    try:
        return np.asarray(checkpoint.load(Path(folder) / name, fingerprint=name))
    except checkpoint.CheckpointError:
        return None  # the write that an interruption cut off; trained again
