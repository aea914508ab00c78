"""Compiled programs that the command keeps, so that its next run does not wait for them again."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

OFF = "DUALXDA_NO_CACHE"
"""The environment variable that turns it off."""

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept: reading them back takes as long."""


def folder() -> Path:
    """Where they are kept; it may be deleted at any time."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("dualxda", appauthor=False)) / "programs"


@contextlib.contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Have jax keep compiled programs meanwhile, unless the user has chosen a folder of his own for all of jax.

    Args:
        wanted: False, a non-empty OFF in the environment, or a folder that cannot be written leave all as it is.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder()),
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    own = before["jax_compilation_cache_dir"] is not None
    if not wanted or own or os.environ.get(OFF) or not _writable(folder()):
        yield
        return
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)
