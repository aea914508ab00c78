"""The dual solver against LIBLINEAR, in one run on one machine.

    python benchmarks/solver.py --peer PEER_PYTHON --data mnist=FILE.npz --costs 1e-5 1e-3 1e-1 --out solver.json

FILE.npz holds F [n, d] and Y [n]. PEER_PYTHON is a Python with `sklearn_dual` (see
tests/golden/make_liblinear.py); without it the peer is skipped and ours solves to a gap of 1e-5. With it, the peer runs
at its default tolerance, its gap is computed from its dual variables, and ours must reach that gap, but not less than
1e-5. Ours is compiled before it is timed (the first call is reported apart) and ends only when its arrays are ready.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import numpy as np

from dualxda_jax import svm

PEER = """
import sys, time, numpy as np
from sklearn_dual.svm import LinearSVC
data = np.load(sys.argv[1]); features, labels = data["F"].astype(np.float64), data["Y"]
model = LinearSVC(multi_class="crammer_singer", C=float(sys.argv[2]), fit_intercept=False, random_state=0)
start = time.perf_counter(); model.fit(features, labels); seconds = time.perf_counter() - start
np.savez(sys.argv[3], alpha=model.alpha_.T, seconds=seconds)
"""


def run_peer(python, path, cost, repeats):
    """LIBLINEAR's median seconds and its dual variables."""
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "peer.npz")
            subprocess.run([python, "-W", "ignore", "-c", PEER, path, repr(cost), out], check=True)
            result = np.load(out)
            times.append(float(result["seconds"]))
            alpha = result["alpha"]
    return statistics.median(times), alpha


def relative_gap(features, labels, alpha, k, cost):
    primal, dual = svm.objectives(features, labels, alpha, num_classes=k, cost=cost)
    return float((primal - dual) / primal)


def run_ours(features, labels, k, cost, tolerance, repeats):
    """First and median seconds, and the solution."""
    config = svm.SolverConfig(tolerance=tolerance)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        solution = jax.block_until_ready(svm.solve(features, labels, num_classes=k, cost=cost, config=config))
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:]), solution


def measure(name, path, cost, peer, repeats, dtype):
    data = np.load(path)
    features, labels = jax.device_put(data["F"].astype(dtype)), data["Y"].astype(np.int32)
    n, d = features.shape
    k = int(labels.max()) + 1
    row = {"problem": name, "n": n, "d": d, "k": k, "dtype": dtype, "cost": cost}
    tolerance = 1e-5
    if peer:
        row["peer_seconds"], alpha = run_peer(peer, path, cost, repeats)
        row["peer_gap"] = relative_gap(data["F"], labels, alpha, k, cost)
        tolerance = max(row["peer_gap"], 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svm.NotConvergedWarning)
        first, seconds, solution = run_ours(features, labels, k, cost, tolerance, repeats)
    row |= {"tolerance": tolerance, "first_seconds": first, "seconds": seconds, "epochs": int(solution.info.epochs)}
    row |= {"gap": relative_gap(data["F"], labels, np.asarray(solution.coefficients), k, cost)}
    row |= {"converged": bool(solution.info.converged)}
    if peer:
        row["speedup"] = row["peer_seconds"] / seconds
    return row


def table(rows):
    columns = [
        "problem",
        "n",
        "d",
        "k",
        "cost",
        "peer_seconds",
        "peer_gap",
        "seconds",
        "first_seconds",
        "gap",
        "epochs",
    ]
    columns += ["converged", "speedup"]
    show = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(r.get(c, "-")) for c in columns) + " |" for r in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with sklearn_dual")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE.npz")
    parser.add_argument("--costs", nargs="+", type=float, default=[1e-5, 1e-3, 1e-1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="the peer's is float64")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("solver.json"))
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", given.dtype == "float64")
    rows = []
    for item in given.data:
        name, path = item.split("=", 1)
        for cost in given.costs:
            rows.append(measure(name, path, cost, given.peer, given.repeats, given.dtype))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    speedups = [r["speedup"] for r in rows if "speedup" in r]
    machine = {
        "device": str(jax.devices()[0]),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    summary = {"machine": machine, "rows": rows}
    print(table(rows))
    if speedups:
        summary["geometric_mean_speedup"] = statistics.geometric_mean(speedups)
        print(f"\ngeometric mean {summary['geometric_mean_speedup']:.2f}x, least {min(speedups):.2f}x")
    given.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
