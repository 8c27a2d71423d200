"""The probes: the given point, draws around it, and the places where backwards go wrong."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import as_numpy_32, compiled_or_plain, first_line, in_dtype, is_floating, rms
from fnbp.comparison.subject import Subject

LARGE = 50.0  # root mean square of large logits: e^50 is near the end of float32
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)

AROUND = ("another", "nearby")  # drawn around the given point
ORDINARY = ("given", *AROUND)  # the others are extremes
SAME_DIGITS = ("given", "another")  # where float64 starts from the same digits as the working dtype
SIZES = ("one_example", "one_position", "prime_sizes")
OF_COMBINATORS = ("given", "another", "one_example")
SCALES = (-20, 0, 20)  # powers of 2 for the cotangents of draws, in turn


class Probe(NamedTuple):
    """A point at which a subject is tried.

    wide  args and dy with all digits of float64, if they were drawn so: a cast to float32 inside a backward then shows,
          because it loses digits
    """

    name: str
    args: tuple
    fixed: Any
    dy: Any
    wide: tuple | None = None

    def with_args(self, args: tuple, dy: Any = None) -> "Probe":
        """The same probe with other args, and with another dy if one is given."""
        return self._replace(args=args, dy=self.dy if dy is None else dy, wide=None)

    def of(self, dtype: Any) -> tuple:
        """args, fixed and dy in dtype, or, for None, as given."""
        args, dy = (self.args, self.dy) if dtype is None or self.wide is None else self.wide
        return in_dtype((args, self.fixed, dy), dtype)


Rng = np.random.Generator
At = tuple[tuple, Any]  # args, fixed


def probes_of(subject: Subject, rng: Rng, wanted: tuple[str, ...]) -> Iterator[Probe | str]:
    """Build the wanted probes that suit this subject, in order; a line of text in the place of one that fails.

    A combinator only joins what its parts do, so only the parts are tried at extremes.
    """
    draws = 0
    for name in wanted:
        if subject.layer is not None and subject.layer.parts and name not in OF_COMBINATORS:
            continue
        draws += name in AROUND
        try:
            point = PROBES[name](subject, rng)
            if point is None:
                continue
            args, fixed = point
            told = name == "given" and subject.dy is not None
            scale = SCALES[draws % len(SCALES)] if name in AROUND else 0
            dy = subject.dy if told else draw_dy(subject, args, fixed, rng, scale)
            yield (
                with_more_digits(Probe(name, args, fixed, dy), rng)
                if name == "nearby"
                else Probe(name, args, fixed, dy)
            )
        except Exception as error:  # the subject refuses that size or those values
            yield f"{subject.path}: not tried at {name!r}, it raises {type(error).__name__}: {first_line(error)}"


def draw_dy(subject: Subject, args: tuple, fixed: Any, rng: Rng, scale: int = 0) -> Any:
    """A Gaussian cotangent of what the subject returns, times 2^scale. Several outputs are each over their own size.

    Large and small ones show what a backward clips, or takes for zero.
    """
    y = jax.eval_shape(subject.reference, args, fixed)
    sizes = [1.0] * len(jax.tree.leaves(y))
    if len(sizes) > 1:
        sizes = [
            rms(a) if is_floating(a) else 1.0
            for a in jax.tree.leaves(compiled_or_plain(subject.reference, args, fixed))
        ]

    def one(a, size):
        if not is_floating(a):
            return np.zeros(a.shape, jax.dtypes.float0)
        least = 4 if a.dtype == np.float16 else 20
        factor = 2.0 ** np.clip(scale, -least, least) / (size if np.isfinite(size) and size > 0 else 1.0)
        return np.asarray(rng.standard_normal(a.shape) * factor, a.dtype)

    return jax.tree.unflatten(jax.tree.structure(y), list(map(one, jax.tree.leaves(y), sizes)))


def with_more_digits(probe: Probe, rng: Rng) -> Probe:
    """The probe with random digits beyond those of the working dtype."""

    def one(a):
        return np.asarray(a, np.float64) * (1 + 2.0**-26 * rng.uniform(-1, 1, np.shape(a))) if is_floating(a) else a

    return probe._replace(wide=jax.tree.map(one, (probe.args, probe.dy)))


def with_values(tree: Any, f: Callable[[np.ndarray], Any]) -> Any:
    """Apply f to the values of every floating leaf, in float64, and cast back to its dtype."""
    return jax.tree.map(lambda a: np.asarray(f(np.asarray(a, np.float64)), a.dtype) if is_floating(a) else a, tree)


def moved_a_tenth(tree: Any, rng: Rng) -> Any:
    """Move every floating leaf by about a tenth: an initial 0 or 1 hides mistakes."""
    return with_values(tree, lambda a: a + 0.1 * (np.abs(a) + (rms(a) or 1.0)) * rng.standard_normal(a.shape))


def shuffled(tree: Any, rng: Rng) -> Any:
    """Put the values of every leaf in another order, so that they stay in its domain; of integers too."""

    def one(a):
        if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.number):
            return a
        return rng.permutation(np.asarray(a).ravel()).reshape(a.shape)

    return jax.tree.map(one, tree)


def on_x(subject: Subject, f: Callable[[Any], Any], args: tuple | None = None) -> tuple:
    """args with f applied to what flows through: a layer's x, a loss's prediction, all arguments of a function."""
    args = subject.args if args is None else args
    return tuple(arg if name == "" else f(arg) for name, arg in zip(subject.names, args, strict=True))


def on_params(subject: Subject, f: Callable[[Any], Any]) -> tuple:
    """args with f applied to the parameters of a layer."""
    return tuple(f(arg) if name == "" else arg for name, arg in zip(subject.names, subject.args, strict=True))


def given(subject: Subject, rng: Rng) -> At | None:
    """The point that was given."""
    return subject.args, subject.fixed


def another(subject: Subject, rng: Rng) -> At | None:
    """Move the parameters, and put x in another order."""
    return on_x(subject, lambda x: shuffled(x, rng), on_params(subject, lambda p: moved_a_tenth(p, rng))), subject.fixed


def nearby(subject: Subject, rng: Rng) -> At | None:
    """Move the parameters and x."""
    return moved_a_tenth(subject.args, rng), subject.fixed


def mirrored(subject: Subject, rng: Rng) -> At | None:
    """Flip the sign of x, so that every element is tried with both signs."""
    return on_x(subject, lambda x: with_values(x, np.negative)), subject.fixed


def zeros(subject: Subject, rng: Rng) -> At | None:
    """Set a third of x to exactly 0."""
    return on_x(subject, lambda x: with_values(x, lambda a: np.where(rng.random(a.shape) < 1 / 3, 0, a))), subject.fixed


def ties(subject: Subject, rng: Rng) -> At | None:
    """Fill x with only three of its values: ties, and for integers repeated tokens."""

    def one(a):
        if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.number) or not a.size:
            return a
        few = rng.choice(np.asarray(a).ravel(), 3)
        return np.asarray(rng.choice(few, a.shape))

    return on_x(subject, lambda x: jax.tree.map(one, x)), subject.fixed


def large(subject: Subject, rng: Rng) -> At | None:
    """Scale x to a root mean square of 50: saturation, and logits whose exponentials overflow."""
    return sized(subject, LARGE), subject.fixed


def huge(subject: Subject, rng: Rng) -> At | None:
    """Scale x to a root mean square of 1e5, or 1e3 in float16: it shows what a backward clips."""
    return sized(subject, 1e3 if any(x.dtype == np.float16 for x in flowing(subject)) else 1e5), subject.fixed


def small(subject: Subject, rng: Rng) -> At | None:
    """Scale x to a root mean square of 1e-3, or bring a prediction as near to its target.

    It shows what a backward takes for 0.
    """
    if subject.names == ("prediction",):
        (p, *others), (y, _) = subject.args, subject.fixed
        if is_floating(y) and is_floating(p) and y.shape == p.shape:
            return (np.asarray(y + 1e-3 * (np.asarray(p, np.float64) - y), p.dtype), *others), subject.fixed
    return sized(subject, 1e-3), subject.fixed


def sized(subject: Subject, size: float) -> tuple:
    """args with what flows through scaled to that root mean square; of several arguments, the product has that size."""
    several = sum(is_floating(leaf) for leaf in flowing(subject)) or 1
    return on_x(subject, lambda x: with_values(x, lambda a: a * (size ** (1 / several) / (rms(a) or 1.0))))


def masked(subject: Subject, rng: Rng) -> At | None:
    """Mask the whole first example."""
    ctx = subject.fixed[1] if subject.layer is not None else None
    if ctx is None or ctx.mask is None:
        return None
    mask = jax.tree.map(lambda m: np.where(np.arange(len(m)).reshape(-1, *[1] * (m.ndim - 1)) == 0, False, m), ctx.mask)
    return subject.args, (subject.fixed[0], replace(ctx, mask=mask))


def one_example(subject: Subject, rng: Rng) -> At | None:
    """Keep only the first example: a batch of 1."""
    if subject.take is None or batch_of(subject) in (None, 1):
        return None
    return subject.take(subject.args, subject.fixed, lambda a: a[:1])


def one_position(subject: Subject, rng: Rng) -> At | None:
    """Keep only the first position, if x has an axis of positions: a length of 1."""
    if subject.take is None or any(x.ndim < 3 or x.shape[1] == 1 for x in flowing(subject)):
        return None
    return subject.take(subject.args, subject.fixed, lambda a: a[:, :1] if a.ndim > 1 else a)


def prime_sizes(subject: Subject, rng: Rng) -> At | None:
    """Make every axis of x a prime of its own, with parameters to match: square ones hide a transpose."""
    if not resizable(subject):
        return prime_batch(subject, rng)
    assert subject.layer is not None
    (x,) = flowing(subject)
    shape = tuple(PRIMES[3 + 2 * i] for i in range(x.ndim))
    x = np.asarray(rng.choice(np.asarray(x, np.float64).ravel(), shape), x.dtype)
    key = jax.random.key(int(rng.integers(1 << 31)))
    try:
        params, state = as_numpy_32(compiled_or_plain(subject.layer.init, key, x))
        jax.eval_shape(subject.layer.forward, params, state, x, subject.fixed[1])
    except Exception:  # the layer takes only one size
        return prime_batch(subject, rng)
    return (moved_a_tenth(params, rng), x), (state, subject.fixed[1])


def prime_batch(subject: Subject, rng: Rng) -> At | None:
    """Draw a batch whose size is no other size of the subject."""
    m = batch_of(subject)
    if subject.take is None or not m:
        return None
    others = {n for leaf in jax.tree.leaves(subject.args) for n in jnp.shape(leaf)}
    size = next((p for p in PRIMES if p > 4 and p not in others), None)
    if size is None:
        return None
    rows = rng.integers(0, m, size)
    return subject.take(subject.args, subject.fixed, lambda a: a[rows])


def resizable(subject: Subject) -> bool:
    """True for a layer that has parameters but no state, and takes one floating x without a mask."""
    if subject.layer is None or subject.layer.parts or subject.fixed[1].mask is not None:
        return False
    xs = flowing(subject)
    stateless = jax.tree.leaves(subject.args[0]) and not jax.tree.leaves(subject.fixed[0])
    return bool(stateless) and len(xs) == 1 and is_floating(xs[0])


def flowing(subject: Subject) -> list[Any]:
    """The leaves of what flows through: of all args except params."""
    return [
        leaf for name, arg in zip(subject.names, subject.args, strict=True) if name for leaf in jax.tree.leaves(arg)
    ]


def batch_of(subject: Subject) -> int | None:
    """The number of examples; None if the leaves of x do not agree."""
    sizes = {leaf.shape[0] if jnp.ndim(leaf) else None for leaf in flowing(subject)}
    return sizes.pop() if len(sizes) == 1 else None


PROBES: dict[str, Callable[[Subject, Rng], At | None]] = {
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

DEFAULT_PROBES = (
    *("given", "another", "nearby", "another", "another", "nearby"),
    *(name for name in PROBES if name not in ORDINARY),
)
