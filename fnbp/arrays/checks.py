"""Checks of arguments: one place for the questions, so that every layer asks them in the same words."""

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")
LARGEST = 2**31 - 1  # of a size: the axes of arrays are counted in int32
LONGEST = 80  # characters of a value in a message


@contextmanager
def located(path: str) -> Iterator[None]:
    """Add to any error raised inside the place where it happened: "in serial[2].dense(10)"."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {path}")
        raise


def concrete(x: Any) -> bool:
    """True if x holds values to look at: outside jit and vmap, not only a shape, and not in part in other processes."""
    if isinstance(x, (Tracer, jax.ShapeDtypeStruct)):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def check_key(name: str, key: Any) -> None:
    """TypeError unless key is a JAX random key, of the new or of the uint32 kind."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0
    legacy = dtype == np.uint32 and key.ndim == 1
    if not (typed or legacy):
        raise TypeError(f"{name}: expected a random key, e.g. jax.random.key(0); got {describe(key)}")


def check_size(name: str, what: str, value: Any) -> None:
    """ValueError or TypeError unless value is a whole number from 1 to the longest axis that an array can have."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: {what} must be a whole number, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name}: {what} is too large, it must be at most {LARGEST}, got {value}")


def check_number(name: str, what: str, value: Any) -> float:
    """value as a float; TypeError unless it is a number, ValueError unless it is finite.

    A float of NumPy would give its own dtype to all arrays that it meets, so that the caller goes on with what is
    returned.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: {what} must be a number, got {shown(value)}")
    if not is_finite(value):
        raise ValueError(f"{name}: {what} must be a finite number, got {shown(value)}")
    return float(value)


def is_finite(value: Any) -> bool:
    """True if a number is finite, as a float is."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_rate(name: str, rate: Any) -> float:
    """rate as a float; ValueError or TypeError unless it, the probability to drop a number, is in [0, 1)."""
    check_number(name, "rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: rate must be in [0, 1), got {rate}")
    return float(rate)


def check_name(name: str, given: Any) -> None:
    """TypeError unless the name given to a layer is a str."""
    if not isinstance(given, str):
        raise TypeError(f"{name}: name must be a str, got {describe(given)}")


def check_positive(name: str, what: str, value: Any) -> float:
    """value as a float; ValueError or TypeError unless it is a number above 0."""
    check_number(name, what, value)
    if not value > 0:
        raise ValueError(f"{name}: {what} must be above 0, got {value}")
    return float(value)


def check_is(name: str, what: str, value: Any, kind: type) -> None:
    """TypeError unless value is of that kind; the message says how to make one of the value that came."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {what} must be a {kind.__name__}, got {describe(value)}{how_to_make(kind, value)}")


def check_each(name: str, maker: str, values: tuple, kind: type) -> None:
    """TypeError unless all values are of that kind; if a list of them came, the message says how to pass it on."""
    for i, value in enumerate(values):
        if isinstance(value, (tuple, list, Iterator)) and value and not isinstance(value, kind):
            plural = f"{kind.__name__.lower()}s"
            raise TypeError(
                f"{name}: part {i} must be a {kind.__name__}, got {describe(value)}; {maker} takes {plural} one by "
                f"one: {maker}(*{plural})"
            )
        check_is(name, f"part {i}", value, kind)


FROM_JAX = {
    "Layer": "fnbp.from_jax(f) makes a Layer of a JAX function apply(params, x)",
    "Loss": "fnbp.loss_from_jax(f) makes a Loss of a function (prediction, target) -> losses (m,)",
}


def how_to_make(kind: type, value: Any) -> str:
    """How to make a Layer or a Loss of a function that came in the place of one; "" if there is no way."""
    name = getattr(value, "__name__", None)
    if not callable(value) or not isinstance(name, str):
        return ""
    if makes(value, kind):
        return f"; call it: {name}({'' if takes(value, 0) else '...'})"
    hints = []
    if makes(getattr(sys.modules.get("fnbp"), name, None), kind):
        hints.append(f"fnbp.{name}() is the {kind.__name__.lower()} of that name")
    elif kind.__name__ in FROM_JAX and inspect.isfunction(value) and not takes(value, 2):
        hints.append(f"if it makes one, call it: {name}({'' if takes(value, 0) else '...'})")
    hints += [FROM_JAX[kind.__name__]] if kind.__name__ in FROM_JAX else []
    return "".join(f"; {hint}" for hint in hints)


