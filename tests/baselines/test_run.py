"""Fits that resume, scores to a file, the best samples, samples over a mesh, and bad input."""

import dataclasses
import errno
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines, checkpoint, svm


@pytest.fixture(scope="module")
def fitted(tiny):
    context, queries, targets = tiny
    method = baselines.graddot(params="head")
    fit = method.fit(jax.random.key(0), context)
    return method, fit, np.asarray(method.scores(fit, queries, targets))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_scores_in_chunks_to_memory_and_to_a_file(fitted, tiny, tmp_path, chunk):
    _, queries, targets = tiny
    method, fit, scores = fitted
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    here = baselines.scores_to(method, fit, np.asarray(queries), targets, chunk=chunk, progress=report)
    np.testing.assert_allclose(here, scores, rtol=1e-5, atol=1e-6)
    assert seen[-1] == (6, 6) and len(seen) == -(-6 // chunk)
    path = tmp_path / "scores.npy"
    there = baselines.scores_to(method, fit, queries, targets, path, chunk=chunk)
    assert isinstance(there, np.memmap) and not there.flags.writeable
    np.testing.assert_array_equal(np.load(path), here)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npy"]


def test_the_file_appears_when_it_is_complete(fitted, tiny, tmp_path):
    _, queries, targets = tiny
    method, fit, _ = fitted

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baselines.scores_to(method, fit, queries, targets, tmp_path / "scores.npy", chunk=2, progress=stop)
    assert not (tmp_path / "scores.npy").exists()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 5, 96])
def test_top_k_is_the_sorted_matrix(fitted, tiny, k, largest):
    _, queries, targets = tiny
    method, fit, scores = fitted
    top = baselines.top_k(method, fit, queries, targets, k=k, largest=largest, chunk=4)
    order = np.argsort(-scores if largest else scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.take_along_axis(scores, np.asarray(top.index), axis=1), top.scores, rtol=1e-5, atol=1e-6
    )


class Killed(Exception):
    pass


def counted(method, calls, stop_at=None):
    """The method, noting which parts are computed, and dying before one of them."""

    def part(key, context, earlier):
        if len(earlier) == stop_at:
            raise Killed
        calls.append(len(earlier))
        return method.stages.part(key, context, earlier)

    return dataclasses.replace(method, stages=dataclasses.replace(method.stages, part=part))


@pytest.mark.parametrize("name", ["tracin", "trak"])
def test_an_interrupted_fit_goes_on_from_where_it_was(name, tiny, tmp_path):
    context, queries, targets = tiny
    key = jax.random.key(0)
    method = baselines.METHODS[name]()
    calls = []
    with pytest.raises(Killed):
        baselines.fit_resumable(counted(method, calls, stop_at=1), key, context, tmp_path)
    resumed = baselines.fit_resumable(counted(method, calls), key, context, tmp_path)
    assert calls == [0, 1]
    again = baselines.fit_resumable(counted(method, calls), key, context, tmp_path)
    assert calls == [0, 1]
    plain = method.fit(key, context)
    for fit in (resumed, again):
        np.testing.assert_array_equal(method.scores(fit, queries, targets), method.scores(plain, queries, targets))
    changed = [
        (method, jax.random.key(1), context),
        (method, key, dataclasses.replace(context, labels=context.labels[::-1])),
        (method, key, dataclasses.replace(context, logits=lambda p, x: 2 * context.logits(p, x))),
        (baselines.METHODS[name](params="head"), key, context),
    ]
    for other in changed:
        with pytest.raises(checkpoint.StaleCheckpoint):
            baselines.fit_resumable(*other, tmp_path)
    # A part whose writing was cut off is computed again.
    (tmp_path / f"{name}-0001" / "manifest.json").unlink()
    baselines.fit_resumable(counted(method, calls), key, context, tmp_path)
    assert calls == [0, 1, 1]


def test_only_methods_with_stages_resume(tiny, tmp_path):
    with pytest.raises(ValueError, match="method: got 'random'"):
        baselines.fit_resumable(baselines.random(), jax.random.key(0), tiny[0], tmp_path)


@pytest.mark.parametrize("name", ["graddot", "trak", "representer", "similarity", "dualda"])
def test_samples_over_a_mesh_give_the_same_scores(name, tiny):
    context, queries, targets = tiny
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # DualDA's dual variables need not be unique: one method for both, which takes several devices.
    options = {"config": svm.SolverConfig(method="newton")} if name == "dualda" else {}
    method = baselines.METHODS[name](**options)
    if name == "trak":
        context = dataclasses.replace(context, checkpoints=context.checkpoints[-1:], learning_rates=jnp.ones(1))
    here = method.scores(method.fit(jax.random.key(0), context), queries, targets)
    sharded = jax.device_put(context, everywhere)
    sharded = dataclasses.replace(
        sharded, inputs=jax.device_put(context.inputs, over), labels=jax.device_put(context.labels, over)
    )
    fit = method.fit(jax.random.key(0), sharded)
    there = method.scores(fit, jax.device_put(queries, everywhere), jax.device_put(targets, everywhere))
    scale = float(jnp.abs(here).max())
    # DualDA solves for its coefficients: equal to what the solver's tolerance leaves.
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=(1e-3 if name == "dualda" else 1e-4) * scale)
    if name in ("graddot", "trak"):
        rows = [a for a in jax.tree.leaves(fit.parts if name == "graddot" else fit.solved) if a.ndim > 1]
        assert rows and all(a.sharding.is_equivalent_to(over, a.ndim) for a in rows)


