"""Finite differences of the forward in float64: they check autodiff, and find kinks.

Autodiff has rules of its own (stop_gradient, custom_jvp, the slope at a kink); differences have none.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.evaluation import Evaluator
from fnbp.comparison.numerics import is_complex, is_float0, is_inexact, real_pairs, rms
from fnbp.comparison.probe import Probe
from fnbp.comparison.subject import Subject, leaf_names

STEPS = tuple(2.0**-k for k in range(4, 28, 2))  # relative to the size of what is moved
FIRST_STEPS = (2.0**-14, 2.0**-18)
DIFFERS = 1e-4  # of the directional derivative; if autodiff is right, differences agree to about 1e-9
KINK = 1e-3  # relative; one-sided slopes that differ by more meet in a kink
FINER_AND_COARSER = (1.0, 2.0**-6, 2.0**-12, 2.0**12, 2.0**20, 2.0**26)  # steps beside large, and among tiny elements
ELEMENTS = 6  # how many are tried for a kink: the worst, and as many at random


class Slope(NamedTuple):
    """What differences say of a directional derivative.

    order       of the Taylor remainder |phi(h) - phi(0) - h phi'|: 2 if phi' is right, 1 if it is wrong; NaN if one
                step was enough to tell that it is right
    derivative  by differences, the best of all steps
    claimed     by autodiff
    verdict     "agrees", "differs" or "unclear": kinks nearby, noise, or nothing to see
    """

    order: float
    derivative: float
    claimed: float
    verdict: str


def terms_of(evaluator: Evaluator, probe: Probe, dtype: Any = np.float64) -> Callable[[list[np.ndarray]], np.ndarray]:
    """The terms of dy f(args), one for each number that f returns, as a function of the numbers of args.

    Of complex numbers: the real part of dy f, as JAX pairs a cotangent with a value.
    """
    flat, tree = jax.tree.flatten(probe.args)
    dy = [None if is_float0(d) else np.asarray(d) for d in jax.tree.leaves(probe.of(np.float64)[2])]

    def terms(leaves):
        moving = iter(leaves)
        args = jax.tree.unflatten(tree, [like_leaf(next(moving), a) if is_inexact(a) else a for a in flat])
        y = evaluator.evaluate(probe.with_args(args), dtype).expected_y
        found = [np.ravel(np.real(widest(a) * d)) for a, d in zip(y, dy, strict=True) if d is not None]
        return np.concatenate(found)

    return terms


def widest(a: Any) -> np.ndarray:
    """An array in 64 bits, or in 128 if it is complex."""
    return np.asarray(a, np.complex128 if is_complex(a) else np.float64)


def like_leaf(numbers: np.ndarray, leaf: Any) -> np.ndarray:
    """The numbers of a leaf as the leaf has them: pairs become complex numbers."""
    return numbers[..., 0] + 1j * numbers[..., 1] if is_complex(leaf) else numbers


def floating(probe: Probe) -> list[np.ndarray]:
    """The numbers of the leaves of args that are differentiated, in float64; complex ones as pairs."""
    return [real_pairs(a) for a in jax.tree.leaves(probe.of(np.float64)[0]) if is_inexact(a)]


def floating_names(subject: Subject) -> list[str]:
    """The names of the leaves of args that are differentiated."""
    flat = jax.tree.leaves(subject.args)
    return [name for (_, name), a in zip(leaf_names(subject), flat, strict=True) if is_inexact(a)]


def slopes_of(subject: Subject, cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cotangents as slopes along the numbers of args. JAX's of a complex number z holds dRe and -dIm."""
    flat = jax.tree.leaves(subject.args)
    of_complex = {name for (_, name), a in zip(leaf_names(subject), flat, strict=True) if is_complex(a)}
    return {name: d * np.array([1, -1]) if name in of_complex else d for name, d in cotangents.items()}


