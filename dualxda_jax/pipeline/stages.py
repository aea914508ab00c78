"""The stages of a run, each from pytrees to a pytree; letters as in `types`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import attribution, data, evaluation, features, models, svm, xda
from dualxda_jax._check import fail
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.types import (
    Array,
    DualSolution,
    FeatureFn,
    FeatureModel,
    Features,
    ImageData,
    Params,
    Progress,
    SupportModel,
)

BATCH = 512
QUERIES_AT_ONCE = 100
PAIRS_AT_ONCE = 12
SUSPECTS = 16
DETECTION_PLACES = 5
SOLVER = svm.SolverConfig()
# Images are numbers in 0..1. Its maps sum to the score, and it tells best which pixels matter (benchmarks/README.md).
COMPOSITE = xda.composites.epsilon_gamma_box(0.0, 1.0)


def read(config: DemoConfig) -> data.Dataset:
    """The images, cut to `limit`."""
    dataset = data.embedded_sample() if config.data is None else data.load_folder(config.data)
    if config.limit is None:
        return dataset
    train, test = (ImageData(d.images[: config.limit], d.labels[: config.limit]) for d in (dataset.train, dataset.test))
    return dataclasses.replace(dataset, train=train, test=test)


def check_drawable(dataset: data.Dataset) -> None:
    """Refuse, before any work, images that relevance would be wrong for and that a figure cannot show.

    Raises:
        ValueError: values outside 0..1, which the rule of the first layer relies on, or neither 1 nor 3 channels.
    """
    for name, part in (("training", dataset.train), ("test", dataset.test)):
        channels = part.images.shape[-1]
        if channels not in (1, 3):
            fail("data", f"{name} images with {channels} channels", "1 or 3")
        check_unit(name, part.images)


def check_unit(name: str, images: np.ndarray) -> None:
    """Refuse images whose values are not in 0..1; uint8 ones become so."""
    if images.dtype != np.uint8 and not (images.min() >= -1e-6 and images.max() <= 1 + 1e-6):
        fail("data", f"{name} images with values in {images.min():g}..{images.max():g}", "in 0..1, or uint8")


def train(
    config: DemoConfig, module: Any, images: ImageData, settings: models.training.TrainConfig, folder: Path,
    progress: Progress,
) -> Params:  # fmt: skip
    """The network's parameters; interrupted, it goes on from the last pass that `folder` holds and leaves there."""
    key = jax.random.key(config.seed)
    state = models.training.fit(
        key, module, images.images, images.labels, config=settings, checkpoint_dir=folder, progress=progress
    )
    return state.variables


