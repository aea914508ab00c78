import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import checkpoint, features

Batch = collections.namedtuple("Batch", ["inputs", "labels", "mask"])
PARAMS = {"w": np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)}


def feature_fn(params, x):
    return jnp.tanh(jnp.matmul(x, params["w"], precision=jax.lax.Precision.HIGHEST))


def make(rng, sizes):
    return [(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 4, n)) for n in sizes]


def expected(batches):
    return np.tanh(np.concatenate([b[0] for b in batches]) @ PARAMS["w"])


@pytest.mark.parametrize("sizes", [[1], [8, 8], [3, 20, 8, 0, 1], [33]])
def test_any_batches_in_one_compiled_shape(sizes, rng):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return feature_fn(params, x)

    batches = make(rng, sizes)
    for _ in range(2):
        got = features.extract(counted, PARAMS, iter(batches), batch_size=8)
    assert traces == [(8, 5)]
    assert np.allclose(got.values, expected(batches), atol=1e-6)
    assert np.array_equal(got.labels, np.concatenate([b[1] for b in batches]))


def test_masked_rows_are_dropped(rng):
    ((inputs, labels),) = make(rng, [10])
    mask = np.arange(10) % 3 != 1
    got = features.extract(feature_fn, PARAMS, [Batch(inputs, labels, mask)], batch_size=4)
    assert np.allclose(got.values, expected([(inputs[mask], 0)]), atol=1e-6)
    assert np.array_equal(got.labels, labels[mask])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_unsharded(kind, rng):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    batches = make(rng, [13, 30])
    plain = features.extract(feature_fn, PARAMS, batches, batch_size=16)
    for spec in (PartitionSpec("data"), PartitionSpec(("data", "model"))):
        sharded = features.extract(feature_fn, PARAMS, batches, batch_size=16, sharding=NamedSharding(mesh, spec))
        assert np.allclose(sharded.values, plain.values, atol=1e-6)
        assert np.array_equal(sharded.labels, plain.labels)
    with pytest.raises(ValueError, match="batch_size: got 12, must be a multiple of 8"):
        features.extract(feature_fn, PARAMS, batches, batch_size=12, sharding=NamedSharding(mesh, spec))


def test_bfloat16_and_progress(rng):
    batches, seen = make(rng, [4, 4, 2]), []
    got = features.extract(
        feature_fn, PARAMS, batches, batch_size=4, dtype=jnp.bfloat16, progress=lambda *a: seen.append(a)
    )
    assert got.values.dtype == jnp.bfloat16 and seen == [(1, 3), (2, 3), (3, 3)]
    assert np.allclose(np.asarray(got.values, np.float32), expected(batches), atol=1e-2)


def test_bad_input_is_named(rng):
    ((x, y),) = make(rng, [9])
    bad = x.copy()
    bad[2], bad[7, 0] = np.nan, np.nan
    cases = [
        ([], 4, "batches: got no samples"),
        ([(x, y.astype(np.float32))], 4, "labels"),
        ([(x, y[1:])], 4, "labels"),
        ([x], 4, "batches"),
        (None, 4, "batches: got a NoneType, must be an iterable"),
        ([(x, y), (x[:, :1], y)], 4, r"batches: got inputs of shape .* in batch 2, must be of .* as before"),
        ([(x, y), (x, y - y.max() - 1)], 4, "labels: got -.* in batch 2, must be 0 or more"),
        ([(x, y)], 0, "batch_size"),
        ([(x, y)], 2.5, "batch_size: got 2.5, must be an integer"),
        ([(bad, y)], 4, "NaN or Inf in 2 of 9 rows .first: 2, 7"),
    ]
    for batches, size, message in cases:
        with pytest.raises(ValueError, match=message):
            features.extract(feature_fn, PARAMS, batches, batch_size=size)
    with pytest.raises(ValueError, match="feature_fn: got a NoneType, must be a function"):
        features.extract(None, PARAMS, [(x, y)], batch_size=4)
    with pytest.raises(ValueError, match="feature_fn"):
        features.extract(lambda p, x: x[..., None], PARAMS, [(x, y)], batch_size=4)
    with pytest.raises(ValueError, match="fingerprint"):
        features.extract(feature_fn, PARAMS, [(x, y)], batch_size=4, cache="somewhere")


def test_an_interrupted_extraction_goes_on(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_CACHE_ROWS", 8)
    batches, ran = make(rng, [6] * 6), []

    def interrupted():
        yield from batches[:4]
        raise KeyboardInterrupt

    def watched(params, x):
        jax.debug.callback(lambda: ran.append(1))
        return feature_fn(params, x)

    def run(batches, params=PARAMS, name="made by"):
        got = features.extract(watched, params, batches, batch_size=6, cache=tmp_path, fingerprint=name)
        jax.effects_barrier()
        return got

    with pytest.raises(KeyboardInterrupt):
        run(interrupted())
    jax.effects_barrier()
    assert len(ran) == 4
    ran.clear()
    assert np.allclose(run(batches).values, expected(batches), atol=1e-6)
    assert 0 < len(ran) < 6
    ran.clear()
    assert np.allclose(run(iter(batches)).values, expected(batches), atol=1e-6)
    assert not ran
    stale = [(batches, {"w": PARAMS["w"] + 1}, "made by"), (batches, PARAMS, "another")]
    stale += [(list(itertools.islice(batches, 2)), PARAMS, "made by"), (batches[::-1], PARAMS, "made by")]
    for arguments in stale:
        with pytest.raises(checkpoint.StaleCheckpoint):
            run(*arguments)


def test_parts_behind_a_damaged_one_are_not_taken_for_its_followers(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_CACHE_ROWS", 8)
    x, y = rng.normal(size=(36, 5)).astype(np.float32), np.zeros(36, int)  # labels that tell no rows apart
    run = functools.partial(features.extract, feature_fn, PARAMS, cache=tmp_path, fingerprint="made by")
    run([(x, y)], batch_size=6)
    (tmp_path / "part-000001" / "manifest.json").unlink()

    def interrupted():
        yield x[:24], y[:24]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), batch_size=4)
    assert np.allclose(run([(x, y)], batch_size=4).values, expected([(x, y)]), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat17", 3, "int32"])
def test_a_dtype_that_is_none_is_refused_by_name(dtype):
    batches = [(np.ones((2, 3), np.float32), np.zeros(2, np.int32))]
    with pytest.raises(ValueError, match=r"^dtype: got .*, must be float32, bfloat16"):
        features.extract(lambda params, x: x, None, batches, batch_size=2, dtype=dtype)
