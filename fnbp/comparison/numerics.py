"""Arrays of NumPy and of JAX, the arithmetic in which they are computed, and the distance between them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

U64, U32 = 2.0**-53, 2.0**-24  # unit roundoff of float64 and float32
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
FLOAT64_BACKENDS = ("cpu", "gpu", "cuda", "rocm")


@contextmanager
def arithmetic(dtype: Any) -> Iterator[None]:
    """Compute in dtype inside this context: float64 is switched on, on the CPU if the accelerator has none."""
    with ExitStack() as stack:
        if dtype == np.float64:
            stack.enter_context(jax.enable_x64(True))
            if jax.default_backend() not in FLOAT64_BACKENDS:
                stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
        yield


def is_floating(a: Any) -> bool:
    """True for an array of floating point numbers."""
    return hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)


def is_float0(a: Any) -> bool:
    """True for what JAX has in the place of the cotangent of an integer."""
    return getattr(a, "dtype", None) == jax.dtypes.float0


def as_numpy_32(tree: Any) -> Any:
    """Numbers as NumPy arrays, float64 as float32; random keys as they are."""

    def one(a):
        a = np.asarray(a) if isinstance(a, (float, int, bool, np.generic)) else a
        if not hasattr(a, "dtype") or jnp.issubdtype(a.dtype, jax.dtypes.extended) or is_float0(a):
            return a
        return np.asarray(a, np.float32 if a.dtype == np.float64 else a.dtype)

    return jax.tree.map(one, tree)


def as_numpy(tree: Any) -> Any:
    """Arrays as NumPy arrays, random keys as they are."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.extended) else np.asarray(a), tree)


def in_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with its floating point leaves in dtype; for None, as it is."""
    return jax.tree.map(lambda a: np.asarray(a, dtype) if dtype is not None and is_floating(a) else a, tree)


def as_jax(tree: Any) -> Any:
    """NumPy arrays as JAX arrays, of 64 bits only inside arithmetic(np.float64)."""
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) and not is_float0(a) else a, tree)


def compiled(f: Callable) -> Any:
    """Compile f; on the CPU without LLVM's optimizations, which take longer than they save."""
    return jax.jit(f, compiler_options=FAST if jax.default_backend() == "cpu" else None)


def compiled_or_plain(f: Callable, *args: Any) -> Any:
    """Call f(*args), compiled if possible, else step by step."""
    try:
        return compiled(f)(*args)
    except Exception:
        return f(*as_jax(args))


def first_line(error: Exception) -> str:
    """The first line of the message of an error."""
    lines = str(error).splitlines()
    return lines[0] if lines else ""


def rms(a: Any) -> float:
    """The root mean square of an array; 0 if it is empty."""
    a = np.asarray(a, np.float64)
    return float(np.sqrt(np.mean(a**2))) if a.size else 0.0


def all_finite(arrays: Any) -> bool:
    """True if no floating point array holds NaN or infinity."""
    return all(np.isfinite(np.asarray(a, np.float64)).all() for a in arrays if jnp.issubdtype(a.dtype, jnp.floating))


def roundoff(dtype: Any) -> float:
    """The unit roundoff of dtype: half the distance from 1 to the next number; 0 for integers."""
    return float(jnp.finfo(dtype).eps) / 2 if jnp.issubdtype(dtype, jnp.floating) else 0.0


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b|; 0 if both are 0, infinite if only b is 0 or if a is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
    error = 0.0 if difference == 0 else difference / size if size else np.inf
    return float(error) if np.isfinite(error) else np.inf


def index_of_largest(a: np.ndarray) -> tuple[int, ...]:
    """The index of the largest element; () for an array without elements."""
    return tuple(int(i) for i in np.unravel_index(np.argmax(a), a.shape)) if a.size else ()
