"""Layers side by side, and how their results are joined."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_each, choose
from fnbp.arrays.masks import Rule
from fnbp.arrays.sums import like
from fnbp.combinators.parts import inits, placed, turns
from fnbp.construction import constructor
from fnbp.layer import Layer, Traits, mask_behind, shape_of

__all__ = ["parallel"]


@constructor
def parallel(*layers: Layer, join: str = "sum") -> Layer:
    """Apply several layers to the same input, and join what they return.

        sum      y = sum_i f_i(x)            dy_i = dy
        product  y = prod_i f_i(x)           dy_i = dy prod of the others
        concat   y = (f_1(x), f_2(x), ...) along the last axis, and dy cut up likewise
        tuple    y = the tuple of them, dy likewise          always: dx = sum_i b_i(dy_i)

    params, state, factors: a tuple, one entry for each layer. Integers have no cotangent: there dx is None.
    Source: fnbp/README.md, B5, for a variable that is used several times.
    Raises: ValueError without layers, for an unknown join, for results that cannot be joined, and if params or state
            do not belong to these layers; TypeError if an argument is not a Layer, or key is not a random key.
    """
    joined = choose("join", join, JOINS, "parallel: ")
    name = f"parallel({join})"
    if not layers:
        raise ValueError(f"{name}: expected at least one layer")
    check_each(name, "parallel", layers, Layer)
    parts = tuple(placed(name, i, layer) for i, layer in enumerate(layers))

    def init(key, x):
        params, states, ys = [], [], []
        for part, key_i in inits(name, parts, key):
            p, s = part.init(key_i, x)
            ys.append(shape_of(part, p, s, x))
            params.append(p)
            states.append(s)
        check_joinable(name, join, ys)
        return tuple(params), tuple(states)

    def forward(params, state, x, ctx):
        found = [part.forward(p, s, x, c) for part, p, s, c in turns(name, parts, params, state, ctx)]
        ys, states, saved = zip(*found, strict=True)
        check_joinable(name, join, ys)
        y, res = joined.forward(ys)
        return y, states, (saved, res)

    def backward(params, res, dy):
        saved, res = res
        dys = joined.backward(res, dy)
        found = [part.backward(p, r, d) for part, p, r, d in zip(parts, params, saved, dys, strict=True)]
        factors, dxs = zip(*found, strict=True)
        return factors, jax.tree.map(lambda *d: sum(d[1:], d[0]), *dxs)

    traits = Traits(side_by_side(layers), alone=all(layer.traits.alone for layer in layers))
    return Layer(init, forward, backward, name, layers, lambda parts: parallel(*parts, join=join), traits)


def side_by_side(layers: tuple[Layer, ...]) -> Rule:
    """The rule of parallel: the mask behind the first layer that leaves one."""

    def rule(name, x, mask):
        behind = [mask_behind(layer, x, mask) for layer in layers]
        return next((mask for mask in behind if mask is not None), None)

    return rule


class Join(NamedTuple):
    """forward: ys -> y, res. backward: res, dy -> the dy of each."""

    forward: Callable[[tuple], tuple[Any, Any]]
    backward: Callable[[Any, Any], list]


def cut(res: tuple, dy: jax.Array) -> list[jax.Array]:
    """dy in pieces as wide as what was joined."""
    return jnp.split(dy, np.cumsum([each.shape[-1] for each in res])[:-1].tolist(), -1)


def times_others(res: tuple, dy: jax.Array) -> list[jax.Array]:
    """dy times all numbers but one's own."""
    return [math.prod(res[:i] + res[i + 1 :], start=dy) for i in range(len(res))]


JOINS = {
    "sum": Join(lambda ys: (sum(ys[1:], ys[0]), (None,) * len(ys)), lambda res, dy: [dy] * len(res)),
    "product": Join(lambda ys: (math.prod(ys[1:], start=ys[0]), ys), times_others),
    "concat": Join(lambda ys: (jnp.concatenate(ys, -1), like(ys)), cut),
    "tuple": Join(lambda ys: (ys, ()), lambda res, dy: list(dy)),
}


def check_joinable(name: str, join: str, ys: Sequence[Any]) -> None:
    """ValueError unless the results of the layers fit each other."""
    if join == "tuple":
        return
    forms = {(a.dtype, a.shape[:-1] if join == "concat" else a.shape) for a in ys}
    if len(forms) > 1:
        found = ", ".join(f"{a.dtype}{list(a.shape)}" for a in ys)
        raise ValueError(f"{name}: its layers return {found}, which have no {join}")
