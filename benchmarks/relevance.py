"""Seconds of relevance propagation against a plain gradient of the same function, in the same run.

    python benchmarks/relevance.py [--batch 8] [--size 32] [--width 64] [--out relevance.json]

The networks are the small CNN (28×28) and a ResNet-18 of the given width. Each figure is the least of several runs
after compilation; compilation is reported beside it.
"""

import argparse
import functools
import json
import pathlib
import time

import flax.linen as nn
import jax

from dualxda_jax import xda

COMPOSITES = ["epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1"]


class SmallCNN(nn.Module):
    """The network for 28×28 images, without its head."""

    @nn.compact
    def __call__(self, x):
        for channels in (5, 10, 5):
            x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID")(x))
        x = x.reshape(x.shape[0], -1)
        for width in (500, 100):
            x = nn.relu(nn.Dense(width)(x))
        return x


class ResNet18(nn.Module):
    """ResNet-18 with a 3×3 stem, without its head."""

    width: int

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage in range(4):
            channels = self.width * 2**stage
            for unit in range(2):
                stride = (2, 2) if stage and not unit else (1, 1)
                y = nn.relu(norm()(nn.Conv(channels, (3, 3), stride, use_bias=False)(x)))
                y = norm()(nn.Conv(channels, (3, 3), use_bias=False)(y))
                if x.shape != y.shape:
                    x = norm()(nn.Conv(channels, (1, 1), stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return x.mean((1, 2))


def measure(fn, repeats=5):
    """(seconds of the first call, least seconds of the others)."""

    def once():
        start = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - start

    return once(), min(once() for _ in range(repeats))


def compare(name, module, x):
    params = jax.jit(module.init)(jax.random.key(0), x)
    seed = jax.jit(module.apply)(params, x)

    @jax.jit
    def gradient(params, x, seed):
        return x * jax.vjp(lambda x: module.apply(params, x), x)[1](seed)[0]

    rows = []
    base = measure(lambda: gradient(params, x, seed))
    rows.append({"network": name, "what": "input x gradient", "compile": base[0] - base[1], "run": base[1]})
    for composite in COMPOSITES:
        chosen = getattr(xda.composites, composite)()
        first, run = measure(lambda chosen=chosen: xda.relevance(module.apply, params, x, seed, composite=chosen))
        rows.append({"network": name, "what": composite, "compile": first - run, "run": run, "ratio": run / base[1]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("relevance.json"))
    options = parser.parse_args()
    key = jax.random.key(1)
    images = jax.random.normal(key, (options.batch, options.size, options.size, 3))
    rows = compare("small CNN", SmallCNN(), jax.random.normal(key, (options.batch, 28, 28, 1)))
    rows += compare(f"ResNet-18 x{options.width}", ResNet18(options.width), images)
    print(f"{jax.devices()[0].device_kind}, batch {options.batch}, {options.size} px")
    for row in rows:
        ratio = f"{row['ratio']:6.2f}x" if "ratio" in row else ""
        print(
            f"{row['network']:<16} {row['what']:<22} compile {row['compile']:7.2f} s  run {row['run']:8.4f} s  {ratio}"
        )
    facts = vars(options) | {"out": str(options.out), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    options.out.write_text(json.dumps({"options": facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
