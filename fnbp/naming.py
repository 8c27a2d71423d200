"""Parameters by name, "mlp[0].dense(128).W", by patterns of names, and from one net to another that differs in form."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnbp.arrays.checks import check_is, check_parts, choose, describe, shown
from fnbp.layer import Layer, child

__all__ = ["labelled", "matching", "moved", "named", "with_named"]


def named(net: Layer, params: Any) -> dict[str, Any]:
    """Return the parameters of a net by name: the path of the layer, as reports have it, and the name of the leaf.

        named(net, params)["serial[0].dense(128).W"]

    A tree shaped as params has the same names: gradients, the moments of adam, and state, too.

    Raises: TypeError if net is not a Layer; ValueError if params do not belong to it.
    """
    found: dict[str, Any] = {}
    map_named(lambda name, leaf: found.setdefault(name, leaf), net, params)
    return found


def with_named(net: Layer, params: Any, values: Mapping[str, Any]) -> Any:
    """Return params with some of them replaced, by name: all of named(net, params), or a few.

    Each value is cast to the dtype of the one that it replaces.

    Raises: ValueError if there is no parameter of a name, its shape differs, or its numbers are of another kind;
            TypeError if values is not a dict.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"with_named: values must be a dict of arrays by name, got {describe(values)}")
    held = named(net, params)
    for name, value in values.items():
        due = jnp.shape(choose("parameter", name, held, "with_named: "))
        if jnp.shape(value) != due:
            raise ValueError(f"with_named: {name} must have shape {due}, got {jnp.shape(value)}")
        came, kept = jnp.result_type(value), jnp.result_type(held[name])
        if not fits(came, kept):
            raise ValueError(f"with_named: {name} is {kept}, which does not hold {came}")
    return map_named(lambda name, a: jnp.asarray(values[name], a.dtype) if name in values else a, net, params)


def fits(came: Any, kept: Any) -> bool:
    """True if a dtype holds the numbers of another, but for their precision: no complex one as a real one."""
    order = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    kinds = [next(i for i, kind in enumerate(order) if jnp.issubdtype(dtype, kind)) for dtype in (came, kept)]
    return kinds[0] <= kinds[1]


def matching(net: Layer, *patterns: str) -> Callable[[Any], Any]:
    """Make a function from params to a tree of booleans: True where a pattern matches the name of the parameter.

        optax.adamw(1e-3, mask=matching(net, "*.W", "*.K"))      weight decay of these only

    In a pattern * stands for any characters and ? for one; everything else stands for itself, brackets too.

    Raises: TypeError if net is not a Layer, or a pattern is not a text; ValueError, from the function, if a pattern
            matches nothing, with the nearest name.
    """
    check_patterns("matching", net, patterns)

    def of(params):
        found = by_pattern("matching", net, params, patterns)
        return map_named(lambda name, leaf: name in found, net, params)

    return of


def labelled(net: Layer, labels: Mapping[str, Any], otherwise: Any) -> Callable[[Any], Any]:
    """Make a function from params to a tree of labels: that of the first pattern that matches the parameter's name.

        optax.partition({"slow": optax.sgd(1e-4), "none": optax.set_to_zero(), "fast": optax.adam(1e-3)},
                        labelled(net, {"*.embedding(*": "none", "*.W": "slow"}, otherwise="fast"))

    Options: labels: patterns, as in matching, and their labels. otherwise: the label of what no pattern matches.
    Raises:  as matching.
    """
    if not isinstance(labels, Mapping):
        raise TypeError(f"labelled: labels must be a dict of labels by pattern, got {describe(labels)}")
    check_patterns("labelled", net, tuple(labels))
    if otherwise is None or None in labels.values():
        raise TypeError("labelled: a label must not be None, which is an empty tree to JAX")

    def of(params):
        found = by_pattern("labelled", net, params, tuple(labels))
        return map_named(lambda name, leaf: labels[found[name]] if name in found else otherwise, net, params)

    return of


