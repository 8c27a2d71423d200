"""Does the manual backward give the same under jit, vmap, random programs, over devices, and by one argument alone?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fnbp.comparison.derivatives import fixed_in_turn, forwards, second_order
from fnbp.comparison.evaluation import EndlessError, Evaluator
from fnbp.comparison.leaf import Leaf
from fnbp.comparison.numerics import as_jax, compiled, first_line, index_of_largest, is_float0, is_inexact
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.subject import Subject, flatten

ROOM = 16.0  # times as far as autodiff moves under a transform
Leaves = Mapping[str, Leaf]
Gradients = Mapping[str, Any]
Outcome = tuple[list[Row], str]  # rows of the leaves that went wrong, and a word for the report


class Functions(NamedTuple):
    """A probe as arrays, and the two backwards as functions of them: cotangents by leaf."""

    arrays: list[Any]
    manual: Callable
    automatic: Callable


def functions_of(subject: Subject, probe: Probe) -> Functions:
    """Both backwards of a subject as functions of the arrays of a probe, in the working dtype."""
    flat, tree = jax.tree.flatten(as_jax((probe.args, probe.fixed, probe.dy)))
    where = [i for i, a in enumerate(flat) if not is_float0(a)]

    def of(side: Callable) -> Callable:
        def run(*arrays):
            leaves = list(flat)
            for i, a in zip(where, arrays, strict=True):
                leaves[i] = a
            args, fixed, dy = jax.tree.unflatten(tree, leaves)
            return flatten(subject, args, side(args, fixed, dy))[0]

        return run

    return Functions([flat[i] for i in where], of(subject.manual), of(subject.automatic))


def outcome(
    name: str,
    evaluator: Evaluator,
    functions: Functions,
    transform: Callable,
    leaves: Leaves,
    expected: Gradients,
    title: str = "",
) -> Outcome:
    """Compare the transformed manual backward with what it is expected to return.

    It may move as far as autodiff does under the same transform, or as another order of summation makes it.
    title is what the hint calls the transform, if not by its name.
    """
    title = title or name
    evaluator.count(manual=1)
    try:
        found = evaluator.in_time(lambda: transform(functions.manual)(*functions.arrays))
    except EndlessError as error:
        return [], f"not tried: {error}"
    except Exception as error:
        try:
            transform(functions.automatic)(*functions.arrays)
        except Exception:
            return [], f"not possible: its forward raises {type(error).__name__} there"
        hint = f"under {title} the backward raises {type(error).__name__}: {first_line(error)}"
        return [leaf.row(name, hint=hint) for leaf in leaves.values()], "WRONG"
    rows, room = [], None
    for key, leaf in leaves.items():
        if key not in found or key not in expected:
            continue  # a structure that is wrong is told elsewhere
        m, right = (np.asarray(side[key], np.float64) for side in (found, expected))
        error = change(m, right)
        if not np.isfinite(right).all() or error <= leaf.leeway:
            continue
        room = moved_alone(evaluator, functions, transform) if room is None else room
        if error <= ROOM * room.get(key, 0.0):
            continue
        index = index_of_largest(abs(m - right))
        hint = f"under {title} it differs from the plain result by {error:.1e}"
        values = {"manual": float(m[index]), "automatic": float(right[index])}
        rows.append(leaf.row(name, index=index, hint=hint, **values))
    return rows, "WRONG" if rows else "ok"


def moved_alone(evaluator: Evaluator, functions: Functions, transform: Callable) -> dict[str, float]:
    """How far the transform moves each automatic gradient: XLA simplifies what it compiles."""
    evaluator.count(automatic=2)
    try:
        plain = functions.automatic(*functions.arrays)
        there = transform(functions.automatic)(*functions.arrays)
        return {key: change(np.asarray(there[key], np.float64), np.asarray(plain[key], np.float64)) for key in plain}
    except Exception:
        return {}


def change(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|, or |a - b| beside an exact 0."""
    error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)
    return float(error) if np.isfinite(error) else np.inf


def under_jit(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Gradients) -> Outcome:
    """The compiled backward against the same, step by step."""
    functions = functions_of(evaluator.subject, probes[0])

    def known(run: Callable) -> Callable:
        both = evaluator.at(probes[0])
        return lambda *arrays: both.manual if run is functions.manual else both.automatic

    return outcome("jit", evaluator, functions, jax.jit if evaluator.eager else known, leaves, expected)


def under_vmap(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Gradients) -> Outcome:
    """vmap over everything: this probe, stacked with another one of the same shapes."""
    others = arrays_beside(evaluator.subject, probes)

    def transform(run: Callable) -> Callable:
        return compiled_if_possible(in_batch(run, others), evaluator)

    return outcome("vmap", evaluator, functions_of(evaluator.subject, probes[0]), transform, leaves, expected)


def arrays_beside(subject: Subject, probes: list[Probe]) -> list[Any]:
    """The arrays of another probe of the same shapes as the first; of the first itself, if there is none."""
    alike = [p for p in probes[1:] if shapes_of(p) == shapes_of(probes[0])]
    return functions_of(subject, (alike or probes)[0]).arrays


def compiled_if_possible(f: Callable, evaluator: Evaluator) -> Callable:
    """f, compiled if the subject can be."""
    return f if evaluator.eager else compiled(f)


