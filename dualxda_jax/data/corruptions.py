"""Corruptions that the detection metrics look for, as pure functions of (data, key).

They work under `jit`: how many labels are flipped follows from n and fraction, how many images are marked from the
labels, by ranking random numbers. Images are [..., h, w, c], uint8 or floating in 0..1.

Source: arXiv 2402.12118, evaluation ("mislabelling", "shortcut" and "subclass" detection).
"""

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.types import Array

FRAME = 2
SQUARE = 6


def label_noise(
    labels: Array | np.ndarray, key: Array, *, num_classes: int, fraction: float = 0.3
) -> tuple[Array, Array]:
    """Flip a share of the labels, each to another class chosen uniformly.

    Args:
        labels: [n] integers in 0..k-1.
        key: typed PRNG key.
        num_classes: k, at least 2.
        fraction: of the labels to flip, in 0..1; exactly round(fraction · n) are.

    Returns:
        noisy_labels [n], in the dtype of labels, and corrupted [n] bool, True where they differ.

    Raises:
        ValueError: labels that are no integers [n] in 0..k-1, k < 2, fraction outside 0..1, an untyped key.
    """
    _check_common(labels, key, fraction)
    if num_classes < 2:
        _check.fail("num_classes", num_classes, "at least 2")
    _check.class_range("labels", labels, num_classes)
    labels = jnp.asarray(labels)
    (n,) = labels.shape
    key_which, key_class = jax.random.split(key)
    corrupted = jax.random.permutation(key_which, n) < round(fraction * n)
    step = jax.random.randint(key_class, (n,), 1, num_classes)
    # int32 throughout: label + step may not fit into a small dtype such as uint8.
    other = ((labels.astype(jnp.int32) + step) % num_classes).astype(labels.dtype)
    return jnp.where(corrupted, other, labels), corrupted


def shortcut_mark(
    images: Array | np.ndarray,
    labels: Array | np.ndarray,
    key: Array,
    *,
    target_class: int = 2,
    fraction: float = 0.3,
) -> tuple[Array, Array]:
    """Put the mark of `mark` on a share of one class's images.

    Args:
        images: [n, h, w, c] uint8, or floating in 0..1.
        labels: [n] integers.
        key: typed PRNG key.
        target_class: the class; if no image has it, none is marked.
        fraction: of this class's m images to mark, in 0..1; exactly round(fraction · m) are.

    Returns:
        images [n, h, w, c] in their dtype, and marked [n] bool.

    Raises:
        ValueError: images or labels of other shapes or dtypes, different counts, images too small for the mark,
            fraction outside 0..1, target_class < 0, an untyped key.
    """
    _check_common(labels, key, fraction)
    _check.shape("images", images, (len(labels), "h", "w", "c"))
    if target_class < 0:
        _check.fail("target_class", target_class, "at least 0")
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    (n,) = labels.shape
    # A table keeps round(fraction · m) exact where m is known to the run alone; float32 would err at ties.
    counts = jnp.asarray(np.rint(fraction * np.arange(n + 1)).astype(np.int32))
    member = labels == target_class
    order = jnp.argsort(jnp.where(member, jax.random.permutation(key, n), n))
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    marked = member & (rank < counts[member.sum()])
    return jnp.where(marked[:, None, None, None], mark(images), images), marked


def mark(images: Array | np.ndarray) -> Array:
    """Draw the shortcut on every image: a frame of 2 pixels and a 6 × 6 square in the centre, as bright as can be.

    Args:
        images: [..., h, w, c] uint8, or floating in 0..1; h and w at least 10.

    Returns:
        The same shape and dtype, with 255 (floating: 1.0) in all channels of the marked pixels.

    Raises:
        ValueError: another dtype, or too small.
    """
    images = jnp.asarray(images)
    smallest = SQUARE + 2 * FRAME
    if images.ndim < 3 or min(images.shape[-3:-1]) < smallest:
        _check.fail("images", f"shape {images.shape}", f"[..., h, w, c] with h, w >= {smallest}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        _check.fail("images", f"dtype {images.dtype}", "uint8 or floating")
    h, w = images.shape[-3:-1]
    pixels = np.ones((h, w), bool)
    pixels[FRAME:-FRAME, FRAME:-FRAME] = False
    top, left = (h - SQUARE) // 2, (w - SQUARE) // 2
    pixels[top : top + SQUARE, left : left + SQUARE] = True
    brightest = jnp.asarray(255 if images.dtype == jnp.uint8 else 1, images.dtype)
    return jnp.where(pixels.reshape((1,) * (images.ndim - 3) + (h, w, 1)), brightest, images)


def class_groups(labels: Array | np.ndarray) -> Array:
    """Merge classes in pairs: 2i and 2i + 1 become i.

    Args:
        labels: [n] integers in 0..k-1, the fine classes.

    Returns:
        [n] integers in 0..⌈k/2⌉-1, the coarse classes, in the dtype of labels.

    Raises:
        ValueError: labels that are no integers [n].
    """
    _check.shape("labels", labels, ("n",))
    _check.integers("labels", labels)
    return jnp.asarray(labels) // 2


def _check_common(labels: Array | np.ndarray, key: Array, fraction: float) -> None:
    _check.shape("labels", labels, ("n",))
    _check.integers("labels", labels)
    _check.within("fraction", fraction, 0, 1, "in 0..1")
    _check.key("key", key)
