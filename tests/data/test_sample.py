"""The embedded sample: what it holds, its size, and that its script makes it."""

import hashlib
from importlib import resources

import numpy as np

from dualxda_jax import data
from dualxda_jax.data import make_sample
from dualxda_jax.data.sample import FOLDER

CHECKSUMS = {
    "train": "297b51c91f229dc04816d67def1c0ba4bff3f0425af648eff3a2c600a92afdc1",
    "test": "49a51e7263fbcca04e9ae636d342354f927d30828713094c9dd4c7342817eedc",
}


def test_counts_balance_and_content():
    sample = data.embedded_sample()
    assert sample.class_names == make_sample.CLASSES
    for name, part, per_class in (("train", sample.train, 600), ("test", sample.test, 100)):
        assert part.images.shape == (10 * per_class, 28, 28, 1) and part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32 and np.bincount(part.labels).tolist() == [per_class] * 10
        digest = hashlib.sha256(part.images.tobytes() + part.labels.astype("<i4").tobytes()).hexdigest()
        assert digest == CHECKSUMS[name]


def test_size_and_licence():
    files = list((resources.files("dualxda_jax.data") / FOLDER).iterdir())
    assert sum(len(file.read_bytes()) for file in files) <= 3_500_000
    texts = {file.name: file.read_text("utf-8") for file in files if file.name in ("LICENSE", "README.md")}
    assert "MIT License" in texts["LICENSE"] and "Zalando" in texts["LICENSE"]
    assert "https://github.com/zalandoresearch/fashion-mnist" in texts["README.md"]


def test_the_script_takes_the_first_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample, "PER_CLASS", {"train": 2, "t10k": 1})
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    labels = np.arange(40).astype(np.uint8) % 10
    images = np.arange(40, dtype=np.uint8)[:, None, None] + np.zeros((1, 3, 3), np.uint8)
    for part in ("train", "t10k"):
        (source / f"{part}-images-idx3-ubyte").write_bytes(make_sample.idx_bytes(images))
        (source / f"{part}-labels-idx1-ubyte").write_bytes(make_sample.idx_bytes(labels))
    make_sample.main(str(source), str(out))
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    got = data.load_folder(out)
    assert got.train.images[:, 0, 0, 0].tolist() == list(range(20))
    assert got.test.labels.tolist() == list(range(10)) and got.class_names == make_sample.CLASSES
    make_sample.main(str(source), str(out))
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}
