"""The third witness: differences of the forward in float64. Autodiff has rules of its own; differences have none."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.evaluation import Evaluator
from fnbp.comparison.numerics import is_float0, is_floating, rms
from fnbp.comparison.probes import Probe
from fnbp.comparison.subject import Subject, leaf_names

STEPS = tuple(2.0**-k for k in range(4, 28, 2))  # relative to the size of what is moved
DIFFERS = 1e-4  # of the directional derivative; differences agree to about 1e-9 where autodiff is right
KINK = 1e-3  # one-sided slopes that differ by so much, relatively, meet in a kink
ELEMENTS = 6  # of those that differ most, and as many at random, are tried for a kink


class Slope(NamedTuple):
    """What differences say of a directional derivative.

    order       of the Taylor remainder |phi(h) - phi(0) - h phi'|: 2 where phi' is right, 1 where it is wrong
    derivative  by differences, the best of all steps
    claimed     by autodiff
    verdict     "agrees", "differs" or "unclear": kinks nearby, noise, or nothing to see
    """

    order: float
    derivative: float
    claimed: float
    verdict: str


def terms_of(evaluator: Evaluator, probe: Probe, dtype: Any = np.float64) -> Callable[[list[np.ndarray]], np.ndarray]:
    """dy f(args), one term for each number that f returns, in dtype, as a function of the floating leaves of args."""
    flat, tree = jax.tree.flatten(probe.args)
    dy = [None if is_float0(d) else np.asarray(d) for d in jax.tree.leaves(probe.of(np.float64)[2])]

    def terms(leaves):
        moving = iter(leaves)
        args = jax.tree.unflatten(tree, [next(moving) if is_floating(a) else a for a in flat])
        y = evaluator.evaluate(probe.with_args(args), dtype).expected_y
        found = [np.ravel(np.asarray(a, np.float64) * d) for a, d in zip(y, dy, strict=True) if d is not None]
        return np.concatenate(found)

    return terms


def floating(probe: Probe) -> list[np.ndarray]:
    """The floating leaves of args, in float64."""
    return [np.asarray(a) for a in jax.tree.leaves(probe.of(np.float64)[0]) if is_floating(a)]


def floating_names(subject: Subject) -> list[str]:
    """Their names."""
    flat = jax.tree.leaves(subject.args)
    return [name for (_, name), a in zip(leaf_names(subject), flat, strict=True) if is_floating(a)]


def taylor(
    evaluator: Evaluator, probe: Probe, automatic: dict[str, np.ndarray], rng: np.random.Generator, only=None
) -> Slope:
    """Along a random direction in all leaves, or in one: is the automatic gradient the derivative of the forward?"""
    names, at = floating_names(evaluator.subject), floating(probe)
    direction = [
        rng.standard_normal(a.shape) * (rms(a) or 1.0) if only in (None, name) else np.zeros(a.shape)
        for name, a in zip(names, at, strict=True)
    ]
    claimed = float(sum(np.sum(automatic[name] * v) for name, v in zip(names, direction, strict=True)))
    size = float(sum(np.linalg.norm(automatic[name]) * rms(v) for name, v in zip(names, direction, strict=True)))
    terms = terms_of(evaluator, probe)

    def along(h):
        return float(np.sum(terms([a + h * v for a, v in zip(at, direction, strict=True)])))

    middle = along(0.0)
    up, down = (np.array([along(sign * h) for h in STEPS]) for sign in (1, -1))
    h = np.array(STEPS)
    right, left = (up - middle) / h, (middle - down) / h
    central = (right + left) / 2
    scale = size + abs(claimed)
    still = (up == middle) & (down == middle)
    # a forward that casts down moves by small steps: right from afar, and its small differences say nothing
    casts = still.any() and abs(central[0] - claimed) <= 0.1 * scale
    if not scale or not np.isfinite(central).all() or casts:
        return Slope(np.nan, np.nan, claimed, "unclear")
    best = int(np.argmin(abs(central - claimed)))
    if abs(central[best] - claimed) <= DIFFERS * 1e-2 * scale:
        return Slope(order_of(abs(up - middle - h * claimed), h), central[best], claimed, "agrees")
    steady = int(np.argmin(abs(np.diff(central)))) + 1  # where one more step changes least
    smooth = abs(right[steady] - left[steady]) <= KINK * scale and abs(central[steady] - central[steady - 1]) <= (
        DIFFERS * scale / 10
    )
    verdict = "differs" if smooth and abs(central[steady] - claimed) > DIFFERS * scale else "unclear"
    return Slope(order_of(abs(up - middle - h * claimed), h), central[steady], claimed, verdict)


def order_of(remainders: np.ndarray, h: np.ndarray) -> float:
    """The slope of the remainder's logarithm over the steps that stand clear of rounding."""
    keep = remainders > 1e-10 * remainders.max()
    if keep.sum() < 3:
        return np.nan
    return float(np.polyfit(np.log(h[keep]), np.log(remainders[keep]), 1)[0])


