"""The probes: the given point, draws around it, and the places where backwards go wrong."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fnbp.comparison.contexts import CONTEXTS
from fnbp.comparison.cotangents import COTANGENTS
from fnbp.comparison.numerics import compiled_or_plain, first_line, is_floating, is_inexact, rms, with_numbers
from fnbp.comparison.places import AROUND_IT, PARTS, VALUES, small, ties, zeros
from fnbp.comparison.probe import AROUND, ORDINARY, At, Place, Probe, Rng, cotangent
from fnbp.comparison.sizes import RESIZED
from fnbp.comparison.subject import Subject

OF_COMBINATORS = ("given", "another", "one_example")
SMALL_OUTPUT = 1e-6  # no cotangent is drawn larger because an output is smaller
SCALES = (-20, 0, 20)  # powers of 2 for the cotangents of draws, in turn


def probes_of(subject: Subject, rng: Rng, wanted: Iterable[str]) -> Iterator[Probe | str]:
    """Build the wanted probes that suit this subject, in order; a line of text in the place of one that fails.

    A combinator of fnbp only joins what its parts do, so only the parts are tried at extremes.
    """
    draws = 0
    for name in wanted:
        if subject.is_loss and name in DY_ALONE:  # a loss is given no cotangent
            continue
        if subject.joins and name not in OF_COMBINATORS:
            continue
        draws += name in AROUND
        scale = SCALES[draws % len(SCALES)] if name in AROUND else 0
        try:
            made = PROBES[name](subject, rng)
            for place in made if isinstance(made, list) else [made]:
                if place is not None:
                    yield probe_at(subject, rng, name, place, scale)
        except Exception as error:  # the subject refuses that size or those values
            yield f"{subject.path}: not tried at {name!r}, it raises {type(error).__name__}: {first_line(error)}"


def probe_at(subject: Subject, rng: Rng, name: str, place: At, scale: int) -> Probe:
    """The probe of that name at a place, with a cotangent drawn at that scale if it has none."""
    args, fixed, dy, part = place
    if dy is None:
        told = name == "given" and subject.dy is not None
        dy = subject.dy if told else draw_dy(subject, args, fixed, rng, scale)
    probe = Probe(name, args, fixed, dy, part=part)
    return with_more_digits(probe, rng) if name == "nearby" else probe


def pairs_of(subject: Subject, rng: Rng, probes: list[Probe]) -> Iterator[Probe]:
    """Every probe of x with every one of another part, or of dy: what is right at each alone may be wrong at both."""
    of_x = [p for p in probes if p.name in X_ALONE and not p.part]
    parts = {"params", "state", *subject.names} - {""}
    others = [p for p in probes if p.part.split(".")[0] in parts or p.name in DY_ALONE]
    for one in of_x:
        for other in others:
            if other.name in DY_ALONE:
                dy, args, fixed = other.dy, one.args, one.fixed
            else:
                dy, fixed = one.dy, other.fixed
                kept = other.part.split(".")[0]  # the argument that the other probe has changed
                kept = "" if kept == "params" else kept
                chosen = zip(subject.names, one.args, other.args, strict=True)
                args = tuple(theirs if name == kept else ours for name, ours, theirs in chosen)
            yield Probe(one.name, args, fixed, dy, part=f"x, {other.title}")


def draw_dy(subject: Subject, args: tuple, fixed: Any, rng: Rng, scale: int = 0) -> Any:
    """A Gaussian cotangent of what the subject returns, times 2^scale. Several outputs are each over their own size.

    Large and small ones show what a backward clips, or takes for zero.
    """
    y = subject.shape_at(args, fixed)
    if subject.is_loss:
        return cotangent(y, np.ones)
    sizes = [1.0] * len(jax.tree.leaves(y))
    if len(sizes) > 1:
        sizes = [
            rms(a) if is_inexact(a) else 1.0 for a in jax.tree.leaves(compiled_or_plain(subject.reference, args, fixed))
        ]

    def one(a, size):
        least = 4 if a.dtype == np.float16 else 20
        over = max(size, SMALL_OUTPUT) if np.isfinite(size) and size > 0 else 1.0
        factor = 2.0 ** np.clip(scale, -least, least) / over
        return cotangent(a, lambda shape: rng.standard_normal(shape) * factor)

    return jax.tree.unflatten(jax.tree.structure(y), list(map(one, jax.tree.leaves(y), sizes)))


def with_more_digits(probe: Probe, rng: Rng) -> Probe:
    """The probe with random digits beyond those of the working dtype."""

    def one(a):
        if not is_inexact(a):
            return a
        wide = np.result_type(np.asarray(a).dtype, np.float64) if not is_floating(a) else np.float64
        return with_numbers(lambda a: a * (1 + 2.0**-26 * rng.uniform(-1, 1, a.shape)), np.asarray(a, wide))

    return probe._replace(wide=jax.tree.map(one, (probe.args, probe.dy)))


X_ALONE = tuple(f.__name__ for f in VALUES)
DY_ALONE = tuple(f.__name__ for f in COTANGENTS)
PROBES: dict[str, Callable[[Subject, Rng], Place | list[At]]] = {
    f.__name__: f for f in (*AROUND_IT, *VALUES, *PARTS, *COTANGENTS, *CONTEXTS, *RESIZED)
}
COMPILED_ANEW = tuple(f.__name__ for f in (*RESIZED, *CONTEXTS))  # other shapes, or other static arguments
OFTEN_UNDEFINED = (
    *(f.__name__ for f in (*VALUES, *PARTS) if f not in (zeros, ties, small)),
)  # not finite there: no word
DRAWS = ("given", "another", "nearby", "another", "another", "nearby")
LEVELS: dict[str, tuple[str, ...]] = {
    "quick": ("given", "another", "mirrored", "zeros", "each_mirrored", "dy_mixed", "dy_zero"),
    "full": (*DRAWS, *(name for name in PROBES if name not in ORDINARY)),
    "deep": (*DRAWS * 3, *[name for name in PROBES if name not in ORDINARY] * 2),
}
