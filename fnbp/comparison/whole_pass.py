"""The whole backward pass of a net: what each of its layers meets, and who inherits whose error."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import (
    U32,
    U64,
    arithmetic,
    cast,
    compiled_or_plain,
    first_line,
    host,
    is_floating,
    relative,
)
from fnbp.comparison.report import Row
from fnbp.comparison.verdict import Z, noise
from fnbp.contraction import contracted, total
from fnbp.layer import Around, Context, Layer, child, map_layers, rebuilt
from fnbp.losses.loss import Loss, losses_of

SHAKE = 2.0**-40  # relative; the gradients of a float64 net move by about as much


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen(Around):
    """What one node of a net met on its way forward and back."""

    params: Any
    state: Any
    x: Any
    ctx: Context | None
    dy: Any
    grads: Any
    dx: Any
    parts: tuple

    @property
    def inside(self) -> Any:
        """The factors that it wraps."""
        return self.parts or self.grads

    def holding(self, factors: Any) -> "Seen":
        """With other factors inside."""
        return replace(self, parts=factors) if self.parts else replace(self, grads=factors)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Met:
    """What one node met on its way forward; it travels as the node's new state, which every combinator hands on."""

    params: Any
    state: Any
    x: Any
    ctx: Context
    y: Any
    parts: tuple


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tapped(Around):
    """The params of a tapped node: its own, and zeros added to its input and output, whose cotangents are dx and dy."""

    params: Any
    into: Any
    out: Any

    @property
    def inside(self) -> Any:
        """The params that it wraps."""
        return self.params

    def holding(self, params: Any) -> "Tapped":
        """With other params inside."""
        return replace(self, params=params)


def tapped(layer: Layer) -> Layer:
    """layer and every node in it with Tapped params, and Met for a new state. Its backward is not needed."""
    inner = rebuilt(layer, tuple(tapped(part) for part in layer.parts)) if layer.rebuild else layer

    def forward(params, state, x, ctx):
        x = plus(x, params.into)
        y, new_state, res = inner.forward(params.params, state, x, ctx)
        met = Met(untapped(params), state, x, ctx, y, new_state if layer.parts else ())
        return plus(y, params.out), met, res

    return Layer(layer.init, forward, layer.backward, layer.name, traits=layer.traits)


def untapped(params: Any) -> Any:
    """The params of a node as it would meet them without taps."""
    return jax.tree.map(
        lambda node: untapped(node.params) if isinstance(node, Tapped) else node,
        params,
        is_leaf=lambda node: isinstance(node, Tapped),
    )


def plus(x: Any, tap: Any) -> Any:
    """x + tap, where there is one, in the dtype of x."""
    return x if tap is None else jax.tree.map(lambda a, t: a if t is None else a + t.astype(a.dtype), x, tap)


def taps(layer: Layer, params: Any, met: Met | None) -> Tapped:
    """Zeros to add at every node, of the shapes that were met; without met: none."""
    below = met.parts if met else (None,) * len(layer.parts)
    parts = tuple(taps(*each) for each in zip(layer.parts, params, below, strict=True)) if layer.parts else params

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if is_floating(a) else None, tree)

    return Tapped(parts, zeros(met.x), zeros(met.y)) if met else Tapped(parts, None, None)


