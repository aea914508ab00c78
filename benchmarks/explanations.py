"""How much longer explanations take by LiSSA and EK-FAC than by DualDA: same network, queries and device, warm.

    python benchmarks/explanations.py --data FOLDER --out explanations.json

The rows, the network and both times are those of `dualxda evaluate`: preparation is one call of `fit`; explanation is
from the queries' images to the scores of all training samples, arrays ready, compilation left out. The paper's factors
are those of its CIFAR-10 figures (ResNet-18; its SVM on one CPU thread, the others on a GPU), so not of this case.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics

import jax

from dualxda_jax import data, pipeline
from dualxda_jax.evaluation import benchmark
from dualxda_jax.pipeline import cases, lineup

PAPER = {"lissa": 4_100_000, "ekfac": 11_000}


def explanation(method, fitted, trained, *, again=False):
    """Seconds for all queries; the first call is preceded by one that compiles."""
    blocks = benchmark.score_blocks(method, fitted, trained.queries, trained.targets, timed=not again)
    return sum(seconds for _, _, seconds in blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder with a published data set; by default the sample")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes less than a second")
    parser.add_argument("--methods", nargs="+", default=["dualda", "similarity", "lissa", "ekfac"])
    parser.add_argument("--slow-lissa", action="store_true", help="LiSSA without extracted features as well")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    changed = (("limit", options.limit), ("queries", options.queries))
    config = pipeline.EvaluateConfig(data=options.data, changed=changed)
    dataset = data.load_folder(options.data) if options.data else data.embedded_sample()
    case = cases.make("clean", dataset, config, 0)
    trained = cases.put_together(case, cases.train(case, config, 0, lambda done, total: None), config)
    rows = list(lineup.lineup("small", options.methods))
    if options.slow_lissa:
        (row,) = lineup.lineup("small", ["lissa"])
        rows.append(dataclasses.replace(row, name="lissa-whole-network", on_features=False))
    found = {}
    for row in rows:
        method = row.make()
        fitted, seconds, warm = benchmark.prepare(method, jax.random.key(0), trained.context, timed=True)
        explain = [explanation(method, fitted, trained)]
        while explain[-1] < 1 and len(explain) < options.repeats:
            explain.append(explanation(method, fitted, trained, again=True))
        found[row.name] = {"prepare": seconds, "warm": warm, "explain": statistics.median(explain)}
        print(f"{row.name:22} prepare {seconds:8.3f} s   explain {found[row.name]['explain']:10.4f} s", flush=True)
    ours = min((r for r in found if r.startswith("dualda")), key=lambda r: found[r]["explain"], default=None)
    for times in found.values():
        times["factor"] = times["explain"] / found[ours]["explain"] if ours else None
    for name, paper in PAPER.items():
        if name in found and ours:
            print(f"{name} / {ours}: {found[name]['factor']:,.0f} (the paper: {paper:,})")
    report = {
        "dataset": dataset.name, "training": options.limit, "queries": options.queries, "against": ours, "rows": found,
        "options": {row.name: dict(row.options) for row in rows}, "paper": PAPER, "load": os.getloadavg(),
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform}), {os.cpu_count()} cores",
        "jax": jax.__version__,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
