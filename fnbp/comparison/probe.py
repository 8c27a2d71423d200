"""A probe: a point at which a subject is tried, and what may be changed of the given one to make it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import in_dtype, is_inexact, rms, with_numbers
from fnbp.comparison.subject import Subject

AROUND = ("another", "nearby")  # drawn around the given point
ORDINARY = ("given", *AROUND)  # the others are extremes
SAME_DIGITS = ("given", "another")  # where float64 starts from the same digits as the working dtype


MOST_PARTS = 8  # of more, none is tried alone


class Probe(NamedTuple):
    """A point at which a subject is tried.

    wide  args and dy with all digits of float64, if they were drawn so: a cast to float32 inside a backward then shows,
          because it loses digits
    part  what was changed, if a probe tries one after the other: "params", or an argument
    """

    name: str
    args: tuple
    fixed: Any
    dy: Any
    wide: tuple | None = None
    part: str = ""

    @property
    def title(self) -> str:
        """The name, with what was changed: "each_zero of params"."""
        return f"{self.name} of {self.part}" if self.part else self.name

    def with_args(self, args: tuple, dy: Any = None) -> "Probe":
        """The same probe with other args, and with another dy if one is given."""
        return self._replace(args=args, dy=self.dy if dy is None else dy, wide=None)

    def of(self, dtype: Any) -> tuple:
        """args, fixed and dy in dtype, or, for None, as given."""
        args, dy = (self.args, self.dy) if dtype is None or self.wide is None else self.wide
        return in_dtype((args, self.fixed, dy), dtype)


class At(NamedTuple):
    """Where a probe stands: args, what is not differentiated, a cotangent or None for a drawn one, and Probe.part."""

    args: tuple
    fixed: Any
    dy: Any = None
    part: str = ""


Rng = np.random.Generator
Place = At | None  # what a probe returns, or a list of such


def cotangent(y: Any, f: Callable[[tuple[int, ...]], Any]) -> np.ndarray:
    """A cotangent of an output: f(its shape) in its dtype, or JAX's zeros without a dtype for integers."""
    if not is_inexact(y):
        return np.zeros(y.shape, jax.dtypes.float0)
    return with_numbers(lambda a: f(a.shape), np.zeros(y.shape, y.dtype))


# --- what is changed ---


def with_values(tree: Any, f: Callable[[np.ndarray], Any]) -> Any:
    """Apply f to the numbers of every floating or complex leaf, in float64, and cast back to its dtype."""
    return jax.tree.map(lambda a: with_numbers(f, a) if is_inexact(a) and a.size else a, tree)


def on_x(subject: Subject, f: Callable[[Any], Any], args: tuple | None = None) -> tuple:
    """args with f applied to what flows through: a layer's x, a loss's prediction, all arguments of a function."""
    args = subject.args if args is None else args
    return tuple(arg if name == "" else f(arg) for name, arg in zip(subject.names, args, strict=True))


def on_params(subject: Subject, f: Callable[[Any], Any]) -> tuple:
    """args with f applied to the parameters of a layer."""
    return tuple(f(arg) if name == "" else arg for name, arg in zip(subject.names, subject.args, strict=True))


def flowing(subject: Subject) -> list[Any]:
    """The leaves of what flows through: of all args except params."""
    return [
        leaf for name, arg in zip(subject.names, subject.args, strict=True) if name for leaf in jax.tree.leaves(arg)
    ]


def parts_of(subject: Subject, f: Callable[[np.ndarray], Any]) -> list[At]:
    """Places where one part is changed by f and the others stay: the params, each leaf of them, the state, or one of
    several arguments."""
    places = []
    if subject.layer is not None:
        state, ctx = subject.fixed
        places += of_params(subject, f)
        if any(map(is_inexact, jax.tree.leaves(state))):
            places.append(At(subject.args, (with_values(state, f), ctx), part="state"))
        return places
    moving = [i for i, arg in enumerate(subject.args) if any(map(is_inexact, jax.tree.leaves(arg)))]
    for i in moving if 1 < len(subject.args) and len(moving) <= MOST_PARTS else ():
        args = (*subject.args[:i], with_values(subject.args[i], f), *subject.args[i + 1 :])
        places.append(At(args, subject.fixed, part=subject.names[i]))
    return places


def of_params(subject: Subject, f: Callable[[np.ndarray], Any]) -> Iterator[At]:
    """Places where f is applied to the params of a layer: to all of them, and to each of several leaves alone."""
    flat, tree = jax.tree_util.tree_flatten_with_path(subject.args[0])
    moving = [i for i, (_, a) in enumerate(flat) if is_inexact(a)]
    alone = [[i] for i in moving] if 1 < len(moving) <= MOST_PARTS else []
    for chosen in [moving, *alone] if moving else []:
        params = jax.tree.unflatten(tree, [with_values(a, f) if i in chosen else a for i, (_, a) in enumerate(flat)])
        name = jax.tree_util.keystr(flat[chosen[0]][0], simple=True, separator=".")
        part = "params" if chosen is moving else f"params.{name}"
        yield At((params, *subject.args[1:]), subject.fixed, part=part)


def everything(subject: Subject, f: Callable[[np.ndarray], Any]) -> At | None:
    """The place where f is applied to all that there is: args, and the state of a layer."""
    if subject.layer is None and len(subject.args) == 1:
        return None  # the probes of x try that
    fixed = subject.fixed
    if subject.layer is not None:
        fixed = with_values(fixed[0], f), fixed[1]
    return At(with_values(subject.args, f), fixed)


def moved_a_tenth(tree: Any, rng: Rng) -> Any:
    """Move every floating leaf by about a tenth: an initial 0 or 1 hides mistakes."""
    return with_values(tree, lambda a: a + 0.1 * (np.abs(a) + (rms(a) or 1.0)) * rng.standard_normal(a.shape))


def shuffled(tree: Any, rng: Rng) -> Any:
    """Put the values of every leaf in another order, so that they stay in its domain; of integers and truth values."""

    def one(a):
        if not of_numbers(a) or not a.size:
            return a
        return rng.permutation(np.asarray(a).ravel()).reshape(a.shape)

    return jax.tree.map(one, tree)


def of_numbers(a: Any) -> bool:
    """True for an array of numbers or truth values, not for random keys."""
    return hasattr(a, "dtype") and (jnp.issubdtype(a.dtype, jnp.number) or a.dtype == bool)


def with_dy(subject: Subject, f: Callable[[tuple[int, ...]], Any]) -> At:
    """The given point with f(shape) for the cotangent of each output."""
    y = subject.shape_at(subject.args, subject.fixed)
    return At(subject.args, subject.fixed, jax.tree.map(lambda a: cotangent(a, f), y))


def both_signs(place: At) -> list[At]:
    """The place, and the same with its cotangent negated."""
    negated = jax.tree.map(lambda d: np.asarray(-d, d.dtype) if is_inexact(d) else d, place.dy)
    return [place, place._replace(dy=negated, part="the other sign")]


def half(subject: Subject) -> bool:
    """True if float16 is among the outputs."""
    return any(a.dtype == np.float16 for a in jax.tree.leaves(subject.shape_at(subject.args, subject.fixed)))
