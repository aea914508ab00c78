"""Linear datamodelling scores on MNIST 5,000/500 with logistic regression, beside dattri's published values.

    python benchmarks/yardstick.py --data FOLDER [--subsets 50] [--out benchmarks/results/yardstick.json]

The setting is dattri's (benchmark "mnist_lr"): the first 5,000 training and 500 test images, normalised by 0.1307 and
0.3081; SGD without momentum, rate 0.01, batches of 64, 20 passes; networks retrained on random halves from initial
weights and shuffles of their own. LDS: per test sample, Spearman between the summed scores of a half and the negative
loss at the true label of the network trained on it; the mean over the test samples. dattri projects TracIn, GradDot and
GradCos to 512 dimensions, takes 10 networks trained on all samples as TracIn's checkpoints, and networks trained on
halves as TRAK's.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import baselines, data, evaluation

PUBLISHED = {
    "influence_explicit": 0.80,
    "influence_lissa": 0.79,
    "influence_arnoldi": 0.31,
    "tracin-10": 0.33,
    "graddot": 0.33,
    "gradcos": 0.19,
    "representer": 0.19,
    "trak-1": 0.42,
    "trak-10": 0.64,
}
EPOCHS, BATCH, RATE = 20, 64, 0.01


def logits(params, x):
    return x @ params["kernel"] + params["bias"][None, :]


@functools.partial(jax.jit, static_argnums=0)
def train(m, key, x, labels, members):
    """M networks at once; members [m, s] are the samples of each."""
    size = members.shape[1]
    steps = -(-size // BATCH)
    keys = jax.random.split(key, m)
    bound = 1 / np.sqrt(x.shape[1])
    draw = lambda key, *shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731

    def loss(params, rows, mask):
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits(params, x[rows])), labels[rows][:, None], axis=1)[:, 0]
        return (losses * mask).sum() / mask.sum()

    def one(key, members):
        first, second, third = jax.random.split(key, 3)
        params = {"kernel": draw(first, x.shape[1], 10), "bias": draw(second, 10)}

        def epoch(params, key):
            order = jnp.pad(jax.random.permutation(key, members), (0, steps * BATCH - size))
            real = jnp.arange(steps * BATCH) < size

            def step(params, batch):
                gradient = jax.grad(loss)(params, batch[0], batch[1].astype(jnp.float32))
                return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), None

            return jax.lax.scan(step, params, (order.reshape(steps, BATCH), real.reshape(steps, BATCH)))[0], None

        return jax.lax.scan(epoch, params, jax.random.split(third, EPOCHS))[0]

    return jax.vmap(one)(keys, members)


def read(folder, split, count):
    images = data.read_idx_images(pathlib.Path(folder) / f"{split}-images-idx3-ubyte")[:count].reshape(count, -1)
    labels = data.read_idx_labels(pathlib.Path(folder) / f"{split}-labels-idx1-ubyte")[:count].astype(np.int32)
    return jnp.asarray((images.astype(np.float32) / 255 - 0.1307) / 0.3081), jnp.asarray(labels)


def methods():
    """Name -> (method, which networks are its checkpoints, how many)."""
    chosen = {
        "graddot": (baselines.graddot(), "full", 1),
        "graddot-512": (baselines.graddot(projection=512), "full", 1),
        "gradcos": (baselines.gradcos(), "full", 1),
        "tracin-10": (baselines.tracin(), "full", 10),
        "trak-1": (baselines.trak(projection=512), "half", 1),
        "trak-10": (baselines.trak(projection=512), "half", 10),
        "similarity": (baselines.similarity(), "full", 1),
        "random": (baselines.random(), "full", 1),
    }
    chosen |= {f"representer {x:g}": (baselines.representer(x, targets="labels"), "full", 1) for x in (1e-3, 1e-1, 1.0)}
    chosen |= {f"dualda {c:g}": (baselines.dualda(c), "full", 1) for c in (1e-5, 1e-3)}
    for name in ("influence_explicit", "influence_cg"):
        if name in baselines.METHODS:
            chosen[name] = (baselines.METHODS[name](), "full", 1)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/yardstick.json"))
    given = parser.parse_args()
    (x, labels), (queries, targets) = read(given.data, "train", 5000), read(given.data, "t10k", 500)
    key = jax.random.key(0)
    halves = jax.vmap(lambda k: jax.random.permutation(k, 5000)[:2500])(jax.random.split(key, given.subsets))
    half = train(given.subsets, jax.random.key(1), x, labels, halves)
    full = train(10, jax.random.key(2), x, labels, jnp.tile(jnp.arange(5000)[None], (10, 1)))
    outputs = jax.vmap(lambda p: jax.nn.log_softmax(logits(p, queries))[jnp.arange(500), targets])(half)
    subsets = np.zeros((given.subsets, 5000), bool)
    np.put_along_axis(subsets, np.asarray(halves), True, axis=1)
    rows = []
    for name, (method, which, count) in methods().items():
        networks = {"full": full, "half": half}[which]
        checkpoints = tuple(jax.tree.map(lambda a, i=i: a[i], networks) for i in range(count))
        context = baselines.context(
            logits,
            checkpoints[-1],
            x,
            labels,
            num_classes=10,
            features=lambda params, x: x,
            checkpoints=checkpoints,
            learning_rates=np.full(count, 1e-3),
        )
        scores = method.scores(method.fit(jax.random.key(3), context), queries, targets)
        value = float(jnp.nanmean(evaluation.lds(scores, subsets, outputs)))
        rows.append({"method": name, "lds": value, "dattri": PUBLISHED.get(name.split()[0])})
        print(f"{name:<22} {value:6.3f}   dattri {rows[-1]['dattri'] or '-'}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"subsets": given.subsets, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
