"""Layers made of layers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.checks import check_each, check_floating, check_is, check_key, check_parts, choose, located, shown
from fnbp.compound import Added
from fnbp.factor import Factor
from fnbp.layer import Layer, Traits, counting, mask_behind, mask_of, shape_of, traits_of
from fnbp.masks import Rule
from fnbp.sums import like


def skip(layer: Layer) -> Layer:
    """A layer, and a path around it.

        y = x + f(x)      dx = dy + b(dy)

    params, state, factors: a tuple of one entry.
    Source: He et al. 2015, arXiv:1512.03385, section 3.2.
    Raises: ValueError where the layer changes the shape; TypeError for a layer that is none.
    """
    check_is("skip", "the layer", layer, Layer)

    def init(key, x):
        check_floating("skip", "x", x)
        with located(f"skip[0].{layer.name}"):
            p, s = layer.init(key, x)
            y = shape_of(layer, p, s, x)
        check_same(x, y)
        return (p,), (s,)

    def forward(params, state, x, ctx):
        check_parts("skip", "params", params, 1)
        check_parts("skip", "state", state, 1)
        check_floating("skip", "x", x)
        with located(f"skip[0].{layer.name}"):
            y, s, res = layer.forward(params[0], state[0], x, ctx)
        check_same(x, y)
        return x + y, (s,), (res,)

    def backward(params, res, dy):
        with located(f"skip[0].{layer.name}"):
            factors, dx = layer.backward(params[0], res[0], dy)
        return (factors,), dy + dx

    def check_same(x, y):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"skip: {layer.name} maps {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}; "
                "a sum with its input needs the same"
            )

    traits = traits_of(layer, mask_of(layer))
    functions = counting("skip", traits.mask, forward, backward)
    return Layer(init, *functions, "skip", (layer,), lambda parts: skip(*parts), traits)


def parallel(*layers: Layer, join: str = "sum") -> Layer:
    """Layers side by side, on the same input.

        sum      y = sum_i f_i(x)            dy_i = dy
        product  y = prod_i f_i(x)           dy_i = dy prod of the others
        concat   y = (f_1(x), f_2(x), ...) along the last axis, and dy cut up likewise
        tuple    y = the tuple of them, dy likewise          always: dx = sum_i b_i(dy_i)

    params, state, factors: a tuple, one entry a layer. Integers have no cotangent: there dx is None.
    Source: the document, section 3.2, step 3, the chain rule for a variable that is used several times.
    Raises: ValueError without layers, for an unknown join, results that cannot be joined, params or state of another
            net; TypeError for a key, or a layer, that is none.
    """
    joined = choose("join", join, JOINS, "parallel: ")
    name = f"parallel({join})"
    if not layers:
        raise ValueError(f"{name}: at least one layer is due")
    check_each(name, "parallel", layers, Layer)

    def init(key, x):
        check_key(name, key)
        params, states, ys = [], [], []
        for i, layer in enumerate(layers):
            with located(f"{name}[{i}].{layer.name}"):
                p, s = layer.init(jax.random.fold_in(key, i), x)
                ys.append(shape_of(layer, p, s, x))
            params.append(p)
            states.append(s)
        check_joinable(name, join, ys)
        return tuple(params), tuple(states)

    def forward(params, state, x, ctx):
        check_parts(name, "params", params, len(layers))
        check_parts(name, "state", state, len(layers))
        if ctx.key is not None:
            check_key(name, ctx.key)
        ys, states, saved = [], [], []
        for i, (layer, p, s, c) in enumerate(zip(layers, params, state, ctx.split(len(layers)), strict=True)):
            with located(f"{name}[{i}].{layer.name}"):
                y, s, res = layer.forward(p, s, x, c)
            ys.append(y)
            states.append(s)
            saved.append(res)
        check_joinable(name, join, ys)
        y, res = joined.forward(ys)
        return y, tuple(states), (tuple(saved), res)

    def backward(params, res, dy):
        saved, res = res
        found = []
        for i, (layer, p, r, d) in enumerate(zip(layers, params, saved, joined.backward(res, dy), strict=True)):
            with located(f"{name}[{i}].{layer.name}"):
                found.append(layer.backward(p, r, d))
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

    forward: Callable[[list], tuple[Any, Any]]
    backward: Callable[[Any, Any], list]


def cut(res: tuple, dy: jax.Array) -> list[jax.Array]:
    """dy in pieces as wide as what was joined."""
    return jnp.split(dy, np.cumsum([each.shape[-1] for each in res])[:-1].tolist(), -1)


def times_others(res: tuple, dy: jax.Array) -> list[jax.Array]:
    """dy times all numbers but one's own."""
    return [math.prod(res[:i] + res[i + 1 :], start=dy) for i in range(len(res))]


JOINS = {
    "sum": Join(lambda ys: (sum(ys[1:], ys[0]), (None,) * len(ys)), lambda res, dy: [dy] * len(res)),
    "product": Join(lambda ys: (math.prod(ys[1:], start=ys[0]), tuple(ys)), times_others),
    "concat": Join(lambda ys: (jnp.concatenate(ys, -1), like(tuple(ys))), cut),
    "tuple": Join(lambda ys: (tuple(ys), ()), lambda res, dy: list(dy)),
}


