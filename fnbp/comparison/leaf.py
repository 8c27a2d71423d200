"""What is known of one leaf: over all probes (Leaf), and at one of them (Sight)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fnbp.comparison.evaluation import Evaluator, Sides
from fnbp.comparison.numerics import U32, U64, index_of_largest
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row


@dataclass
class Leaf:
    """One leaf of a subject, and what the probes told of it so far.

    error    at the given point, in float64
    limit    the error that rounding may make there
    z        the largest of all probes
    pooled   squared errors of manual and automatic in the working dtype, each with the Sight of its draw
    leeway   how far a transform may move the manual gradient: it may sum in another order
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    dtype: str
    error: float = 0.0
    limit: float = 0.0
    z: float = 0.0
    pooled: list[tuple[float, float, Any]] = field(default_factory=list)
    leeway: float = 0.0

    def row(self, kind: str, **more: Any) -> Row:
        """A row of that kind, with the error and the z that are known so far."""
        return Row(self.path, self.leaf, self.shape, self.dtype, kind=kind, error=self.error, z=self.z, **more)


class Scale(NamedTuple):
    """The finest arithmetic that a subject has: float64, or float32 if it has no float64.

    working    the dtype of its arguments, or None if they have several
    roundoff   of dtype
    """

    working: Any
    dtype: Any = np.float64
    roundoff: float = U64

    @property
    def wide(self) -> bool:
        """True for float64."""
        return self.dtype == np.float64

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """What each probe is evaluated in: as given (None), the finest, and float32 for the noise."""
        return (None, self.dtype, *(() if self.working == np.float32 else (np.float32,)))

    def narrowed(self) -> "Scale":
        """The same subject, compared in float32."""
        return self._replace(dtype=np.float32, roundoff=U32)


class Values(NamedTuple):
    """The four gradients of a leaf: manual and automatic, in the finest arithmetic and in the working dtype."""

    m64: np.ndarray
    a64: np.ndarray
    mw: np.ndarray
    aw: np.ndarray

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """m64 and a64 as float64, with 0 in both where a64 is not finite.

        Of a manual gradient that was cast to half precision, a64 is taken to be what it was cast from, if it can be.
        """
        known = np.isfinite(self.a64)
        m, a = np.asarray(self.m64, np.float64), np.asarray(self.a64, np.float64)
        if self.m64.dtype.itemsize == 2:
            half = jnp.finfo(self.m64.dtype)
            a = np.where(abs(m - a) <= 0.51 * (float(half.eps) * abs(a) + float(half.smallest_subnormal)), m, a)
        return np.where(known, m, 0), np.where(known, a, 0)


class Sight(NamedTuple):
    """One leaf at one probe.

    m, a           manual and automatic in the finest arithmetic, 0 where a is not finite
    conditioning   n = |a32 - a64| / |a64|: what the roundings of float32 do to this gradient
    error          |m - a| / |a|
    z              the error over what rounding explains
    exact          both sides of every leaf, in the finest arithmetic
    where          the elements that are judged, of one order of magnitude; None for all
    """

    evaluator: Evaluator
    probe: Probe
    leaf: Leaf
    values: Values
    m: np.ndarray
    a: np.ndarray
    conditioning: float
    error: float
    z: float
    exact: Sides
    scale: Scale
    rng: np.random.Generator
    where: np.ndarray | None = None

    def seen(self, gradients: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of the gradients of all leaves, those of this leaf, with 0 outside of where."""
        found = np.asarray(gradients[self.leaf.leaf], np.float64)
        return found if self.where is None else np.where(self.where, found, 0)


def worst_spot(m: np.ndarray, a: np.ndarray) -> dict[str, Any]:
    """Where two arrays differ most, and both values there, as fields of a Row."""
    if not m.size:
        return {}
    difference = np.where(np.isfinite(m) == np.isfinite(a), np.nan_to_num(abs(m - a), nan=0.0, posinf=0.0), np.inf)
    index = index_of_largest(difference)
    return {"index": index, "manual": float(m[index]), "automatic": float(a[index])}
