"""Shapes in annotations are checked at run time, in the tests alone; four CPU devices stand in for a mesh.

Compiling is most of the work of the tests, so XLA optimises little here, unless XLA_FLAGS is set: `XLA_FLAGS= pytest`
tests what a user runs. `.ci/run` does that too.
"""

import os

import jax
import jaxtyping
import pytest

import tests.shapes  # noqa: F401 (the hook looks it up)

FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    FAST += " --xla_cpu_use_fusion_emitters=false"  # later versions have nothing else, and refuse the option
os.environ.setdefault("XLA_FLAGS", FAST)  # before the first compilation, which reads it
jax.config.update("jax_num_cpu_devices", 4)
jaxtyping.install_import_hook("fnbp", "tests.shapes.checked")


def pytest_configure(config):
    """What one worker, or an earlier run, has compiled the others load."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
