"""A net as a tree of layers, each turn of a loop over depth by itself, with the arrays of each layer, and back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fnbp.arrays.checks import check_held, check_parts, describe
from fnbp.combinators.tie import has, look_up, put
from fnbp.combinators.wrappers import freeze
from fnbp.construction import Made
from fnbp.exchange.rows import Held
from fnbp.interop import from_jax
from fnbp.layer import Keys, Layer, child

Turned = tuple[str, tuple[int, ...]]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Absent:
    """In the place of a tree that gradients have not: the state, and the params of what is frozen."""


@dataclass(frozen=True)
class Node:
    """A layer of a net. turns: which turn it is of each loop over depth around it; params, state: of a leaf.

    absent: which of "params", "state" are not given, since these are gradients.
    """

    path: str
    layer: Layer
    turns: tuple[int, ...]
    params: Mapping[str, Any]
    state: Mapping[str, Any]
    parts: tuple["Node", ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def key(self) -> Turned:
        """What tells it from all others."""
        return self.path, self.turns

    @property
    def held(self) -> Held:
        """The arrays of a leaf by name."""
        return {**self.params, **self.state}

    @property
    def label(self) -> str:
        """How a message calls it."""
        return self.path + "".join(f", turn {turn}" for turn in self.turns)

    @property
    def made(self) -> Made | None:
        """How it was made; None if nothing tells."""
        return intact(self.layer)

    def leaves(self) -> Iterator["Node"]:
        """Every layer below that has arrays, first to last; of a loop over depth turn by turn."""
        if not self.parts and self.held:
            yield self
        for part in self.parts:
            yield from part.leaves()


def intact(layer: Layer) -> Made | None:
    """How a layer was made; None if nothing tells, or its init or forward was replaced since."""
    made = layer.made
    same = made is not None and all(a is b for a, b in zip(layer[:2], made.fields[:2], strict=True))
    return made if same else None


def node_of(path: str, layer: Layer, params: Any, state: Any, turns: tuple[int, ...] = ()) -> Node:
    """The tree of a net; of gradients if state is Absent(). ValueError if params or state do not belong to it."""
    part = inner(layer)
    if part is not None:
        if layer.made is not None and layer.made.constructor is freeze:
            params, state = thawed(path, params, state)
        return Node(path, layer, turns, {}, {}, (node_of(f"{path}.{part.name}", part, params, state, turns),))
    trees = {what: tree for what, tree in (("params", params), ("state", state)) if not isinstance(tree, Absent)}
    if layer.rebuild is None:
        for what, tree in trees.items():
            check_leaf(path, what, tree)
        absent = tuple({"params", "state"} - set(trees))
        return Node(path, layer, turns, trees.get("params", {}), trees.get("state", {}), absent=absent)
    for what, tree in trees.items():
        check_parts(path, what, tree, len(layer.parts))
    if layer.traits.tied and "params" in trees:
        params = (whole(path, params[0], *layer.traits.tied),)
    parts = []
    for t in range(layer.traits.turns or 1):
        p, s, at = params, state, turns
        if layer.traits.turns:
            check_turns(path, (params, state), layer.traits.turns)
            p, s, at = *(jax.tree.map(lambda a, t=t: turn_of(a, t), tree) for tree in (params, state)), (*turns, t)
        p, s = ([tree] * len(layer.parts) if isinstance(tree, Absent) else tree for tree in (p, s))
        entries = enumerate(zip(layer.parts, p, s, strict=True))
        parts += [node_of(child(path, i, part), part, p_i, s_i, at) for i, (part, p_i, s_i) in entries]
    return Node(path, layer, turns, {}, {}, tuple(parts))


def inner(layer: Layer) -> Layer | None:
    """The net inside a leaf that holds one."""
    if layer.made is None or layer.made.constructor not in (freeze, from_jax):
        return None
    one = next(iter(layer.made.arguments.values()))
    return one if isinstance(one, Layer) else None


def check_leaf(path: str, what: str, tree: Any) -> None:
    """ValueError unless the params or the state of a leaf are a dict of arrays."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path}: {what} must be a dict, got {describe(tree)}; do they belong to another net?")
    for name, a in tree.items():
        if not hasattr(a, "shape"):
            raise ValueError(f"{path}: {what}[{name!r}] must be an array, got {describe(a)}")


