"""Corruptions: exact counts, the right places, pure, the same under jit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualxda_jax import data

KEY = jax.random.key(3)


# Few sizes, since each compiles anew.
@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 15, 37]), st.sampled_from([2, 3, 10, 300]), st.floats(0, 1), st.integers(0, 9))
def test_noise_flips_exactly_the_share_and_always_changes_the_class(n, k, fraction, seed):
    labels = np.random.default_rng(seed).integers(0, k, n)
    noisy, corrupted = data.label_noise(labels, jax.random.key(seed), num_classes=k, fraction=fraction)
    noisy, corrupted = np.asarray(noisy), np.asarray(corrupted)
    assert corrupted.dtype == bool and corrupted.sum() == round(fraction * n)
    np.testing.assert_array_equal(noisy != labels, corrupted)
    assert noisy.min() >= 0 and noisy.max() < k


def test_noise_chooses_places_and_other_classes_uniformly():
    labels = np.repeat(np.arange(4), 3000)
    noisy, corrupted = map(np.asarray, data.label_noise(labels, KEY, num_classes=4))
    for c in range(4):
        mine = (labels == c) & corrupted
        assert abs(mine.sum() - 900) < 150  # 6 standard deviations of the hypergeometric count
        counts = np.bincount(noisy[mine], minlength=4)
        assert counts[c] == 0
        assert np.all(np.abs(np.delete(counts, c) - mine.sum() / 3) < 100)  # 7 of the multinomial one


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_noise_keeps_the_dtype_without_overflow(dtype):
    labels = np.full(200, 199, dtype)
    noisy, corrupted = data.label_noise(labels, KEY, num_classes=200, fraction=1.0)
    assert noisy.dtype == dtype and bool(corrupted.all()) and int(noisy.max()) < 199


def test_noise_is_a_function_of_the_key_and_the_same_under_jit():
    labels = np.arange(50) % 10
    noise = partial(data.label_noise, num_classes=10)
    first, again, traced = noise(labels, KEY), noise(labels, KEY), jax.jit(noise)(labels, KEY)
    for got in (again, traced):
        np.testing.assert_array_equal(first[0], got[0])
        np.testing.assert_array_equal(first[1], got[1])
    assert np.any(np.asarray(noise(labels, jax.random.key(4))[1]) != np.asarray(first[1]))


def pixels(h, w):
    expected = np.zeros((h, w), bool)
    expected[:2] = expected[-2:] = True
    expected[:, :2] = expected[:, -2:] = True
    expected[h // 2 - 3 : h // 2 + 3, w // 2 - 3 : w // 2 + 3] = True
    return expected


@pytest.mark.parametrize(("dtype", "bright"), [(np.uint8, 255), (np.float32, 1.0), (jnp.bfloat16, 1.0)])
@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (2, 32, 32, 3), (12, 20, 1)])
def test_mark_is_a_frame_and_a_square(rng, dtype, bright, shape):
    images = jnp.asarray(rng.integers(0, 2, shape) * 0.5, dtype)
    got = data.mark(images)
    assert got.dtype == images.dtype and got.shape == shape
    where = np.broadcast_to(pixels(*shape[-3:-1])[..., None], shape)
    assert np.all(np.asarray(got)[where] == bright)
    np.testing.assert_array_equal(np.asarray(got)[~where], np.asarray(images)[~where])


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1, 5, 30]), st.floats(0, 1), st.integers(0, 9))
def test_shortcut_marks_exactly_the_share_of_one_class_alone(n, fraction, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    images = rng.integers(0, 255, (n, 12, 12, 1)).astype(np.uint8)
    got, marked = data.shortcut_mark(images, labels, jax.random.key(seed), fraction=fraction)
    got, marked = np.asarray(got), np.asarray(marked)
    assert marked.sum() == round(fraction * int((labels == 2).sum()))
    assert np.all(labels[marked] == 2)
    np.testing.assert_array_equal(got[~marked], images[~marked])
    np.testing.assert_array_equal(got[marked], np.asarray(data.mark(images))[marked])


def test_shortcut_is_the_same_under_jit_and_differs_by_key(rng):
    labels = np.arange(60) % 3
    images = rng.random((60, 12, 12, 3)).astype(np.float32)
    put = partial(data.shortcut_mark, target_class=1, fraction=0.5)
    eager, traced = put(images, labels, KEY), jax.jit(put)(images, labels, KEY)
    np.testing.assert_array_equal(eager[0], traced[0])
    np.testing.assert_array_equal(eager[1], traced[1])
    assert int(traced[1].sum()) == 10
    assert np.any(np.asarray(put(images, labels, jax.random.key(4))[1]) != np.asarray(eager[1]))


def test_groups_merge_pairs():
    assert data.class_groups(np.arange(7)).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert jax.jit(data.class_groups)(jnp.arange(4)).tolist() == [0, 0, 1, 1]


LABELS = np.array([0, 1, 2])
IMAGES = np.zeros((3, 12, 12, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: data.label_noise(LABELS, KEY, num_classes=1), "^num_classes: got 1"),
        (lambda: data.label_noise(LABELS, KEY, num_classes=2), "^labels: got 2 at position 2"),
        (lambda: data.label_noise(LABELS * 1.0, KEY, num_classes=3), "^labels: got dtype float64"),
        (lambda: data.label_noise(LABELS, KEY, num_classes=3, fraction=1.1), "^fraction: got 1.1"),
        (lambda: data.label_noise(LABELS, KEY, num_classes=3, fraction="a"), "^fraction: got 'a', must be in 0..1"),
        (lambda: data.shortcut_mark(IMAGES, LABELS, KEY, fraction=None), "^fraction: got None"),
        (lambda: data.label_noise(LABELS, jnp.zeros(2, jnp.uint32), num_classes=3), "^key: got"),
        (lambda: data.label_noise(LABELS, 0, num_classes=3), "^key: got int"),
        (lambda: data.shortcut_mark(IMAGES[:2], LABELS, KEY), "^images: got shape"),
        (lambda: data.shortcut_mark(IMAGES, LABELS, KEY, target_class=-1), "^target_class: got -1"),
        (lambda: data.mark(IMAGES[:, :9]), "^images: got shape"),
        (lambda: data.mark(IMAGES.astype(np.int32)), "^images: got dtype int32"),
        (lambda: data.class_groups(LABELS[None]), "^labels: got shape"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
