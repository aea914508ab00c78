"""Make the embedded sample from the published Fashion-MNIST files.

    python -m dualxda_jax.data.make_sample FOLDER [OUT]

FOLDER holds the four IDX files; OUT is where the sample goes (default: into this package). Taken are the first 600
training and the first 100 test images of each class, in the published order, written as IDX files compressed with xz:
2.6 MB. PNG's row filters (up, average, MED) in front of xz made it larger, not smaller.
"""

import lzma
import struct
import sys
from pathlib import Path

import numpy as np

from dualxda_jax.data.folder import CLASS_NAMES, load_folder
from dualxda_jax.data.sample import FOLDER
from dualxda_jax.types import ImageData

PER_CLASS = {"train": 600, "t10k": 100}
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Places of the first per_class samples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]))


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array as an IDX file."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, part: str, data: ImageData) -> None:
    """Write images and labels of one part."""
    arrays = {"images-idx3": data.images[..., 0], "labels-idx1": data.labels.astype(np.uint8)}
    for kind, array in arrays.items():
        packed = lzma.compress(idx_bytes(array), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{part}-{kind}-ubyte.xz").write_bytes(packed)


def main(source: str, out: str | None = None) -> None:
    """Read the published files and write the sample."""
    folder = Path(out) if out else Path(__file__).parent / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    dataset = load_folder(source)
    for part, data in (("train", dataset.train), ("t10k", dataset.test)):
        rows = choose(data.labels, PER_CLASS[part])
        write(folder, part, ImageData(data.images[rows], data.labels[rows]))
    (folder / CLASS_NAMES).write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m dualxda_jax.data.make_sample FOLDER [OUT]")
    main(*sys.argv[1:])
