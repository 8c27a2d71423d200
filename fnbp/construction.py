"""How a value was made: its constructor and arguments, by which layers and losses are equal, hashed and pickled."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["constructor"]

Maker = TypeVar("Maker", bound=Callable[..., Any])


def constructor(make: Maker) -> Maker:
    """Decorate a function that makes a Layer or a Loss: what it returns knows how it was made.

        dense(5) == dense(n_out=5)      hash(dense(5))      pickle.dumps(dense(5))      repr: "dense(5)"

    Two layers are then equal if one constructor made them of equal arguments: an argument to jit by static_argnums, or
    a key of a cache. Functions among the arguments are equal if they are the same object. A layer whose functions were
    replaced afterwards is equal only to itself.

    Options: make: a pure function; to be pickled it must stand at the top of its module.
    Raises:  TypeError if make is not a function, or is a method: what self holds may change; or, when it is called, if
             it returns neither a Layer nor a Loss nor a Metric.
    """
    name = getattr(make, "__qualname__", "")
    if not inspect.isfunction(make) or not ("." not in name or name.rpartition(".")[0].endswith("<locals>")):
        raise TypeError(f"constructor: expected a function, not a method, got {name or type(make).__name__}")
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        args, options = as_given(args), as_given(options)
        value = make(*args, **options)
        if not hasattr(value, "made"):
            raise TypeError(f"{name} must return a Layer, a Loss or a Metric, got {type(value).__name__}")
        call = Made(made, signature.bind(*args, **options), tuple(value[:-1]))
        _ = call.key  # told now: an array that is written to later is another argument
        return value._replace(made=call)

    return made  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Made:
    """The call that made a value: its constructor, the arguments, and the fields that it returned."""

    constructor: Callable[..., Any]
    given: inspect.BoundArguments
    fields: tuple[Any, ...]

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, also those that are the default."""
        whole = inspect.BoundArguments(self.given.signature, self.given.arguments.copy())
        whole.apply_defaults()
        return dict(whole.arguments)

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls of one constructor with equal arguments."""
        return self.constructor, *((name, frozen(value)) for name, value in self.arguments.items())

    @functools.cached_property
    def digest(self) -> int:
        """The hash of key."""
        return hash(self.key)

    def __str__(self) -> str:
        return f"{self.constructor.__name__}({', '.join(self.shown())})"

    def shown(self) -> Iterator[str]:
        """Each argument as it is written, but for those that are the default."""
        plain, keys = True, dict(self.key[1:])  # plain: no argument before this one was left out
        for name, parameter in self.given.signature.parameters.items():
            default, kind = parameter.default, parameter.kind
            if name not in self.given.arguments or keys[name] == frozen(default):
                plain = False
                continue
            value = self.given.arguments[name]
            if kind == parameter.VAR_POSITIONAL:
                yield from map(written, value)
            elif kind == parameter.VAR_KEYWORD:
                yield from (f"{name}={written(one)}" for name, one in value.items())
            else:
                positional = plain and kind != parameter.KEYWORD_ONLY and default is parameter.empty
                yield written(value) if positional else f"{name}={written(value)}"


def as_given(value: Any) -> Any:
    """Arguments with lists, dicts and NumPy arrays of their own, which nobody writes to later."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (tuple, list):
        return type(value)(map(as_given, value))
    return {name: as_given(one) for name, one in value.items()} if type(value) is dict else value


