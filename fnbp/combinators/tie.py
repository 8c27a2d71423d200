"""One parameter in two places."""

from typing import Any

from fnbp.arrays.checks import check_is, shown
from fnbp.combinators.parts import one_part, placed
from fnbp.construction import constructor
from fnbp.layer import Around, Keys, Layer, mask_of, traits_of

__all__ = ["tie"]


@constructor
def tie(net: Layer, source: Keys, target: Keys) -> Layer:
    """Use one parameter of a net in two places: the target becomes the source.

        tie(serial(embedding(k, d), ..., dense(k, b=None)), (0, "E"), (2, "W")): W = E
        dE = its gradient in the first place + its gradient in the second

    params: a tuple of one entry, the net's without the target; source and target are the keys of params that lead
    there.
    Source: Press & Wolf 2016, arXiv:1608.05859, section 3, for input and output embedding.
    Raises: ValueError if the keys do not lead to two parameters of one shape, or params hold the target; TypeError if
            the net is not a Layer, or keys are not a tuple of names and whole numbers.
    """
    check_is("tie", "the net", net, Layer)
    check_keys(source, target)
    part = placed("tie", 0, net)

    def init(key, x):
        params, state = part.init(key, x)
        forms = [look_up(params, keys) for keys in (source, target)]
        for keys, form in zip((source, target), forms, strict=True):
            if not hasattr(form, "shape"):
                raise ValueError(f"tie: {keys} must lead to one parameter, it leads to a {type(form).__name__}")
        if forms[0].shape != forms[1].shape:
            raise ValueError(f"tie: {source} has shape {forms[0].shape}, {target} {forms[1].shape}; they must be alike")
        return put(params, target, None), state

    def both(params: Any) -> Any:
        return put(params, target, look_up(params, source))

    def forward(params, state, x, ctx):
        if has(params, target):
            raise ValueError(f"tie: params hold {target}, which is {source} here; do they belong to the net untied?")
        return part.forward(both(params), state, x, ctx)

    def backward(params, res, dy):
        factors, dx = part.backward(both(params), res, dy)
        dsource = look_up(factors, source) + look_up(factors, target)
        return put(put(factors, target, None), source, dsource), dx

    traits = traits_of(net, mask_of(net), tied=(source, target), last=0)
    return one_part("tie", net, forward, backward, lambda net: tie(net, source, target), init, traits)


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
            at = (at.inside if isinstance(at, Around) else at)[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"tie: {keys} leads nowhere in params: {key!r} is not there") from error
    return at


def put(tree: Any, keys: Keys, value: Any) -> Any:
    """The tree with value at those keys; None: with nothing there."""
    if isinstance(tree, Around):
        return tree.holding(put(tree.inside, keys, value))
    key, *rest = keys
    if rest:
        value = put(tree[key], tuple(rest), value)
    if isinstance(tree, dict):
        return {name: leaf for name, leaf in (tree | {key: value}).items() if leaf is not None}
    return tuple(value if i == key else part for i, part in enumerate(tree))