def moved(net: Layer, tree: Any, other: Layer) -> Any:
    """Return params, or state, of a net as another one takes them that has the same layers in another form.

        moved(net, params, fnbp.cast(net, "bfloat16"))      moved(serial(a, a), params, repeat(a, 2)), and back

    cast, remat, skip, serial within serial and repeat arrange the same layers otherwise; the layers themselves must be
    the same, in the same order, by name.

    Raises: TypeError if an argument is not a Layer; ValueError if the layers differ, or tree does not belong to net.
    """
    check_is("moved", "net", net, Layer)
    check_is("moved", "other", other, Layer)
    entries = list(unstacked(net, tree))
    ours, others = [name for name, _ in entries], list(unstacked_names(other))
    for i, (one, due) in enumerate(zip(ours, others, strict=False)):
        if one != due:
            raise ValueError(f"moved: layer {i} of {net.name} is {one}, that of {other.name} is {due}")
    if len(ours) != len(others):
        raise ValueError(f"moved: {net.name} has {len(ours)} layers, {other.name} has {len(others)}")
    rest = (entry for _, entry in entries)
    return stacked(other, rest)


# --- walking ---


def map_named(f: Callable[[str, Any], Any], net: Layer, tree: Any) -> Any:
    """f(name, leaf) in the place of every leaf of a tree that is shaped as params."""
    check_is("named", "net", net, Layer)

    def at(path: str, layer: Layer, entry: Any) -> Any:
        if layer.rebuild is None:
            return jax.tree_util.tree_map_with_path(lambda keys, leaf: f(f"{path}.{leaf_name(keys)}", leaf), entry)
        check_parts(path, "params", entry, len(layer.parts))
        return tuple(
            at(child(path, i, part), part, one)
            for i, (part, one) in enumerate(zip(layer.parts, entry, strict=True))
        )  # fmt: skip

    return at(net.name, net, tree)


def leaf_name(keys: Any) -> str:
    """The name of one array of a layer, by its keys: "W", or "0.W"."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)


def check_patterns(maker: str, net: Any, patterns: tuple[Any, ...]) -> None:
    """TypeError unless net is a Layer, and each pattern a text; ValueError without any."""
    check_is(maker, "net", net, Layer)
    if not patterns:
        raise ValueError(f'{maker}: give at least one pattern, such as "*.W"')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f'{maker}: a pattern must be a text, such as "*.W", got {describe(pattern)}')


def by_pattern(maker: str, net: Layer, params: Any, patterns: tuple[str, ...]) -> dict[str, str]:
    """The first pattern that matches each name. ValueError if one matches no name at all."""
    whole = jax.tree.map(lambda node: 0, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    names = list(named(net, whole))  # also of leaves that another group of optax.partition has
    found: dict[str, str] = {}
    for pattern in patterns:
        form = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."))
        hits = [name for name in names if form.fullmatch(name)]
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            ends = ", ".join(sorted({f".{name.rpartition('.')[2]}" for name in names}))
            hint = f"; the nearest is {near[0]}; names end in {ends}" if near else f"; {net.name} has no parameters"
            raise ValueError(f"{maker}: no parameter matches {shown(pattern)}{hint}")
        found |= {name: pattern for name in hits if name not in found}
    return found


def unstacked(net: Layer, tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, entry) of every layer, first to last; a loop over depth gives each of its turns."""
    if net.rebuild is None:
        yield net.name, tree
        return
    check_parts(net.name, "params", tree, len(net.parts))
    for i in range(net.traits.turns or 1):
        turn = jax.tree.map(lambda a, i=i: a[i], tree) if net.traits.turns else tree
        for part, entry in zip(net.parts, turn, strict=True):
            yield from unstacked(part, entry)


def unstacked_names(net: Layer) -> Iterator[str]:
    """The names that unstacked gives."""
    if net.rebuild is None:
        yield net.name
        return
    for _ in range(net.traits.turns or 1):
        for part in net.parts:
            yield from unstacked_names(part)


def stacked(net: Layer, entries: Iterator[Any]) -> Any:
    """The tree of a net, of the entries of its layers: what unstacked took apart."""
    if net.rebuild is None:
        return next(entries)
    turns = [tuple(stacked(part, entries) for part in net.parts) for _ in range(net.traits.turns or 1)]
    return jax.tree.map(lambda *each: jnp.stack(each), *turns) if net.traits.turns else turns[0]
