"""Eight fake CPU devices, key-reuse checks, a persistent compilation cache, and float64 on request."""

import os
import pathlib

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests are mostly compilation of small programs: leaving out LLVM's optimisations takes a third off their time.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax
import pytest

jax.config.update("jax_debug_key_reuse", True)
_CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def x64():
    """Compute in float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, or a skip that says where it was looked for."""
    folder = pathlib.Path(os.environ.get("DDJAX_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set DDJAX_DATA)")
    return folder
