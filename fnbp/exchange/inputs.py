"""An input that a layer takes, as its arguments and leaves tell: for the table, to ask whether leaves belong to it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.exchange.rows import Held

Arguments = Mapping[str, Any]
FLOAT = jnp.float32  # of the inputs: only shapes are compared


def last(held: Held, leaf: str) -> int:
    """The last axis of a leaf; 1 if there is none."""
    shape = held[leaf].shape if leaf in held else ()
    return shape[-1] if shape else 1


def features(leaf: str, *before: int) -> Callable[[Arguments, Held], Any]:
    """An input whose features are the last axis of a leaf."""
    return lambda arguments, held: jax.ShapeDtypeStruct((*before, last(held, leaf)), FLOAT)


def cell_input(arguments: Arguments, held: Held) -> Any:
    """(h, x) of a cell."""
    return None, features("W", 1)(arguments, held)


def sequences(arguments: Arguments, held: Held) -> Any:
    """A sequence or, where K has a width of its own, a pair of sequences."""
    x, memory = (features(leaf, 1, 1)(arguments, held) for leaf in "QK")
    return x if x.shape == memory.shape else (x, memory)


def images(axis: int) -> Callable[[Arguments, Held], Any]:
    """An image of one window, and more where the padding takes some away. axis: of W, the one of the channels."""

    def of(arguments: Arguments, held: Held) -> Any:
        W = held["W"].shape if "W" in held else (1, 1, 1)
        kernel, padding = arguments["kernel"], arguments["padding"]
        spatial = len(kernel) if isinstance(kernel, (tuple, list)) else max(1, len(W) - 2)
        around = 0 if isinstance(padding, str) else int(np.sum(padding))
        size = int(np.max(kernel)) * int(np.max(arguments["dilation"])) + 2 * around
        groups = arguments["groups"] if axis == -1 else 1
        channels = W[axis] * groups if W else groups
        return jax.ShapeDtypeStruct((1, *[size] * spatial, channels), FLOAT)

    return of


def tokens(arguments: Arguments, held: Held) -> Any:
    """One token."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)
