"""Which methods an evaluation compares, with which hyper-parameters, and how large it is."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualxda_jax import baselines
from dualxda_jax._check import fail
from dualxda_jax.evaluation.benchmark import METRICS
from dualxda_jax.pipeline.config import NETWORKS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much work an evaluation is.

    Attributes:
        limit: training images of the detection metrics, at most; None takes all.
        queries: test images that are explained, at most.
        part: training images of the metrics that retrain networks, at most; None takes as many as `limit`.
        subsets: networks retrained on random halves.
        steps: optimizer steps of each retrained network.
        batch: samples of each of those steps.
        fractions: of the training set that are kept (coreset) or removed (pruning).
        checkpoints: of the training, for methods that use several.
    """

    limit: int | None
    queries: int
    part: int | None
    subsets: int
    steps: int
    batch: int
    fractions: tuple[float, ...]
    checkpoints: int

    def __post_init__(self) -> None:
        for name in ("limit", "queries", "part", "steps", "batch", "checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fail(name, value, "at least 1")
        if self.subsets < 2:
            fail("subsets", self.subsets, "at least 2")


PRESETS = {
    # One number of training images for all cases, so that nearly every program is compiled once.
    "small": Sizes(3_000, 150, 3_000, 40, 150, 64, (0.1, 0.3, 0.6), 3),
    "paper": Sizes(None, 2_000, None, 100, 2_400, 128, tuple(i / 10 for i in range(1, 10)), 5),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: unique, as the command takes it.
        method: its name among `baselines.METHODS`.
        options: of its constructor; the defaults where nothing is said.
        skips: metrics that it is left out of, and why.
        on_features: for methods on the final layer: compute on extracted features, see `baselines.on_features`.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    skips: tuple[tuple[str, str], ...] = ()
    on_features: bool = False

    def make(self) -> baselines.Method:
        """The method."""
        make: Callable[..., baselines.Method] = baselines.METHODS[self.method]
        method = make(**dict(self.options))
        return baselines.on_features(method) if self.on_features else method


CONTROL = "random"
"""The method that knows nothing: shown, not ranked."""

_SOLVES = (("mislabel", "self-influence would take a solve for each training sample"),)

_PATH = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

_ENTRIES: dict[str, dict[str, tuple[Entry, ...]]] = {
    "dualda": {
        "": tuple(Entry(f"dualda-1e-{digit}", "dualda", (("cost", 10.0**-digit),)) for digit in (5, 3, 1)),
    },
    "dualda_variant": {
        "": tuple(
            Entry(f"dualda+{name}", "dualda_variant", options)
            for name, options in (
                ("normalized", (("normalize", True),)),
                ("centred", (("centre", True),)),
                ("intercept", (("intercept", 1.0),)),
                ("predicted-labels", (("labels", "predicted"),)),
                ("faithful-cost", (("cost", _PATH), ("over", "best"))),
                ("path", (("cost", _PATH),)),
                ("checkpoints", (("checkpoints", 3),)),
            )
        ),
    },
    "influence_arnoldi": {
        "small": (
            Entry(
                "arnoldi",
                "influence_arnoldi",
                # The head's Hessian makes vectors so short that the usual tolerance, 0.1, ends it after one direction.
                (("params", "head"), ("rank", 64), ("krylov", 100), ("samples", 2_000), ("tolerance", 1e-4)),
                on_features=True,
            ),
        ),
        "paper": (Entry("arnoldi", "influence_arnoldi"),),
    },
    "influence_ekfac": {"": (Entry("ekfac", "influence_ekfac"),)},
    "influence_lissa": {
        "small": (Entry("lissa", "influence_lissa", (("scale", 1000.0), ("repeats", 1)), _SOLVES, on_features=True),),
        "paper": (Entry("lissa", "influence_lissa", (("scale", 1000.0),), _SOLVES, on_features=True),),
    },
    "influence_cg": {"": (Entry("cg-head", "influence_cg", (("params", "head"),), _SOLVES, on_features=True),)},
    "influence_explicit": {
        "": (Entry("explicit-head", "influence_explicit", (("params", "head"),), on_features=True),),
    },
    "similarity": {
        "": (Entry("similarity", "similarity"),
             *(Entry(f"similarity-{m}", "similarity", (("measure", m),)) for m in ("cos", "l2"))),
    },
    "tracin": {
        "small": (Entry("tracin", "tracin"),),
        "paper": (Entry("tracin", "tracin", (("projection", 128), ("projection_kind", "gaussian"))),),
    },
    "trak": {
        "small": (Entry("trak", "trak", (("projection", 512), ("checkpoints", 1))),),
        "paper": (Entry("trak", "trak", (("projection", 2048), ("checkpoints", 1))),),
    },
}  # fmt: skip
_ON_REQUEST = ("dualda_variant", "influence_cg", "influence_explicit")
"""Left out unless asked for: experiments, and methods whose cost grows with the head, for which LiSSA stands."""


def lineup(preset: str, asked: Sequence[str] | None = None) -> tuple[Entry, ...]:
    """The rows of the table.

    Args:
        preset: "small" or "paper".
        asked: names of rows, or else of methods (which stand for all their rows); None takes every method of the table.

    Raises:
        ValueError: a name that is neither, or given twice.
    """
    rows: list[Entry] = []
    for method in baselines.METHODS:
        known = _ENTRIES.get(method, {})
        rows += known.get(preset) or known.get("") or (Entry(method, method),)
    if asked is None:
        return tuple(row for row in rows if row.method not in _ON_REQUEST)
    chosen: list[Entry] = []
    for name in asked:
        found = [row for row in rows if name == row.name] or [row for row in rows if name == row.method]
        if not found:
            names = sorted({row.name for row in rows} | {row.method for row in rows})
            fail("methods", repr(name), f"among {', '.join(names)}")
        chosen += [row for row in found if row not in chosen]
    return tuple(chosen)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """All that decides what an evaluation computes.

    Attributes:
        data: folder with a published data set; None takes the embedded sample.
        out: folder of the report; all that was computed is kept in out/stages.
        methods: rows or methods to compare; None takes every one.
        metrics: names of metrics; None takes all seven.
        preset: "small" or "paper".
        seeds: how many, 0, 1, …; each trains its networks anew.
        network: one of NETWORKS.
        changed: (name, value) of sizes that differ from the preset's.
    """

    data: Path | None = None
    out: Path = Path("dualxda-evaluation")
    methods: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    preset: str = "small"
    seeds: int = 1
    network: str = "small-cnn"
    changed: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            fail("preset", repr(self.preset), f"one of {', '.join(PRESETS)}")
        if not 1 <= self.seeds <= 1000:
            fail("seeds", self.seeds, "in 1..1000")
        if self.network not in NETWORKS:
            fail("network", repr(self.network), f"one of {', '.join(NETWORKS)}")
        for name in self.metrics or ():
            if name not in METRICS:
                fail("metrics", repr(name), f"among {', '.join(METRICS)}")
        if not self.chosen_metrics or not self.entries:
            fail("metrics" if not self.chosen_metrics else "methods", "none", "one or more")
        if self.out.exists() and not self.out.is_dir():
            fail("out", f"the file {self.out}", "a folder")
        _ = self.sizes

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The preset's sizes with those that were changed."""
        return dataclasses.replace(PRESETS[self.preset], **dict(self.changed))

    @property
    def chosen_metrics(self) -> tuple[str, ...]:
        """Names in the table's order."""
        return tuple(name for name in METRICS if self.metrics is None or name in self.metrics)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The rows."""
        return lineup(self.preset, self.methods)
