"""Where the time of a training step goes: the paper's CNN as it is and folded (`models.faster_apply`), batch by batch.

    python benchmarks/retrain_profile.py --out retrain_profile.json

Parts are programs of their own, warm, on one thread of XLA's pool less than the machine has or all of them, as XLA
likes; the fastest of several rounds. The sums need not match: XLA fuses across parts.
"""

import argparse
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualxda_jax import models
from dualxda_jax.models import training

DENSE = ("dense_0", "dense_1", models.HEAD)


def fastest(run, *arguments, rounds):
    jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def dense_loss(params, x, labels):
    for name in DENSE[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    logits = x @ params[models.HEAD]["kernel"] + params[models.HEAD]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def parts(batch, rounds):
    """Milliseconds of a step and of what it is made of, and arithmetic of the dense layers in billions."""
    module = models.SmallCNN(num_classes=10)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (batch, 28, 28, 1)), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    config = training.TrainConfig(steps=100, batch_size=batch)
    state = training.init(jax.random.key(0), module, images, config)
    x, params = images.astype(jnp.float32) / 255, state.variables["params"]
    applies = {"plain": module.apply, "folded": models.faster_apply(module)}
    found = {}
    for name, apply in applies.items():
        loss = lambda p, apply=apply: optax.softmax_cross_entropy_with_integer_labels(  # noqa: E731
            apply({"params": p}, x), labels
        ).mean()
        step = jax.jit(lambda s, apply=apply: training.step(s, (images, labels), apply=apply)[0])
        found[f"{name}: step"] = fastest(step, state, rounds=rounds)
        found[f"{name}: gradient"] = fastest(jax.jit(jax.grad(loss)), params, rounds=rounds)
        found[f"{name}: forward"] = fastest(jax.jit(loss), params, rounds=rounds)
    width = params["dense_0"]["kernel"].shape[0]
    maps = jnp.asarray(rng.normal(size=(batch, width)), jnp.float32)
    dense = {name: params[name] for name in DENSE}
    by_both = jax.jit(jax.grad(dense_loss, argnums=(0, 1)))
    found["dense layers: gradient"] = fastest(by_both, dense, maps, labels, rounds=rounds)
    optimizer = optax.adamw(1e-3)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    found["optimizer"] = fastest(update, params, optimizer.init(params), params, rounds=rounds)
    size = 1024
    square = jnp.ones((size, size), jnp.float32)
    product = fastest(jax.jit(lambda a: a @ a), square, rounds=rounds)
    arithmetic = 6 * batch * sum(int(p["kernel"].size) for p in dense.values()) / 1e9
    return {
        "milliseconds": found, "dense_gigaflop": arithmetic,
        "dense_gigaflops_a_second": arithmetic / found["dense layers: gradient"] * 1e3,
        "square_product_gigaflops_a_second": 2 * size**3 / 1e9 / product * 1e3,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = {
        "batches": {str(batch): parts(batch, options.rounds) for batch in options.batches},
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform}), {os.cpu_count()} cores",
        "load": os.getloadavg(), "jax": jax.__version__,
    }  # fmt: skip
    for batch, found in report["batches"].items():
        print(f"batch {batch}")
        for name, value in found["milliseconds"].items():
            print(f"  {name:24} {value:8.2f} ms")
        for name in ("dense_gigaflop", "dense_gigaflops_a_second", "square_product_gigaflops_a_second"):
            print(f"  {name:36} {found[name]:8.1f}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
