"""Compare the backward of one subject by itself: at every probe, twice, under transforms, and with differences."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fnbp.comparison.differences import taylor
from fnbp.comparison.evaluation import Evaluator, FailedError, Sides, StepByStep, compile_together
from fnbp.comparison.hints import hint_of_mismatch
from fnbp.comparison.leaf import Leaf, Scale, Sight, Values, worst_spot
from fnbp.comparison.numerics import U32, all_finite, first_line, is_floating, relative, roundoff
from fnbp.comparison.plan import Options
from fnbp.comparison.precision import accuracy_at, accuracy_over_draws
from fnbp.comparison.probes import SIZES, Probe, probes_of
from fnbp.comparison.report import SEVERITY, Findings, Row
from fnbp.comparison.rounding import Z_LIMIT, noise, one_rounding_away, z_of
from fnbp.comparison.subject import Mismatch, Subject, leaf_names
from fnbp.comparison.transforms import TRANSFORMS
from fnbp.comparison.verdict import verdict

NEARNESS = {"": 0, "given": 0, "another": 1, "nearby": 1, "all draws": 1}  # of a probe; the extremes are 2
LEEWAY = 100.0  # times a leaf's noise in the working dtype: jit, vmap and devices sum in other orders


class Prepared(NamedTuple):
    """A subject with the probes that it is to be tried at.

    brief   the same code is tried elsewhere in full, so repetition and transforms are left out here
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


def prepare(subjects: list[Subject], options: Options) -> list[Prepared]:
    """Build the probes of every subject, each from draws of its own, and compile what they need side by side.

    A layer that is the same code as an earlier one, with the same options, is not tried at other sizes again.
    """
    found, known = [], set()
    for subject, rng in zip(subjects, options.rng.spawn(len(subjects)), strict=True):
        repeats = subject.kind in known
        wanted = tuple(name for name in options.probes if not (repeats and name in SIZES))
        built = list(probes_of(subject, rng, wanted))
        notes = [point for point in built if isinstance(point, str)]
        probes = [point for point in built if isinstance(point, Probe)]
        joins = subject.layer is not None and bool(subject.layer.parts)  # its parts are tried in full
        found.append(Prepared(Evaluator(subject), probes, notes, rng, repeats or joins))
        known.add(subject.kind)
    compile_together([one.evaluator for one in found], [one.probes for one in found], (None, np.float64))
    return found


def compare_alone(prepared: Prepared, options: Options) -> Findings:
    """Compare the backward of one subject, by itself, with jax.vjp: every test that there is."""
    start = at_given(prepared)
    if start.failed:  # nothing else can be asked of it
        return Findings(start.rows, prepared.notes)
    rows, scale = at_probes(prepared, start)
    rows, differences = by_differences(prepared, start, [*start.rows, *rows], scale)
    more, transforms = under_transforms(prepared, start, options, rows)
    return settled(start.leaves, [*rows, *more], prepared.notes, differences | transforms)


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
        once = twice = compiled = StepByStep(first.y, first.manual)
        if not prepared.brief:
            once = evaluator.step_by_step(given)
            twice = once if alike(once, compiled) else evaluator.step_by_step(given)
    except FailedError as failed:
        return Start({}, [row_of_failure(subject, failed)], nothing, Scale(None), failed=True)
    check_subject(subject, first, once, twice)
    leaves = {
        name: Leaf(subject.path, name, np.shape(a), str(a.dtype))
        for (_, name), a in zip(leaf_names(subject), jax.tree.leaves(subject.args), strict=True)
        if name in first.manual
    }
    rows = [row_of_mismatch(subject, m) for m in first.wrong]
    scale, why = scale_of(evaluator, given)
    note_narrowing(prepared, why)
    try:
        for dtype in scale.dtypes:
            evaluator.at(given, dtype)
    except FailedError as failed:
        rows.append(replace(row_of_failure(subject, failed), probe=given.name))
        return Start(leaves, rows, nothing, scale, failed=True)
    return Start(leaves, rows + repeated(once, twice, leaves), once, scale)


def scale_of(evaluator: Evaluator, given: Probe) -> tuple[Scale, str]:
    """The finest arithmetic of a subject, and, if that is float32, why."""
    flowing = [a.dtype for a in jax.tree.leaves(evaluator.subject.args) if is_floating(a)]
    scale = Scale(flowing[0] if len(set(flowing)) == 1 else None)
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


