"""Folders in each published layout, and what is said when something is missing."""

import gzip
import struct

import numpy as np
import pytest

from dualxda_jax import data

DIGITS = tuple("0123456789")


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder, *, dotted=False, packed=False, top=9, test_shape=(2, 3)):
    rng = np.random.default_rng(0)
    written = []
    for part, n, shape in (("train", 5, (2, 3)), ("t10k", 2, test_shape)):
        images, labels = rng.integers(0, 256, (n, *shape)), np.append(rng.integers(0, 10, n - 1), top)
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            name = f"{part}-{kind.replace('-', '.', 1) if dotted else kind}{'.gz' if packed else ''}"
            (folder / name).write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        written.append((images[..., None], labels))
    return written


def write_cifar(folder):
    rng = np.random.default_rng(1)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = rng.integers(0, 10, (2, 3073)).astype(np.uint8)
        (folder / name).write_bytes(rows.tobytes())


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, dotted, packed):
    written = write_idx(tmp_path, dotted=dotted, packed=packed)
    got = data.load_folder(str(tmp_path))
    assert got.class_names == DIGITS and got.name == tmp_path.name
    for part, (images, labels) in zip((got.train, got.test), written, strict=True):
        np.testing.assert_array_equal(part.images, images)
        np.testing.assert_array_equal(part.labels, labels)


def test_own_class_names(tmp_path):
    write_idx(tmp_path, top=11)
    with pytest.raises(data.DataError, match=r"train-labels-idx1-ubyte: got label 11 at position 4 .*in 0\.\.9"):
        data.load_folder(tmp_path)
    names = tuple(f"größe {i}" for i in range(12))
    (tmp_path / "class_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    assert data.load_folder(tmp_path).class_names == names
    for content, says in [(b"a\n", "got 1 names"), (b"a\na\n", "1 of them different"), (b"\xff\n", "not UTF-8")]:
        (tmp_path / "class_names.txt").write_bytes(content)
        with pytest.raises(data.DataError, match=says):
            data.load_folder(tmp_path)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write_cifar(tmp_path / inner)
    got = data.load_folder(tmp_path)
    assert got.train.images.shape == (10, 32, 32, 3) and got.test.images.shape == (2, 32, 32, 3)
    assert got.class_names[0] == "airplane" and len(got.class_names) == 10
    (tmp_path / inner / "data_batch_4.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_4\.bin: got no such file"):
        data.load_folder(tmp_path)


def test_labels_of_one_class_are_refused(tmp_path):
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(3, int))
    with pytest.raises(data.DataError, match=r"train\.npz: got labels of one class, must be of two or more"):
        data.load_folder(tmp_path)


@pytest.mark.parametrize("archive", [True, False])
def test_numpy(tmp_path, archive):
    images = np.linspace(0, 1, 3 * 4 * 4).reshape(3, 4, 4)
    for part, labels in (("train", [0, 2, 1]), ("test", [2, 2, 0])):
        if archive:
            np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)
        else:
            np.save(tmp_path / f"{part}_images.npy", images)
            np.save(tmp_path / f"{part}_labels.npy", labels)
    got = data.load_folder(tmp_path)
    assert got.class_names == ("0", "1", "2") and got.test.labels.tolist() == [2, 2, 0]
    np.testing.assert_array_equal(got.train.images[..., 0], images.astype(np.float32))


def test_a_test_label_that_training_lacks(tmp_path):
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 3, 3), np.uint8), labels=[0, 1])
    np.savez(tmp_path / "test.npz", images=np.zeros((1, 3, 3), np.uint8), labels=[2])
    with pytest.raises(data.DataError, match=r"test\.npz: got label 2 at position 0"):
        data.load_folder(tmp_path)


def test_parts_that_contradict_each_other(tmp_path):
    write_idx(tmp_path, test_shape=(3, 3))
    with pytest.raises(data.DataError, match=r"test: uint8 images of shape \(3, 3, 1\), must be like training"):
        data.load_folder(tmp_path)
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(4)))
    with pytest.raises(data.DataError, match=r"train-labels-idx1-ubyte: got 4 labels, must be 5.*train-images"):
        data.load_folder(tmp_path)


def test_no_or_half_or_two_layouts(tmp_path):
    with pytest.raises(data.DataError, match=r"got no such folder, must be a folder with IDX"):
        data.load_folder(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"got \[\], must be a folder with IDX"):
        data.load_folder(tmp_path)
    for i in range(7):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(data.DataError, match=r"'4\.png'\] and 2 more"):
        data.load_folder(tmp_path)
    with pytest.raises(data.DataError, match=r"0\.png: got a file"):
        data.load_folder(tmp_path / "0.png")
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte: got no such file"):
        data.load_folder(tmp_path)
    write_cifar(tmp_path)
    with pytest.raises(data.DataError, match=r"several layouts \(train-images-idx3-ubyte and data_batch_1\.bin\)"):
        data.load_folder(tmp_path)


def test_class_names_as_an_editor_with_a_byte_order_mark_saves_them(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "class_names.txt").write_text("\n".join(DIGITS), encoding="utf-8-sig")
    assert data.load_folder(tmp_path).class_names == DIGITS


def test_labels_that_are_identifiers_make_no_millions_of_classes(tmp_path):
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=np.zeros((2, 3, 3), np.uint8), labels=[0, 2**31 - 2])
    with pytest.raises(data.DataError, match=r"train\.npz: got label 2147483646, must be below 1000"):
        data.load_folder(tmp_path)
