"""Where backwards go wrong: other values of x, of each part, other cotangents, and other contexts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fnbp.comparison.code import reacts
from fnbp.comparison.numerics import is_floating, is_inexact, rms
from fnbp.comparison.probe import (
    At,
    Place,
    Rng,
    both_signs,
    cotangent,
    everything,
    flowing,
    half,
    moved_a_tenth,
    of_numbers,
    on_params,
    on_x,
    parts_of,
    shuffled,
    with_dy,
    with_values,
)
from fnbp.comparison.subject import Subject
from fnbp.layer import Context

MOST_TOTALS = 4  # numbers of the code that totals tries
LARGE = 50.0  # root mean square of large logits: e^50 is near the end of float32


def given(subject: Subject, rng: Rng) -> Place:
    """The point that was given."""
    return At(subject.args, subject.fixed)


def another(subject: Subject, rng: Rng) -> Place:
    """Move the parameters, and put x in another order."""
    return At(
        on_x(subject, lambda x: shuffled(x, rng), on_params(subject, lambda p: moved_a_tenth(p, rng))), subject.fixed
    )


def nearby(subject: Subject, rng: Rng) -> Place:
    """Move the parameters and x."""
    return At(moved_a_tenth(subject.args, rng), subject.fixed)


# --- other values of x ---


def x_with(subject: Subject, f: Callable[[np.ndarray], Any]) -> At:
    """The place where f is applied to the numbers of what flows through."""
    return At(on_x(subject, lambda x: with_values(x, f)), subject.fixed)


def mirrored(subject: Subject, rng: Rng) -> Place:
    """Flip the sign of x, so that every element is tried with both signs; truth values too."""
    return with_truth(x_with(subject, np.negative), np.logical_not)


def with_truth(place: At, f: Callable[[np.ndarray], Any]) -> At:
    """The place with f applied to the truth values among its args."""
    return place._replace(args=jax.tree.map(lambda a: f(a) if getattr(a, "dtype", None) in (bool,) else a, place.args))


def positive(subject: Subject, rng: Rng) -> Place:
    """Make all of x positive."""
    return x_with(subject, np.abs)


def negative(subject: Subject, rng: Rng) -> Place:
    """Make all of x negative."""
    return x_with(subject, lambda a: -np.abs(a))


def zeros(subject: Subject, rng: Rng) -> Place:
    """Set a third of x to exactly 0."""
    return x_with(subject, lambda a: np.where(rng.random(a.shape) < 1 / 3, 0, a))


def all_zero(subject: Subject, rng: Rng) -> Place:
    """Set all of x to 0, and truth values to False."""
    return with_truth(x_with(subject, np.zeros_like), np.zeros_like)


def ones(subject: Subject, rng: Rng) -> Place:
    """Set a third of x to exactly 1, and a third of the rest to -1."""
    return x_with(
        subject, lambda a: np.where(rng.random(a.shape) < 1 / 3, 1, np.where(rng.random(a.shape) < 1 / 3, -1, a))
    )


def all_equal(subject: Subject, rng: Rng) -> Place:
    """Set all of x to one number, and truth values to True."""
    return with_truth(x_with(subject, lambda a: np.full(a.shape, rng.choice(a.ravel()) if a.size else 0)), np.ones_like)


def equal_rows(subject: Subject, rng: Rng) -> Place:
    """Make every second row of x constant."""

    def one(a):
        rows = np.arange(a.size // max(a.shape[-1], 1)).reshape(*a.shape[:-1], 1) % 2 == 0
        return np.where(rows, a[..., :1], a)

    return x_with(subject, lambda a: one(a) if a.ndim else a)


def ties(subject: Subject, rng: Rng) -> Place:
    """Fill x with only three of its values: ties, and for integers repeated tokens."""

    def one(a):
        if not of_numbers(a) or not a.size:
            return a
        few = rng.choice(np.asarray(a).ravel(), 3)
        return np.asarray(rng.choice(few, a.shape))

    return At(on_x(subject, lambda x: jax.tree.map(one, x)), subject.fixed)


def large(subject: Subject, rng: Rng) -> Place:
    """Scale x to a root mean square of 50: saturation, and logits whose exponentials overflow."""
    return At(sized(subject, LARGE), subject.fixed)


def huge(subject: Subject, rng: Rng) -> Place:
    """Scale x to a root mean square of 1e5, or 1e3 in float16: it shows what a backward clips."""
    return At(sized(subject, 1e3 if any(x.dtype == np.float16 for x in flowing(subject)) else 1e5), subject.fixed)


def small(subject: Subject, rng: Rng) -> Place:
    """Scale x to a root mean square of 1e-3, or bring a prediction as near to its target.

    It shows what a backward takes for 0.
    """
    if subject.names == ("prediction",):
        (p, *others), (y, _) = subject.args, subject.fixed
        if is_floating(y) and is_floating(p) and y.shape == p.shape:
            return At((np.asarray(y + 1e-3 * (np.asarray(p, np.float64) - y), p.dtype), *others), subject.fixed)
    return At(sized(subject, 1e-3), subject.fixed)


def tiny(subject: Subject, rng: Rng) -> Place:
    """Scale x to a root mean square of 1e-12, or 1e-4 in float16."""
    return At(sized(subject, 1e-4 if any(x.dtype == np.float16 for x in flowing(subject)) else 1e-12), subject.fixed)


def denormal(subject: Subject, rng: Rng) -> Place:
    """Scale x to a root mean square of 1e-40, or 1e-7 in float16: below the normal numbers of the dtype."""
    return At(sized(subject, 1e-7 if any(x.dtype == np.float16 for x in flowing(subject)) else 1e-40), subject.fixed)


def mixed(subject: Subject, rng: Rng) -> Place:
    """Scale every number of x by a power of its own, 10^-3 to 10^2: small elements beside large ones."""
    return x_with(subject, lambda a: a * 10 ** rng.uniform(-3, 2, a.shape))


def sized(subject: Subject, size: float) -> tuple:
    """args with what flows through scaled to that root mean square; of several arguments, the product has that size."""
    several = sum(is_inexact(leaf) for leaf in flowing(subject)) or 1
    return on_x(subject, lambda x: with_values(x, lambda a: a * (size ** (1 / several) / (rms(a) or 1.0))))


def numbers(subject: Subject, rng: Rng) -> list[At]:
    """Fill x, and each part, with the numbers that stand in the code of both sides: at each, and just beside it."""
    if not subject.numbers:
        return []

    def exactly(a):
        return rng.choice(np.asarray(subject.numbers), a.shape)

    def beside(a):
        away = rng.choice([0, 2.0**-10, -(2.0**-10), 0.1, -0.1, 0.5, -0.5], a.shape)
        return exactly(a) * rng.choice([1, 1, -1], a.shape) * (1 + away)

    return [x_with(subject, exactly), x_with(subject, beside), *parts_of(subject, beside)]


def totals(subject: Subject, rng: Rng) -> list[At]:
    """Scale x so that its sum, its norm, or its largest element passes a number that stands in the code."""

    def with_sum(c):
        return x_with(subject, lambda a: np.full(a.shape, c / max(a.size, 1)))

    def with_norm(c):
        return x_with(subject, lambda a: a * abs(c) / (np.linalg.norm(a) or 1.0))

    def with_largest(c):
        return x_with(subject, lambda a: a * abs(c) / (np.max(abs(a), initial=0) or 1.0))

    return [of(1.25 * c) for c in subject.numbers[:MOST_TOTALS] for of in (with_sum, with_norm, with_largest)]


def one_less(subject: Subject, rng: Rng) -> Place:
    """Make whole numbers of a function one less where they are all alike, as a power is; none falls below 0."""
    if subject.layer is not None:
        return None

    def one(a):
        whole = of_numbers(a) and a.size and np.issubdtype(a.dtype, np.integer)
        return np.asarray(a - 1, a.dtype) if whole and np.min(a) == np.max(a) > 0 else a

    args = jax.tree.map(one, subject.args)
    same = all(a is b for a, b in zip(jax.tree.leaves(args), jax.tree.leaves(subject.args), strict=True))
    return None if same else At(args, subject.fixed)


# --- other values of the parameters, the state, and each argument ---


def each_mirrored(subject: Subject, rng: Rng) -> list[At]:
    """Flip the sign of each part alone."""
    return parts_of(subject, np.negative)


def each_zero(subject: Subject, rng: Rng) -> list[At]:
    """Set each part alone to 0."""
    return parts_of(subject, np.zeros_like)


def each_one(subject: Subject, rng: Rng) -> list[At]:
    """Set each part alone to 1."""
    return parts_of(subject, np.ones_like)


def each_small(subject: Subject, rng: Rng) -> list[At]:
    """Scale each part alone to 1e-3."""
    return parts_of(subject, lambda a: a * (1e-3 / (rms(a) or 1.0)))


def each_large(subject: Subject, rng: Rng) -> list[At]:
    """Scale each part alone to 50."""
    return parts_of(subject, lambda a: a * (LARGE / (rms(a) or 1.0)))


def each_far(subject: Subject, rng: Rng) -> list[At]:
    """Move each part alone far off: other values of both signs, of ten times the size."""
    return parts_of(subject, lambda a: 10 * (rms(a) or 1.0) * rng.standard_normal(a.shape))


def all_mirrored(subject: Subject, rng: Rng) -> At | None:
    """Flip the sign of everything together."""
    return everything(subject, np.negative)


def all_small(subject: Subject, rng: Rng) -> At | None:
    """Scale everything together to 1e-3."""
    return everything(subject, lambda a: a * (1e-3 / (rms(a) or 1.0)))


def all_far(subject: Subject, rng: Rng) -> At | None:
    """Move everything together far off."""
    return everything(subject, lambda a: 3 * (rms(a) or 1.0) * rng.standard_normal(a.shape))


# --- other cotangents ---


def dy_zero(subject: Subject, rng: Rng) -> Place:
    """A cotangent of 0: every gradient is 0."""
    return with_dy(subject, np.zeros)


def dy_zero_rows(subject: Subject, rng: Rng) -> Place:
    """A cotangent that is 0 in every second row."""

    def rows(shape):
        keep = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 2 if shape else 1
        return keep * rng.standard_normal(shape)

    return with_dy(subject, rows)


def dy_one_hot(subject: Subject, rng: Rng) -> Place:
    """A cotangent of a single 1."""

    def one(shape):
        flat = np.zeros(int(np.prod(shape)))
        flat[rng.integers(max(flat.size, 1)) if flat.size else slice(0)] = 1
        return flat.reshape(shape)

    return with_dy(subject, one)


def dy_ones(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent of ones, as of a sum, and one of their negatives."""
    return both_signs(with_dy(subject, np.ones))