def at_probes(prepared: Prepared, start: Start) -> tuple[list[Row], Scale]:
    """Compare every leaf at every probe. Returns: what was found, and the scale, which a probe may have narrowed."""
    rows, scale = [], start.scale
    for probe in prepared.probes:
        try:
            for dtype in scale.dtypes:
                prepared.evaluator.at(probe, dtype)
        except FailedError as failed:
            rows.append(replace(row_of_failure(prepared.subject, failed), probe=probe.name))
        except Exception as error:  # the subject refuses that point
            if probe is prepared.probes[0]:
                raise
            path, why = prepared.subject.path, f"{type(error).__name__}: {first_line(error)}"
            prepared.notes.append(f"{path}: not tried at {probe.name!r}, {why}")
        else:
            found, scale = at_probe(prepared, probe, start.leaves, scale)
            rows += found
    return rows + [row for leaf in start.leaves.values() for row in accuracy_over_draws(leaf)], scale


def at_probe(prepared: Prepared, probe: Probe, leaves: dict[str, Leaf], scale: Scale) -> tuple[list[Row], Scale]:
    """Compare every leaf at one probe."""
    evaluator, rows = prepared.evaluator, []
    working, exact = evaluator.at(probe), evaluator.at(probe, scale.dtype)
    if not all_finite(working.y) or not all_finite(working.expected_y) or not all_finite(exact.expected_y):
        if probe.name not in ("huge", "mirrored"):  # there many a forward overflows, or is not defined
            path = prepared.subject.path
            prepared.notes.append(f"{path}: not judged at {probe.name!r}, its forward is not finite there")
        return [], scale
    if scale.wide:
        single = working if scale.working == np.float32 else evaluator.at(probe, np.float32)
    else:
        single = one_rounding_away(evaluator, probe)
    for name, leaf in leaves.items():
        if name not in exact.manual or name not in working.manual:
            wrong = next(m for m in exact.wrong + working.wrong if m.leaf in (name, "params"))
            rows.append(replace(row_of_mismatch(prepared.subject, wrong), leaf=name, probe=probe.name))
            continue
        values = Values(exact.manual[name], exact.automatic[name], working.manual[name], working.automatic[name])
        unknown = not_finite(leaf, probe, values)
        rows += [unknown] if unknown else []
        if unknown and unknown.kind == "nonfinite":
            continue
        m, a = values.known()
        n = noise(single.automatic[name], values.a64)
        z = z_of(m, a, n, scale, exact, probe)
        at = Sight(evaluator, probe, leaf, values, m, a, n, relative(m, a), z, exact, scale, prepared.rng)
        found, scale_then = judged(at)
        rows += found
        if scale_then != scale:
            note_narrowing(prepared, "it computes in float32 whatever comes in")
            scale = scale_then
    return rows, scale


def not_finite(leaf: Leaf, probe: Probe, values: Values) -> Row | None:
    """A row of kind "nonfinite" if manual has NaN or infinity where automatic has not; a "convention" where it has."""
    m, known = values.m64, np.isfinite(values.a64)
    spot = {"probe": probe.name} | worst_spot(values.m64, values.a64)
    if not np.isfinite(m[known]).all():
        return leaf.row("nonfinite", hint=f"{(~np.isfinite(m)).sum()} of {m.size} elements are not finite", **spot)
    if known.all():
        return None
    hint = "autodiff is not finite here, the manual backward is" if np.isfinite(m).all() else "neither is finite"
    return leaf.row("convention", hint=hint, **spot)