def check_joinable(name: str, join: str, ys: list) -> None:
    """ValueError unless the results of the layers fit each other."""
    if join == "tuple":
        return
    forms = {(a.dtype, a.shape[:-1] if join == "concat" else a.shape) for a in ys}
    if len(forms) > 1:
        found = ", ".join(f"{a.dtype}{list(a.shape)}" for a in ys)
        raise ValueError(f"{name}: its layers return {found}, which have no {join}")


Keys = tuple[int | str, ...]


@dataclass(frozen=True)
class Tie:
    """parts -> tie of them. A combinator whose rebuild has tied adds the factors that stand at these keys."""

    tied: tuple[Keys, Keys]

    def __call__(self, parts: tuple[Layer, ...]) -> Layer:
        return tie(parts[0], *self.tied)


def tie(net: Layer, source: Keys, target: Keys) -> Layer:
    """A net that uses one parameter in two places: the target is the source.

        tie(serial(embedding(k, d), ..., dense(k, b=None)), (0, "E"), (2, "W")): W = E
        dE = what it is due for in the first place + what in the second

    params: a tuple of one entry, the net's without the target; source and target are the keys of params that lead
    there.
    Source: Press & Wolf 2016, arXiv:1608.05859, section 3, for input and output embedding.
    Raises: ValueError for keys that do not lead to two parameters, a target of another shape, and params that hold
            the target; TypeError for a net that is none, keys that are no names and whole numbers.
    """
    check_is("tie", "the net", net, Layer)
    check_keys(source, target)
    here = f"tie[0].{net.name}"

    def init(key, x):
        with located(here):
            p, s = net.init(key, x)
        forms = [look_up(p, keys) for keys in (source, target)]
        for keys, form in zip((source, target), forms, strict=True):
            if not hasattr(form, "shape"):
                raise ValueError(f"tie: {keys} must lead to one parameter, it leads to a {type(form).__name__}")
        if forms[0].shape != forms[1].shape:
            raise ValueError(f"tie: {source} has shape {forms[0].shape}, {target} {forms[1].shape}; they must be alike")
        return (put(p, target, None),), (s,)

    def forward(params, state, x, ctx):
        check_parts("tie", "params", params, 1)
        check_parts("tie", "state", state, 1)
        if has(params[0], target):
            raise ValueError(
                f"tie: params hold {target}, which is {source} here: are these of the net that is not tied?"
            )
        with located(here):
            y, s, res = net.forward(put(params[0], target, look_up(params[0], source)), state[0], x, ctx)
        return y, (s,), (res,)

    def backward(params, res, dy):
        with located(here):
            factors, dx = net.backward(put(params[0], target, look_up(params[0], source)), res[0], dy)
        first, second = look_up(factors, source), look_up(factors, target)
        both = Added(first, second) if isinstance(first, Factor) else first + second
        return (put(put(factors, target, None), source, both),), dx

    traits = traits_of(net, mask_of(net))
    return Layer(init, forward, backward, "tie", (net,), Tie((source, target)), traits)


def check_keys(source: Keys, target: Keys) -> None:
    """ValueError or TypeError unless these may lead to two parameters."""
    for keys in (source, target):
        whole = isinstance(keys, tuple) and all(isinstance(key, (int, str)) for key in keys)
        if not whole or any(isinstance(key, int) and key < 0 for key in keys):
            raise TypeError(f"tie: keys must be a tuple of names and whole numbers from 0, (2, 'W'), got {shown(keys)}")
    if source == target or not source or not target:
        raise ValueError(f"tie: source and target must be two parameters, got {source} and {target}")


def has(tree: Any, keys: Keys) -> bool:
    """True where the keys lead somewhere."""
    try:
        return look_up(tree, keys) is not None
    except ValueError:
        return False


def look_up(tree: Any, keys: Keys) -> Any:
    """What stands in a tree at those keys, behind whatever wraps it. ValueError where they lead nowhere."""
    at = tree
    for key in keys:
        try:
            at = getattr(at, "inside", at)[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"tie: {keys} leads nowhere in params: {key!r} is not there") from error
    return at


def put(tree: Any, keys: Keys, value: Any) -> Any:
    """The tree with value at those keys; None: with nothing there."""
    if hasattr(tree, "inside"):
        return tree.holding(put(tree.inside, keys, value))
    key, *rest = keys
    if rest:
        value = put(tree[key], tuple(rest), value)
    if isinstance(tree, dict):
        return {name: leaf for name, leaf in (tree | {key: value}).items() if leaf is not None}
    return tuple(value if i == key else part for i, part in enumerate(tree))


def tied_leaves(net: Layer) -> frozenset[str]:
    """The paths of the leaves whose factors a tie adds to others."""

    def of(path: str, layer: Layer, keys: Keys) -> str:
        if layer.rebuild is None:
            return path
        i = next(key for key in keys if isinstance(key, int))
        return of(f"{path}[{i}].{layer.parts[i].name}", layer.parts[i], keys[1:])

    def walk(path: str, layer: Layer) -> Iterator[str]:
        for i, part in enumerate(layer.parts):
            inside = f"{path}[{i}].{part.name}"
            tied = getattr(layer.rebuild, "tied", ())
            yield from (of(inside, part, keys) for keys in tied)
            yield from walk(inside, part)

    return frozenset(walk(net.name, net))
