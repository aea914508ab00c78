"""Many networks on subsets at once against one-by-one training, in one run on one machine.

    python benchmarks/retrain.py --data FOLDER --networks 8 --out retrain.json

Each network is the paper's small CNN on a random half of `--images` training images for `--epochs` passes. One by one:
`models.training.fit` and `models.training.predict`, as a user would loop. Ours: `evaluation.retrain.logits`. Both are
compiled before they are timed (the first calls are reported apart), and take turns, so that a machine that is busy for
a while slows both. Seconds of the clock decide; CPU seconds stand beside them, because they hardly depend on what else
the machine does.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from dualxda_jax import data, models
from dualxda_jax.evaluation import retrain
from dualxda_jax.models import training

SUBSETS = 100
"""As many as the LDS of the paper takes; the times of fewer are multiplied up to them."""


def timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def one_by_one(key, module, images, labels, subsets, queries, config):
    model = models.from_linen(module, head=models.HEAD)
    found = []
    for i, subset in enumerate(subsets):
        state = training.fit(jax.random.fold_in(key, i), module, images[subset], labels[subset], config=config)
        found.append(training.predict(model.logits, state.variables, queries))
    return np.stack(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a published data set; without it the embedded sample")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--across", choices=("map", "vmap"), help="by default what the device gets by default")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    dataset = data.load_folder(options.data) if options.data else data.embedded_sample()
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(dataset.train.labels))[: options.images])
    images, labels = dataset.train.images[rows], dataset.train.labels[rows]
    subsets = np.array([rng.permutation(len(labels)) < len(labels) // 2 for _ in range(options.networks)])
    config = training.config_for(int(subsets[0].sum()), epochs=options.epochs)
    module = models.SmallCNN(num_classes=len(dataset.class_names))
    arguments = (jax.random.key(0), module, images, labels, subsets, dataset.test.images[: options.queries])
    contenders = {
        "one by one": lambda: one_by_one(*arguments, config),
        "at once": lambda: retrain.logits(*arguments, config=config, across=options.across),
    }
    times, answers = {name: [] for name in contenders}, {}
    for _ in range(options.repeats + 1):
        for name, run in contenders.items():
            wall, cpu, answers[name] = timed(run)
            times[name].append((wall, cpu))
    table = {}
    for name, measured in times.items():
        walls, cpus = zip(*measured[1:], strict=True)
        table[name] = {
            "first_seconds": measured[0][0],
            "seconds": statistics.median(walls),
            "cpu_seconds": statistics.median(cpus),
            f"seconds_for_{SUBSETS}": statistics.median(walls) * SUBSETS / options.networks,
            "milliseconds_per_step": 1e3 * statistics.median(walls) / options.networks / config.steps,
            "accuracy": float((answers[name].argmax(-1) == dataset.test.labels[: options.queries]).mean()),
        }
    by_clock = [a[0] / b[0] for a, b in zip(times["one by one"][1:], times["at once"][1:], strict=True)]
    by_cpu = [a[1] / b[1] for a, b in zip(times["one by one"][1:], times["at once"][1:], strict=True)]
    report = {
        "dataset": dataset.name,
        "networks": options.networks,
        "images": len(labels),
        "members": int(subsets[0].sum()),
        "steps": config.steps,
        "contenders": table,
        "times_faster": statistics.median(by_clock),
        "times_faster_each": by_clock,
        "times_less_cpu": statistics.median(by_cpu),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})",
        "jax": jax.__version__,
    }
    print(f"{'':12} {'first':>8} {'seconds':>8} {'CPU s':>8} {'ms/step':>8} {'accuracy':>9}")
    for name, row in table.items():
        print(
            f"{name:12} {row['first_seconds']:8.1f} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} "
            f"{row['milliseconds_per_step']:8.1f} {row['accuracy']:9.2%}"
        )
    print(f"{report['times_faster']:.2f} times faster by the clock, {report['times_less_cpu']:.2f} times less CPU time")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
