"""Where a unit is tried: the point that was given, others like it, and the places where backwards go wrong."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import cast, compiled_or_plain, first_line, is_floating, on_host, rms
from fnbp.comparison.subject import Unit

LARGE = 50.0  # root mean square of large logits: e^50 is near the end of float32
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)


DRAWN = ("another", "nearby")
SCALES = (-20, 0, 20)  # powers of 2 for the cotangents of draws, in turn
SIZES = ("one_example", "one_position", "prime_sizes")
JOINS = ("given", "another", "one_example")  # the probes of a combinator


class Probe(NamedTuple):
    """A point to try a unit at.

    wide  args and dy in float64 with all their digits, where they were drawn so: what a cast to float32 inside a
          backward loses is then seen
    """

    name: str
    args: tuple
    fixed: Any
    dy: Any
    wide: tuple | None = None

    def moved_to(self, args: tuple, dy: Any = None) -> "Probe":
        """The same with other args, and another dy where one is given."""
        return self._replace(args=args, dy=self.dy if dy is None else dy, wide=None)

    def of(self, dtype: Any) -> tuple:
        """args, fixed, dy in dtype, or, for None, as given."""
        args, dy = (self.args, self.dy) if dtype is None or self.wide is None else self.wide
        return cast((args, self.fixed, dy), dtype)


Rng = np.random.Generator


def probes_of(unit: Unit, rng: Rng, wanted: tuple[str, ...]) -> Iterator[Probe | str]:
    """The probes that suit this unit, the given point first; a line of text where one could not be built.

    A combinator joins what its parts do, so the extremes are for the parts alone.
    """
    draws = 0
    for name in wanted:
        if unit.layer is not None and unit.layer.parts and name not in JOINS:
            continue
        draws += name in DRAWN
        try:
            point = PROBES[name](unit, rng)
            if point is None:
                continue
            args, fixed = point
            told = name == "given" and unit.dy is not None
            scale = SCALES[draws % len(SCALES)] if name in DRAWN else 0
            dy = unit.dy if told else draw_dy(unit, args, fixed, rng, scale)
            yield widened(Probe(name, args, fixed, dy), rng) if name == "nearby" else Probe(name, args, fixed, dy)
        except Exception as error:  # the subject refuses that size or those values
            yield f"{unit.path}: not tried at {name!r}, it raises {type(error).__name__}: {first_line(error)}"


def draw_dy(unit: Unit, args: tuple, fixed: Any, rng: Rng, scale: int = 0) -> Any:
    """A Gaussian cotangent of what the unit returns, times 2^scale; of several outputs, each over its root mean square.

    Large and small ones are for what a backward clips, or takes for zero.
    """
    y = jax.eval_shape(unit.reference, args, fixed)
    sizes = [1.0] * len(jax.tree.leaves(y))
    if len(sizes) > 1:
        sizes = [
            rms(a) if is_floating(a) else 1.0 for a in jax.tree.leaves(compiled_or_plain(unit.reference, args, fixed))
        ]

    def one(a, size):
        if not is_floating(a):
            return np.zeros(a.shape, jax.dtypes.float0)
        least = 4 if a.dtype == np.float16 else 20
        factor = 2.0 ** np.clip(scale, -least, least) / (size if np.isfinite(size) and size > 0 else 1.0)
        return np.asarray(rng.standard_normal(a.shape) * factor, a.dtype)

    return jax.tree.unflatten(jax.tree.structure(y), list(map(one, jax.tree.leaves(y), sizes)))


def widened(probe: Probe, rng: Rng) -> Probe:
    """The probe with digits of its own beyond those of the working dtype."""

    def one(a):
        return np.asarray(a, np.float64) * (1 + 2.0**-26 * rng.uniform(-1, 1, np.shape(a))) if is_floating(a) else a

    return probe._replace(wide=jax.tree.map(one, (probe.args, probe.dy)))


def with_values(tree: Any, f: Callable[[np.ndarray], Any]) -> Any:
    """f on the values of every floating leaf, in float64, back in its dtype."""
    return jax.tree.map(lambda a: np.asarray(f(np.asarray(a, np.float64)), a.dtype) if is_floating(a) else a, tree)


def moved(tree: Any, rng: Rng) -> Any:
    """Every floating leaf moved by about a tenth: an initial 0 or 1 hides mistakes."""
    return with_values(tree, lambda a: a + 0.1 * (np.abs(a) + (rms(a) or 1.0)) * rng.standard_normal(a.shape))


def shuffled(tree: Any, rng: Rng) -> Any:
    """Every leaf with its own values in another order, so still of its domain; integers too."""

    def one(a):
        if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.number):
            return a
        return rng.permutation(np.asarray(a).ravel()).reshape(a.shape)

    return jax.tree.map(one, tree)


def on_x(unit: Unit, f: Callable[[Any], Any], args: tuple | None = None) -> tuple:
    """args with f on what flows through: x of a layer, the prediction of a loss, every argument of a function."""
    args = unit.args if args is None else args
    return tuple(arg if name == "" else f(arg) for name, arg in zip(unit.names, args, strict=True))


def on_params(unit: Unit, f: Callable[[Any], Any]) -> tuple:
    """args with f on the parameters of a layer."""
    return tuple(f(arg) if name == "" else arg for name, arg in zip(unit.names, unit.args, strict=True))


def given(unit: Unit, rng: Rng):
    """The point that was given."""
    return unit.args, unit.fixed


def another(unit: Unit, rng: Rng):
    """Parameters moved; x in another order."""
    return on_x(unit, lambda x: shuffled(x, rng), on_params(unit, lambda p: moved(p, rng))), unit.fixed


def nearby(unit: Unit, rng: Rng):
    """Everything moved."""
    return moved(unit.args, rng), unit.fixed


def mirrored(unit: Unit, rng: Rng):
    """-x: so that every element is seen with both signs."""
    return on_x(unit, lambda x: with_values(x, np.negative)), unit.fixed


def zeros(unit: Unit, rng: Rng):
    """A third of x exactly 0."""
    return on_x(unit, lambda x: with_values(x, lambda a: np.where(rng.random(a.shape) < 1 / 3, 0, a))), unit.fixed


def ties(unit: Unit, rng: Rng):
    """Three values of x, over and over; for integers: repeated tokens."""

    def one(a):
        if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.number) or not a.size:
            return a
        few = rng.choice(np.asarray(a).ravel(), 3)
        return np.asarray(rng.choice(few, a.shape))

    return on_x(unit, lambda x: jax.tree.map(one, x)), unit.fixed


def large(unit: Unit, rng: Rng):
    """x of root mean square 50: saturation, and logits whose exponentials overflow. Several arguments share the 50:
    they may be multiplied."""
    return sized(unit, LARGE), unit.fixed


def huge(unit: Unit, rng: Rng):
    """x of root mean square 1e5, or 1e3 in float16: for what a backward clips."""
    return sized(unit, 1e3 if any(x.dtype == np.float16 for x in flowing(unit)) else 1e5), unit.fixed


def small(unit: Unit, rng: Rng):
    """x of root mean square 1e-3, or a prediction so near to its target: for what a backward takes for 0."""
    if unit.names == ("prediction",):
        (p, *others), (y, _) = unit.args, unit.fixed
        if is_floating(y) and is_floating(p) and y.shape == p.shape:
            return (np.asarray(y + 1e-3 * (np.asarray(p, np.float64) - y), p.dtype), *others), unit.fixed
    return sized(unit, 1e-3), unit.fixed


def sized(unit: Unit, size: float) -> tuple:
    """args with what flows through of that root mean square, which several arguments share by multiplication."""
    several = sum(is_floating(leaf) for leaf in flowing(unit)) or 1
    return on_x(unit, lambda x: with_values(x, lambda a: a * (size ** (1 / several) / (rms(a) or 1.0))))


def masked(unit: Unit, rng: Rng):
    """The first example fully masked."""
    ctx = unit.fixed[1] if unit.layer is not None else None
    if ctx is None or ctx.mask is None:
        return None
    mask = jax.tree.map(lambda m: np.where(np.arange(len(m)).reshape(-1, *[1] * (m.ndim - 1)) == 0, False, m), ctx.mask)
    return unit.args, (unit.fixed[0], replace(ctx, mask=mask))


def one_example(unit: Unit, rng: Rng):
    """A batch of 1."""
    if unit.take is None or batch_of(unit) in (None, 1):
        return None
    return unit.take(unit.args, unit.fixed, lambda a: a[:1])


def one_position(unit: Unit, rng: Rng):
    """A length of 1, where x has a second axis of positions."""
    if unit.take is None or any(x.ndim < 3 or x.shape[1] == 1 for x in flowing(unit)):
        return None
    return unit.take(unit.args, unit.fixed, lambda a: a[:, :1] if a.ndim > 1 else a)


def prime_sizes(unit: Unit, rng: Rng):
    """Every axis of x a prime of its own, with parameters of that size: square ones hide a transpose."""
    if not resizable(unit):
        return prime_batch(unit, rng)
    assert unit.layer is not None
    (x,) = flowing(unit)
    shape = tuple(PRIMES[3 + 2 * i] for i in range(x.ndim))
    x = np.asarray(rng.choice(np.asarray(x, np.float64).ravel(), shape), x.dtype)
    key = jax.random.key(int(rng.integers(1 << 31)))
    try:
        params, state = on_host(compiled_or_plain(unit.layer.init, key, x))
        jax.eval_shape(unit.layer.forward, params, state, x, unit.fixed[1])
    except Exception:  # the layer is of one size
        return prime_batch(unit, rng)
    return (moved(params, rng), x), (state, unit.fixed[1])


def prime_batch(unit: Unit, rng: Rng):
    """A batch whose size is no other size."""
    m = batch_of(unit)
    if unit.take is None or not m:
        return None
    others = {n for leaf in jax.tree.leaves(unit.args) for n in jnp.shape(leaf)}
    size = next((p for p in PRIMES if p > 4 and p not in others), None)
    if size is None:
        return None
    rows = rng.integers(0, m, size)
    return unit.take(unit.args, unit.fixed, lambda a: a[rows])


def resizable(unit: Unit) -> bool:
    """True for a layer with parameters but no state, of one floating x without a mask."""
    if unit.layer is None or unit.layer.parts or unit.fixed[1].mask is not None:
        return False
    xs = flowing(unit)
    stateless = jax.tree.leaves(unit.args[0]) and not jax.tree.leaves(unit.fixed[0])
    return bool(stateless) and len(xs) == 1 and is_floating(xs[0])


def flowing(unit: Unit) -> list[Any]:
    """The leaves of what flows through: all of args but params."""
    return [leaf for name, arg in zip(unit.names, unit.args, strict=True) if name for leaf in jax.tree.leaves(arg)]


def batch_of(unit: Unit) -> int | None:
    """How many examples there are; None where the leaves of x do not agree."""
    sizes = {leaf.shape[0] if jnp.ndim(leaf) else None for leaf in flowing(unit)}
    return sizes.pop() if len(sizes) == 1 else None


PROBES: dict[str, Callable[[Unit, Rng], Any]] = {
    f.__name__: f
    for f in (
        given,
        another,
        nearby,
        mirrored,
        zeros,
        ties,
        large,
        huge,
        small,
        masked,
        one_example,
        one_position,
        prime_sizes,
    )
}
