"""Do the maps say something true? Three checks on a data set of images with a planted shortcut.

    python benchmarks/truth_of_maps.py FOLDER [--limit 20000] [--costs 1e-7 1e-5] [--seeds 0 1 2] [--out FILE]

The network is trained with a mark (a frame and a square) on 30% of one class's images. On marked test images of
other classes that it now takes for that class, the mark is the reason. Of the pairs with their top marked proponents:

- how much of the positive relevance falls on the mark?
- how well does the relevance on the mark, as a share of the score, tell how much of the score is gone once the mark is
  taken off the test image (the truth, measured)?

And on unmarked test images: how fast does the score of the top pair fall when the most relevant pixels of one side are
replaced (by black, or by the mean image), against random ones?

All by composite, for plain input × gradient, for a random map, and for two maps that know nothing of the network but
are zero where the image is: the image itself, and noise times the image. A mark is bright, so a map that vanishes on
black pixels favours it whatever the reason; a map of that kind says something only where it beats those two.
Every figure is a mean over pairs, and over seeds with the spread between them.
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
    for name in (
        "epsilon",
        "epsilon_plus",
        "epsilon_plus_flat",
        "epsilon_alpha2_beta1",
        "epsilon_alpha2_beta1_flat",
        "excitation_backprop",
    )
}
COMPOSITES["epsilon_gamma_box"] = xda.composites.epsilon_gamma_box(0.0, 1.0)
CONTROLS = ("input x gradient", "the image", "noise x the image", "noise")


def extract(model, params, images, labels):
    batches = data.batches(images, labels, batch_size=1024)
    return features.extract(model.features, params, batches, batch_size=1024).values


def maps_of(name, model, params, x_test, x_train, coefficients, key):
    """Both maps of every pair, by a composite or a control."""
    sides = (x_test, x_train)
    if name in COMPOSITES:
        found = xda.explain_pairs(model.features, params, *sides, coefficients, composite=COMPOSITES[name])
        return found.test, found.train
    if name == "the image":
        return sides
    if name.startswith("noise"):
        noise = [jax.random.normal(k, x_test.shape) for k in jax.random.split(key)]
        return noise if name == "noise" else tuple(n * x for n, x in zip(noise, sides, strict=True))

    def one(x, partner, coefficient):
        other = model.features(params, partner[None])
        return x * jax.grad(lambda x: coefficient * (model.features(params, x[None]) * other).sum())(x)

    pairs = jax.jit(lambda a, b, c: jax.lax.map(lambda p: one(*p), (a, b, c), batch_size=64))
    return pairs(x_test, x_train, coefficients), pairs(x_train, x_test, coefficients)


def mean(values):
    values = np.asarray(values, np.float64)
    return float(values[np.isfinite(values)].mean())


def top_pairs(support, query, targets, allowed):
    """Place among the support vectors of the highest score that is allowed, and its coefficient."""
    scores = np.where(allowed[None], np.asarray(attribution.scores(support, query, targets)), -np.inf)
    best = scores.argmax(axis=1)
    return best, np.asarray(support.coefficients)[best, targets]


def on_the_mark(model, params, marked, unmarked, partners, coefficients, mask, key):
    """Maps of the pairs that the mark drives: the mark's share, and how well it tells the truth."""
    partner = model.features(params, partners) * coefficients[:, None]
    with_mark, without = ((model.features(params, x) * partner).sum(axis=1) for x in (marked, unmarked))
    gone = np.asarray(1 - without / with_mark, np.float64)
    found = {"share of the score gone without the mark": mean(gone)}
    for name in (*COMPOSITES, *CONTROLS):
        sides = maps_of(name, model, params, marked, partners, coefficients, key)
        shares = (evaluation.mark_relevance_share(m, mask) for m in sides)
        row = {side: mean(share) for side, share in zip(("test", "train"), shares, strict=True)}
        told = np.asarray((sides[0].sum(-1) * mask).sum((1, 2)) / sides[0].sum((1, 2, 3)), np.float64)
        row["on the mark of the score, test"] = mean(told)
        row["rank correlation with the truth"] = correlation(told, gone)
        found[name] = row
    return found


def correlation(a, b):
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def flipping(model, params, x_test, x_train, coefficients, baseline, key):
    partner = model.features(params, x_train) * coefficients[:, None]
    curves = jax.jit(
        lambda x, relevance, key: evaluation.pixel_flipping(
            lambda x: (model.features(params, x) * partner).sum(axis=1), x, relevance, key, orders=3, baseline=baseline
        )
    )
    found = {}
    for name in (*COMPOSITES, *CONTROLS):
        side, _ = maps_of(name, model, params, x_test, x_train, coefficients, key)
        found[name] = mean(curves(x_test, side, jax.random.fold_in(key, 1)).advantage)
    return found


