"""The transformation itself: hand-calculated relevance, what it accepts as it is and what it refuses."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import xda
from dualxda_jax.xda import composites, rules

EXACT = {"epsilon": 0.0, "stabilizer": 0.0}


def dense(params, x):
    return x @ params["w"].T + params["b"][None]


@pytest.fixture
def two():
    """Two inputs, two outputs; W·a + b = [18, 25]."""
    return {"w": jnp.asarray([[3.0, 4.0], [5.0, 6.0]]), "b": jnp.asarray([7.0, 8.0])}


A = np.asarray([[1.0, 2.0]], np.float32)


def test_epsilon_by_hand(two):
    composite = composites.epsilon(zero_bias=False, **EXACT)
    found = xda.relevance(dense, two, jnp.asarray(A), jnp.asarray([[1 / 3, 2 / 3]]), composite=composite)
    np.testing.assert_allclose(found, [[17 / 90, 316 / 675]], rtol=1e-6)


@pytest.mark.parametrize(("neuron", "expected"), [(0, [4 / 19, 8 / 19]), (1, [5 / 27, 14 / 27])])
def test_skip_connection_by_hand(neuron, expected, two):
    composite = composites.epsilon(zero_bias=False, **EXACT)
    seed = jnp.zeros((1, 2)).at[0, neuron].set(1.0)
    found = xda.relevance(lambda p, x: x + jax.nn.relu(dense(p, x)), two, jnp.asarray(A), seed, composite=composite)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_zeroed_bias_by_hand(two):
    found = xda.relevance(
        dense, two, jnp.asarray(A), jnp.asarray([[11.0, 17.0]]), composite=composites.epsilon(**EXACT)
    )
    np.testing.assert_allclose(found, [[3 + 5, 8 + 12]], rtol=1e-6)


def test_flat_puts_relevance_on_zero_inputs(two):
    found = xda.relevance(
        dense, two, jnp.asarray([[0.0, 3.0]]), jnp.asarray([[1.0, 2.0]]), composite=composites.epsilon_plus_flat()
    )
    np.testing.assert_allclose(found, [[1.5, 1.5]], rtol=1e-5)


def test_w_squared_by_hand(two):
    composite = dataclasses.replace(composites.epsilon(**EXACT), first=rules.WSquare(0.0))
    seed = jnp.asarray([[1.0, 2.0]])
    found = xda.relevance(dense, two, jnp.asarray([[0.0, 5.0]]), seed, composite=composite)
    np.testing.assert_allclose(found, [[9 / 25 + 2 * 25 / 61, 16 / 25 + 2 * 36 / 61]], rtol=1e-6)


def test_gamma_and_epsilon_differ_by_layer(two):
    """γ favours the contributions of the output's sign: (1 + γ)·w⁺; a large ε absorbs."""
    params = {"first": {"w": jnp.asarray([[2.0, -1.0]])}, "second": {"w": jnp.asarray([[3.0]])}}

    def network(params, x):
        return (x @ params["first"]["w"].T) @ params["second"]["w"].T

    overrides = (("first/*", rules.Gamma(0.5, 0.0)), ("second/*", rules.Epsilon(3.0)))
    composite = dataclasses.replace(composites.epsilon(**EXACT), overrides=overrides)
    found = xda.relevance(network, params, jnp.ones((1, 2)), jnp.asarray([[6.0]]), composite=composite)
    arrived = 6.0 * 3 / (3 + 3)  # z = 3 of the second layer, ε = 3
    np.testing.assert_allclose(found, [[arrived * 3 / 2, arrived * -1 / 2]], rtol=1e-6)


def test_zbox_by_hand():
    # z = 2·1 - 1·1 - (2·0 + 0) - (-1·4) = 5; R = (2·1 - 0, -1·1 + 1·4)/5
    composite = composites.epsilon_gamma_box(0.0, 4.0, **EXACT)
    params = {"w": jnp.asarray([[2.0, -1.0]]), "b": jnp.asarray([9.0])}
    found = xda.relevance(dense, params, jnp.ones((1, 2)), jnp.asarray([[5.0]]), composite=composite)
    np.testing.assert_allclose(found, [[2.0, 3.0]], rtol=1e-6)


