"""The first call of the dual solver in a new process, beside LIBLINEAR's first and only call.

    python benchmarks/cold.py --peer PEER_PYTHON --data mnist=FILE.npz --costs 1e-5 1e-3 1e-1 --out cold.json

FILE.npz holds F [n, d] and Y [n]. PEER_PYTHON is a Python with `sklearn_dual` (see tests/golden/make_liblinear.py);
without it the peer is skipped. Every problem and cost is measured in three new processes without a compilation cache:

- eager: `svm.solve` twice, then calls with one argument changed, each its own count of compiled programs;
- jitted: `jax.jit` of `svm.solve` twice, with features, labels and cost as arguments;
- the peer: `fit` once, in float64.

Imports, reading the file and placing the arrays on the device come before the clock starts. As in `solver.py`, the
tolerance is the gap that the peer reached, but not below 1e-5; without a peer it is 1e-5. Gaps are computed
in float64 by NumPy from the coefficients that came back.

Compilation is counted by jax's own monitoring events. Its processor seconds are those that pass between the end of a
program's lowering and the end of its compilation, over all threads. Trace seconds count nested traces twice.
"""

import argparse
import dataclasses
import inspect
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import numpy as np

import dualxda_jax
from dualxda_jax import svm

TRACE = "/jax/core/compile/jaxpr_trace_duration"
LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"
COMPILE_TIME = "compile_processor_seconds"

PEER = """
import json, sys, time, numpy as np
from sklearn_dual.svm import LinearSVC
spec = json.loads(sys.argv[1])
data = np.load(spec["path"]); features, labels = data["F"].astype(np.float64), data["Y"]
model = LinearSVC(multi_class="crammer_singer", C=spec["cost"], fit_intercept=False, random_state=0)
clock, processor = time.perf_counter(), time.process_time()
model.fit(features, labels)
first = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
np.save(spec["coefficients"], model.alpha_.T)
print(json.dumps({"first": first}))
"""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a first call may cost.

    Attributes:
        eager_programs: programs compiled by the first eager call.
        eager_processor_seconds: processor seconds of compiling them.
        jit_programs: programs compiled by the first jitted call.
        jit_processor_seconds: processor seconds of compiling it.
        other_programs: programs compiled by a call with one argument changed.
        ratio: the first eager call's clock seconds over the peer's, on the problems of the next entry.
        ratio_problems: the problems whose first call may take `ratio` times as long as the peer's.
        wide_problem: the problem whose features are wide enough that the first call has to be faster than the peer.
        wide_costs: the costs at which it has to be.
    """

    eager_programs: int = 4
    eager_processor_seconds: float = 4.0
    jit_programs: int = 1
    jit_processor_seconds: float = 6.0
    other_programs: int = 0
    ratio: float = 2.0
    ratio_problems: tuple[str, ...] = ("mnist", "cifar_like")
    wide_problem: str = "awa_like"
    wide_costs: tuple[float, ...] = (1e-5, 1e-3)

    def ratio_of(self, problem: str, cost: float) -> float | None:
        """The largest ratio to the peer that is allowed; None where there is no target."""
        if problem == self.wide_problem and cost in self.wide_costs:
            return 1.0
        return self.ratio if problem in self.ratio_problems else None


class Compilation:
    """Counts and durations of jax's compilation events since the last `read`."""

    def __init__(self):
        self._clear()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _clear(self):
        self._seconds = {TRACE: [], LOWER: [], COMPILE: []}
        self._processor = 0.0
        self._lowered = None  # processor time at the end of the latest lowering

    def _listen(self, event, seconds, **_):
        if event not in self._seconds:
            return
        self._seconds[event].append(seconds)
        if event == LOWER:
            self._lowered = time.process_time()
        elif event == COMPILE:
            # A program whose lowering was cached has no event to start from: its clock seconds stand in.
            self._processor += seconds if self._lowered is None else time.process_time() - self._lowered
            self._lowered = None

    def read(self):
        """The figures so far, which start again from zero."""
        figures = {
            "programs": len(self._seconds[COMPILE]),
            "compile_seconds": sum(self._seconds[COMPILE]),
            COMPILE_TIME: self._processor,
            "lowerings": len(self._seconds[LOWER]),
            "lower_seconds": sum(self._seconds[LOWER]),
            "traces": len(self._seconds[TRACE]),
            "trace_seconds": sum(self._seconds[TRACE]),
        }
        self._clear()
        return figures