def one_cost(model, params, phi, images, labels, marked, test, truth, cost, options, key):
    target, classes = options.target_class, int(labels.max()) + 1
    solution = svm.solve(phi, labels, num_classes=classes, cost=cost)
    support = attribution.compress(phi, labels, solution)
    index = np.asarray(support.index)
    result = {"cost": cost, "support vectors": len(index), "marked support vectors": int(marked[index].sum())}
    result["gap"] = float(solution.info.gap)

    def predict(images):
        return np.argmax(attribution.logits(support, extract(model, params, images, truth)), axis=1)

    result["accuracy on unmarked test images"] = float((predict(test) == truth).mean())
    marked_test = np.asarray(data.corruptions.mark(test))
    driven = np.flatnonzero((predict(marked_test) == target) & (truth != target))
    result["marked test images of other classes taken for the class"] = len(driven) / int((truth != target).sum())
    mask = np.asarray(data.corruptions.mark(np.zeros_like(test[:1])))[0].max(axis=-1) > 0
    result["share of the pixels that are mark"] = float(mask.mean())
    driven = driven[: options.pairs]
    if len(driven) > 1 and marked[index].any():
        query = extract(model, params, marked_test[driven], truth[driven])
        best, coefficients = top_pairs(support, query, np.full(len(driven), target), marked[index])
        result["pairs"], result["partners"] = len(driven), len(set(best.tolist()))
        x = [data.to_float(v) for v in (marked_test[driven], test[driven], images[index[best]])]
        result["mark"] = on_the_mark(model, params, *x, jnp.asarray(coefficients), mask, key)
    chosen = np.arange(min(options.pairs, len(test)))
    query = extract(model, params, test[chosen], truth[chosen])
    targets = np.argmax(attribution.logits(support, query), axis=1)
    best, coefficients = top_pairs(support, query, targets, np.ones(len(index), bool))
    pairs = data.to_float(test[chosen]), data.to_float(images[index[best]]), jnp.asarray(coefficients)
    gray = np.asarray(data.to_float(images[:: max(1, len(images) // 10_000)])).mean(axis=0)
    result["flipping to black"] = flipping(model, params, *pairs, 0.0, key)
    result["flipping to the mean image"] = flipping(model, params, *pairs, jnp.asarray(gray), key)
    return result


def one_seed(dataset, seed, options):
    images, labels = dataset.train.images[: options.limit], np.asarray(dataset.train.labels[: options.limit])
    marking, training, randomness = jax.random.split(jax.random.key(seed), 3)
    images, marked = data.corruptions.shortcut_mark(images, labels, marking, target_class=options.target_class)
    images, marked = np.asarray(images), np.asarray(marked)
    module = models.SmallCNN(num_classes=int(labels.max()) + 1)
    config = models.training.config_for(len(images), epochs=options.epochs)
    params = models.training.fit(training, module, images, labels, config=config).variables
    model = models.from_linen(module, head="head")
    phi = extract(model, params, images, labels)
    test, truth = dataset.test.images, np.asarray(dataset.test.labels)
    for cost in options.costs:
        row = one_cost(model, params, phi, images, labels, marked, test, truth, cost, options, randomness)
        yield {"seed": seed, "training images": len(images), "marked": int(marked.sum())} | row


def summary(rows):
    """Mean over seeds and the spread between them (largest less smallest), for every figure of every cost."""

    def merge(values):
        if isinstance(values[0], dict):
            return {k: merge([v[k] for v in values]) for k in values[0]}
        return {"mean": float(np.mean(values)), "spread": float(np.ptp(values))}

    costs = sorted({row["cost"] for row in rows})
    wanted = ("mark", "flipping to black", "flipping to the mean image")
    alike = {c: [r for r in rows if r["cost"] == c] for c in costs}
    return {
        str(c): {k: merge([r[k] for r in same]) for k in wanted if all(k in r for r in same)}
        for c, same in alike.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=None, help="training images to use; all of them if not given")
    parser.add_argument("--epochs", type=int, default=None, help="passes over the training images")
    parser.add_argument("--costs", type=float, nargs="+", default=[1e-7, 1e-5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target-class", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=500, help="at most this many in each check")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("truth_of_maps.json"))
    options = parser.parse_args()
    dataset = data.load_folder(options.folder)
    facts = {k: str(v) for k, v in vars(options).items() if k != "folder"} | {"data": options.folder.name}
    rows = []
    for seed in options.seeds:
        start = time.perf_counter()
        for row in one_seed(dataset, seed, options):
            rows.append(row | {"seconds since the seed's start": time.perf_counter() - start})
            result = {"options": facts, "summary": summary(rows), "rows": rows}
            options.out.write_text(json.dumps(result, indent=1))
            print(json.dumps(rows[-1], indent=1), flush=True)


if __name__ == "__main__":
    main()
