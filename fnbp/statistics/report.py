"""A trace in numbers: how large what each layer puts out and is told, what is dead or saturated, two passes apart."""

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from rich.text import Text

from fnbp.arrays.checks import check_is, describe
from fnbp.arrays.sums import wide
from fnbp.backpropagation import Trace
from fnbp.rendering.tables import Tabular

__all__ = ["LayerTable", "Seen", "layer_table"]

BOUNDS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "softmax": (0.0, 1.0)}  # by the name of the layer
INDEX = re.compile(r"\[(\d+)\]\.")  # of a part, within a path
TURNS = re.compile(r"(?:^|\.)repeat\((\d+)\)(?=\[)")  # of a loop over depth around a layer


class Seen(NamedTuple):
    """The numbers of one layer: arrays of shape (), within a repeat (turns,).

    output      root mean square over examples of |y_i|, the norm over all numbers of an example
    delta       the same of dJ/dy_i
    zero        share of the numbers of y that are exactly 0
    dead        share of the units, numbers along the last axis of y, that are 0 at every position of every example
    saturated   share of the numbers of y near a bound; None unless the layer is sigmoid, tanh or softmax
    delta_angle     degrees between the deltas of both traces; None without another trace
    gradient_angle  degrees between the gradients of the layer; None without another, or without parameters
    """

    output: jax.Array
    delta: jax.Array
    zero: jax.Array
    dead: jax.Array
    saturated: jax.Array | None = None
    delta_angle: jax.Array | None = None
    gradient_angle: jax.Array | None = None


HEADS = ("layer", "turn", *(name.replace("_", " ") for name in Seen._fields))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerTable(Tabular):
    """What layer_table returns: a pytree of arrays, which prints as a table.

    layers   path -> Seen of that layer, first to last
    """

    layers: OrderedDict[str, Seen]

    def __getitem__(self, path: str) -> Seen:
        return self.layers[path]

    def __rich__(self) -> Table:
        rows = list(rows_of(self.layers))
        heads = [head for head in HEADS if any(row.get(head) for row in rows)]
        table = Table(title=Text("root mean square norms per example; delta is dJ/dy"), title_justify="left")
        for head in heads:
            table.add_column(head, justify="left" if head == "layer" else "right", no_wrap=head == "layer")
        for row in rows:
            table.add_row(*(Text(row.get(head, "")) for head in heads))
        return table


def layer_table(trace: Trace, other: Trace | None = None, near: float = 0.01, by_step: bool = False) -> LayerTable:
    """Measure what each layer of a trace put out and was told, and how far another trace is from it.

        output = sqrt(mean_i |y_i|^2)      delta = sqrt(mean_i |dJ/dy_i|^2)
        dead = share of units that are 0 everywhere      angle = arccos(<d, d'> / (|d| |d'|)) in degrees

    J is the mean over m examples, so deltas hold 1/m: times m they are those of each example's own loss. Of each turn
    of a repeat the numbers are its own.

    The value is a pytree: return it from jit, stack it by scan, or hand it out behind J and the state of a gradient for
    fit, whose record then finds it in Step.more. print shows it as a table, of one step: of a stack that is
    jax.tree.map(lambda a: a[i], stack).

    zero and dead are counted in every layer, by its values alone; they tell of relu and what stands behind it. A unit
    of an image is a channel. Positions that a mask leaves out are 0, and count as such. saturated goes by the name of
    the layer. An angle is NaN if one of the two is 0 throughout.

    Shapes:  each number (), within a repeat (turns,); by_step: output and delta of layers with y (m, T, n) have one
             more axis, T.
    Options: other: a trace of the same net with other parameters, another backward or another loss, over equally many
             examples. near: how near to a bound is saturated, in units of y. by_step: norms of each step of time.
    Source:  Lillicrap et al. 2016, doi:10.1038/ncomms13276, for the angle between a delta and that of backpropagation.
    Raises:  TypeError if trace or other is not a Trace; ValueError if the two are of different nets or batches, near is
             not in (0, 0.5), or a trace is of several batches at once.
    """
    check_is("layer_table", "trace", trace, Trace)
    if not (isinstance(near, (int, float)) and 0 < near < 0.5):
        raise ValueError(f"layer_table: near must be above 0 and below 0.5, got {near!r}")
    check_is("layer_table", "by_step", by_step, bool)
    if other is not None:
        check_is("layer_table", "other", other, Trace)
        check_alike(trace, other)
    if jnp.ndim(trace.value):
        raise ValueError(
            f"layer_table: the trace has {describe(trace.value)} as its loss, expected one number: measure a trace "
            "under vmap within vmap"
        )
    m = jax.tree.leaves(trace.prediction)[0].shape[0]
    layers = ((path, seen_of(path, trace, other, m, near, by_step)) for path in trace.outputs)
    return LayerTable(OrderedDict(layers))


