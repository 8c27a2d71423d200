"""Small elements beside large ones in one leaf: each order of magnitude is judged by its own conditioning."""

from collections.abc import Callable, Iterator

import numpy as np

from fnbp.comparison.evaluation import Sides
from fnbp.comparison.leaf import Sight
from fnbp.comparison.numerics import U32, relative, rms
from fnbp.comparison.rounding import size_beside_zero

WIDTH = 20  # binary orders of magnitude in one band
Z_BAND = 2.0**14  # a band may hold a single element, whose noise may be small by chance; a wrong one is far above
FIRST_LOOK = 2.0**-36  # relative; an element that is nearer is right in any case


def bands_of(at: Sight, single: Callable[[], Sides]) -> Iterator[Sight]:
    """The bands of a leaf whose error is more than rounding explains, each to be judged as a leaf is.

    The norm of a leaf is that of its largest elements: it hides what is wrong with those that are smaller.
    """
    m, a = at.m, at.a
    apart = abs(m - a)
    if not np.any(apart > FIRST_LOOK * abs(a)):
        return
    orders = np.floor(np.log2(abs(a), out=np.full(a.shape, np.nan), where=a != 0) / WIDTH)
    beside_zero = (a == 0) & (m != 0)
    if np.any(beside_zero) and np.any(a):
        z = rms(m[beside_zero]) / (at.scale.roundoff * size_beside_zero(at.exact, at.probe))
        if z > Z_BAND:
            yield at._replace(where=beside_zero, m=np.where(beside_zero, m, 0), a=np.zeros_like(a), z=z, error=np.inf)
    for order in np.unique(orders[np.isfinite(orders)]):
        where = orders == order
        m_here, a_here = np.where(where, m, 0), np.where(where, a, 0)
        error = relative(m_here, a_here)
        if error <= Z_BAND * at.scale.roundoff:
            continue
        band = at._replace(where=where, m=m_here, a=a_here, error=error)
        n = max(relative(band.seen(single().automatic), a_here), U32)
        z = error / (at.scale.roundoff * n / U32)
        if z > Z_BAND:
            yield band._replace(z=z, conditioning=n)
