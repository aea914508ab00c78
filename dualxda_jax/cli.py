"""The command `dualxda`: arguments in, one line out when something is wrong."""

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

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
from dualxda_jax._version import __version__


def demo(
    data: Path | None = None,
    out: Path = Path("dualxda-demo"),
    cost: float = pipeline.DemoConfig.cost,
    limit: int | None = None,
    seed: int = 0,
    network: Literal["small-cnn", "resnet-18"] = "small-cnn",
) -> None:
    """Train a network, attribute its predictions to training samples, explain the pairs and write a report.

    A second run with the same --out reuses every stage whose inputs have not changed.

    Args:
        data: folder with MNIST, Fashion-MNIST (IDX files) or CIFAR-10 (binary version) as published; without it the
            embedded sample of Fashion-MNIST (6,000 training and 1,000 test images).
        out: folder of the report; the stages are kept in its subfolder "stages".
        cost: C of the support vector machine; smaller means more support vectors.
        limit: use at most that many training and test images.
        seed: of the network's initialisation and training, and of the choice of test images.
        network: the paper's small CNN, or ResNet-18 (hours on a CPU).
    """
    config = pipeline.DemoConfig(data=data, out=out, cost=cost, limit=limit, seed=seed, network=network)
    console = Console(stderr=True)
    start = time.perf_counter()
    with _stage_bars(console) as track:
        page = pipeline.run(config, track=track)
    console.print(f"[bold]Report[/bold] after {time.perf_counter() - start:.0f} s. Open this file in a browser:")
    print(page.resolve())


def evaluate(
    data: Path | None = None,
    out: Path = Path("dualxda-evaluation"),
    methods: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
    preset: Literal["small", "paper"] = "small",
    seeds: int = 1,
    network: Literal["small-cnn", "resnet-18"] = "small-cnn",
    limit: int | None = None,
    queries: int | None = None,
    part: int | None = None,
    subsets: int | None = None,
    steps: int | None = None,
) -> None:
    """Compare attribution methods: train, attribute, retrain, measure, and write a table with figures.

    Everything computed is kept in the subfolder "stages" of --out: a second run, also one with more methods, metrics or
    seeds, takes from there what still fits, and an interrupted one goes on. results.json and index.html appear at the
    end.

    Args:
        data: folder with a published data set, as for demo; without it the embedded sample of Fashion-MNIST.
        out: folder of the results.
        methods: rows ("dualda-1e-3", "trak", ...) or methods ("dualda" stands for its three costs); all by default.
        metrics: among class, subclass, shortcut, mislabel, lds, coreset, pruning; all by default.
        preset: "small" (3,000 training images, 150 queries, 40 subsets: made for two CPU cores) or "paper" (all
            training images, 2,000 queries, 100 subsets: made for a GPU).
        seeds: how many times all of it is done, networks trained anew.
        network: the paper's small CNN, or ResNet-18 (for a GPU).
        limit: training images, at most, instead of the preset's.
        queries: test images explained, at most, instead of the preset's.
        part: training images of the metrics that retrain (lds, coreset, pruning), instead of the preset's.
        subsets: networks retrained for lds, instead of the preset's.
        steps: optimizer steps of each retrained network, instead of the preset's.
    """
    sizes = {"limit": limit, "queries": queries, "part": part, "subsets": subsets, "steps": steps}
    config = pipeline.EvaluateConfig(
        data=data, out=out, methods=methods or None, metrics=metrics or None, preset=preset, seeds=seeds,
        network=network, changed=tuple((name, value) for name, value in sizes.items() if value is not None),
    )  # fmt: skip
    console = Console(stderr=True)
    start = time.perf_counter()
    with _overall_bar(console) as (track, overall):
        page = pipeline.evaluate(config, track=track, overall=overall)
    console.print(f"[bold]Results[/bold] after {time.perf_counter() - start:.0f} s. Open this file in a browser:")
    print(page.resolve())


def fit(
    data: Path | None = None,
    out: Path = Path("dualxda-demo"),
    cost: float = pipeline.DemoConfig.cost,
    limit: int | None = None,
    seed: int = 0,
    network: Literal["small-cnn", "resnet-18"] = "small-cnn",
) -> None:
    """Train a network and fit the dual SVM on its features; the first stages of demo, kept in the same place.

    Args:
        data: as for demo.
        out: folder of surrogate.json and of the stages.
        cost: as for demo.
        limit: as for demo.
        seed: of the network's initialisation and training.
        network: as for demo.
    """
    config = pipeline.DemoConfig(data=data, out=out, cost=cost, limit=limit, seed=seed, network=network)
    with _stage_bars(Console(stderr=True)) as track:
        path = pipeline.fit(config, track=track)
    print(path.resolve())


