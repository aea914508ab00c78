"""What holds for every registered method."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines

NAMES = sorted(baselines.METHODS)
CONTROLS = {"random"}
# Where the defaults, which are the paper's, are made for large networks and data sets: too much work, directions that
# end too early, and a damping that lets what few samples do not determine count for everything.
OPTIONS: dict[str, dict] = {
    "influence_arnoldi": {"tolerance": 1e-3},
    "influence_ekfac": {"damping": None},
    "influence_lissa": {"depth": 100, "repeats": 2},
}


def make(name):
    return baselines.METHODS[name](**OPTIONS.get(name, {}))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tiny):
    context, queries, targets = tiny
    method = make(request.param)
    fitted = method.fit(jax.random.key(0), context)
    return method, fitted, method.scores(fitted, queries, targets)


def test_fields_and_argument_names(case):
    method, _, _ = case
    assert isinstance(method, baselines.Method) and method.name in NAMES
    try:
        names = [list(inspect.signature(f).parameters) for f in (method.fit, method.scores, method.self_influence)]
    except ValueError:
        pytest.skip("a built function without a signature")
    assert [n[-2:] for n in names[:1]] == [["key", "context"]]
    assert names[1][-3:] == ["fitted", "x", "targets"]
    assert names[2][-1:] == ["fitted"]


def test_shapes_and_dtypes(case, tiny):
    context, queries, _ = tiny
    method, fitted, scores = case
    n = context.labels.shape[0]
    assert scores.shape == (len(queries), n) and scores.dtype == jnp.float32
    influence = method.self_influence(fitted)
    assert influence.shape == (n,) and influence.dtype == jnp.float32
    assert np.isfinite(scores).all() and np.isfinite(influence).all()


def test_samples_of_the_target_speak_for_it(case, tiny):
    context, _, targets = tiny
    method, _, scores = case
    same = np.asarray(targets)[:, None] == np.asarray(context.labels)[None, :]
    scores = np.asarray(scores)
    margin = np.array([s[m].mean() - s[~m].mean() for s, m in zip(scores, same, strict=True)])
    if method.name in CONTROLS:
        assert abs(margin).max() < 5 * np.sqrt(1 / 16 + 1 / 32)
    else:
        assert (margin > 0).all()


def test_scores_of_a_surrogate_sum_to_its_logits(case, tiny):
    context, queries, targets = tiny
    method, fitted, scores = case
    if method.name not in ("dualda", "representer"):
        pytest.skip("not a surrogate")
    weights = fitted.support.weights if method.name == "dualda" else fitted.weights
    expected = jnp.einsum("qd,qd->q", context.features(context.params, queries), weights[targets])
    np.testing.assert_allclose(scores.sum(1), expected, rtol=1e-3, atol=1e-5)
    assert len(np.unique(np.asarray(scores))) > 6


def test_another_target_is_another_question(case, tiny):
    context, queries, targets = tiny
    method, fitted, scores = case
    other = method.scores(fitted, queries, (targets + 1) % 3)
    assert not np.allclose(other, scores, rtol=1e-3, atol=1e-7)
    if method.name not in CONTROLS:
        same = np.asarray((targets + 1) % 3)[:, None] == np.asarray(context.labels)[None, :]
        assert np.asarray(other)[same].mean() > np.asarray(scores)[same].mean()


def test_scores_are_the_same_under_jit_and_one_by_one(case, tiny):
    _, queries, targets = tiny
    method, fitted, scores = case
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(jnp.abs(scores).max())}
    np.testing.assert_allclose(jax.jit(method.scores)(fitted, queries, targets), scores, **tolerance)
    one = method.scores(fitted, queries[2:3], targets[2:3])
    np.testing.assert_allclose(one, scores[2:3], **tolerance)


def shapes(jaxpr):
    """Shapes of everything that a traced function computes, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_self_influence_is_computed_without_all_pairs(case, tiny):
    method, fitted, _ = case
    n = tiny[0].labels.shape[0]
    # No other size of this problem is n, or reaches it twice in one array.
    found = list(shapes(jax.make_jaxpr(method.self_influence)(fitted).jaxpr))
    assert found and not [s for s in found if sum(size >= n for size in s) > 1 and s.count(n) > 1]


