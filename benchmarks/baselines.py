"""The methods that DualDA is compared with against torch packages, in one run on one machine.

    python benchmarks/baselines.py --data FOLDER [--peers PEER_PYTHON] [--train 5000] [--queries 100] [--peer-train N]

FOLDER holds MNIST as published (IDX). PEER_PYTHON is a Python with torch, captum, dattri and traker (see
tests/golden/make_gradient_methods.py); without it the peers are skipped. Both sides explain the same network with the
same weights: the paper's small CNN, all 1.3 million parameters. Seconds are those of fit and scores together, which is
what all packages can be asked for: for ours of the second call (the first compiles, and is reported beside), for peers
of the only call. Peers that would take hours can be given fewer training samples by --peer-train; their seconds are
then multiplied by train / peer-train, and the table says so (all of them are linear in it).

--double N compares instead of timing: rows of scores for N training samples and 40 queries, ours in float32 and the
peers' in float32 and float64. Where the network is nearly certain, softmax less one-hot leaves few digits in float32.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import baselines, data, models

PEER = """
import sys, time, tempfile, numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
given, name, out, dtype = np.load(sys.argv[1]), sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4])
t = lambda a: torch.tensor(a, dtype=dtype)
net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 10, 3), nn.ReLU(), nn.Conv2d(10, 5, 3), nn.ReLU(),
    nn.Flatten(), nn.Linear(2420, 500), nn.ReLU(), nn.Linear(500, 100), nn.ReLU(), nn.Linear(100, 10)).to(dtype)
places = {"conv_0": 0, "conv_1": 2, "conv_2": 4, "dense_0": 7, "dense_1": 9, "head": 11}
for layer, i in places.items():
    net[i].weight.data, net[i].bias.data = t(given[layer + "/kernel"]), t(given[layer + "/bias"])
net.eval(); n = given["n"].item()
train = TensorDataset(t(given["x"])[:n], torch.tensor(given["y"])[:n].long())
query = TensorDataset(t(given["xq"]), torch.tensor(given["yq"]).long())
state = {k: v.clone() for k, v in net.state_dict().items()}
def loss(params, pair):
    out = torch.func.functional_call(net, params, pair[0].unsqueeze(0))
    return nn.functional.cross_entropy(out, pair[1].unsqueeze(0))
def dattri(cosine, projector):
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    task = AttributionTask(model=net, loss_func=loss, checkpoints=[state])
    method = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=cosine, projector_kwargs=projector)
    if projector is None: method.projector_kwargs = None
    loaders = [DataLoader(d, batch_size=b) for d, b in ((train, 50), (query, len(query)))]
    with torch.no_grad(): return method.attribute(*loaders).T
def captum():
    from captum.influence import TracInCP
    method = TracInCP(net, train, ["0"], lambda m, c: 1.0, loss_fn=nn.CrossEntropyLoss(reduction="sum"),
                      batch_size=50, sample_wise_grads_per_batch=True)
    return method.influence(query.tensors).detach()
def traker():
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType
    p = sum(a.numel() for a in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        projector = BasicProjector(p, 2048, 0, ProjectionType.rademacher, "cpu", block_size=128)
        method = TRAKer(net, "image_classification", n, folder, device="cpu", projector=projector, proj_dim=2048,
                        use_half_precision=False, lambda_reg=1.0 if n < 4096 else 0.0)
        method.load_checkpoint(state, model_id=0)
        for x, y in DataLoader(train, batch_size=250): method.featurize(batch=[x, y], num_samples=len(x))
        method.finalize_features()
        method.start_scoring_checkpoint("q", state, 0, num_targets=len(query))
        method.score(batch=list(query.tensors), num_samples=len(query))
        return torch.tensor(np.array(method.finalize_scores("q")).T)
peers = {"graddot/dattri": lambda: dattri(False, None), "gradcos/dattri": lambda: dattri(True, None),
    "tracin-128/dattri": lambda: dattri(False, {"proj_dim": 128, "proj_max_batch_size": 32, "device": "cpu"}),
    "graddot/captum": captum, "trak-2048/traker": traker}
start = time.perf_counter(); scores = peers[name](); seconds = time.perf_counter() - start
np.savez(out, seconds=seconds, scores=scores.numpy())
"""

METHODS = {
    "graddot": lambda: baselines.graddot(),
    "gradcos": lambda: baselines.gradcos(),
    "tracin-128": lambda: baselines.tracin(projection=128),
    "trak-2048": lambda: baselines.trak(projection=2048),
    "representer": lambda: baselines.representer(),
    "dualda": lambda: baselines.dualda(),
    "similarity": lambda: baselines.similarity(),
}
PEERS = ["graddot/dattri", "gradcos/dattri", "tracin-128/dattri", "graddot/captum", "trak-2048/traker"]


def problem(folder, n, q, seed):
    """The trained CNN, its context and queries; the network is trained on the samples that are attributed to."""
    images = data.read_idx_images(pathlib.Path(folder) / "train-images-idx3-ubyte")
    labels = data.read_idx_labels(pathlib.Path(folder) / "train-labels-idx1-ubyte").astype(np.int32)
    x = np.asarray(data.to_float(images.reshape(-1, 28, 28, 1)[: n + q]))
    module = models.SmallCNN()
    state = models.training.fit(jax.random.key(seed), module, x[:n], labels[:n])
    model = models.from_linen(module, head=models.HEAD)
    context = baselines.context(
        model.logits, state.variables, x[:n], labels[:n], num_classes=10, features=model.features, head=model.head
    )
    queries = jnp.asarray(x[n:])
    return context, queries, jax.jit(model.logits)(state.variables, queries).argmax(1).astype(jnp.int32)


def run_ours(method, context, x, targets):
    """(seconds of the first call, of the second, scores)."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        scores = jax.block_until_ready(method.scores(method.fit(jax.random.key(0), context), x, targets))
        times.append(time.perf_counter() - start)
    return *times, np.asarray(scores)


def run_peer(python, name, context, x, targets, n, dtype="float32"):
    """(seconds, scores) of a torch package on the first n training samples."""
    arrays = {"n": n, "y": context.labels, "yq": targets}
    arrays |= {key: np.asarray(a).transpose(0, 3, 1, 2) for key, a in (("x", context.inputs), ("xq", x))}
    for layer, leaves in context.params["params"].items():
        kernel = np.asarray(leaves["kernel"])
        if layer == "dense_0":  # torch flattens channels first
            kernel = kernel.reshape(22, 22, 5, 500).transpose(2, 0, 1, 3).reshape(2420, 500)
        kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        arrays |= {f"{layer}/kernel": kernel, f"{layer}/bias": leaves["bias"]}
    with tempfile.TemporaryDirectory() as folder:
        given, out = (os.path.join(folder, f) for f in ("given.npz", "out.npz"))
        np.savez(given, **arrays)
        subprocess.run(
            [python, "-W", "ignore", "-c", PEER, given, name, out, dtype], check=True, stderr=subprocess.DEVNULL
        )
        result = np.load(out)
        return float(result["seconds"]), result["scores"]


def cosines(a, b):
    """(median, least) over queries."""
    values = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.median(values)), float(values.min())


