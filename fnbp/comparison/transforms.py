"""Does the manual backward give the same under jit, under vmap, and spread over devices?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fnbp.comparison.evaluation import Runner
from fnbp.comparison.numerics import compiled, first_line, is_float0, is_floating, on_device
from fnbp.comparison.probes import Probe
from fnbp.comparison.subject import Unit, flatten


class Moving(NamedTuple):
    """A point as arrays, and the two backwards as functions of them: cotangents by leaf."""

    arrays: list[Any]
    manual: Callable
    automatic: Callable


def moving(unit: Unit, probe: Probe) -> Moving:
    """A probe in the working dtype."""
    flat, tree = jax.tree.flatten(on_device((probe.args, probe.fixed, probe.dy)))
    where = [i for i, a in enumerate(flat) if not is_float0(a)]

    def of(side):
        def run(*arrays):
            leaves = list(flat)
            for i, a in zip(where, arrays, strict=True):
                leaves[i] = a
            args, fixed, dy = jax.tree.unflatten(tree, leaves)
            return flatten(unit, args, side(args, fixed, dy))[0]

        return run

    return Moving([flat[i] for i in where], of(unit.manual), of(unit.automatic))


def held(name: str, point: Moving, through: Callable, leaves: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The manual backward through a transform, held against plain; a word on how it went."""
    try:
        found = through(point.manual)(*point.arrays)
    except Exception as error:
        try:
            through(point.automatic)(*point.arrays)
        except Exception:
            return f"not possible: its forward raises {type(error).__name__} there"
        for leaf in leaves.values():
            hint = f"under {name} the backward raises {type(error).__name__}: {first_line(error)}"
            leaf.found.append(leaf.row(name, hint=hint))
        return "WRONG"
    word = "ok"
    for key, leaf in leaves.items():
        m, due = (np.asarray(side[key], np.float64) for side in (found, plain))
        if not np.isfinite(due).all() or apart(m, due) <= leaf.room:
            continue
        index = tuple(int(i) for i in np.unravel_index(np.argmax(abs(m - due)), due.shape)) if due.size else ()
        hint = f"under {name} it differs from the plain result by {apart(m, due):.1e}"
        leaf.found.append(leaf.row(name, index=index, manual=float(m[index]), automatic=float(due[index]), hint=hint))
        word = "WRONG"
    return word


def apart(a: Any, b: Any) -> float:
    """|a - b| / |b|, or |a - b| beside an exact 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.linalg.norm(b)
    error = np.linalg.norm(a - b) / (size or 1.0)
    return float(error) if np.isfinite(error) else np.inf


def under_jit(runner: Runner, points: list[Probe], leaves: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The compiled backward against the same, step by step."""
    point = moving(runner.unit, points[0])
    if runner.eager:
        return held("jit", point, jax.jit, leaves, plain)
    return held("jit", point, lambda run: lambda *arrays: runner.at(points[0]).manual, leaves, plain)


def under_vmap(runner: Runner, points: list[Probe], leaves: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """vmap over everything: this point, beside another one."""
    point = moving(runner.unit, points[0])
    alike = [p for p in points[1:] if shapes(p) == shapes(points[0])]
    beside = moving(runner.unit, (alike or points)[0]).arrays

    def through(run):
        def both(*arrays):
            stacked = [stack(b, a) for a, b in zip(arrays, beside, strict=True)]
            return {key: d[1] for key, d in fast(jax.vmap(run), runner)(*stacked).items()}

        return both

    return held("vmap", point, through, leaves, plain)


def stack(b: Any, a: Any) -> Any:
    """Two arrays, or two random keys, on a new axis."""
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return jnp.stack([b, a])
    return jnp.asarray(np.stack([np.asarray(b), np.asarray(a)]))


def fast(f: Callable, runner: Runner) -> Callable:
    """f compiled, where the unit can be."""
    return f if runner.eager else compiled(f)


def shapes(probe: Probe) -> list[Any]:
    """What must be alike for two points to be stacked."""
    return [(jnp.shape(a), getattr(a, "dtype", None)) for a in jax.tree.leaves(probe[1:])]


def sharded(runner: Runner, points: list[Probe], leaves: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The batch spread over all devices."""
    n, unit, probe = jax.device_count(), runner.unit, points[0]
    if n == 1:
        return "not tried: one device"
    if unit.take is None:
        return "not tried: no batch is known"
    rows = np.arange(2 * n)
    args, fixed = unit.take(probe.args, probe.fixed, lambda a: a[rows % len(a)])
    dy = jax.tree.map(lambda d: d[rows % len(d)] if np.ndim(d) else d, probe.dy)
    point = moving(unit, Probe("sharded", args, fixed, dy))
    mesh = jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,))

    def place(a):
        batched = is_floating(a) and a.ndim and a.shape[0] == 2 * n
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch") if batched else PartitionSpec()))

    def through(run):
        return lambda *arrays: jax.jit(run)(*map(place, arrays))

    return held("sharded", point, through, leaves, fast(point.manual, runner)(*point.arrays))


TRANSFORMS: dict[str, Callable[..., str]] = {"jit": under_jit, "vmap": under_vmap, "sharded": sharded}
