"""EK-FAC and K-FAC: where they are exact, what the eigenvalues are, resuming, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines
from dualxda_jax.baselines import gradients, select
from dualxda_jax.baselines.influence import curvature, ekfac, layers
from dualxda_jax.checkpoint import StaleCheckpoint

KEY = jax.random.key(0)


def network(params, x):
    """A convolution with a stride, and a linear layer: four positions and one."""
    layer = params["conv"]
    z = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    z = jnp.tanh(z + layer["bias"][None, None, None]).reshape(x.shape[0], -1)
    return z @ params["head"]["kernel"] + params["head"]["bias"][None]


def squared_loss(logits, label):
    return jnp.sum(jnp.square(logits - jax.nn.one_hot(label, logits.size, dtype=logits.dtype))) / 2


@pytest.fixture(scope="module")
def problem():
    """A context of 13 images, two queries and their targets."""
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (2, 2, 1, 3), "bias": (3,)}, "head": {"kernel": (12, 3), "bias": (3,)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    x = rng.normal(size=(15, 4, 4, 1)).astype(np.float32)
    context = baselines.context(network, params, x[:13], rng.integers(0, 3, 13), num_classes=3, head="head")
    return context, jnp.asarray(x[13:]), jnp.asarray([2, 0])


def run(method, problem):
    context, query, targets = problem
    fitted = method.fit(KEY, context)
    return fitted, method.scores(fitted, query, targets), method.self_influence(fitted)


def relative_error(got, expected):
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.mark.parametrize("kfac", [False, True], ids=["ekfac", "kfac"])
def test_exact_for_a_linear_layer_with_squared_loss(kfac, problem):
    """The curvature in the outputs is the identity whatever the input: a and δ are independent."""
    context, query, targets = problem
    context = dataclasses.replace(context, loss=squared_loss)
    truth = baselines.influence_explicit(params="head", damping=0.1)
    _, expected, own = run(truth, (context, query, targets))
    method = baselines.influence_ekfac(params="head", damping=0.1, fisher="ggn", kfac=kfac, chunk=5)
    _, scores, got = run(method, (context, query, targets))
    assert relative_error(scores, expected) < 1e-5
    assert relative_error(got, own) < 1e-5


def test_exact_and_nothing_to_correct_for_a_single_sample(problem):
    """One sample: its a and δ are constants, so that the curvature of a dense layer is one Kronecker product."""
    context, query, targets = problem
    context = dataclasses.replace(context, inputs=context.inputs[:1], labels=context.labels[:1])
    truth = baselines.influence_explicit(params="head", damping=0.1, hessian="ggn")
    _, expected, _ = run(truth, (context, query, targets))
    for kfac in (False, True):
        method = baselines.influence_ekfac(params="head", damping=0.1, fisher="ggn", kfac=kfac)
        assert relative_error(run(method, (context, query, targets))[1], expected) < 1e-5


def dense_gradients(context, found, selection):
    """[n, inputs, outputs] gradients of every layer at the training labels, by another way."""
    rows = gradients.per_sample(
        network, context.loss, selection, context.params, context.inputs, context.labels, factored=False
    )
    result = {}
    for layer in found.layers:
        kernel = np.asarray(rows[layer.name]).reshape(13, -1)[:, layer.index]
        bias = np.asarray(rows[layer.name.replace("kernel", "bias")])[:, layer.bias_index]
        result[layer.name] = np.concatenate([kernel, bias[:, None]], axis=1)
    return result


def test_eigenvalues_are_the_curvature_along_the_eigenvectors(problem):
    context, query, targets = problem
    method = baselines.influence_ekfac(fisher="empirical", damping=0.1, chunk=5)
    fitted, scores, own = run(method, problem)
    selection = select.select(context.params, "all")
    found = layers.find(network, context.params, context.inputs[0], selection)
    both = dataclasses.replace(
        context,
        inputs=jnp.concatenate([context.inputs[:11], query]),
        labels=jnp.concatenate([context.labels[:11], targets]).astype(jnp.int32),
    )
    training, queries = dense_gradients(context, found, selection), dense_gradients(both, found, selection)
    expected, expected_own = 0.0, 0.0
    for name, basis in fitted.bases.items():
        rotated = np.einsum("nio,ij,op->njp", training[name], basis["inputs"], basis["outputs"])
        np.testing.assert_allclose(basis["values"], np.square(rotated).mean(0), rtol=1e-3, atol=1e-6)
        query_rotated = np.einsum("nio,ij,op->njp", queries[name][11:], basis["inputs"], basis["outputs"])
        inverse = 1 / (np.square(rotated).mean(0) + 0.1)
        expected += np.einsum("qjp,jp,njp->qn", query_rotated, inverse, rotated)
        expected_own += np.einsum("jp,njp->n", inverse, np.square(rotated))
    assert relative_error(scores, expected) < 1e-5
    assert relative_error(own, expected_own) < 1e-5


def test_eigenvectors_are_those_of_the_covariances_of_patches(problem):
    """The convolution's A from patches cut out by hand."""
    context, _, _ = problem
    fitted = baselines.influence_ekfac(fisher="empirical", kfac=True).fit(KEY, context)
    images = np.asarray(context.inputs)[..., 0]
    cut = [images[:, i : i + 2, j : j + 2].reshape(13, 4) for i in (0, 2) for j in (0, 2)]
    patches = np.stack([np.concatenate([p, np.ones((13, 1))], axis=1) for p in cut])
    covariance = np.einsum("tni,tnj->ij", patches, patches) / 13
    basis = fitted.bases["conv/kernel"]
    rotated = np.asarray(basis["inputs"]).T @ covariance @ np.asarray(basis["inputs"])
    np.testing.assert_allclose(rotated, np.diag(np.linalg.eigvalsh(covariance)), atol=1e-4)
    # Products of two eigenvalues: rank 1 over the pairs, and the sums of each are its traces.
    np.testing.assert_allclose(
        basis["values"],
        np.outer(basis["values"].sum(1), basis["values"].sum(0)) / basis["values"].sum(),
        rtol=1e-3,
        atol=1e-7,
    )


