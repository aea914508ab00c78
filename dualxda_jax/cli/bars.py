"""Progress: bars on a terminal, one line for each stage where output goes to a file."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dualxda_jax import pipeline


@contextlib.contextmanager
def stage_bars(console: Console) -> Iterator[pipeline.Track]:
    """One progress bar a stage on a terminal; one line a stage, once it is done, where output goes to a file."""
    if not console.is_terminal:
        yield functools.partial(_stage_line, console)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:

        @contextlib.contextmanager
        def track(name: str) -> Iterator[pipeline.Watch]:
            task = bars.add_task(name, total=None, note="")
            yield pipeline.Watch(
                lambda done, total: bars.update(task, completed=done, total=total),
                lambda note: bars.update(task, note=note),
            )
            total = bars.tasks[task].total or 1
            bars.update(task, completed=total, total=total)

        yield track


@contextlib.contextmanager
def overall_bar(console: Console) -> Iterator[tuple[pipeline.Track, Callable[[int, int], None]]]:
    """One bar for all stages, with the time left, and one for the stage at work; lines where output goes to a file."""
    if not console.is_terminal:
        done = [0, 0]
        start = time.perf_counter()

        @contextlib.contextmanager
        def line(name: str) -> Iterator[pipeline.Watch]:
            with _stage_line(console, name) as watch:
                yield watch

        def count(now: int, total: int) -> None:
            if now * 10 // total != done[0] * 10 // total:
                minutes = (time.perf_counter() - start) / 60
                left = f"about {minutes * (total - now) / now:.0f} min left"
                console.print(f"{now} of {total} stages after {minutes:.0f} min, {left}", highlight=False)
            done[:] = [now, total]

        yield line, count
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description:<44}"), BarColumn(bar_width=16),
        MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]left"), TimeRemainingColumn(),
    )  # fmt: skip
    # The speed over all stages so far, not over the last few: short ones and long ones take turns.
    with Progress(*columns, console=console, speed_estimate_period=24 * 3600) as bars:
        whole = bars.add_task("all stages", total=None)
        current = bars.add_task("", total=None)

        @contextlib.contextmanager
        def track(name: str) -> Iterator[pipeline.Watch]:
            bars.reset(current, description=name, total=None)
            yield pipeline.Watch(
                lambda done, total: bars.update(current, completed=done, total=total), lambda note: None
            )

        yield track, lambda done, total: bars.update(whole, completed=done, total=total)


@contextlib.contextmanager
def _stage_line(console: Console, name: str) -> Iterator[pipeline.Watch]:
    start = time.perf_counter()
    notes: list[str] = []
    yield pipeline.Watch(lambda done, total: None, notes.append)
    console.print(f"{name}: {time.perf_counter() - start:.1f} s {', '.join(notes)}", highlight=False)
