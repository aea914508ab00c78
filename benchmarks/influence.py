"""Influence functions against dattri and kronfluence, in one run on one machine.

    python benchmarks/influence.py --data MNIST_FOLDER --peers PEERS_PYTHON --out benchmarks/results/influence.json

The paper's CNN is trained on the first `--train` images; every method explains `--queries` test images at their
labels. PEERS_PYTHON is a Python with torch, dattri and kronfluence; without it the peers are skipped. Each method runs
with the same options on both sides, one method at a time, each side with as many threads as it takes by default.
Times are those of fit and scores together: wall seconds, and seconds of the processor, which other processes disturb
less. Ours is run twice: the first run compiles. `cosine` is the least over the queries between rows of scores of the
two, where the method draws no random numbers.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import baselines, data, models
from dualxda_jax.models import training

DAMPING = 1e-2
METHODS = {
    # name: (parameters, options, whether the peer gives the same scores)
    "explicit": ("head", {"damping": DAMPING}, True),
    "cg": ("head", {"damping": DAMPING, "max_iterations": 20, "tolerance": 1e-12}, True),
    "lissa": ("head", {"damping": DAMPING, "depth": 100, "repeats": 1, "batch": 32, "scale": 10.0}, False),
    "arnoldi": ("all", {"rank": 16, "krylov": 20, "samples": 1000, "tolerance": 0.0}, False),
    "ekfac": ("all", {"damping": None, "fisher": "empirical"}, True),
}

PEER = r"""
import sys, time, tempfile, warnings, numpy as np, torch
warnings.simplefilter("ignore")
from torch.utils.data import DataLoader, TensorDataset
name, path, out, damping = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
f = np.load(path)
class CNN(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [1, 5, 10, 5]
        for i in range(3): setattr(self, f"conv_{i}", torch.nn.Conv2d(sizes[i], sizes[i + 1], 3))
        self.dense_0, self.dense_1 = torch.nn.Linear(5 * 22 * 22, 500), torch.nn.Linear(500, 100)
        self.head = torch.nn.Linear(100, 10)
    def forward(self, x):
        for i in range(3): x = torch.relu(getattr(self, f"conv_{i}")(x))
        return self.head(torch.relu(self.dense_1(torch.relu(self.dense_0(x.flatten(1))))))
model = CNN().eval()
model.load_state_dict({k[2:]: torch.tensor(f[k]) for k in f.files if k.startswith("w/")})
train = TensorDataset(torch.tensor(f["x"]), torch.tensor(f["y"]).long())
query = TensorDataset(torch.tensor(f["query"]), torch.tensor(f["targets"]).long())
def dattri():
    from dattri.algorithm import influence_function as I
    from dattri.task import AttributionTask
    def loss(params, data):
        x, y = data
        x, y = (x, y) if x.ndim == 4 else (x[None], y[None])
        # dattri's LiSSA hands the labels over as floats.
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y.long())
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    head = ["head.weight", "head.bias"]
    if name == "explicit": method = I.IFAttributorExplicit(task, head, regularization=damping)
    if name == "cg": method = I.IFAttributorCG(task, head, regularization=damping, max_iter=20)
    # dattri multiplies its damping by the scale.
    if name == "lissa": method = I.IFAttributorLiSSA(
        task, head, batch_size=32, num_repeat=1, recursion_depth=100, damping=damping / 10, scaling=10)
    if name == "arnoldi": method = I.IFAttributorArnoldi(
        task, precompute_data_ratio=0.2, proj_dim=16, max_iter=21, regularization=1e-3)
    whole = len(train) if name != "arnoldi" else len(train) // 5
    method.cache(DataLoader(train, whole))
    return method.attribute(DataLoader(train, 250), DataLoader(query, len(query))).T.detach().numpy()
def kronfluence():
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    class T(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        def compute_measurement(self, batch, model): return self.compute_train_loss(batch, model)
    with tempfile.TemporaryDirectory() as folder:
        a = Analyzer("bench", prepare_model(model, T()), T(), cpu=True, output_dir=folder, disable_tqdm=True)
        a.fit_all_factors("f", train, per_device_batch_size=250,
                          factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True))
        a.compute_pairwise_scores("s", "f", query, train, per_device_query_batch_size=len(query),
                                  per_device_train_batch_size=250, score_args=ScoreArguments(damping_factor=None))
        return a.load_pairwise_scores("s")["all_modules"].numpy()
