"""One step at a time on the stages that a demo keeps: fit a surrogate, attribute predictions, draw their pairs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from dualxda_jax import attribution, checkpoint, data, report
from dualxda_jax._check import fail
from dualxda_jax._version import __version__
from dualxda_jax.pipeline import content, stages, store
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.pipeline.surrogate import Surrogate, surrogate

P = ParamSpec("P")
T = TypeVar("T")


def _alone(command: Callable[Concatenate[DemoConfig, P], T]) -> Callable[Concatenate[DemoConfig, P], T]:
    """The command, claiming its folder."""

    @functools.wraps(command)
    def claiming(config: DemoConfig, *args: P.args, **kwargs: P.kwargs) -> T:
        with store.claimed(config.out):
            return command(config, *args, **kwargs)

    return claiming


@_alone
def fit(config: DemoConfig, *, track: store.Track | None = None) -> Path:
    """Train the network, extract features and fit the SVM; what is there already is reused.

    Args:
        config: what to compute.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        Path of surrogate.json: how good the network and its surrogate are, and whether the gap is certified.

    Raises:
        ValueError: data that cannot be read, another run at work in the folder.
        OSError: the folder cannot be made.
    """
    made = surrogate(config, track=track)
    network = stages.network_logits(made.model, made.params, made.test.values).argmax(axis=1)
    ours = np.asarray(attribution.logits(made.support, made.test.values)).argmax(axis=1)
    labels, info = np.asarray(made.test.labels), made.solution.info
    return content.write_json(
        config.out / "surrogate.json",
        {
            "dataset": made.dataset.name,
            "train_size": len(made.train.labels),
            "cost": config.cost,
            "support_vectors": len(made.support.index),
            "gap": float(info.gap),
            "converged": bool(info.converged),
            "accuracy": float(np.mean(network == labels)),
            "surrogate_accuracy": float(np.mean(ours == labels)),
            "agreement": float(np.mean(ours == network)),
        },
    )


@_alone
def attribute(config: DemoConfig, images: Sequence[int], *, track: store.Track | None = None) -> Path:
    """The strongest proponents and opponents of test images, towards what the network predicts.

    Args:
        config: what to compute; `each_way` of each.
        images: places in the test set.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        Path of attributions.json.

    Raises:
        ValueError: data that cannot be read, no such test image, another run at work in the folder.
        OSError: the folder cannot be made.
    """
    chosen = _chosen(images)
    made = surrogate(config, track=track, check=functools.partial(_check_range, chosen))
    found = _find(made, config, chosen)
    names, labels = made.dataset.class_names, np.asarray(made.train.labels)
    entries = []
    for i, query in enumerate(found["queries"]):
        sides = {
            side: [
                {"index": int(j), "label": names[labels[j]], "score": float(score)}
                for j, score in zip(found[side].index[i], found[side].scores[i], strict=True)
                if sign * score > 0
            ]
            for side, sign in (("proponents", 1), ("opponents", -1))
        }
        entries.append(
            {
                "image": int(query),
                "label": names[int(made.test.labels[query])],
                "predicted": names[int(found["targets"][i])],
                "surrogate_logit": float(found["logits"][i]),
                **sides,
            }
        )
    return content.write_json(
        config.out / "attributions.json",
        {"dataset": made.dataset.name, "cost": config.cost, "support_vectors": len(made.support.index),
         "converged": bool(made.solution.info.converged), "queries": entries},
    )  # fmt: skip


@_alone
def explain(config: DemoConfig, images: Sequence[int], *, track: store.Track | None = None) -> list[Path]:
    """Draw test images beside their strongest proponents and opponents, each pair with its two relevance maps.

    Args:
        config: what to compute; `each_way` of each.
        images: places in the test set.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        Paths of the pictures, explained-INDEX.png; query-NN.png are those of a report, where NN counts them.

    Raises:
        ValueError: data that cannot be read or drawn, no such test image, another run at work in the folder.
        ImportError: Matplotlib is missing; the message names the extra.
        OSError: the folder cannot be made.
    """
    report.need_libraries()
    chosen = _chosen(images)

    def check(dataset: data.Dataset) -> None:
        _check_range(chosen, dataset)
        stages.check_drawable(dataset)

    made = surrogate(config, track=track, check=check)
    found = _find(made, config, chosen)
    made_by = checkpoint.fingerprint(
        __version__, made.params, made.support, stages.COMPOSITE, made.dataset.test.images[found["queries"]], found
    )
    maps = made.stage(
        "propagate relevance of chosen images",
        lambda p: stages.explain(made.model, made.params, made.support, made.dataset, found, p), made_by,
    )  # fmt: skip
    paths = []
    for query in content.queries(made.dataset, found, maps):
        path = config.out / f"explained-{query.index}.png"
        path.write_bytes(report.query_figure(query, made.dataset.class_names).png)
        paths.append(path)
    return paths


def _chosen(images: Sequence[int]) -> np.ndarray:
    """The places in ascending order, after what can be refused before anything is read."""
    if not len(images):
        fail("images", "none", "one or more places in the test set")
    if min(images) < 0:
        fail("images", min(images), "0 or more, places in the test set")
    most = np.iinfo(np.int64).max
    if max(images) > most:
        fail("images", max(images), f"{most} or less, places in the test set")
    return np.unique(np.asarray(images, np.int64))


def _check_range(chosen: np.ndarray, dataset: data.Dataset) -> None:
    q = len(dataset.test.labels)
    outside = chosen[chosen >= q]
    if outside.size:
        fail("images", int(outside[0]), f"in 0..{q - 1}")


def _find(made: Surrogate, config: DemoConfig, chosen: np.ndarray) -> dict[str, Any]:
    config = dataclasses.replace(config, each_way=min(config.each_way, len(made.support.index)))
    return stages.find(made.model, made.params, made.support, made.test, config, chosen)