def thawed(path: str, params: Any, state: Any) -> tuple[Any, Any]:
    """params and state of the layer inside freeze; it has no gradients."""
    if not isinstance(params, Absent):
        check_held(path, "params", params, {})
    if isinstance(state, Absent):
        return state, state
    if not isinstance(state, Mapping) or set(state) != {"params", "state"}:
        raise ValueError(f"{path}: state must hold 'params' and 'state' of the layer, got {describe(state)}")
    return state["params"], state["state"]


def whole(path: str, params: Any, source: Keys, target: Keys) -> Any:
    """The params of the net inside tie, with both parameters."""
    if has(params, target):
        raise ValueError(f"{path}: params hold {target}, which is {source} here; do they belong to the net untied?")
    value = look_up(params, source)
    look_up(params, target[:-1])
    return put(params, target, value)


def check_turns(path: str, trees: Any, n: int) -> None:
    """ValueError unless all arrays have an entry for each turn of a loop over depth."""
    sizes = sorted({a.shape[:1] for a in jax.tree.leaves(trees)} - {(n,)})
    if sizes:
        raise ValueError(
            f"{path}: params and state must have a first axis of {n}, got {sizes}; do they belong to a different net?"
        )


def turn_of(a: Any, t: int) -> Any:
    """Turn t of an array with one entry for each turn along its first axis, or of its shape."""
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a[t]


def copies(path: str, layer: Layer) -> dict[str, str]:
    """The parameters that a tie takes from another place, and that place: path.leaf -> path.leaf."""

    def name(path: str, layer: Layer, keys: Keys) -> str:
        if layer.rebuild is None:
            return ".".join(map(str, (path, *keys)))
        part = layer.parts[int(keys[0])]
        return name(child(path, int(keys[0]), part), part, keys[1:])

    found = {}
    for i, part in enumerate(layer.parts):
        inside = child(path, i, part)
        if layer.traits.tied:
            source, target = (name(inside, part, keys) for keys in layer.traits.tied)
            found[target] = source
        found |= copies(inside, part)
    within = inner(layer)
    return found if within is None else copies(f"{path}.{within.name}", within)


def built(node: Node, values: Mapping[Turned, Mapping[str, Any]], differ: Callable[[Node, Any, Any], None]) -> Any:
    """params and state of a node, of the arrays of each leaf. differ: is told when a tie meets two different arrays."""
    if not node.parts:
        found = values.get(node.key, {})
        return tuple({leaf: found[leaf] for leaf in tree if leaf in found} for tree in (node.params, node.state))
    trees = [built(part, values, differ) for part in node.parts]
    if inner(node.layer) is not None:
        params, state = trees[0]
        frozen = node.made is not None and node.made.constructor is freeze
        return ({}, {"params": params, "state": state}) if frozen else (params, state)
    if node.layer.traits.turns:
        n = len(node.layer.parts)
        turns = [trees[i : i + n] for i in range(0, len(trees), n)]
        each = [tuple(tuple(tree[k] for tree in turn) for turn in turns) for k in (0, 1)]
        return tuple(jax.tree.map(lambda *a: np.stack(a), *trees) for trees in each)
    params, state = (tuple(tree[k] for tree in trees) for k in (0, 1))
    if node.layer.traits.tied:
        source, target = node.layer.traits.tied
        both = params[0]
        if there(both, target):
            if not np.array_equal(look_up(both, source), look_up(both, target), equal_nan=True):
                differ(node, source, target)
            params = (put(both, target, None),)
    return params, state


def there(tree: Any, keys: Keys) -> bool:
    """True where the keys lead to an array."""
    *way, leaf = keys
    return leaf in (look_up(tree, tuple(way)) if way else tree)