def test_sampled_labels_tend_to_the_gauss_newton_matrix(problem):
    """One image 2,000 times: the mean over drawn labels is within a few standard errors of the expectation."""
    context, _, _ = problem
    many = dataclasses.replace(
        context, inputs=jnp.repeat(context.inputs[:1], 2000, axis=0), labels=jnp.zeros(2000, jnp.int32)
    )
    fitted = baselines.influence_ekfac(params="head", fisher="sampled", chunk=500, kfac=True).fit(KEY, many)
    p = np.asarray(jax.nn.softmax(network(context.params, context.inputs[:1])[0]))
    expected = np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(
        fitted.bases["head/kernel"]["values"].sum(0) / fitted.bases["head/kernel"]["values"].sum(),
        expected / expected.sum(),
        atol=0.03,
    )


def test_no_damping_leaves_directions_without_curvature_out(problem):
    context, query, targets = problem
    few = dataclasses.replace(context, inputs=context.inputs[:3], labels=context.labels[:3])
    method = baselines.influence_ekfac(params="head", damping=0.0, fisher="empirical")
    fitted, scores, own = run(method, (few, query, targets))
    assert np.isfinite(np.asarray(scores)).all()
    # The mean of gᵀF⁺g over the training samples counts the directions with curvature.
    values = np.asarray(fitted.bases["head/kernel"]["values"])
    counted = (values > values.max() * np.finfo(np.float32).eps * 13).sum()
    np.testing.assert_allclose(np.mean(own), counted, rtol=1e-3)
    blank = dataclasses.replace(few, inputs=jnp.zeros_like(few.inputs), loss=lambda z, y: jnp.zeros(()) * z[y])
    assert not np.asarray(run(method, (blank, query, targets))[1]).any()


def test_damping_by_the_mean_eigenvalue(problem):
    fitted, scores, _ = run(baselines.influence_ekfac(params="head", damping=None, fisher="empirical"), problem)
    damping = 0.1 * float(fitted.bases["head/kernel"]["values"].mean())
    fixed = baselines.influence_ekfac(params="head", damping=damping, fisher="empirical")
    assert relative_error(scores, run(fixed, problem)[1]) < 1e-5


