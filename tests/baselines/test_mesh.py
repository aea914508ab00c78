"""Samples over a mesh of eight devices: every kind of kernel and every method, equal to one device."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import baselines
from dualxda_jax.baselines import gradients, placement, rows, select
from dualxda_jax.baselines.protocol import cross_entropy

KEY = jax.random.key(0)
DENSE = {
    "graddot": {},
    "gradcos": {"projection": 4},
    "tracin": {"memory": 0},
    "trak": {"projection": 4},
    "representer": {"regularization": 0.1},
    "similarity": {},
    "influence_explicit": {"damping": 0.1},
    "influence_cg": {"damping": 0.1, "max_iterations": 4, "chunk": 16, "vectors": 2},
    "influence_lissa": {"damping": 0.1, "scale": 50.0, "depth": 4, "repeats": 1, "hessian": "ggn"},
    "influence_arnoldi": {"rank": 3, "krylov": 5, "tolerance": 1e-3},
    "influence_ekfac": {"damping": 0.1, "chunk": 16},
}


def convolve(x, kernel, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def network(params, x):
    """A depthwise kernel, one that is used twice, one that is scaled before, and one in a loop."""
    h = jnp.tanh(convolve(x, params["depthwise"], 2))
    h = jnp.tanh(convolve(jnp.tanh(convolve(h, params["twice"])), params["twice"]))
    h = convolve(h, params["scaled"] / jnp.sqrt(jnp.square(params["scaled"]).sum()))
    h = jax.lax.scan(lambda h, _: (jnp.tanh(convolve(h, params["loop"])), None), h, length=2)[0]
    return h.mean(axis=(1, 2)) @ params["head"]


@pytest.fixture(scope="module")
def kernels():
    """A context of 16 images for `network`."""
    rng = np.random.default_rng(0)
    shapes = {"depthwise": (2, 2, 1, 2), "head": (2, 3)} | dict.fromkeys(("twice", "scaled", "loop"), (2, 2, 2, 2))
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(16, 3, 3, 2)).astype(np.float32)
    return baselines.context(network, params, x, rng.integers(0, 3, 16), num_classes=3)


@pytest.fixture(scope="module")
def dense():
    """A context of 32 samples for a perceptron."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("a", (4, 5)), ("b", (5, 3)))}
    hidden = lambda params, x: jnp.tanh(x @ params["a"])  # noqa: E731
    x = rng.normal(size=(32, 4)).astype(np.float32)
    return baselines.context(
        lambda params, x: hidden(params, x) @ params["b"],
        params,
        x,
        rng.integers(0, 3, 32),
        num_classes=3,
        features=hidden,
        head="b",
    )


def over_devices(context, kind):
    """The context with its samples sharded over eight devices, and how to place what all devices hold."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows_over, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = {name: jax.device_put(getattr(context, name), rows_over) for name in ("inputs", "labels")}
    return mesh, dataclasses.replace(jax.device_put(context, everywhere), **placed), everywhere


def test_gradients_of_every_kind_of_kernel(kernels):
    selection = select.select(kernels.params, "all")
    chosen = jax.jit(
        lambda x, y: gradients.per_sample(network, cross_entropy, selection, kernels.params, x, y, factored=False)
    )
    _, over, _ = over_devices(kernels, AxisType.Auto)
    one = jax.jit(jax.grad(lambda params, x, y: cross_entropy(network(params, x[None])[0], y)))
    alone = [one(kernels.params, x, y) for x, y in zip(kernels.inputs, kernels.labels, strict=True)]
    expected = rows.flat({name: jnp.stack([g[name] for g in alone]) for name in kernels.params})
    for found in (chosen(kernels.inputs, kernels.labels), chosen(over.inputs, over.labels)):
        np.testing.assert_allclose(rows.flat(found), expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_layers_through_every_kind_of_kernel(kernels):
    assert set(baselines.influence.left_out(kernels)) == {"depthwise", "scaled", "loop"}
    compare("influence_ekfac", kernels, AxisType.Auto)


@pytest.mark.parametrize("name", DENSE)
def test_methods(name, dense):
    compare(name, dense, AxisType.Auto)


@pytest.mark.parametrize("name", ["graddot", "trak", "representer", "influence_cg", "influence_ekfac"])
def test_explicit_axes(name, dense):
    compare(name, dense, AxisType.Explicit)


@pytest.mark.parametrize("name", [name for name in DENSE if name != "gradcos"])
def test_chunks_that_the_devices_do_not_divide(name, dense):
    """jax 0.8 has no name for the place of a result that lies over a part of a mesh's axis."""
    compare(name, dense, AxisType.Auto, chunk=2)


@pytest.mark.parametrize("name", ["graddot", "trak", "influence_explicit", "influence_cg", "influence_arnoldi"])
def test_queries_that_lie_over_the_devices(name, dense):
    _, over, _ = over_devices(dense, AxisType.Auto)
    vectors = {"vectors": 8} if name == "influence_cg" else {}
    method = baselines.METHODS[name](**DENSE[name] | {"chunk": 2} | vectors)
    queries, targets = dense.inputs[:16] + 0.1, dense.labels[:16]
    placed = (jax.device_put(a, over.inputs.sharding) for a in (queries, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", baselines.influence.NotConvergedWarning)
        expected = method.scores(method.fit(KEY, dense), queries, targets)
        found = method.scores(method.fit(KEY, over), *placed)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


def test_the_devices_of_a_mesh_round_chunks_up(dense):
    mesh, over, _ = over_devices(dense, AxisType.Auto)
    ask = placement.automatic(lambda x: jax.jit(lambda x: gradients.spread(3))(x))
    assert (ask(dense.inputs), ask(over.inputs), ask(dense.inputs)) == (3, 8, 3)
    # In a trace no mesh can be set: the one that is set counts.
    assert jax.jit(ask)(over.inputs) == 3
    with jax.set_mesh(mesh):
        assert jax.jit(ask)(over.inputs) == 8


def compare(name, context, kind, **options):
    """Scores and self-influence over the mesh and on one device."""
    method = baselines.METHODS[name](**DENSE[name] | options)
    mesh, over, everywhere = over_devices(context, kind)
    queries, targets = context.inputs[:3] + 0.1, context.labels[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", baselines.influence.NotConvergedWarning)
        fitted = method.fit(KEY, context)
        here = method.scores(fitted, queries, targets), method.self_influence(fitted)
        with jax.set_mesh(mesh):
            fitted = method.fit(KEY, over)
            queries, targets = (jax.device_put(a, everywhere) for a in (queries, targets))
            there = method.scores(fitted, queries, targets), method.self_influence(fitted)
    for a, b in zip(there, here, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_explicit_axes_in_a_trace_are_refused(dense):
    mesh, over, _ = over_devices(dense, AxisType.Explicit)
    method = baselines.similarity("inputs")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"an array: got traced over the Explicit mesh axes"):
        jax.jit(lambda context: method.self_influence(method.fit(KEY, context)))(over)
