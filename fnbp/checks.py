"""What bad input meets: one place for the questions, so that every layer asks them in the same words."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


@contextmanager
def located(path: str) -> Iterator[None]:
    """Add to any error raised inside the place where it happened: "in serial[2].dense(10)"."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {path}")
        raise


def concrete(x: Any) -> bool:
    """True where x holds values to look at: outside jit and vmap, and not a mere shape."""
    return not isinstance(x, (Tracer, jax.ShapeDtypeStruct))


def check_key(name: str, key: Any) -> None:
    """TypeError unless key is a JAX random key, of the new or of the uint32 kind."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0
    legacy = dtype == np.uint32 and key.ndim == 1
    if not (typed or legacy):
        raise TypeError(f"{name}: a random key is due, such as jax.random.key(0); got {describe(key)}")


def check_size(name: str, what: str, value: Any) -> None:
    """ValueError or TypeError unless value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: {what} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {value}")


def check_number(name: str, what: str, value: Any) -> None:
    """TypeError unless value is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: {what} must be a number, got {value!r}")


def check_positive(name: str, what: str, value: Any) -> None:
    """ValueError or TypeError unless value is a number above 0."""
    check_number(name, what, value)
    if not value > 0:
        raise ValueError(f"{name}: {what} must be above 0, got {value}")


def check_is(name: str, what: str, value: Any, kind: type) -> None:
    """TypeError unless value is of that kind; a constructor that was not called is told so."""
    if not isinstance(value, kind):
        hint = f"; call it: {value.__name__}()" if callable(value) and hasattr(value, "__name__") else ""
        raise TypeError(f"{name}: {what} must be a {kind.__name__}, got {describe(value)}{hint}")


def check_floating(name: str, what: str, x: Any) -> None:
    """TypeError unless x is an array of floating point numbers."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: {what} must be a floating point array, got {describe(x)}")


def check_finite(name: str, what: str, x: Any) -> None:
    """ValueError, with the first place, where a concrete array holds NaN or infinity. Says nothing under jit."""
    for leaf in jax.tree.leaves(x):
        if not concrete(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        with jax.ensure_compile_time_eval():  # a constant of a jitted function has values too
            finite = bool(jnp.isfinite(leaf).all())
        if not finite:
            bad = np.argwhere(~np.isfinite(np.asarray(leaf)))
            first = tuple(int(i) for i in bad[0])
            value = np.asarray(leaf)[first]
            raise ValueError(f"{name}: {what} has {len(bad)} non-finite values, the first {value} at index {first}")


def check_params(name: str, params: Any, x: Any, due: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless params is a dict of exactly these names and shapes, which are due for this x. TypeError unless
    x is an array of floating point numbers."""
    check_floating(name, "x", x)
    check_held(name, "params", params, due, f"x of shape {x.shape} needs")


def check_held(name: str, what: str, held: Any, due: Mapping[str, tuple[int, ...]], why: str = "it must be") -> None:
    """ValueError unless what is held is a dict of exactly these names and shapes."""
    if not isinstance(held, Mapping) or set(held) != set(due):
        came = sorted(held) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"{name}: {what} must hold {sorted(due)}, got {came}: are these the {what} of another net?")
    for key, shape in due.items():
        if jnp.shape(held[key]) != shape:
            raise ValueError(f"{name}: {what}[{key!r}] has shape {jnp.shape(held[key])}, {why} {shape}")


def check_parts(name: str, what: str, tree: Any, count: int) -> None:
    """ValueError unless tree is a tuple or list with one entry for each part of a combinator."""
    if not isinstance(tree, (tuple, list)) or len(tree) != count:
        came = len(tree) if isinstance(tree, (tuple, list)) else f"a {type(tree).__name__}"
        raise ValueError(f"{name}: {what} must have {count} entries, one a layer, got {came}: is it of another net?")


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """table[name]; ValueError with the nearest names where there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {kind} {name!r}{hint} There are: {', '.join(sorted(table))}")


def check_returned(name: str, what: str, returned: Any, due: str) -> Any:
    """What a function returned. TypeError unless it is a tuple of as many entries as due names: "y, state, res"."""
    if not isinstance(returned, (tuple, list)) or len(returned) != len(due.split(", ")):
        came = f"{len(returned)} things" if isinstance(returned, (tuple, list)) else describe(returned)
        raise TypeError(f"{name}: {what} must return ({due}), got {came}")
    return returned


def describe(x: Any) -> str:
    """A value in few words: dtype and shape of an array, the parts of a tuple, else type and name or value."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    if isinstance(x, (tuple, list)):
        parts = ", ".join(map(describe, x[:3])) + (", ..." if len(x) > 3 else "")
        return f"a {type(x).__name__} of {len(x)}: {parts}" if x else f"an empty {type(x).__name__}"
    return f"{type(x).__name__} {getattr(x, '__name__', None) or getattr(x, 'name', None) or repr(x)}"


def as_arrays(name: str, what: str, tree: Any) -> Any:
    """A tree as JAX arrays. ValueError for an integer that the dtype does not hold: labels and tokens would change."""
    return jax.tree.map(lambda a: as_array(name, what, a), tree)


def as_array(name: str, what: str, a: Any) -> jax.Array:
    """One array of that tree."""
    array = jnp.asarray(a)
    if isinstance(a, np.ndarray) and np.issubdtype(a.dtype, np.integer) and array.dtype != a.dtype:
        bounds = jnp.iinfo(array.dtype)
        for first in np.argwhere((a < bounds.min) | (a > bounds.max))[:1].tolist():
            raise ValueError(
                f"{name}: {what} holds {a[tuple(first)]} at index {first}, which {array.dtype} does not hold"
            )
    return array