def taylor(
    evaluator: Evaluator,
    probe: Probe,
    automatic: dict[str, np.ndarray],
    rng: np.random.Generator,
    only: str | None = None,
) -> Slope:
    """Compare a gradient with differences of the forward, along a random direction in all leaves, or only in one."""
    names, at = floating_names(evaluator.subject), floating(probe)
    automatic = slopes_of(evaluator.subject, automatic)
    direction = [
        rng.standard_normal(a.shape) * (rms(a) or 1.0) if only in (None, name) else np.zeros(a.shape)
        for name, a in zip(names, at, strict=True)
    ]
    claimed = float(sum(np.sum(automatic[name] * v) for name, v in zip(names, direction, strict=True)))
    size = float(sum(np.linalg.norm(automatic[name]) * rms(v) for name, v in zip(names, direction, strict=True)))
    terms, largest = terms_of(evaluator, probe), [0.0]

    def along(h):
        found = terms([a + h * v for a, v in zip(at, direction, strict=True)])
        largest[0] = max(largest[0], float(np.sum(abs(found))))
        return float(np.sum(found))

    scale = size + abs(claimed)
    for h in FIRST_STEPS:  # most often one is enough
        slope = (along(h) - along(-h)) / (2 * h)
        if scale and abs(slope - claimed) <= DIFFERS * 1e-2 * scale:
            return Slope(np.nan, slope, claimed, "agrees")
    middle = along(0.0)
    up, down = (np.array([along(sign * h) for h in STEPS]) for sign in (1, -1))
    h = np.array(STEPS)
    right, left = (up - middle) / h, (middle - down) / h
    central = (right + left) / 2
    still = (up == middle) & (down == middle)
    # a forward that casts down moves by steps: its large differences are right, and its small ones say nothing
    casts = still.any() and abs(central[0] - claimed) <= 0.1 * scale
    if not scale or not np.isfinite(central).all() or casts:
        return Slope(np.nan, np.nan, claimed, "unclear")
    best = int(np.argmin(abs(central - claimed)))
    if abs(central[best] - claimed) <= DIFFERS * 1e-2 * scale:
        return Slope(order_of(abs(up - middle - h * claimed), h), central[best], claimed, "agrees")
    change = abs(np.diff(central, prepend=np.inf))
    smooth = (abs(right - left) <= KINK * scale) & (change <= DIFFERS * scale / 10)
    steady = int(np.argmin(np.where(smooth, change, np.inf)))  # here one more step changes least
    swallowed = 16 * float(np.finfo(np.float64).eps) * largest[0] / h[steady]  # by large terms beside those that move
    room = DIFFERS * scale + swallowed
    verdict = "differs" if smooth[steady] and abs(central[steady] - claimed) > room else "unclear"
    return Slope(order_of(abs(up - middle - h * claimed), h), central[steady], claimed, verdict)


def order_of(remainders: np.ndarray, h: np.ndarray) -> float:
    """The order of the remainder in h, over the steps at which it is well above rounding."""
    keep = remainders > 1e-10 * remainders.max()
    if keep.sum() < 3:
        return np.nan
    return float(np.polyfit(np.log(h[keep]), np.log(remainders[keep]), 1)[0])


class OneLeaf(NamedTuple):
    """dy f(args) near a point, as a function of one leaf.

    terms      one for each number that f returns, as a function of the floating leaves of args
    at, which  those leaves at the point, and which of them moves
    middle     the terms at the point
    step       how far to move
    rounding   what rounding makes of a slope over one step
    """

    terms: Callable[[list[np.ndarray]], np.ndarray]
    at: list[np.ndarray]
    which: int
    middle: np.ndarray
    step: float
    rounding: float

    def slopes(self, where: Any, steps: float = 1.0) -> tuple[float, float]:
        """The least and the greatest slope that the derivative may take.

        where: one element, by its index, or a direction of the leaf. Each term has a slope to the right and one to the
        left; the lesser ones are summed, and the greater ones. Term by term, because a number may stand in several
        kinks, and dy has signs of its own.
        """
        h = steps * self.step

        def stepped(by: float) -> list[np.ndarray]:
            leaf = self.at[self.which].copy()
            if isinstance(where, tuple):
                leaf[where] += by
            else:
                leaf += by * where
            return [leaf if i == self.which else a for i, a in enumerate(self.at)]

        right, left = (self.terms(stepped(h)) - self.middle) / h, (self.middle - self.terms(stepped(-h))) / h
        return float(np.sum(np.minimum(right, left))), float(np.sum(np.maximum(right, left)))


def one_leaf(evaluator: Evaluator, probe: Probe, leaf: str, dtype: Any) -> OneLeaf:
    """The function of one leaf at a probe, in dtype."""
    at, which = floating(probe), floating_names(evaluator.subject).index(leaf)
    eps = float(np.finfo(dtype).eps)
    terms, step = terms_of(evaluator, probe, dtype), (rms(at[which]) or 1.0) * eps**0.375
    middle = terms(at)
    return OneLeaf(terms, at, which, middle, step, 16 * eps * float(np.sum(abs(middle))) / step)


def only_kinks(
    evaluator: Evaluator,
    probe: Probe,
    leaf: str,
    manual: np.ndarray,
    automatic: np.ndarray,
    rng: np.random.Generator,
    dtype: Any,
) -> bool:
    """True if manual and automatic differ only at kinks and ties, where manual stays between the slopes of both sides.

    Not every element is tried: ELEMENTS of those that differ most, and as many at random.
    """
    manual, automatic = (slopes_of(evaluator.subject, {leaf: d})[leaf] for d in (manual, automatic))
    apart = abs(manual - automatic)
    wrong = np.argwhere(apart > 1e-9 * (apart.max() + abs(automatic)))
    if not len(wrong):  # nothing but roundings
        return False
    near = one_leaf(evaluator, probe, leaf, dtype)
    for i in worst_and_others(apart[tuple(wrong.T)], rng):
        index = tuple(wrong[i])
        (low, high), further = near.slopes(index), near.slopes(index, steps=8)
        gap = high - low
        if not gap > KINK * max(abs(low), abs(high)) + near.rounding:
            return False
        if not np.allclose((low, high), further, rtol=0, atol=0.1 * gap):  # a kink looks the same from further off
            return False
        if not low - 1e-3 * gap <= manual[index] <= high + 1e-3 * gap:
            return False
    return right_together(near, wrong, manual)