def test_the_same_key_gives_the_same_fit(case, tiny):
    context, queries, targets = tiny
    method, _, scores = case
    again = make(method.name)
    np.testing.assert_array_equal(again.scores(again.fit(jax.random.key(0), context), queries, targets), scores)


def test_fits_are_pytrees(case):
    _, fitted, _ = case
    leaves, structure = jax.tree.flatten(fitted)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert type(jax.tree.unflatten(structure, leaves)) is type(fitted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.zeros(2, jnp.int32)}, "targets: got shape"),
        ({"targets": jnp.full(6, 3, jnp.int32)}, r"targets: got 3 at position 0.* must be in 0\.\.2"),
        ({"targets": jnp.zeros(6)}, "targets: got dtype float32"),
        ({"x": jnp.zeros((6, 3, 3))}, "x: got shape"),
    ],
)
def test_queries_that_cannot_be(case, tiny, change, message):
    method, fitted, _ = case
    _, queries, targets = tiny
    arguments = {"x": queries, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        method.scores(fitted, arguments["x"], arguments["targets"])


def test_no_queries_have_no_scores(case, tiny):
    method, fitted, scores = case
    _, queries, targets = tiny
    found = method.scores(fitted, queries[:0], targets[:0])
    assert found.shape == (0, scores.shape[1]) and found.dtype == scores.dtype
    with pytest.raises(ValueError, match="targets: got shape"):
        method.scores(fitted, queries[:0], targets)
    with pytest.raises(ValueError, match="x: got shape"):
        method.scores(fitted, queries[:0, 0], targets[:0])


def test_keys_are_typed(case, tiny):
    method, _, _ = case
    for key in (0, jax.random.PRNGKey(0)):
        with pytest.raises(ValueError, match=r"key: got .* must be a typed key"):
            method.fit(key, tiny[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 4}, r"num_classes: got 4, must be that of the network, .* \[1, 3\]"),
        ({"learning_rates": [float("nan")]}, "learning_rates: got .* must be finite"),
    ],
)
def test_contexts_that_cannot_be(tiny, change, message):
    known = tiny[0]
    given = {"num_classes": 3} | change
    with pytest.raises(ValueError, match=message):
        baselines.context(known.logits, known.params, known.inputs, known.labels, **given)


@pytest.mark.parametrize("name", NAMES)
def test_samples_that_are_all_alike_give_finite_scores(name, tiny):
    """Constant features, equal gradients within a class, singular kernels."""
    context, queries, targets = tiny
    alike = dataclasses.replace(context, inputs=jnp.zeros_like(context.inputs))
    method = make(name)
    fitted = method.fit(jax.random.key(0), alike)
    assert np.isfinite(method.scores(fitted, queries, targets)).all()
    assert np.isfinite(method.self_influence(fitted)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", None),
        ("loss", 3),
        ("features", 3),
        ("inputs", np.full((4, 3), "a")),
        ("inputs", np.ones((4, 3)) * 1j),
        ("num_classes", "2"),
        ("num_classes", None),
        ("checkpoints", 3),
        ("checkpoints", {"w": np.ones((3, 2), np.float32)}),
        ("checkpoints", ({"w": np.ones((2, 2), np.float32)},)),
        ("checkpoints", ({"v": np.ones((3, 2), np.float32)},)),
    ],
)
def test_what_a_context_cannot_hold_is_refused_by_name(name, value):
    given = {"logits": lambda params, x: x @ params["w"], "params": {"w": np.ones((3, 2), np.float32)}}
    given |= {"inputs": np.ones((4, 3), np.float32), "labels": np.arange(4) % 2, "num_classes": 2}
    assert baselines.context(**given).num_classes == 2
    with pytest.raises(ValueError, match=f"^{name}: got "):
        baselines.context(**given | {name: value})
