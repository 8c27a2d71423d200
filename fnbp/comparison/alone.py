"""Compare the backward of one subject by itself: at every probe, twice, by example, under transforms, and with
differences."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fnbp.comparison.bands import bands_of
from fnbp.comparison.differences import against_differences, taylor
from fnbp.comparison.evaluation import EndlessError, Evaluator, FailedError, RefusedError, Sides, compile_together
from fnbp.comparison.examples import by_example
from fnbp.comparison.leaf import Leaf, Scale, Sight, Values, worst_spot
from fnbp.comparison.numerics import U32, U64, all_finite, first_line, is_floating, relative, rms, roundoff
from fnbp.comparison.plan import Options, is_inside
from fnbp.comparison.precision import accuracy_at, accuracy_over_draws
from fnbp.comparison.probe import ORDINARY, Probe
from fnbp.comparison.probes import COMPILED_ANEW, OFTEN_UNDEFINED, pairs_of, probes_of
from fnbp.comparison.progress import saying
from fnbp.comparison.report import SEVERITY, Findings, Row
from fnbp.comparison.rounding import Z_LIMIT, noise, one_rounding_away, shaken, size_of_terms, z_of
from fnbp.comparison.sizes import SIZES
from fnbp.comparison.start import Prepared, Start, at_given, note_narrowing, row_of_failure, row_of_mismatch
from fnbp.comparison.subject import Subject
from fnbp.comparison.transforms import ON_REQUEST, TRANSFORMS, functions_of
from fnbp.comparison.values import of_forwards
from fnbp.comparison.verdict import Verdict, verdict
from fnbp.measurement import Cost, versus

NEARNESS = {"": 0, "given": 0, "another": 1, "nearby": 1, "all draws": 1}  # of a probe; the extremes are 2
SMALLEST = float(np.finfo(np.float32).tiny)
SAMPLES = 20  # of a cost
LEEWAY = 100.0  # times a leaf's noise in the working dtype: jit, vmap and devices sum in other orders


def compare_each(subjects: list[Subject], options: Options) -> list[Findings]:
    """Compare every subject by itself, and say at a terminal which one it is."""
    with saying() as say, np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # extremes overflow
        say("compiling")
        prepared, found = prepare(subjects, options), []
        for i, one in enumerate(prepared, 1):
            say(f"{one.subject.path} ({i} of {len(prepared)})")
            found.append(compare_alone(one, options))
    return found


def prepare(subjects: list[Subject], options: Options) -> list[Prepared]:
    """Build the probes of every subject, each from draws of its own, and compile what they need side by side.

    A layer that is the same code as an earlier one, with the same options, is tried only at what it met itself.
    """
    found, known = [], {}
    for subject, rng in zip(subjects, options.rng.spawn(len(subjects)), strict=True):
        repeats = subject.kind in known
        wanted = options.probes[:1] if repeats else options.probes
        if subject.sizes is not None:  # who says how to make other sizes wants them tried
            wanted = tuple(dict.fromkeys([*wanted, *SIZES])) if options.quick else wanted
        built = list(probes_of(subject, rng, wanted))
        notes = [point for point in built if isinstance(point, str)]
        probes = [point for point in built if isinstance(point, Probe)]
        if options.pairs and not repeats:
            probes += list(pairs_of(subject, rng, probes))
        outside = [] if subject.domain is None else [p for p in probes[1:] if not inside(subject.domain, p)]
        if outside:
            left_out = set(map(id, outside))
            probes = [p for p in probes if id(p) not in left_out]
            notes.append(f"{subject.path}: not tried at {len(outside)} probes that lie outside of its domain")
        compiled = known.setdefault(subject.kind, {})
        brief = repeats or subject.joins or options.quick
        found.append(Prepared(Evaluator(subject, options.limit, compiled), probes, notes, rng, brief))
    compile_together([one.evaluator for one in found], [one.probes for one in found], dtypes_of)
    return found


def inside(domain: Callable[..., Any], probe: Probe) -> bool:
    """True if the arguments of a probe lie in the domain, also with what XLA takes for 0; not if the domain raises."""
    flushed = jax.tree.map(lambda a: np.where(abs(a) < SMALLEST, 0, a) if is_floating(a) else a, probe.args)
    try:
        return is_inside(domain, probe.args) and is_inside(domain, flushed)
    except Exception:  # it has told of the given point; of other sizes it may not
        return False


def dtypes_of(probe: Probe) -> tuple:
    """In what a probe is evaluated in any case. One that is compiled anew must do with float64."""
    return (np.float64,) if probe.name in COMPILED_ANEW else (None, np.float64)


def compare_alone(prepared: Prepared, options: Options) -> Findings:
    """Compare the backward of one subject, by itself, with jax.vjp: every test that there is."""
    start = at_given(prepared)
    if start.failed:  # nothing else can be asked of it
        return Findings(start.rows, prepared.notes, calls=prepared.evaluator.calls)
    rows, scale = at_probes(prepared, start)
    rows, differences = [*start.rows, *rows], {}
    if not options.quick:
        try:
            rows, differences = by_differences(prepared, start, rows, scale)
        except RefusedError as error:
            prepared.notes.append(f"{prepared.subject.path}: no differences: at points nearby it raises {error}")
    single, examples = [], {}
    if not prepared.brief or options.pairs:
        single, examples = by_example(prepared.evaluator, prepared.probes, start.leaves, scale)
    more, transforms = under_transforms(prepared, start, options, rows)
    found = settled(start.leaves, [*rows, *single, *more], prepared.notes, differences | examples | transforms)
    return replace(found, calls=prepared.evaluator.calls, cost=cost_of(prepared) if options.cost else None)


def cost_of(prepared: Prepared) -> Cost | None:
    """Time and memory of both sides at the given point, compiled as a user compiles; None if one cannot be."""
    both = functions_of(prepared.subject, prepared.probes[0])
    try:
        return versus(both.manual, both.automatic, tuple(both.arrays), samples=SAMPLES, compiles=1)
    except Exception as error:
        prepared.notes.append(f"{prepared.subject.path}: no cost: {type(error).__name__}: {first_line(error)}")
        return None


def at_probes(prepared: Prepared, start: Start) -> tuple[list[Row], Scale]:
    """Compare every leaf at every probe. Returns: what was found, and the scale, which a probe may have narrowed."""
    rows, scale, path, endless = [], start.scale, prepared.subject.path, 0
    for probe in prepared.probes:
        if endless > 1:
            prepared.notes.append(f"{path}: not tried from {probe.title!r} on, after two probes that did not end")
            break
        try:
            if not scale.wide or probe.name not in COMPILED_ANEW:
                prepared.evaluator.at(probe)
            prepared.evaluator.at(probe, scale.dtype)
        except FailedError as failed:
            rows.append(replace(row_of_failure(prepared.subject, failed), probe=probe.title))
        except EndlessError as error:
            endless += 1
            prepared.notes.append(f"{path}: not tried at {probe.title!r}, {error}; what computes it is left behind")
        except Exception as error:  # the subject refuses that point
            if probe is prepared.probes[0]:
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
            prepared.notes.append(f"{path}: not tried at {probe.title!r}, {why}")
        else:
            try:
                found, scale = at_probe(prepared, probe, start.leaves, scale)
                rows += found
            except RefusedError as error:
                prepared.notes.append(f"{path}: not judged at {probe.title!r}: at points nearby it raises {error}")
        if probe.name not in ORDINARY:
            prepared.evaluator.forget(probe)
    return rows + [row for leaf in start.leaves.values() for row in accuracy_over_draws(leaf)], scale


def at_probe(prepared: Prepared, probe: Probe, leaves: dict[str, Leaf], scale: Scale) -> tuple[list[Row], Scale]:
    """Compare every leaf at one probe."""
    evaluator, rows = prepared.evaluator, []
    exact = evaluator.at(probe, scale.dtype)
    working = exact if scale.wide and probe.name in COMPILED_ANEW else evaluator.at(probe)
    if not all_finite(working.expected_y) or not all_finite(exact.expected_y):
        if probe.name not in OFTEN_UNDEFINED:
            path = prepared.subject.path
            prepared.notes.append(f"{path}: not judged at {probe.title!r}, its forward is not finite there")
        return [], scale
    rows += of_forwards(evaluator, probe, exact, working, scale)
    for name, leaf in leaves.items():
        if name not in exact.manual or name not in working.manual:
            wrong = next((m for m in exact.wrong + working.wrong if m.leaf in (name, "params")), None)
            if wrong:
                rows.append(replace(row_of_mismatch(prepared.subject, wrong), leaf=name, probe=probe.title))
            continue
        values = Values(exact.manual[name], exact.automatic[name], working.manual[name], working.automatic[name])
        unknown = not_finite(prepared, leaf, probe, values, scale)
        rows += [unknown] if unknown else []
        if unknown and unknown.kind in ("nonfinite", "formula"):
            continue
        at = sight_of(prepared, probe, leaf, values, exact, scale)
        said, found = judged(at)
        rows += found
        if said.at.scale != scale:
            constant = prepared.subject.has_narrow_constant and not prepared.subject.is_narrow
            why = "it holds a constant of float32" if constant else "it computes in float32 whatever comes in"
            note_narrowing(prepared, why)
            scale = said.at.scale
        elif said.kind == "ok" and scale.wide:
            rows += [judged_in_band(band) for band in bands_of(at, single_of(evaluator, probe, scale))]
    return [row for row in rows if row is not None], scale


def single_of(evaluator: Evaluator, probe: Probe, scale: Scale) -> Callable[[], Sides]:
    """A function that computes the float32 side, from which the noise is told; in float32, one rounding away."""
    if not scale.wide:
        return lambda: one_rounding_away(evaluator, probe)
    return lambda: evaluator.at(probe, None if scale.working == np.float32 and probe.wide is None else np.float32)


def sight_of(prepared: Prepared, probe: Probe, leaf: Leaf, values: Values, exact: Sides, scale: Scale) -> Sight:
    """One leaf at one probe.

    The noise is at least one rounding. So an error of at most Z_LIMIT roundings is right in any case, and what would
    have to be computed only to tell its noise is not: its z is given as 0.
    """
    m, a = values.known()
    error, n, z = relative(m, a), U32, 0.0
    at_hand = scale.working == np.float32 and probe.name not in COMPILED_ANEW
    if error > Z_LIMIT * scale.roundoff or at_hand or probe.name == "given":
        n = noise(single_of(prepared.evaluator, probe, scale)().automatic[leaf.leaf], values.a64)
        flushed = 0 < np.max(abs(a), initial=0) < SMALLEST  # by float32, to 0, which tells no noise
        redrawn = n > 0.1 and prepared.evaluator.subject.draws  # float32 draws other numbers
        if probe.name == "denormal" and max(np.max(abs(b), initial=0) for b in (m, a)) < U64 * size_of_terms(a, probe):
            error = 0.0  # what is left where terms of the size of dy cancel
        elif scale.wide and (flushed or redrawn):
            n = noise(prepared.evaluator.evaluate(shaken(probe, 2 * U32), np.float64).automatic[leaf.leaf], values.a64)
        z = z_of(m, a, n, scale, exact, probe) if error else 0.0
    return Sight(prepared.evaluator, probe, leaf, values, m, a, n, error, z, exact, scale, prepared.rng)


def not_finite(prepared: Prepared, leaf: Leaf, probe: Probe, values: Values, scale: Scale) -> Row | None:
    """A row if one side is not finite: "nonfinite" if manual is not where automatic is; where automatic is not, a
    "formula" if differences of the forward have another slope than manual, else a "convention"."""
    m, known = values.m64, np.isfinite(values.a64)
    spot = {"probe": probe.title} | worst_spot(values.m64, values.a64)
    if not np.isfinite(m[known]).all():
        single = single_of(prepared.evaluator, probe, scale)().automatic[leaf.leaf]
        if probe.name not in ORDINARY and relative(single[known], values.a64[known]) > 0.1:
            return None  # autodiff keeps no digit there either: it is finite by chance
        return leaf.row("nonfinite", hint=f"{(~np.isfinite(m)).sum()} of {m.size} elements are not finite", **spot)
    if known.all():
        return None
    if scale.wide and (np.isfinite(m) & ~known).any():
        where = np.isfinite(m) & ~known
        index = against_differences(
            prepared.evaluator, probe, leaf.leaf, np.asarray(m, np.float64), where, prepared.rng
        )
        if index is not None:
            spot |= {"index": index, "manual": float(m[index]), "automatic": float(values.a64[index])}
            return leaf.row(
                "formula", hint="autodiff is not finite here, and differences of the forward differ", **spot
            )
    hint = "autodiff is not finite here, the manual backward is" if np.isfinite(m).all() else "neither is finite"
    return leaf.row("convention", hint=hint, **spot)


def judged(at: Sight) -> tuple[Verdict, list[Row]]:
    """The verdict on one leaf at one probe, and its rows; the leaf keeps what it learns."""
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
        return said, [leaf.row(said.kind, probe=at.probe.title, hint=said.hint, **spot)]
    if said.kind == "unseen" or at.probe.name in COMPILED_ANEW:
        return said, []
    accuracy = accuracy_at(at)
    leaf.pooled += [accuracy.pooled] if accuracy.pooled else []
    return said, [accuracy.row] if accuracy.row else []


def judged_in_band(at: Sight) -> Row | None:
    """The row of the elements of one order of magnitude in a leaf that as a whole is right."""
    said = verdict(at)
    if said.kind != "formula":
        return None
    at.leaf.z = max(at.leaf.z, said.at.z)
    hint = f"only elements of size {rms_of(at):.0e}, beside larger ones, are wrong: {said.hint}"
    return at.leaf.row("formula", probe=at.probe.title, hint=hint, **worst_spot(at.m, at.a))


def rms_of(at: Sight) -> float:
    """The size of the elements that are judged."""
    return rms((at.a if np.any(at.a) else at.m)[at.where])


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
    if whole == "differs" and evaluator.subject.is_narrow:
        return rows, {}  # it rounds to a narrower dtype, by more than differences can tell from a rule
    if whole != "differs":
        return rows, {"differences": "ok"} if whole == "agrees" else {}
    for name, leaf in start.leaves.items():
        slope = taylor(evaluator, given, exact.automatic, rng, only=name)
        if slope.verdict != "differs" or name not in exact.manual:
            continue
        text = (
            f"differences of the forward give another slope than autodiff (Taylor order {slope.order:.1f}, expected 2)"
        )
        rules = evaluator.subject.rules
        rule = bool(rules) and "stop_gradient" not in rules
        cause = "a differentiation rule in the forward" if rule else "a stop_gradient in the forward"
        cause = cause if rules else "kinks of the forward that cancel"
        if any(row.leaf == name and row.probe == "given" and row.kind == "convention" for row in rows):
            continue  # the difference between the two is told there
        wrong = [row for row in rows if row.leaf == name and row.kind == "formula"]
        if not wrong:
            hint = f"{text}: {cause}" + (", with which the backward agrees" if rule else "")
            rows = [*rows, leaf.row("disputed" if rule else "convention", probe="given", hint=hint)]
        elif taylor(evaluator, given, exact.automatic | exact.manual, rng, only=name).verdict == "agrees":
            hint = f"differences of the forward agree with it, not with autodiff: it ignores {cause}"
            rows = [replace(row, hint=hint) if row in wrong else row for row in rows]
    return rows, {"differences": "not autodiff's"}


def under_transforms(
    prepared: Prepared, start: Start, options: Options, rows: list[Row]
) -> tuple[list[Row], dict[str, str]]:
    """Run the manual backward under jit, vmap and on all devices, except for leaves that are random anyway."""
    elsewhere = prepared.brief and not options.quick and not prepared.evaluator.eager
    if not start.leaves or elsewhere:
        return [], {}
    random = {row.leaf for row in rows if row.kind == "random"}
    steady = {name: leaf for name, leaf in start.leaves.items() if name not in random}
    found, checks = [], {}
    for name in options.transforms:
        transform = TRANSFORMS.get(name) or ON_REQUEST[name]
        more, word = transform(prepared.evaluator, prepared.probes, steady, start.step_by_step.manual)
        found += more
        checks |= {name: word} if word else {}
    return found, checks


def settled(leaves: Mapping[str, Leaf], rows: list[Row], notes: list[str], checks: dict[str, str]) -> Findings:
    """One row for each leaf, after those that stand for no single leaf; conventions by leaf."""
    of_leaf = {name: [row for row in rows if row.leaf == name] for name in leaves}
    others = first_of_each((row for row in rows if row.leaf not in leaves), "leaf", "kind")
    conventions = [row for found in of_leaf.values() for row in found if row.kind == "convention"]
    final = [gravest(leaves[name], found) for name, found in of_leaf.items()]
    return Findings(others + final, notes, first_of_each(conventions, "leaf", "hint"), checks)


def gravest(leaf: Leaf, found: list[Row]) -> Row:
    """The one row of a leaf: its gravest finding, at the given point, else at a draw, else at an extreme."""
    rhos = [row.rho for row in found if row.rho is not None]
    order = [(row.ok, NEARNESS.get(row.probe, 2), SEVERITY[row.kind]) for row in found]
    worst = found[order.index(min(order))] if order else leaf.row("ok")
    return replace(worst, error=leaf.error, limit=leaf.limit, z=leaf.z, rho=max(rhos, default=None))


def first_of_each(rows: Iterable[Row], *fields: str) -> list[Row]:
    """The first of all rows that are alike in these fields."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, field) for field in fields), row)
    return list(found.values())
