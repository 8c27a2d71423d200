"""The start of the comparison of one subject: what it does at the given point, and whether it can be judged at all."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.evaluation import EndlessError, Evaluator, FailedError, Sides, StepByStep
from fnbp.comparison.hints import hint_of_mismatch
from fnbp.comparison.leaf import Leaf, Scale, worst_spot
from fnbp.comparison.numerics import all_finite, first_line, is_inexact, relative, roundoff
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.sizes import SIZES
from fnbp.comparison.subject import Mismatch, Subject, leaf_names


class Prepared(NamedTuple):
    """A subject with the probes that it is to be tried at.

    brief   only its probes are tried: the same code is tried elsewhere in full, or the comparison is a quick one
    """

    evaluator: Evaluator
    probes: list[Probe]
    notes: list[str]
    rng: np.random.Generator
    brief: bool

    @property
    def subject(self) -> Subject:
        """What is compared."""
        return self.evaluator.subject


class Start(NamedTuple):
    """What a subject does at the given point.

    step_by_step   its outputs and manual gradients, not compiled
    failed         the manual backward raises there, as rows tell
    """

    leaves: dict[str, Leaf]
    rows: list[Row]
    step_by_step: StepByStep
    scale: Scale
    failed: bool = False


def at_given(prepared: Prepared) -> Start:
    """Run both sides at the given point, and the manual one again, step by step.

    Raises: ValueError for a subject that is not finite there, or random.
    """
    evaluator, given, subject = prepared.evaluator, prepared.probes[0], prepared.subject
    nothing = StepByStep([], {})
    try:
        first = evaluator.at(given)
        once = twice = StepByStep(first.y_before, first.manual)
        if not prepared.brief:
            once, twice = evaluator.in_time(lambda: twice_step_by_step(prepared))
    except FailedError as failed:
        return Start({}, [row_of_failure(subject, failed)], nothing, Scale(None), failed=True)
    except EndlessError as endless:
        raise ValueError(f"compare: {subject.path} at the given arguments: {endless}") from endless
    check_subject(subject, first, once, twice)
    leaves = {
        name: Leaf(subject.path, name, np.shape(a), str(a.dtype))
        for (_, name), a in zip(leaf_names(subject), jax.tree.leaves(subject.args), strict=True)
        if name in first.manual
    }
    rows = [row_of_mismatch(subject, m) for m in first.wrong]
    scale, why = scale_of(evaluator, given)
    try:
        for dtype in scale.dtypes[:2]:
            evaluator.at(given, dtype)
    except FailedError as failed:
        rows.append(replace(row_of_failure(subject, failed), probe=given.name))
        return Start(leaves, rows, nothing, scale, failed=True)
    if scale.wide and any(d.dtype.itemsize < 8 for d in evaluator.at(given, np.float64).manual.values()):
        scale, why = scale.narrowed(), "given float64, its backward returns fewer digits"
    note_narrowing(prepared, why)
    return Start(leaves, rows + repeated(once, twice, leaves), once, scale)


def twice_step_by_step(prepared: Prepared) -> tuple[StepByStep, StepByStep]:
    """The given point step by step, with another point's forward before its backward; if that is not what the compiled
    one returns, again by itself."""
    given, evaluator = prepared.probes[0], prepared.evaluator
    others = [probe for probe in prepared.probes[1:] if probe.name not in SIZES][:1]
    try:
        between = evaluator.interleaved([given, *others])[0]
    except FailedError:  # the other point may be what it refuses
        alone = evaluator.step_by_step(given)
        return alone, alone
    first = evaluator.at(given)
    if alike(between, StepByStep(first.y_before, first.manual)):
        return between, between
    return evaluator.step_by_step(given), between


def scale_of(evaluator: Evaluator, given: Probe) -> tuple[Scale, str]:
    """The finest arithmetic of a subject, and, if that is float32, why."""
    flowing = [a.dtype for a in jax.tree.leaves(evaluator.subject.args) if is_inexact(a)]
    scale = (
        Scale(np.finfo(flowing[0]).dtype if is_native(flowing[0]) else flowing[0])
        if len(set(flowing)) == 1
        else Scale(None)
    )
    try:
        evaluator.at(given, np.float64)
    except FailedError:
        pass  # a fault of the backward, not of the arithmetic
    except Exception as error:
        return scale.narrowed(), f"in float64 it raises {type(error).__name__}: {first_line(error)}"
    return scale, ""


def note_narrowing(prepared: Prepared, why: str) -> None:
    """Note why a subject is judged in float32, if there is a reason."""
    if why:
        prepared.notes.append(f"{prepared.subject.path}: judged in float32, where small mistakes hide: {why}")


def is_native(dtype: Any) -> bool:
    """True for a dtype that NumPy itself has."""
    return dtype.kind in "fc"


def alike(one: StepByStep, other: StepByStep) -> bool:
    """True if two runs gave the same, up to the rounding of other orders of summation."""
    sides = [p.y + [p.manual[name] for name in sorted(p.manual)] for p in (one, other)]
    return all(relative(a, b) <= 64 * roundoff(a.dtype) for a, b in zip(*sides, strict=True))


def check_subject(subject: Subject, first: Sides, once: StepByStep, twice: StepByStep) -> None:
    """ValueError for a subject that returns NaN, or another value each time."""
    if not all_finite(first.y) or not all_finite(first.expected_y):
        raise ValueError(f"compare: {subject.path} returns values that are not finite at the given arguments")
    for a, b in zip(once.y, twice.y, strict=True):
        if relative(a, b) > 1e3 * roundoff(a.dtype):
            raise ValueError(
                f"compare: {subject.path} is random: called twice on the same arguments it returns values that differ "
                f"by {relative(a, b):.1e}; give it its randomness as an argument, such as a jax.random key"
            )


def repeated(once: StepByStep, twice: StepByStep, leaves: Mapping[str, Leaf]) -> list[Row]:
    """A row for each leaf whose backward returns another value when it is called again on the same arguments."""
    rows = []
    for name, leaf in leaves.items():
        m, again = once.manual[name], twice.manual[name]
        apart = relative(again, m) if np.isfinite(m).all() else 0.0
        if apart > 1e3 * roundoff(m.dtype):
            hint = f"called twice on the same arguments it returns values that differ by {apart:.1e}"
            spot = worst_spot(np.asarray(again, np.float64), np.asarray(m, np.float64))
            rows.append(leaf.row("random", probe="given", hint=hint, **spot))
    return rows


def row_of_failure(subject: Subject, failed: FailedError) -> Row:
    """The row of a backward that raises."""
    return Row(subject.path, "", (), "", kind="raises", hint=f"the backward raises {failed}")


def row_of_mismatch(subject: Subject, wrong: Mismatch) -> Row:
    """The row of a cotangent whose tree, shape or dtype is not that of its argument."""
    return Row(subject.path, wrong.leaf, wrong.shape, "", kind="structure", hint=hint_of_mismatch(wrong))