def check_alike(trace: Trace, other: Trace) -> None:
    """ValueError unless two traces have the same layers, with outputs of the same shapes."""
    if list(trace.outputs) != list(other.outputs):
        ours, theirs = ([path for path in a.outputs if path not in b.outputs] for a, b in pairs(trace, other))
        apart = f"{ours[:1] or 'nothing'} and {theirs[:1] or 'nothing'}" if ours or theirs else "their order"
        raise ValueError(f"layer_table: the traces are of different nets: they differ in {apart}")
    for path in trace.outputs:
        one, two = ([jnp.shape(a) for a in jax.tree.leaves(t.outputs[path])] for t in (trace, other))
        if one != two:
            raise ValueError(f"layer_table: {path} has outputs of shape {one} in one trace, {two} in the other")
    one, two = (jax.tree.map(jnp.shape, t.grads) for t in (trace, other))
    if one != two:
        raise ValueError("layer_table: the traces are of different nets: their gradients have different shapes")


def pairs(one: Any, two: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Both in either order."""
    return (one, two), (two, one)


def turns_of(path: str) -> tuple[int, ...]:
    """How many turns the loops over depth around a layer have, outermost first: the first axes of its arrays."""
    return tuple(map(int, TURNS.findall(path)))


def name_of(path: str) -> str:
    """The name of the layer at the end of a path."""
    return INDEX.split(path)[-1]


def seen_of(path: str, trace: Trace, other: Trace | None, m: int, near: float, by_step: bool) -> Seen:
    """The numbers of one layer."""
    turns = turns_of(path)
    k = len(turns)
    y, delta = (arrays(tree[path]) for tree in (trace.outputs, trace.deltas))
    for a in y:
        if a.shape[: k + 1] != (*turns, m):
            raise ValueError(
                f"layer_table: {path} put out {describe(a)}, expected {(*turns, m)} as the first axes, "
                f"{'turns and ' * bool(turns)}examples"
            )
    low, high = BOUNDS.get(name_of(path), (np.nan, np.nan))
    size = sum(a[(0,) * k].size for a in y)
    share = lambda holds: added([jnp.sum(holds(a), range(k, a.ndim)) for a in y]) / max(size, 1)  # noqa: E731
    near_bound = lambda a: (a - low <= near) | (high - a <= near)  # noqa: E731
    none = [jnp.all(a == 0, range(k, a.ndim - 1)) if a.ndim > k + 1 else jnp.all(a == 0, k)[..., None] for a in y]
    seen = Seen(
        output=norm(y, k, by_step) / np.sqrt(m),
        delta=norm(delta, k, by_step) / np.sqrt(m),
        zero=share(lambda a: a == 0),
        dead=added([jnp.sum(a, -1) for a in none]) / max(sum(a.shape[-1] for a in none), 1),
        saturated=share(near_bound) if name_of(path) in BOUNDS else None,
    )
    if other is None:
        return seen
    grads, others = (arrays(gradient_at(t.grads, path)) for t in (trace, other))
    return seen._replace(
        delta_angle=angle(delta, arrays(other.deltas[path]), k),
        gradient_angle=angle(grads, others, k) if grads else None,
    )


def added(each: list[jax.Array]) -> jax.Array:
    """Their sum; 0 of none."""
    return jnp.sum(jnp.stack(each), 0) if each else jnp.zeros(())


def arrays(tree: Any) -> list[jax.Array]:
    """The arrays of real numbers in a tree, in at least float32."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [wide(a) for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]


def gradient_at(grads: Any, path: str) -> Any:
    """The entry of a tree of params for the layer at a path; () if it has none."""
    for i in map(int, INDEX.findall(path)):
        if not isinstance(grads, tuple) or i >= len(grads):
            return ()
        grads = grads[i]
    return grads


def norm(parts: list[jax.Array], k: int, by_step: bool = False) -> jax.Array:
    """The norm of all numbers behind the first k axes; by_step, of arrays (m, T, n), of each step.

    They are divided by the largest before they are squared: a delta that vanishes through time is too small for that.
    """
    apart = k + 1 if by_step and all(a.ndim == k + 3 for a in parts) else None
    over = lambda a: tuple(axis for axis in range(k, a.ndim) if axis != apart)  # noqa: E731
    if not parts:
        return jnp.zeros(())
    top = largest([jnp.max(abs(a), over(a), initial=0) for a in parts])
    by = jnp.where(top > 0, top, 1)
    return by * jnp.sqrt(added([jnp.sum((a / jnp.expand_dims(by, over(a))) ** 2, over(a)) for a in parts]))


def largest(each: list[jax.Array]) -> jax.Array:
    """The largest of several, element by element."""
    return jnp.max(jnp.stack(each), 0)


def angle(one: list[jax.Array], two: list[jax.Array], k: int) -> jax.Array:
    """Degrees between all numbers of one and of two, behind the first k axes.

    2 arctan(|u - v| / |u + v|), u and v of length 1: near 0 the arccos of their product has half the digits
    """
    u, v = ([a / jnp.expand_dims(norm(parts, k), range(k, a.ndim)) for a in parts] for parts in (one, two))
    less, more = (norm([a + sign * b for a, b in zip(u, v, strict=True)], k) for sign in (-1, 1))
    return jnp.rad2deg(2 * jnp.arctan2(less, more))


def rows_of(layers: OrderedDict[str, Seen]) -> Iterator[dict[str, str]]:
    """The cells of each row by the heads of their columns: combinators, and their layers turn by turn."""
    nested = any(len(INDEX.findall(path)) > 1 for path in layers)
    around: list[str] = []
    for path, seen in layers.items():
        check_printed(path, seen)
        *now, last = re.split(r"\.?(?=\[\d+\]\.)", path) if nested else [path]
        new = next((i for i, step in enumerate(now) if around[i : i + 1] != [step]), len(now))
        yield from ({"layer": "  " * i + now[i]} for i in range(new, len(now)))
        around = now
        for turn in np.ndindex(turns_of(path)):
            cells = {head: cell(head, value, turn) for head, value in seen._asdict().items() if value is not None}
            if not np.any(seen.zero):
                cells["zero"] = cells["dead"] = ""
            yield {
                "layer": "" if any(turn) else "  " * len(now) + last,
                "turn": ".".join(map(str, turn)),
                **{head.replace("_", " "): value for head, value in cells.items()},
            }


def cell(head: str, value: Any, turn: tuple[int, ...]) -> str:
    """One number, of one turn; of several steps of time the first and the last."""
    own = np.asarray(value)[turn]
    if head in ("output", "delta"):
        return f"{own:.3g}" if not own.ndim else f"{own[0]:.3g} to {own[-1]:.3g}"
    if np.isnan(own):
        return ""
    return f"{own:.2f}" if head.endswith("angle") else f"{own:.1%}"


def check_printed(path: str, seen: Seen) -> None:
    """ValueError if the numbers of a layer are those of several steps of a training."""
    if np.ndim(seen.zero) != len(turns_of(path)):
        raise ValueError(
            f"LayerTable: {path} has numbers of shape {np.shape(seen.zero)}, those of several steps; print one of "
            "them: jax.tree.map(lambda a: a[i], table)"
        )