def attribute(
    images: tuple[int, ...],
    data: Path | None = None,
    out: Path = Path("dualxda-demo"),
    cost: float = pipeline.DemoConfig.cost,
    limit: int | None = None,
    seed: int = 0,
    network: Literal["small-cnn", "resnet-18"] = "small-cnn",
    each_way: int = 5,
) -> None:
    """Name the training images that speak most for and against the predictions on test images.

    Args:
        images: places in the test set.
        data: as for demo.
        out: folder of attributions.json; stages that fit or demo left there are reused.
        cost: as for demo.
        limit: as for demo.
        seed: as for demo.
        network: as for demo.
        each_way: how many proponents and opponents, at most.
    """
    config = pipeline.DemoConfig(
        data=data, out=out, cost=cost, limit=limit, seed=seed, network=network, each_way=each_way
    )
    with _stage_bars(Console(stderr=True)) as track:
        path = pipeline.attribute(config, images, track=track)
    print(path.resolve())


def explain(
    images: tuple[int, ...],
    data: Path | None = None,
    out: Path = Path("dualxda-demo"),
    cost: float = pipeline.DemoConfig.cost,
    limit: int | None = None,
    seed: int = 0,
    network: Literal["small-cnn", "resnet-18"] = "small-cnn",
    each_way: int = 3,
) -> None:
    """Draw test images beside the training images behind their predictions, with the relevance of each pair.

    Args:
        images: places in the test set.
        data: as for demo.
        out: folder of the pictures, query-INDEX.png; stages that fit or demo left there are reused.
        cost: as for demo.
        limit: as for demo.
        seed: as for demo.
        network: as for demo.
        each_way: how many proponents and opponents, at most.
    """
    config = pipeline.DemoConfig(
        data=data, out=out, cost=cost, limit=limit, seed=seed, network=network, each_way=each_way
    )
    with _stage_bars(Console(stderr=True)) as track:
        paths = pipeline.explain(config, images, track=track)
    for path in paths:
        print(path.resolve())


def bench(
    samples: int = 60_000,
    dim: int = 100,
    classes: int = 10,
    cost: float = pipeline.DemoConfig.cost,
    queries: int = 1000,
    repeats: int = 3,
    seed: int = 0,
) -> None:
    """Time the SVM, attribution and relevance on this machine, on synthetic features (no peers: see benchmarks/).

    Args:
        samples: training samples.
        dim: features of each.
        classes: of the problem.
        cost: C of the support vector machine.
        queries: test samples to attribute.
        repeats: of each timing, after a first call that compiles; the median counts.
        seed: of the features.
    """
    with _stage_bars(Console(stderr=True)) as track:
        found = pipeline.bench(
            samples=samples, dim=dim, classes=classes, cost=cost, queries=queries, repeats=repeats, seed=seed,
            track=track,
        )  # fmt: skip
    print(f"{'':20} {'first, s':>10} {'warm, s':>10}")
    for name, first, warm, of in found["rows"]:
        print(f"{name:20} {first:10.3f} {warm:10.4f}  {of}")
    certified = "certified" if found["converged"] else "NOT CONVERGED"
    print(f"relative gap {found['gap']:.1e}, {certified}")
    print("\n".join(found["environment"]))


def version() -> None:
    """Print the version."""
    print(__version__)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "fit": fit, "attribute": attribute, "explain": explain, "evaluate": evaluate, "bench": bench,
    "version": version,
}  # fmt: skip


@contextlib.contextmanager
def _stage_bars(console: Console) -> Iterator[pipeline.Track]:
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
def _overall_bar(console: Console) -> Iterator[tuple[pipeline.Track, Callable[[int, int], None]]]:
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


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Turn arguments into a call; a mistake in them becomes one line."""
    import tyro

    def bind(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        @functools.wraps(function)
        def bound(*args: object, **kwargs: object) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        return bound

    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.extras.subcommand_cli_from_dict(
                {name: bind(command) for name, command in COMMANDS.items()},
                prog="dualxda",
                description="DualXDA: which training samples made a prediction so, and through which features.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box or rules around a title, then says what is wrong.
        lines = [line.strip(" │╭╮╰╯─-") for line in complaints.getvalue().splitlines()]
        said = [line for line in lines if line][1:]
        # What is missing stands in the lines below "Missing from COMMAND:".
        said[:1] = [" ".join(said[:2])] if said and said[0].endswith(":") else said[:1]
        raise ValueError((said[0] if said else "wrong arguments") + " (dualxda --help)") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 130 when interrupted.
    """
    try:
        _parse(sys.argv[1:] if arguments is None else arguments)()
    except KeyboardInterrupt:
        print("dualxda: interrupted; finished stages are kept and the next run goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"dualxda: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, ImportError) and error.name == "tyro":
        return 'tyro is not installed: pip install "dualxda-jax[all]" brings what the command needs'
    return " ".join(str(error).split()) or type(error).__name__
