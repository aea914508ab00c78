"""The one error for files that are not what they should be."""

from os import PathLike
from pathlib import Path


class DataError(ValueError):
    """A file or folder is missing, truncated, foreign or contradicts another; the message is one line."""


def bad(path: str | PathLike[str], was: object, must: str) -> DataError:
    """The error to raise: which file, what was found there, what it must be."""
    return DataError(" ".join(f"{path}: got {was}, must be {must}".split()))


def read_bytes(path: str | PathLike[str]) -> bytes:
    """All of a file.

    Raises:
        DataError: missing or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise bad(path, "no such file", "an existing file") from None
    except OSError as error:
        raise bad(path, error.strerror or type(error).__name__, "a readable file") from None