@pytest.mark.parametrize(("bias", "share"), [("kept", 2 * 3 / (2 * 3 + 4)), ("zero", 1.0)])
def test_a_scale_and_shift_that_nothing_merges_is_a_layer_of_its_own(bias, share):
    """zennit's unmerged BatchNorm passes everything, even where biases are kept; here its shift takes a share."""
    x, seed = jnp.asarray([[3.0, -1.0]]), jnp.asarray([[5.0, 0.0]])

    def network(params, x):
        return jax.nn.relu(2.0 * jax.nn.relu(x) + params[None])

    composite = composites.epsilon(zero_bias=bias == "zero", **EXACT)
    found = xda.relevance(network, jnp.asarray([4.0, 4.0]), x, seed, composite=composite)
    np.testing.assert_allclose(found, [[5 * share, 0.0]], rtol=1e-6)


def test_relevance_is_not_lost_where_only_a_shift_keeps_a_value_from_zero(two):
    """Both ways of calling: relu(-3) = 0, and 0 + 2 is handed all the relevance of the output."""

    def network(params, x):
        hidden = jax.nn.relu(x @ params["w"])
        return jnp.maximum(hidden + params["b"][None], 0.0) @ jnp.ones((2, 1))

    params, x = {"w": -jnp.eye(2), "b": jnp.asarray([2.0, 2.0])}, jnp.asarray([[3.0, -1.0]])
    composite = composites.epsilon(**EXACT)
    found = xda.relevance(network, params, x, jnp.asarray([[5.0]]), composite=composite)
    np.testing.assert_allclose(found, [[2.0, 3.0]], rtol=1e-6)  # 2 of the output's 5 come from 0 + 2, 3 from 1 + 2
    transformed = xda.lrp(functools.partial(network, params), composite=composite)
    np.testing.assert_allclose(x * jax.grad(lambda x: transformed(x)[0, 0])(x), found, rtol=1e-6)
    report = xda.check_conservation(network, params, x, composite=composite, seed=jnp.asarray([[5.0]]))
    assert abs(report.lost) < 1e-6 and all(abs(r.lost) < 1e-5 for r in report.rows)


class Normalised(nn.Module):
    """BatchNorm before and after a convolution, a strided skip, pooling; negative scales among them."""

    train: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not self.train,
            scale_init=nn.initializers.normal(1.0),
            bias_init=nn.initializers.normal(0.3),
        )
        y = nn.Conv(4, (3, 3))(norm()(x))
        y = nn.relu(norm()(y))
        y = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(y)
        x = nn.relu(nn.Conv(4, (1, 1), strides=(2, 2))(y) + norm()(nn.Conv(4, (3, 3), strides=(2, 2))(y)))
        x = nn.max_pool(x, (2, 2), (1, 1)).mean((1, 2))
        return nn.relu(nn.Dense(6)(x))


@pytest.fixture(scope="module")
def normalised():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(Normalised().init)(jax.random.key(0), x)
    statistics = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 2.0, leaf.shape), leaf.dtype), variables["batch_stats"]
    )
    return {"params": variables["params"], "batch_stats": statistics}, x


def merged(variables, x):
    """`Normalised` with every BatchNorm merged into its convolution by hand."""
    params, statistics = variables["params"], variables["batch_stats"]

    def affine(name):
        scale = params[name]["scale"] / jnp.sqrt(statistics[name]["var"] + 1e-5)
        return scale, params[name]["bias"] - statistics[name]["mean"] * scale

    def convolve(x, kernel, stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)

    before, shift_before = affine("BatchNorm_0")
    after, shift_after = affine("BatchNorm_1")
    first = params["Conv_0"]
    kernel = first["kernel"] * after[None, None, None]
    # The shift that comes before the convolution is padded with zeros: at the border it is another bias.
    moved = convolve(jnp.broadcast_to(shift_before[None, None, None], x.shape), kernel, 1)
    bias = moved + (first["bias"] * after + shift_after)[None, None, None]
    y = jax.nn.relu(convolve(x, kernel * before[None, None, :, None], 1) + bias)
    skip = convolve(y, params["Conv_1"]["kernel"], 2) + params["Conv_1"]["bias"][None, None, None]
    scale, shift = affine("BatchNorm_2")
    second = params["Conv_2"]
    z = convolve(y, second["kernel"] * scale[None, None, None], 2) + (second["bias"] * scale + shift)[None, None, None]
    x = nn.max_pool(jax.nn.relu(skip + z), (2, 2), (1, 1)).mean((1, 2))
    return jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])


