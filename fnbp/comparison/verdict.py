"""The verdict on one leaf at one probe: right, excused, or a wrong formula. EXCUSES is the whole rule for that.

Faults of another kind are found elsewhere: in alone.py (what raises, differs in structure, or is random), in
precision.py (what is inaccurate in the working dtype), and in transforms.py. FAULTS in report.py lists them all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fnbp.comparison.differences import between_autodiffs, differences_prefer, only_kinks
from fnbp.comparison.evaluation import RefusedError
from fnbp.comparison.hints import Evidence, hint_of
from fnbp.comparison.leaf import Sight
from fnbp.comparison.numerics import U32, is_float0, is_inexact, real_pairs
from fnbp.comparison.probe import ORDINARY
from fnbp.comparison.rounding import (
    Z_LIMIT,
    cancels,
    changes_when_shaken,
    grows_with_eps,
    reference_is_narrow,
    sensitivity,
)
from fnbp.comparison.subject import leaf_names


class Verdict(NamedTuple):
    """What is said of one leaf at one probe.

    kind   "ok"; "unseen": the probe shows nothing; "rounding": a large error that is rounding; "convention": at a kink
           the two chose different slopes; "formula": wrong
    at     the Sight that was judged: an excuse may have lowered its z, or narrowed its scale
    """

    kind: str
    at: Sight
    hint: str = ""


def saturated(at: Sight) -> Verdict | None:
    """Excuse a leaf of which float32 keeps no digit, for example of a saturated unit.

    n tells how many digits float64 keeps only if float32 keeps one, or if its noise is far above the gradient. At an
    ordinary probe an error of 0.1 or more is not excused: so much is not rounding.
    """
    lost = 0.1 < at.conditioning < 10
    return Verdict("unseen", at) if lost and (at.probe.name not in ORDINARY or at.error < 0.1) else None


def ill_conditioned(at: Sight) -> Sight | None:
    """Allow more rounding at an extreme probe where autodiff itself, in float64, rounds by more than n says.

    z becomes the error over autodiff's own rounding, if that is larger.
    """
    if not (at.z > Z_LIMIT and at.probe.name not in ORDINARY and at.scale.wide and np.any(at.a)):
        return None
    return at._replace(z=at.error / (at.scale.roundoff * max(at.conditioning / U32, sensitivity(at))))


def narrow_reference(at: Sight) -> Sight | None:
    """Judge in float32 a subject that computes in float32 whatever it is given.

    Its float64 gradients have no more digits than its float32 ones, so their differences say nothing. From here on the
    whole subject is judged so.
    """
    if not (at.z > Z_LIMIT and at.scale.wide and reference_is_narrow(at)):
        return None
    return at._replace(scale=at.scale.narrowed(), z=at.error / at.conditioning)


def narrow_constant(at: Sight) -> Sight | None:
    """Judge in float32 a subject whose forward holds a constant that was rounded to float32, as jnp.float32(0.1) is.

    A backward may have the constant with all its digits; in the dtype of the arguments the two are the same.
    """
    of_one_rounding = at.error <= 4 * U32 and at.z > Z_LIMIT and at.scale.wide
    if not (of_one_rounding and at.evaluator.subject.has_narrow_constant):
        return None
    return at._replace(scale=at.scale.narrowed(), z=at.error / at.conditioning)


def slope_by_differences(at: Sight) -> Verdict | None:
    """Excuse what differences of the forward confirm where they contradict autodiff.

    Autodiff is wrong where kinks of its parts cancel, as in max(x, 0) + log(1 + e^-|x|) at 0. Differences that straddle
    a kink, or that have too few digits to tell the two apart, confirm nothing. At an ordinary probe a forward with a
    rule of its own, or a stop_gradient, means what autodiff says of it.
    """
    if not (at.z > Z_LIMIT and at.scale.wide) or (at.probe.name in ORDINARY and at.evaluator.subject.rules):
        return None
    m, a = at.values.known()
    if not differences_prefer(at.evaluator, at.probe, at.leaf.leaf, m, a, at.rng):
        return None
    return Verdict("convention", at, "differences of the forward agree with it, not with autodiff: kinks that cancel")


def kink(at: Sight) -> Verdict | None:
    """Excuse a difference that is only at kinks and ties, where manual lies between the slopes on the two sides.

    Any such slope is a subgradient; which one a backward takes is a convention.
    """
    m, a = at.values.known()  # of the whole leaf: a tie joins elements of all sizes
    if not at.z > Z_LIMIT:
        return None
    here = at.evaluator, at.probe, at.leaf.leaf, m, a
    told = bool(at.evaluator.subject.rules) and between_autodiffs(*here, at.scale.dtype)
    if not (told or only_kinks(*here, at.rng, at.scale.dtype)):
        return None
    return Verdict("convention", at, "at a kink or a tie: the two take different slopes, and both are valid")


def rounding(at: Sight) -> Verdict | None:
    """Excuse an error that behaves as rounding does: it grows with eps, changes as arguments move by 2^-36, or is what
    is left where large terms cancel.

    A backward may round worse than autodiff and still have the right formula; whether it is too inaccurate is judged
    in the working dtype, by rho.
    """
    if not (at.z > Z_LIMIT and at.scale.wide):
        return None
    return Verdict("rounding", at) if grows_with_eps(at) or changes_when_shaken(at) or cancels(at) else None


EXCUSES: tuple[Callable[[Sight], Sight | Verdict | None], ...] = (
    saturated,
    ill_conditioned,
    narrow_reference,
    narrow_constant,
    kink,
    slope_by_differences,
    rounding,
)


def verdict(at: Sight) -> Verdict:
    """Walk EXCUSES in order: a Verdict ends the case, a Sight goes on in the place of the former, None changes nothing.

    A leaf whose z is then above Z_LIMIT has a wrong formula.
    """
    for excuse in EXCUSES:
        try:
            found = excuse(at)
        except RefusedError:  # a point that cannot be tried excuses nothing
            continue
        if isinstance(found, Verdict):
            return found
        at = found or at
    return Verdict("formula", at, hint_at(at)) if at.z > Z_LIMIT else Verdict("ok", at)


def hint_at(at: Sight) -> str:
    """The likely mistake, by the numbers of a probe."""
    subject, probe = at.evaluator.subject, at.probe
    args, _, dy = probe.of(np.float64)
    named = zip(leaf_names(subject), jax.tree.leaves(args), strict=True)
    arrays = {name: real_pairs(x) for (_, name), x in named if is_inexact(x)}
    dys = [d for d in jax.tree.leaves(dy) if not is_float0(d)]
    arrays |= {"dy": real_pairs(dys[0])} if len(dys) == 1 else {}
    others = {name: b for name, b in at.exact.automatic.items() if name != at.leaf.leaf}
    more = probe.with_args(args, jax.tree.map(lambda d: d if is_float0(d) else 3 * d, dy))
    try:
        found = at.evaluator.evaluate(more, at.scale.dtype).manual
        thrice = None if found[at.leaf.leaf].dtype.itemsize == 2 else at.seen(found)  # half precision rounds too much
    except Exception:  # a missing hint is better than a crash
        thrice = None
    return hint_of(Evidence(at.leaf.leaf, at.m, at.a, others, arrays, thrice, subject.path))
