"""Layers found in a trace: their factors make the gradients, and what is left out is named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dualxda_jax import baselines
from dualxda_jax.baselines import gradients, select
from dualxda_jax.baselines.influence import layers, left_out
from dualxda_jax.models import from_nnx


def check_gradients(logits, params, x, which="all"):
    """aᵀ δ of every layer is the gradient of its kernel, with that of its bias in the last row; gives the layers."""
    labels = jnp.arange(len(x), dtype=jnp.int32)
    context = baselines.context(logits, params, x, labels, num_classes=3)
    selection = select.select(params, which)
    found = layers.find(logits, params, x[0], selection)

    def pair(x, label):
        return layers.factors(found, params, x, lambda z: jax.grad(context.loss)(z, label)[None])

    factors = jax.jit(jax.vmap(pair))(x, labels)
    expected = jax.jit(
        lambda: gradients.per_sample(logits, context.loss, selection, params, x, labels, factored=False)
    )()
    for layer, (a, delta) in zip(found.layers, factors, strict=True):
        assert a.shape[0::2] == (len(x), layer.inputs)
        got = np.einsum("bti,brto->bio", a, delta)
        kernel = np.asarray(expected[selection.names[layer.kernel]]).reshape(len(x), -1)[:, layer.index]
        if layer.bias is not None:
            bias = np.asarray(expected[selection.names[layer.bias]]).reshape(len(x), -1)[:, layer.bias_index]
            kernel = np.concatenate([kernel, bias[:, None]], axis=1)
        np.testing.assert_allclose(got, kernel, rtol=1e-4, atol=1e-5 * np.abs(kernel).max())
    return found


class Everything(nn.Module):
    """Strides, dilation, uneven padding, transposed and grouped convolutions, attention, one layer used twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), (2, 1), padding=((1, 2), (0, 1)), kernel_dilation=(1, 2), name="conv")(x)
        x = nn.gelu(nn.ConvTranspose(3, (3, 3), (2, 2), name="transposed")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x)
        x = nn.LayerNorm(name="norm")(x.reshape(x.shape[0], -1, 6))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        shared = nn.Dense(6, name="shared")
        x = nn.remat(nn.Dense)(5, use_bias=False, name="remat")(nn.tanh(shared(nn.relu(shared(x)))))
        return nn.Dense(3, name="head")(x.mean(axis=1))


def test_every_kind_of_layer():
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 2))
    model = Everything()
    params = jax.jit(model.init)(jax.random.key(1), x)
    found = check_gradients(model.apply, params, x)
    names = {layer.name for layer in found.layers}
    parts = {
        "attention/key",
        "attention/query",
        "attention/value",
        "attention/out",
        "conv",
        "transposed",
        "shared",
        "head",
    }
    assert names == {f"{part}/kernel" for part in parts | {"remat"}}
    assert {layer.name for layer in found.layers if layer.bias is None} == {"remat/kernel"}
    assert set(found.left_out) == {f"grouped/{p}" for p in ("bias", "kernel")} | {
        f"norm/{p}" for p in ("bias", "scale")
    }
    assert "groups" in found.left_out["grouped/kernel"]
    assert "`mul`" in found.left_out["norm/scale"]
    twice = found.layers[[layer.name for layer in found.layers].index("shared/kernel")]
    assert (twice.inputs, twice.outputs) == (7, 6)


def test_plain_functions_and_batches_in_any_axis():
    """Kernels transposed or on the left, a batch that is not in front, tied weights, a bias without a chosen kernel."""
    rng = np.random.default_rng(0)
    shapes = {"left": (5, 4), "transposed": (6, 5), "tied": (6, 6), "bias": (6,), "last": (6, 3), "scalar": ()}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}

    def logits(params, x):
        moved = jnp.tanh(params["left"] @ x.T)  # [5, b]
        body = moved.T @ params["transposed"].T + params["bias"][None]
        body = (body @ params["tied"]) @ params["tied"].T
        return params["scalar"] * (body @ params["last"])

    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    found = check_gradients(logits, params, x)
    assert [layer.name for layer in found.layers] == ["last", "left", "transposed"]
    assert found.left_out == {"scalar": "used by `mul`", "tied": "used in several layouts"}
    found = check_gradients(logits, params, x, ("bias", "last"))
    assert [(layer.name, layer.bias) for layer in found.layers] == [("last", None)]
    assert set(found.left_out) == {"bias"}


def test_custom_derivatives_and_loops_stay_whole():
    """relu's derivative at 0 is 0, which an inlined maximum would make a half; kernels in a scan are left out."""
    params = {"first": jnp.ones((2, 4)), "loop": jnp.ones((3, 4, 4)), "last": jnp.ones((4, 3))}

    def logits(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), jax.nn.relu(x @ params["first"]), params["loop"])
        return x @ params["last"]

    found = check_gradients(logits, params, jnp.asarray([[1.0, -1.0], [1.0, 1.0], [-1.0, 0.5]]))
    assert [layer.name for layer in found.layers] == ["first", "last"]
    assert found.left_out == {"loop": "used by `scan`"}


def test_an_nnx_module():
    model, params = from_nnx(
        nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(5, 3, rngs=nnx.Rngs(1))),
        head="layers/2",
    )
    found = check_gradients(model.logits, params, jnp.ones((3, 4)) * jnp.arange(1.0, 4.0)[:, None])
    assert [(layer.inputs, layer.outputs) for layer in found.layers] == [(5, 5), (6, 3)]


def test_left_out_and_nothing_left():
    params = {"table": jnp.ones((7, 4)), "head": jnp.ones((4, 3))}
    context = baselines.context(
        lambda p, x: p["table"][x].sum(axis=1) @ p["head"], params, np.ones((2, 5), np.int32), [0, 1], num_classes=3
    )
    assert left_out(context) == {"table": "used by `gather`"}
    with pytest.raises(
        ValueError, match=r"params: got 'table', which is in no dense or convolution layer \(table: used by `gather`\)"
    ):
        baselines.influence_ekfac(params="table").fit(jax.random.key(0), context)
