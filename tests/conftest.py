"""Shapes in annotations are checked at run time, in the tests alone; four CPU devices stand in for a mesh.

Compiling is most of the work of the tests, so XLA optimises little here, unless XLA_FLAGS is set: `XLA_FLAGS= pytest`
tests what a user runs. `.ci/run` does that too.
"""

import itertools
import os
import signal
from pathlib import Path

import jax
import jaxtyping
import pytest

import tests.shapes  # noqa: F401 (the hook looks it up)

MAPS, TESTS = 30_000, itertools.count(1)
SLOW = Path(__file__).with_name("slow.txt")
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    FAST += " --xla_cpu_use_fusion_emitters=false"  # later versions have nothing else, and refuse the option
os.environ.setdefault("XLA_FLAGS", FAST)  # before the first compilation, which reads it
jax.config.update("jax_num_cpu_devices", 4)
jaxtyping.install_import_hook("fnbp", "tests.shapes.checked")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests that slow.txt names are slow. UsageError if there is none of that name."""
    named = {line for line in SLOW.read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if item.nodeid in named:
            item.add_marker(pytest.mark.slow)
    found = {item.nodeid for item in items}
    whole = {item.nodeid.split("::")[0] for item in items} >= {line.split("::")[0] for line in named}
    if whole and (gone := sorted(named - found)):
        raise pytest.UsageError(f"tests/slow.txt names what is no test: {gone[0]}")


def pytest_configure(config):
    """What one worker, or an earlier run, has compiled the others load."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True)
def not_too_many_programs():
    """A compiled program takes a dozen memory maps, of which Linux gives a process 65,530; without one it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 50 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in DEFAULTS}
    for number, handler in DEFAULTS.items():
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
