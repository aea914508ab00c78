"""Do the maps say something true? Two checks on a data set of images with a planted shortcut.

    python benchmarks/truth_of_maps.py FOLDER [--limit 20000] [--cost 1e-5] [--out truth_of_maps.json]

The network is trained with a mark (a frame and a square) on 30% of one class's images. On marked test images of
other classes that it now takes for that class, the mark is the reason: of the pairs with their top marked proponents,
how much of the positive relevance falls on the mark, by composite, for plain input × gradient and for a random map? And
on unmarked test images: how fast does the score of the top pair fall when the most relevant pixels of one side are
removed, against random ones? Every figure is a mean over pairs with its standard error.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import attribution, data, evaluation, features, models, svm, xda

COMPOSITES = {
    name: getattr(xda.composites, name)()
    for name in ("epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat", "epsilon")
}


def extract(model, params, images, labels):
    batches = data.batches(images, labels, batch_size=1024)
    return features.extract(model.features, params, batches, batch_size=1024).values


def maps_of(name, model, params, x_test, x_train, coefficients, key):
    """Both maps of every pair, by a composite, by input × gradient of the pair's score, or at random."""
    if name in COMPOSITES:
        found = xda.explain_pairs(model.features, params, x_test, x_train, coefficients, composite=COMPOSITES[name])
        return found.test, found.train
    if name == "random":
        return tuple(jax.random.normal(k, x_test.shape) for k in jax.random.split(key))

    def one(x, partner, coefficient):
        other = model.features(params, partner[None])
        return x * jax.grad(lambda x: coefficient * (model.features(params, x[None]) * other).sum())(x)

    pairs = jax.jit(lambda a, b, c: jax.lax.map(lambda p: one(*p), (a, b, c), batch_size=64))
    return pairs(x_test, x_train, coefficients), pairs(x_train, x_test, coefficients)


def mean(values):
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    error = values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": float(values.mean()), "standard error": float(error), "pairs": len(values)}


def top_pairs(support, query, targets, allowed):
    """Place among the support vectors of the highest score that is allowed, and its coefficient."""
    scores = np.where(allowed[None], np.asarray(attribution.scores(support, query, targets)), -np.inf)
    best = scores.argmax(axis=1)
    return best, np.asarray(support.coefficients)[best, targets]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=None, help="training images to use; all of them if not given")
    parser.add_argument("--cost", type=float, default=1e-5)
    parser.add_argument("--target-class", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=500, help="at most this many in each check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("truth_of_maps.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    dataset = data.load_folder(options.folder)
    images, labels = dataset.train.images[: options.limit], np.asarray(dataset.train.labels[: options.limit])
    marking, training, randomness = jax.random.split(jax.random.key(options.seed), 3)
    target = options.target_class
    images, marked = data.corruptions.shortcut_mark(images, labels, marking, target_class=target)
    images, marked = np.asarray(images), np.asarray(marked)
    num_classes = int(labels.max()) + 1
    module = models.SmallCNN(num_classes=num_classes)
    params = models.training.fit(training, module, images, labels).variables
    model = models.from_linen(module, head="head")
    phi = extract(model, params, images, labels)
    solution = svm.solve(phi, labels, num_classes=num_classes, cost=options.cost)
    support = attribution.compress(phi, labels, solution)
    index = np.asarray(support.index)
    test, truth = dataset.test.images, np.asarray(dataset.test.labels)
    result = {"options": {k: str(v) for k, v in vars(options).items()}, "training images": len(images)}
    result |= {"marked": int(marked.sum()), "support vectors": len(index), "gap": float(solution.info.gap)}

    def logits(images):
        return attribution.logits(support, extract(model, params, images, truth[: len(images)]))

    result["accuracy on unmarked test images"] = float((np.argmax(logits(test), axis=1) == truth).mean())
    marked_test = np.asarray(data.corruptions.mark(test))
    predicted = np.argmax(logits(marked_test), axis=1)
    driven = np.flatnonzero((predicted == target) & (truth != target))
    result["marked test images of other classes taken for the class"] = float(
        len(driven) / max((truth != target).sum(), 1)
    )
    mask = np.asarray(data.corruptions.mark(np.zeros_like(test[:1])))[0].max(axis=-1) > 0
    result["share of the pixels that are mark"] = float(mask.mean())

    # With a large cost no marked sample may be a support vector: the mark makes them too easy.
    result["marked support vectors"] = int(marked[index].sum())
    driven = driven[: options.pairs]
    if len(driven) > 1 and marked[index].any():
        query = extract(model, params, marked_test[driven], truth[driven])
        best, coefficients = top_pairs(support, query, np.full(len(driven), target), marked[index])
        pairs = data.to_float(marked_test[driven]), data.to_float(images[index[best]]), jnp.asarray(coefficients)
        result["share of positive relevance on the mark"] = {}
        for name in (*COMPOSITES, "input x gradient", "random"):
            sides = maps_of(name, model, params, *pairs, randomness)
            result["share of positive relevance on the mark"][name] = {
                side: mean(evaluation.mark_relevance_share(m, mask))
                for side, m in zip(("test", "train"), sides, strict=True)
            }

    chosen = np.arange(min(options.pairs, len(test)))
    query = extract(model, params, test[chosen], truth[chosen])
    targets = np.argmax(attribution.logits(support, query), axis=1)
    best, coefficients = top_pairs(support, query, targets, np.ones(len(index), bool))
    x_test, x_train = data.to_float(test[chosen]), data.to_float(images[index[best]])
    partner = model.features(params, x_train) * jnp.asarray(coefficients)[:, None]
    curves = jax.jit(
        lambda x, relevance, key: evaluation.pixel_flipping(
            lambda x: (model.features(params, x) * partner).sum(axis=1), x, relevance, key, orders=3
        )
    )
    result["pixel flipping of the test side"] = {}
    for name in (*COMPOSITES, "input x gradient", "random"):
        side, _ = maps_of(name, model, params, x_test, x_train, jnp.asarray(coefficients), randomness)
        curve = curves(x_test, side, randomness)
        left = np.asarray(curve.scores / curve.original[:, None]).mean(axis=0)
        by_chance = np.asarray(curve.random / curve.original[:, None]).mean(axis=0)
        result["pixel flipping of the test side"][name] = {
            "advantage": mean(curve.advantage),
            "fractions": [float(f) for f in curve.fractions],
            "score left": [float(v) for v in left],
            "score left at random": [float(v) for v in by_chance],
        }
    result["seconds"] = time.perf_counter() - start
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
