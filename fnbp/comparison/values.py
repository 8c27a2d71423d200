"""What a custom_vjp returns, by itself and before its backward, beside its reference."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnbp.comparison.evaluation import Evaluator, RefusedError, Sides
from fnbp.comparison.leaf import Scale, worst_spot
from fnbp.comparison.numerics import U32, U64, is_inexact, real_pairs, relative
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.rounding import SHAKE, SHAKES, SLACK, Z_LIMIT, noise, shaken

ROOM = 64.0  # times the roundings of a forward, for its forward rule in the same dtype
WAYS = {
    "y": "the functions themselves differ by {:.1e}: the reference is a different function",
    "y_before": "under differentiation its forward rule returns another value, off by {:.1e}",
}


def of_forwards(evaluator: Evaluator, probe: Probe, exact: Sides, working: Sides, scale: Scale) -> list[Row]:
    """A row of kind "forward" for each output that is not the reference's, by more than rounding explains."""
    subject = evaluator.subject
    if subject.reference is subject.forward:
        return []
    found = list(differing(evaluator, probe, exact, scale))
    return found or list(differing_as_given(evaluator, probe, exact, working))


def differing_as_given(evaluator: Evaluator, probe: Probe, exact: Sides, working: Sides) -> Iterator[Row]:
    """The rows of one probe in the dtype that was given, where a forward rule may do something of its own."""
    for i, (before, y, expected) in enumerate(zip(working.y_before, working.y, working.expected_y, strict=True)):
        if not is_inexact(y):
            continue
        one_rounding = float(jnp.finfo(y.dtype).eps) / 2
        room = ROOM * max(one_rounding, relative(y, exact.y[i]), relative(expected, exact.expected_y[i]))
        error = relative(before, y)
        if error > room and np.any(y) and error > room + allowed_by_inputs(evaluator, probe, exact, i, one_rounding):
            yield row_of(evaluator, probe, output(i, working), before, y, error, WAYS["y_before"] + f" in {y.dtype}")


def allowed_by_inputs(evaluator: Evaluator, probe: Probe, exact: Sides, i: int, one_rounding: float) -> float:
    """How far an output moves, relatively, as the arguments move by a few roundings: another algorithm may do so."""
    try:
        moved = evaluator.evaluate(shaken(probe, 2 * one_rounding), np.float64).expected_y[i]
    except RefusedError:
        return 0.0
    return 4 * relative(moved, exact.expected_y[i])


def differing(evaluator: Evaluator, probe: Probe, exact: Sides, scale: Scale) -> Iterator[Row]:
    """The rows of one probe, the first for each output."""
    for i, expected in enumerate(exact.expected_y):
        for way, text in WAYS.items():
            y = getattr(exact, way)[i]
            error = relative(y, expected)
            if error <= Z_LIMIT * scale.roundoff or (
                is_inexact(y) and explained(evaluator, probe, way, i, error, scale)
            ):
                continue
            yield row_of(evaluator, probe, output(i, exact), y, expected, error, text)
            break


def output(i: int, sides: Sides) -> str:
    """The name of an output: "y", or "y[1]" of several."""
    return "y" if len(sides.y) == 1 else f"y[{i}]"


def row_of(evaluator: Evaluator, probe: Probe, leaf: str, y: Any, right: Any, error: float, text: str) -> Row:
    """The row of an output that is off by that error."""
    spot, hint = worst_spot(real_pairs(y), real_pairs(right)), text.format(error)
    path = evaluator.subject.path
    return Row(path, leaf, y.shape, str(y.dtype), "forward", error, probe=probe.title, hint=hint, **spot)


def explained(evaluator: Evaluator, probe: Probe, way: str, i: int, error: float, scale: Scale) -> bool:
    """True if rounding explains how far an output is off: by the reference's own noise, or as it grows with eps."""
    if not np.isfinite(error):
        return scale.wide and jitters(evaluator, probe, way, i, scale)
    single = evaluator.at(probe, np.float32)
    expected = evaluator.at(probe, scale.dtype).expected_y[i]
    n = noise(single.expected_y[i], expected)
    if error <= Z_LIMIT * scale.roundoff * n / U32:
        return True
    if not scale.wide:
        return False
    moved = relative(evaluator.evaluate(shaken(probe, SHAKE), np.float64).expected_y[i], expected) / SHAKE
    if error <= Z_LIMIT * U64 * moved:
        return True
    narrow = relative(getattr(single, way)[i], expected)
    return narrow > 16 * n and 1 / SLACK < narrow / error / (U32 / U64) < SLACK


def jitters(evaluator: Evaluator, probe: Probe, way: str, i: int, scale: Scale) -> bool:
    """True if, beside an exact 0, an output is off by another amount, as large, when the arguments move by 2^-36.

    So does rounding, as of mean(x^2) - mean(x)^2 where all x are equal; another function is as far off nearby.
    """

    def off(sides: Sides) -> np.ndarray:
        return real_pairs(getattr(sides, way)[i]) - real_pairs(sides.expected_y[i])

    here = off(evaluator.at(probe, scale.dtype))
    size = np.linalg.norm(here)
    if not np.isfinite(size):
        return False
    try:
        others = [off(evaluator.evaluate(shaken(probe, SHAKE, seed), np.float64)) for seed in range(SHAKES)]
    except RefusedError:
        return False
    return any(np.linalg.norm(other - here) > 0.1 * size < 1e3 * np.linalg.norm(other) < 1e6 * size for other in others)
