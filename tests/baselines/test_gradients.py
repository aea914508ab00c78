"""Which parameters take part, and their per-sample gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dualxda_jax import models
from dualxda_jax.baselines import gradients, rows, select
from dualxda_jax.baselines.protocol import cross_entropy


class Net(nn.Module):
    """Products that are outer per sample (a, c, head), a matrix used twice, one that meets many vectors, and a norm."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        h = nn.relu(nn.Conv(4, (2, 3), (2, 1), padding=((1, 0), (2, 1)), kernel_dilation=(1, 2), name="conv")(x))
        h = nn.relu(nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(h))
        h = nn.ConvTranspose(3, (2, 3), (1, 2), name="transposed")(h)
        h = nn.Dense(4, name="positions")(h).reshape(x.shape[0], -1)
        h = nn.tanh(nn.Dense(5, name="a")(h))
        h = nn.BatchNorm(use_running_average=not train, name="norm")(h)
        twice = nn.Dense(5, name="b")
        h = jax.checkpoint(nn.silu)(twice(nn.silu(twice(h))))
        return nn.Dense(3, use_bias=False, name="head")(h)


@pytest.fixture(scope="module")
def problem():
    x = jax.random.normal(jax.random.key(0), (7, 4, 3, 2))
    labels = jnp.asarray([0, 1, 2, 0, 1, 2, 2])
    params = Net().init(jax.random.key(1), x)
    return models.from_linen(Net(), head="head").logits, params, x, labels


def one_by_one(logits, params, x, labels):
    loss = jax.jit(jax.grad(lambda p, x, y: cross_entropy(logits(p, x[None])[0], y)))
    return [loss(params, x[i], labels[i])["params"] for i in range(len(x))]


def test_rows_are_the_gradients_of_each_sample_alone(problem):
    logits, params, x, labels = problem
    selection = select.select(params, "all")
    chunked = jax.jit(
        lambda x, y: gradients.map_chunks(
            lambda x, y: gradients.per_sample(logits, cross_entropy, selection, params, x, y), (x, y), 3
        )
    )(x, labels)
    outer = {name for name, entry in chunked.items() if isinstance(entry, rows.Outer)}
    assert outer == {"a/kernel", "head/kernel"}
    singles = one_by_one(logits, params, x, labels)
    full = rows.dense(chunked)
    np.testing.assert_array_equal(full["conv/kernel"].shape[1:], (2, 3, 2, 4))
    assert len(full) == len(jax.tree.leaves(params["params"]))
    for name, entry in full.items():
        layer, leaf = name.split("/")
        np.testing.assert_allclose(entry, np.stack([g[layer][leaf] for g in singles]), rtol=1e-4, atol=1e-6)
    flat = np.asarray(rows.flat(chunked))
    np.testing.assert_allclose(rows.dot(chunked, chunked), flat @ flat.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows.squared_norms(chunked), (flat**2).sum(1), rtol=1e-4)
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), chunked)
    assert rows.dot(halves, chunked).dtype == jnp.float32
    np.testing.assert_allclose(rows.dot(halves, halves), flat @ flat.T, rtol=0.05, atol=0.02 * (flat**2).sum(1).max())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_on_either_side_of_the_product(transposed):
    matrix = jax.random.normal(jax.random.key(0), (3, 4) if transposed else (4, 3))

    def logits(params, x):
        return (params["w"] @ x.T).T if transposed else x @ params["w"]

    x, labels = jax.random.normal(jax.random.key(1), (5, 4)), jnp.asarray([0, 1, 2, 1, 0])
    selection = select.select({"w": matrix}, "w")
    found = gradients.per_sample(logits, cross_entropy, selection, {"w": matrix}, x, labels)
    assert isinstance(found["w"], rows.Outer)
    residual = jax.nn.softmax(logits({"w": matrix}, x)) - jax.nn.one_hot(labels, 3)
    expected = jnp.einsum("bk,bd->bkd" if transposed else "bk,bd->bdk", residual, x)
    np.testing.assert_allclose(rows.dense(found)["w"], expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 4, 11, 32, 33])
