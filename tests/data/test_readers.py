"""CIFAR-10's binary version and numpy's files."""

import pickle

import numpy as np
import pytest

from dualxda_jax import data


def records(rng, n, label=None):
    labels = rng.integers(0, 10, n) if label is None else np.full(n, label)
    images = rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
    rows = np.concatenate([labels.astype(np.uint8)[:, None], images.transpose(0, 3, 1, 2).reshape(n, -1)], 1)
    return images, labels, rows.tobytes()


def test_cifar_batches_follow_each_other(tmp_path, rng):
    parts = [records(rng, n) for n in (3, 1)]
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part[2])
    got = data.read_cifar10(paths)
    assert got.images.dtype == np.uint8 and got.labels.dtype == np.int32
    np.testing.assert_array_equal(got.images, np.concatenate([p[0] for p in parts]))
    np.testing.assert_array_equal(got.labels, np.concatenate([p[1] for p in parts]))
    np.testing.assert_array_equal(data.read_cifar10(str(paths[1])).images, parts[1][0])


def test_bad_cifar(tmp_path, rng):
    path = tmp_path / "data_batch_1.bin"
    for content, says in [
        (b"", "got 0 bytes, must be whole records of 3073 bytes"),
        (records(rng, 2)[2][:-1], "got 6145 bytes"),
        (records(rng, 1)[2] + records(rng, 1, label=10)[2], r"got label 10 at position 1 \(1 outside\), must be in 0"),
    ]:
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=says) as caught:
            data.read_cifar10(path)
        assert str(path) in str(caught.value)
    with pytest.raises(data.DataError, match="no such file"):
        data.read_cifar10(tmp_path / "nowhere.bin")


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([1, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_numpy_round_trip(tmp_path, dtype, channels):
    images = (IMAGES if channels is None else np.repeat(IMAGES[..., None], channels, -1)).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=LABELS)
    np.save(tmp_path / "i.npy", images)
    np.save(tmp_path / "l.npy", LABELS)
    for got in (data.read_npz(tmp_path / "a.npz"), data.read_npy(tmp_path / "i.npy", tmp_path / "l.npy")):
        assert got.images.dtype == (np.uint8 if dtype == np.uint8 else np.float32) and got.labels.dtype == np.int32
        np.testing.assert_array_equal(got.images, images[..., None] if channels is None else images)
        np.testing.assert_array_equal(got.labels, LABELS)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": IMAGES}, "got no `labels`"),
        ({"images": IMAGES, "labels": LABELS[:1]}, "got 1 labels, must be 2, one for each image"),
        ({"images": IMAGES[0], "labels": LABELS}, r"images uint8 of shape \(3, 4\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one"),
        ({"images": IMAGES.astype(np.int64), "labels": LABELS}, "images int64"),
        ({"images": np.full((2, 3, 4), np.nan), "labels": LABELS}, "24 values that are NaN"),
        ({"images": np.full((2, 3, 4), 1e300), "labels": LABELS}, "beyond float32"),
        ({"images": IMAGES, "labels": LABELS * 1.0}, "labels float64"),
        ({"images": IMAGES, "labels": LABELS[None]}, "labels int64 of shape"),
        ({"images": IMAGES, "labels": LABELS - 1}, "label -1 at position 1"),
        ({"images": np.array([{}, 1], object), "labels": LABELS}, "got pickled objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, says):
    path = tmp_path / "train.npz"
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match=says) as caught:
        data.read_npz(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_numpy_files(tmp_path):
    good, npy, npz = tmp_path / "l.npy", tmp_path / "i.npy", tmp_path / "a.npz"
    np.save(good, LABELS)
    np.save(npy, IMAGES)
    np.savez_compressed(npz, images=IMAGES, labels=LABELS)
    whole, archive = npy.read_bytes(), npz.read_bytes()
    flipped = bytearray(archive)
    flipped[archive.index(b"images.npy") + 40] ^= 0xFF
    for content in (b"", whole[:5], whole[:60], whole[:-1], b"hello, world", pickle.dumps({"a": 1}), archive):
        npy.write_bytes(content)
        with pytest.raises(data.DataError, match="must be") as caught:
            data.read_npy(npy, good)
        assert str(npy) in str(caught.value) and "\n" not in str(caught.value)
    for content in (b"", archive[:-30], archive[:50], bytes(flipped), whole):
        npz.write_bytes(content)
        with pytest.raises(data.DataError, match="must be") as caught:
            data.read_npz(npz)
        assert str(npz) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(data.DataError, match="no such file"):
        data.read_npz(tmp_path / "nowhere.npz")