def only_kinks(
    evaluator: Evaluator, probe: Probe, leaf: str, manual: np.ndarray, automatic: np.ndarray, rng: Any, dtype: Any
) -> bool:
    """True where manual and automatic differ at kinks and ties alone, and manual stays between the two slopes there."""
    apart = abs(manual - automatic)
    wrong = np.argwhere(apart > 1e-9 * (apart.max() + abs(automatic)))
    if not len(wrong):  # nothing but roundings
        return False
    order = np.argsort([-apart[tuple(i)] for i in wrong], kind="stable")
    tried = {*order[:ELEMENTS].tolist(), *rng.permutation(len(wrong))[:ELEMENTS].tolist()}
    at, which = floating(probe), floating_names(evaluator.subject).index(leaf)
    terms, h = terms_of(evaluator, probe, dtype), (rms(at[which]) or 1.0) * float(np.finfo(dtype).eps) ** 0.375
    middle = terms(at)
    rounding = 16 * float(np.finfo(dtype).eps) * float(np.sum(abs(middle))) / h
    for i in tried:
        index = tuple(wrong[i])
        (low, high), far = (slopes(terms, at, which, index, step, middle) for step in (h, 8 * h))
        gap = high - low
        if not gap > KINK * max(abs(low), abs(high)) + rounding:
            return False
        if not np.allclose((low, high), far, rtol=0, atol=0.1 * gap):  # a kink looks the same from further off
            return False
        if not low - 1e-3 * gap <= manual[index] <= high + 1e-3 * gap:
            return False
    return along_together(terms, at, which, wrong, manual, h, middle, rounding)


def along_together(terms, at, which, wrong, manual, h, middle, rounding) -> bool:
    """Ties moved together stay ties, and there the slope is one: False where manual has another."""
    every = np.zeros(manual.shape)
    every[tuple(wrong.T)] = 1
    for direction in (every, np.ones(manual.shape)):
        low, high = slopes(terms, at, which, direction, h, middle)
        room = KINK * max(abs(low), abs(high)) + rounding
        if high - low <= room and abs(np.sum(manual * direction) - high) > 10 * room:
            return False
    return True


def slopes(terms: Callable, at: list, which: int, where: Any, h: float, middle: np.ndarray) -> tuple[float, float]:
    """Between what the derivative may lie: each term's slope to the right and to the left, the lesser ones summed and
    the greater ones. where: one element, by its index, or a direction of the leaf.

    Term by term, for a number may stand in several kinks, and dy has signs of its own."""

    def stepped(step: float) -> Any:
        leaf = at[which].copy()
        if isinstance(where, tuple):
            leaf[where] += step
        else:
            leaf += step * where
        return [leaf if i == which else a for i, a in enumerate(at)]

    right, left = (terms(stepped(h)) - middle) / h, (middle - terms(stepped(-h))) / h
    return float(np.sum(np.minimum(right, left))), float(np.sum(np.maximum(right, left)))
