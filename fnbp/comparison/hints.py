"""The likely mistake behind a wrong gradient: hypotheses, the most specific first, each tried on the numbers."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fnbp.comparison.subject import Mismatch

FITS = 1e-2  # of the error: what may be left after a hypothesis that explains it


class Evidence(NamedTuple):
    """What is known of one wrong leaf, in float64.

    manual, automatic   the two gradients of the leaf
    others              automatic gradients of the other leaves of the same subject
    arrays              the arguments and the cotangent, by name
    thrice              the manual gradient for three times the cotangent, or None
    name                the name of the layer, "dropout(0.3)": a number in it may be the factor
    """

    leaf: str
    manual: np.ndarray
    automatic: np.ndarray
    others: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]
    thrice: np.ndarray | None
    name: str

    @property
    def tolerance(self) -> float:
        """How near counts as equal: well below the error itself, and at most 1e-6."""
        return min(
            1e-6, FITS * float(np.linalg.norm(self.manual - self.automatic) / (np.linalg.norm(self.automatic) or 1))
        )


def hint_of(e: Evidence) -> str:
    """The first hypothesis that fits, in words; "" if none does."""
    if not np.isfinite(e.manual).all():
        return f"{int((~np.isfinite(e.manual)).sum())} of {e.manual.size} elements are not finite"
    for hypothesis in HYPOTHESES:
        for found in hypothesis(e):
            return found
    return ""


def hint_of_mismatch(wrong: Mismatch) -> str:
    """The hint for a cotangent whose tree, shape or dtype is wrong."""
    guess = "; the shape is that of the transpose" if wrong.transposed else ""
    return f"got {wrong.got}, expected {wrong.expected}{guess}"


def same(e: Evidence, a: np.ndarray, b: np.ndarray, tolerance: float | None = None) -> bool:
    """True if a equals b up to tolerance, relative to the size of b, and b is not 0."""
    near = (
        bool(np.linalg.norm(a - b) <= (tolerance or e.tolerance) * np.linalg.norm(b)) if a.shape == b.shape else False
    )
    return near and bool(np.any(b))


def dropped(e: Evidence) -> Iterator[str]:
    """m = 0."""
    if not np.any(e.manual):
        yield "it is all zero: the gradient is dropped"


def sign(e: Evidence) -> Iterator[str]:
    """m = -a."""
    if same(e, e.manual, -e.automatic):
        yield "the sign is flipped"


def clipped(e: Evidence) -> Iterator[str]:
    """m = clip(a, -c, c)."""
    c = abs(e.manual).max(initial=0.0)
    if c and e.manual.size > 1 and same(e, e.manual, np.clip(e.automatic, -c, c)) and abs(e.automatic).max() > c:
        yield f"it is clipped at {c:.6g}"


def linear(e: Evidence) -> Iterator[str]:
    """A backward is linear in the cotangent: three times the cotangent gives three times the gradient."""
    if e.thrice is None or not np.any(e.manual):
        return
    if same(e, e.thrice, e.manual):
        yield "it does not depend on the cotangent: dy is left out"
    elif same(e, e.thrice, 9 * e.manual):
        yield "it is quadratic in the cotangent: dy is taken twice"
    elif same(e, e.thrice, e.manual / 3):
        yield "it is divided by the cotangent"


def affine(e: Evidence) -> Iterator[str]:
    """The same test as linear, when nothing else fits."""
    if e.thrice is not None and not same(e, e.thrice, 3 * e.manual):
        yield "it is not linear in the cotangent"


def constant(e: Evidence) -> Iterator[str]:
    """m = c a."""
    if not np.any(e.automatic):
        return
    c = np.vdot(e.automatic, e.manual) / np.vdot(e.automatic, e.automatic)
    if c and same(e, e.manual, c * e.automatic):
        meaning = meaning_of(c, e)
        if e.automatic.size == 1 and not meaning:  # one number is always some multiple of another
            return
        shown = f"{c:.6g}" if abs(c - 1) > 1e-4 else f"1 {'-+'[int(c > 1)]} {abs(c - 1):.1e}"
        yield f"it is {shown} times the right value{': ' + meaning if meaning else ''}"


def meaning_of(c: float, e: Evidence) -> str:
    """What a constant may stand for: a size, its root, or a number in the name of the layer; "" for none of them."""

    def near(value: float) -> bool:
        return abs(c - value) <= 1e-5 * abs(value)

    for value, text in ((2, "a factor 2 too many"), (0.5, "a factor 2 is missing")):
        if near(value):
            return text
    for size, owner in sizes_of(e):
        for value, text in (
            (1 / size, f"divided by {size}, {owner}: a mean instead of a sum"),
            (size, f"times {size}, {owner}: a sum instead of a mean"),
            (size**-0.5, f"divided by the root of {size}, {owner}"),
            (size**0.5, f"times the root of {size}, {owner}"),
            ((size - 1) / size, f"{size - 1} instead of {size}, {owner}"),
            (size / (size - 1) if size > 1 else 0, f"{size} instead of {size - 1}, {owner}"),
        ):
            if size > 1 and near(value):
                return text
    for text in re.findall(r"\d*\.\d+", e.name):
        p = float(text)
        for value, words in ((p, f"{p:g}"), (1 - p, f"1 - {p:g}"), (1 / (1 - p) if p != 1 else 0, f"1 / (1 - {p:g})")):
            if near(value):
                return f"{words}, of {e.name}"
    return ""


def sizes_of(e: Evidence) -> list[tuple[int, str]]:
    """The sizes that a sum or a mean may run over, the batch first, each with what it is the size of."""
    found: dict[int, str] = {}
    flowing = [(name, a) for name, a in e.arrays.items() if a.ndim > 1] or list(e.arrays.items())
    for name, a in flowing:
        for axis, n in enumerate(a.shape):
            found.setdefault(n, "the batch size" if axis == 0 and name in ("x", "dy") else f"axis {axis} of {name}")
        for n, text in (
            (a.size, f"the size of {name}"),
            (a[0].size if a.ndim and len(a) else 0, f"an example's size of {name}"),
        ):
            found.setdefault(n, text)
        if a.ndim > 2:
            found.setdefault(int(np.prod(a.shape[:-1])), f"the positions of {name}")
    return [(n, text) for n, text in found.items() if n > 1]


def transposed(e: Evidence) -> Iterator[str]:
    """m = a^T."""
    if e.manual.ndim >= 2 and same(e, e.manual, e.automatic.T):
        yield "it is transposed"
    elif e.manual.ndim > 2 and same(e, e.manual, np.swapaxes(e.automatic, -1, -2)):
        yield "its last two axes are swapped"


def flipped(e: Evidence) -> Iterator[str]:
    """m is a, reversed along an axis: a kernel that was not flipped."""
    for axis in range(e.manual.ndim):
        if e.manual.shape[axis] > 1 and same(e, e.manual, np.flip(e.automatic, axis)):
            yield f"it is flipped along axis {axis}"
    if e.manual.ndim > 1 and same(e, e.manual, np.flip(e.automatic)):
        yield "it is flipped along every axis"


def shifted(e: Evidence) -> Iterator[str]:
    """m is a, off by one along an axis: all except the border agree after a shift."""
    for axis in range(e.manual.ndim):
        n = e.manual.shape[axis]
        if n < 3:
            continue
        early, late = (np.arange(n - 1), np.arange(1, n))
        for here, there in ((early, late), (late, early)):
            if same(e, np.take(e.manual, here, axis), np.take(e.automatic, there, axis)):
                yield f"it is off by one along axis {axis}"


def swapped(e: Evidence) -> Iterator[str]:
    """m is the gradient of another leaf."""
    for name, other in e.others.items():
        if same(e, e.manual, other):
            yield f"it is the gradient of {name}"


def rounded(e: Evidence) -> Iterator[str]:
    """The error is as small as the rounding of a narrower dtype.

    And either every number is one of that dtype, or the error is not linear in the cotangent, as that of a wrong
    formula is.
    """
    if not np.any(e.automatic):
        return
    difference = e.manual - e.automatic
    size = np.linalg.norm(difference) / np.linalg.norm(e.automatic)
    restless = e.thrice is not None and np.linalg.norm(e.thrice / 3 - e.manual) > 0.1 * np.linalg.norm(difference)
    for name, rounding in (("bfloat16", 2.0**-9), ("float16", 2.0**-12), ("float32", 2.0**-25)):
        if (all_exact(e.manual, name) and size < 8 * rounding) or (restless and rounding / 8 < size < 4 * rounding):
            yield f"its error is {size:.0e}, the rounding of {name}: is something cast to {name}?"


def all_exact(a: np.ndarray, dtype: str) -> bool:
    """True if every number of a is one of that dtype."""
    if a.size < 2:
        return False
    narrow = np.asarray(a, np.float64)
    kept = {"bfloat16": 7, "float16": 10, "float32": 23}[dtype]
    fraction, _ = np.frexp(narrow[narrow != 0])
    return bool(np.all(fraction * 2.0 ** (kept + 1) == np.round(fraction * 2.0 ** (kept + 1))))


def passed_on(e: Evidence) -> Iterator[str]:
    """m = dy."""
    dy = e.arrays.get("dy")
    if dy is not None and same(e, e.manual, dy):
        yield "it is dy as it came: the derivative is left out"


def path_around(e: Evidence) -> Iterator[str]:
    """m = a - dy, or a + dy."""
    dy = e.arrays.get("dy")
    if dy is None or dy.shape != e.manual.shape:
        return
    if same(e, e.automatic - e.manual, dy):
        yield "dy is missing from it: the path around the layer is dropped"
    elif same(e, e.manual - e.automatic, dy):
        yield "dy is in it once too often"


def extra(e: Evidence) -> Iterator[str]:
    """m = a + c times an argument."""
    difference = e.manual - e.automatic
    for name, arg in e.arrays.items():
        if arg.shape != difference.shape or not np.any(arg):
            continue
        c = np.vdot(arg, difference) / np.vdot(arg, arg)
        if same(e, difference, c * arg, tolerance=1e-5):
            yield f"{c:.6g} times {name} is {'missing from' if name == 'dy' and c < 0 else 'added to'} it"


def in_part(e: Evidence) -> Iterator[str]:
    """m is a, except at some places along an axis."""
    scale = np.linalg.norm(e.automatic) / np.sqrt(e.automatic.size)
    off = abs(e.manual - e.automatic) > 1e-9 * (abs(e.automatic) + 1e-3 * scale)
    if off.all() or not off.any():
        return
    for axis in range(off.ndim):
        others = tuple(i for i in range(off.ndim) if i != axis)
        wrong = off.any(others)
        if 2 * wrong.sum() > len(wrong):
            continue
        places = np.flatnonzero(wrong)
        zero = not np.any(np.take(e.manual, places, axis))
        shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
        yield f"it is wrong at {shown} of axis {axis} only{', where it is zero' if zero else ''}"
    if off.sum() == 1:
        yield f"one element of {off.size} is wrong"
    elif 4 * off.sum() <= off.size:
        yield f"{off.sum()} of {off.size} elements are wrong"
    elif not np.any(e.manual[off]):
        yield f"{off.sum()} of {off.size} elements are zero where they should not be"


def missing_mean(e: Evidence) -> Iterator[str]:
    """m - a is constant along an axis, as a mean is, or a multiple of x in each row or column."""
    difference = e.manual - e.automatic
    for axis in range(difference.ndim - 1, -1, -1):
        mean = difference.mean(axis, keepdims=True)
        if difference.shape[axis] > 2 and same(e, np.broadcast_to(mean, difference.shape), difference):
            yield f"the difference is constant along axis {axis}: a mean over it is missing, or one too many"
    x = e.arrays.get("x")
    if x is None or x.shape != difference.shape or x.ndim < 1 or x.shape[-1] < 4:
        return
    for axes, words in (((-1,), "in each row"), (tuple(range(x.ndim - 1)), "in each column")):
        if axes and np.prod([x.shape[i] for i in axes]) >= 4:
            centred, spread = x - x.mean(axes, keepdims=True), difference - difference.mean(axes, keepdims=True)
            for base in (centred, x):
                d = spread if base is centred else difference
                c = (d * base).sum(axes, keepdims=True) / ((base**2).sum(axes, keepdims=True) + 1e-300)
                if same(e, c * base, d):
                    yield f"the difference is a multiple of x {words}: a term with the mean of dy x is missing or wrong"
                    return


def broadcast(e: Evidence) -> Iterator[str]:
    """m is the sum or the mean of a along an axis, repeated."""
    for axis in range(e.manual.ndim):
        if e.manual.shape[axis] > 1 and same(
            e, np.broadcast_to(e.manual.mean(axis, keepdims=True), e.manual.shape), e.manual
        ):
            if same(e, e.manual.take(0, axis), e.automatic.sum(axis)):
                yield f"it is the sum over axis {axis}, repeated along it"
            elif same(e, e.manual.take(0, axis), e.automatic.mean(axis)):
                yield f"it is the mean over axis {axis}, repeated along it"


def signs(e: Evidence) -> Iterator[str]:
    """|m| = |a|."""
    if same(e, abs(e.manual), abs(e.automatic)):
        share = (np.sign(e.manual) != np.sign(e.automatic)).mean()
        yield f"the sign is flipped in {share:.0%} of its elements"


def factor_of_dy(e: Evidence) -> Iterator[str]:
    """m = a x, or m x = a, elementwise."""
    x, dy = e.arrays.get("x"), e.arrays.get("dy")
    if x is None or dy is None or not x.shape == dy.shape == e.manual.shape:
        return
    if same(e, e.manual, e.automatic * x):
        yield "it is multiplied by x once too often"
    elif same(e, e.manual * x, e.automatic):
        yield "a factor x is left out"


HYPOTHESES: tuple[Callable[[Evidence], Iterator[Any]], ...] = (
    dropped,
    sign,
    clipped,
    linear,
    constant,
    transposed,
    flipped,
    swapped,
    passed_on,
    path_around,
    rounded,
    extra,
    signs,
    broadcast,
    shifted,
    in_part,
    missing_mean,
    factor_of_dy,
    affine,
)
