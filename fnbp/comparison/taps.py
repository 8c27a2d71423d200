"""Capture what every node of a net met in a whole pass: taps, which add zeros to its input and to its output.

The cotangent of such a zero is the node's dx, or its dy. So one jax.vjp of the tapped net gives, for each
layer and each combinator, its input, its delta, its gradients and what it hands down.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.comparison.numerics import is_floating
from fnbp.contraction import contracted
from fnbp.contractions import total
from fnbp.layer import Around, Context, Layer, child, map_layers, rebuilt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record(Around):
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

    def holding(self, factors: Any) -> "Record":
        """The same record around other factors."""
        return replace(self, parts=factors) if self.parts else replace(self, grads=factors)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Each gradient with the name of its leaf, then dx by the name "x"."""
        tree = (self.grads if self.grads is not None else {}, self.dx)
        for where, a in jax.tree_util.tree_leaves_with_path(tree):
            yield jax.tree_util.keystr(where[1:], simple=True, separator=".") or "x", a


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Met:
    """What one node met on its way forward. It travels as the node's new state, which every combinator hands on."""

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

    def holding(self, factors: Any) -> "Tapped":
        """The same taps around other params."""
        return replace(self, params=factors)


def tapped(layer: Layer) -> Layer:
    """Tap layer and every node in it: it takes Tapped params and returns Met as its new state. Its backward is unused.

    Raises: ValueError for a combinator whose own functions were replaced.
    """
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
    """x + tap in the dtype of x, or x if there is no tap."""
    return x if tap is None else jax.tree.map(lambda a, t: a if t is None else a + t.astype(a.dtype), x, tap)


def taps(layer: Layer, params: Any, met: Met | None) -> Tapped:
    """Zeros to add at every node, of the shapes in met; without met, params with no zeros."""
    below = met.parts if met else (None,) * len(layer.parts)
    parts = tuple(taps(*each) for each in zip(layer.parts, params, below, strict=True)) if layer.parts else params

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if is_floating(a) else None, tree)

    return Tapped(parts, zeros(met.x), zeros(met.y)) if met else Tapped(parts, None, None)


def automatic_pass(net: Layer, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Record:
    """The reference pass: what every node met, and its delta, gradients and dx, all by the automatic backward."""
    wrapped = tapped(net)
    shapes = jax.eval_shape(wrapped.forward, taps(net, params, None), state, x, ctx)[1]

    def differentiated(zeros):
        y, met, _ = wrapped.forward(zeros, state, x, ctx)
        return y, met

    _, pull, met = jax.vjp(differentiated, taps(net, params, shapes), has_aux=True)
    return recorded(net, met, pull(delta)[0])


def recorded(layer: Layer, met: Met, cotangents: Tapped) -> Record:
    """The way forward and the way back of a node, and of every node in it, as one Record."""
    each = zip(layer.parts, met.parts, cotangents.params, strict=True) if layer.parts else ()
    parts = tuple(recorded(*one) for one in each)
    grads = None if parts else cotangents.params
    return Record(met.params, met.state, met.x, met.ctx, cotangents.out, grads, cotangents.into, parts)


def manual_pass(net: Layer, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> Record:
    """The pass by the manual backwards, with the gradients and dx of every node; the other fields stay empty."""

    def open_up(layer: Layer) -> Layer:
        inner = rebuilt(layer, tuple(open_up(part) for part in layer.parts)) if layer.rebuild else layer

        def backward(params, res, dy):
            below, dx = inner.backward(params, res, dy)
            grads, parts = (below, ()) if not layer.parts else (None, below)
            return Record(None, None, None, None, None, grads, dx, parts), dx

        return Layer(layer.init, inner.forward, backward, layer.name, traits=layer.traits)

    opened = open_up(map_layers(contracted(total), net))
    return opened.backward(params, opened.forward(params, state, x, ctx)[2], delta)[0]


def nodes(net: Layer, record: Record, one_turn: bool = False) -> Iterator[tuple[str, Layer, Record]]:
    """Every node with its path, inputs first; a combinator comes after its parts.

    one_turn: of a loop over depth, only the first turn.
    """

    def walk(path, layer, record):
        for i, (part, below) in enumerate(zip(layer.parts, record.parts, strict=True)):
            if one_turn and layer.traits.turns is not None:
                below = jax.tree.map(lambda a: a[0], below)
            yield from walk(child(path, i, part), part, below)
        yield path, layer, record

    return walk(net.name, net, record)
