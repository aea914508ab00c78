"""Stages that are timed, shown while they run, and kept for the next run."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dualxda_jax import checkpoint
from dualxda_jax._check import fail
from dualxda_jax.report import Stage
from dualxda_jax.types import Progress

try:
    import fcntl
except ImportError:  # Windows has none: there, runs are not kept apart
    fcntl = None  # type: ignore[assignment]


class Watch(NamedTuple):
    """What shows a stage while it runs.

    Attributes:
        progress: called with (steps done, steps in all).
        remark: called once with whether the result was computed or reused.
    """

    progress: Progress
    remark: Callable[[str], None]


Track = Callable[[str], AbstractContextManager[Watch]]
"""name of a stage -> context manager around it."""


@contextlib.contextmanager
def silent(name: str) -> Iterator[Watch]:
    """The `Track` that shows nothing."""
    del name
    yield Watch(lambda done, total: None, lambda note: None)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this one writes to it; the system lets go of it when the process ends.

    Args:
        out: made if it is not there, and taken away again if the run fails before it keeps anything.

    Raises:
        ValueError: another run is at work there.
        OSError: the folder cannot be made.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail("out", f"{out}, where another run is at work", "a folder of its own, or wait for that run")
        try:
            yield
        except BaseException:
            _take_away(made)
            raise


def _take_away(made: list[Path]) -> None:
    """Remove folders that this run made, the innermost first, if nothing but its lock is in them."""
    with contextlib.suppress(OSError):
        if made and [path.name for path in made[0].iterdir()] == [".lock"]:
            (made[0] / ".lock").unlink()
            for folder in made:
                folder.rmdir()


def stage(
    folder: Path,
    track: Track,
    log: list[Stage],
    name: str,
    compute: Callable[[Progress], Any],
    made_by: str | None = None,
) -> Any:
    """Run one stage, or take its result from an earlier run.

    Args:
        folder: where results are kept.
        track: shows the stage.
        log: receives the stage with its seconds and whether it was computed or reused (nothing where nothing is kept).
        name: of the stage, and of its subfolder.
        compute: makes the result; is given a callback for its progress.
        made_by: fingerprint of all that makes the result what it is; None computes it every time and keeps nothing.

    Returns:
        The result: a pytree of arrays if it is kept, anything otherwise.
    """
    start = time.perf_counter()
    with track(name) as watch:
        note, result = "", None
        path = folder / name.replace(" ", "-")
        if made_by is not None:
            result, note = _recall(path, made_by)
        if result is None:
            result = jax.block_until_ready(compute(watch.progress))
            if made_by is not None:
                checkpoint.save(path, result, fingerprint=made_by, overwrite=True)
        watch.remark(note)
    log.append(Stage(name, time.perf_counter() - start, note))
    return result


def _recall(path: Path, made_by: str) -> tuple[Any, str]:
    """The kept result and what to say of it; (None, ...) if there is none that fits."""
    if not path.exists():
        return None, "computed"
    try:
        return checkpoint.load(path, fingerprint=made_by), "reused"
    except checkpoint.StaleCheckpoint:
        return None, "recomputed: inputs changed"
    except checkpoint.CheckpointError:
        return None, "recomputed: file damaged"