def test_resumed_from_the_parts_that_are_there(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(ekfac, "_BLOCK", 4)
    context, query, targets = problem
    method = baselines.influence_ekfac(chunk=3, damping=0.1, max_samples=8)
    done = []

    def stop(number, count):
        done.append((number, count))
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baselines.fit_resumable(method, KEY, context, tmp_path, progress=stop)
    assert done[-1] == (4, 5)
    calls = []

    def counted(name, step):
        return lambda *arguments: calls.append(name) or step(*arguments)

    for name in ("covariance_step", "eigenvalue_step"):
        monkeypatch.setattr(ekfac, name, counted(name, getattr(ekfac, name)))
    fitted = baselines.fit_resumable(method, KEY, context, tmp_path)
    assert calls == ["eigenvalue_step"]
    monkeypatch.undo()
    assert relative_error(method.scores(fitted, query, targets), run(method, problem)[1]) < 1e-4
    assert baselines.influence_ekfac(kfac=True).stages.count(context) == 2
    with pytest.raises(StaleCheckpoint):
        baselines.fit_resumable(method, jax.random.key(1), context, tmp_path)


def test_at_most_so_many_samples(problem):
    context, query, targets = problem
    method = baselines.influence_ekfac(fisher="empirical", max_samples=6, kfac=True)
    fitted = method.fit(KEY, context)
    _, _, chosen = ekfac._samples(ekfac.Config(ekfac.Compiled("all", "empirical", 128), 1e-8, True, 6), KEY, context, 0)
    assert len(set(chosen.tolist())) == 6
    same = dataclasses.replace(context, inputs=context.inputs[chosen], labels=context.labels[chosen])
    expected = baselines.influence_ekfac(fisher="empirical", kfac=True).fit(KEY, same)
    for name, basis in fitted.bases.items():
        np.testing.assert_allclose(basis["values"], expected.bases[name]["values"], rtol=1e-3, atol=1e-6)
    assert method.scores(fitted, query, targets).shape == (2, 13)


def test_compiled_once_and_inside_of_a_jit(problem):
    _, query, targets = problem
    method = baselines.influence_ekfac(fisher="empirical", damping=0.1, chunk=5)
    fitted, scores, _ = run(method, problem)
    before = ekfac._scores._cache_size()
    moved = jax.tree.map(lambda a: a * 1.01 if jnp.issubdtype(a.dtype, jnp.floating) else a, fitted)
    method.scores(moved, query + 1, targets)
    baselines.influence_ekfac(fisher="empirical", damping=0.3, chunk=5).scores(fitted, query, targets)
    assert ekfac._scores._cache_size() == before
    assert relative_error(jax.jit(method.scores)(fitted, query, targets), scores) < 1e-6


def test_a_bad_sample_is_named(problem):
    context, _, _ = problem
    spoilt = dataclasses.replace(context, inputs=context.inputs.at[jnp.asarray([4, 9]), 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"gradients of the training samples: got NaN or Inf at 2 \(first: 4\)"):
        baselines.influence_ekfac().fit(KEY, spoilt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1e-3}, "damping: got -0.001"),
        ({"fisher": "exact"}, "fisher: got 'exact', must be one of sampled, empirical, ggn"),
        ({"max_samples": 0}, "max_samples: got 0"),
        ({"chunk": True}, "chunk: got True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        baselines.influence_ekfac(**options)


def test_parameters_that_do_not_exist(problem):
    with pytest.raises(ValueError, match="params: got 'dense_7'"):
        baselines.influence_ekfac(params="dense_7").fit(KEY, problem[0])


def test_gauss_newton_columns_multiply_to_the_hessian():
    logits = jnp.asarray([0.3, -1.0, 2.0])
    columns = curvature.gauss_newton(baselines.protocol.cross_entropy)(logits, jnp.int32(1), KEY)
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(columns.T @ columns, np.diag(p) - np.outer(p, p), atol=1e-6)
