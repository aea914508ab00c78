"""A folder as published becomes a `Dataset`: which layout lies there is found by the names of its files."""

import dataclasses
from os import PathLike
from pathlib import Path

from dualxda_jax.data.errors import bad, read_bytes
from dualxda_jax.data.idx import read_idx_images, read_idx_labels
from dualxda_jax.data.readers import CIFAR10_CLASSES, check_counts, check_labels, read_cifar10, read_npy, read_npz
from dualxda_jax.types import ImageData

LAYOUTS = (
    "IDX ({train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]), CIFAR-10 binary version (data_batch_1..5.bin, "
    "test_batch.bin), train.npz and test.npz, or {train,test}_{images,labels}.npy"
)
CLASS_NAMES = "class_names.txt"
_DIGITS = tuple(str(digit) for digit in range(10))
_FEW_CLASSES = 1000
"""As many may be in however few images; more classes than images are no labels but other numbers, as identifiers."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test set, on the host.

    Attributes:
        train: training images and labels.
        test: test images and labels; images of the same shape and dtype.
        class_names: one for each of the k classes.
        name: what reports call it.
    """

    train: ImageData
    test: ImageData
    class_names: tuple[str, ...]
    name: str


def load_folder(folder: str | PathLike[str]) -> Dataset:
    """Read a data set in one of the layouts of `LAYOUTS`.

    The names of the classes are the lines of class_names.txt if the folder has one; else CIFAR-10's own, the digits
    for IDX, and 0..(largest training label) for numpy's arrays.

    Args:
        folder: with the files; CIFAR-10's may lie in its subfolder cifar-10-batches-bin.

    Returns:
        The data set, named like the folder.

    Raises:
        DataError: no layout or more than one, a file of it missing or damaged, counts or shapes that differ, a label
            without a class, or labels that are no numbers of classes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise bad(folder, "a file" if folder.exists() else "no such folder", f"a folder with {LAYOUTS}")
    inner = folder / "cifar-10-batches-bin"
    layouts = [_idx(folder), _npz(folder), _npy(folder), _cifar(inner if inner.is_dir() else folder)]
    begun = [files for files in layouts if any(path.is_file() for path in files)]
    if not begun:
        there = sorted(path.name for path in folder.iterdir())
        was = f"{there[:5]}" + (f" and {len(there) - 5} more" if there[5:] else "")
        raise bad(folder, was, f"a folder with {LAYOUTS}")
    if len(begun) > 1:
        found = " and ".join(next(path.name for path in files if path.is_file()) for files in begun)
        raise bad(folder, f"several layouts ({found})", "a folder with one")
    for path in begun[0]:
        if not path.is_file():
            raise bad(path, "no such file", "there, since other files of its data set are")
    layout, files = layouts.index(begun[0]), begun[0]
    train, test = (_read_idx, _read_npz, _read_npy, _read_cifar)[layout](files)
    label_files = (files[1], files[3]) if len(files) == 4 else (files[0], files[-1])
    names = _class_names(folder) or (_DIGITS, None, None, CIFAR10_CLASSES)[layout] or _numbers(train, label_files[0])
    if len(names) < 2:
        raise bad(label_files[0], "labels of one class", "of two or more")
    for part, path in zip((train, test), label_files, strict=True):
        check_labels(part.labels, len(names), path)
    if train.images.shape[1:] != test.images.shape[1:] or train.images.dtype != test.images.dtype:
        was, must = (f"{p.images.dtype} images of shape {p.images.shape[1:]}" for p in (test, train))
        raise bad(label_files[1].parent, f"test: {was}", f"like training: {must}")
    return Dataset(train, test, names, folder.resolve().name)


def _idx(folder: Path) -> tuple[Path, ...]:
    return tuple(
        _first(folder, f"{part}-{kind}", f"{part}-{kind.replace('-', '.', 1)}")
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )


def _first(folder: Path, *names: str) -> Path:
    """The first that exists, plain before compressed; if none does, the plain path under the first name."""
    candidates = [folder / f"{name}{suffix}" for suffix in ("", ".gz", ".xz") for name in names]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _npz(folder: Path) -> tuple[Path, ...]:
    return folder / "train.npz", folder / "test.npz"


def _npy(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / f"{part}_{kind}.npy" for part in ("train", "test") for kind in ("images", "labels"))


def _cifar(folder: Path) -> tuple[Path, ...]:
    return (*(folder / f"data_batch_{i}.bin" for i in range(1, 6)), folder / "test_batch.bin")


def _read_idx(files: tuple[Path, ...]) -> tuple[ImageData, ImageData]:
    return _idx_part(files[0], files[1]), _idx_part(files[2], files[3])


def _idx_part(images_path: Path, labels_path: Path) -> ImageData:
    images, labels = read_idx_images(images_path), read_idx_labels(labels_path)
    check_counts(images, labels, images_path, labels_path)
    return ImageData(images, labels)


def _read_npz(files: tuple[Path, ...]) -> tuple[ImageData, ImageData]:
    return read_npz(files[0]), read_npz(files[1])


def _read_npy(files: tuple[Path, ...]) -> tuple[ImageData, ImageData]:
    return read_npy(files[0], files[1]), read_npy(files[2], files[3])


def _read_cifar(files: tuple[Path, ...]) -> tuple[ImageData, ImageData]:
    return read_cifar10(files[:-1]), read_cifar10(files[-1])


def _numbers(train: ImageData, path: Path) -> tuple[str, ...]:
    """Names of classes that have none: one for each label up to the largest."""
    classes, most = int(train.labels.max()) + 1, max(len(train.labels), _FEW_CLASSES)
    if classes > most:
        raise bad(
            path, f"label {classes - 1}", f"below {most}: there are {len(train.labels)} images; labels count classes"
        )
    return tuple(map(str, range(classes)))


def _class_names(folder: Path) -> tuple[str, ...] | None:
    path = folder / CLASS_NAMES
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in read_bytes(path).decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise bad(path, "bytes that are not UTF-8", "text, one class a line") from None
    if len(names) < 2 or len(set(names)) != len(names):
        raise bad(path, f"{len(names)} names, {len(set(names))} of them different", "two or more different names")
    return names
