"""The chain of stages of an evaluation; what `dualxda evaluate` runs."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dualxda_jax import checkpoint, data, report
from dualxda_jax.evaluation import benchmark
from dualxda_jax.pipeline import cases, cells, content, results, store
from dualxda_jax.pipeline.lineup import Entry, EvaluateConfig
from dualxda_jax.types import Progress

_VERSION = "evaluate-2"


def evaluate(config: EvaluateConfig, *, track: store.Track | None = None, overall: Progress | None = None) -> Path:
    """Compare methods: train, fit, explain, retrain, measure, and write results.json and a page.

    Everything computed is kept in out/stages; another run takes from there what still fits, after an interruption as
    well as with more methods, metrics or seeds. results.json and the page appear when all is done. A method that fails
    on a case is said to have failed there, and takes the last place.

    Args:
        config: what to compute.
        track: shows the progress of a stage; None shows nothing.
        overall: called with (stages done, stages in all).

    Returns:
        Path of the page.

    Raises:
        ValueError: data that cannot be read or are too small for a metric, results of another version in `out`, another
            run at work there; what an earlier run left is kept then.
        OSError: the folder cannot be made.
    """
    report.need_libraries()
    with store.claimed(config.out):
        return _evaluate(config, track or store.silent, overall or (lambda done, total: None))


def _evaluate(config: EvaluateConfig, track: store.Track, overall: Progress) -> Path:
    target = config.out / "results.json"
    if target.exists():
        results.load(target)  # refuses what another version wrote
    start = time.perf_counter()
    dataset = data.embedded_sample() if config.data is None else data.load_folder(config.data)
    names = [name for name in cases.METRICS_OF if set(cases.METRICS_OF[name]) & set(config.chosen_metrics)]
    for name in names:
        cases.check(name, dataset, config)
    # Nothing of an earlier run may stand beside the stages of an unfinished one; and a mistake takes nothing away.
    target.unlink(missing_ok=True)
    report.remove_evaluation(config.out)
    runs = [_Seed(config, dataset, seed, names, track) for seed in range(config.seeds)]
    total, done = sum(run.stages for run in runs), 0

    def finished() -> None:
        nonlocal done
        done += 1
        overall(done, total)

    found = [run.run(finished) for run in runs]
    table = results.assemble(
        config.entries, config.chosen_metrics, [f.cells for f in found], [f.sparsity for f in found if f.sparsity]
    )
    log = [stage for run in runs for stage in run.log]
    full = {
        **table,
        "dataset": dataset.name,
        "options": _options(config, dataset),
        "sizes": {
            name: {**size, "queries_per_seed": [f.sizes[name]["queries"] for f in found]}
            for name, size in found[0].sizes.items()
        },
        "accuracy": {name: [f.accuracy[name] for f in found] for name in names},
        "seconds": round(time.perf_counter() - start, 1),
        "reused": sum(stage.note == "reused" for stage in log),
        "stages": [dataclasses.asdict(stage) for stage in log],
        "environment": list(content.machine()),
        "definitions": DEFINITIONS,
    }
    page = report.write_evaluation(config.out, full)
    results.save(target, full)
    return page


DEFINITIONS = {
    "prepare": "seconds by the clock of one call of fit, from the trained network and its training set to all that "
    f"scores need, compilation left out (counted where a first call takes over {benchmark.LONG:.0f} s), arrays ready "
    "on the device",
    "explain": "seconds by the clock of the calls of scores for all queries, from their images to all scores, blocks "
    f"of {cells.CHUNK} queries (one that is not full is counted by its share), compilation left out, arrays ready on "
    "the device",
    "kept": "bytes of the arrays that fit returns, network and training set not counted",
    "interval": "95% percentile bootstrap over the queries (mislabelling: over the mislabelled samples), "
    "averaged over the seeds; spread: standard deviation over the seeds",
}


def _options(config: EvaluateConfig, dataset: data.Dataset) -> dict[str, Any]:
    sizes = dataclasses.asdict(config.sizes)
    return {
        "preset": config.preset, "seeds": config.seeds, "network": config.network, **sizes,
        "training_images": len(dataset.train.labels), "test_images": len(dataset.test.labels),
    }  # fmt: skip


@dataclasses.dataclass
class _Found:
    """What one seed gave."""

    cells: results.Cells
    sparsity: dict[str, np.ndarray]
    accuracy: dict[str, float]
    sizes: dict[str, dict[str, int]]


class _Seed:
    """The stages of one seed, case by case, so that one training set is on the device at a time."""

    def __init__(self, config: EvaluateConfig, dataset: data.Dataset, seed: int, names: list[str], track: store.Track):
        self.config, self.dataset, self.seed, self.names = config, dataset, seed, names
        self.folder = config.out / "stages" / f"seed-{seed}"
        self.log: list[report.Stage] = []
        self._stage = functools.partial(store.stage, self.folder, track, self.log)
        self._selects = tuple(m for m in ("coreset", "pruning") if m in config.chosen_metrics)

    @property
    def stages(self) -> int:
        """How many there are."""
        one = len(self.names) + sum(len(self._entries(name)) for name in self.names)
        halves = "lds" in self.config.chosen_metrics
        selections = len(self._entries("part")) if self._selects else 0
        return one + halves + selections + ("clean" in self.names)

    def run(self, finished: Callable[[], None]) -> _Found:
        """All cells of this seed."""
        found = _Found({entry.name: {} for entry in self.config.entries}, {}, {}, {})
        for name in self.names:
            self._case(name, found, finished)
        return found

    def _do(self, name: str, compute: Callable[[Progress], Any], made_by: str, finished: Callable[[], None]) -> Any:
        result = self._stage(f"seed {self.seed} {name}", compute, made_by)
        finished()
        return result

    def _entries(self, case: str) -> list[Any]:
        wanted = set(cases.METRICS_OF[case]) & set(self.config.chosen_metrics)
        return [e for e in self.config.entries if wanted - {metric for metric, _ in e.skips}]

    def _case(self, name: str, found: _Found, finished: Callable[[], None]) -> None:
        config, seed, says = self.config, self.seed, cases.SAYS[name]
        metrics = tuple(m for m in cases.METRICS_OF[name] if m in config.chosen_metrics)
        case = cases.make(name, self.dataset, config, seed)
        network = self._do(f"train on {says}", lambda p: cases.train(case, config, seed, p), case.made_by, finished)
        trained = cases.put_together(case, network, config)
        found.accuracy[name] = trained.accuracy
        found.sizes[name] = {"training": len(case.train.labels), "queries": len(trained.targets)}
        retrained = None
        if "lds" in metrics:
            sizes = config.sizes.subsets, config.sizes.steps, config.sizes.batch
            retrained = self._do(
                "retrain on random halves",
                lambda p: cells.retrain_halves(trained, config, seed, self.folder / "networks", p),
                checkpoint.fingerprint(_VERSION, trained.made_by, *sizes), finished,
            )  # fmt: skip
        timed = name == next(n for n in self.names if n != "noisy") if self.names != ["noisy"] else False
        for entry in self._entries(name):
            try:
                cell = self._cell(entry, trained, metrics, timed, retrained, finished)
            except cells.MethodFailed as failure:
                # Not kept: another run tries again.
                found.cells[entry.name][name] = {"failed": dict.fromkeys(metrics, str(failure))}
                finished()
                if name == "part" and self._selects:
                    finished()
                continue
            found.cells[entry.name][name] = cell
            if name == "part" and self._selects:
                importance = np.asarray(cell["importance"])
                found.cells[entry.name]["selection"] = self._selection(entry, trained, importance, finished)
        if name == "clean":
            made_by = checkpoint.fingerprint(_VERSION, trained.made_by, cells.COSTS)
            found.sparsity = self._do("sparsity of DualDA", lambda p: cells.sparsity(trained, p), made_by, finished)

    def _cell(
        self, entry: Entry, trained: cases.Trained, metrics: tuple[str, ...], timed: bool, retrained: Any,
        finished: Callable[[], None],
    ) -> dict[str, Any]:  # fmt: skip
        """A method on a case."""
        parts = (_VERSION, trained.made_by, entry, metrics, timed, retrained, jax.default_backend())
        explain = functools.partial(
            cells.explain, entry, trained, metrics, jax.random.key(self.seed), timed=timed, retrained=retrained
        )
        name = f"{entry.name} on {cases.SAYS[trained.case.name]}"
        return dict(self._do(name, explain, checkpoint.fingerprint(*parts), finished))

    def _selection(
        self, entry: Entry, trained: cases.Trained, importance: np.ndarray, finished: Callable[[], None]
    ) -> dict[str, Any]:
        """What networks are worth that are trained with or without the samples that a method calls important."""
        sizes = self.config.sizes
        parts = (_VERSION, trained.made_by, importance, self._selects, sizes.fractions, sizes.steps, sizes.batch)
        select = functools.partial(
            cells.retrain_selected, trained, self.config, self.seed, importance, self._selects,
            self.folder / "networks",
        )  # fmt: skip
        return dict(self._do(f"retrain for {entry.name}", select, checkpoint.fingerprint(*parts), finished))
