"""The verdict on one unit: every point, the backward again, the transforms, and the third witness."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fnbp.comparison.differences import taylor
from fnbp.comparison.evaluation import FailedError, Plain, Point, Runner, compile_together
from fnbp.comparison.hints import hint_of_mismatch
from fnbp.comparison.numerics import finite, first_line, relative, roundoff
from fnbp.comparison.probes import SIZES, Probe, probes_of
from fnbp.comparison.report import SEVERITY, Row
from fnbp.comparison.subject import Mismatch, Unit, leaf_names
from fnbp.comparison.transforms import TRANSFORMS
from fnbp.comparison.verdict import Leaf, Scale, Sight, Values, noise, perturbed, precision, verdicts, worst_spot

NEARNESS = {"": 0, "given": 0, "another": 1, "nearby": 1, "all draws": 1}  # of a probe; the extremes are 2


class Options(NamedTuple):
    """What compare was asked for."""

    probes: tuple[str, ...]
    transforms: tuple[str, ...]
    rng: np.random.Generator


class Prepared(NamedTuple):
    """A unit with the points that it is to be tried at; brief: sizes and transforms are tried elsewhere."""

    runner: Runner
    points: list[Probe]
    notes: list[str]
    rng: np.random.Generator
    brief: bool


def prepare(units: list[Unit], options: Options) -> list[Prepared]:
    """Points for every unit, each from draws of its own; what they need is compiled side by side.

    A layer that is the same code as an earlier one, with the same options, is not tried at other sizes again.
    """
    found, known = [], set()
    for unit, rng in zip(units, options.rng.spawn(len(units)), strict=True):
        brief = unit.kind in known
        wanted = tuple(name for name in options.probes if not (brief and name in SIZES))
        points = list(probes_of(unit, rng, wanted))
        notes = [point for point in points if isinstance(point, str)]
        points = [point for point in points if isinstance(point, Probe)]
        joins = unit.layer is not None and bool(unit.layer.parts)  # its parts go through all of it by themselves
        found.append(Prepared(Runner(unit), points, notes, rng, brief or joins))
        known.add(unit.kind)
    compile_together([one.runner for one in found], [one.points for one in found], (None, np.float64))
    return found


class Judged(NamedTuple):
    """The rows of a unit, what was noted on the way, and how each transform went."""

    rows: list[Row]
    notes: list[str]
    conventions: list[Row]
    transforms: dict[str, str]


def judge(prepared: Prepared, options: Options) -> Judged:
    """Every test of one unit."""
    runner, points, notes, rng, brief = prepared
    unit, given = runner.unit, points[0]
    try:
        first = runner.at(given)
        once = twice = plain = Plain(first.y, first.manual)
        if not brief:
            once = plain = runner.plain(given)
            twice = once if alike(once, Plain(first.y, first.manual)) else runner.plain(given)
    except FailedError as failed:
        return Judged([broken(unit, failed)], notes, [], {})
    check_subject(unit, first, once, twice)
    leaves = {
        name: Leaf(unit.path, name, np.shape(a), str(a.dtype))
        for (_, name), a in zip(leaf_names(unit), jax.tree.leaves(unit.args), strict=True)
        if name in first.manual
    }
    rows = [structure_row(unit, m) for m in first.wrong]
    repeated(once, twice, leaves)
    scale = Scale(runner, given, notes)
    for probe in points:
        try:
            for dtype in (None, scale.dtype, *(() if scale.working == np.float32 else (np.float32,))):
                runner.at(probe, dtype)
        except FailedError as failed:
            rows.append(replace(broken(unit, failed), probe=probe.name))
            if probe is given:  # nothing else can be asked of it
                return Judged(rows, notes, [], {})
        except Exception as error:  # the subject refuses that point
            if probe is given:
                raise
            notes.append(f"{unit.path}: not tried at {probe.name!r}, {type(error).__name__}: {first_line(error)}")
        else:
            look(runner, probe, leaves, scale, notes, rng)
    for leaf in leaves.values():
        precision(leaf)
    differences = witness(runner, given, leaves, scale, rng)
    steady = {name: leaf for name, leaf in leaves.items() if all(row.kind != "random" for row in leaf.found)}
    results = {"differences": differences} if differences else {}
    if leaves and (not brief or runner.eager):
        results |= {name: TRANSFORMS[name](runner, points, steady, plain.manual) for name in options.transforms}
    rows += [settle(leaf) for leaf in leaves.values()]
    conventions = [row for leaf in leaves.values() for row in leaf.found if row.kind == "convention"]
    return Judged(rows, notes, first_of_each(conventions), results)


def look(runner: Runner, probe: Probe, leaves: Mapping[str, Leaf], scale: Scale, notes: list[str], rng) -> None:
    """All leaves at one probe."""
    working, exact = runner.at(probe), runner.at(probe, scale.dtype)
    if not finite(working.y) or not finite(working.due) or not finite(exact.due):
        if probe.name not in ("huge", "mirrored"):  # where many a forward overflows, or has no business
            notes.append(f"{runner.unit.path}: not judged at {probe.name!r}, its forward is not finite there")
        return
    single = working if scale.working == np.float32 else runner.at(probe, np.float32)
    if scale.dtype == np.float32:
        single = perturbed(runner, probe)
    for name, leaf in leaves.items():
        if name not in exact.manual or name not in working.manual:
            wrong = next(m for m in exact.wrong + working.wrong if m.leaf in (name, "params"))
            leaf.found.append(replace(structure_row(runner.unit, wrong), leaf=name, probe=probe.name))
            continue
        v = Values(exact.manual[name], exact.automatic[name], working.manual[name], working.automatic[name])
        size = noise(single.automatic[name], v.a64)
        leaf.found += verdicts(Sight(runner, probe, leaf, v, size, exact, scale, rng, notes))


def alike(one: Plain, other: Plain) -> bool:
    """True where two runs gave the same, up to the rounding of other orders of summation."""
    sides = [p.y + [p.manual[name] for name in sorted(p.manual)] for p in (one, other)]
    return all(relative(a, b) <= 64 * roundoff(a.dtype) for a, b in zip(*sides, strict=True))


def first_of_each(rows: list[Row]) -> list[Row]:
    """One row a leaf and hint."""
    return list({(row.leaf, row.hint): row for row in reversed(rows)}.values())[::-1]


def check_subject(unit: Unit, first: Point, once: Plain, twice: Plain) -> None:
    """ValueError for a subject that returns NaN, or another value each time."""
    if not finite(first.y) or not finite(first.due):
        raise ValueError(f"compare: {unit.path} returns values that are not finite at the given arguments")
    for a, b in zip(once.y, twice.y, strict=True):
        if relative(a, b) > 1e3 * roundoff(a.dtype):
            raise ValueError(
                f"compare: {unit.path} is random: called twice on the same arguments it returns values that differ by "
                f"{relative(a, b):.1e}; give it its randomness as an argument, such as a jax.random key"
            )


def broken(unit: Unit, failed: FailedError) -> Row:
    """The row of a backward that raises."""
    return Row(unit.path, "", (), "", kind="raises", hint=f"the backward raises {failed}")


def structure_row(unit: Unit, wrong: Mismatch) -> Row:
    """The row of a cotangent that is not built as its argument."""
    return Row(unit.path, wrong.leaf, wrong.shape, "", kind="structure", hint=hint_of_mismatch(wrong))


def settle(leaf: Leaf) -> Row:
    """The one row of a leaf: its gravest finding, at the given point, else at a draw, else at an extreme."""
    rhos = [row.rho for row in leaf.found if row.rho is not None]
    order = [(row.ok, NEARNESS.get(row.probe, 2), SEVERITY[row.kind]) for row in leaf.found]
    worst = leaf.found[order.index(min(order))] if order else leaf.row("ok")
    return replace(worst, error=leaf.error, limit=leaf.limit, z=leaf.z, rho=max(rhos, default=None))


def repeated(once: Plain, twice: Plain, leaves: Mapping[str, Leaf]) -> None:
    """The backward again, on the same arguments."""
    for name, leaf in leaves.items():
        m, same = once.manual[name], twice.manual[name]
        apart = relative(same, m) if np.isfinite(m).all() else 0.0
        if apart > 1e3 * roundoff(m.dtype):
            hint = f"called twice on the same arguments it returns values that differ by {apart:.1e}"
            spot = worst_spot(np.asarray(same, np.float64), np.asarray(m, np.float64))
            leaf.found.append(leaf.row("random", probe="given", hint=hint, **spot))


def witness(runner: Runner, given: Probe, leaves: Mapping[str, Leaf], scale: Scale, rng: np.random.Generator) -> str:
    """Differences of the forward: is autodiff itself right? In a word; "" where they cannot tell."""
    if scale.dtype != np.float64:
        return ""
    exact = runner.at(given, np.float64)
    if not finite(exact.automatic.values()):
        return ""
    verdict = taylor(runner, given, exact.automatic, rng).verdict
    if verdict != "differs":
        return "ok" if verdict == "agrees" else ""
    for name, leaf in leaves.items():
        slope = taylor(runner, given, exact.automatic, rng, only=name)
        if slope.verdict != "differs" or name not in exact.manual:
            continue
        text = f"differences of the forward give another slope than autodiff (Taylor order {slope.order:.1f} for 2)"
        cause = "a stop_gradient, or a rule of its own, in the forward"
        formula = [row for row in leaf.found if row.kind == "formula"]
        if not formula:
            leaf.found.append(leaf.row("convention", probe="given", hint=f"{text}: {cause}"))
        elif taylor(runner, given, exact.manual | missing(exact), rng, only=name).verdict == "agrees":
            hint = f"differences of the forward side with it, against autodiff: it goes through {cause}"
            leaf.found = [replace(row, hint=hint) if row.kind == "formula" else row for row in leaf.found]
    return "not autodiff's"


def missing(point: Point) -> dict[str, np.ndarray]:
    """Automatic cotangents of the leaves that have no manual one."""
    return {name: a for name, a in point.automatic.items() if name not in point.manual}