start, cpu = time.perf_counter(), time.process_time()
scores = kronfluence() if name == "ekfac" else dattri()
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
np.savez(out, scores=scores, seconds=seconds, cpu=cpu, threads=torch.get_num_threads())
"""


def prepare(folder, n, q, steps):
    """Training set, queries and a trained network."""
    images = data.load_folder(folder)
    x, query = (np.asarray(p.images[:m], np.float32) / 255 for p, m in ((images.train, n), (images.test, q)))
    y, targets = images.train.labels[:n].astype(np.int32), images.test.labels[:q].astype(np.int32)
    module = models.SmallCNN()
    state = training.fit(jax.random.key(0), module, x, y, config=training.TrainConfig(steps=steps))
    model = models.from_linen(module, head=models.HEAD)
    logits = training.predict(model.logits, state.variables, query)
    print(f"test accuracy {training.accuracy(logits, targets):.3f}", file=sys.stderr)
    context = baselines.context(
        model.logits, state.variables, x, y, num_classes=10, features=model.features, head=models.HEAD
    )
    return context, jnp.asarray(query), jnp.asarray(targets)


def export(path, context, query, targets):
    """The same for torch: channels first, weights [outputs, inputs], the first dense layer's inputs in that order."""
    arrays = {"x": np.moveaxis(context.inputs, 3, 1), "y": context.labels, "query": np.moveaxis(query, 3, 1)}
    arrays["targets"] = np.asarray(targets)
    for name, layer in context.params["params"].items():
        kernel = np.asarray(layer["kernel"])
        if name == "dense_0":
            kernel = kernel.reshape(22, 22, 5, 500).transpose(2, 0, 1, 3).reshape(-1, 500)
        arrays[f"w/{name}.weight"] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        arrays[f"w/{name}.bias"] = np.asarray(layer["bias"])
    np.savez(path, **arrays)


def run_ours(method, context, query, targets):
    """(wall, processor) seconds of fit, and of scores; and the scores."""
    marks = [(time.perf_counter(), time.process_time())]
    fitted = jax.block_until_ready(method.fit(jax.random.key(0), context))
    marks.append((time.perf_counter(), time.process_time()))
    scores = jax.block_until_ready(method.scores(fitted, query, targets))
    marks.append((time.perf_counter(), time.process_time()))
    fit, score = ([b - a for a, b in zip(*pair, strict=True)] for pair in (marks[:2], marks[1:]))
    return fit, score, np.asarray(scores)


def measure(name, problem, peers, path):
    params, options, same = METHODS[name]
    method = baselines.METHODS[f"influence_{name}"](params=params, **options)
    first = run_ours(method, *problem)
    fit, score, scores = run_ours(method, *problem)
    row = {"method": name, "params": params, "first_seconds": first[0][0] + first[1][0]}
    row |= {"fit_seconds": fit[0], "scores_seconds": score[0], "seconds": fit[0] + score[0], "cpu": fit[1] + score[1]}
    if peers:
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "peer.npz")
            command = [peers, "-W", "ignore", "-c", PEER, name, path, out, str(DAMPING)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                return row | {"peer_error": done.stderr.strip().splitlines()[-1]}
            peer = np.load(out)
            row["peer"] = "kronfluence" if name == "ekfac" else "dattri"
            row |= {"peer_seconds": float(peer["seconds"]), "peer_cpu": float(peer["cpu"])}
            row |= {"speedup": row["peer_seconds"] / row["seconds"], "cpu_ratio": row["peer_cpu"] / row["cpu"]}
            theirs = peer["scores"].astype(np.float64)
            norms = np.linalg.norm(scores, axis=1) * np.linalg.norm(theirs, axis=1)
            if same:
                row["cosine"] = float(np.min(np.sum(scores * theirs, axis=1) / norms))
    return row


def table(rows):
    columns = ["method", "params", "peer", "first_seconds", "fit_seconds", "scores_seconds", "seconds", "cpu"]
    columns += ["peer_seconds", "peer_cpu", "speedup", "cpu_ratio", "cosine"]
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(r.get(c, "-")) for c in columns) + " |" for r in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with MNIST as published")
    parser.add_argument("--peers", help="a Python with torch, dattri and kronfluence")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("influence.json"))
    given = parser.parse_args()
    problem = prepare(given.data, given.train, given.queries, given.steps)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "problem.npz")
        export(path, *problem)
        for name in given.methods:
            rows.append(measure(name, problem, given.peers, path))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {
        "device": str(jax.devices()[0]),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    sizes = {"train": given.train, "queries": given.queries}
    given.out.write_text(json.dumps({"machine": machine, **sizes, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