def test_chunks_of_any_size_give_each_sample_its_own_result(n):
    values = jnp.arange(n, dtype=jnp.float32)
    out = gradients.map_chunks(lambda v: {"twice": 2 * v, "pair": jnp.stack([v, v], 1)}, (values,), 4)
    np.testing.assert_array_equal(out["twice"], 2 * values)
    assert out["pair"].shape == (n, 2)
    total = gradients.fold_chunks(lambda c, mask, v: c + jnp.where(mask, v + 1, 0).sum(), jnp.zeros(()), (values,), 4)
    assert total == (values + 1).sum()


def test_sharded_samples_give_the_same_rows(problem):
    logits, params, x, labels = problem
    selection = select.select(params, ("head", "conv"), head="head")
    x, labels = jnp.tile(x, (8, 1, 1, 1))[:48], jnp.tile(labels, 8)[:48]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows_over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    fit = jax.jit(
        lambda x, y: gradients.map_chunks(
            lambda x, y: gradients.per_sample(logits, cross_entropy, selection, params, x, y), (x, y), 16
        )
    )
    there = fit(jax.device_put(x, rows_over), jax.device_put(labels, rows_over))
    here = fit(x, labels)
    assert there["head/kernel"].left.sharding.is_equivalent_to(rows_over, 2)
    np.testing.assert_allclose(rows.flat(there), rows.flat(here), atol=1e-6)


def test_filters_choose_layers_leaves_and_collections(problem):
    _, params, _, _ = problem
    every = select.select(params, "all")
    assert set(every.split(params)[0]) == {n for n in select.paths(params) if not n.startswith("batch_stats")}
    assert "batch_stats/norm/mean" in select.paths(params)
    assert set(select.select(params, "a").split(params)[0]) == {"a/kernel", "a/bias"}
    assert set(select.select(params, ("*/bias", "head")).split(params)[0]) >= {"a/bias", "b/bias", "head/kernel"}
    chosen, rest = every.split(params)
    merged = every.merge(chosen, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(map(jnp.array_equal, jax.tree.leaves(merged), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match=r"params: got 'hed', must be .*head/kernel"):
        select.select(params, "hed")
    with pytest.raises(ValueError, match="structure"):
        every.split(params["params"])


def test_nnx_parameters_without_their_statistics():
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.layers = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 3, rngs=rngs))

        def __call__(self, x):
            return self.layers(self.norm(x))

    model, params = models.from_nnx(Small(nnx.Rngs(0)), head="layers/layers/2")
    chosen, _ = select.select(params, "all").split(params)
    assert {"norm/scale", "norm/bias", "layers/layers/0/kernel"} <= set(chosen) and "norm/mean" not in chosen
    selection = select.select(params, "head", head=model.head)
    x, labels = jax.random.normal(jax.random.key(0), (4, 4)), jnp.asarray([0, 1, 2, 0])
    found = rows.dense(gradients.per_sample(model.logits, cross_entropy, selection, params, x, labels))
    residual = jax.nn.softmax(model.logits(params, x)) - jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(found["layers/layers/2/bias"], residual, atol=1e-6)
    expected = jnp.einsum("bd,bk->bdk", model.features(params, x), residual)
    np.testing.assert_allclose(found["layers/layers/2/kernel"], expected, atol=1e-6)


def test_values_that_are_not_finite_name_the_samples():
    with pytest.raises(ValueError, match=r"gradients: .* at 2 of 4 samples \(first: 1, 3\)"):
        gradients.check_finite("gradients", jnp.asarray([1.0, jnp.nan, 0.0, jnp.inf]))
    jax.jit(lambda v: gradients.check_finite("gradients", v) or v)(jnp.asarray([jnp.nan]))


def test_a_loss_that_is_no_scalar_is_refused(problem):
    logits, params, x, labels = problem
    selection = select.select(params, "head")
    with pytest.raises(ValueError, match=r"loss: got a result of shape \(3,\)"):
        gradients.per_sample(logits, lambda out, label: out, selection, params, x, labels)
