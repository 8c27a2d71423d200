"""Which positions count: what Context.mask says of an array, and what becomes of it behind a layer.

A mask is True where a position counts: (m, T) for sequences, (m, *s) for x (m, *s, n). Only attention also takes
(m, T, S), what each query sees. Where it is False, nothing is there: a layer reads 0, puts out 0, and passes back 0.

Each layer states in its Traits a rule (name, x, mask) -> the mask of y. x is None if only the mask is asked for. The
rules:

    elementwise   each number by itself                                      the mask stays
    by_position   each position by itself, the features of one are mixed     the mask stays
    refused       positions are mixed, and no meaning is defined             TypeError

A layer that takes the mask into account itself (attention, scan, last, the norms over positions) has its own rule.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import concrete, describe

Rule = Callable[[str, Any, Any], Any]


def check_truth(name: str, mask: Any) -> None:
    """TypeError unless a mask holds truth values."""
    if getattr(mask, "dtype", None) != np.bool_:
        hint = "; of a mask that is added to scores: mask == 0" if hasattr(mask, "dtype") else ""
        raise TypeError(f"{name}: the mask must be of bool, True where a position counts; got {describe(mask)}{hint}")


def check_mask(name: str, mask: Any, *shapes: tuple[int, ...]) -> None:
    """TypeError unless a mask holds truth values, ValueError unless it has one of the shapes."""
    check_truth(name, mask)
    if mask.shape not in shapes:
        raise ValueError(f"{name}: the mask must have shape {' or '.join(map(str, shapes))}, got {mask.shape}")


def of_queries(x: Any, mask: Any) -> bool:
    """True for what each query of attention sees, (m, T, S), beside x (m, T, n): it says nothing of x itself."""
    return mask.ndim == 3 and x.ndim == 3 and mask.shape[:2] == x.shape[:2]


def elementwise(name: str, x: Any, mask: Any) -> Any:
    """The rule of a layer that treats each number by itself. ValueError if the mask does not fit x."""
    if mask is None or not hasattr(x, "shape"):
        return mask
    check_truth(name, mask)
    if mask.shape != jnp.shape(x)[: mask.ndim] and not of_queries(x, mask):
        raise ValueError(f"{name}: the mask has shape {mask.shape}, which does not fit x of shape {jnp.shape(x)}")
    return mask


def by_position(name: str, x: Any, mask: Any) -> Any:
    """The rule of a layer that treats each position by itself. ValueError if the mask does not fit x."""
    if mask is not None and hasattr(x, "shape"):
        check_truth(name, mask)
        if mask.ndim >= jnp.ndim(x) and not of_queries(x, mask):
            raise ValueError(
                f"{name}: the mask of shape {mask.shape} speaks of positions, x of shape {jnp.shape(x)} has none that "
                "this layer keeps apart; x must be (m, *positions, features)"
            )
    return elementwise(name, x, mask)


def refused(name: str, x: Any, mask: Any) -> Any:
    """The rule of a layer for which no meaning of a mask is defined: TypeError if there is one."""
    if mask is not None:
        raise TypeError(
            f"{name}: no meaning of a mask (Context.mask, or ragged) is defined for this layer, so it cannot leave out "
            'positions; a layer of your own declares one: stateless(..., mask="position"), or Traits(mask=...)'
        )
    return None


RULES = {"elementwise": elementwise, "position": by_position}


def kept(mask: Any, x: Any) -> Any:
    """x, and 0 at positions that do not count."""
    if mask is None or not hasattr(x, "ndim") or of_queries(x, mask) or mask.ndim > x.ndim:
        return x
    counts = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    with_values = concrete(mask) and concrete(x)
    if not with_values:
        return jnp.where(counts, x, jnp.zeros((), x.dtype))
    with jax.ensure_compile_time_eval():  # so that a check of values, as of tokens, sees them
        return jnp.where(counts, x, jnp.zeros((), x.dtype))


def of_positions(name: str, x: Any, mask: Any) -> Any:
    """The mask of the positions of x (m, *s, n) if there is one that speaks of them, with a last axis of 1."""
    by_position(name, x, mask)
    if mask is None or of_queries(x, mask):
        return None
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
