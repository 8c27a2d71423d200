"""One leaf at one point: four gradients, judged by the rounding noise of the leaf itself."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from fnbp.comparison.differences import only_kinks
from fnbp.comparison.evaluation import FailedError, Point, Runner
from fnbp.comparison.hints import Evidence, hint_of
from fnbp.comparison.numerics import U32, U64, first_line, is_float0, is_floating, relative, rms, roundoff
from fnbp.comparison.probes import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.subject import Unit, leaf_names

Z = 64.0  # of thousands of right leaves the worst reached 30, most stay near 1
DRAWN = ("given", "another", "nearby")
POOLED = ("given", "another")  # where float64 starts from the same digits as the working dtype
ROOM = 100.0  # times a leaf's noise in the working dtype: jit, vmap and devices sum in other orders
RHO_FACTOR, RHO_TAIL = 4.0, 1e-7  # how much less accurate than autodiff is fair, and how rare an accident
SHAKES = 4
SLACK = 256.0  # a rounding error in float32 over the same in float64 may be off 2^29 by so much
LONE = 1e3  # at a probe of extremes, alone: three digits lost that autodiff keeps


@dataclass
class Leaf:
    """What the probes said of one leaf so far."""

    path: str
    leaf: str
    shape: tuple[int, ...]
    dtype: str
    found: list[Row] = field(default_factory=list)
    error: float = 0.0
    limit: float = 0.0
    z: float = 0.0
    pooled: list[tuple[float, float]] = field(default_factory=list)  # squared errors in the working dtype: manual, auto
    room: float = 0.0  # how far a transform may move it: it may sum in another order

    def row(self, kind: str, **more: Any) -> Row:
        return Row(self.path, self.leaf, self.shape, self.dtype, kind=kind, error=self.error, z=self.z, **more)


class Scale:
    """How much rounding a leaf may show: float64, or float32 where the subject has no float64."""

    def __init__(self, runner: Runner, given: Probe, notes: list[str]):
        flowing = [a.dtype for a in jax.tree.leaves(runner.unit.args) if is_floating(a)]
        self.working = flowing[0] if len(set(flowing)) == 1 else None  # None: of several dtypes
        self.dtype, self.unit = np.float64, U64
        try:
            runner.at(given, np.float64)
        except FailedError:
            pass
        except Exception as error:
            self.narrow(notes, runner.unit, f"in float64 it raises {type(error).__name__}: {first_line(error)}")

    def narrow(self, notes: list[str], unit: Unit, why: str) -> None:
        """From here on float32 is the best there is."""
        self.dtype, self.unit = np.float32, U32
        notes.append(f"{unit.path}: judged in float32, where small mistakes hide: {why}")


def noise(narrow: np.ndarray, wide: np.ndarray) -> float:
    """The conditioning of a leaf, as float32 shows it: |a32 - a64| / |a64|, at least one rounding."""
    return max(relative(narrow, wide), U32)


def zero_noise(sides: Point, probe: Probe) -> float:
    """The rounding that stands beside an exact 0: of sums over dy, in float64, in units of the other leaves."""
    dys = [np.asarray(d, np.float64) for d in jax.tree.leaves(probe.dy) if not is_float0(d)]
    size = max([rms(a) for a in sides.automatic.values()] + [rms(d) for d in dys])
    return max(size * np.sqrt(max([d.size for d in dys], default=1)), np.finfo(np.float64).tiny)


class Values(NamedTuple):
    """The four gradients of a leaf: manual and automatic, in float64 and in the working dtype."""

    m64: np.ndarray
    a64: np.ndarray
    mw: np.ndarray
    aw: np.ndarray


class Sight(NamedTuple):
    """One leaf at one probe; noise is its conditioning there."""

    runner: Runner
    probe: Probe
    leaf: Leaf
    v: Values
    noise: float
    exact: Point
    scale: Scale
    rng: np.random.Generator
    notes: list[str]

    @property
    def lost(self) -> bool:
        """True where float32 keeps no digit, as of saturated units: then it cannot tell how much float64 keeps. Where
        its noise is far above the gradient, it can."""
        return 0.1 < self.noise < 10

    def row(self, kind: str, m: np.ndarray | None = None, a: np.ndarray | None = None, **more: Any) -> Row:
        spot = worst_spot(self.v.m64 if m is None else m, self.v.a64 if a is None else a)
        return self.leaf.row(kind, **({"probe": self.probe.name} | spot | more))


def perturbed(runner: Runner, probe: Probe) -> Point:
    """The point with arguments moved by a float32 rounding: the noise, where float64 cannot tell it."""
    rng = np.random.default_rng(0)

    def one(a):
        if not is_floating(a):
            return a
        return np.asarray(np.asarray(a, np.float64) * (1 + 2 * U32 * rng.uniform(-1, 1, a.shape)), a.dtype)

    return runner.evaluate(probe.moved_to(jax.tree.map(one, probe.args)), np.float32)


def verdicts(at: Sight) -> list[Row]:
    """What is wrong with a leaf at a probe; its error and z are kept on the way."""
    leaf, scale = at.leaf, at.scale
    m, a = np.asarray(at.v.m64, np.float64), np.asarray(at.v.a64, np.float64)
    known = np.isfinite(a)
    found = []
    if not known.all():
        hint = "autodiff is not finite here, the manual backward is" if np.isfinite(m).all() else "neither is finite"
        found.append(at.row("convention", hint=hint))
    if not np.isfinite(m[known]).all():
        return [at.row("nonfinite", hint=f"{(~np.isfinite(m)).sum()} of {m.size} are not finite")]
    m, a = np.where(known, m, 0), np.where(known, a, 0)
    error = relative(m, a)
    if at.probe.name == "given":
        leaf.error, leaf.limit = error, Z * scale.unit * at.noise / U32
        own = relative(at.v.mw, a)  # what is rounded so badly is rounded as badly another way
        leaf.room = max(ROOM * max(relative(at.v.aw, a), roundoff(at.v.mw.dtype)), 4 * own if np.isfinite(own) else 0)
    if at.lost and (at.probe.name not in DRAWN or error < 0.1):
        return found
    if np.any(a):
        z = error / (scale.unit * at.noise / U32)
    else:
        z = rms(m) / (scale.unit * zero_noise(at.exact, at.probe)) if np.any(m) else 0.0
    if z > Z and at.probe.name not in DRAWN and scale.dtype == np.float64 and np.any(a):
        z = error / (scale.unit * max(at.noise / U32, sensitivity(at, a)))
    if z > Z and scale.dtype == np.float64 and reference_is_narrow(at, a, error):
        scale.narrow(at.notes, at.runner.unit, "it computes in float32 whatever comes in")
        z = error / at.noise
    if z > Z and only_kinks(at.runner, at.probe, leaf.leaf, m, a, at.rng, scale.dtype):
        hint = "at a kink or a tie: the two take different slopes, both of them fair"
        return [*found, at.row("convention", hint=hint)]
    rounding = z > Z and scale.dtype == np.float64 and (shrinks(at, a, error) or is_rounding(at, m - a))
    if z > Z and not rounding:
        leaf.z = max(leaf.z, z)
        return [*found, at.row("formula", hint=hint_at(at, m, a))]
    if not rounding:
        leaf.z = max(leaf.z, z)
    return found + in_working_dtype(at, a)


def reference_is_narrow(at: Sight, a: np.ndarray, error: float) -> bool:
    """True where arguments moved by 1e-13 move the automatic gradient as float32 would: by steps, or not at all."""
    if at.probe.name not in POOLED or not np.any(a) or error > 2.0**-16:
        return False
    change = relative(at.runner.evaluate(shaken(at.probe, 1e-13), np.float64).automatic[at.leaf.leaf], a)
    return change == 0 or change > 1e4 * 1e-13 * at.noise / U32


def sensitivity(at: Sight, a: np.ndarray) -> float:
    """The rounding of the automatic gradient itself, in roundings of float64: how much more it moves than its arguments
    do, and how far it is from linear in dy, which but for rounding it is. In extremes float32 may happen to be exact
    where float64 is not, and says too little of it."""
    evaluate, leaf = at.runner.evaluate, at.leaf.leaf
    found = [relative(evaluate(shaken(at.probe, 2.0**-36), np.float64).automatic[leaf], a) * 2.0**36]
    args, _, dy = at.probe.of(np.float64)
    for c in (3.0, 0.7, 11.0):
        scaled = at.probe.moved_to(args, jax.tree.map(lambda d, c=c: d if is_float0(d) else c * d, dy))
        found.append(relative(evaluate(scaled, np.float64).automatic[leaf] / c, a) / U64)
    return max(found) if np.isfinite(found).all() else 0.0


def shrinks(at: Sight, a: np.ndarray, error: float) -> bool:
    """True where float32 is wrong by as much more as its eps is larger, and autodiff is not: the error is rounding,
    though it may be the same for all points nearby."""
    single = relative(at.runner.at(at.probe, np.float32).manual[at.leaf.leaf], a)
    return single > 16 * at.noise and 1 / SLACK < single / error / (U32 / U64) < SLACK


def is_rounding(at: Sight, difference: np.ndarray) -> bool:
    """True where the error becomes another, now and then as large, as arguments move by 2^-36. That of a wrong formula
    stays as it is; at a tie, which moving breaks, it goes."""
    size = np.linalg.norm(difference)
    for seed in range(SHAKES):
        point = at.runner.evaluate(shaken(at.probe, 2.0**-36, seed), np.float64)
        other = np.asarray(point.manual[at.leaf.leaf], np.float64) - point.automatic[at.leaf.leaf]
        if np.linalg.norm(other - difference) > 0.1 * size and np.linalg.norm(other) > 0.1 * size:
            return True
    return False


def shaken(probe: Probe, by: float, seed: int = 0) -> Probe:
    """The probe in float64 with args and dy moved by so much, relatively."""
    rng = np.random.default_rng(seed)

    def one(x):
        return np.asarray(x, np.float64) * (1 + by * rng.uniform(-1, 1, x.shape)) if is_floating(x) else x

    args, _, dy = probe.of(np.float64)
    return probe.moved_to(jax.tree.map(one, args), jax.tree.map(one, dy))


def in_working_dtype(at: Sight, a: np.ndarray) -> list[Row]:
    """Accuracy and finiteness where the subject will run."""
    mw, aw = np.asarray(at.v.mw, np.float64), np.asarray(at.v.aw, np.float64)
    lost = ~np.isfinite(mw) & np.isfinite(aw) & np.isfinite(at.v.a64)
    if lost.any():
        hint = f"{lost.sum()} of {mw.size} in {at.leaf.dtype}, where float64 and autodiff are finite"
        return [at.row("nonfinite", mw, aw, hint=hint)]
    size = np.linalg.norm(a)
    if not size or not np.isfinite(mw).all() or not np.isfinite(aw).all():
        return []
    off_m, off_a = (float(np.linalg.norm(side - a) / size) for side in (mw, aw))
    off_a = float(np.hypot(off_a, roundoff(at.v.mw.dtype)))
    if off_a < 0.1 and at.probe.name in POOLED:
        at.leaf.pooled.append((off_m**2, off_a**2))
    elif off_a < 0.1 and off_m > LONE * off_a:
        return [at.row("precision", mw, aw, hint=precision_hint(at.leaf, off_m / off_a), rho=off_m / off_a)]
    return []


def precision(leaf: Leaf) -> None:
    """Is the manual gradient as accurate as autodiff's, in the dtype where it runs? Draws are pooled."""
    if not leaf.pooled:
        return
    manual, automatic = np.sum(leaf.pooled, 0)
    rho = float(np.sqrt(manual / automatic))
    if rho > rho_limit(len(leaf.pooled)):
        leaf.found.append(leaf.row("precision", probe="all draws", hint=precision_hint(leaf, rho), rho=rho))
    else:
        leaf.found.append(leaf.row("ok", rho=rho))


