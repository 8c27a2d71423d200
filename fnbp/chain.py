"""Layers one after the other: the chain rule."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax

from fnbp.checks import check_each, check_key, check_name, check_parts, describe, located
from fnbp.layer import Layer, Traits, mask_behind, shape_of
from fnbp.masks import Rule


def serial(*layers: Layer, name: str = "serial") -> Layer:
    """Layers one after the other.

        y = f_n(... f_2(f_1(x)))      dx = b_1(b_2(... b_n(dy))), the chain rule, last layer first

    A recurrent carry goes through: with a scan among the layers, (h_0, x) -> (h_T, y); with several scans h holds one
    entry for each. Behind a layer that leaves no positions (last, global_avg_pool) Context.mask ends.

    params, state, factors: a tuple, one entry a layer. name: what reports and errors call it.
    Source: the document, section 3.2, steps 1 and 3.
    Raises: ValueError where params or state are not of these layers; TypeError for a key, or a layer, that is none.
    """
    check_name("serial", name)
    check_each("serial", "serial", layers, Layer)
    carry = Carry(name, layers)

    def init(key, x):
        check_key(name, key)
        params, states = [], []
        h, x = carry.split(x)
        for i, layer in enumerate(layers):
            with located(f"{name}[{i}].{layer.name}"):
                p, s = layer.init(jax.random.fold_in(key, i), carry.into(i, h, x))
                x = carry.out_of(i, h, shape_of(layer, p, s, carry.into(i, h, x)))
            params.append(p)
            states.append(s)
        return tuple(params), tuple(states)

    def forward(params, state, x, ctx):
        check_parts(name, "params", params, len(layers))
        check_parts(name, "state", state, len(layers))
        if ctx.key is not None:
            check_key(name, ctx.key)
        states, saved, mask = [], [], ctx.mask
        h, x = carry.split(x)
        for i, (layer, p, s, c) in enumerate(zip(layers, params, state, ctx.split(len(layers)), strict=True)):
            with located(f"{name}[{i}].{layer.name}"):
                y, s, res = layer.forward(p, s, carry.into(i, h, x), replace(c, mask=mask))
                mask, x = mask_behind(layer, x, mask), carry.out_of(i, h, y)
            states.append(s)
            saved.append(res)
        return carry.join(h, x), tuple(states), tuple(saved) if h is None else Carried(tuple(saved))

    def backward(params, res, dy):
        dh, dy = carry.split(dy) if isinstance(res, Carried) else (None, dy)
        saved = res.saved if isinstance(res, Carried) else res
        factors = []
        for i in reversed(range(len(layers))):
            with located(f"{name}[{i}].{layers[i].name}"):
                f, dx = layers[i].backward(params[i], saved[i], carry.into(i, dh, dy))
                dy = carry.out_of(i, dh, dx)
            factors.append(f)
        return tuple(reversed(factors)), carry.join(dh, dy)

    traits = Traits(one_after_another(layers), alone=carry.alone, carries=carry.carries)
    return Layer(init, forward, backward, name, layers, lambda parts: serial(*parts, name=name), traits)


class Carried(NamedTuple):
    """What the layers of a serial saved that was given a carry."""

    saved: tuple


class Carry:
    """The h of the scans among layers, on its way through them: by the place of each scan."""

    def __init__(self, name: str, layers: tuple[Layer, ...]):
        self.name = name
        self.scans = [i for i, layer in enumerate(layers) if layer.traits.carries]
        self.carries = bool(self.scans) and all(layer.traits.alone for layer in layers[: self.scans[0]])
        self.alone = bool(layers) and layers[0].traits.alone and not self.carries

    def split(self, x: Any) -> tuple[dict[int, Any] | None, Any]:
        """h by place, or None if x comes without, and x. ValueError unless h has one entry for each of several."""
        if not self.carries or not isinstance(x, tuple) or len(x) != 2:
            return None, x
        h, x = x
        if len(self.scans) == 1:
            return {self.scans[0]: h}, x
        if h is not None and (not isinstance(h, tuple) or len(h) != len(self.scans)):
            due = f"a tuple with one carry for each of {len(self.scans)} scans"
            raise ValueError(f"{self.name}: h must be {due}, got {describe(h)}")
        return dict(zip(self.scans, h or (None,) * len(self.scans), strict=True)), x

    def into(self, i: int, h: dict[int, Any] | None, x: Any) -> Any:
        """What layer i is given: a scan takes its h along."""
        return x if h is None or i not in h else (h[i], x)

    def out_of(self, i: int, h: dict[int, Any] | None, y: Any) -> Any:
        """What is handed on behind layer i: a scan leaves its new h in h."""
        if h is None or i not in h:
            return y
        h[i], y = y
        return y

    def join(self, h: dict[int, Any] | None, x: Any) -> Any:
        """x, with h as it was given."""
        if h is None:
            return x
        return (h[self.scans[0]] if len(self.scans) == 1 else tuple(h[i] for i in self.scans)), x


def one_after_another(layers: tuple[Layer, ...]) -> Rule:
    """The rule of serial: the mask behind each layer is that of the next."""

    def rule(name, x, mask):
        for layer in layers:
            mask, x = mask_behind(layer, x, mask), None
        return mask

    return rule