def capture(net: Layer, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Seen:
    """The reference pass: what every node met, and its delta, gradients and dx, all by the automatic backward."""
    wrapped = tapped(net)
    shapes = jax.eval_shape(wrapped.forward, taps(net, params, None), state, x, ctx)[1]

    def differentiated(taps):
        y, met, _ = wrapped.forward(taps, state, x, ctx)
        return y, met

    _, pull, met = jax.vjp(differentiated, taps(net, params, shapes), has_aux=True)
    return seen(net, met, pull(delta)[0])


def seen(layer: Layer, met: Met, d: Tapped) -> Seen:
    """Both ways of a node in one."""
    each = zip(layer.parts, met.parts, d.params, strict=True) if layer.parts else ()
    parts = tuple(seen(*one) for one in each)
    return Seen(met.params, met.state, met.x, met.ctx, d.out, None if parts else d.params, d.into, parts)


def nodes(net: Layer, seen: Seen, one_turn: bool = False) -> Iterator[tuple[str, Layer, Seen]]:
    """Every node with its path, inputs first; a combinator comes after its parts. one_turn: the first of a loop's."""

    def walk(path, layer, seen):
        for i, (part, below) in enumerate(zip(layer.parts, seen.parts, strict=True)):
            if one_turn and layer.traits.turns is not None:
                below = jax.tree.map(lambda a: a[0], below)
            yield from walk(child(path, i, part), part, below)
        yield path, layer, seen

    return walk(net.name, net, seen)


def first_deltas(prediction: Any, loss: Loss | None, mask: Any, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    """(prediction, y) -> the delta that the automatic backward starts from: of J, or a draw."""
    if loss is None:
        drawn = rng.standard_normal(prediction.shape)
        return lambda p, y: jnp.asarray(drawn, p.dtype)  # in float64 with digits of its own
    return lambda p, y: jax.grad(lambda p: jnp.mean(losses_of(loss, p, y, mask)[0]))(p)


class Whole:
    """The whole backward pass, manual and automatic: who inherits an error, and is the net right as a whole?"""

    def __init__(
        self, net: Layer, params: Any, state: Any, x: Any, ctx: Context, y: Any, prediction: Any, deltas: Callable
    ):
        def reference(params, state, x, ctx, y):
            return capture(net, params, state, x, ctx, deltas(net.forward(params, state, x, ctx)[0], y))

        def seen_in(dtype, by=0.0):
            with arithmetic(dtype):
                at, *fixed = cast(((params, x), state, ctx, y), dtype)
                at = jax.tree.map(lambda a: a * (1 + by) if by and is_floating(a) else a, at)
                return host(compiled_or_plain(reference, at[0], fixed[0], at[1], *fixed[1:]))

        self.net, self.failed = net, ""
        self.errors: dict[tuple[str, str], tuple[float, float]] = {}
        alone = [(net.name, net, Seen(params, state, x, ctx, np.asarray(deltas(prediction, y)), None, None, ()))]
        if not net.parts:
            self.nodes = alone
            return
        tapped(net)  # raises for a combinator whose own functions were replaced
        try:
            seen = seen_in(None)
            self.nodes = list(nodes(net, seen, one_turn=True))
        except Exception as error:  # it hands on a state that is not its parts': there is no looking inside
            self.nodes, self.failed = alone, f"{type(error).__name__}: {first_line(error)}"
            return
        try:
            exact = seen_in(np.float64)
            dtypes = {a.dtype for a in jax.tree.leaves(seen.dx)}
            single = seen if dtypes == {np.dtype(np.float32)} else seen_in(np.float32)
            with arithmetic(np.float64):
                manual = compiled_or_plain(self.manual, *cast((params, state, x, ctx), np.float64), exact.dy)
            sides = list(zip(*(nodes(net, side) for side in (manual, exact, single)), strict=True))
        except Exception as error:  # as a unit, the layer that fails, or that hands on what is not its parts', says so
            self.failed = f"{type(error).__name__}: {first_line(error)}"
            return
        for (path, _, ours), (_, _, wide), (_, _, narrow) in sides:
            self.hold(path, ours, wide, narrow)
        if any(z > Z for _, z in self.errors.values()):
            moved = nodes(net, seen_in(np.float64, by=SHAKE))
            for (path, _, _), (_, _, wide), (_, _, shaken) in zip(
                nodes(net, exact), nodes(net, exact), moved, strict=True
            ):
                self.forgive(path, wide, shaken)

    def manual(self, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Seen:
        """The manual pass, with the gradients and dx of every node."""

        def open_up(layer: Layer) -> Layer:
            inner = rebuilt(layer, tuple(open_up(part) for part in layer.parts)) if layer.rebuild else layer

            def backward(params, res, dy):
                below, dx = inner.backward(params, res, dy)
                grads, parts = (below, ()) if not layer.parts else (None, below)
                return Seen(None, None, None, None, None, grads, dx, parts), dx

            return Layer(layer.init, inner.forward, backward, layer.name, traits=layer.traits)

        opened = open_up(map_layers(contracted(total), self.net))
        return opened.backward(params, opened.forward(params, state, x, ctx)[2], delta)[0]

    def hold(self, path: str, ours: Seen, wide: Seen, narrow: Seen) -> None:
        """The errors of one node's gradients and dx in the whole pass, and over their noise."""
        trees = [(s.grads if ours.grads is not None else {}, s.dx) for s in (ours, wide, narrow)]
        if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
            return
        entries = jax.tree_util.tree_leaves_with_path(trees[0])
        for (where, m), a, low in zip(entries, *(jax.tree.leaves(tree) for tree in trees[1:]), strict=True):
            if not is_floating(a) or jnp.shape(m) != jnp.shape(a):
                continue
            leaf = jax.tree_util.keystr(where[1:], simple=True, separator=".") or "x"
            error = relative(m, a)
            self.errors[path, leaf] = error, error / (U64 * noise(np.asarray(low), np.asarray(a)) / U32)

    def forgive(self, path: str, wide: Seen, shaken: Seen) -> None:
        """Leaves that float64 moves by steps, or not at all: the net casts down, and such rounding is no error."""
        for (where, a), moved in zip(
            jax.tree_util.tree_leaves_with_path((wide.grads or {}, wide.dx)),
            jax.tree.leaves((shaken.grads or {}, shaken.dx)),
            strict=True,
        ):
            leaf = jax.tree_util.keystr(where[1:], simple=True, separator=".") or "x"
            change = relative(moved, a)
            if (path, leaf) in self.errors and np.any(a) and not 1e-3 * SHAKE < change < 1e4 * SHAKE:
                self.errors[path, leaf] = self.errors[path, leaf][0], 0.0

    def beside(self, rows: list[Row]) -> list[Row]:
        """rows with their error in the whole pass; right ones that are wrong there inherit."""
        found = []
        for row in rows:
            error, z = self.errors.get((row.path, row.leaf), (None, 0.0))
            inherits = row.kind in ("ok", "convention") and z > Z
            found.append(replace(row, whole=error, kind="inherits" if inherits else row.kind))
        return found

    def blame(self, rows: list[Row]) -> list[Row]:
        """Every part is right alone. If the whole is not, the net is to blame."""
        hint = "every layer is right by itself, but not in this net: does one read what it is not given?"
        if self.failed:
            return [*rows, Row(self.net.name, "params", (), "", "raises", hint=f"{hint} {self.failed}")]
        return [replace(row, kind="formula", hint=hint) if row.kind == "inherits" else row for row in rows]
