"""IDX files: round trips, compression, every kind of bad file."""

import gzip
import itertools
import lzma
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dualxda_jax import data
from dualxda_jax.data.idx import parse_idx

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx(array):
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@given(
    st.sampled_from(sorted(CODES)).flatmap(
        lambda code: npst.arrays(code, npst.array_shapes(min_dims=1, max_dims=4, max_side=4))
    ),
    st.sampled_from([bytes, gzip.compress, lzma.compress]),
)
def test_round_trip_of_every_type(array, pack):
    got = parse_idx(pack(idx(array)), "file")
    assert got.dtype == array.dtype and got.dtype.isnative
    np.testing.assert_array_equal(got, array)


@given(st.binary(max_size=40))
def test_no_content_gives_anything_but_an_array_or_one_line(content):
    for prefix in (b"", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\x1f\x8b\x08", b"\xfd7zXZ\0"):
        try:
            assert isinstance(parse_idx(prefix + content, "file"), np.ndarray)
        except data.DataError as error:
            assert str(error).startswith("file: got ") and "\n" not in str(error)


@pytest.mark.parametrize(("name", "pack"), [("a", bytes), ("a.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_images_and_labels(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(idx(IMAGES)))
    images = data.read_idx_images(path)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES[..., None])
    path.write_bytes(pack(idx(np.array([3, 0, 255], np.uint8))))
    labels = data.read_idx_labels(str(path))
    assert labels.dtype == np.int32 and labels.tolist() == [3, 0, 255]


GOOD = idx(IMAGES)
PACKED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (GOOD[:2], "the first bytes 00 00"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "an IDX file"),
        (b"\0\0\x07" + GOOD[3:], "00 00 07 03"),
        (GOOD[:10], "10 bytes, must be at least 16"),
        (GOOD[:-1], r"39 bytes \(truncated\), must be 40 bytes"),
        (GOOD + b"x", r"41 bytes \(too long\), must be 40 bytes"),
        (idx(IMAGES[0]), r"uint8 of shape \(3, 4\), must be uint8 images \[n, h, w\]"),
        (idx(IMAGES.astype(np.int32)), "int32 of shape"),
        (idx(IMAGES[:0]), r"shape \(0, 3, 4\)"),
        (PACKED[:-9], "damaged compression"),
        (PACKED[:12] + b"\xff\xff\xff" + PACKED[15:], "damaged compression"),
        (PACKED[:-8] + bytes(8), "damaged compression"),
        (lzma.compress(GOOD)[:-5], "damaged compression"),
        (gzip.compress(GOOD[:-1]), "truncated"),
        (gzip.compress(b"hello, world"), "68 65 6c 6c"),
    ],
    # Not the content: gzip writes the time into it, and every process of a test run must know a test by the same name.
    ids=itertools.count(),
)
def test_bad_files_give_one_line_that_names_them(tmp_path, content, says):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=says) as caught:
        data.read_idx_images(path)
    assert str(path) in str(caught.value) and "must be" in str(caught.value) and "\n" not in str(caught.value)


def test_images_where_labels_should_be(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(GOOD)
    with pytest.raises(data.DataError, match=r"must be uint8 labels \[n\]"):
        data.read_idx_labels(path)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: got no such file"):
        data.read_idx(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="must be a readable file"):
        data.read_idx(tmp_path)
