"""What rounding may do to a gradient: the noise that errors are measured by, and the signs of rounding."""

import jax
import numpy as np

from fnbp.comparison.evaluation import Evaluator, Sides
from fnbp.comparison.leaf import Scale, Sight
from fnbp.comparison.numerics import U32, U64, is_float0, is_inexact, real_pairs, relative, rms, with_numbers
from fnbp.comparison.probe import SAME_DIGITS, Probe

Z_LIMIT = 64.0  # of thousands of right leaves the worst reached 44, most stay near 1
SHAKES = 4
FEW = 16.0  # roundings of the terms of a formula that cancels
LOST = (1e-3, 0.1)  # relative; an element that is as far off in float32 alone has been lost there, the larger the surer
SHAKE = 2.0**-36  # relative; far above the roundings of float64, far below any change of a formula
STEP = 1e-13  # relative; too small for float32 to see
SLACK = 256.0  # a rounding error in float32 over the same in float64 may differ from 2^29 by this factor


def noise(narrow: np.ndarray, wide: np.ndarray) -> float:
    """n = |a32 - a64| / |a64|, at least one rounding: the conditioning of a leaf, as float32 shows it."""
    return max(relative(narrow, wide), U32)


def roundings(narrow: np.ndarray, wide: np.ndarray) -> float:
    """The same noise counted in roundings, n / 2^-24; in float64 a leaf shows as many, of 2^-53."""
    return noise(narrow, wide) / U32


def z_of(m: np.ndarray, a: np.ndarray, conditioning: float, scale: Scale, exact: Sides, probe: Probe) -> float:
    """The error of m over what rounding explains.

        z = (|m - a| / |a|) / (u n / 2^-24)      u = 2^-53, or 2^-24 if the subject has no float64

    Beside an a that is exactly 0: the root mean square of m over the rounding of sums over dy.
    """
    if np.any(a):
        return relative(m, a) / (scale.roundoff * conditioning / U32)
    return rms(m) / (scale.roundoff * size_beside_zero(exact, probe)) if np.any(m) else 0.0


def size_beside_zero(exact: Sides, probe: Probe) -> float:
    """The size of the sums over dy whose rounding may appear beside an exact 0."""
    dys = dys_of(probe)
    size = max([rms(a) for a in exact.automatic.values()] + [rms(d) for d in dys])
    return max(size * np.sqrt(max([d.size for d in dys], default=1)), np.finfo(np.float64).tiny)


def one_rounding_away(evaluator: Evaluator, probe: Probe) -> Sides:
    """The float32 gradients of args and dy moved by one rounding: they show the noise if there is no float64."""
    args, _, dy = shaken(probe, 2 * U32).of(np.float64)
    return evaluator.evaluate(probe.with_args(args, dy), np.float32)


def shaken(probe: Probe, by: float, seed: int = 0) -> Probe:
    """The probe in float64 with every number of args and dy moved by at most that fraction of itself."""
    rng = np.random.default_rng(seed)

    def one(x):
        return with_numbers(lambda a: a * (1 + by * rng.uniform(-1, 1, a.shape)), x) if is_inexact(x) else x

    args, _, dy = probe.of(np.float64)
    return probe.with_args(jax.tree.map(one, args), jax.tree.map(one, dy))


def reference_is_narrow(at: Sight) -> bool:
    """True if the reference computes in float32: its code says so, or cannot be read, and arguments moved by 1e-13 move
    it by large steps, or not at all."""
    if at.probe.name not in SAME_DIGITS or not np.any(at.a) or at.error > 2.0**-16:
        return False
    if not at.evaluator.subject.is_narrow:
        return False
    change = relative(at.seen(at.evaluator.evaluate(shaken(at.probe, STEP), np.float64).automatic), at.a)
    return change == 0 or change > 1e4 * STEP * at.conditioning / U32


