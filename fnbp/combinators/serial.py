"""Layers one after the other: the chain rule."""

from dataclasses import replace
from typing import Any, NamedTuple

from fnbp.arrays.checks import check_each, check_name, describe
from fnbp.arrays.masks import Rule
from fnbp.combinators.parts import inits, placed, turns
from fnbp.construction import constructor
from fnbp.layer import Layer, Traits, mask_behind, shape_of

__all__ = ["serial"]


@constructor
def serial(*layers: Layer, name: str = "serial") -> Layer:
    """Compose layers, the first one first.

        y = f_n(... f_2(f_1(x)))      dx = b_1(b_2(... b_n(dy))), the chain rule, last layer first

    A recurrent carry goes through: with a scan among the layers, (h_0, x) -> (h_T, y); with several scans h holds one
    entry for each. Behind a layer that leaves no positions (last, global_avg_pool) Context.mask ends.

    params, state, factors: a tuple, one entry for each layer.
    Options: name: what reports and errors call it.
    Source:  fnbp/README.md, B1 and B5.
    Raises:  ValueError if params or state do not belong to these layers; TypeError if an argument is not a Layer, or
             key is not a random key.
    """
    check_name("serial", name)
    check_each("serial", "serial", layers, Layer)
    parts = tuple(placed(name, i, layer) for i, layer in enumerate(layers))
    carry = Carry(name, layers)

    def init(key, x):
        params, states = [], []
        h, x = carry.split(x)
        for i, (part, key_i) in enumerate(inits(name, parts, key)):
            p, s = part.init(key_i, carry.into(i, h, x))
            x = carry.out_of(i, h, shape_of(part, p, s, carry.into(i, h, x)))
            params.append(p)
            states.append(s)
        return tuple(params), tuple(states)

    def forward(params, state, x, ctx):
        states, saved, mask = [], [], ctx.mask
        h, x = carry.split(x)
        for i, (part, p, s, c) in enumerate(turns(name, parts, params, state, ctx)):
            y, s, res = part.forward(p, s, carry.into(i, h, x), replace(c, mask=mask))
            mask, x = mask_behind(part, x, mask), carry.out_of(i, h, y)
            states.append(s)
            saved.append(res)
        return carry.join(h, x), tuple(states), tuple(saved) if h is None else Carried(tuple(saved))

    def backward(params, res, dy):
        dh, dy = carry.split(dy) if isinstance(res, Carried) else (None, dy)
        saved = res.saved if isinstance(res, Carried) else res
        factors = []
        for i in reversed(range(len(parts))):
            f, dx = parts[i].backward(params[i], saved[i], carry.into(i, dh, dy))
            dy = carry.out_of(i, dh, dx)
            factors.append(f)
        return tuple(reversed(factors)), carry.join(dh, dy)

    last = len(layers) - 1 if layers else None
    traits = Traits(one_after_another(layers), alone=carry.alone, carries=carry.carries, last=last)
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

    def rule(name: str, x: Any, mask: Any) -> Any:
        for layer in layers:
            mask, x = mask_behind(layer, x, mask), None
        return mask

    return rule