def makes(f: Any, kind: type) -> bool:
    """True if f is that kind itself, or a function whose annotation says that it returns one."""
    if isinstance(f, type):
        return issubclass(f, kind)
    returned = getattr(f, "__annotations__", {}).get("return")
    return issubclass(returned, kind) if isinstance(returned, type) else returned == kind.__name__


def takes(f: Callable, n: int) -> bool:
    """True if f can be called with n positional arguments, or if that cannot be told."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * n)
    except TypeError:
        return False
    return True


def check_floating(name: str, what: str, x: Any) -> None:
    """TypeError unless x is an array of floating point numbers."""
    if not of_kind(x, jnp.floating):
        raise TypeError(f"{name}: {what} must be a floating point array, got {describe(x)}")


def check_array(name: str, what: str, x: Any) -> None:
    """TypeError unless x is an array of numbers or truth values, of a dtype that JAX knows."""
    if not (of_kind(x, np.number) or of_kind(x, np.bool_)):
        raise TypeError(f"{name}: {what} must be an array, got {describe(x)}")


def of_kind(x: Any, kind: Any) -> bool:
    """True if x is an array, or the shape of one, and its dtype is of that kind."""
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        return False
    try:
        return bool(jnp.issubdtype(x.dtype, kind))
    except TypeError:  # a dtype that NumPy does not know, such as PyTorch's
        return False


def check_dtype(name: str, dtype: Any) -> None:
    """TypeError unless dtype is one of floating point numbers."""
    try:
        floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name}: dtype must be a floating point dtype, got {shown(dtype)}")


def check_last_axis(name: str, x: Any) -> None:
    """ValueError unless an array has a last axis, of at least 1."""
    if not x.shape or not x.shape[-1]:
        raise ValueError(f"{name}: x must have a last axis of at least 1, got shape {tuple(x.shape)}")


def check_finite(name: str, what: str, x: Any) -> None:
    """ValueError, with the first place, if a concrete array holds NaN or infinity. Under jit nothing is checked."""
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        # a constant of a jitted function has values too; float64 may overflow
        with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
            finite = bool(jnp.isfinite(leaf).all())
        if not finite and not concrete(leaf):
            raise ValueError(f"{name}: {what} has non-finite values, in this process or another")
        if not finite:
            bad = np.argwhere(~np.isfinite(np.asarray(leaf)))
            if not len(bad):  # float64 that JAX takes as float32
                raise ValueError(f"{name}: {what} has numbers beyond float32, and jax_enable_x64 is off")
            first = tuple(int(i) for i in bad[0])
            value = np.asarray(leaf)[first]
            raise ValueError(f"{name}: {what} has {len(bad)} non-finite values, the first {value} at index {first}")


Shapes = Mapping[str, tuple[int, ...]]


def check_params(name: str, params: Any, x: Any, due: Shapes | Callable[[Any], Shapes]) -> None:
    """ValueError unless params is a dict of exactly the names and shapes in due. TypeError unless x is an array of
    floating point numbers. due may be a function of x; x must then have a last axis."""
    check_floating(name, "x", x)
    if callable(due):
        check_last_axis(name, x)
        due = due(x)
    check_held(name, "params", params, due, f"x of shape {x.shape} needs", first_channels(x.shape))


def check_held(name: str, what: str, held: Any, due: Shapes, why: str = "it must be", hint: str = "") -> None:
    """ValueError unless what is held is a dict of exactly these names and shapes."""
    if not isinstance(held, Mapping) or set(held) != set(due):
        came = sorted(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"{name}: {what} must hold {sorted(due)}, got {came}; do they belong to a different net?")
    for key, shape in due.items():
        if np.shape(held[key]) != shape:
            raise ValueError(f"{name}: {what}[{key!r}] has shape {np.shape(held[key])}, {why} {shape}{hint}")


def first_channels(shape: tuple[int, ...]) -> str:
    """A hint for images that look as if their channels came first: (m, 3, 32, 32)."""
    looks = len(shape) == 4 and 1 <= shape[1] <= 4 and shape[1] < shape[-1]
    return "; channels are last: (m, height, width, channels)" if looks else ""


def check_parts(name: str, what: str, tree: Any, count: int) -> None:
    """ValueError unless tree is a tuple or list with one entry for each part of a combinator."""
    if not isinstance(tree, (tuple, list)) or len(tree) != count:
        came = len(tree) if isinstance(tree, (tuple, list)) else f"a {type(tree).__name__}"
        raise ValueError(
            f"{name}: {what} must have {count} entries, one for each layer, got {came}; "
            "do they belong to a different net?"
        )


def choose(kind: str, name: Any, table: Mapping[str, T], where: str = "") -> T:
    """table[name]; ValueError, with the nearest name and with who asks ("parallel: "), if it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{where}unknown {kind} {shown(name)}{hint} There are: {', '.join(sorted(table))}")


