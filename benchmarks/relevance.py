"""Seconds of relevance propagation against a plain gradient of the same function and against zennit, in the same run.

    python benchmarks/relevance.py [--peers PYTHON] [--batch 8] [--pairs 32] [--size 32] [--width 64] [--out FILE]

The networks are the paper's small CNN (28×28) and a ResNet-18 of the given width. PYTHON is the interpreter of an
environment with torch, torchvision and zennit. All contestants take turns, round by round, and each figure is a median
over the rounds; processor time stands beside wall time, since it suffers less from what else the machine does. The
compilation times are those of the first call less a run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualxda_jax import models, xda

COMPOSITES = ["epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1"]
PAIRED = ["epsilon_plus", "epsilon_alpha2_beta1"]


class Features(nn.Module):
    """A network up to its head."""

    network: str
    width: int

    @nn.compact
    def __call__(self, x):
        if self.network == "cnn":
            for channels in (5, 10, 5):
                x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID")(x))
            x = x.reshape(x.shape[0], -1)
            for width in (500, 100):
                x = nn.relu(nn.Dense(width)(x))
            return x
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        for stage in range(4):
            for unit in range(2):
                x = models.networks.BasicBlock(self.width * 2**stage, 2 if stage and not unit else 1)(x)
        return x.mean((1, 2))


def timed(fn):
    """(wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(fn())
    return time.perf_counter() - wall, time.process_time() - processor


def rounds(contestants, repeats):
    """Medians of wall and processor seconds of functions that take turns; the first call of each apart."""
    first = {name: timed(fn) for name, fn in contestants.items()}
    times = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, fn in contestants.items():
            times[name].append(timed(fn))
    rows = {}
    for name, measured in times.items():
        wall, processor = (statistics.median(t[i] for t in measured) for i in (0, 1))
        rows[name] = {"wall": wall, "processor": processor, "compile": first[name][1] - processor}
    return rows


class Peer:
    """zennit in its own process; calling it gives the seconds that it took there."""

    def __init__(self, python):
        script = pathlib.Path(__file__).with_name("relevance_zennit.py")
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.process.stdout.readline().split()[1:]

    def __call__(self, *task):
        self.process.stdin.write(" ".join(map(str, task)) + "\n")
        self.process.stdin.flush()
        return tuple(map(float, self.process.stdout.readline().split()))


def against_gradient(network, module, x, repeats):
    params = jax.jit(module.init)(jax.random.key(0), x)
    seed = jax.jit(module.apply)(params, x)

    @jax.jit
    def gradient(params, x, seed):
        return x * jax.vjp(lambda x: module.apply(params, x), x)[1](seed)[0]

    contestants = {"input x gradient": lambda: gradient(params, x, seed)}
    for name in COMPOSITES:
        composite = getattr(xda.composites, name)()
        contestants[name] = lambda c=composite: xda.relevance(module.apply, params, x, seed, composite=c)
    rows = rounds(contestants, repeats)
    base = rows["input x gradient"]
    return [
        {"network": network, "what": name, **row} | {f"{k} ratio": row[k] / base[k] for k in base}
        for name, row in rows.items()
    ]


def against_zennit(network, module, x, peer, repeats, width):
    params = jax.jit(module.init)(jax.random.key(0), x[:1])
    ones = jnp.ones(len(x))
    found = []
    for name in PAIRED:
        composite = getattr(xda.composites, name)()

        def ours(composite=composite):
            return xda.explain_pairs(module.apply, params, x, x[::-1], ones, composite=composite, chunk_size=len(x))

        task = (network, name, len(x), x.shape[1], width)
        timed(ours), peer(*task)
        mine, theirs = zip(*((timed(ours), peer(*task)) for _ in range(repeats)), strict=True)
        row = {"network": network, "what": f"{len(x)} pairs, {name}"}
        for i, kind in enumerate(("wall", "processor")):
            row[kind], row[f"{kind} zennit"] = (statistics.median(t[i] for t in side) for side in (mine, theirs))
            row[f"{kind} zennit / ours"] = row[f"{kind} zennit"] / row[kind]
        found.append(row)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="Python with torch and zennit")
    parser.add_argument("--networks", nargs="+", default=["cnn", "resnet18"])
    parser.add_argument("--only", choices=["gradient", "pairs"], help="one of the two comparisons")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("relevance.json"))
    options = parser.parse_args()
    peer = Peer(options.peers) if options.peers else None
    rows = []
    for network in options.networks:
        module = Features(network, options.width)
        shape = (28, 28, 1) if network == "cnn" else (options.size, options.size, 3)
        images = jax.random.normal(jax.random.key(1), (max(options.batch, options.pairs), *shape))
        if options.only != "pairs":
            rows += against_gradient(network, module, images[: options.batch], options.repeats)
        if peer is not None and options.only != "gradient":
            rows += against_zennit(network, module, images[: options.pairs], peer, options.repeats, options.width)
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    facts = {k: str(v) for k, v in vars(options).items()}
    facts |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "torch": peer.facts if peer else None}
    options.out.write_text(json.dumps({"options": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
