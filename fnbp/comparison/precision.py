"""Is a right backward also accurate, in the dtype in which it runs? Its error there beside autodiff's."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fnbp.comparison.leaf import Leaf, Sight, worst_spot
from fnbp.comparison.numerics import roundoff
from fnbp.comparison.ordinary import allowed_by_inputs, allowed_by_sums
from fnbp.comparison.probe import SAME_DIGITS
from fnbp.comparison.report import Row

RHO_FACTOR, RHO_TAIL = 4.0, 1e-7  # how much less accurate than autodiff is fair, and how rare an accident
AT_ONE_EXTREME = 1e3  # the ratio at a single extreme probe: three digits lost that autodiff keeps


class Accuracy(NamedTuple):
    """What one probe shows of a leaf in the working dtype.

    row      a fault, or None
    pooled   the squared errors of manual and automatic, and where they were made, to be pooled over draws; or None
    """

    row: Row | None = None
    pooled: tuple[float, float, Sight] | None = None


def accuracy_at(at: Sight) -> Accuracy:
    """Compare the errors of manual and automatic, both in the working dtype, against automatic in float64."""
    mw, aw = np.asarray(at.values.mw, np.float64), np.asarray(at.values.aw, np.float64)
    largest = float(jnp.finfo(at.values.mw.dtype).max)  # beyond it, infinite is right
    lost = ~np.isfinite(mw) & np.isfinite(aw) & (abs(at.values.a64) <= largest)
    probe = at.probe.name
    if lost.any():
        where = f"in {at.leaf.dtype}, where float64 and autodiff are finite"
        hint = f"{lost.sum()} of {mw.size} elements are not finite {where}"
        return Accuracy(at.leaf.row("nonfinite", probe=probe, hint=hint, **worst_spot(mw, aw)))
    size = np.linalg.norm(at.a)
    if not size or at.leaf.dtype in ("float64", "complex128") or not np.isfinite(mw).all() or not np.isfinite(aw).all():
        return Accuracy()
    manual, automatic = (float(np.linalg.norm(side - at.a) / size) for side in (mw, aw))
    automatic = float(np.hypot(automatic, roundoff(at.values.mw.dtype)))
    if automatic < 0.1 and probe in SAME_DIGITS:
        return Accuracy(pooled=(manual**2, automatic**2, at))
    if probe == "denormal" and at.leaf.dtype != "float16":
        return Accuracy()  # XLA takes such numbers for 0: what is right there is right at another point
    if automatic < 0.1 and manual > AT_ONE_EXTREME * automatic:
        automatic = max(automatic, allowed_by_inputs(at), allowed_by_sums(at))
    if automatic < 0.1 and manual > AT_ONE_EXTREME * automatic:
        rho = manual / automatic
        hint = hint_of_precision(at.leaf, rho)
        return Accuracy(at.leaf.row("precision", probe=probe, hint=hint, rho=rho, **worst_spot(mw, aw)))
    return Accuracy()


def accuracy_over_draws(leaf: Leaf) -> list[Row]:
    """A row with rho, the ratio of both errors over all draws: a fault if it is too large to be chance."""
    if not leaf.pooled:
        return []
    manual, automatic = (np.array([draw[side] for draw in leaf.pooled]) for side in (0, 1))
    rho = ratio(manual, automatic)
    if is_too_large(rho, leaf):  # autodiff may be right by chance: is manual as right as its inputs allow?
        rho = ratio(manual, np.maximum(automatic, [allowed_by_inputs(at) ** 2 for _, _, at in leaf.pooled]))
    if is_too_large(rho, leaf):
        return [leaf.row("precision", probe="all draws", hint=hint_of_precision(leaf, rho), rho=rho)]
    return [leaf.row("ok", rho=rho)]


def is_too_large(rho: float, leaf: Leaf) -> bool:
    """True if so large a rho of the draws of a leaf is no chance."""
    return rho > RHO_FACTOR and rho > rho_limit(len(leaf.pooled))


def ratio(manual: np.ndarray, automatic: np.ndarray) -> float:
    """rho, of squared errors over draws."""
    return float(np.sqrt(np.sum(manual) / np.sum(automatic)))


def rho_limit(draws: int) -> float:
    """The largest rho of two fair roundings: RHO_FACTOR for style, times a quantile of the ratio of two such errors.

    Each error is taken for a sum of three independent ones a draw, so the ratio of the squares follows F.
    """
    from scipy import stats  # here, since to import it takes as long as to import jax

    return RHO_FACTOR * float(np.sqrt(stats.f.isf(RHO_TAIL, 3 * draws, 3 * draws)))


def hint_of_precision(leaf: Leaf, rho: float) -> str:
    """What the lost accuracy may come from."""
    return f"in {leaf.dtype} its error is {rho:.0f} times autodiff's: does something cancel, or is it cast down?"