def rho_limit(draws: int) -> float:
    """Two honest roundings, each a sum of few independent errors: the quantile of their ratio, and room for style."""
    return RHO_FACTOR * float(np.sqrt(stats.f.isf(RHO_TAIL, 3 * draws, 3 * draws)))


def precision_hint(leaf: Leaf, rho: float) -> str:
    """What lost accuracy may come from."""
    return f"in {leaf.dtype} its error is {rho:.0f} times autodiff's: does something cancel, or is it cast down?"


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index that a position in the flat array has."""
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def worst_spot(m: np.ndarray, a: np.ndarray) -> dict[str, Any]:
    """Where the two differ most, and both values there."""
    if not m.size:
        return {}
    apart = np.where(np.isfinite(m) == np.isfinite(a), np.nan_to_num(abs(m - a), nan=0.0, posinf=0.0), np.inf)
    index = index_of(int(np.argmax(apart)), m.shape)
    return {"index": index, "manual": float(m[index]), "automatic": float(a[index])}


def hint_at(at: Sight, m: np.ndarray, a: np.ndarray) -> str:
    """The likely mistake, by the numbers of a probe."""
    unit, probe = at.runner.unit, at.probe
    named = zip(leaf_names(unit), jax.tree.leaves(probe.of(np.float64)[0]), strict=True)
    arrays = {name: np.asarray(x, np.float64) for (_, name), x in named if is_floating(x)}
    dys = [d for d in jax.tree.leaves(probe.of(np.float64)[2]) if not is_float0(d)]
    arrays |= {"dy": np.asarray(dys[0], np.float64)} if len(dys) == 1 else {}
    others = {name: b for name, b in at.exact.automatic.items() if name != at.leaf.leaf}
    args, _, dy = probe.of(np.float64)
    more = probe.moved_to(args, jax.tree.map(lambda d: d if is_float0(d) else 3 * d, dy))
    try:
        thrice = np.asarray(at.runner.evaluate(more, at.scale.dtype).manual[at.leaf.leaf], np.float64)
    except Exception:  # no hint is worth a crash
        thrice = None
    return hint_of(Evidence(at.leaf.leaf, m, a, others, arrays, thrice, unit.path))