class Alone:
    """An argument that is equal only to itself."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Alone) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def frozen(value: Any) -> Any:
    """A value that can be hashed, equal for equal arguments: 1, 1.0 and True are three, arrays are their numbers."""
    if isinstance(value, tuple) and hasattr(value, "made"):
        return value
    if isinstance(value, (tuple, list)):
        return type(value), *map(frozen, value)
    if isinstance(value, dict):
        return dict, *((frozen(key), frozen(one)) for key, one in value.items())
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return Alone(value)
    if isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, Tracer):
        array = np.asarray(value)
        return np.ndarray, array.dtype, array.shape, array.tobytes()
    if is_dtype(value):
        return np.dtype(value)
    if isinstance(value, (float, np.generic)):
        return type(value), np.asarray(value).tobytes()  # 0.0 and -0.0 are two
    if isinstance(value, MethodType):
        return Alone(value)  # what its object holds may change
    try:
        hash(value)
    except TypeError:
        return Alone(value)
    return type(value), value


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    """The arrays among the arguments of a value, and of the values among these."""
    if hasattr(value, "made"):
        if (made := made_of(value)) is not None:
            yield from arrays_in(dict(made.given.arguments))
        else:
            yield from arrays_in(tuple(getattr(value, "parts", ())))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from arrays_in(one)
    elif isinstance(value, dict):
        yield from arrays_in(tuple(value.values()))
    elif isinstance(value, (np.ndarray, jax.Array)) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        yield np.asarray(value)


def is_dtype(value: Any) -> bool:
    """True if a value is a dtype, or the class of one: np.float32, jnp.bfloat16."""
    of_numpy = isinstance(value, type) and issubclass(value, np.generic)
    return of_numpy or isinstance(value, (np.dtype, type(jnp.float32)))


def written(value: Any) -> str:
    """An argument as it is written in a call."""
    if is_dtype(value):
        return repr(np.dtype(value).name)
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "made"):
        inside = ", ".join(map(written, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, np.generic):
        return repr(value.item())
    if callable(value) and not hasattr(value, "made"):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def once(maker: Callable, *args: Any) -> Any:
    """maker(*args), made once for equal arguments, so that what is compiled for them is compiled once.

    Layers and losses are equal if equal calls made them, optax transformations if their functions are the same objects.
    With a bound method among the arguments it is made anew: what its object holds may have changed.
    """
    if any(isinstance(leaf, MethodType) for leaf in jax.tree.leaves(args)):
        return maker(*args)
    try:
        hash(args)
    except TypeError:
        return maker(*args)
    return remembered(maker, *args)


@functools.lru_cache(maxsize=16, typed=True)  # a NamedTuple equals another of the same functions, whatever its type
def remembered(maker: Callable, *args: Any) -> Any:
    """maker(*args), of the last calls."""
    return maker(*args)


# --- of a NamedTuple whose last field is made ---


def made_of(value: Any) -> Made | None:
    """How a value was made; None if no constructor made it, or one of its fields was replaced since."""
    made = value.made
    if made is None or any(a is not b for a, b in zip(value[:-1], made.fields, strict=True)):
        return None
    return made


def is_alike(self: Any, other: Any) -> bool:
    """True if one constructor made both of equal arguments; without one, if they hold the same functions."""
    if type(self) is not type(other):
        return False
    ours, others = made_of(self), made_of(other)
    if ours is None or others is None:
        return ours is others and tuple(self[:-1]) == tuple(other[:-1])
    return ours is others or ours.key == others.key


def is_other(self: Any, other: Any) -> bool:
    """Not is_alike."""
    return not is_alike(self, other)


def hashed(self: Any) -> int:
    """Equal for values that are alike."""
    made = made_of(self)
    return hash(tuple(self[:-1])) if made is None else made.digest


def call_of(self: Any) -> str:
    """The call that makes a value, as Python: serial(dense(5), sigmoid()); its name if there is none."""
    made = made_of(self)
    if made is not None:
        return str(made)
    parts = ", ".join(map(repr, getattr(self, "parts", ())))
    return f"<{type(self).__name__} {self.name}{': ' if parts else ''}{parts}>"


def reduced(self: Any) -> tuple[Any, ...]:
    """For pickle: the call that made a value; without one its fields, which pickle if they are no closures."""
    made = made_of(self)
    if made is None:
        return type(self), (*self[:-1], None)
    return again, (made.constructor, made.given.args, made.given.kwargs)


def again(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a constructor as it was called before."""
    return make(*args, **options)


def itself(self: Any, memo: Any = None) -> Any:
    """For copy: a value that never changes is its own copy."""
    return self