def timed(compilation, call):
    """The figures of one call, which end when its arrays are ready, and what it returned."""
    compilation.read()
    clock, processor = time.perf_counter(), time.process_time()
    answer = jax.block_until_ready(call())
    figures = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return figures | compilation.read(), answer


def run_variations(compilation, features, labels, options):
    """Programs compiled by calls that differ from the first in one argument."""
    config = options["config"]
    changed = {
        "cost": {"cost": 0.5 * options["cost"]},
        "tolerance": {"config": dataclasses.replace(config, tolerance=2.0 * config.tolerance)},
        "max_epochs": {"config": dataclasses.replace(config, max_epochs=config.max_epochs + 1)},
    }
    if "smoothing" in inspect.signature(svm.solve).parameters:
        changed["smoothing"] = {"smoothing": 1e-2}
    found = {}
    for name, change in changed.items():
        found[name], _ = timed(compilation, lambda change=change: svm.solve(features, labels, **options | change))
    # Cut by NumPy: slicing on the device would compile a program of its own.
    fewer = jax.device_put(np.asarray(features)[:-1])
    found["rows"], _ = timed(compilation, lambda: svm.solve(fewer, labels[:-1], **options))
    return found


def run_worker(spec):
    """Measure one problem in this process, eagerly or jitted."""
    jax.config.update("jax_enable_x64", spec["dtype"] == "float64")
    jax.config.update("jax_enable_compilation_cache", False)
    warnings.simplefilter("ignore", svm.NotConvergedWarning)
    data = np.load(spec["path"])
    features, labels = (
        jax.block_until_ready(jax.device_put(data["F"].astype(spec["dtype"]))),
        data["Y"].astype(np.int32),
    )
    options = {"num_classes": int(labels.max()) + 1, "cost": spec["cost"]}
    options["config"] = svm.SolverConfig(tolerance=spec["tolerance"])
    compilation = Compilation()
    if spec["mode"] == "jit":
        labels = jax.block_until_ready(jax.device_put(labels))
        fixed = {name: value for name, value in options.items() if name != "cost"}
        solve = jax.jit(lambda features, labels, cost: svm.solve(features, labels, cost=cost, **fixed))
        call = lambda: solve(features, labels, spec["cost"])  # noqa: E731
    else:
        call = lambda: svm.solve(features, labels, **options)  # noqa: E731
    row = {}
    row["first"], solution = timed(compilation, call)
    row["second"], _ = timed(compilation, call)
    np.save(spec["coefficients"], np.asarray(solution.coefficients))
    row |= {"epochs": int(solution.info.epochs), "converged": bool(solution.info.converged)}
    row |= {"device": str(jax.devices()[0]), "stated_gap": float(solution.info.gap)}
    if spec["mode"] == "eager":
        row["variations"] = run_variations(compilation, features, labels, options)
    print(json.dumps(row))


def relative_gap(features, labels, alpha, cost):
    """(primal - dual) / primal in float64, by NumPy."""
    rows = np.arange(len(labels))
    weights = alpha.T @ features
    margins = features @ weights.T + 1.0
    margins[rows, labels] -= 1.0
    norm = 0.5 * np.sum(weights**2)
    primal = norm + cost * np.sum(margins.max(axis=1) - margins[rows, labels])
    dual = -norm - (alpha.sum() - alpha[rows, labels].sum())
    return float((primal - dual) / primal)


