"""Where backwards go wrong: other values of x, and of each part."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fnbp.comparison.numerics import is_complex, is_floating, is_inexact, is_integer, is_truth, rms
from fnbp.comparison.probe import (
    At,
    Place,
    Rng,
    everything,
    flowing,
    moved_a_tenth,
    of_numbers,
    on_params,
    on_x,
    parts_of,
    shuffled,
    with_values,
)
from fnbp.comparison.subject import Subject

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
    return place._replace(args=jax.tree.map(lambda a: f(a) if is_truth(a) else a, place.args))


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


def offset(subject: Subject, rng: Rng) -> Place:
    """Move x far off 0: its mean is 30 times its spread."""
    return x_with(subject, lambda a: a + 30 * (rms(a) or 1.0))


def real_line(subject: Subject, rng: Rng) -> Place:
    """Make complex numbers of x real, and a third of them exactly 1."""
    if not any(map(is_complex, flowing(subject))):
        return None

    def one(a):
        return np.asarray(np.where(rng.random(a.shape) < 1 / 3, 1, np.real(a)), a.dtype) if is_complex(a) else a

    return At(on_x(subject, lambda x: jax.tree.map(one, x)), subject.fixed)


def tokens_zero(subject: Subject, rng: Rng) -> Place:
    """Set a third of the integers of x to 0, the number of the first token or class."""
    xs = flowing(subject)
    if not any(is_integer(x) and x.ndim for x in xs):
        return None

    def one(a):
        return np.asarray(np.where(rng.random(a.shape) < 1 / 3, 0, a), a.dtype) if is_integer(a) else a

    return At(on_x(subject, lambda x: jax.tree.map(one, x)), subject.fixed)


def truth_rows(subject: Subject, rng: Rng) -> Place:
    """Make the first row of truth values False, and the second True."""
    if not any(is_truth(x) and x.ndim for x in flowing(subject)):
        return None

    def rows(a):
        row = np.arange(len(a)).reshape(-1, *[1] * (a.ndim - 1)) if a.ndim else 2
        return np.where(row == 0, False, np.where(row == 1, True, a))

    return with_truth(At(subject.args, subject.fixed), rows)


def twin_rows(subject: Subject, rng: Rng) -> Place:
    """Make the second row of x the same as the first, and so on."""
    return x_with(subject, lambda a: a[np.arange(len(a)) // 2 * 2] if a.ndim else a)


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


def each_zeros(subject: Subject, rng: Rng) -> list[At]:
    """Set a third of each part alone to 0, as pruning does."""
    return parts_of(subject, lambda a: np.where(rng.random(a.shape) < 1 / 3, 0, a))


def each_ties(subject: Subject, rng: Rng) -> list[At]:
    """Fill each part alone with only three of its values."""
    return parts_of(subject, lambda a: rng.choice(rng.choice(a.ravel(), 3), a.shape))


def all_mirrored(subject: Subject, rng: Rng) -> At | None:
    """Flip the sign of everything together."""
    return everything(subject, np.negative)


def all_small(subject: Subject, rng: Rng) -> At | None:
    """Scale everything together to 1e-3."""
    return everything(subject, lambda a: a * (1e-3 / (rms(a) or 1.0)))


def all_far(subject: Subject, rng: Rng) -> At | None:
    """Move everything together far off."""
    return everything(subject, lambda a: 3 * (rms(a) or 1.0) * rng.standard_normal(a.shape))


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
    twin_rows,
    offset,
    real_line,
    truth_rows,
    ties,
    tokens_zero,
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
PARTS = (
    each_mirrored,
    each_zero,
    each_zeros,
    each_ties,
    each_one,
    each_small,
    each_large,
    each_far,
    all_mirrored,
    all_small,
    all_far,
)