def test_bad_input_is_one_clear_line(tiny):
    context, *_ = tiny
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"params: got 'nothing', must be .*head/kernel"):
        baselines.graddot(params="nothing").fit(key, context)
    with pytest.raises(ValueError, match="projection: got 500, must be at most"):
        baselines.tracin(projection=500).fit(key, context)
    with pytest.raises(ValueError, match="projection: got 500, must be at most"):
        baselines.trak(projection=500).fit(key, context)
    with pytest.raises(ValueError, match="checkpoints: got 3, must be at least 1 and at most 2"):
        baselines.trak(checkpoints=3).fit(key, context)
    with pytest.raises(ValueError, match=r"context\.features: got None"):
        baselines.similarity().fit(key, dataclasses.replace(context, features=None))
    with pytest.raises(ValueError, match="chunk: got 0"):
        baselines.graddot(chunk=0)
    for name in (
        "graddot",
        "influence_explicit",
        "influence_cg",
        "influence_lissa",
        "influence_arnoldi",
        "influence_ekfac",
    ):
        with pytest.raises(ValueError, match="dtype: got int32"):
            baselines.METHODS[name](dtype="int32")
    with pytest.raises(ValueError, match="regularization: got -1"):
        baselines.trak(regularization=-1.0)
    with pytest.raises(ValueError, match="regularization: got 0"):
        baselines.representer(0.0)
    with pytest.raises(ValueError, match="space: got 'pixels'"):
        baselines.similarity("pixels")
    with pytest.raises(ValueError, match="measure: got 'l1'"):
        baselines.similarity(measure="l1")


@pytest.mark.parametrize("name", ["graddot", "gradcos", "tracin", "trak"])
def test_gradients_in_bfloat16(name, tiny):
    context, queries, targets = tiny
    options = {"regularization": 1e-2} if name == "trak" else {}
    found = []
    for dtype in (None, "bfloat16"):
        method = baselines.METHODS[name](dtype=dtype, **options)
        fit = method.fit(jax.random.key(0), context)
        found.append(np.asarray(method.scores(fit, queries, targets)))
        if name != "trak" and dtype is not None:
            assert {a.dtype for part in fit.parts for a in jax.tree.leaves(part["rows"])} == {jnp.dtype(jnp.bfloat16)}
    assert found[1].dtype == np.float32 and (found[0] != found[1]).any()
    # Eight bits of mantissa in each of two factors; TRAK's inverse enlarges them.
    cosine = (found[0] * found[1]).sum(1) / np.linalg.norm(found[0], axis=1) / np.linalg.norm(found[1], axis=1)
    assert cosine.min() > (0.99 if name == "trak" else 0.999)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("explicit", {}),
        ("cg", {}),
        ("lissa", {"depth": 100, "repeats": 2}),
        ("arnoldi", {"tolerance": 1e-3}),
        ("ekfac", {"damping": None}),
    ],
)
def test_influence_functions_in_bfloat16(name, options, tiny):
    """What is multiplied after the inverse is rounded, and nothing before it."""
    context, queries, targets = tiny
    scores, own = [], []
    for dtype in (None, "bfloat16"):
        method = baselines.METHODS[f"influence_{name}"](dtype=dtype, **options)
        fit = method.fit(jax.random.key(0), context)
        scores.append(np.asarray(method.scores(fit, queries, targets)))
        own.append(np.asarray(method.self_influence(fit)))
    assert scores[1].dtype == np.float32 and (scores[0] != scores[1]).any()
    cosine = (scores[0] * scores[1]).sum(1) / np.linalg.norm(scores[0], axis=1) / np.linalg.norm(scores[1], axis=1)
    # At a damping of 1e-3 the solutions are long beside their products with gradients; LiSSA and EK-FAC: 0.99999.
    assert cosine.min() > (0.9999 if name in ("lissa", "ekfac") else 0.998)
    # Arnoldi keeps the gradients along its directions, which self-influence is made of.
    np.testing.assert_allclose(own[1], own[0], rtol=0, atol=(0.01 if name == "arnoldi" else 1e-6) * own[0].max())


