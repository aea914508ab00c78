"""The embedded sample: 6,000 training and 1,000 test images of Fashion-MNIST, class-balanced."""

from importlib import resources

from dualxda_jax.data.folder import CLASS_NAMES, Dataset
from dualxda_jax.data.idx import parse_images, parse_labels
from dualxda_jax.types import ImageData

FOLDER = "fashion_mnist_sample"


def embedded_sample() -> Dataset:
    """The sample that comes with the package: no network needed.

    The first 600 training and 100 test images of each class, in the published order (`make_sample` wrote it).

    Returns:
        6,000 training and 1,000 test images [28, 28, 1] uint8, ten classes.

    Source:
        Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747; MIT licence, beside the files.
    """
    folder = resources.files("dualxda_jax.data") / FOLDER
    names = tuple((folder / CLASS_NAMES).read_text("utf-8").splitlines())
    parts = []
    for part in ("train", "t10k"):
        images, labels = (f"{part}-{kind}-ubyte.xz" for kind in ("images-idx3", "labels-idx1"))
        parts.append(
            ImageData(
                parse_images((folder / images).read_bytes(), images),
                parse_labels((folder / labels).read_bytes(), labels),
            )
        )
    return Dataset(parts[0], parts[1], names, "Fashion-MNIST sample")
