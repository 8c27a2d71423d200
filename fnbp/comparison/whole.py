"""The whole backward pass of a net: what each of its layers meets, and who inherits whose error."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.backpropagation import contracted
from fnbp.comparison.arrays import U32, U64, arithmetic, cast, compiled_or_plain, host, is_float0, is_floating, relative
from fnbp.comparison.report import Row
from fnbp.comparison.verdicts import Z, noise
from fnbp.factor import total
from fnbp.layer import Context, Layer, map_layers, rebuilt
from fnbp.losses import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """What one node of a net met on its way forward and back, all of it from the automatic backward."""

    params: Any
    state: Any
    x: Any
    ctx: Context
    dy: Any
    grads: Any
    dx: Any
    parts: tuple


def captured(layer: Layer) -> Layer:
    """layer with a backward that returns, in place of factors, a Seen of every node in it, and the automatic dx."""
    inner = rebuilt(layer, tuple(captured(part) for part in layer.parts)) if layer.rebuild else None

    def forward(params, state, x, ctx):
        def differentiated(params, x):
            y, new_state, _ = layer.forward(params, state, x, ctx)
            return y, new_state

        y, pull, new_state = jax.vjp(differentiated, params, x, has_aux=True)
        below = inner.forward(params, state, x, ctx)[2] if inner else ()
        return y, new_state, (pull, state, x, ctx, below)

    def backward(params, res, dy):
        pull, state, x, ctx, below = res
        grads, dx = pull(dy)
        parts = ()
        if inner:
            try:
                parts = inner.backward(params, below, dy)[0]
            except Exception:  # a combinator whose backward fails: as a unit it is told so
                parts = ()
        arrays = jax.tree.map(lambda a: None if is_float0(a) else a, (grads, dx))
        return Seen(params, state, x, ctx, dy, arrays[0], arrays[1], parts), dx

    return Layer(layer.init, forward, backward, layer.name)


def capture(net: Layer, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Seen:
    """The reference pass: every node's arguments and delta."""
    wrapped = captured(net)
    return wrapped.backward(params, wrapped.forward(params, state, x, ctx)[2], delta)[0]


def nodes(net: Layer, seen: Seen) -> Iterator[tuple[str, Layer, Seen]]:
    """Every node with its path, inputs first; a combinator comes after its parts."""

    def walk(path, layer, seen):
        for i, (part, below) in enumerate(zip(layer.parts, seen.parts, strict=False)):
            yield from walk(f"{path}[{i}].{part.name}", part, below)
        yield path, layer, seen

    return walk(net.name, net, seen)


def first_deltas(prediction: Any, loss: Loss | None, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    """(prediction, y) -> the delta that the automatic backward starts from: of J, or a draw."""
    if loss is None:
        drawn = rng.standard_normal(prediction.shape)
        return lambda p, y: jnp.asarray(np.asarray(drawn, np.float32), p.dtype)
    return lambda p, y: jax.grad(lambda p: jnp.mean(loss.forward(p, y)[0]))(p)


class Whole:
    """The whole backward pass, manual and automatic: who inherits an error, and is the net right as a whole?"""

    def __init__(
        self, net: Layer, params: Any, state: Any, x: Any, ctx: Context, y: Any, prediction: Any, deltas: Callable
    ):
        def reference(params, state, x, ctx, y):
            return capture(net, params, state, x, ctx, deltas(net.forward(params, state, x, ctx)[0], y))

        def seen_in(dtype):
            with arithmetic(dtype):
                return host(compiled_or_plain(reference, *cast((params, state, x, ctx, y), dtype)))

        self.net = net
        self.errors: dict[tuple[str, str], tuple[float, float]] = {}
        if not net.parts:  # the whole is the layer alone
            delta = np.asarray(deltas(prediction, y))
            self.nodes = [(net.name, net, Seen(params, state, x, ctx, delta, None, None, ()))]
            return
        seen = seen_in(None)
        self.nodes = list(nodes(net, seen))
        try:
            exact = seen_in(np.float64)
            single = seen if seen.dx is not None and seen.dx.dtype == np.float32 else seen_in(np.float32)
            with arithmetic(np.float64):
                manual = compiled_or_plain(self.manual, *cast((params, state, x, ctx), np.float64), exact.dy)
        except Exception:  # as a unit, the layer that fails is told so
            return
        for (path, _, ours), (_, _, wide), (_, _, narrow) in zip(
            nodes(net, manual), nodes(net, exact), nodes(net, single), strict=False
        ):
            self.hold(path, ours, wide, narrow)

    def manual(self, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Seen:
        """The manual pass, with the gradients and dx of every node."""

        def open_up(layer: Layer) -> Layer:
            inner = rebuilt(layer, tuple(open_up(part) for part in layer.parts)) if layer.rebuild else layer

            def backward(params, res, dy):
                below, dx = inner.backward(params, res, dy)
                grads, parts = (below, ()) if not layer.parts else (None, below)
                return Seen(None, None, None, Context(), None, grads, dx, parts), dx

            return Layer(layer.init, inner.forward, backward, layer.name)

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
        return [replace(row, kind="formula", hint=hint) if row.kind == "inherits" else row for row in rows]
