"""The data and the network behind each metric: as they are, merged, marked, mislabelled, or a part to retrain on."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dualxda_jax import baselines, checkpoint, data, models
from dualxda_jax._check import fail
from dualxda_jax._version import __version__
from dualxda_jax.models import training
from dualxda_jax.pipeline import stages
from dualxda_jax.pipeline.lineup import EvaluateConfig
from dualxda_jax.types import ImageData, Progress

METRICS_OF = {
    "clean": ("class",),
    "grouped": ("subclass",),
    "marked": ("shortcut",),
    "noisy": ("mislabel",),
    "part": ("lds", "coreset", "pruning"),
}
SAYS = {
    "clean": "clean data",
    "grouped": "merged classes",
    "marked": "marked data",
    "noisy": "mislabelled data",
    "part": "the part to retrain on",
}
SHORTCUT_CLASS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A training set, and how the test set looks in it.

    Attributes:
        name: one of METRICS_OF.
        train: images and the labels that the network is trained on.
        test: images as the network is asked about them, and true labels, fine ones where classes were merged.
        num_classes: k of the network.
        planted: [n] bool, marked or mislabelled samples; for "grouped" [n] the fine labels; else None.
        made_by: fingerprint of all this, the seed and the network's configuration.
    """

    name: str
    train: ImageData
    test: ImageData
    num_classes: int
    planted: np.ndarray | None
    made_by: str


@dataclasses.dataclass(frozen=True)
class Trained:
    """A case with its network.

    Attributes:
        case: the data.
        context: what methods learn from.
        queries: [q, ...] test images as the network takes them.
        targets: [q] the network's predictions.
        labels: [q] true labels.
        network: its name.
        accuracy: of the network over the whole test set of the case.
        made_by: fingerprint of all this.
    """

    case: Case
    context: baselines.Context
    queries: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    network: str
    accuracy: float
    made_by: str


def choose(total: int, most: int | None) -> np.ndarray:
    """Places of `most` samples of `total`, ascending: the same ones for every seed, and none preferred."""
    if most is None or most >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).permutation(total)[:most])


def check(name: str, dataset: data.Dataset, config: EvaluateConfig) -> None:
    """Refuse what a case cannot be made of, before anything is computed.

    Args:
        name: one of METRICS_OF.
        dataset: as read.
        config: the sizes.

    Raises:
        ValueError: too few classes or training images for it, images too small for the mark or with values that
            it is not the brightest of.
    """
    k, n = len(dataset.class_names), _samples(name, dataset, config)
    wanted = [m for m in METRICS_OF[name] if m in config.chosen_metrics] or METRICS_OF[name]
    few = {"grouped": 4, "marked": SHORTCUT_CLASS + 1}.get(name, 2)
    if k < few:
        fail("data", f"{k} classes", f"{few} or more for the metric {wanted[0]!r}")
    if n < 2:
        fail("data", f"{n} training images", f"2 or more for the metric {wanted[0]!r}")
    most = max(config.sizes.fractions, default=0.0)
    if "pruning" in wanted and round(most * n) >= n:
        fail("data", f"{n} training images", f"more for the metric 'pruning', which takes away {most:.0%} of them")
    if name == "marked":
        data.mark(dataset.test.images[:1])
        stages.check_unit("training", dataset.train.images)  # the mark is as bright as can be where that is 1
        stages.check_unit("test", dataset.test.images)


def _samples(name: str, dataset: data.Dataset, config: EvaluateConfig) -> int:
    """How many training images a case has."""
    total, sizes = len(dataset.train.labels), config.sizes
    most = min(total, sizes.limit or total)
    # The part depends on `limit` only where that is smaller: networks that were retrained serve a larger limit too.
    return min(sizes.part or total, most) if name == "part" else most


def make(name: str, dataset: data.Dataset, config: EvaluateConfig, seed: int) -> Case:
    """The data of a case.

    Args:
        name: one of METRICS_OF.
        dataset: as read.
        config: the sizes.
        seed: of what is planted.

    Raises:
        ValueError: as `check`.
    """
    check(name, dataset, config)
    k, sizes = len(dataset.class_names), config.sizes
    rows = choose(len(dataset.train.labels), _samples(name, dataset, config))
    images, labels = dataset.train.images[rows], dataset.train.labels[rows]
    test, planted, classes = dataset.test, None, k
    key = jax.random.fold_in(jax.random.key(seed), list(METRICS_OF).index(name))
    if name == "grouped":
        planted, labels, classes = labels, labels // 2, -(-k // 2)
    elif name == "marked":
        marked, where = data.shortcut_mark(images, labels, key, target_class=SHORTCUT_CLASS)
        images, planted = np.asarray(marked), np.asarray(where)
        test = ImageData(np.asarray(data.mark(test.images)), test.labels)
    elif name == "noisy":
        noisy, wrong = data.label_noise(labels, key, num_classes=k)
        labels, planted = np.asarray(noisy), np.asarray(wrong)
    train = ImageData(images, labels)
    settings = (config.network, seed, training.config_for(len(labels)), sizes.checkpoints)
    made_by = checkpoint.fingerprint(__version__, name, train, test, classes, planted, settings)
    return Case(name, train, test, classes, planted, made_by)


def train(case: Case, config: EvaluateConfig, seed: int, progress: Progress) -> dict[str, Any]:
    """The network of a case: "checkpoints", a list of variables, and "rates" [t]."""
    module = module_of(config.network, case.num_classes)
    settings = training.config_for(len(case.train.labels))
    found = models.trajectory(
        jax.random.fold_in(jax.random.key(seed), 1_000_003), module, case.train.images, case.train.labels,
        config=settings, checkpoints=min(config.sizes.checkpoints, settings.steps), apply=models.faster_apply(module),
        progress=progress,
    )  # fmt: skip
    return {"checkpoints": list(found.checkpoints), "rates": found.learning_rates}


def put_together(case: Case, network: dict[str, Any], config: EvaluateConfig) -> Trained:
    """A case with its network, its queries chosen and predicted."""
    module = module_of(config.network, case.num_classes)
    model = models.from_linen(module, head=models.HEAD)
    params = network["checkpoints"][-1]
    predicted = training.predict(model.logits, params, case.test.images).argmax(axis=1)
    true = case.test.labels // 2 if case.name == "grouped" else case.test.labels
    if case.name == "marked":
        misled = np.flatnonzero((predicted == SHORTCUT_CLASS) & (case.test.labels != SHORTCUT_CLASS))
        rows = misled[choose(len(misled), config.sizes.queries)]
    else:
        rows = choose(len(predicted), config.sizes.queries)
    context = baselines.context(
        model.logits, params, data.to_float(case.train.images), case.train.labels,
        num_classes=case.num_classes, features=model.features, head=models.HEAD,
        checkpoints=tuple(network["checkpoints"]), learning_rates=network["rates"],
    )  # fmt: skip
    queries = np.asarray(data.to_float(case.test.images[rows]))
    made_by = checkpoint.fingerprint(case.made_by, params, rows)
    return Trained(
        case,
        context,
        queries,
        predicted[rows],
        case.test.labels[rows],
        config.network,
        float(np.mean(predicted == true)),
        made_by,
    )


@functools.lru_cache
def module_of(network: str, num_classes: int) -> Any:
    """The module of a network's name; the same object for equal arguments."""
    return {"small-cnn": models.SmallCNN, "resnet-18": models.ResNet18}[network](num_classes=num_classes)