def check_returned(name: str, what: str, returned: Any, due: str) -> Any:
    """What a function returned. TypeError unless it is a tuple with an entry for each name in due: "y, state, res"."""
    if not isinstance(returned, (tuple, list)) or len(returned) != len(due.split(", ")):
        came = f"{len(returned)} values" if isinstance(returned, (tuple, list)) else describe(returned)
        raise TypeError(f"{name}: {what} must return ({due}), got {came}")
    return returned


def describe(x: Any) -> str:
    """A value in a few words: dtype and shape of an array, the parts of a tuple, otherwise type and name or value."""
    return cut(described(x), 2 * LONGEST)


def described(x: Any) -> str:
    """As describe, at any length."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    if isinstance(x, Mapping):
        keys = ", ".join(map(repr, list(x)[:3])) + (", ..." if len(x) > 3 else "")
        return f"a {type(x).__name__} of {len(x)}: {keys}" if x else f"an empty {type(x).__name__}"
    named = getattr(x, "__name__", None) or getattr(x, "name", None)
    if isinstance(x, (tuple, list)) and not isinstance(named, str):
        parts = ", ".join(map(described, x[:3])) + (", ..." if len(x) > 3 else "")
        return f"a {type(x).__name__} of {len(x)}: {parts}" if x else f"an empty {type(x).__name__}"
    if is_dataclass(x) and not isinstance(x, type) and not named:
        return f"{type(x).__name__} of {', '.join(f.name for f in fields(x)) or 'nothing'}"
    return f"{type(x).__name__} {cut(str(named or repr(x)))}"


def shown(value: Any) -> str:
    """A value as Python writes it, cut if that is long."""
    return cut(repr(value))


def cut(text: str, most: int = LONGEST) -> str:
    """text on one line, of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def as_arrays(name: str, what: str, tree: Any) -> Any:
    """A tree as JAX arrays. ValueError if their dtype does not hold a number: a label or token would become another."""
    check_representable(name, what, tree)
    return jax.tree.map(jnp.asarray, tree)


def check_representable(name: str, what: str, tree: Any) -> None:
    """ValueError if a tree has a number that its dtype on the device, such as int32 for int64, does not hold."""
    for a in jax.tree.leaves(tree):
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "iufc":
            continue
        held = jax.dtypes.canonicalize_dtype(a.dtype)
        if held == a.dtype:
            continue
        bounds = jnp.iinfo(held) if jnp.issubdtype(held, jnp.integer) else jnp.finfo(held)
        wrong = (a < bounds.min) | (a > bounds.max) if a.dtype.kind in "iu" else np.isfinite(a) & (abs(a) > bounds.max)
        for first in np.argwhere(wrong)[:1].tolist():
            raise ValueError(f"{name}: {what} holds {a[tuple(first)]} at index {first}, which {held} does not hold")