def extract(model: FeatureModel, params: Params, images: ImageData, progress: Progress) -> Features:
    """Penultimate features of images."""
    total = -(-len(images.labels) // BATCH)
    batches = data.batches(images.images, images.labels, batch_size=BATCH)
    return features.extract(
        model.features, params, batches, batch_size=BATCH, progress=lambda done, _: progress(done, total)
    )


def fit(train: Features, num_classes: int, cost: float, progress: Progress) -> DualSolution:
    """The surrogate."""
    return svm.solve(train.values, train.labels, num_classes=num_classes, cost=cost, config=SOLVER, progress=progress)


def network_logits(model: FeatureModel, params: Params, values: Array) -> np.ndarray:
    """[q, k] the network's own logits from features [q, d]."""
    weights, bias = models.head_weights(model, params)
    return np.asarray(values) @ np.asarray(weights).T + np.asarray(bias)


def choose(predicted: np.ndarray, labels: np.ndarray, *, right: int, wrong: int, seed: int) -> np.ndarray:
    """Test images to explain: first right predictions, as many classes as there are places, then wrong ones.

    Args:
        predicted: [q] the network's predictions.
        labels: [q] true labels.
        right: how many right ones, at most.
        wrong: how many wrong ones, at most.
        seed: of the choice.

    Returns:
        [right + wrong] places in the test set, fewer if there are not that many.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    hits = order[predicted[order] == labels[order]]
    turn = np.zeros(len(hits), int)  # an image's place among the hits of its class: one of every class comes first
    for c in np.unique(labels[hits]):
        turn[labels[hits] == c] = np.arange(np.sum(labels[hits] == c))
    hits = hits[np.argsort(turn, kind="stable")]
    misses = order[predicted[order] != labels[order]]
    return np.concatenate([hits[:right], misses[:wrong]])


def find(
    model: FeatureModel, params: Params, support: SupportModel, test: Features, config: DemoConfig,
    chosen: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Strongest proponents and opponents of some test samples, towards the network's predictions.

    Args:
        model: features of the network.
        params: its parameters.
        support: the support vectors.
        test: features of the test images.
        config: how many, and the seed of the choice.
        chosen: [q] places in the test set; None chooses as `choose` does.

    Returns:
        "queries" [q] places in the test set, "targets" [q], "logits" [q] the surrogate's logits of the targets,
        "proponents" and "opponents": `TopK`, "suspects" [e] places in the training set, the highest self-influence
        first, and "self_influence" [e] theirs.
    """
    predicted = network_logits(model, params, test.values).argmax(axis=1)
    if chosen is None:
        chosen = choose(predicted, np.asarray(test.labels), right=config.right, wrong=config.wrong, seed=config.seed)
    targets = jnp.asarray(predicted[chosen], jnp.int32)
    top = functools.partial(
        attribution.top_k, support, test.values[chosen], targets, k=min(config.each_way, len(support.index))
    )
    influence = np.asarray(attribution.self_influence(support))
    suspects = np.argsort(-influence, kind="stable")[:SUSPECTS]
    return {
        "queries": chosen,
        "targets": targets,
        "logits": attribution.logits(support, test.values[chosen])[np.arange(len(chosen)), targets],
        "proponents": top(largest=True),
        "opponents": top(largest=False),
        "suspects": np.asarray(support.index)[suspects],
        "self_influence": influence[suspects],
    }


def evaluate(
    model: FeatureModel, params: Params, train: Features, test: Features, solution: DualSolution, support: SupportModel,
    *, limit: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What the report says of the surrogate, over the first `limit` test samples.

    Returns:
        Scalars: accuracy and surrogate_accuracy (of all test samples), agreement, weight_cosine, logit_correlation,
        matthews, kendall_tau, class_detection, completeness (largest |Σ scores − logit| over the largest |logit|),
        support (share of samples), nonzero (share of coefficients).
    """
    weights, _ = models.head_weights(model, params)
    network = network_logits(model, params, test.values)
    surrogate = np.asarray(attribution.logits(support, test.values))
    predicted, labels = network.argmax(1), np.asarray(test.labels)
    part = slice(0, limit)
    faithful = evaluation.surrogate_faithfulness(weights, solution.weights, network[part], surrogate[part])
    detection, completeness = _over_queries(support, train, test.values[part], predicted[part], surrogate, progress)
    nonzero = np.asarray(solution.coefficients) != 0
    values = {
        "accuracy": np.mean(predicted == labels),
        "surrogate_accuracy": np.mean(surrogate.argmax(1) == labels),
        "agreement": np.mean(surrogate.argmax(1) == predicted),
        **{field.name: getattr(faithful, field.name) for field in dataclasses.fields(faithful)},
        "class_detection": np.mean(detection),
        "completeness": completeness / (np.abs(surrogate).max() or 1.0),
        "support": np.mean(nonzero.any(1)),
        "nonzero": np.mean(nonzero),
    }
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def _over_queries(
    support: SupportModel, train: Features, queries: Array, targets: np.ndarray, logits: np.ndarray, progress: Progress
) -> tuple[np.ndarray, float]:
    """Class detection per query [q], and the largest distance of a sum of scores from its logit."""
    detection, worst = [], 0.0
    places = min(DETECTION_PLACES, len(train.labels))
    for start in range(0, len(targets), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        target = jnp.asarray(targets[part], jnp.int32)
        scores = attribution.scores(support, queries[part], target)
        detection.append(
            evaluation.class_detection(
                attribution.dense(support, scores), train.labels, target, k=places, per_query=True
            )
        )
        sums = np.asarray(scores, np.float64).sum(1)
        worst = max(worst, float(np.abs(sums - np.take_along_axis(logits[part], targets[part, None], 1)[:, 0]).max()))
        progress(min(start + QUERIES_AT_ONCE, len(targets)), len(targets))
    return np.concatenate(detection), worst


@functools.partial(jax.jit, static_argnames="feature_fn")
def _logit_maps(feature_fn: FeatureFn, params: Params, support: SupportModel, x: Array, targets: Array) -> Array:
    def explain(x: Array, target: Array) -> Array:
        return xda.explain_logit(feature_fn, params, support, x, target, composite=COMPOSITE)

    return jax.vmap(explain)(x, targets)


def explain(
    model: FeatureModel, params: Params, support: SupportModel, dataset: data.Dataset, found: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Heat maps of the chosen queries and of all their pairs.

    Args:
        model: features of the network.
        params: its parameters.
        support: the support vectors.
        dataset: the images.
        found: as `find` returns it.
        progress: called with pairs done.

    Returns:
        "logit": [q, h, w, c], and "pairs": `PairRelevance` with leading axes [q, 2, e].
    """
    index = np.stack([found["proponents"].index, found["opponents"].index], axis=1)  # [q, 2, e]
    queries, targets = np.asarray(found["queries"]), np.asarray(found["targets"])
    q, ways, each = index.shape
    test = np.repeat(queries, ways * each)
    rows = np.searchsorted(np.asarray(support.index), index.ravel())
    coefficients = np.asarray(support.coefficients)[rows, np.repeat(targets, ways * each)]
    maps = []
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        part = np.arange(start, start + PAIRS_AT_ONCE) % len(rows)  # the last call is filled up: one compiled shape
        x_test = data.to_float(dataset.test.images[test[part]])
        x_train = data.to_float(dataset.train.images[index.ravel()[part]])
        maps.append(
            xda.explain_pairs(
                model.features, params, x_test, x_train, jnp.asarray(coefficients[part]), composite=COMPOSITE
            )
        )
        progress(min(start + PAIRS_AT_ONCE, len(rows)), len(rows))
    pairs = jax.tree.map(lambda *a: np.concatenate(a)[: len(rows)].reshape(q, ways, each, *a[0].shape[1:]), *maps)
    images = data.to_float(dataset.test.images[queries])
    logit = _logit_maps(model.features, params, support, images, jnp.asarray(targets))
    return {"logit": logit, "pairs": pairs}
