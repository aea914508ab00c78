"""Strict everywhere: no silent dtype or rank promotion, warnings are errors, eight fake devices.

What is compiled is shared by all processes of a session, in a folder that goes with it; with a folder of one's own in
JAX_COMPILATION_CACHE_DIR it is there for the next session, too.
"""

import atexit
import os
import shutil
import tempfile

# Most of a test's time is compilation of programs that run once: LLVM need not optimise them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# By variables of the environment, so that the processes of pytest-xdist and those that tests start have it as well.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dualxda-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Run a test with float64 enabled; the rest of the suite runs in JAX's default of float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs hold memory maps, of which a process may have 65,530: beyond, the compiler crashes."""
    yield
    jax.clear_caches()
