"""What every combinator does with its parts: says where an error happened, checks and packs their params and state."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fnbp.arrays.checks import check_is, check_key, check_parts, located
from fnbp.layer import Backward, Context, Forward, Init, Keys, Layer, Traits, child, mask_of, rebuilt, traits_of


def placed(name: str, i: int, layer: Layer) -> Layer:
    """layer as part i of a combinator: whatever its functions raise says "in skip[0].dense(5)".

    Raises: TypeError if it is not a Layer.
    """
    check_is(name, "the layer", layer, Layer)
    return at_path(child(name, i, layer), layer)


def at_path(path: str, layer: Layer) -> Layer:
    """layer, whose functions add that path to whatever they raise."""

    def there(f: Callable) -> Callable:
        @functools.wraps(f)
        def called(*args: Any) -> Any:
            with located(path):
                return f(*args)

        return called

    return layer._replace(init=there(layer.init), forward=there(layer.forward), backward=there(layer.backward))


def one_part(
    name: str,
    layer: Layer,
    forward: Forward,
    backward: Backward,
    rebuild: Callable[[Layer], Layer],
    init: Init | None = None,
    traits: Traits | None = None,
    check: Callable[[str, Any], None] = lambda what, tree: None,
) -> Layer:
    """A combinator of one part, of functions that see the part's own params, state and factors.

    Packed, each is a tuple of one entry. init and traits: those of the layer if none are given. check: ("params" or
    "state", the entry) -> None, raises if that does not fit.
    """
    init = placed(name, 0, layer).init if init is None else init

    def unpacked(what: str, tree: Any) -> Any:
        check_parts(name, what, tree, 1)
        check(what, tree[0])
        return tree[0]

    def init_packed(key, x):
        params, state = init(key, x)
        return (params,), (state,)

    def forward_packed(params, state, x, ctx):
        y, state, res = forward(unpacked("params", params), unpacked("state", state), x, ctx)
        return y, (state,), res

    def backward_packed(params, res, dy):
        factors, dx = backward(params[0], res, dy)
        return (factors,), dx

    traits = traits_of(layer, mask_of(layer)) if traits is None else traits
    return Layer(init_packed, forward_packed, backward_packed, name, (layer,), lambda parts: rebuild(*parts), traits)


def inits(name: str, parts: tuple[Layer, ...], key: Any) -> Iterator[tuple[Layer, Any]]:
    """Each part, with a key of its own. TypeError if key is not a random key."""
    check_key(name, key)
    for i, part in enumerate(parts):
        yield part, jax.random.fold_in(key, i)


def turns(name: str, parts: tuple[Layer, ...], params: Any, state: Any, ctx: Context) -> Iterator[tuple[Any, ...]]:
    """Each part, with its params, its state and its context.

    Raises: ValueError unless params and state have one entry for each part; TypeError if the key is not a random key.
    """
    check_parts(name, "params", params, len(parts))
    check_parts(name, "state", state, len(parts))
    if ctx.key is not None:
        check_key(name, ctx.key)
    yield from zip(parts, params, state, ctx.split(len(parts)), strict=True)


def map_last(f: Callable[[str, Layer], Layer], net: Layer) -> Layer:
    """Replace the leaf whose y is that of the net by f(path, leaf), or the combinator that makes it of its parts'."""

    def at(path: str, layer: Layer) -> Layer:
        i = layer.traits.last
        if i is None:
            return f(path, layer)
        part = at(child(path, i, layer.parts[i]), layer.parts[i])
        return rebuilt(layer, (*layer.parts[:i], part, *layer.parts[i + 1 :]))

    return at(net.name, net)


def tied_leaves(net: Layer) -> frozenset[str]:
    """The paths of the leaves whose factors a tie adds to others."""

    def of(path: str, layer: Layer, keys: Keys) -> str:
        if layer.rebuild is None:
            return path
        i = next(key for key in keys if isinstance(key, int))
        return of(child(path, i, layer.parts[i]), layer.parts[i], keys[1:])

    def walk(path: str, layer: Layer) -> Iterator[str]:
        for i, part in enumerate(layer.parts):
            inside = child(path, i, part)
            yield from (of(inside, part, keys) for keys in layer.traits.tied)
            yield from walk(inside, part)

    return frozenset(walk(net.name, net))
