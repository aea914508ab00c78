"""Many problems over the same features: a path of costs, and subsets under vmap, against one solve at a time.

    python benchmarks/solver_many.py --data FILE.npz [--subset-rows 10000] [--devices 2] [--out solver_many.json]

FILE.npz holds F [n, d] and Y [n]. Ten costs from 1e-6 to 1e-2 by `solve_path` and by ten solves; then 20 random halves
of the first rows (C = 1e-3) by `jit(vmap(solve))` over sample_weight, by a solve each and by a jitted solve each. Both
also spread over devices by `shard_map`: as many CPU devices as asked for, to put one on each core, or the accelerators.
Everything is compiled before it is timed; repeats are interleaved, and medians reported.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import svm


def timed(ways, repeats):
    """{name: (first, median seconds)}, the ways in turn."""
    times = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - start)
    return {name: (t[0], statistics.median(t[1:])) for name, t in times.items()}


def problems(features, labels, k, rows):
    """The ways to solve each of the two sets of problems; the first is the one at a time that others are held to."""
    costs = np.geomspace(1e-6, 1e-2, 10)
    rng = np.random.default_rng(0)
    masks = np.zeros((20, rows), np.float32)
    for mask in masks:
        mask[rng.permutation(rows)[: rows // 2]] = 1.0
    few, their, masks = features[:rows], labels[:rows], jnp.asarray(masks)

    # Where a trace sees several devices, it cannot see that the rows are on one.
    config = svm.SolverConfig(method="coordinate" if jax.default_backend() == "cpu" else "auto")

    def solve(cost):
        return svm.solve(features, labels, num_classes=k, cost=float(cost))

    def half(mask):
        return svm.solve(few, their, num_classes=k, cost=1e-3, sample_weight=mask, config=config)

    one, many = jax.jit(half), jax.jit(jax.vmap(half))
    path, halves = _over_devices(features, labels, few, their, k)
    return {
        "ten costs": {
            "one solve each": lambda: [solve(c) for c in costs],
            "solve_path": lambda: svm.solve_path(features, labels, num_classes=k, costs=costs),
            "solve_path over devices": lambda: path(jnp.asarray(costs, jnp.float32)),
        },
        "20 halves": {
            "one solve each": lambda: [half(m) for m in masks],
            "one jitted solve each": lambda: [one(m) for m in masks],
            "jit(vmap(solve))": lambda: many(masks),
            "vmap(solve) over devices": lambda: halves(masks),
        },
    }


def _over_devices(features, labels, few, their, k):
    """(path of costs, halves of masks): each device solves its share, with the features whole on all of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("problems",), axis_types=(AxisType.Auto,))
    whole, share = PartitionSpec(), PartitionSpec("problems")

    def spread(solve, *data):
        over = jax.shard_map(solve, mesh=mesh, in_specs=(whole, whole, share), out_specs=share, check_vma=False)
        compiled, data = jax.jit(over), jax.device_put(data, NamedSharding(mesh, whole))
        return lambda given: compiled(*data, given)

    def halves(features, labels, masks):
        def one(mask):
            return svm.solve(features, labels, num_classes=k, cost=1e-3, sample_weight=mask)

        return jax.vmap(one)(masks)

    def path(features, labels, costs):
        return svm.solve_path(features, labels, num_classes=k, costs=costs)

    return spread(path, features, labels), spread(halves, few, their)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--subset-rows", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=2, help="CPU devices; 10 and 20 must be multiples of it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("solver_many.json"))
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", given.devices)
    data = np.load(given.data)
    features, labels = jax.device_put(data["F"].astype(np.float32)), jnp.asarray(data["Y"].astype(np.int32))
    k = int(labels.max()) + 1
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svm.NotConvergedWarning)
        for name, ways in problems(features, labels, k, min(given.subset_rows, len(labels))).items():
            found = timed(ways, given.repeats)
            alone = found["one solve each"][1]
            for way, (first, seconds) in found.items():
                rows.append({"problems": name, "way": way, "seconds": seconds, "first_seconds": first})
                rows[-1]["of_one_each"] = seconds / alone
                print(f"{name:10} {way:25} {seconds:7.2f} s  first {first:6.2f} s  {seconds / alone:5.2f} of one each")
    machine = {
        "device": str(jax.devices()[0]),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    machine |= {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    sizes = {"n": len(labels), "d": features.shape[1], "k": k, "subset_rows": given.subset_rows, "dtype": "float32"}
    given.out.write_text(json.dumps({"machine": machine, "sizes": sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