def table(rows):
    columns = [
        "method",
        "seconds",
        "first_seconds",
        "peer",
        "peer_seconds",
        "peer_train",
        "ratio",
        "median_cosine",
        "least_cosine",
    ]
    show = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(r.get(c, "-")) for c in columns) + " |" for r in rows])


def write(given, rows):
    """All rows so far: an interrupted run leaves what it has measured."""
    print(json.dumps(rows[-1]), flush=True)
    machine = {"device": str(jax.devices()[0]), "cores": os.cpu_count(), "load": os.getloadavg()}
    machine |= {"python": platform.python_version(), "jax": jax.__version__}
    options = {"train": given.train, "queries": given.queries}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine, "options": options, "rows": rows}, indent=1) + "\n")


def compare_precisions(given, context, x, targets):
    """Cosines of rows of scores, ours in float32 against the peers' in both precisions."""
    n, x, targets = given.double, x[:40], targets[:40]
    few = baselines.context(context.logits, context.params, context.inputs[:n], context.labels[:n], num_classes=10)
    rows = []
    for peer in ("graddot/dattri", "gradcos/dattri", "graddot/captum"):
        name, package = peer.split("/")
        *_, ours = run_ours(METHODS[name](), few, x, targets)
        theirs = {d: run_peer(given.peers, peer, context, x, targets, n, d)[1] for d in ("float32", "float64")}
        row = {"method": name, "peer": package, "train": n, "queries": len(x)}
        row["least_cosine_ours_to_their_float64"] = cosines(ours, theirs["float64"])[1]
        row["least_cosine_their_float32_to_their_float64"] = cosines(theirs["float32"], theirs["float64"])[1]
        rows.append(row)
        write(given, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peers", help="a Python with torch, captum, dattri and traker")
    parser.add_argument("--peer-names", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--peer-train", type=int, help="training samples that peers get; by default all")
    parser.add_argument("--double", type=int, help="compare precisions on so many training samples, and time nothing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/baselines.json"))
    given = parser.parse_args()
    context, x, targets = problem(given.data, given.train, given.queries, 0)
    if given.double:
        return compare_precisions(given, context, x, targets)
    rows, scores = [], {}
    for name, method in METHODS.items():
        first, seconds, scores[name] = run_ours(method(), context, x, targets)
        rows.append({"method": name, "seconds": seconds, "first_seconds": first})
        write(given, rows)
    for peer in given.peer_names if given.peers else []:
        name, package = peer.split("/")
        n = min(given.peer_train or given.train, given.train)
        seconds, theirs = run_peer(given.peers, peer, context, x, targets, n)
        ours = next(r for r in rows if r["method"] == name)
        scaled = seconds * given.train / n
        row = {"method": name, "seconds": ours["seconds"], "first_seconds": ours["first_seconds"], "peer": package}
        row |= {"peer_seconds": scaled, "peer_train": n, "ratio": scaled / ours["seconds"]}
        if not name.startswith(("tracin", "trak")):  # random projections differ
            row["median_cosine"], row["least_cosine"] = cosines(scores[name][:, :n], theirs)
        rows.append(row)
        write(given, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
