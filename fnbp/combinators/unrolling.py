"""The turns of loops over depth, written out one behind another."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.combinators.serial import serial
from fnbp.layer import Keys, Layer, rebuilt


class Unrolled(NamedTuple):
    """A net whose turns stand one behind another.

    net       draws what the net with loops draws
    apart     a tree of params, or of states, of the net with loops -> that of this net
    together  the other way round
    """

    net: Layer
    apart: Callable[[Any], Any]
    together: Callable[[Any], Any]


def unrolled(net: Layer, tied: tuple[Keys, ...] = (), most: int | None = None) -> Unrolled:
    """The net with the turns of its loops over depth one behind another.

    A loop looks up the weights of each turn among those of all, which takes longer than to apply them to one position;
    and what it returns of each turn it copies. tied: keys that lead from here to parameters that are tied; a loop on
    the way to one stays. most: so does a loop of more turns than this.
    """
    n = net.traits.turns
    if net.rebuild is None or (n is not None and (tied or n > (n if most is None else most))):
        return Unrolled(net, lambda tree: tree, lambda tree: tree)
    if n is not None:
        part = unrolled(net.parts[0], (), most)
        turns = [functools.partial(jax.tree.map, operator.itemgetter(i)) for i in range(n)]

        def together(entries: Any) -> Any:
            return (jax.tree.map(lambda *a: jnp.stack(a), *map(part.together, entries)),)

        return Unrolled(
            serial(*[part.net] * n), lambda tree: tuple(part.apart(turn(tree[0])) for turn in turns), together
        )
    within = [tuple(keys[1:] for keys in tied if keys[0] == i) for i in range(len(net.parts))]
    if net.traits.tied:
        within = [(*within[0], *net.traits.tied)]
    parts = [unrolled(part, own, most) for part, own in zip(net.parts, within, strict=True)]
    same = all(new.net is old for new, old in zip(parts, net.parts, strict=True))

    def each(way: str) -> Callable[[Any], Any]:
        return lambda tree: tuple(getattr(part, way)(entry) for part, entry in zip(parts, tree, strict=True))

    return Unrolled(net if same else rebuilt(net, tuple(part.net for part in parts)), each("apart"), each("together"))
