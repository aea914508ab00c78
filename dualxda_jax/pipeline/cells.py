"""One cell of an evaluation: a method on a case, from the fit to the values of each query."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualxda_jax import attribution, evaluation, models, svm
from dualxda_jax._check import fail
from dualxda_jax.baselines.similarity import features
from dualxda_jax.evaluation import benchmark, retrain
from dualxda_jax.models import training
from dualxda_jax.pipeline.cases import Trained, module_of
from dualxda_jax.pipeline.lineup import Entry, EvaluateConfig
from dualxda_jax.types import Array, Progress

PLACES = 5
CHUNK = 100
CURVE = 201
COSTS = (1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class MethodFailed(Exception):
    """A method that refuses a case; the others go on without it."""


def explain(
    entry: Entry, trained: Trained, metrics: tuple[str, ...], key: Array, progress: Progress, *,
    timed: bool, retrained: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Fit a method on a case, score the queries, and measure.

    Args:
        entry: the method.
        trained: the case and its network.
        metrics: those to measure here, of the case's.
        key: typed key of the fit.
        progress: called with queries done.
        timed: measure what it costs.
        retrained: "subsets" [m, n] and "outputs" [m, q], for LDS.

    Returns:
        "values": {metric: [q] or [c]}, of the metrics that need no more retraining; "importance" [n] Σ_queries |score|;
        "cost": `benchmark.Cost` as a list, or []; "curve" [CURVE] of mislabelling; "remarks": what the method warned
        of.

    Raises:
        MethodFailed: what the method refuses or has no memory for, with its name and the case.
    """
    method, context, case = entry.make(), trained.context, trained.case
    cell: dict[str, Any] = {"values": {}, "cost": [], "importance": np.zeros(0), "curve": np.zeros(0), "remarks": []}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        try:
            fitted, seconds, compiled = benchmark.prepare(method, key, context, timed=timed)
            if case.name == "noisy":
                _mislabelling(cell, np.asarray(method.self_influence(fitted)), case.planted)
            elif len(trained.targets):
                took = _scores(cell, method, fitted, trained, metrics, retrained, progress, timed=timed)
                if timed:
                    cost = benchmark.Cost(
                        seconds, took, len(trained.targets), benchmark.kept_bytes(fitted, context), compiled
                    )
                    cell["cost"] = list(cost)
        except (ValueError, FloatingPointError) as error:
            raise MethodFailed(f"{entry.name} on {case.name} data: {' '.join(str(error).split())}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MethodFailed(f"{entry.name} on {case.name} data: the device's memory is not enough") from error
    cell["remarks"] = sorted({str(w.message) for w in heard if issubclass(w.category, UserWarning)})
    return cell


def _mislabelling(cell: dict[str, Any], self_influence: np.ndarray, corrupted: Any) -> None:
    bad = np.count_nonzero(~np.isfinite(self_influence))
    if bad:
        fail("self_influence", f"{bad} NaN or Inf", "finite")
    cell["values"]["mislabel"] = evaluation.place_values(self_influence, corrupted)
    curve = np.asarray(evaluation.mislabeling_detection(self_influence, corrupted).curve)
    cell["curve"] = np.interp(np.linspace(0, 1, CURVE), np.arange(len(curve) + 1) / len(curve), [0.0, *curve])


def _scores(
    cell: dict[str, Any], method: Any, fitted: Any, trained: Trained, metrics: tuple[str, ...],
    retrained: dict[str, Any] | None, progress: Progress, *, timed: bool,
) -> float:  # fmt: skip
    """Fill in what scores give, block by block, so that [q, n] is never held; returns the seconds of the scores."""
    case, seconds = trained.case, 0.0
    n = len(case.train.labels)
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics if name in _PER_QUERY}
    importance = np.zeros(n)
    for part, scores, took in benchmark.score_blocks(
        method, fitted, trained.queries, trained.targets, chunk=CHUNK, timed=timed, progress=progress
    ):
        seconds += took
        for name, values in found.items():
            values.append(np.asarray(_PER_QUERY[name](scores, trained, part, retrained), np.float32))
        if "coreset" in metrics or "pruning" in metrics:
            importance += np.abs(np.asarray(scores, np.float64)).sum(axis=0)
            cell["importance"] = importance
    cell["values"] = {name: np.concatenate(values) for name, values in found.items()}
    return seconds


def _class(scores: Array, trained: Trained, part: slice, retrained: Any) -> Array:
    labels = trained.case.train.labels
    return evaluation.class_detection(scores, labels, trained.targets[part], k=min(PLACES, len(labels)), per_query=True)


def _subclass(scores: Array, trained: Trained, part: slice, retrained: Any) -> Array:
    fine = trained.case.planted
    return evaluation.subclass_detection(
        scores, fine, trained.labels[part], k=min(PLACES, scores.shape[1]), per_query=True
    )


def _shortcut(scores: Array, trained: Trained, part: slice, retrained: Any) -> Array:
    keep = np.ones(scores.shape[0], bool)  # the case has chosen those that the mark misled
    return evaluation.shortcut_detection(scores, trained.case.planted, keep=keep, per_query=True)


def _lds(scores: Array, trained: Trained, part: slice, retrained: Any) -> Array:
    return evaluation.lds(scores, retrained["subsets"], retrained["outputs"][:, part])


_PER_QUERY: dict[str, Callable[[Array, Trained, slice, Any], Array]] = {
    "class": _class,
    "subclass": _subclass,
    "shortcut": _shortcut,
    "lds": _lds,
}


