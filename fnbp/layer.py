"""A layer is a value: three pure functions, a name, and its parts."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import (
    check_array,
    check_is,
    check_key,
    check_name,
    check_params,
    check_returned,
    choose,
    describe,
)
from fnbp.arrays.masks import RULES, Rule, kept, refused
from fnbp.construction import Made, call_of, hashed, is_alike, is_other, itself, reduced
from fnbp.steps import Steps, Whole

__all__ = [
    "Context",
    "Layer",
    "Traits",
    "leaves",
    "map_layers",
    "replace_functions",
    "stateless",
]

Keys = tuple[int | str, ...]  # of a tree of params: (2, "W")
Mixes = Literal["never", "training", "always"]
MIXES: tuple[Mixes, ...] = ("never", "training", "always")


@dataclass(frozen=True)
class Traits:
    """What a layer states of itself before it runs, so that a net can be asked.

    mask    what becomes of Context.mask: a rule (name, x, mask) -> the mask of y, see fnbp.arrays.masks
    mixes   when an example's y depends on other examples of the batch: "never", "training" or "always"; an example
            then has no gradient of its own, also below this layer
    draws   True if it draws from Context.key in training
    alone   True if x is one array: a pair can only be a carry for a scan behind this layer
    carries True if it takes a pair (h_0, x) too, and returns (h_T, y) then
    turns   of a loop over depth: how many layers its arrays hold, along their first axis; None for any other layer
    tied    of a combinator that adds the factors of two parameters: where those stand in its part's params
    steps   how it takes a sequence by steps, if its positions are not each by itself; whole: how scan runs it, a cell
    opened  True for the net of an opened loss: x may hold what is not finite, and its factors need no check
    last    of a combinator: the part whose y is that of the whole; None if it makes something else of it
    scores  of a layer y = x W^T + b: the same one, which hands on Scores; see fnbp.linear_cross_entropy
    """

    mask: Rule = refused
    mixes: Mixes = "never"
    draws: bool = False
    alone: bool = False
    carries: bool = False
    turns: int | None = None
    tied: tuple[Keys, ...] = ()
    steps: Steps | None = None
    whole: Whole | None = None
    opened: bool = False
    last: int | None = None
    scores: "Layer | None" = None


class Init(Protocol):
    """What a Layer starts with."""

    def __call__(self, key: Any, x: Any, /) -> tuple[Any, Any]:
        """(key, x) -> params, state. x: an array, or a jax.ShapeDtypeStruct."""
        ...


class Forward(Protocol):
    """The function itself."""

    def __call__(self, params: Any, state: Any, x: Any, ctx: Any, /) -> tuple[Any, Any, Any]:
        """(params, state, x, ctx) -> y, state, res. res: what backward needs and params does not hold."""
        ...


class Backward(Protocol):
    """Its derivative, transposed."""

    def __call__(self, params: Any, res: Any, dy: Any, /) -> tuple[Any, Any]:
        """(params, res, dy) -> factors, dx. factors: the tree of params, see fnbp.factor."""
        ...


class Layer(NamedTuple):
    """A differentiable function with its backward pass, both written out.

        init     (key, x)                -> params, state       x: an array, or a jax.ShapeDtypeStruct
        forward  (params, state, x, ctx) -> y, state, res       res: what backward needs and params does not hold
        backward (params, res, dy)       -> factors, dx         factors: the tree of params, see fnbp.factor
        name     "dense(128)": reports name the layer by it
        parts    the child layers of a combinator, () for a leaf
        rebuild  parts -> the same combinator over other parts, None for a leaf
        traits   what it does with a mask, whether it mixes examples, whether it draws: see Traits
        made     the call that made it, see fnbp.constructor: by it layers are equal, hashed, pickled and printed

    The params and state of a leaf are dicts. Those of a combinator are tuples, one entry a part.
    fnbp.replace_functions gives a layer other functions; fnbp.map_layers rebuilds a combinator over other parts.
    """

    init: Init
    forward: Forward
    backward: Backward
    name: str
    parts: tuple["Layer", ...] = ()
    rebuild: Callable[..., "Layer"] | None = None
    traits: Traits = Traits()
    made: Made | None = None

    __eq__, __ne__, __hash__ = is_alike, is_other, hashed
    __repr__, __reduce__ = call_of, reduced
    __copy__ = __deepcopy__ = itself

    def __call__(self, *args: Any, **options: Any) -> Any:
        """TypeError: a Layer is a value that holds functions."""
        raise TypeError(
            f"{self.name}: a Layer is not called; its forward is net.forward(params, state, x, ctx) -> y, state, res"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Hold what a forward may know beside its input: a random key, a mask, and whether this is training.

    key    a jax.random key for layers that draw, or None
    mask   True where a position counts, or None
    train  static: a change of it compiles anew
    """

    key: Any = None
    mask: Any = None
    train: bool = field(default=False, metadata={"static": True})

    def split(self, n: int) -> tuple["Context", ...]:
        """One context for each of n parts, each with a key of its own. TypeError if the key is not a random key."""
        if self.key is None:
            return (self,) * n
        check_key("Context", self.key)
        return tuple(replace(self, key=jax.random.fold_in(self.key, i)) for i in range(n))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """A value in a tree of arrays that no transformation touches: a flag that a forward saves for its backward."""

    value: Any