def judged(at: Sight) -> tuple[list[Row], Scale]:
    """The rows of one leaf at one probe by its verdict, and the scale from here on; the leaf keeps what it learns."""
    leaf = at.leaf
    if at.probe.name == "given":
        leaf.error, leaf.limit = at.error, Z_LIMIT * at.scale.roundoff * at.conditioning / U32
        own = relative(at.values.mw, at.a)  # what is rounded so badly is rounded as badly another way
        least = max(relative(at.values.aw, at.a), roundoff(at.values.mw.dtype))
        leaf.leeway = max(LEEWAY * least, 4 * own if np.isfinite(own) else 0)
    said = verdict(at)
    if said.kind in ("ok", "formula"):
        leaf.z = max(leaf.z, said.at.z)
    if said.kind in ("convention", "formula"):
        spot = worst_spot(at.values.m64, at.values.a64)
        return [leaf.row(said.kind, probe=at.probe.name, hint=said.hint, **spot)], said.at.scale
    if said.kind == "unseen":
        return [], said.at.scale
    accuracy = accuracy_at(at)
    leaf.pooled += [accuracy.pooled] if accuracy.pooled else []
    return [accuracy.row] if accuracy.row else [], said.at.scale


def by_differences(prepared: Prepared, start: Start, rows: list[Row], scale: Scale) -> tuple[list[Row], dict[str, str]]:
    """Check autodiff itself with differences of the forward.

    Returns: rows, with what differences add to them, and a word on how it went, or no word if they cannot tell.
    """
    evaluator, given, rng = prepared.evaluator, prepared.probes[0], prepared.rng
    if not scale.wide:
        return rows, {}
    exact = evaluator.at(given, np.float64)
    if not all_finite(exact.automatic.values()):
        return rows, {}
    whole = taylor(evaluator, given, exact.automatic, rng).verdict
    if whole != "differs":
        return rows, {"differences": "ok"} if whole == "agrees" else {}
    for name, leaf in start.leaves.items():
        slope = taylor(evaluator, given, exact.automatic, rng, only=name)
        if slope.verdict != "differs" or name not in exact.manual:
            continue
        text = (
            f"differences of the forward give another slope than autodiff (Taylor order {slope.order:.1f}, expected 2)"
        )
        cause = "a stop_gradient or a differentiation rule in the forward"
        wrong = [row for row in rows if row.leaf == name and row.kind == "formula"]
        if not wrong:
            rows = [*rows, leaf.row("convention", probe="given", hint=f"{text}: {cause}")]
        elif taylor(evaluator, given, exact.automatic | exact.manual, rng, only=name).verdict == "agrees":
            hint = f"differences of the forward agree with it, not with autodiff: it ignores {cause}"
            rows = [replace(row, hint=hint) if row in wrong else row for row in rows]
    return rows, {"differences": "not autodiff's"}


def under_transforms(
    prepared: Prepared, start: Start, options: Options, rows: list[Row]
) -> tuple[list[Row], dict[str, str]]:
    """Run the manual backward under jit, vmap and on all devices, except for leaves that are random anyway."""
    if not start.leaves or (prepared.brief and not prepared.evaluator.eager):
        return [], {}
    random = {row.leaf for row in rows if row.kind == "random"}
    steady = {name: leaf for name, leaf in start.leaves.items() if name not in random}
    found, checks = [], {}
    for name in options.transforms:
        transform = TRANSFORMS[name]
        more, checks[name] = transform(prepared.evaluator, prepared.probes, steady, start.step_by_step.manual)
        found += more
    return found, checks


def settled(leaves: Mapping[str, Leaf], rows: list[Row], notes: list[str], checks: dict[str, str]) -> Findings:
    """One row for each leaf, after those that stand for no single leaf; conventions by leaf."""
    of_leaf = {name: [row for row in rows if row.leaf == name] for name in leaves}
    others = [row for row in rows if row.leaf not in leaves]
    conventions = [row for found in of_leaf.values() for row in found if row.kind == "convention"]
    final = [gravest(leaves[name], found) for name, found in of_leaf.items()]
    return Findings(others + final, notes, first_of_each(conventions), checks)


def gravest(leaf: Leaf, found: list[Row]) -> Row:
    """The one row of a leaf: its gravest finding, at the given point, else at a draw, else at an extreme."""
    rhos = [row.rho for row in found if row.rho is not None]
    order = [(row.ok, NEARNESS.get(row.probe, 2), SEVERITY[row.kind]) for row in found]
    worst = found[order.index(min(order))] if order else leaf.row("ok")
    return replace(worst, error=leaf.error, limit=leaf.limit, z=leaf.z, rho=max(rhos, default=None))


def first_of_each(rows: Iterable[Row]) -> list[Row]:
    """The first row of each leaf and hint."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault((row.leaf, row.hint), row)
    return list(found.values())


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