@pytest.mark.parametrize("name", sorted(baselines.METHODS))
def test_a_network_in_bfloat16_has_scores_in_float32(name):
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(4, 5))}, "b": {"kernel": rng.normal(size=(5, 3))}}
    x, labels = rng.normal(size=(33, 4)), np.arange(33) % 3
    hidden = lambda params, x: jnp.tanh(x @ params["a"]["kernel"])  # noqa: E731
    logits = lambda params, x: hidden(params, x) @ params["b"]["kernel"]  # noqa: E731
    options = {
        "influence_arnoldi": {"rank": 5, "krylov": 10, "tolerance": 1e-3, "hessian": "ggn"},
        "influence_cg": {"damping": 0.1},
        "influence_ekfac": {"damping": 0.1, "fisher": "ggn"},
        "influence_explicit": {"damping": 0.1, "hessian": "ggn"},
        "influence_lissa": {"damping": 0.1, "scale": 20.0, "depth": 20, "repeats": 1, "hessian": "ggn"},
        "trak": {"regularization": 1.0},
    }
    method = baselines.METHODS[name](**options.get(name, {}))
    scores = []
    for dtype in (jnp.bfloat16, jnp.float32):
        # The same numbers in both.
        held, inputs = jax.tree.map(lambda a, to=dtype: jnp.asarray(a, jnp.bfloat16).astype(to), (params, x))
        context = baselines.context(logits, held, inputs[:30], labels[:30], num_classes=3, features=hidden, head="b")
        fit = method.fit(jax.random.key(0), context)
        scores.append(np.asarray(method.scores(fit, inputs[30:], labels[30:])))
        assert scores[-1].dtype == method.self_influence(fit).dtype == np.float32
    cosine = (scores[0] * scores[1]).sum(1) / np.linalg.norm(scores[0], axis=1) / np.linalg.norm(scores[1], axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("name", ["graddot", "trak", "representer"])
def test_a_sample_that_is_not_finite_is_named(name, tiny):
    context, *_ = tiny
    broken = dataclasses.replace(context, inputs=context.inputs.at[7].set(jnp.nan))
    with pytest.raises(ValueError, match=r"(gradients|features): got NaN or Inf at 1 of 96 samples \(first: 7\)"):
        baselines.METHODS[name]().fit(jax.random.key(0), broken)


def test_a_folder_for_parts_that_is_a_file_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^folder: got the file '.*file', must be a folder$"):
        baselines.fit_resumable(baselines.graddot(params="head"), jax.random.key(0), tiny[0], tmp_path / "file")


def test_methods_may_share_the_folder_of_their_parts(tiny, tmp_path):
    context, queries, targets = tiny
    for method in (baselines.tracin(params="head"), baselines.graddot(params="head")):
        resumed = baselines.fit_resumable(method, jax.random.key(0), context, tmp_path)
        plain = method.fit(jax.random.key(0), context)
        np.testing.assert_array_equal(method.scores(resumed, queries, targets), method.scores(plain, queries, targets))
    with pytest.raises(checkpoint.StaleCheckpoint):
        baselines.fit_resumable(baselines.graddot(params="head"), jax.random.key(1), context, tmp_path)


def test_a_path_for_scores_that_cannot_be_is_named(fitted, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method, fit, _ = fitted
    with pytest.raises(ValueError, match=r"^out: got 'no/such/dir/s\.npy', must be in a folder that is there$"):
        baselines.scores_to(method, fit, *tiny[1:], "no/such/dir/s.npy")
    assert baselines.scores_to(method, fit, *tiny[1:], "s.npy").shape == (6, 96)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"^out: got the folder 'folder\.npy', must be the path of a \.npy file$"):
        baselines.scores_to(method, fit, *tiny[1:], "folder.npy")


def test_scores_beyond_the_space_of_a_disk_are_an_error_and_not_a_crash(fitted, tiny, tmp_path, monkeypatch):
    """What is written through a memory map onto a full disk ends the process with SIGBUS."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("space cannot be asked for here")

    def full(file, start, size):
        raise OSError(errno.ENOSPC, f"No space left on device for {size} bytes")

    method, fit, _ = fitted
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=f"for {128 + 6 * 96 * 4} bytes"):
            baselines.scores_to(method, fit, *tiny[1:], tmp_path / "s.npy")
    assert not list(tmp_path.iterdir())
    assert baselines.scores_to(method, fit, *tiny[1:], tmp_path / "s.npy").shape == (6, 96)


def test_a_query_that_is_not_finite_is_named(fitted, tiny):
    _, queries, targets = tiny
    method, fit, _ = fitted
    broken = queries.at[4].set(jnp.inf)
    with pytest.raises(ValueError, match=r"scores: got NaN or Inf at 1 of 6 samples \(first: 4\)"):
        method.scores(fit, broken, targets)
    similarity = baselines.similarity("inputs")
    fit = similarity.fit(jax.random.key(0), tiny[0])
    with pytest.raises(ValueError, match="scores: got NaN or Inf for query 4"):
        baselines.scores_to(similarity, fit, broken, targets, chunk=2)
    with pytest.raises(ValueError, match="scores: got NaN or Inf for query 4"):
        baselines.top_k(similarity, fit, broken.at[4].set(jnp.nan), targets, k=2, chunk=2)
    fit = fitted[1]
    with pytest.raises(ValueError, match=r"at 1 of 2 samples \(first: 0\).* \(in the chunk of queries from 4\)"):
        baselines.scores_to(method, fit, broken, targets, chunk=2)
    with pytest.raises(ValueError, match=r"out: got 'x\.bin'"):
        baselines.scores_to(method, fit, queries, targets, "x.bin")
    with pytest.raises(ValueError, match="k: got 97"):
        baselines.top_k(method, fitted[1], queries, targets, k=97)


@pytest.mark.parametrize(
    "method",
    [
        baselines.similarity(measure="cos"),
        baselines.similarity("inputs", "cos"),
        baselines.dualda_variant(normalize=True),
        baselines.gradcos(),
    ],
    ids=lambda method: method.name,
)
def test_lengths_are_no_guard_against_nan(method, tiny):
    context, queries, targets = tiny
    fit = method.fit(jax.random.key(0), context)
    broken = queries.at[1].set(jnp.nan)
    scores = np.asarray(jax.jit(method.scores)(fit, broken, targets))
    assert np.isnan(scores[1]).any() and np.isfinite(np.delete(scores, 1, axis=0)).all()
    for run in (baselines.scores_to, functools.partial(baselines.top_k, k=2)):
        with pytest.raises(ValueError, match=r"scores: got NaN or Inf (for query 1|at 1 of 6 samples)"):
            run(method, fit, broken, targets)


def test_the_cosine_of_a_zero_vector_is_zero(tiny):
    context, queries, targets = tiny
    method = baselines.similarity("inputs", "cos")
    fit = method.fit(jax.random.key(0), dataclasses.replace(context, inputs=context.inputs.at[3].set(0)))
    scores = np.asarray(method.scores(fit, queries.at[1].set(0), targets))
    assert (scores[1] == 0).all() and (scores[:, 3] == 0).all() and (np.delete(scores, 1, axis=0)[:, :3] != 0).all()
    np.testing.assert_array_equal(method.self_influence(fit), np.arange(96) != 3)


@pytest.mark.parametrize("name", ["graddot", "gradcos"])
def test_a_sample_without_a_gradient_scores_zero(name, tiny):
    context, queries, targets = tiny
    # The loss of label 2 is constant.
    silent = dataclasses.replace(context, loss=lambda z, y: jnp.where(y == 2, 0.0, -jax.nn.log_softmax(z)[y]))
    method = baselines.METHODS[name]()
    fit = method.fit(jax.random.key(0), silent)
    scores = np.asarray(method.scores(fit, queries, targets))
    of_two = np.asarray(context.labels) == 2
    assert (scores[:, of_two] == 0).all() and (scores[np.asarray(targets) == 2] == 0).all()
    assert (scores[np.asarray(targets) != 2][:, ~of_two] != 0).all()
    assert (np.asarray(method.self_influence(fit))[of_two] == 0).all()


@pytest.mark.parametrize("largest", [True, False])
def test_nan_does_not_rank_last(largest, tiny):
    context, x, targets = tiny
    n = len(context.labels)
    row = jnp.arange(n, dtype=jnp.float32).at[n // 2].set(jnp.nan)
    method = baselines.Method("own", lambda key, c: c, lambda c, x, t: jnp.tile(row, (len(x), 1)), lambda c: row)
    with pytest.raises(ValueError, match="scores: got NaN or Inf for query 0"):
        baselines.top_k(method, context, x, targets, k=2, largest=largest)


@pytest.mark.parametrize("shape", [(3, 2), (2,)])  # an outer product, and none
def test_a_parameter_may_have_any_name(shape, tmp_path):
    rng = np.random.default_rng(0)
    logits = lambda params, x: x @ params["outer"] if len(shape) == 2 else x[:, :2] * params["outer"][None]  # noqa: E731
    params = {"outer": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    x = rng.normal(size=(5, 3)).astype(np.float32)
    context = baselines.context(logits, params, x, np.arange(5) % 2, num_classes=2)
    method, key = baselines.tracin(), jax.random.key(0)
    wanted = method.scores(method.fit(key, context), x, np.arange(5) % 2)
    for _ in range(2):  # the second one reads what the first wrote
        fitted = baselines.fit_resumable(method, key, context, tmp_path)
        np.testing.assert_array_equal(method.scores(fitted, x, np.arange(5) % 2), wanted)
