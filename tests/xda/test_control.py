"""Loops over layers, branches and mapped functions give the relevance of what they unroll to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dualxda_jax import xda
from dualxda_jax.xda import composites, rules


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def params(rng):
    return {"w": 0.5 * normal(rng, 3, 4, 4), "b": 0.3 * normal(rng, 3, 4), "o": normal(rng, 4, 4)}


@pytest.fixture
def x(rng):
    return normal(rng, 2, 4)


def layer(x, w, b):
    return x + jax.nn.gelu(x @ w + b[None])


def scanned(params, x, wrap=lambda body: body):
    def body(x, layers):
        return layer(x, *layers), None

    return jax.lax.scan(wrap(body), x @ params["o"], (params["w"], params["b"]))[0]


def unrolled(params, x):
    x = x @ params["o"]
    for w, b in zip(params["w"], params["b"], strict=True):
        x = layer(x, w, b)
    return x


def same(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "composite",
    [composites.attn_lrp(zero_bias=False), composites.excitation_backprop(), composites.epsilon_plus_flat()],
    ids=lambda c: c.name,
)
def test_a_loop_over_layers_is_its_layers(composite, params, x):
    seed = unrolled(params, x)
    found, expected = (xda.relevance(fn, params, x, seed, composite=composite) for fn in (scanned, unrolled))
    same(found, expected)


def test_a_loop_over_layers_composes(params, x):
    composite = composites.epsilon()
    rematerialised = functools.partial(scanned, wrap=jax.checkpoint)
    transformed = xda.lrp(functools.partial(rematerialised, params), composite=composite)
    np.testing.assert_allclose(transformed(x), unrolled(params, x), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: transformed(x).sum())
    same(x * jax.jit(gradient)(x), xda.relevance(unrolled, params, x, unrolled(params, x), composite=composite))
    # The layers' activations are not kept: that is what checkpoint was asked for.
    (scan,) = (e for e in jax.make_jaxpr(transformed)(x).eqns if e.primitive.name == "scan")
    (whole,) = scan.params["jaxpr"].eqns
    assert whole.primitive.name in ("checkpoint", "remat2", "remat")


def test_a_recurrent_network_is_its_steps(params, rng):
    def recurrent(params, x):
        def body(h, x):
            h = jax.nn.relu(x @ params["w"][0] + h @ params["w"][1] + params["b"][:1])
            return h, h

        last, every = jax.lax.scan(body, jnp.tanh(x[:, 0] @ params["o"]), x.swapaxes(0, 1), reverse=True)
        return last + every.mean(0)

    def steps(params, x):
        h, every = jnp.tanh(x[:, 0] @ params["o"]), []
        for t in reversed(range(x.shape[1])):
            h = jax.nn.relu(x[:, t] @ params["w"][0] + h @ params["w"][1] + params["b"][:1])
            every.append(h)
        return h + functools.reduce(jnp.add, every) / len(every)

    x = normal(rng, 2, 3, 4)
    # A rule for the first layer reaches what reads the input, in every round, and not what reads the carry.
    composite = dataclasses.replace(composites.epsilon(zero_bias=False), first=rules.ZPlus())
    seed = steps(params, x)
    found, expected = (xda.relevance(fn, params, x, seed, composite=composite) for fn in (recurrent, steps))
    same(found, expected)


def test_the_first_round_of_a_loop_cannot_have_a_rule_of_its_own(params, x):
    def loop(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    with pytest.raises(xda.NoRuleError, match="first round of a loop"):
        xda.relevance(loop, params, x, x, composite=composites.epsilon_plus_flat())


def test_first_layer_rules_that_give_relevance_stay_outside_of_loops(params, x):
    def loop(params, x):
        return jax.lax.scan(lambda total, w: (total + x @ w, None), jnp.zeros_like(x), params["w"])[0]

    with pytest.raises(xda.NoRuleError, match="cannot leave a loop"):
        xda.relevance(loop, params, x, x, composite=composites.epsilon_plus_flat())


def test_the_reports_show_every_layer_of_a_loop(params, x):
    table = xda.explain_rules(scanned, params, x, composite=composites.attn_lrp())
    assert [(r.operation, r.path) for r in table.rows if r.path] == [
        ("dot_general", "o"),
        ("scan / dot_general + add", "w"),
    ]
    report = xda.check_conservation(scanned, params, x, composite=composites.attn_lrp(zero_bias=False))
    losing = [r.operation for r in report.rows if abs(r.lost) > 1e-3]
    assert losing == [f"scan[{i}] / dot_general + add" for i in range(3)]
    np.testing.assert_allclose(sum(r.lost for r in report.rows), report.seed - report.input, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_branch_is_what_was_taken(sign, params, x):
    def first(params, x):
        return jax.nn.relu(x @ params["w"][0])

    def second(params, x):
        return x @ params["w"][1] + params["b"][:1]

    def branching(params, x):
        return jax.lax.cond(x[0, 0] > 0, first, second, params, x @ params["o"])

    def taken(params, x):
        return (first if sign > 0 else second)(params, x @ params["o"])

    x = sign * jnp.abs(x)
    composite = composites.epsilon(zero_bias=False)
    seed = taken(params, x)
    expected = xda.relevance(taken, params, x, seed, composite=composite)
    same(xda.relevance(branching, params, x, seed, composite=composite), expected)
    both = jnp.stack([x, -x])
    mapped = jax.vmap(lambda x: xda.relevance(branching, params, x, seed, composite=composite))(both)
    same(mapped[0], expected)
    table = xda.explain_rules(branching, params, x, composite=composite)
    assert {"cond[0] / dot_general + add", "cond[1] / max"} <= {r.operation for r in table.rows}


@pytest.mark.parametrize("kind", ["dropout", "batch statistics"])
def test_what_is_refused_is_refused_inside_of_loops(kind, params, x):
    def noisy(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x @ params["o"], jnp.zeros(())), None

    def normalised(x, key):
        return (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True), None

    def loop(params, x):
        return jax.lax.scan(noisy if kind == "dropout" else normalised, x, jax.random.split(jax.random.key(0), 3))[0]

    with pytest.raises(xda.NoRuleError, match="dropout" if kind == "dropout" else "training mode"):
        xda.relevance(loop, params, x, x, composite=composites.epsilon())


@pytest.mark.parametrize("kind", ["cond", "gather"])
def test_weights_that_the_data_choose_are_named(kind, params, x):
    both = params["w"][:2]

    def one(both, x):
        which = (x.sum() > 0).astype(jnp.int32)
        if kind == "gather":
            return x @ both[which]
        return jax.lax.cond(which, lambda x: x @ both[0], lambda x: x @ both[1], x)

    def branching(both, x):
        return jax.vmap(one, (None, 0))(both, x)

    with pytest.raises(
        xda.NoRuleError, match=r"`dot_general`.*its weights depend on the data.*cond or switch under vmap"
    ):
        xda.relevance(branching, both, x, x, composite=composites.epsilon())

    def chosen(both, x):
        return jnp.where(x.sum(1, keepdims=True) > 0, x @ both[0], x @ both[1])

    found = xda.relevance(chosen, both, x, jnp.ones_like(x), composite=composites.epsilon())
    np.testing.assert_allclose(found.sum(1), x.shape[1], rtol=1e-3)


def net(params, x):
    y = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y + params["c"][None, None, None])
    return jax.nn.relu(y.reshape(y.shape[0], -1) @ params["d"])


@pytest.fixture(scope="module")
def sharded():
    rng = np.random.default_rng(0)
    params = {"k": normal(rng, 3, 3, 2, 4), "c": normal(rng, 4), "d": normal(rng, 4 * 16, 6)}
    x = normal(rng, 8, 4, 4, 2)
    composite = composites.epsilon_plus_flat()
    return params, x, net(params, x), xda.relevance(net, params, x, net(params, x), composite=composite), composite


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_batches_give_the_same_on_every_device(kind, sharded):
    params, x, seed, expected, composite = sharded
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    x, seed = (jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (x, seed))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        found = xda.relevance(net, params, x, seed, composite=composite)
        assert len({shard.index[0].start for shard in found.addressable_shards}) == 8
        same(found, expected)

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d"))
        def mapped(params, x, seed):
            return xda.relevance(net, params, x, seed, composite=composite)

        same(jax.jit(mapped)(params, x, seed), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("chunk_size", [3, 16, 32])
def test_chunks_of_sharded_pairs_give_the_same(chunk_size, kind, sharded):
    params, x, _, _, composite = sharded
    x = jnp.concatenate([x, 2 * x, -x])
    pairs = x, x[::-1], jnp.arange(24.0)
    expected = xda.explain_pairs(net, params, *pairs, composite=composite)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    pairs = jax.device_put(pairs, NamedSharding(mesh, P("d")))
    explain = functools.partial(xda.explain_pairs, net, params, composite=composite, chunk_size=chunk_size)
    for found in (explain(*pairs), jax.jit(explain)(*pairs)):
        jax.tree.map(same, found, expected)
        if kind == AxisType.Explicit:
            assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(found)} == {"d"}


def test_a_function_with_a_mapped_part_is_the_function(sharded):
    params, x, seed, _, _ = sharded
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def split(params, x):
        y = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.relu(y + params["c"][None, None, None])
        product = jax.shard_map(
            lambda a, w: jax.lax.psum(a @ w, "d"), mesh=mesh, in_specs=(P(None, "d"), P("d")), out_specs=P()
        )
        return jax.nn.relu(product(y.reshape(y.shape[0], -1), params["d"]))

    composite = composites.epsilon_plus()
    expected = xda.relevance(net, params, x, seed, composite=composite)
    found = xda.relevance(split, params, x, seed, composite=composite)
    same(found, expected, 1e-3)  # ε of every device's part of the sum
    table = xda.explain_rules(split, params, x, composite=composite)
    assert ("shard_map / dot_general", "d") in [(r.operation, r.path) for r in table.rows]


@pytest.mark.parametrize("inside", ["the function", "the caller"])
def test_batch_statistics_are_refused_on_every_device(inside, sharded):
    """BatchNorm in training mode on a mesh: each device's part of the batch, averaged over the devices."""
    params, x, seed, _, composite = sharded
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x, seed = jnp.concatenate([x, x]), jnp.concatenate([seed, seed])

    def normalised(params, x):
        mean, square = (jax.lax.pmean(v.mean(0, keepdims=True), "d") for v in (x, x * x))
        return net(params, (x - mean) * jax.lax.rsqrt(square - mean * mean + 1e-5))

    specs = {"mesh": mesh, "out_specs": P("d")}

    def mapped(params, x):
        return jax.shard_map(normalised, in_specs=(P(), P("d")), **specs)(params, x)

    with pytest.raises(xda.NoRuleError, match="training mode"):
        if inside == "the function":
            xda.relevance(mapped, params, x, seed, composite=composites.epsilon_plus())
        else:
            explain = functools.partial(xda.relevance, normalised, composite=composite)
            jax.shard_map(explain, in_specs=(P(), P("d"), P("d")), **specs)(params, x, seed)