@pytest.mark.parametrize("bias", ["kept", "zero"])
@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box"])
def test_batchnorm_merges_as_by_hand(name, bias, normalised):
    variables, x = normalised
    bounds = (-4.0, 4.0) if name == "epsilon_gamma_box" else ()
    composite = getattr(composites, name)(*bounds, zero_bias=bias == "zero")
    features = jax.jit(merged)(variables, x)
    np.testing.assert_allclose(Normalised().apply(variables, x), features, atol=1e-5)
    assert features.any(), "the network has to be alive"
    found = xda.relevance(Normalised().apply, variables, x, features, composite=composite)
    expected = xda.relevance(merged, variables, x, features, composite=composite)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_residual_network_conserves(normalised):
    variables, x = normalised
    features = jax.jit(Normalised().apply)(variables, x)
    found = xda.relevance(Normalised().apply, variables, x, features, composite=composites.epsilon_plus())
    np.testing.assert_allclose(found.sum((1, 2, 3)), features.sum(1), rtol=1e-3)


class Mobile(nn.Module):
    """Grouped, depthwise and dilated convolutions, both kinds of pooling, concatenation."""

    @nn.compact
    def __call__(self, x):
        # No biases here: an output that is positive by its bias alone has no input to hand its relevance to.
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        y = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=(2, 2), feature_group_count=2)(x))
        average = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        x = jnp.concatenate([average, nn.max_pool(y, (2, 2), (2, 2))], axis=-1)
        return nn.relu(nn.Dense(6, bias_init=nn.initializers.normal(0.1))(x.mean((1, 2))))


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus_flat"])
def test_grouped_dilated_and_pooled_conserves(name, rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(Mobile().init)(jax.random.key(1), x)
    features = jax.jit(Mobile().apply)(variables, x)
    composite = getattr(composites, name)()
    found = xda.relevance(Mobile().apply, variables, x, features, composite=composite)
    np.testing.assert_allclose(found.sum((1, 2, 3)), features.sum(1), rtol=1e-3)


def test_depthwise_is_the_dense_convolution_with_zeros(rng):
    def depthwise(kernel, x):
        return jax.nn.relu(convolve(x, kernel, groups=3)).sum((1, 2))

    def full(kernel, x):
        return jax.nn.relu(convolve(x, kernel[:, :, 0, :, None] * jnp.eye(3)[None, None], groups=1)).sum((1, 2))

    def convolve(x, kernel, groups):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    x = jnp.asarray(rng.standard_normal((2, 5, 5, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 1, 3)), jnp.float32)
    seed = depthwise(kernel, x)
    composite = composites.epsilon_alpha2_beta1()
    found, expected = (xda.relevance(fn, kernel, x, seed, composite=composite) for fn in (depthwise, full))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_outputs_stay(normalised):
    variables, x = normalised
    transformed = xda.lrp(functools.partial(Normalised().apply, variables), composite=composites.epsilon_plus())
    np.testing.assert_allclose(transformed(x), Normalised().apply(variables, x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:jax.array_ref:DeprecationWarning")  # flax 0.12.0 on jax 0.8.0, at import
def test_nnx_and_linen_give_the_same(two):
    from flax import nnx

    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    layer.kernel[...] = two["w"].T
    layer.bias[...] = two["b"]
    definition, state = nnx.split(layer)
    seed = jnp.asarray([[1.0, -2.0]])
    composite = composites.epsilon()
    found = xda.relevance(
        lambda s, x: jax.nn.relu(nnx.merge(definition, s)(x)), state, jnp.asarray(A), seed, composite=composite
    )
    linen = {"params": {"kernel": two["w"].T, "bias": two["b"]}}
    expected = xda.relevance(
        lambda p, x: jax.nn.relu(nn.Dense(2).apply(p, x)), linen, jnp.asarray(A), seed, composite=composite
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_jit_and_checkpoint_inside_of_the_function_change_nothing(two):
    seed = jnp.asarray([[1.0, -2.0]])

    def wrapped(params, x):
        return jax.checkpoint(jax.jit(lambda v: jax.nn.relu(dense(params, v))))(x) @ params["w"]

    def plain(params, x):
        return jax.nn.relu(dense(params, x)) @ params["w"]

    found, expected = (
        xda.relevance(fn, two, jnp.asarray(A), seed, composite=composites.epsilon()) for fn in (wrapped, plain)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_checkpoint_outside_of_loops_is_kept(two):
    """What jax.checkpoint asked not to keep is computed anew for the relevance as well; rules see through it."""

    def network(params, x, wrap):
        def part(v):
            return jax.nn.relu(jnp.maximum(v @ params["w"], 0.0) + params["b"][None])

        return wrap(part)(wrap(part)(x) - 20.0) @ params["w"]

    dots = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    x, seed = jnp.asarray(A), jnp.asarray([[1.0, -2.0]])
    composite = composites.epsilon()
    plain, kept, policy = (functools.partial(network, wrap=wrap) for wrap in (lambda part: part, jax.checkpoint, dots))
    expected = xda.relevance(plain, two, x, seed, composite=composite)
    np.testing.assert_allclose(xda.relevance(kept, two, x, seed, composite=composite), expected, rtol=1e-6)
    flat = composites.epsilon_plus_flat()
    np.testing.assert_allclose(
        xda.relevance(policy, two, x, seed, composite=flat),
        xda.relevance(plain, two, x, seed, composite=flat),
        rtol=1e-6,
    )
    for fn, expected_policy in ((kept, None), (policy, jax.checkpoint_policies.dots_saveable)):
        transformed = xda.lrp(functools.partial(lambda p, x, fn=fn: fn(p, x), two), composite=composite)
        equations = [e for e in jax.make_jaxpr(transformed)(x).eqns if e.primitive.name in ("checkpoint", "remat2")]
        assert [e.params["policy"] for e in equations] == [expected_policy] * 2


def test_tanh_passes_relevance(two):
    seed = jnp.asarray([[1.0, 2.0]])
    small = jax.tree.map(lambda leaf: leaf / 10, two)
    composite = composites.epsilon(**EXACT)
    found = xda.relevance(lambda p, x: jnp.tanh(dense(p, x)) @ p["w"], small, jnp.asarray(A), seed, composite=composite)
    np.testing.assert_allclose(found.sum(), seed.sum(), rtol=1e-5)


def test_training_batchnorm_is_refused(normalised):
    variables, x = normalised

    def apply(variables, x):
        return Normalised(train=True).apply(variables, x, mutable=["batch_stats"])[0]

    for batch in (x, x[:1]):
        with pytest.raises(xda.NoRuleError, match=r"BatchNorm.*training mode"):
            xda.relevance(apply, variables, batch, jnp.ones((len(batch), 6)), composite=composites.epsilon_plus())


def test_live_dropout_is_refused(normalised):
    variables, x = normalised

    def apply(variables, x):
        return Normalised(dropout=0.5).apply(variables, x, rngs={"dropout": jax.random.key(0)})

    with pytest.raises(xda.NoRuleError, match="dropout"):
        xda.relevance(apply, variables, x, jnp.ones((2, 6)), composite=composites.epsilon_plus())


def test_while_is_refused(two):
    def apply(params, x):
        return jax.lax.while_loop(lambda v: v.sum() < 100, lambda v: 2 * v, dense(params, x))

    with pytest.raises(xda.NoRuleError, match=r"`while`.*reverse"):
        xda.relevance(apply, two, jnp.asarray(A), jnp.ones((1, 2)), composite=composites.epsilon())


class Strange(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.linalg.inv(nn.Dense(4)(x).reshape(-1, 2, 2)).reshape(-1, 4)


def test_an_unknown_operation_is_named_with_its_place():
    variables = Strange().init(jax.random.key(0), jnp.ones((1, 2)))
    with pytest.raises(xda.NoRuleError, match=r"no rule for `\w+` at Strange.*test_transform.py"):
        xda.relevance(Strange().apply, variables, jnp.ones((1, 2)), jnp.ones((1, 4)), composite=composites.epsilon())


def test_an_unknown_operation_on_parameters_alone_is_welcome(two):
    def apply(params, x):
        return x @ jnp.linalg.inv(params["w"]) + params["b"][None]

    found = xda.relevance(apply, two, jnp.asarray(A), jnp.ones((1, 2)), composite=composites.epsilon())
    np.testing.assert_allclose(found.sum(), 2.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_alpha2_beta1_flat"])
def test_lrp_points_to_relevance_for_first_layer_rules(name):
    with pytest.raises(ValueError, match=r"xda\.relevance"):
        xda.lrp(jnp.tanh, composite=getattr(composites, name)())


def test_differentiating_the_transformed_function_takes_other_arguments_along(two):
    def scaled(params, x):
        return jax.nn.relu(dense(params, x)).sum()

    composite = composites.epsilon(zero_bias=False)
    transformed = jax.jit(lambda p, x: jax.grad(xda.lrp(functools.partial(scaled, p), composite=composite))(x))
    # ε with kept biases is the plain gradient, up to ε.
    np.testing.assert_allclose(
        transformed(two, jnp.asarray(A)), jax.grad(scaled, argnums=1)(two, jnp.asarray(A)), rtol=1e-5
    )


def test_an_unknown_operation_can_keep_its_gradient():
    variables = Strange().init(jax.random.key(0), jnp.ones((1, 2)))
    composite = dataclasses.replace(composites.epsilon(), on_unknown="gradient")
    with pytest.warns(UserWarning, match="plain gradient acts instead"):
        found = xda.relevance(Strange().apply, variables, jnp.ones((1, 2)), jnp.ones((1, 4)), composite=composite)
    assert np.isfinite(found).all() and np.any(found)


def test_overrides_that_reach_no_layer_are_warned_of(normalised):
    variables, x = normalised
    composite = dataclasses.replace(composites.epsilon_plus(), overrides=(("conv_*", None), ("Conv_0/*", None)))
    with pytest.warns(
        UserWarning, match=r"overrides: 'conv_\*' matches no layer; the layers here are 'Conv_0/kernel', "
    ):
        xda.explain_rules(Normalised().apply, variables, x, composite=composite)
    with pytest.warns(UserWarning, match="no layer's path is known here"):
        jax.eval_shape(xda.lrp(lambda x: x @ jnp.ones((3, 2)), composite=composite), jnp.ones((2, 3)))


def test_overrides_by_path_reach_their_layer_only(normalised):
    variables, x = normalised
    rule = rules.Gamma(0.1)
    composite = dataclasses.replace(composites.epsilon_plus(), overrides=(("Conv_[12]/*", rule),))
    table = xda.explain_rules(Normalised().apply, variables, x, composite=composite)
    assert [row.path for row in table.rows if row.rule == str(rule)] == ["Conv_1/kernel", "Conv_2/kernel"]
    features = jax.jit(Normalised().apply)(variables, x)
    expected = xda.relevance(Normalised().apply, variables, x, features, composite=composite)
    assert not np.allclose(
        expected, xda.relevance(Normalised().apply, variables, x, features, composite=composites.epsilon_plus())
    )
    # A functools.partial tells the paths as well.
    transformed = xda.lrp(functools.partial(Normalised().apply, variables), composite=composite)
    found = x * jax.jit(lambda x: jax.vjp(transformed, x)[1](jnp.ones_like(features))[0])(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
