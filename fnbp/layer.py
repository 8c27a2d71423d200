"""A layer is a value: three pure functions, a name, and its parts."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.checks import check_key, check_returned


class Layer(NamedTuple):
    """A differentiable function with its backward pass, both written out.

        init     (key, x)                -> params, state       x: an array, or a jax.ShapeDtypeStruct
        forward  (params, state, x, ctx) -> y, state, res       res: what backward needs and params does not hold
        backward (params, res, dy)       -> factors, dx         factors: the tree of params, see fnbp.factor
        name     "dense(128)": reports name the layer by it
        parts    the child layers of a combinator, () for a leaf
        rebuild  parts -> the same combinator over other parts, None for a leaf

    Replace the functions of a leaf (layer._replace), or the parts of a combinator: map_layers rebuilds a combinator
    from its parts, and refuses one whose own functions were replaced. With rebuild=None it is taken as a leaf.

    The params and state of a leaf are dicts. Those of a combinator are tuples, one entry a part.
    """

    init: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    name: str
    parts: tuple["Layer", ...] = ()
    rebuild: Callable[..., "Layer"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a forward may know beside its input: a random key, a mask, and whether this is training.

    key    a jax.random key for layers that draw, or None
    mask   True where a position counts, or None
    train  static: a change of it compiles anew
    """

    key: Any = None
    mask: Any = None
    train: bool = field(default=False, metadata={"static": True})

    def split(self, n: int) -> tuple["Context", ...]:
        """One context for each of n parts, each with a key of its own."""
        if self.key is None:
            return (self,) * n
        return tuple(replace(self, key=jax.random.fold_in(self.key, i)) for i in range(n))


def stateless(init: Callable, forward: Callable, backward: Callable, name: str) -> Layer:
    """A Layer of functions that mention neither state nor context.

        init     (key, x)          -> params
        forward  (params, x)       -> y, res
        backward (params, res, dy) -> factors, dx

    Raises: TypeError from init where key is no random key.
    """

    def init_lifted(key, x):
        check_key(name, key)
        x = jnp.asarray(x) if isinstance(x, np.ndarray) else x  # NumPy's float64 is float32 where jax_enable_x64 is off
        return init(key, x), {}

    def forward_lifted(params, state, x, ctx):
        y, res = check_returned(name, "forward", forward(params, x), "y, res")
        return y, state, res

    return Layer(init_lifted, forward_lifted, backward, name)


def without(leaf: str, backward: Callable) -> Callable:
    """backward for a layer that does without that parameter: its factor is left out."""

    def backward_without(params, res, dy):
        factors, dx = backward(params, res, dy)
        return {name: factor for name, factor in factors.items() if name != leaf}, dx

    return backward_without


def map_layers(f: Callable[[str, Layer], Layer], net: Layer) -> Layer:
    """net with every leaf replaced by f(path, leaf).

    Paths read "serial[3].dense(17)". The combinators are rebuilt around the new leaves, so whatever f adds to a
    backward runs inside their loops. Contraction, tracing, freezing and other rules are all such maps.
    """

    def at(path: str, layer: Layer) -> Layer:
        if layer.rebuild is None:
            return f(path, layer)
        return rebuilt(layer, tuple(at(f"{path}[{i}].{part.name}", part) for i, part in enumerate(layer.parts)))

    return at(net.name, net)


def checked(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer whose functions raise a TypeError where they do not return as many things as are due."""

    def forward(params, state, x, ctx):
        return check_returned(path, "forward", layer.forward(params, state, x, ctx), "y, state, res")

    def backward(params, res, dy):
        return check_returned(path, "backward", layer.backward(params, res, dy), "factors, dx")

    return layer._replace(forward=forward, backward=backward)


def shape_of(layer: Layer, params: Any, state: Any, x: Any, ctx: Context = Context()) -> Any:
    """Shape and dtype of what a layer makes of x, without computing it."""
    return jax.eval_shape(checked(layer.name, layer).forward, params, state, x, ctx)[0]


def rebuilt(layer: Layer, parts: tuple[Layer, ...]) -> Layer:
    """A combinator over other parts. ValueError where a function of its own was replaced: rebuild would lose it."""
    assert layer.rebuild is not None
    fresh = layer.rebuild(layer.parts)
    for name in ("init", "forward", "backward"):
        ours, made = (inspect.unwrap(getattr(one, name)) for one in (layer, fresh))
        if getattr(ours, "__code__", None) is not getattr(made, "__code__", None):
            raise ValueError(
                f"{layer.name}: its {name} was replaced, and rebuilding it over other parts would lose that; give it a "
                "rebuild that keeps it, or rebuild=None to make it a leaf"
            )
    return layer.rebuild(parts)


def leaves(net: Layer, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, the entry of each tree that belongs to it), first to last; trees are shaped as params."""

    def walk(path: str, layer: Layer, entries: tuple) -> Iterator[tuple[Any, ...]]:
        if layer.rebuild is None:
            yield path, layer, *entries
        for i, part in enumerate(layer.parts):
            yield from walk(f"{path}[{i}].{part.name}", part, tuple(entry[i] for entry in entries))

    return walk(net.name, net, trees)
