"""From files to labelled images: readers, the embedded sample, corruptions, batches."""

from dualxda_jax.data.batching import batches, to_float
from dualxda_jax.data.corruptions import class_groups, label_noise, mark, shortcut_mark
from dualxda_jax.data.errors import DataError
from dualxda_jax.data.folder import Dataset, load_folder
from dualxda_jax.data.idx import read_idx, read_idx_images, read_idx_labels
from dualxda_jax.data.readers import read_cifar10, read_npy, read_npz
from dualxda_jax.data.sample import embedded_sample
from dualxda_jax.types import Batch, ImageData

__all__ = [
    "Batch", "DataError", "Dataset", "ImageData", "batches", "class_groups", "embedded_sample", "label_noise",
    "load_folder", "mark", "read_cifar10", "read_idx", "read_idx_images", "read_idx_labels", "read_npy", "read_npz",
    "shortcut_mark", "to_float",
]  # fmt: skip
