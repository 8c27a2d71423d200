"""Shapes in annotations are checked at run time, in the tests alone; four CPU devices stand in for a mesh."""

import jax
import jaxtyping
import pytest

import tests.shapes  # noqa: F401 (the hook looks it up)

jax.config.update("jax_num_cpu_devices", 4)
jaxtyping.install_import_hook("fnbp", "tests.shapes.checked")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
