"""The solver on synthetic features of ImageNet's shape, and how far it is from what its products alone would take.

    python benchmarks/imagenet_shape.py [--share 100] [--cost 1e-3] [--gap 1e-3] [--dtype float32] [--out FILE]

1,281,167 / share rows of 2,048 features in 1,000 classes, made on the device: class prototypes in 64 latent dimensions,
mixed, ReLU, 1% flipped labels. A share of 1 is meant for an accelerator (5 GB of features in bfloat16), 100 for two CPU
cores. The roofline: a pass is one product [n, d] × [d, k] and one [k, n] × [n, d], timed here at the solver's precision
(float32); `share of products` is the time of as many passes as the solve counts epochs over the time of the solve.
What is extrapolated is linear in the rows at the same number of epochs, and is called so.
"""

import argparse
import json
import os
import pathlib
import resource
import time

import jax
import jax.numpy as jnp

from dualxda_jax import svm

ROWS, WIDTH, CLASSES, LATENT = 1_281_167, 2_048, 1_000, 64


def make(n, width, classes, dtype):
    """(features [n, width], labels [n]) on the device, chunk by chunk."""
    keys = jax.random.split(jax.random.key(0), 3)
    prototypes = jax.random.normal(keys[0], (classes, LATENT))
    decay = jnp.arange(1, LATENT + 1)[:, None] ** -0.5
    mixing = jax.random.normal(keys[1], (LATENT, width)) * decay

    @jax.jit
    def rows(key):
        a, b, c, d = jax.random.split(key, 4)
        label = jax.random.randint(a, (), 0, classes)
        latent = prototypes[label] + 0.6 * jax.random.normal(b, (LATENT,))
        other = jax.random.randint(c, (), 0, classes)
        flipped = jnp.where(jax.random.uniform(d) < 0.01, other, label)
        return jax.nn.relu(latent @ mixing).astype(dtype), flipped

    return jax.lax.map(rows, jax.random.split(keys[2], n), batch_size=4096)


def seconds_of_a_pass(features, classes, repeats=3):
    """The two products of a pass over all rows, in float32, in the solver's chunks."""
    n, width = features.shape
    size = min(1024, n)
    weights = jnp.ones((classes, width), jnp.float32)

    @jax.jit
    def one_pass(features, weights):
        def chunk(i, total):
            x = jax.lax.dynamic_slice_in_dim(features, i * size, size).astype(jnp.float32)
            scores = jnp.matmul(x, weights.T, precision="highest")
            return total + jnp.matmul(scores.T, x, precision="highest")

        return jax.lax.fori_loop(0, n // size, chunk, jnp.zeros_like(weights))

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(one_pass(features, weights))
        times.append(time.perf_counter() - start)
    return min(times[1:]) * n / (n // size * size)


def peak_bytes():
    stats = jax.local_devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"device": stats.get("peak_bytes_in_use"), "process": host}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=100, help="one row in so many")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--cost", type=float, default=1e-3)
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", choices=["auto", "coordinate", "newton"], default="auto")
    parser.add_argument("--repeats", type=int, default=1, help="0: the first call, compilation included, is all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("imagenet_shape.json"))
    given = parser.parse_args()
    n = ROWS // given.share
    features, labels = jax.block_until_ready(make(n, given.width, given.classes, jnp.dtype(given.dtype)))
    one = seconds_of_a_pass(features, given.classes)
    print(
        f"{n:,} x {given.width:,} x {given.classes:,} {given.dtype}: the products of a pass take {one:.3f} s",
        flush=True,
    )
    config = svm.SolverConfig(tolerance=given.gap, method=given.method)
    times = []
    for _ in range(given.repeats + 1):
        start = time.perf_counter()

        def progress(done, total, start=start):
            print(f"  {time.perf_counter() - start:7.1f} s  gap {10 ** (-done / 1000):.1e}", flush=True)

        solution = svm.solve(
            features, labels, num_classes=given.classes, cost=given.cost, config=config, progress=progress
        )
        jax.block_until_ready(solution)
        times.append(time.perf_counter() - start)
    seconds, epochs = times[-1], int(solution.info.epochs)
    row = {
        "n": n, "d": given.width, "k": given.classes, "dtype": given.dtype, "cost": given.cost, "method": given.method,
        "gap": float(solution.info.gap), "converged": bool(solution.info.converged), "epochs": epochs,
        "first_seconds": times[0], "seconds": seconds, "products_of_a_pass": one,
        "share_of_products": one * epochs / seconds, "support": float((solution.coefficients != 0).any(1).mean()),
        "extrapolated_seconds_for_all_rows": seconds * ROWS / n, "peak_bytes": peak_bytes(),
        "device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "load": os.getloadavg(),
        "jax": jax.__version__,
    }  # fmt: skip
    given.out.write_text(json.dumps(row, indent=1) + "\n")
    for name, value in row.items():
        print(f"{name:>36}  {value:.4g}" if isinstance(value, float) else f"{name:>36}  {value}")


if __name__ == "__main__":
    main()
