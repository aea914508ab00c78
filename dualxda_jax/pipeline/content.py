"""From the stages' pytrees to what the report shows."""

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dualxda_jax import data, report
from dualxda_jax._version import __version__
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.pipeline.stages import DETECTION_PLACES
from dualxda_jax.types import DualSolution, PairRelevance


def queries(dataset: data.Dataset, found: dict[str, Any], maps: dict[str, Any]) -> tuple[report.Query, ...]:
    """One entry a test image; samples whose score has the wrong sign are no proponents (opponents) and left out."""
    found, maps = jax.tree.map(np.asarray, (found, maps))
    entries = []
    for i, query in enumerate(found["queries"]):
        sides = []
        for side, (name, sign) in enumerate((("proponents", 1), ("opponents", -1))):
            top = found[name]
            sides.append(
                tuple(
                    _pair(dataset, int(top.index[i, j]), float(top.scores[i, j]), maps["pairs"], (i, side, j))
                    for j in range(top.index.shape[1])
                    if sign * top.scores[i, j] > 0
                )
            )
        entries.append(
            report.Query(
                index=int(query),
                image=_image(dataset.test.images[query]),
                label=int(dataset.test.labels[query]),
                target=int(found["targets"][i]),
                surrogate_logit=float(found["logits"][i]),
                heatmap=maps["logit"][i],
                proponents=sides[0],
                opponents=sides[1],
            )
        )
    return tuple(entries)


def _pair(
    dataset: data.Dataset, index: int, score: float, pairs: PairRelevance, at: tuple[int, int, int]
) -> report.Pair:
    return report.Pair(
        index=index,
        label=int(dataset.train.labels[index]),
        score=score,
        image=_image(dataset.train.images[index]),
        test_map=pairs.test[at],
        train_map=pairs.train[at],
    )


def _image(image: np.ndarray) -> np.ndarray:
    return np.asarray(data.to_float(image))


def suspects(dataset: data.Dataset, found: dict[str, Any], predicted: np.ndarray) -> tuple[report.Suspect, ...]:
    """Training samples with the highest self-influence; `predicted` [e] is what the network says of them."""
    return tuple(
        report.Suspect(
            index=int(i),
            image=_image(dataset.train.images[i]),
            label=int(dataset.train.labels[i]),
            predicted=int(p),
            self_influence=float(value),
        )
        for i, p, value in zip(np.asarray(found["suspects"]), predicted, found["self_influence"], strict=True)
    )


def facts(
    values: dict[str, Any], solution: DualSolution, pairs: PairRelevance, config: DemoConfig, evaluated: int
) -> tuple[tuple[str, str, str], ...]:
    """The table of numbers: (name, value, what it means)."""
    v = {name: float(value) for name, value in values.items()}
    info, n = solution.info, solution.coefficients.shape[0]
    certified = "certified" if bool(info.converged) else "NOT CONVERGED"
    over = f"over {evaluated:,} test images"
    return (
        ("Test accuracy", f"{v['accuracy']:.2%}", "of the network, over all test images"),
        ("Surrogate's test accuracy", f"{v['surrogate_accuracy']:.2%}", "of the SVM on the network's features"),
        ("Agreement", f"{v['agreement']:.2%}", "of surrogate and network on the class, over all test images"),
        ("Matthews correlation", f"{v['matthews']:.3f}", f"of the two predictions, {over}"),
        ("Correlation of logits", f"{v['logit_correlation']:.3f}", f"Pearson's, surrogate against network, {over}"),
        ("Kendall's τ of logits", f"{v['kendall_tau']:.3f}", f"order of the classes, mean {over}"),
        (
            "Cosine of weights",
            f"{v['weight_cosine']:.3f}",
            "surrogate against network's last layer, mean of classes",
        ),
        (
            "Class detection",
            f"{v['class_detection']:.2%}",
            f"of the {min(DETECTION_PLACES, n)} top samples carry the predicted class, {over}",
        ),
        ("Support vectors", f"{v['support']:.2%}", f"of the {n:,} training samples have any say; C = {config.cost:g}"),
        ("Non-zero coefficients", f"{v['nonzero']:.2%}", "of all (training sample, class) pairs"),
        ("Duality gap", f"{float(info.gap):.1e}", f"relative, in float64; {certified}"),
        ("Completeness", f"{v['completeness']:.1e}", f"largest |sum of scores − logit|, relative, {over}"),
        ("Conservation", f"{conservation(pairs):.1e}", "largest |sum of a map − score| / |score| over the pairs shown"),
    )


def conservation(pairs: PairRelevance) -> float:
    """Largest |sum of a map − score|, relative to the score, over pairs [q, 2, e] that have one."""
    score = np.asarray(pairs.score, np.float64)
    sums = np.stack([np.asarray(m, np.float64).sum(axis=(-3, -2, -1)) for m in (pairs.test, pairs.train)])
    off = np.abs(sums - score)[:, score != 0] / np.abs(score[score != 0])
    return float(off.max()) if off.size else 0.0


def machine() -> tuple[str, ...]:
    """Versions and devices."""
    device = jax.devices()[0]
    return (
        f"dualxda_jax {__version__}, jax {jax.__version__}, numpy {np.__version__}, Python {platform.python_version()}",
        f"{jax.device_count()} × {device.device_kind} ({device.platform})",
    )


def environment(config: DemoConfig) -> tuple[str, ...]:
    """What the run ran on."""
    return (
        *machine(),
        f"network {config.network}, C = {config.cost:g}, seed {config.seed}",
    )


def write_summary(
    path: Path,
    values: dict[str, Any],
    solution: DualSolution,
    pairs: PairRelevance,
    config: DemoConfig,
    dataset: str,
    stages: Sequence[report.Stage],
) -> None:
    """The report's numbers for programs: JSON with the dataset, options, values, stages (seconds) and environment.

    A value that is not defined, as a correlation over test images of one class, is null: JSON has no nan.
    """
    info = solution.info
    found = {name: float(value) for name, value in values.items()}
    found |= {"gap": float(info.gap), "conservation": conservation(pairs)}
    numbers = {name: value if math.isfinite(value) else None for name, value in found.items()}
    summary = {
        "dataset": dataset,
        "options": {name: value for name, value in dataclasses.asdict(config).items() if name not in ("data", "out")},
        "train_size": solution.coefficients.shape[0],
        "converged": bool(info.converged),
        "values": numbers,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "environment": environment(config),
    }
    write_json(path, summary)


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write a file in one step: if it is there, it is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
