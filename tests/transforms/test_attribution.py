"""Attribution under jit, vmap, grad, other dtypes and on a mesh, without compiling the same shapes twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import attribution
from dualxda_jax.types import DualSolution, SolveInfo, SupportModel

S, K, D, Q, N = 48, 3, 5, 16, 64

FUNCTIONS = {
    "scores": attribution.scores,
    "dense": lambda model, query, targets: attribution.dense(model, attribution.scores(model, query, targets)),
    "top_k": functools.partial(attribution.top_k, k=4),
    "self_influence": lambda model, query, targets: attribution.self_influence(model),
    "logits": lambda model, query, targets: attribution.logits(model, query),
}


@pytest.fixture(params=sorted(FUNCTIONS))
def function(request):
    return FUNCTIONS[request.param]


def make_arguments(rng, dtype=jnp.float32):
    labels = rng.integers(0, K, S)
    coefficients = np.eye(K)[labels] - rng.dirichlet(np.ones(K), S)
    features = rng.normal(size=(S, D))
    model = SupportModel(
        coefficients=jnp.asarray(coefficients, dtype),
        features=jnp.asarray(features, dtype),
        labels=jnp.asarray(labels),
        index=jnp.asarray(np.sort(rng.permutation(N)[:S]), jnp.int32),
        weights=jnp.asarray(coefficients.T @ features, dtype),
        intercept=jnp.asarray(0.25 * coefficients.sum(0), dtype),
        intercept_scaling=0.5,
        train_size=N,
    )
    return model, jnp.asarray(rng.normal(size=(Q, D)), dtype), jnp.asarray(rng.integers(0, K, Q))


def assert_close(got, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected)


def test_jit(rng, function):
    arguments = make_arguments(rng)
    assert_close(jax.jit(function)(*arguments), function(*arguments))


def test_same_shapes_compile_once(rng, function):
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return function(*arguments)

    jax.block_until_ready([counted(*make_arguments(rng)) for _ in range(3)])
    assert len(traces) == 1


def test_public_functions_do_not_recompile(rng, function):
    # Twice, because the first call may still make the small programs of its surroundings.
    jax.block_until_ready([function(*make_arguments(rng)) for _ in range(2)])
    arguments = make_arguments(rng)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        jax.block_until_ready(function(*arguments))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "compile" in name]


def test_vmap_over_models_and_queries(rng, function):
    cases = [make_arguments(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    got = jax.vmap(function)(*stacked)
    for number, case in enumerate(cases):
        assert_close(jax.tree.map(lambda leaf, i=number: leaf[i], got), function(*case))


def test_vmap_over_targets_alone(rng):
    model, query, _ = make_arguments(rng)
    all_targets = jnp.broadcast_to(jnp.arange(K)[:, None], (K, Q))
    got = jax.vmap(lambda t: attribution.scores(model, query, t))(all_targets)
    assert_close(got.sum(2).T, attribution.logits(model, query))


def float_outputs(function, targets):
    """`function` of the differentiable arguments, its outputs that have a derivative as one list."""

    def of(coefficients, features, query, model):
        changed = SupportModel(**{**vars(model), "coefficients": coefficients, "features": features})
        out = function(changed, query, targets)
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    return of


def test_grad_against_central_differences(rng, x64, function):
    model, query, targets = make_arguments(rng, jnp.float64)
    of = functools.partial(float_outputs(function, targets), model=model)
    primals = (model.coefficients, model.features, query)
    tangents = tuple(jnp.asarray(rng.normal(size=p.shape)) for p in primals)
    step = 1e-6
    ahead, behind = (of(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True))) for sign in (1.0, -1.0))
    numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    out, forward = jax.jvp(of, primals, tangents)
    assert_close(forward, numeric, rtol=1e-6, atol=1e-7)
    weight = [jnp.asarray(rng.normal(size=o.shape)) for o in out]
    backward = jax.vjp(of, *primals)[1](weight)
    one = sum(jnp.vdot(w, f) for w, f in zip(weight, forward, strict=True))
    other = sum(jnp.vdot(b, t) for b, t in zip(backward, tangents, strict=True))
    assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_keep_the_dtype(rng, dtype, function):
    model, query, targets = make_arguments(rng, dtype)
    of = functools.partial(float_outputs(function, targets), model=model)
    total = lambda *p: sum(jnp.sum(leaf) for leaf in of(*p))  # noqa: E731
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(model.coefficients, model.features, query)
    assert all(g.dtype == dtype and bool(jnp.isfinite(g.astype(jnp.float32)).all()) for g in gradients)


# Which rows lie across the mesh: those of the queries, those of the support vectors, or both.
@pytest.mark.parametrize(("query_rows", "model_rows"), [("data", None), (None, "data"), ("data", "data")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_unsharded(rng, function, kind, query_rows, model_rows):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model, query, targets = arguments = make_arguments(rng)

    def place(array, rows):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(rows)))

    rows = {name: place(getattr(model, name), model_rows) for name in ("coefficients", "features", "labels", "index")}
    whole = {name: place(getattr(model, name), None) for name in ("weights", "intercept")}
    sharded = SupportModel(**{**vars(model), **rows, **whole})
    got = function(sharded, place(query, query_rows), place(targets, query_rows))
    assert_close(got, function(*arguments))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(function)(sharded, place(query, query_rows), place(targets, query_rows)), got)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_queries_give_sharded_results(rng, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model, query, targets = make_arguments(rng)
    spread = NamedSharding(mesh, PartitionSpec("data"))
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    query, targets = jax.device_put((query, targets), spread)
    for name in ("scores", "dense", "top_k", "logits"):
        for leaf in jax.tree.leaves(FUNCTIONS[name](model, query, targets)):
            assert leaf.sharding.shard_shape(leaf.shape)[0] == Q // 8, name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_compress_of_a_sharded_solution(rng, kind):
    model, _, _ = make_arguments(rng)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    coefficients = jnp.where((jnp.arange(S) % 3 > 0)[:, None], model.coefficients, 0)
    info = SolveInfo(*(jnp.zeros(()) for _ in range(3)), jnp.int32(1), jnp.array(True))
    solution = DualSolution(jax.device_put(coefficients, rows), model.weights, model.intercept, 0.5, info)
    got = attribution.compress(jax.device_put(model.features, rows), jax.device_put(model.labels, rows), solution)
    kept = np.flatnonzero(np.arange(S) % 3 > 0)
    np.testing.assert_array_equal(got.index, kept)
    np.testing.assert_array_equal(got.features, np.asarray(model.features)[kept])
    np.testing.assert_array_equal(got.coefficients, np.asarray(model.coefficients)[kept])
    np.testing.assert_array_equal(got.labels, np.asarray(model.labels)[kept])
