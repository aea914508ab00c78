"""Write the relevance of a transformer by LXT's explicit AttnLRP rules (torch), with random weights.

Run with an environment that has torch and lxt 2.1:

    python tests/golden/make_lxt.py

Weights are float32 values, everything is computed in float64. What arrives at the input when the seed arrives at the
output is the map. Biases are kept, as LXT does.
"""

import pathlib

import numpy as np
import torch
from lxt.explicit import functional as lxt
from lxt.explicit.rules import identity

TINY = 1e-12  # LXT stabilises differently in every rule; with next to nothing that cannot matter.


def linear(x, w, b=None):
    return lxt.linear_epsilon(x, w.T, b, epsilon=TINY)


def transformer(p, x):
    """A pre-norm block with two heads, a gated block with RMSNorm, the mean over tokens."""
    b, t, d = x.shape
    h = lxt.layer_norm_grad_fn.apply(x, p["scale"], p["shift"], 1e-5, TINY)
    q, k, v = (linear(h, p[n], p["bias"]).reshape(b, t, 2, d // 2).transpose(1, 2) for n in "qkv")
    logits = lxt.matmul(q, k.transpose(-1, -2), epsilon=TINY)
    weights = lxt.softmax(logits, dim=-1, temperature=2.0)
    mixed = lxt.matmul(weights, v, epsilon=TINY).transpose(1, 2).reshape(b, t, d)
    x = lxt.add2(x, linear(mixed, p["o"]), epsilon=TINY)
    h = lxt.rms_norm_identity(x, torch.ones(d, dtype=x.dtype), 1e-6)
    h = identity(lambda v: torch.nn.functional.gelu(v, approximate="tanh"), linear(h, p["up"]))
    x = lxt.add2(x, linear(h, p["down"]), epsilon=TINY)
    gated = lxt.mul2(identity(torch.nn.functional.silu, linear(x, p["up"])), linear(x, p["gate"]))
    x = lxt.add2(x, linear(gated, p["down"]), epsilon=TINY)
    return lxt.mean(x, 1, False, TINY)


if __name__ == "__main__":
    torch.manual_seed(0)
    shapes = dict.fromkeys("qkvo", (8, 8)) | {"up": (8, 12), "gate": (8, 12), "down": (12, 8)}
    shapes |= {"scale": (8,), "shift": (8,), "bias": (8,)}
    weights = {n: (0.4 * torch.randn(s)).double() for n, s in shapes.items()}
    x = torch.randn(2, 5, 8).double().requires_grad_(True)
    features = transformer(weights, x)
    seed = (torch.randn(2, 8) * features).detach().float().double()
    (relevance,) = torch.autograd.grad(features, x, seed)
    arrays = {f"weights/{n}": w.numpy().astype(np.float32) for n, w in weights.items()}
    arrays |= {"x": x.detach().numpy(), "seed": seed.numpy(), "features": features.detach().numpy()}
    np.savez_compressed(pathlib.Path(__file__).parent / "lxt_transformer.npz", **arrays, map=relevance.numpy())
