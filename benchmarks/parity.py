"""How far our maps are from zennit's: every composite, biases kept and zeroed, in float64 and in float32.

    python benchmarks/parity.py [--networks cnn mixed unmerged resnet] [--peers PYTHON | --full FOLDER] [--out FILE]

The maps of zennit are those of tests/golden (made in float64), the networks those of tests/xda/test_golden.py. In
`unmerged` ours differ where biases are kept, since a shift then takes its share of the relevance, and under
excitation backpropagation, which in zennit takes the plain gradient of a BatchNorm for a share of relevance. With
--peers, the interpreter of an environment with torch, torchvision and zennit, there is also a ResNet-18 of full width
(64 to 512 channels) on 32×32 pixels; since no weights are looked for there that keep all activations away from zero,
zennit's own maps in float32 are compared as well. An error is max |ours - zennit's| / max |zennit's|, of float64.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import tempfile

# Compilation is most of the time, and each program runs once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp

from dualxda_jax import xda

TESTS = pathlib.Path(__file__).parents[1] / "tests"


def errors(tests, network, folder, dtype):
    tests.GOLDEN = folder
    arrays, weights, x, seed = tests.load(network, dtype)
    fn = getattr(tests, network.removesuffix("_full"))
    found = {}
    for name in tests.NAMES:
        for bias in ("kept", "zero"):
            composite = tests.composite(name, bias == "zero")
            maps = xda.relevance(fn, weights, x, seed, composite=composite)
            found[f"{name}, bias {bias}"] = float(tests.error(arrays, name, bias, maps))
            print(network, jnp.dtype(dtype).name, name, bias, found[f"{name}, bias {bias}"], flush=True)
    return found


def of_zennit(arrays):
    """The errors of zennit's own float32 maps, where they are on file."""
    own = {tuple(k.split("/")[2:]): float(v) for k, v in arrays.items() if k.startswith("float32/")}
    return {f"{name}, bias {bias}": error for (name, bias), error in own.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["cnn", "mixed", "unmerged", "resnet"])
    parser.add_argument("--peers", help="Python with torch, torchvision and zennit")
    parser.add_argument("--full", type=pathlib.Path, help="folder where zennit's maps of full width are already")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("parity.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    spec = importlib.util.spec_from_file_location("test_golden", TESTS / "xda" / "test_golden.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [(network, TESTS / "golden") for network in options.networks]
        if options.full:
            cases.append(("resnet_full", options.full))
        elif options.peers:
            script = TESTS / "golden" / "make_zennit.py"
            subprocess.run([options.peers, script, "resnet_full", "--to", folder], check=True)
            cases.append(("resnet_full", pathlib.Path(folder)))
        for network, where in cases:
            rows[network] = {str(jnp.dtype(d)): errors(tests, network, where, d) for d in (jnp.float64, jnp.float32)}
            own = of_zennit(tests.load(network, jnp.float32)[0])
            rows[network] |= {"float32 of zennit": own} if own else {}
            options.out.write_text(json.dumps({"jax": jax.__version__, "errors": rows}, indent=1))
    for network, by_dtype in rows.items():
        worst = {dtype: max(found, key=found.get) for dtype, found in by_dtype.items()}
        print(network, {dtype: (name, by_dtype[dtype][name]) for dtype, name in worst.items()})


if __name__ == "__main__":
    main()
