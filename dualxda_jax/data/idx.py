"""The IDX format of MNIST and its relatives, plain or compressed with gzip or xz.

A file is: two zero bytes, a code for the type, the number of dimensions, each size as a big-endian 32-bit unsigned
integer, then the values, big-endian, last dimension fastest (http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import lzma
import math
import struct
import zlib
from os import PathLike

import numpy as np

from dualxda_jax.data.errors import bad, read_bytes

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | PathLike[str]) -> np.ndarray:
    """Read an IDX file of any type and number of dimensions.

    Args:
        path: the file; compression is told by its content, since browsers unpack .gz and keep the name.

    Returns:
        The array, in the machine's byte order; read-only.

    Raises:
        DataError: missing, truncated, corrupted or no IDX file.
    """
    return parse_idx(read_bytes(path), path)


def read_idx_images(path: str | PathLike[str]) -> np.ndarray:
    """Read an IDX file of grey images.

    Returns:
        [n, h, w, 1] uint8, n, h, w > 0.

    Raises:
        DataError: as `read_idx`, or something other than unsigned bytes in three dimensions.
    """
    return parse_images(read_bytes(path), path)


def read_idx_labels(path: str | PathLike[str]) -> np.ndarray:
    """Read an IDX file of labels.

    Returns:
        [n] int32, n > 0.

    Raises:
        DataError: as `read_idx`, or something other than unsigned bytes in one dimension.
    """
    return parse_labels(read_bytes(path), path)


def parse_images(content: bytes, path: str | PathLike[str]) -> np.ndarray:
    """`read_idx_images` of a file's content; path is for messages alone."""
    return _unsigned_bytes(parse_idx(content, path), 3, path)[..., None]


def parse_labels(content: bytes, path: str | PathLike[str]) -> np.ndarray:
    """`read_idx_labels` of a file's content; path is for messages alone."""
    return _unsigned_bytes(parse_idx(content, path), 1, path).astype(np.int32)


def parse_idx(content: bytes, path: str | PathLike[str]) -> np.ndarray:
    """`read_idx` of a file's content; path is for messages alone."""
    content = _unpack(content, path)
    if not content:
        raise bad(path, "an empty file", "an IDX file")
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        codes = ", ".join(f"{code:02x}" for code in _TYPES)
        raise bad(path, f"the first bytes {content[:4].hex(' ')}", f"an IDX file: 00 00, one of {codes}, dimensions")
    dtype, ndim = np.dtype(_TYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise bad(path, f"{len(content)} bytes", f"at least {start}, an IDX header with {ndim} dimensions")
    sizes = struct.unpack(f">{ndim}I", content[4:start])
    expected = start + dtype.itemsize * math.prod(sizes)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise bad(path, f"{len(content)} bytes ({what})", f"{expected} bytes, as its header with sizes {sizes} says")
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(sizes)
    except ValueError:  # more dimensions than numpy has, or sizes whose product is zero only by one of them
        raise bad(path, f"sizes {sizes}", "sizes that an array can have") from None
    return array.astype(dtype.newbyteorder("="), copy=False)


def _unpack(content: bytes, path: str | PathLike[str]) -> bytes:
    """Undo gzip or xz; no IDX file starts with their magic numbers."""
    try:
        if content[:2] == b"\x1f\x8b":
            return gzip.decompress(content)
        if content[:6] == b"\xfd7zXZ\0":
            return lzma.decompress(content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise bad(path, f"damaged compression ({error})", "a complete gzip or xz file") from None
    return content


def _unsigned_bytes(array: np.ndarray, ndim: int, path: str | PathLike[str]) -> np.ndarray:
    what = {1: "labels [n]", 3: "images [n, h, w]"}[ndim]
    if array.dtype != np.uint8 or array.ndim != ndim or array.size == 0:
        raise bad(path, f"{array.dtype} of shape {array.shape}", f"uint8 {what}, at least one")
    return array