def shapes_of(probe: Probe) -> list[Any]:
    """What must be alike for two probes to be stacked."""
    return [(jnp.shape(a), getattr(a, "dtype", None)) for a in jax.tree.leaves(probe[1:])]


def sharded(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Gradients) -> Outcome:
    """The batch, made large enough for it, spread over all devices; against the same on one device."""
    n, subject, probe = jax.device_count(), evaluator.subject, probes[0]
    if n == 1:
        return [], "not tried: one device"
    if subject.take is None:
        return [], "not tried: no batch is known"
    if not jax.tree.leaves(probe.dy)[0].size:
        return [], "not tried: there is no example"
    repeated = np.arange(2 * n)
    args, fixed = subject.take(probe.args, probe.fixed, lambda a: a[repeated % len(a)])
    dy = jax.tree.map(lambda d: d[repeated % len(d)] if np.ndim(d) else d, probe.dy)
    functions = functions_of(subject, Probe("sharded", args, fixed, dy))
    mesh = jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,))

    def place(a: Any) -> Any:
        batched = is_inexact(a) and a.ndim and a.shape[0] == 2 * n
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch") if batched else PartitionSpec()))

    def transform(run: Callable) -> Callable:
        return lambda *arrays: jax.jit(run)(*map(place, arrays))

    try:
        automatic = compiled_if_possible(functions.automatic, evaluator)(*functions.arrays)
    except Exception as error:
        return [], f"not possible: its forward raises {type(error).__name__} at {2 * n} examples"
    try:
        on_one_device = compiled_if_possible(functions.manual, evaluator)(*functions.arrays)
    except Exception as error:
        hint = f"at {2 * n} examples the backward raises {type(error).__name__}: {first_line(error)}"
        return [leaf.row("sharded", hint=hint) for leaf in leaves.values()], "WRONG"
    rows, word = outcome("sharded", evaluator, functions, transform, leaves, on_one_device)
    for key, leaf in leaves.items():
        off = change(np.asarray(on_one_device[key], np.float64), np.asarray(automatic[key], np.float64))
        if off > ROOM * max(leaf.leeway, 1e-3):
            rows.append(leaf.row("sharded", hint=f"at {2 * n} examples it is off by {off:.1e}"))
    return rows, "WRONG" if rows else word


def in_batch(run: Callable, others: list[Any]) -> Callable:
    """vmap of run over these arrays and others, of which the second are wanted."""
    return lambda *arrays: second(jax.vmap(run)(*map(beside, others, arrays)))


def in_scan(run: Callable, others: list[Any]) -> Callable:
    """A loop of two turns, first at others, then at these arrays."""
    return lambda *arrays: second(jax.lax.map(lambda one: run(*one), list(map(beside, others, arrays))))


def in_loop(run: Callable, others: list[Any]) -> Callable:
    """A loop that does not know its turns beforehand."""

    def looped(*arrays):
        nothing = jax.tree.map(lambda d: jnp.zeros(d.shape, d.dtype), jax.eval_shape(run, *arrays))
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, run(*arrays)), (0, nothing))[1]

    return looped


def in_branch(run: Callable, others: list[Any]) -> Callable:
    """One of two branches; the other returns zeros."""

    def branched(*arrays):
        nothing = lambda *arrays: jax.tree.map(jnp.zeros_like, run(*arrays))  # noqa: E731
        return jax.lax.cond(True, run, nothing, *arrays)

    return branched


def in_jit(run: Callable, others: list[Any]) -> Callable:
    """A program within a program."""
    return jax.jit(run)


def beside(b: Any, a: Any) -> Any:
    """Two arrays, or two random keys, on a new axis."""
    return jnp.stack([b, a])


def second(found: Mapping[str, Any]) -> dict[str, Any]:
    """The second of two cotangents, of every leaf."""
    return {name: d[1] for name, d in found.items()}


AROUND_A_BACKWARD = {"vmap": in_batch, "scan": in_scan, "while_loop": in_loop, "cond": in_branch, "jit": in_jit}
PROGRAMS, DEPTHS = 8, (2, 5)  # how many programs, and of how many parts: 2, 3 or 4


def programs(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Gradients) -> Outcome:
    """Random programs around the backward: vmap, scan, while_loop, cond and jit inside one another."""
    if evaluator.eager:
        return [], "not tried: it cannot be traced"
    rng, functions = np.random.default_rng(0), functions_of(evaluator.subject, probes[0])
    others = arrays_beside(evaluator.subject, probes)
    for _ in range(PROGRAMS):
        names = [str(name) for name in rng.choice(list(AROUND_A_BACKWARD), rng.integers(*DEPTHS))]

        def transform(run: Callable, names: list[str] = names) -> Callable:
            for name in reversed(names):
                run = AROUND_A_BACKWARD[name](run, others)
            return compiled(run)

        rows, word = outcome("programs", evaluator, functions, transform, leaves, expected, " of ".join(names))
        if rows or word != "ok":
            return rows, word
    return [], "ok"


Transform = Callable[[Evaluator, list[Probe], Leaves, Gradients], Outcome]
TRANSFORMS: dict[str, Transform] = {
    "jit": under_jit,
    "vmap": under_vmap,
    "sharded": sharded,
    "one_argument": fixed_in_turn,
    "forwards": forwards,
}
ON_REQUEST: dict[str, Transform] = {"programs": programs, "second_order": second_order}
