"""Linear datamodelling scores on MNIST 5,000/500 with logistic regression, beside dattri's published values.

    python benchmarks/yardstick.py --data FOLDER [--subsets 100] [--runs 2] [--batch 32] [--peers PEERS_PYTHON]
        [--methods PATTERN ...]

What `--out` holds already, of the same options, is kept and not computed again.

The setting is dattri's (benchmark "mnist_lr" and its script `dattri_retrain`): the first 5,000 training and 500 test
images, normalised by 0.1307 and 0.3081; SGD without momentum, rate 0.01, batches of 32, 20 passes; networks retrained
on random halves from initial weights and shuffles of their own. LDS: per test sample, Spearman between the summed
scores of a half and the negative loss at the true label, the mean over `--runs` networks trained on it; the mean over
the test samples. dattri projects TracIn, GradDot and GradCos to 512 dimensions, takes 10 networks trained on all
samples as TracIn's checkpoints and networks trained on halves as TRAK's, multiplies normalised features in its
representer points, and reports the best of a grid of dampings: as here.

With PEERS_PYTHON, a Python that has torch and dattri, dattri's own classes score the same networks under the same
ground truth; that is what tells a difference between implementations from one between ground truths.
"""

import argparse
import fnmatch
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

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
    "representer-cos": 0.19,
    "trak-1": 0.42,
    "trak-10": 0.64,
    "trak-50": 0.68,
}
EPOCHS, RATE = 20, 0.01
DAMPINGS = (1e-1, 1e-2, 1e-3)

PEER = r"""
import sys, json, numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dattri.algorithm import influence_function as I
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.algorithm.rps import RPSAttributor
from dattri.metric import lds
from dattri.task import AttributionTask
f = np.load(sys.argv[1])
class Net(nn.Module):
    def __init__(self): super().__init__(); self.linear = nn.Linear(784, 10)
    def forward(self, x): return self.linear(x)
net = Net().eval()
def states(name):
    pairs = zip(f[name + "/kernel"], f[name + "/bias"])
    return [{"linear.weight": torch.tensor(w.T.copy()), "linear.bias": torch.tensor(b)} for w, b in pairs]
train = TensorDataset(torch.tensor(f["x"]), torch.tensor(f["y"]).long())
query = TensorDataset(torch.tensor(f["query"]), torch.tensor(f["targets"]).long())
truth = torch.tensor(f["outputs"]), torch.tensor(f["halves"]).long()
ce = nn.CrossEntropyLoss()
call = torch.func.functional_call
def loss(params, pair):
    x, y = pair
    return ce(call(net, params, x), y.long())
def single(params, pair): return loss(params, (pair[0][None], pair[1][None]))
def log_odds(params, pair):
    logp = -single(params, pair)
    return logp - torch.log(1 - torch.exp(logp))
task = lambda function, which: AttributionTask(model=net, loss_func=function, checkpoints=which)
load = lambda d, b=500: DataLoader(d, batch_size=b)
def tracin(cosine, count, projected):
    m = TracInAttributor(task(single, states("full")[:count]), torch.ones(count) * 1e-3, cosine)
    if not projected: m.projector_kwargs = None
    return m.attribute(load(train), load(query))
def trak(count):
    m = TRAKAttributor(task(log_odds, states("half")[:count]), lambda p, d: torch.exp(-single(p, d)),
                       projector_kwargs={"proj_dim": 512, "device": "cpu"})
    m.cache(load(train))
    return m.attribute(load(query))
def influence(kind, **options):
    m = kind(task(loss, states("full")[:1]), **options)
    m.cache(load(train, 5000))
    return m.attribute(load(train), load(query))
def rps(strength):
    m = RPSAttributor(task(lambda a, b: ce(a, b), states("full")[:1]), "linear", True, strength)
    with torch.enable_grad(): m.cache(load(train)); return m.attribute(load(train), load(query)).detach()
jobs = {"graddot-512": lambda: tracin(False, 1, True), "graddot": lambda: tracin(False, 1, False),
    "gradcos-512": lambda: tracin(True, 1, True), "gradcos": lambda: tracin(True, 1, False),
    "tracin-10-512": lambda: tracin(False, 10, True), "tracin-10": lambda: tracin(False, 10, False)}
jobs |= {f"trak-{c}": lambda c=c: trak(c) for c in (1, 10, 50)}
jobs |= {f"representer-cos {s:g}": lambda s=s: rps(s) for s in json.loads(sys.argv[3])}
for d in json.loads(sys.argv[2]):
    jobs[f"influence_cg {d:g}"] = lambda d=d: influence(I.IFAttributorCG, regularization=d, max_iter=10)
    jobs[f"influence_arnoldi {d:g}"] = lambda d=d: influence(I.IFAttributorArnoldi, regularization=d, max_iter=50)
    jobs[f"influence_explicit {d:g}"] = lambda d=d: influence(I.IFAttributorExplicit, regularization=d)
jobs["influence_lissa"] = lambda: influence(I.IFAttributorLiSSA, recursion_depth=100, batch_size=100)
for name in [n for n in sys.argv[4:] if n in jobs]:
    try:
        with torch.no_grad(): value = lds(jobs[name]().detach(), truth)[0]
        print(json.dumps([name, float(value[~torch.isnan(value)].mean())]), flush=True)
    except Exception as error:
        print(json.dumps([name, repr(error)[:200]]), flush=True)
"""