def between_autodiffs(
    evaluator: Evaluator, probe: Probe, leaf: str, manual: np.ndarray, automatic: np.ndarray, dtype: Any
) -> bool:
    """True if manual and automatic differ only where autodiff has two slopes, just beside, and manual lies between.

    For a forward whose slope autodiff is told, as behind a stop_gradient: its differences have no such kinks.
    """
    flat, tree = jax.tree.flatten(probe.of(dtype)[0])
    names = [name for _, name in leaf_names(evaluator.subject)]
    which, wrong = names.index(leaf), abs(manual - automatic) > 1e-9 * abs(automatic).max()
    if is_complex(flat[which]) or not wrong.any():
        return False
    h = (rms(flat[which]) or 1.0) * float(np.finfo(dtype).eps) ** 0.375
    beside = []
    for sign in (1, -1):
        moved = [a + sign * h * wrong if i == which else a for i, a in enumerate(flat)]
        found = evaluator.evaluate(probe.with_args(jax.tree.unflatten(tree, moved)), dtype)
        beside.append(np.asarray(found.automatic[leaf], np.float64)[wrong])
    low, high = np.minimum(*beside), np.maximum(*beside)
    gap = high - low
    between = (low - 1e-3 * gap <= manual[wrong]) & (manual[wrong] <= high + 1e-3 * gap)
    return bool((gap > KINK * np.maximum(abs(low), abs(high))).all() and between.all())


def right_together(near: OneLeaf, wrong: np.ndarray, manual: np.ndarray) -> bool:
    """False if manual has another slope than the forward where all elements of a tie move together.

    Such a tie stays a tie, and there the slope is one.
    """
    every = np.zeros(manual.shape)
    every[tuple(wrong.T)] = 1
    for direction in (every, np.ones(manual.shape)):
        low, high = near.slopes(direction)
        room = KINK * max(abs(low), abs(high)) + near.rounding
        if high - low <= room and abs(np.sum(manual * direction) - high) > 10 * room:
            return False
    return True


def against_differences(
    evaluator: Evaluator, probe: Probe, leaf: str, manual: np.ndarray, where: np.ndarray, rng: np.random.Generator
) -> tuple[int, ...] | None:
    """The index of an element of manual that differences of the forward contradict, or None.

    For elements where autodiff has no answer. Where differences have none either, as beside the end of a domain, no
    element is contradicted.
    """
    manual = slopes_of(evaluator.subject, {leaf: manual})[leaf]
    found = np.argwhere(where)
    near = one_leaf(evaluator, probe, leaf, np.float64)
    if not np.isfinite(near.middle).all():
        return None
    for i in rng.permutation(len(found))[: 2 * ELEMENTS]:
        index = tuple(map(int, found[i]))
        (low, high), further = near.slopes(index), near.slopes(index, steps=8)
        if not np.isfinite([low, high, *further]).all():
            continue
        gap, slope = high - low, max(abs(low), abs(high))
        steady = np.allclose((low, high), further, rtol=0, atol=0.1 * gap + KINK * slope + near.rounding)
        size = max(slope, abs(manual[index]))
        room = 0.1 * gap + 10 * KINK * size + 10 * near.rounding
        if steady and not low - room <= manual[index] <= high + room:
            return index
    return None


def differences_prefer(
    evaluator: Evaluator, probe: Probe, leaf: str, manual: np.ndarray, automatic: np.ndarray, rng: np.random.Generator
) -> bool:
    """True if the forward is smooth where manual and automatic differ, and its slope there is manual's.

    Not every element is tried: ELEMENTS of those that differ most, and as many at random.
    """
    manual, automatic = (slopes_of(evaluator.subject, {leaf: d})[leaf] for d in (manual, automatic))
    wrong = np.argwhere(abs(manual - automatic) > 10 * KINK * (abs(manual) + abs(automatic)))
    if not len(wrong):
        return False
    near = one_leaf(evaluator, probe, leaf, np.float64)
    for i in worst_and_others(abs(manual - automatic)[tuple(wrong.T)], rng):
        index = tuple(wrong[i])
        if not any(
            confirms(near, index, float(manual[index]), float(automatic[index]), steps) for steps in FINER_AND_COARSER
        ):
            return False
    return right_together(near, wrong, manual)


def confirms(near: OneLeaf, index: tuple[int, ...], manual: float, automatic: float, steps: float) -> bool:
    """True if the forward, in steps of that size, is smooth at an element, and its slope is manual's alone."""
    low, high = near.slopes(index, steps)
    room = KINK * max(abs(low), abs(high), abs(automatic)) + near.rounding / steps
    right = high - low <= room and low - room <= manual <= high + room
    return right and not low - 3 * room <= automatic <= high + 3 * room


def worst_and_others(apart: np.ndarray, rng: np.random.Generator) -> set[int]:
    """Which of some elements are tried: those that differ most, and as many at random."""
    apart = np.ravel(apart)
    order = np.argsort(-apart, kind="stable")
    return {*order[:ELEMENTS].tolist(), *rng.permutation(len(apart))[:ELEMENTS].tolist()}