def halves(trained: Trained, config: EvaluateConfig, seed: int) -> np.ndarray:
    """[m, n] bool, random halves of the training set."""
    n = len(trained.case.train.labels)
    rng = np.random.default_rng([seed, 7])
    subsets = np.zeros((config.sizes.subsets, n), bool)
    for row in subsets:
        row[rng.permutation(n)[: max(1, n // 2)]] = True
    return subsets


def retrain_halves(
    trained: Trained, config: EvaluateConfig, seed: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    """What networks trained on random halves say: "subsets" [m, n], "outputs" [m, q] log-softmax at the targets.

    All start from the same parameters, so that they differ by their halves and not by luck at the start.
    """
    subsets = halves(trained, config, seed)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 1)] * len(subsets))
    logits = _retrain(keys, trained, config, subsets, folder, progress)
    return {"subsets": subsets, "outputs": _log_probability(logits, trained.targets)}


def retrain_selected(
    trained: Trained, config: EvaluateConfig, seed: int, importance: np.ndarray, metrics: tuple[str, ...],
    folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Coreset selection and data pruning: {metric: {"fractions" [f], "values" [f], "per_query" [q]}}.

    All networks of a seed start from the same parameters, whatever the method and the fraction: what differs between
    two of them is their samples. Equal selections, of any methods, are trained once.
    """
    measures = {"coreset": evaluation.coreset_selection, "pruning": evaluation.data_pruning}
    wanted = [name for name in measures if name in metrics]
    total = len(wanted) * len(config.sizes.fractions)
    found: dict[str, Any] = {}
    for place, name in enumerate(wanted):
        before = place * len(config.sizes.fractions)

        def worth(keep: np.ndarray, before: int = before) -> np.ndarray:
            keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 2)] * len(keep))
            logits = _retrain(keys, trained, config, keep, folder, lambda done, _: progress(before + done, total))
            return -_log_probability(logits, trained.targets)

        curve = measures[name](
            importance[None], worth, fractions=config.sizes.fractions, key=jax.random.fold_in(jax.random.key(seed), 3)
        )
        found[name] = {"fractions": curve.fractions, "values": curve.values, "per_query": curve.per_query}
    return found


def _retrain(
    key: Array, trained: Trained, config: EvaluateConfig, subsets: np.ndarray, folder: Path, progress: Progress
) -> np.ndarray:
    case = trained.case
    return retrain.logits(
        key, module_of(config.network, case.num_classes), case.train.images, case.train.labels, subsets,
        trained.queries if case.train.images.dtype != np.uint8 else np.rint(trained.queries * 255).astype(np.uint8),
        config=training.TrainConfig(steps=config.sizes.steps, batch_size=config.sizes.batch), folder=folder,
        sharding=_over_devices(), progress=progress,
    )  # fmt: skip


def _over_devices() -> NamedSharding | None:
    """The networks spread over this process's accelerators, if it has several; on CPUs threads share the cores."""
    devices = jax.local_devices()
    if jax.default_backend() == "cpu" or len(devices) == 1:
        return None
    return NamedSharding(Mesh(np.array(devices), ("networks",)), PartitionSpec("networks"))


def _log_probability(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[m, q] log-softmax of logits [m, q, k] at targets [q]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return np.take_along_axis(wide, targets[None, :, None], axis=2)[..., 0].astype(np.float32)


def sparsity(trained: Trained, progress: Progress) -> dict[str, np.ndarray]:
    """Over a path of costs: support vectors and non-zero coefficients, faithfulness and class detection of DualDA.

    Returns:
        [c] each: "cost", "support", "nonzero", "gap"; "class" and the measures of `evaluation.Faithfulness`, and with
        "_low" and "_high" behind their names the ends of their intervals over the queries (of the weights: over the
        classes).
    """
    context = trained.context
    train, test = (features(context, jnp.asarray(x), 256) for x in (context.inputs, trained.queries))
    model = models.from_linen(module_of(trained.network, trained.case.num_classes), head=models.HEAD)
    weights, bias = models.head_weights(model, context.params)
    network = np.asarray(test) @ np.asarray(weights).T + np.asarray(bias)
    rows = []
    for done, cost in enumerate(COSTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", svm.NotConvergedWarning)  # the row says so
            solution = svm.solve(train, context.labels, num_classes=context.num_classes, cost=cost)
        support = attribution.compress(train, context.labels, solution)
        scores = attribution.dense(support, attribution.scores(support, test, jnp.asarray(trained.targets)))
        logits = np.asarray(attribution.logits(support, test))
        # The same queries are drawn for every cost: what differs along the path is the cost.
        key = jax.random.key(0)
        faithful = evaluation.faithfulness_intervals(weights, solution.weights, network, logits, key)
        detection = evaluation.class_detection(
            scores, context.labels, trained.targets, k=min(PLACES, len(context.labels)), per_query=True
        )
        nonzero = np.asarray(solution.coefficients) != 0
        row = {"cost": cost, "support": nonzero.any(1).mean(), "nonzero": nonzero.mean(), "gap": solution.info.gap}
        measures = {f.name: getattr(faithful, f.name) for f in dataclasses.fields(faithful)}
        for name, interval in {"class": evaluation.bootstrap(detection, key), **measures}.items():
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        rows.append({name: float(value) for name, value in row.items()})
        progress(done + 1, len(COSTS))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
