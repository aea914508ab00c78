"""Batches: one shape, every sample once; images as floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import data


def make(n):
    images = (np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 3, 1), np.uint8)).astype(np.uint8)
    return images, np.arange(n, dtype=np.int32) + 100


@pytest.mark.parametrize("n", [1, 11, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 8, 32, 50])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_sample_once_in_one_shape(n, batch_size, shuffled):
    images, labels = make(n)
    key = jax.random.key(0) if shuffled else None
    got = list(data.batches(images, labels, batch_size=batch_size, key=key))
    assert len(got) == -(-n // batch_size)
    for batch in got:
        assert batch.inputs.shape == (batch_size, 2, 3, 1) and batch.inputs.dtype == np.float32
        assert batch.labels.shape == batch.mask.shape == (batch_size,)
        assert batch.labels.dtype == np.int32 and batch.mask.dtype == bool
        assert not batch.inputs[~batch.mask].any() and not batch.labels[~batch.mask].any()
        pixels = np.round(batch.inputs[batch.mask][:, 0, 0, 0] * 255)
        np.testing.assert_array_equal(pixels + 100, batch.labels[batch.mask])
    seen = np.concatenate([batch.labels[batch.mask] for batch in got])
    np.testing.assert_array_equal(np.sort(seen) if shuffled else seen, labels)


def test_order_follows_the_key():
    images, labels = make(33)

    def order(seed):
        return np.concatenate([b.labels for b in data.batches(images, labels, batch_size=11, key=jax.random.key(seed))])

    np.testing.assert_array_equal(order(0), order(0))
    assert np.any(order(0) != order(1)) and np.any(order(0) != labels)


def test_batches_hold_what_to_float_gives_and_leave_other_dtypes_alone():
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    labels = np.zeros(4, np.int32)
    (batch,) = data.batches(images, labels, batch_size=4)
    np.testing.assert_allclose(batch.inputs, np.asarray(data.to_float(images)), rtol=1e-6)
    (batch,) = data.batches(images.astype(np.int32), labels, batch_size=4)
    np.testing.assert_array_equal(batch.inputs, images)
    assert batch.inputs.dtype == np.int32


def test_a_batch_is_a_pytree():
    (batch,) = data.batches(*make(3), batch_size=4)
    assert int(jax.jit(lambda b: jnp.where(b.mask, b.labels, 0).sum())(batch)) == 303


@pytest.mark.parametrize(
    ("images", "labels", "size", "says"),
    [
        (*make(3), 0, "^batch_size: got 0"),
        (*make(3), 1.5, "^batch_size: got 1.5, must be an integer"),
        (make(3)[0], make(4)[1], 2, "^labels: got 4 labels, must be 3"),
        (make(3)[0], np.zeros(3), 2, "^labels: got dtype float64"),
        (np.zeros((0, 2)), np.zeros(0, int), 2, "^images: got shape"),
    ],
)
def test_bad_arguments_raise_at_the_call(images, labels, size, says):
    with pytest.raises(ValueError, match=says):
        data.batches(images, labels, batch_size=size)


def test_keys_are_typed():
    with pytest.raises(ValueError, match=r"^key: got int"):
        data.batches(*make(3), batch_size=2, key=0)


def test_to_float():
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    got = data.to_float(images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, images.astype(np.float32) / np.float32(255), rtol=1e-6)
    assert float(got.min()) == 0 and float(got.max()) == 1
    np.testing.assert_allclose(jax.jit(data.to_float)(images), got, rtol=1e-6)
    half = jnp.full(3, 0.5, jnp.bfloat16)
    assert data.to_float(half).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"^images: got dtype int32"):
        data.to_float(np.zeros(3, np.int32))
