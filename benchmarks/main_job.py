"""The main job on whole data sets: seconds of every stage, peak memory, and how good the result is.

    python benchmarks/main_job.py FOLDER [FOLDER ...] [--cost C] [--out DIR]

Each FOLDER holds a data set as published (see `dualxda demo --help`). Every run is a fresh process that starts from
nothing; peak memory is the largest resident size of that process. Writes benchmarks/results/main_job.json and prints a
table. There is no peer for the whole job; `benchmarks/solver.py` times the SVM against LIBLINEAR.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "main_job.json"


def measure(folder: Path, cost: float, out: Path) -> dict:
    """Run the demo once in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "dualxda_jax",
        "demo",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--cost",
        str(cost),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 2**20  # Linux counts it in KiB
    return {**json.loads((out / "summary.json").read_text()), "seconds": seconds, "peak_gib": peak}


def show(runs: list[dict]) -> None:
    """Print one column a data set."""
    table = Table("", *(f"{run['dataset']} ({run['train_size']:,})" for run in runs), title="The main job")
    rows = {
        "test accuracy": lambda r: f"{r['values']['accuracy']:.2%}",
        "agreement of surrogate and network": lambda r: f"{r['values']['agreement']:.2%}",
        "correlation of logits": lambda r: f"{r['values']['logit_correlation']:.3f}",
        "class detection": lambda r: f"{r['values']['class_detection']:.2%}",
        "support vectors": lambda r: f"{r['values']['support']:.2%}",
        "non-zero coefficients": lambda r: f"{r['values']['nonzero']:.2%}",
        "duality gap": lambda r: f"{r['values']['gap']:.1e}" + ("" if r["converged"] else " NOT CONVERGED"),
        "largest |map sum - score| / score": lambda r: f"{r['values']['conservation']:.1e}",
        "peak memory, GiB": lambda r: f"{r['peak_gib']:.2f}",
        "seconds in all": lambda r: f"{r['seconds']:.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(run) for run in runs))
    table.add_section()
    for i, stage in enumerate(runs[0]["stages"]):
        table.add_row(f"seconds: {stage['name']}", *(f"{run['stages'][i]['seconds']:.1f}" for run in runs))
    Console().print(table)
    Console().print(runs[0]["environment"], highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--cost", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="keep the reports here instead of throwing them away")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            measure(folder, options.cost, (options.out or Path(scratch)) / folder.name) for folder in options.folders
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    show(runs)


if __name__ == "__main__":
    main()
