"""Arrays of NumPy and of JAX, the arithmetic in which they are computed, and the distance between them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

U64, U32 = 2.0**-53, 2.0**-24  # unit roundoff of float64 and float32
FAST: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
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


def is_inexact(a: Any) -> bool:
    """True for an array of floating point or complex numbers: what is differentiated."""
    return hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.inexact)


def is_complex(a: Any) -> bool:
    """True for an array of complex numbers."""
    return hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.complexfloating)


def real_pairs(a: Any) -> np.ndarray:
    """An array as float64; complex numbers as pairs of real ones, along a new last axis."""
    a = np.asarray(a)
    return np.stack([a.real, a.imag], -1).astype(np.float64) if is_complex(a) else np.asarray(a, np.float64)


def with_numbers(f: Callable[[np.ndarray], Any], a: Any) -> np.ndarray:
    """The array with f applied to its numbers in float64, in its own dtype; complex numbers as pairs of real ones."""
    made = np.asarray(f(real_pairs(a)), np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(made[..., 0] + 1j * made[..., 1] if is_complex(a) else made, a.dtype)


def is_float0(a: Any) -> bool:
    """True for what JAX has in the place of the cotangent of an integer."""
    return getattr(a, "dtype", None) == jax.dtypes.float0


def is_truth(a: Any) -> bool:
    """True for an array of truth values."""
    return hasattr(a, "dtype") and a.dtype == np.dtype(bool)


def is_integer(a: Any) -> bool:
    """True for an array of whole numbers."""
    return hasattr(a, "dtype") and not is_key(a) and np.issubdtype(a.dtype, np.integer)


def is_key(a: Any) -> bool:
    """True for an array of random keys, which NumPy cannot hold."""
    return hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jax.dtypes.extended)


def as_numpy_32(tree: Any) -> Any:
    """Numbers as NumPy arrays, float64 as float32 unless JAX computes in 64 bits; random keys as they are."""
    wide = jnp.asarray(0.0).dtype == np.float64
    narrower = {} if wide else {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}

    def one(a):
        a = np.asarray(a) if isinstance(a, (float, int, bool, complex, np.generic)) else a
        if not hasattr(a, "dtype") or is_key(a) or is_float0(a):
            return a
        with np.errstate(over="ignore"):  # what is infinite then is told by name
            return np.asarray(a, narrower.get(np.dtype(a.dtype), a.dtype))

    return jax.tree.map(one, tree)


def as_numpy(tree: Any) -> Any:
    """Arrays as NumPy arrays, random keys as they are."""
    return jax.tree.map(lambda a: a if is_key(a) else np.asarray(a), tree)


def in_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with its floating point leaves in dtype, complex ones in that of such parts; for None, as it is."""
    if dtype is None:
        return tree

    def one(a):
        if not is_inexact(a):
            return a
        return np.asarray(a, np.result_type(dtype, np.complex64) if is_complex(a) else dtype)

    return jax.tree.map(one, tree)


def as_jax(tree: Any) -> Any:
    """NumPy arrays as JAX arrays, of 64 bits only inside arithmetic(np.float64)."""
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) and not is_float0(a) else a, tree)


def compiled(f: Callable) -> Any:
    """Compile f; on the CPU without optimizations, which take longer than they save."""
    return jax.jit(f, compiler_options=options())


def options() -> dict[str, Any] | None:
    """Options for XLA that compile fast on the CPU."""
    return fast_options() if jax.default_backend() == "cpu" else None


@cache
def fast_options() -> dict[str, Any]:
    """Those of FAST that this XLA knows."""

    def known(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: FAST[name]}).lower().compile()
        except Exception:
            return False
        return True

    return {name: value for name, value in FAST.items() if known(name)}


def compiled_or_plain(f: Callable, *args: Any) -> Any:
    """Call f(*args), compiled if possible, else step by step."""
    try:
        return compiled(f)(*args)
    except Exception:
        return f(*as_jax(args))


def first_line(error: Exception) -> str:
    """The first line of the message of an error; of one that a callback raised, the last line of its traceback."""
    lines = str(error).strip().splitlines()
    if not lines:
        return ""
    return lines[-1] if "Traceback (most recent call last)" in lines[0] else lines[0]


def rms(a: Any) -> float:
    """The root mean square of an array; 0 if it is empty."""
    a = real_pairs(a)
    return float(np.sqrt(np.mean(a**2))) if a.size else 0.0


def all_finite(arrays: Any) -> bool:
    """True if no floating point or complex array holds NaN or infinity."""
    return all(np.isfinite(real_pairs(a)).all() for a in arrays if is_inexact(a))


def roundoff(dtype: Any) -> float:
    """The unit roundoff of dtype: half the distance from 1 to the next number; 0 for integers."""
    return float(jnp.finfo(dtype).eps) / 2 if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b|; 0 if both are 0, infinite if only b is 0 or if a is not finite."""
    a, b = real_pairs(a), real_pairs(b)
    with np.errstate(invalid="ignore", over="ignore"):
        difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
    error = 0.0 if difference == 0 else difference / size if size else np.inf
    return float(error) if np.isfinite(error) else np.inf


def index_of_largest(a: np.ndarray) -> tuple[int, ...]:
    """The index of the largest element; () for an array without elements."""
    return tuple(int(i) for i in np.unravel_index(np.argmax(a), a.shape)) if a.size else ()