def logits(params, x):
    return x @ params["kernel"] + params["bias"][None, :]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(m, batch_size, key, x, labels, members):
    """M networks at once; members [m, s] are the samples of each."""
    size = members.shape[1]
    steps = -(-size // batch_size)
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
            order = jnp.pad(jax.random.permutation(key, members), (0, steps * batch_size - size))
            real = jnp.arange(steps * batch_size) < size

            def step(params, batch):
                gradient = jax.grad(loss)(params, batch[0], batch[1].astype(jnp.float32))
                return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), None

            return jax.lax.scan(step, params, (order.reshape(steps, batch_size), real.reshape(steps, batch_size)))[
                0
            ], None

        return jax.lax.scan(epoch, params, jax.random.split(third, EPOCHS))[0]

    return jax.vmap(one)(keys, members)


def read(folder, split, count):
    images = data.read_idx_images(pathlib.Path(folder) / f"{split}-images-idx3-ubyte")[:count].reshape(count, -1)
    labels = data.read_idx_labels(pathlib.Path(folder) / f"{split}-labels-idx1-ubyte")[:count].astype(np.int32)
    return jnp.asarray((images.astype(np.float32) / 255 - 0.1307) / 0.3081), jnp.asarray(labels)


REPRESENTER = (1.0, 1e-1, 1e-2, 1e-3)


def normalized(params, x):
    """Features as dattri's representer points multiply them."""
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def methods():
    """Name -> (method, which networks are its checkpoints, how many)."""
    chosen = {
        "graddot-512": (baselines.graddot(projection=512), "full", 1),
        "graddot": (baselines.graddot(), "full", 1),
        "gradcos-512": (baselines.gradcos(projection=512), "full", 1),
        "gradcos": (baselines.gradcos(), "full", 1),
        "tracin-10-512": (baselines.tracin(projection=512), "full", 10),
        "tracin-10": (baselines.tracin(), "full", 10),
        "trak-1": (baselines.trak(projection=512), "half", 1),
        "trak-10": (baselines.trak(projection=512), "half", 10),
        "trak-50": (baselines.trak(projection=512), "half", 50),
        "similarity": (baselines.similarity(), "full", 1),
        "random": (baselines.random(), "full", 1),
    }
    for d in DAMPINGS:
        chosen[f"influence_cg {d:g}"] = (baselines.influence_cg(damping=d, max_iterations=50, vectors=128), "full", 1)
        chosen[f"influence_ekfac {d:g}"] = (baselines.influence_ekfac(damping=d, fisher="ggn"), "full", 1)
        arnoldi = baselines.influence_arnoldi(regularization=d, rank=50, krylov=50, tolerance=0.0)
        chosen[f"influence_arnoldi {d:g}"] = (arnoldi, "full", 1)
        chosen[f"influence_explicit {d:g}"] = (baselines.influence_explicit(damping=d), "full", 1)
    for depth, name in ((100, "influence_lissa"), (1000, "influence_lissa 1000")):
        lissa = baselines.influence_lissa(params="all", damping=0.0, scale=50.0, repeats=1, depth=depth, batch=100)
        chosen[name] = (lissa, "full", 1)
    chosen |= {f"representer {r:g}": (baselines.representer(r), "full", 1) for r in REPRESENTER}
    chosen |= {f"dualda {c:g}": (baselines.dualda(c), "full", 1) for c in (1e-5, 1e-3)}
    return chosen


