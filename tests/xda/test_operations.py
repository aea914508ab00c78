"""Odd but legitimate functions: relevance is conserved, or one error names the operation and its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dualxda_jax import xda
from dualxda_jax.xda import composites


@jax.custom_jvp
def leaky(x):
    return jnp.where(x > 0, x, 0.1 * x)


leaky.defjvp(lambda primals, tangents: (leaky(*primals), jnp.where(primals[0] > 0, 1.0, 0.1) * tangents[0]))


def hidden(params, x):
    return jax.nn.relu(x @ params["w"]) + 0.1 * jnp.abs(x)


def nested(params, x):
    return jax.jit(lambda v: jax.jit(leaky)(jax.jit(jnp.matmul)(v, params["w"])))(x)


def einsum_with_batch(params, x):
    """A product with a batch axis: every group of entries has weights of its own."""
    return jax.nn.relu(jnp.einsum("bgi,gio->bgo", hidden(params, x).reshape(-1, 3, 2), params["g"])).reshape(-1, 6)


def windows(params, x):
    y = hidden(params, x)
    total = lax.reduce_window(y, 0.0, lax.add, (1, 3), (1, 2), "SAME", window_dilation=(1, 2))
    return total + lax.reduce_window(y, -jnp.inf, lax.max, (1, 3), (1, 2), ((0, 0), (2, 0)))


def moved(params, x):
    y = hidden(params, x)
    start = jnp.argmax(x[0]) % 3
    y = lax.dynamic_update_slice(y, lax.dynamic_slice(y, (0, start), (4, 2)), (0, 1))
    y = jnp.roll(y[:, jnp.asarray([5, 0, 2, 2, 1])], 2, axis=1)
    return lax.pad(y, 0.0, ((0, 0, 0), (-1, 2, 1)))


def scattered(params, x):
    """What graph networks do: sum the messages that go to one node."""
    y = hidden(params, x)
    nodes = jnp.zeros((4, 3)).at[:, jnp.asarray([0, 1, 2, 0, 1, 2])].add(y)
    return nodes + jax.ops.segment_sum(y.T, jnp.asarray([2, 2, 1, 1, 0, 0]), 3).T + y.at[:, 0].set(x[:, 1] ** 2)[:, :3]


def sums(params, x):
    y = jnp.cumsum(hidden(params, x), axis=1)
    return lax.associative_scan(jnp.add, y, axis=1) + lax.cummax(y, axis=1)


def chosen(params, x):
    y = x @ params["w"]
    which = (jnp.abs(x) * 2).astype(jnp.int32).clip(0, 2)
    return lax.select_n(which, y, 2 * y, 3 * y) + lax.clamp(0.0, y, 0.5) + jnp.sort(y, axis=1) + lax.top_k(y, 6)[0]


def smooth(params, x):
    y = x @ params["w"]
    return lax.erf(y) + y**3 + jax.nn.softplus(y) + jax.nn.elu(y) + jax.nn.mish(y) + jax.nn.hard_swish(y) + lax.erfc(y)


def halves(params, x):
    """Parts of one linear layer that meet again: a gate, an outer product."""
    gated = jax.nn.glu(x @ params["w"])
    left, middle, right = jnp.split(x @ params["w"], 3, axis=1)
    return gated[:, :2] * jnp.tanh(left) + middle * jax.nn.sigmoid(right)


def shared(params, x):
    """One layer three times, in parts that stop the gradient of a copy of themselves."""
    y = hidden(params, hidden(params, x))
    return hidden(params, y) / lax.stop_gradient(1 + jnp.abs(y))


def batches_as_groups(params, x):
    kernel = params["g"].reshape(3, 1, 4)[:, :, :2]
    y = lax.conv_general_dilated(
        hidden(params, x)[..., None], kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), batch_group_count=2
    )
    return jax.nn.relu(y).reshape(4, -1)


def transposed(params, x):
    y = lax.conv_transpose(hidden(params, x)[..., None], params["g"].reshape(3, 1, 4), (2,), "SAME")
    return jax.nn.relu(y).reshape(4, -1)


CONSERVING = [
    nested,
    einsum_with_batch,
    windows,
    moved,
    scattered,
    sums,
    chosen,
    smooth,
    halves,
    shared,
    batches_as_groups,
    transposed,
]


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((6, 6)), jnp.float32)}
    params["g"] = jnp.asarray(rng.standard_normal((3, 2, 2)), jnp.float32)
    return params, jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)


@pytest.mark.parametrize("fn", CONSERVING, ids=lambda fn: fn.__name__)
def test_outputs_stay_and_relevance_is_conserved(fn, given):
    params, x = given
    transformed = jax.jit(lambda x: jax.vjp(xda.lrp(functools.partial(fn, params), composite=composites.epsilon()), x))
    outputs, transpose = transformed(x)
    np.testing.assert_allclose(outputs, jax.jit(fn)(params, x), rtol=1e-6, atol=1e-6)
    assert np.all(np.any(np.asarray(outputs), axis=1)), "the function has to be alive"
    # The cotangent y at an output y stands for the relevance y².
    (gradient,) = transpose(outputs)
    np.testing.assert_allclose((x * gradient).sum(), jnp.square(outputs).sum(), rtol=2e-3)


@pytest.mark.parametrize(("fn", "name"), [(scattered, "epsilon"), (halves, "epsilon"), (halves, "epsilon_plus_flat")])
def test_relevance_handed_to_the_output_arrives(fn, name, given):
    params, x = given
    y = jax.jit(fn)(params, x)
    maps = xda.relevance(fn, params, x, y * y, composite=getattr(composites, name)())
    np.testing.assert_allclose(maps.sum(1), (y * y).sum(1), rtol=2e-3)


BY_HAND = {
    "hard_tanh": (jax.nn.hard_tanh, lambda z: jnp.clip(z, -1, 1)),
    "one bound": (lambda z: jnp.where(z > 1, 1.0, z), lambda z: jnp.minimum(z, 1.0)),
    "a bound outside of an interval": (
        lambda z: jnp.where((z > 1) | jnp.logical_not(z >= -1), jnp.sign(z), z),
        lambda z: jnp.clip(z, -1, 1),
    ),
    "a factor": (lambda z: z * (z <= 1).astype(z.dtype) + (z > 1).astype(z.dtype), lambda z: jnp.minimum(z, 1.0)),
    "relu": (lambda z: jnp.where(z > 0, z, 0.0), jax.nn.relu),
    "leaky relu": (lambda z: jnp.where(z < 0, 0.1 * z, z), lambda z: jnp.maximum(z, 0.1 * z)),
}


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus_flat"])
@pytest.mark.parametrize("what", BY_HAND)
def test_functions_by_conditions_are_the_same_functions(what, name):
    w, x = jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), jnp.asarray([[2.0, 1.5], [0.1, 0.05], [-2.0, 0.5]])
    composite = getattr(composites, name)()
    found, expected = (
        xda.relevance(lambda p, x, fn=fn: fn(x @ p), w, x, jnp.ones((3, 2)), composite=composite)
        for fn in BY_HAND[what]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 2.0, rtol=1e-5)


WRITTEN_OUT = {
    "sigmoid": (lambda z: 1 / (1 + jnp.exp(-z)), jax.nn.sigmoid),
    "softplus": (lambda z: jnp.log(1 + jnp.exp(z)), jax.nn.softplus),
    "expm1": (lambda z: jnp.exp(z) - 1, jnp.expm1),
    "bell": (lambda z: jnp.exp(-(z**2)), None),
    "reciprocal": (lambda z: 1 / (1 + z**2), None),
    "square root": (lambda z: jnp.abs(z) ** 0.5, lambda z: jnp.sqrt(jnp.abs(z))),
    "hyperbolic": (lambda z: 2 / (jnp.exp(z) + 1), None),
}


@pytest.mark.parametrize("what", WRITTEN_OUT)
def test_functions_written_out_are_the_same_functions(what):
    w, x = jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), jnp.asarray([[2.0, 1.5], [0.1, 0.05], [-2.0, 0.5]])
    chain, function = WRITTEN_OUT[what]

    def explain(fn):
        return xda.relevance(lambda p, x: fn(x @ p), w, x, jnp.ones((3, 2)), composite=composites.epsilon())

    np.testing.assert_allclose(explain(chain).sum(1), 2.0, rtol=1e-4)
    if function is not None:
        np.testing.assert_allclose(explain(chain), explain(function), rtol=1e-4)


def test_layers_follow_functions_written_out():
    w, x = jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), jnp.asarray([[2.0, 1.5], [0.1, 0.05], [-2.0, 0.5]])
    by_hand, sigmoid = (
        xda.relevance(lambda p, x, fn=fn: fn(x @ p) @ p, w, x, jnp.ones((3, 2)), composite=composites.epsilon())
        for fn in (WRITTEN_OUT["sigmoid"][0], jax.nn.sigmoid)
    )
    np.testing.assert_allclose(by_hand, sigmoid, rtol=1e-4)


def test_a_mask_that_is_no_function_of_what_it_hides_routes(given):
    params, x = given
    causal = jnp.tril(jnp.ones((6, 6), bool))

    def masked(params, x):
        y = x @ params["w"]
        y = jnp.where(x > 0, y, 1.0) + jnp.where(params["w"][:1] > 0, y, 0.0)
        return jnp.where(causal[:4], y, 0.0)

    table = xda.explain_rules(masked, params, x, composite=composites.epsilon())
    assert [row.rule for row in table.rows if row.operation == "select_n"] == ["route"] * 3


REFUSED = {
    "reduce_window": lambda y: lax.reduce_window(y, 1.0, lax.mul, (1, 2), (1, 2), "VALID"),
    "cumprod": lambda y: jnp.cumprod(y, axis=1),
    "log": lambda y: jax.nn.logsumexp(y.reshape(-1, 3, 2), axis=2),
    "log.*": lambda y: jnp.log(jnp.exp(2 * y).sum(1, keepdims=True) / 2),
    "div.*": lambda y: y * (1 / (0.1 + jnp.sqrt((y * y).sum(1, keepdims=True)))),
    "exp.*": lambda y: jnp.exp(-y).sum(1, keepdims=True),
    "cumlogsumexp": lambda y: lax.cumlogsumexp(y, axis=1),
    "convert_element_type.*complex": lambda y: jnp.abs(jnp.fft.fft(y)),
    "convert_element_type.*whole numbers": lambda y: y.astype(jnp.int32).astype(jnp.float32),
    "stop_gradient.*carry no relevance": lambda y: lax.stop_gradient(y),
    "pure_callback": lambda y: jax.pure_callback(np.abs, jax.ShapeDtypeStruct(y.shape, y.dtype), y),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_named_with_its_place(what, given):
    params, x = given
    name, _, reason = what.partition(".*")
    with pytest.raises(xda.NoRuleError, match=rf"no rule for `{name}` at .*test_operations.*{reason}"):
        xda.lrp(lambda x: REFUSED[what](x @ params["w"]), composite=composites.epsilon())(x)
