"""What each subcommand of `dualxda` does; its signature and docstring are its arguments and its help."""

import time
from pathlib import Path
from typing import Literal

from rich.console import Console

from dualxda_jax import pipeline
from dualxda_jax._version import __version__
from dualxda_jax.cli.bars import overall_bar, stage_bars


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
    with stage_bars(console) as track:
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
    with overall_bar(console) as (track, overall):
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
    with stage_bars(Console(stderr=True)) as track:
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
    with stage_bars(Console(stderr=True)) as track:
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
        out: folder of the pictures, explained-INDEX.png; stages that fit or demo left there are reused.
        cost: as for demo.
        limit: as for demo.
        seed: as for demo.
        network: as for demo.
        each_way: how many proponents and opponents, at most.
    """
    config = pipeline.DemoConfig(
        data=data, out=out, cost=cost, limit=limit, seed=seed, network=network, each_way=each_way
    )
    with stage_bars(Console(stderr=True)) as track:
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
    with stage_bars(Console(stderr=True)) as track:
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
