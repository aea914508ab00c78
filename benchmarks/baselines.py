"""The methods that DualDA is compared with against torch packages, in one run on one machine.

    python benchmarks/baselines.py --data FOLDER [--peers PEER_PYTHON] [--methods NAME ...] [--network FOLDER]

FOLDER holds MNIST as published (IDX). PEER_PYTHON is a Python with torch, captum, dattri, kronfluence and traker;
without it the peers are skipped. Both sides explain the same network with the same weights: the paper's small CNN, all
1.3 million parameters unless the name says "head". Rows of an earlier run with the same options are kept in `--out`.

Seconds are those of fit and scores together, which is what all packages can be asked for. Ours: the median of repeats
after the first call, which compiles and is reported beside. Peers that finish get all samples, in turns with ours, and
their median. Those that would take hours get two smaller numbers of samples, each in a single batch; the line through
the two times is followed to all samples. That is less than they would take: at full size several batches are needed,
and gradients of the queries and random matrices are computed anew for each of them. Where even two take too long it is
the time of one small number, a bound from below.

--double N compares instead of timing: rows of scores for N training samples and 40 queries, ours in float32 and the
peers' in float32 and float64. Where the network is nearly certain, softmax less one-hot leaves few digits in float32.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import baselines, checkpoint, data, models

HEAD = {"params": "head"}
DAMPED = {**HEAD, "damping": 1e-2}
METHODS = {
    "similarity": lambda: baselines.similarity(),
    "graddot": lambda: baselines.graddot(),
    "gradcos": lambda: baselines.gradcos(),
    "tracin-128": lambda: baselines.tracin(projection=128),
    "tracin-head": lambda: baselines.on_features(baselines.tracin(**HEAD)),
    "trak-2048": lambda: baselines.trak(projection=2048),
    "representer": lambda: baselines.representer(),
    "explicit-head": lambda: baselines.on_features(baselines.influence_explicit(**DAMPED)),
    "cg-head": lambda: baselines.on_features(
        baselines.influence_cg(**DAMPED, max_iterations=20, tolerance=1e-12, vectors=100)
    ),
    "lissa-head": lambda: baselines.on_features(
        baselines.influence_lissa(**DAMPED, depth=100, repeats=1, batch=32, scale=10.0)
    ),
    "arnoldi-16": lambda: baselines.influence_arnoldi(rank=16, krylov=20, samples=1000, tolerance=0.0),
    "ekfac": lambda: baselines.influence_ekfac(damping=None, fisher="empirical"),
    "dualda": lambda: baselines.dualda(),
}
PEERS = {
    # name: training samples where all of them would take too long; a single number gives a bound from below
    "similarity/captum": None,
    "graddot/dattri": (32, 96),
    "graddot/captum": (250, 500),
    "gradcos/dattri": (32, 96),
    "tracin-128/dattri": (32, 96),
    "tracin-head/captum": None,
    "trak-2048/traker": (32,),
    "trak-2048/dattri": (32, 96),
    "representer/dattri": (500, 1000),
    "explicit-head/dattri": None,
    "explicit-head/captum": None,
    "cg-head/dattri": None,
    "lissa-head/dattri": None,
    "arnoldi-16/dattri": (50, 100),
    "arnoldi-16/captum": (250, 500),
    "ekfac/kronfluence": (250, 500),
}
# The others draw random numbers, or stop the refit elsewhere.
SAME = ("similarity", "graddot", "gradcos", "tracin-head", "explicit-head", "cg-head", "ekfac")


def problem(folder, n, q, kept):
    """The trained CNN, its context and queries; the network is trained on the samples that are attributed to."""
    images = data.read_idx_images(pathlib.Path(folder) / "train-images-idx3-ubyte")
    labels = data.read_idx_labels(pathlib.Path(folder) / "train-labels-idx1-ubyte").astype(np.int32)
    x = np.asarray(data.to_float(images.reshape(-1, 28, 28, 1)[: n + q]))
    module = models.SmallCNN()
    if kept is None or not kept.exists():
        variables = models.training.fit(jax.random.key(0), module, x[:n], labels[:n]).variables
        if kept is not None:
            checkpoint.save(kept, variables)
    else:
        variables = jax.tree.map(jnp.asarray, checkpoint.load(kept))
    model = models.from_linen(module, head=models.HEAD)
    context = baselines.context(
        model.logits, variables, x[:n], labels[:n], num_classes=10, features=model.features, head=model.head
    )
    queries = jnp.asarray(x[n:])
    return context, queries, jax.jit(model.logits)(variables, queries).argmax(1).astype(jnp.int32)


def export(path, context, query, targets):
    """The same for torch: channels first, weights [outputs, inputs], the first dense layer's inputs in that order."""
    arrays = {"x": np.moveaxis(context.inputs, 3, 1), "y": context.labels, "xq": np.moveaxis(query, 3, 1)}
    arrays["yq"] = targets
    for name, layer in context.params["params"].items():
        kernel = np.asarray(layer["kernel"])
        if name == "dense_0":
            kernel = kernel.reshape(22, 22, 5, 500).transpose(2, 0, 1, 3).reshape(-1, 500)
        arrays[f"w/{name}.weight"] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        arrays[f"w/{name}.bias"] = np.asarray(layer["bias"])
    np.savez(path, **arrays)


def run_ours(method, context, x, targets):
    """Seconds and scores."""
    start = time.perf_counter()
    scores = jax.block_until_ready(method.scores(method.fit(jax.random.key(0), context), x, targets))
    return time.perf_counter() - start, np.asarray(scores)