def dy_one_output(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent that is 0 for all outputs but one, for each of several outputs."""
    y = subject.shape_at(subject.args, subject.fixed)
    flat, tree = jax.tree.flatten(y)
    if len(flat) < 2:
        return []

    def alone(i):
        dy = [cotangent(a, rng.standard_normal if i == k else np.zeros) for k, a in enumerate(flat)]
        return At(subject.args, subject.fixed, jax.tree.unflatten(tree, dy), part=f"output {i}")

    return [alone(i) for i, a in enumerate(flat) if is_inexact(a)]


def dy_mixed(subject: Subject, rng: Rng) -> Place:
    """A cotangent whose elements are each of a power of their own, 10^-4 to 10^4."""
    return with_dy(subject, lambda shape: rng.standard_normal(shape) * 10 ** rng.uniform(-4, 4, shape))


def dy_tiny(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent of size 1e-20, or 1e-4 in float16, in both signs: it shows what a backward takes for 0."""
    return both_signs(with_dy(subject, lambda shape: rng.standard_normal(shape) * (1e-4 if half(subject) else 1e-20)))


def dy_huge(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent of size 1e20, or 1e3 in float16, in both signs: it shows what a backward clips."""
    return both_signs(with_dy(subject, lambda shape: rng.standard_normal(shape) * (1e3 if half(subject) else 1e20)))


def dy_numbers(subject: Subject, rng: Rng) -> Place:
    """A cotangent of the numbers that stand in the code of both sides, and just beside each."""
    if not subject.numbers:
        return None

    def at_numbers(shape):
        return rng.choice(subject.numbers, shape) * rng.choice([1.0, -1.0], shape) * rng.uniform(0.5, 1.5, shape)

    return with_dy(subject, at_numbers)


# --- another context ---


def masked(subject: Subject, rng: Rng) -> Place:
    """Mask the whole first example."""
    ctx = subject.fixed[1] if subject.layer is not None else None
    if ctx is None or ctx.mask is None:
        return None
    mask = jax.tree.map(lambda m: np.where(np.arange(len(m)).reshape(-1, *[1] * (m.ndim - 1)) == 0, False, m), ctx.mask)
    return At(subject.args, (subject.fixed[0], replace(ctx, mask=mask)))


def other_mode(subject: Subject, rng: Rng) -> Place:
    """Train if the given context does not, and the other way round, for a layer that reacts to it."""
    if subject.layer is None:
        return None
    ctx = subject.fixed[1]
    key = jax.random.key(int(rng.integers(1 << 31))) if ctx.key is None else ctx.key
    return when_it_reacts(subject, replace(ctx, key=key, train=not ctx.train), replace(ctx, key=key))


def positions_masked(subject: Subject, rng: Rng) -> Place:
    """Mask some positions, for a layer that reacts to it, if no mask was given."""
    if subject.layer is None or subject.fixed[1].mask is not None:
        return None
    xs = flowing(subject)
    if len(xs) != 1 or not of_numbers(xs[0]) or xs[0].ndim < (3 if is_inexact(xs[0]) else 2):
        return None
    ctx = subject.fixed[1]
    mask = rng.random(xs[0].shape[:2]) < 0.6
    mask[:, 0] = True
    return when_it_reacts(subject, replace(ctx, mask=mask), ctx)


def when_it_reacts(subject: Subject, other: Context, ctx: Context) -> Place:
    """The given point in the other context, if the layer computes or saves something else there than in ctx."""
    (params, x), (state, _), layer = subject.args, subject.fixed, subject.layer
    assert layer is not None
    reacting = reacts(layer.forward, (params, state, x, ctx), (params, state, x, other))
    return At(subject.args, (state, other)) if reacting else None


AROUND_IT = (given, another, nearby)
VALUES = (
    mirrored,
    positive,
    negative,
    zeros,
    all_zero,
    ones,
    all_equal,
    equal_rows,
    ties,
    large,
    huge,
    small,
    tiny,
    denormal,
    mixed,
    numbers,
    totals,
    one_less,
)
PARTS = (each_mirrored, each_zero, each_one, each_small, each_large, each_far, all_mirrored, all_small, all_far)
COTANGENTS = (dy_zero, dy_zero_rows, dy_one_hot, dy_ones, dy_one_output, dy_mixed, dy_tiny, dy_huge, dy_numbers)
CONTEXTS = (masked, other_mode, positions_masked)
