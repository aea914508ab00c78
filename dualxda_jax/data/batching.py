"""Batches of one shape, and images as floats."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.types import Array, Batch


def batches(
    images: Array | np.ndarray, labels: Array | np.ndarray, *, batch_size: int, key: Array | None = None
) -> Iterator[Batch]:
    """One pass over a data set in batches that all have the same shape, as a network takes them.

    Batches are numpy arrays. uint8 images become float32 in 0..1 (as by `to_float`), a batch at a time; other dtypes
    stay.

    Args:
        images: [n, ...].
        labels: [n] integers.
        batch_size: b; the last batch is filled up with zeros to it.
        key: typed PRNG key to shuffle with; None keeps the order.

    Returns:
        ⌈n/b⌉ batches: inputs [b, ...], labels [b], mask [b], False in the rows that were filled up.

    Raises:
        ValueError: at the call, not at the first batch: counts that differ, n = 0, a batch_size that is no
            integer of 1 or more.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check.shape("labels", labels, ("n",))
    _check.integers("labels", labels)
    if images.ndim == 0 or len(images) == 0:
        _check.fail("images", f"shape {images.shape}", "[n, ...] with n >= 1")
    if len(images) != len(labels):
        _check.fail("labels", f"{len(labels)} labels", f"{len(images)}, one for each image")
    _check.positive_integer("batch_size", batch_size)
    if key is not None:
        _check.key("key", key)
    order = None if key is None else np.asarray(jax.random.permutation(key, len(images)))
    return _pass(images, labels, batch_size, order)


def _pass(images: np.ndarray, labels: np.ndarray, batch_size: int, order: np.ndarray | None) -> Iterator[Batch]:
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        rows = part if order is None else order[part]
        inputs, targets = images[rows], labels[rows]
        mask = np.arange(batch_size) < len(inputs)
        inputs = inputs.astype(np.float32) / np.float32(255) if inputs.dtype == np.uint8 else inputs
        yield Batch(_fill(inputs, batch_size), _fill(targets, batch_size), mask)


def _fill(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array


def to_float(images: Array | np.ndarray) -> Array:
    """Images as the network takes them; works under `jit`.

    Args:
        images: any shape, uint8 or floating.

    Returns:
        uint8: float32 in 0..1, value / 255. Floating: as it is.

    Raises:
        ValueError: another dtype.
    """
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if images.dtype != jnp.uint8:
        _check.fail("images", f"dtype {images.dtype}", "uint8 or floating")
    return images.astype(jnp.float32) / 255