def sensitivity(at: Sight) -> float:
    """The rounding of the automatic gradient itself in float64, in roundings of 2^-53.

    It is the larger of two: how much more the gradient moves than its arguments do, and how far it is from linear in
    dy, which it would be without rounding. At an extreme probe float32 may happen to be exact where float64 is not;
    then the noise n says too little.
    """
    evaluate = at.evaluator.evaluate
    found = [relative(at.seen(evaluate(shaken(at.probe, SHAKE), np.float64).automatic), at.a) / SHAKE]
    args, _, dy = at.probe.of(np.float64)
    for c in (3.0, 0.7, 11.0):
        scaled = at.probe.with_args(args, jax.tree.map(lambda d, c=c: d if is_float0(d) else c * d, dy))
        found.append(relative(at.seen(evaluate(scaled, np.float64).automatic) / c, at.a) / U64)
    return max(found) if np.isfinite(found).all() else 0.0


def grows_with_eps(at: Sight) -> bool:
    """True if manual is wrong in float32 by as much more as float32's eps is larger, and automatic is not.

    Such an error is rounding, though it may be the same at all points nearby.
    """
    single = relative(at.seen(at.evaluator.at(at.probe, np.float32).manual), at.a)
    return single > 16 * at.conditioning and 1 / SLACK < single / at.error / (U32 / U64) < SLACK


def cancels(at: Sight) -> bool:
    """True if small elements are off by a few roundings of the large terms that leave them, as 1 - 1 / (1 + e^x) is.

    Such a formula shows itself between the roundings of both dtypes: elements of that size are right in float64, and
    most of them are lost in float32. The elements that are off are looked at here, and at smaller arguments, in steps
    so small that what falls as e^-x of a product does not step over them. A wrong formula has the same values in both.
    """
    if np.max(abs(at.m - at.a)) > FEW * U64 * size_of_terms(at.exact.automatic[at.leaf.leaf], at.probe):
        return False
    off = min(relative(at.m, at.a), 1.0) / 4
    lost = np.clip(off, *LOST)
    args, _, dy = at.probe.of(np.float64)
    for by in 2.0 ** -np.arange(0, 7.25, 0.25):
        probe = at.probe.with_args(jax.tree.map(lambda a, by=by: a * by if is_inexact(a) else a, args), dy)
        exact, single = (at.evaluator.evaluate(probe, dtype) for dtype in (np.float64, np.float32))
        a, m, m32 = (np.asarray(g[at.leaf.leaf], np.float64) for g in (exact.automatic, exact.manual, single.manual))
        size = size_of_terms(a, probe)
        between = (abs(a) > FEW * U64 * size) & (abs(a) < U32 * size / FEW) & (abs(m - a) < lost * abs(a))
        between &= abs(at.m - at.a) > off * abs(at.a)
        if between.any() and np.mean(abs(m32 - m)[between] > lost * abs(m)[between]) > 0.5:
            return True
    return False


def size_of_terms(a: np.ndarray, probe: Probe) -> float:
    """The size of what may have been subtracted: the largest of a leaf and of dy."""
    sizes = (abs(b[np.isfinite(b)]) for b in (np.asarray(a), *dys_of(probe)))
    return float(max(np.max(size, initial=0) for size in sizes))


def dys_of(probe: Probe) -> list[np.ndarray]:
    """The numbers of the cotangents of a probe."""
    return [real_pairs(d) for d in jax.tree.leaves(probe.dy) if not is_float0(d)]


def changes_when_shaken(at: Sight) -> bool:
    """True if the error becomes a different one, at least once as large, as arguments move by 2^-36.

    The error of a wrong formula stays as it is; at a tie, which moving breaks, it vanishes.
    """
    difference = at.m - at.a
    size = np.linalg.norm(difference)
    for seed in range(SHAKES):
        point = at.evaluator.evaluate(shaken(at.probe, SHAKE, seed), np.float64)
        other = at.seen(point.manual) - at.seen(point.automatic)
        if np.linalg.norm(other - difference) > 0.1 * size and np.linalg.norm(other) > 0.1 * size:
            return True
    return False