class Peer:
    """A torch package in a process of its own, which waits for its turns."""

    def __init__(self, python, name, given, dtype="float32"):
        self.out = f"{given}.{name.replace('/', '-')}.npz"
        script = pathlib.Path(__file__).with_name("baselines_peers.py")
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(script), given, name, self.out, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, n, limit):
        """{"seconds", "cpu"} of the first n samples, or {"error"}."""
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        lines = (line for line in self.process.stdout if line.startswith('{"'))
        found = json.loads(next(lines, f'{{"error": "ended, or cut off after {limit} s, at {n} samples"}}'))
        timer.cancel()
        return found

    def scores(self):
        return np.load(self.out)["scores"]

    def close(self):
        self.process.kill()
        self.process.wait()


def cosines(a, b):
    """(median, least) over queries."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    values = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.median(values)), float(values.min())


def measure(name, package, given, exported, context, x, targets):
    """One row: ours, and in turns with it the peer."""
    method = METHODS[name]()
    first, scores = run_ours(method, context, x, targets)
    row = {"method": name, "first_seconds": first, "times": []}
    ours = lambda: row["times"].append(run_ours(method, context, x, targets)[0])  # noqa: E731
    if package is None:
        for _ in range(given.repeats):
            ours()
        return row | {"seconds": statistics.median(row["times"])}
    sizes = PEERS[f"{name}/{package}"] or [given.train] * given.repeats
    peer, found = Peer(given.peers, f"{name}/{package}", exported), []
    for n in sizes:
        ours()
        found.append(peer.run(n, given.limit))
        if "error" in found[-1]:
            break
    ours()
    row |= {"seconds": statistics.median(row["times"]), "peer": package, "peer_train": list(sizes)}
    errors = [run["error"] for run in found if "error" in run]
    if errors:
        row["peer_error"] = errors[0]
    else:
        times = row["peer_times"] = [run["seconds"] for run in found]
        whole = statistics.median(times)
        if PEERS[f"{name}/{package}"] and len(sizes) == 2:
            slope = (times[1] - times[0]) / (sizes[1] - sizes[0])
            whole = times[1] + slope * (given.train - sizes[1])
        row |= {"peer_seconds": whole, "ratio": whole / row["seconds"]}
        if (name in SAME and sizes[-1] == given.train) or name.startswith(("grad", "tracin-head")):
            row["median_cosine"], row["least_cosine"] = cosines(scores[:, : sizes[-1]], peer.scores())
    peer.close()
    return row


def options_of(given):
    return {"train": given.train, "queries": given.queries}


def kept_rows(given):
    """Rows of an earlier run with the same options, by method and peer."""
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    rows = found["rows"] if found.get("options") == options_of(given) else []
    return {(row["method"], row.get("peer")): row for row in rows}


def write(given, rows):
    """All rows so far: an interrupted run leaves what it has measured."""
    machine = {"device": str(jax.devices()[0]), "cores": os.cpu_count()}
    machine |= {"python": platform.python_version(), "jax": jax.__version__}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    order = [(name, peer) for name in METHODS for peer in (None, *(p.split("/")[1] for p in PEERS))]
    some = [rows[key] for key in dict.fromkeys(order) if key in rows]
    given.out.write_text(json.dumps({"machine": machine, "options": options_of(given), "rows": some}, indent=1) + "\n")


def table(rows):
    columns = ["method", "seconds", "first_seconds", "peer", "peer_train", "peer_seconds", "ratio", "least_cosine"]
    show = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(r.get(c, "-")) for c in columns) + " |" for r in rows])


def compare_precisions(given, exported, context, x, targets):
    """Cosines of rows of scores, ours in float32 against the peers' in both precisions."""
    n = given.double
    few = baselines.context(context.logits, context.params, context.inputs[:n], context.labels[:n], num_classes=10)
    for name in ("graddot/dattri", "gradcos/dattri", "graddot/captum"):
        _, ours = run_ours(METHODS[name.split("/")[0]](), few, x, targets)
        theirs = {}
        for dtype in ("float32", "float64"):
            peer = Peer(given.peers, name, exported, dtype)
            peer.run(n, given.limit)
            theirs[dtype] = peer.scores()
            peer.close()
        row = {"method": name, "train": n, "queries": len(x)}
        row["least_cosine_ours_to_their_float64"] = cosines(ours, theirs["float64"])[1]
        row["least_cosine_their_float32_to_their_float64"] = cosines(theirs["float32"], theirs["float64"])[1]
        print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peers", help="a Python with torch, captum, dattri, kronfluence and traker")
    parser.add_argument("--methods", nargs="+", default=[*PEERS, "dualda"], help='as "graddot/dattri", or "graddot"')
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run of a peer is cut off")
    parser.add_argument("--network", type=pathlib.Path, help="where the trained network is kept between runs")
    parser.add_argument("--double", type=int, help="compare precisions on so many training samples, and time nothing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/baselines.json"))
    given = parser.parse_args()
    context, x, targets = problem(given.data, given.train, given.queries, given.network)
    with tempfile.TemporaryDirectory() as folder:
        exported = os.path.join(folder, "given.npz")
        if given.double:
            export(exported, context, x[:40], targets[:40])
            return compare_precisions(given, exported, context, x[:40], targets[:40])
        export(exported, context, x, targets)
        rows = kept_rows(given)
        for pair in given.methods:
            name, _, package = pair.partition("/")
            row = measure(name, package if given.peers and package else None, given, exported, context, x, targets)
            rows[name, row.get("peer")] = row
            write(given, rows)
            print(table([row]).splitlines()[-1], flush=True)
    print(table(rows.values()))


if __name__ == "__main__":
    main()
