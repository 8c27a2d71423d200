"""Formulas in at least float32, for layers that sum or cancel: the arrays around them keep their own dtype."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import of_kind
from fnbp.arrays.sums import wide
from fnbp.factor import Factor


def in_wide(forward: Callable, backward: Callable, x: int = 1) -> tuple[Callable, Callable]:
    """forward and backward, whose formulas see params, x, what was saved, and dy in at least float32.

        y = [dtype of x] f([wide] params, [wide] x)      dx, d of each factor = [dtype of dy] b([wide] ..., [wide] dy)

    What forward saves of x itself is saved in the dtype of x, and widened again for backward.

    Options: x: the place of x among the arguments of forward; the first argument is params, unless it is x.
    """

    def forward_wide(*args: Any) -> tuple[Any, ...]:
        given, widened = args[x], widen(args[x])
        y, *state, res = forward(*(widened if i == x else widen(a) if i == 0 else a for i, a in enumerate(args)))
        return y.astype(given.dtype), *state, tuple(given if a is widened else a for a in res)

    def backward_wide(*args: Any) -> Any:
        *_, dy = args
        returned = backward(*map(widen, args))
        factors, dx = returned if isinstance(returned, tuple) else ({}, returned)
        dx = dx.astype(dy.dtype)
        return (narrowed(factors, dy), dx) if isinstance(returned, tuple) else dx

    return forward_wide, backward_wide


def widen(tree: Any) -> Any:
    """The floating point arrays of a tree in at least float32, whatever else it holds as it is."""
    return jax.tree.map(lambda a: wide(a) if of_kind(a, jnp.floating) else a, tree)


def narrowed(factors: dict[str, Any], dy: jax.Array) -> dict[str, Factor]:
    """The factors with their errors in the dtype of dy."""
    return {leaf: replace(factor, d=factor.d.astype(dy.dtype)) for leaf, factor in factors.items()}
