"""Settings that cannot be are refused where a method is made."""

import jax
import numpy as np
import pytest

from dualxda_jax import baselines


@pytest.mark.parametrize("name", sorted(set(baselines.METHODS) - {"random"}))
@pytest.mark.parametrize("value", [0, -5, 1.5, True])
def test_a_chunk_that_is_no_count_is_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=f"chunk: got {value}, must be an integer, 1 or more"):
        baselines.METHODS[name](chunk=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: baselines.dualda_variant(chunk=0), "chunk: got 0"),
        (lambda: baselines.dualda_variant(checkpoints=0), "checkpoints: got 0"),
        (lambda: baselines.dualda_variant(intercept=-1.0), "intercept: got -1"),
        (lambda: baselines.on_features(baselines.graddot(), chunk=0), "chunk: got 0"),
        (lambda: baselines.graddot(memory=-1), "memory: got -1"),
        (lambda: baselines.gradcos(memory="1 GiB"), "memory: got 1 GiB"),
        (lambda: baselines.tracin(memory=float("nan")), "memory: got nan"),
        (lambda: baselines.tracin(checkpoints=0), "checkpoints: got 0"),
        (lambda: baselines.trak(checkpoints=1.5), "checkpoints: got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["a", None, [1.0], True, float("nan"), -1.0])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("representer", "regularization"),
        ("representer", "intercept_scaling"),
        ("representer", "tolerance"),
        ("trak", "regularization"),
        ("dualda_variant", "intercept"),
        ("influence_explicit", "damping"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(name, setting, value):
    with pytest.raises(ValueError, match=f"^{setting}: got "):
        baselines.METHODS[name](**{setting: value})


@pytest.mark.parametrize("value", ["bfloat17", 3, [1], "int32"])
@pytest.mark.parametrize("name", ["graddot", "trak", "influence_ekfac"])
def test_a_dtype_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=r"^dtype: got .*, must be float32, bfloat16"):
        baselines.METHODS[name](dtype=value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("influence_explicit", {"damping": np.float32(0.5)}),
        ("influence_cg", {"damping": np.float32(0.5), "tolerance": np.float32(1e-4)}),
        ("influence_lissa", {"damping": np.float32(0.5), "scale": np.int64(20), "depth": 3, "params": "all"}),
        ("influence_arnoldi", {"regularization": np.float32(0.5), "rank": np.int64(3), "tolerance": np.float32(1e-3)}),
        ("influence_ekfac", {"damping": np.float32(0.5)}),
        ("representer", {"regularization": np.float32(0.5)}),
        ("trak", {"regularization": np.float32(0.5), "projection": np.int64(4)}),
        ("graddot", {"projection": np.int64(4)}),
    ],
)
def test_numbers_of_numpy_are_numbers(name, settings, tiny):
    context, x, targets = tiny
    plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in settings.items()}
    found, wanted = (
        method.scores(method.fit(jax.random.key(0), context), x, targets)
        for method in (baselines.METHODS[name](**given) for given in (settings, plain))
    )
    np.testing.assert_array_equal(found, wanted)
