"""Formulas in at least float32, for layers that sum or cancel: the arrays around them keep their own dtype."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import of_kind
from fnbp.arrays.sums import wide


def in_wide(forward: Callable, backward: Callable, x: int = 1) -> tuple[Callable, Callable]:
    """Lift forward and backward whose formulas are in at least float32.

        y = f(wide params, wide x) in the dtype of x      factors, dx = b(wide params, wide res, wide dy) in that of dy

    If forward saves x itself, x is saved in its own dtype, and widened again for backward. Of a factor, d is in the
    dtype of dy.

    Options: x: the place of x among the arguments of forward. The first argument is params, unless it is x.
    """

    def forward_wide(*args: Any) -> tuple[Any, ...]:
        given, widened = args[x], widen(args[x])
        y, *state, res = forward(*(widened if i == x else widen(a) if i == 0 else a for i, a in enumerate(args)))
        return y.astype(given.dtype), *state, tuple(given if a is widened else a for a in res)

    def backward_wide(*args: Any) -> Any:
        returned, dtype = backward(*map(widen, args)), args[-1].dtype
        if not isinstance(returned, tuple):  # only dx, of a layer without parameters
            return returned.astype(dtype)
        factors, dx = returned
        return {leaf: replace(factor, d=factor.d.astype(dtype)) for leaf, factor in factors.items()}, dx.astype(dtype)

    return forward_wide, backward_wide


def widen(tree: Any) -> Any:
    """A tree with its floating point arrays in at least float32, and the rest as it is."""
    return jax.tree.map(lambda a: wide(a) if of_kind(a, jnp.floating) else a, tree)
