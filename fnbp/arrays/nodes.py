"""Frozen dataclasses as nodes of a pytree."""

from dataclasses import fields
from typing import Any, TypeVar, cast

import jax

__all__ = ["register_factor"]

Kind = TypeVar("Kind")


def register_factor(kind: type[Kind]) -> type[Kind]:
    """Register a frozen dataclass as a pytree; fields with metadata={"static": True} are no arrays.

    As jax.tree_util.register_dataclass, but for the type: to that, two classes with the same fields are one tree, so a
    function that JAX has traced for an Outer can be found in its cache for a Product.
    """
    names = [f.name for f in fields(cast(Any, kind)) if f.init]
    static = [f.name for f in fields(cast(Any, kind)) if f.init and f.metadata.get("static")]
    data = [name for name in names if name not in static]

    def flatten(node):
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node):
        children, rest = flatten(node)
        return [(jax.tree_util.GetAttrKey(name), child) for name, child in zip(data, children, strict=True)], rest

    def unflatten(rest, children):
        node = object.__new__(kind)  # not by __init__: JAX puts other things than arrays in their places
        for name, value in zip((*data, *static), (*children, *rest), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
    return kind
