"""Settings that cannot be are refused where a method is made."""

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
