"""Where backwards go wrong: other cotangents."""

import jax
import numpy as np

from fnbp.comparison.numerics import is_inexact
from fnbp.comparison.probe import At, Place, Rng, both_signs, cotangent, half, with_dy
from fnbp.comparison.subject import Subject


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


def dy_sparse(subject: Subject, rng: Rng) -> At:
    """A cotangent of which nine tenths are 0."""
    return with_dy(subject, lambda shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1))


def dy_ones(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent of ones, as of a sum, one of their negatives, and one of both by chance."""
    signs = with_dy(subject, lambda shape: rng.choice([1.0, -1.0], shape))._replace(part="both signs")
    return [*both_signs(with_dy(subject, np.ones)), signs]


def dy_positive(subject: Subject, rng: Rng) -> list[At]:
    """A cotangent of one sign, positive, and negative."""
    return both_signs(with_dy(subject, lambda shape: abs(rng.standard_normal(shape))))


def dy_equal_rows(subject: Subject, rng: Rng) -> At:
    """A cotangent that is constant along the last axis, as behind a sum."""
    return with_dy(
        subject, lambda shape: np.broadcast_to(rng.standard_normal((*shape[:-1], 1) if shape else ()), shape)
    )


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
    """A cotangent of the numbers that stand in the code of both sides, and just beside each, but for the largest."""
    numbers = [number for number in subject.numbers if abs(number) < (60 if half(subject) else 1e35)]
    if not numbers:
        return None

    def at_numbers(shape):
        return rng.choice(numbers, shape) * rng.choice([1.0, -1.0], shape) * rng.uniform(0.5, 1.5, shape)

    return with_dy(subject, at_numbers)


COTANGENTS = (
    dy_zero,
    dy_zero_rows,
    dy_one_hot,
    dy_sparse,
    dy_ones,
    dy_positive,
    dy_equal_rows,
    dy_one_output,
    dy_mixed,
    dy_tiny,
    dy_huge,
    dy_numbers,
)
