"""Readers of CIFAR-10's binary version and of numpy's files."""

import warnings
from collections.abc import Sequence
from os import PathLike

import numpy as np

from dualxda_jax.data.errors import bad, read_bytes
from dualxda_jax.types import ImageData

Path = str | PathLike[str]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32


def read_cifar10(paths: Path | Sequence[Path]) -> ImageData:
    """Read batches of CIFAR-10's "binary version".

    A record is one byte of label, then 1,024 bytes each of red, green and blue, row by row
    (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        paths: one .bin file, or several to be put one after the other.

    Returns:
        Images [n, 32, 32, 3] uint8 and labels [n] int32 in 0..9.

    Raises:
        DataError: missing, empty or truncated, or a label outside 0..9 (another format).
    """
    paths = [paths] if isinstance(paths, str | PathLike) else list(paths)
    parts = []
    for path in paths:
        content = read_bytes(path)
        if not content or len(content) % _RECORD:
            raise bad(path, f"{len(content)} bytes", f"whole records of {_RECORD} bytes (CIFAR-10, binary version)")
        records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
        check_labels(records[:, 0], len(CIFAR10_CLASSES), path)
        parts.append(records)
    images = np.empty((sum(map(len, parts)), 32, 32, 3), np.uint8)
    start = 0
    for records in parts:
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        for channel in range(3):
            images[start : start + len(records), ..., channel] = planes[:, channel]
        start += len(records)
    return ImageData(images, np.concatenate([records[:, 0] for records in parts]).astype(np.int32))


def read_npz(path: Path) -> ImageData:
    """Read a .npz file with the arrays `images` and `labels`.

    Args:
        path: the file.

    Returns:
        As `read_npy`.

    Raises:
        DataError: missing, damaged, without these names, pickled, or with arrays that do not fit.
    """
    found = _load(path)
    if isinstance(found, np.ndarray):
        raise bad(path, "a single array", "an .npz file with `images` and `labels`")
    if missing := {"images", "labels"} - found.keys():
        raise bad(path, f"no `{min(missing)}`", "an .npz file with `images` and `labels`")
    return _labelled(found["images"], found["labels"], path, path)


def read_npy(images: Path, labels: Path) -> ImageData:
    """Read two .npy files.

    Args:
        images: file with [n, h, w] or [n, h, w, c], uint8 or floating.
        labels: file with [n] integers.

    Returns:
        Images [n, h, w, c] and labels [n] int32. uint8 stays uint8; floats keep their values, unscaled, as float32.

    Raises:
        DataError: missing, damaged or pickled; other shapes or dtypes; NaN or Inf; counts that differ.
    """
    arrays = []
    for path in (images, labels):
        array = _load(path)
        if not isinstance(array, np.ndarray):
            raise bad(path, "an .npz archive", "a .npy file with one array")
        arrays.append(array)
    return _labelled(arrays[0], arrays[1], images, labels)


def check_labels(labels: np.ndarray, num_classes: int, path: Path) -> None:
    """Check that labels lie in 0..k-1.

    Raises:
        DataError: the first that does not, and where.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        was = f"label {labels[outside[0]]} at position {outside[0]} ({outside.size} outside)"
        raise bad(path, was, f"in 0..{num_classes - 1}")


def check_counts(images: np.ndarray, labels: np.ndarray, path: Path, labels_path: Path) -> None:
    """Check that there is one label an image.

    Raises:
        DataError: the counts differ.
    """
    if len(images) != len(labels):
        raise bad(labels_path, f"{len(labels)} labels", f"{len(images)}, one for each image in {path}")


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a .npy file, or the images and labels among those of a .npz file."""
    try:
        # The handle is ours because np.load leaves a damaged archive open. The warning that is ignored is about
        # headers written by Python 2, which numpy reads all the same.
        with open(path, "rb") as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = np.load(handle, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            with found:
                return {name: found[name] for name in ("images", "labels") if name in found.files}
    except FileNotFoundError:
        raise bad(path, "no such file", "an existing file") from None
    except Exception as error:  # numpy promises no set of exceptions for damaged files
        if "pickle" in str(error):
            raise bad(path, "pickled objects or a foreign file", "plain numpy arrays") from None
        raise bad(path, f"damage ({error or type(error).__name__})", "a complete .npy or .npz file") from None


def _labelled(images: np.ndarray, labels: np.ndarray, path: Path, labels_path: Path) -> ImageData:
    if images.ndim == 3:
        images = images[..., None]
    floating = np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or images.size == 0 or not (floating or images.dtype == np.uint8):
        was = f"images {images.dtype} of shape {images.shape}"
        raise bad(path, was, "uint8 or floating, [n, h, w] or [n, h, w, c], at least one")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise bad(labels_path, f"labels {labels.dtype} of shape {labels.shape}", "integers [n]")
    check_counts(images, labels, path, labels_path)
    check_labels(labels, np.iinfo(np.int32).max, labels_path)
    if floating:
        with np.errstate(over="ignore"):
            images = images.astype(np.float32, copy=False)
        wrong = images.size - np.count_nonzero(np.isfinite(images))
        if wrong:
            raise bad(path, f"{wrong} values that are NaN, Inf or beyond float32", "finite images")
    return ImageData(images, labels.astype(np.int32))