class Around(ABC):
    """What stands in a tree of factors in the place of one layer's, with more beside: see fnbp.trace."""

    @property
    @abstractmethod
    def inside(self) -> Any:
        """The factors of the layer."""

    @abstractmethod
    def holding(self, factors: Any) -> "Around":
        """The same around other factors."""


class Masked(NamedTuple):
    """What a layer saved, and the masks of its x and of its y."""

    res: Any
    before: Any
    after: Any


def counting(name: str, rule: Rule, forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """forward and backward of a Layer for which nothing is there where Context.mask is False.

        y = [counts] f([counts] x)      dx = [counts] b([counts] dy)

    Without a mask they are as they were; so is backward if a mask is refused.
    """

    def forward_counting(params, state, x, ctx):
        after = rule(name, x, ctx.mask)
        if ctx.mask is None and after is None:
            return forward(params, state, x, ctx)
        y, state, res = check_returned(name, "forward", forward(params, state, kept(ctx.mask, x), ctx), "y, state, res")
        return kept(after, y), state, Masked(res, ctx.mask, after)

    def backward_counting(params, res, dy):
        if not isinstance(res, Masked):
            return backward(params, res, dy)
        returned = backward(params, res.res, kept(res.after, dy))
        factors, dx = check_returned(name, "backward", returned, "factors, dx")
        return factors, kept(res.before, dx)

    return forward_counting, backward if rule is refused else backward_counting


def stateless(
    init: Callable, forward: Callable, backward: Callable, name: str, mask: str | Rule = refused, alone: bool = False
) -> Layer:
    """Make a Layer of functions that mention neither state nor context.

        init     (key, x)          -> params
        forward  (params, x)       -> y, res
        backward (params, res, dy) -> factors, dx

    Options: mask: what the layer does with Context.mask. "elementwise" or "position" if it treats each number, or each
             position of x (m, *positions, features), by itself: it then reads 0 where the mask is False. By default a
             mask is refused. alone: True if x is one array, never a pair.
    Raises:  ValueError if the mask rule is unknown; TypeError from init if key is not a random key, and from forward if
             there is a mask and it is refused.
    """
    rule = mask if callable(mask) else choose("rule for a mask", mask, RULES, f"{name}: ")
    return mask_aware(init, lambda params, x, mask: forward(params, x), backward, name, rule, alone)


def mask_aware(
    init: Callable, forward: Callable, backward: Callable, name: str, rule: Rule, alone: bool = True
) -> Layer:
    """As stateless, for a forward that takes the mask into account: (params, x, mask) -> y, res."""

    check_name("stateless", name)

    def init_lifted(key, x):
        check_key(name, key)
        if isinstance(x, np.ndarray):
            check_array(name, "x", x)
            x = jnp.asarray(x)  # NumPy's float64 is float32 where jax_enable_x64 is off
        return init(key, x), {}

    def forward_lifted(params, state, x, ctx):
        y, res = check_returned(name, "forward", forward(params, x, ctx.mask), "y, res")
        return y, state, res

    lifted = counting(name, rule, forward_lifted, backward)
    return Layer(init_lifted, *lifted, name, traits=Traits(rule, alone=alone))


def parameterless(forward: Callable, backward: Callable, name: str, mask: str | Rule = refused) -> Layer:
    """A Layer without parameters: forward x -> y, res and backward (res, dy) -> dx."""

    def forward_lifted(params, x):
        check_params(name, params, x, {})
        return forward(x)

    def backward_lifted(params, res, dy):
        return {}, backward(res, dy)

    return stateless(lambda key, x: {}, forward_lifted, backward_lifted, name, mask, alone=True)


def traits_of(layer: Layer, mask: Rule, **more: Any) -> Traits:
    """The traits of a layer made of one other, with a rule of its own for the mask; more: what else differs."""
    inside = [leaf.traits for _, leaf in leaves(layer)]
    mixes = MIXES[max((MIXES.index(traits.mixes) for traits in inside), default=0)]
    alone = layer.traits.alone and not more.get("carries", False)
    return Traits(mask, mixes, any(traits.draws for traits in inside), alone, **more)


def mask_of(layer: Layer) -> Rule:
    """The rule of a layer, for one that is made of it and hands x and mask on as they are."""
    return lambda name, x, mask: mask_behind(layer, x, mask)


def mask_behind(layer: Layer, x: Any, mask: Any) -> Any:
    """The mask of a layer's y, given x and its mask; None if all positions of y count. TypeError if it is refused."""
    return layer.traits.mask(layer.name, x, mask)


def mixing(net: Layer, ctx: Context) -> str | None:
    """The path of the first leaf by which an example's y depends on other examples, or None."""
    when = ("training", "always") if ctx.train else ("always",)
    return next((path for path, leaf in leaves(net) if leaf.traits.mixes in when), None)


def drawing(net: Layer) -> str | None:
    """The path of the first leaf that draws in training, or None."""
    return next((path for path, leaf in leaves(net) if leaf.traits.draws), None)


def child(path: str, i: int, part: Layer) -> str:
    """The path of part i of the layer at path: "serial[3].dense(17)"."""
    return f"{path}[{i}].{part.name}"


def map_layers(f: Callable[[str, Layer], Layer], net: Layer) -> Layer:
    """Replace every leaf of a net by f(path, leaf).

    Paths read "serial[3].dense(17)". The combinators are rebuilt around new leaves, so whatever f adds to a
    backward runs inside their loops. Contraction, tracing, freezing and other rules are all such maps.
    """

    def at(path: str, layer: Layer) -> Layer:
        if layer.rebuild is None:
            return f(path, layer)
        parts = tuple(at(child(path, i, part), part) for i, part in enumerate(layer.parts))
        same = all(new is old for new, old in zip(parts, layer.parts, strict=True))
        return layer if same else rebuilt(layer, parts)

    return at(net.name, net)


def checked(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer whose functions raise a TypeError if they return too few values, or too many."""

    def forward(params, state, x, ctx):
        return check_returned(path, "forward", layer.forward(params, state, x, ctx), "y, state, res")

    def backward(params, res, dy):
        return check_returned(path, "backward", layer.backward(params, res, dy), "factors, dx")

    return layer._replace(forward=forward, backward=backward)


def shape_of(layer: Layer, params: Any, state: Any, x: Any, ctx: Context = Context()) -> Any:
    """Shape and dtype of what a layer makes of x, without computing it. TypeError if x holds what is no array."""
    for leaf in jax.tree.leaves(x):
        check_array(layer.name, "x", leaf)
    return jax.eval_shape(checked(layer.name, layer).forward, params, state, x, ctx)[0]


def replace_functions(
    layer: Layer,
    init: Init | None = None,
    forward: Forward | None = None,
    backward: Backward | None = None,
    name: str | None = None,
) -> Layer:
    """A layer with other functions in the place of its own: another rule, an approximation, a planted mistake.

        replace_functions(fnbp.sigmoid(), backward=lambda params, res, dy: ({}, dy))

    Of a combinator it makes a leaf: params, state and factors keep their tree, but map_layers goes no further.

    Options: init, forward, backward, name: as the fields of Layer; without one, the layer's own stays.
    Raises:  TypeError if the argument is not a Layer, or what replaces a function is not one.
    """
    check_is("replace_functions", "the layer", layer, Layer)
    given = {"init": init, "forward": forward, "backward": backward}
    for what, f in given.items():
        if f is not None and (isinstance(f, Layer) or not callable(f)):
            raise TypeError(f"replace_functions: {what} of {layer.name} must be a function, got {describe(f)}")
    if name is not None:
        check_name("replace_functions", name)
    leaf = layer
    if layer.rebuild is not None:
        leaf = layer._replace(parts=(), rebuild=None, traits=traits_of(layer, mask_of(layer)))
    return leaf._replace(**{what: f for what, f in {**given, "name": name}.items() if f is not None})


def rebuilt(layer: Layer, parts: tuple[Layer, ...]) -> Layer:
    """A combinator over other parts. ValueError if one of its own functions was replaced: rebuild would lose it."""
    assert layer.rebuild is not None
    fresh = layer.rebuild(layer.parts)
    for name in ("init", "forward", "backward"):
        ours, made = (inspect.unwrap(getattr(one, name)) for one in (layer, fresh))
        if getattr(ours, "__code__", None) is not getattr(made, "__code__", None):
            raise ValueError(
                f"{layer.name}: its {name} was replaced, and rebuilding it over other parts would lose that; "
                f"fnbp.replace_functions(layer, {name}=...) makes it a leaf, which keeps it"
            )
    return layer.rebuild(parts)


def leaves(net: Layer, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, the entry of each tree that belongs to it), first to last; trees are shaped as params."""

    def walk(path: str, layer: Layer, entries: tuple) -> Iterator[tuple[Any, ...]]:
        if layer.rebuild is None:
            yield path, layer, *entries
        for i, part in enumerate(layer.parts):
            yield from walk(child(path, i, part), part, tuple(entry[i] for entry in entries))

    return walk(net.name, net, trees)
