"""How a layer goes along a sequence that comes one position at a time, with what it keeps of the earlier ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Steps"]


@dataclass(frozen=True)
class Steps:
    """State how a layer takes a sequence in steps: Traits(steps=Steps(first, then)).

        first (params, state, x, length) -> y, kept    x (m, T, ...), the first positions, of length in all
        then  (params, state, kept, x)   -> y, kept    x (m, 1, ...), the position behind them

    y is what forward returns at these positions, at inference and without a mask. So no later position may change an
    earlier y. kept is a tree of arrays, whose shapes and dtypes stay. A layer that treats each position by itself,
    wherever it stands, needs no steps.
    """

    first: Callable[..., tuple[Any, Any]]
    then: Callable[..., tuple[Any, Any]]