def representer_cos(fitted, queries, targets):
    """The coefficients of a representer fit times cosines of the features, as dattri scores."""
    unit = normalized(None, fitted.points), normalized(None, queries)
    return fitted.coefficients.T[targets] * (unit[1] @ unit[0].T)


def run_peer(python, names, x, labels, queries, targets, networks, halves, outputs):
    """Name -> LDS by dattri on the same networks and ground truth."""
    arrays = {"x": x, "y": labels, "query": queries, "targets": targets, "halves": halves, "outputs": outputs}
    for which, params in networks.items():
        arrays |= {f"{which}/{name}": leaf[:50] for name, leaf in params.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "given.npz")
        np.savez(path, **arrays)
        command = [python, "-W", "ignore", "-c", PEER, path, json.dumps(DAMPINGS), json.dumps(REPRESENTER), *names]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout:
                if line.startswith("["):
                    yield json.loads(line)


def options_of(given):
    return {"subsets": given.subsets, "runs": given.runs, "batch": given.batch}


def kept(given):
    """Rows of an earlier run with the same options, by method."""
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    same = {k: v for k, v in found.items() if k != "rows"} == options_of(given)
    return {row["method"]: row for row in found["rows"]} if same else {}


def write(given, rows):
    """All rows so far: an interrupted run leaves what it has measured."""
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**options_of(given), "rows": list(rows.values())}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--runs", type=int, default=2, help="networks on every half, whose outputs are averaged")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peers", help="a Python with torch and dattri")
    parser.add_argument("--methods", nargs="+", default=["*"], help="shell patterns on the names")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/yardstick.json"))
    given = parser.parse_args()
    (x, labels), (queries, targets) = read(given.data, "train", 5000), read(given.data, "t10k", 500)
    halves = jax.vmap(lambda k: jax.random.permutation(k, 5000)[:2500])(
        jax.random.split(jax.random.key(0), given.subsets)
    )
    whole = jnp.tile(jnp.arange(5000)[None], (10, 1))
    outputs = 0
    for run in range(given.runs):
        half = train(given.subsets, given.batch, jax.random.key(100 + run), x, labels, halves)
        found = jax.vmap(lambda p: jax.nn.log_softmax(logits(p, queries))[jnp.arange(500), targets])(half)
        outputs = outputs + np.asarray(found, np.float64) / given.runs
        print(f"trained on halves, run {run}", file=sys.stderr, flush=True)
    networks = {"full": train(10, given.batch, jax.random.key(2), x, labels, whole), "half": half}
    subsets = np.zeros((given.subsets, 5000), bool)
    np.put_along_axis(subsets, np.asarray(halves), True, axis=1)
    rows = kept(given)
    wanted = lambda name: any(fnmatch.fnmatchcase(name, p) for p in given.methods)  # noqa: E731

    def note(name, side, value):
        row = rows.setdefault(name, {"method": name, "published": PUBLISHED.get(name.split()[0].removesuffix("-512"))})
        row[side] = value
        print(f"{name:<24} {side:<6} {value}", flush=True)
        write(given, rows)

    for name, (method, which, count) in methods().items():
        if not wanted(name) or "ours" in rows.get(name, {}):
            continue
        checkpoints = tuple(jax.tree.map(lambda a, i=i: a[i], networks[which]) for i in range(count))
        context = baselines.context(
            logits,
            # dattri takes the first network wherever it takes one.
            checkpoints[-1],
            x,
            labels,
            num_classes=10,
            features=lambda params, x: x,
            checkpoints=checkpoints,
            learning_rates=np.full(count, 1e-3),
        )
        fitted = method.fit(jax.random.key(3), context)
        scored = {name: method.scores(fitted, queries, targets)}
        if name.startswith("representer"):
            scored[name.replace("representer", "representer-cos")] = representer_cos(fitted, queries, targets)
        for label, scores in scored.items():
            note(label, "ours", float(np.nanmean(evaluation.lds(scores, subsets, outputs))))
    if given.peers:
        names = [n for n in rows if wanted(n) and "dattri" not in rows[n]]
        for name, value in run_peer(given.peers, names, x, labels, queries, targets, networks, halves, outputs):
            note(name, "dattri", value)


if __name__ == "__main__":
    main()