def run_process(command, spec, timeout):
    """What a new process measured, with the load before it and the true gap of its coefficients."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        spec = spec | {"coefficients": os.path.join(folder, "coefficients.npy")}
        command = [*command, json.dumps(spec)]
        try:
            done = subprocess.run(command, check=True, env=environment, timeout=timeout, stdout=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout:g} s", "load": load}
        except subprocess.CalledProcessError as error:
            return {"failed": f"exit status {error.returncode}", "load": load}
        row = json.loads(done.stdout.splitlines()[-1]) | {"load": load}
        data, alpha = np.load(spec["path"]), np.load(spec["coefficients"]).astype(np.float64)
    row["gap"] = relative_gap(data["F"].astype(np.float64), data["Y"], alpha, spec["cost"])
    return row


def measure(problem, path, cost, given):
    """One row: the sizes, then the peer, the eager call and the jitted call."""
    with np.load(path) as data:
        (n, d), k = data["F"].shape, int(data["Y"].max()) + 1
    row = {"problem": problem, "n": n, "d": d, "k": k, "dtype": given.dtype, "cost": cost, "tolerance": 1e-5}
    if given.peer:
        command = [given.peer, "-W", "ignore", "-c", PEER]
        row["peer"] = run_process(command, {"path": path, "cost": cost}, given.timeout)
        row["tolerance"] = max(row["peer"].get("gap", 0.0), 1e-5)
    spec = {"path": path, "cost": cost, "dtype": given.dtype, "tolerance": row["tolerance"]}
    for mode in ("eager", "jit"):
        row[mode] = run_process([sys.executable, __file__, "--worker"], spec | {"mode": mode}, given.timeout)
    return row


def look_up(row, *keys):
    """A figure of a row, None where that part failed or was left out."""
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def compared(row, targets):
    """Name, measured, limit, and whether it is met, for each target of a row."""
    figures = [
        ("eager: programs", ("eager", "first", "programs"), targets.eager_programs),
        ("eager: processor s of compilation", ("eager", "first", COMPILE_TIME), targets.eager_processor_seconds),
        ("jit: programs", ("jit", "first", "programs"), targets.jit_programs),
        ("jit: processor s of compilation", ("jit", "first", COMPILE_TIME), targets.jit_processor_seconds),
    ]
    for name in look_up(row, "eager", "variations") or ():
        figures.append((f"other {name}: programs", ("eager", "variations", name, "programs"), targets.other_programs))
    found = [(name, look_up(row, *keys), limit) for name, keys, limit in figures]
    ours, peer = look_up(row, "eager", "first", "seconds"), look_up(row, "peer", "first", "seconds")
    limit = targets.ratio_of(row["problem"], row["cost"])
    if peer is not None and limit is not None:
        found.append(("first eager call / LIBLINEAR", None if ours is None else ours / peer, limit))
    return [(name, value, limit, value is not None and value <= limit) for name, value, limit in found]


def show(value):
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *([show(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(rows, targets):
    """The measured seconds, and every figure that has a target beside it."""
    columns = {
        "LIBLINEAR, s": ("peer", "first", "seconds"),
        "its gap": ("peer", "gap"),
        "first, s": ("eager", "first", "seconds"),
        "first, processor s": ("eager", "first", "processor_seconds"),
        "compilation, s": ("eager", "first", "compile_seconds"),
        "second, s": ("eager", "second", "seconds"),
        "gap": ("eager", "gap"),
        "converged": ("eager", "converged"),
        "jit first, s": ("jit", "first", "seconds"),
        "jit first, processor s": ("jit", "first", "processor_seconds"),
        "jit second, s": ("jit", "second", "seconds"),
        "jit gap": ("jit", "gap"),
    }
    title = lambda row: (f"{row['problem']} {row['n']}×{row['d']}×{row['k']}", row["cost"])  # noqa: E731
    seconds = [(*title(row), *(look_up(row, *keys) for keys in columns.values())) for row in rows]
    beside = [
        (*title(row), name, value, f"≤ {show(limit)}", "yes" if met else "NO")
        for row in rows
        for name, value, limit, met in compared(row, targets)
    ]
    failed = [
        f"{row['problem']} at C = {row['cost']:g}, {part}: {row[part]['failed']}"
        for row in rows
        for part in ("peer", "eager", "jit")
        if look_up(row, part, "failed")
    ]
    return "\n\n".join(
        [
            markdown(["problem", "C", *columns], seconds),
            markdown(["problem", "C", "figure", "measured", "target", "met"], beside),
            *failed,
        ]
    )


def revision():
    """The latest commit of the package measured, "-dirty" where it was changed since; None outside of git."""
    git = ["git", "-C", str(pathlib.Path(dualxda_jax.__file__).parent)]
    ask = lambda *words: subprocess.run([*git, *words, "--", "."], capture_output=True, text=True).stdout.strip()  # noqa: E731
    commit = ask("log", "-1", "--format=%h")
    return commit + "-dirty" * bool(ask("status", "--porcelain")) if commit else None


def main():
    if sys.argv[1:2] == ["--worker"]:
        run_worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with sklearn_dual")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE.npz")
    parser.add_argument("--costs", nargs="+", type=float, default=[1e-5, 1e-3, 1e-1])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="the peer's is float64")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one process may take")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("cold.json"))
    given = parser.parse_args()
    targets = Targets()
    machine = {
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "dualxda_jax": dualxda_jax.__version__,
        "revision": revision(),
    }
    rows = []
    for item in given.data:
        problem, path = item.split("=", 1)
        for cost in given.costs:
            rows.append(measure(problem, os.path.abspath(path), cost, given))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            # Written after each row: a run takes minutes a row and may be cut off.
            summary = {"machine": machine, "targets": dataclasses.asdict(targets), "rows": rows}
            given.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(tables(rows, targets))


if __name__ == "__main__":
    main()
