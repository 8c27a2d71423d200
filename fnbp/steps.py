"""How a layer goes along a sequence: one position at a time, with what it keeps of the earlier ones, or all at once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Steps"]


@dataclass(frozen=True)
class Whole:
    """How fnbp.scan runs a cell over a whole sequence without a mask, faster than turn by turn; with_whole states it.

        forward  (params, h_0, x, reverse)        -> h_T, y, res
        backward (params, res, dh_T, dy, reverse) -> factors, dh_0, dx

    least: how many positions it takes at least. cell: forward and backward of the cell that it equals; a cell with
    other functions, a backward of a user's own for example, is run turn by turn.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    least: int = 1
    cell: tuple[Callable, Callable] | None = None

    def fits(self, cell: Any) -> bool:
        """True if it equals this cell."""
        return self.cell == (cell.forward, cell.backward)


def with_whole(cell: Any, whole: Whole) -> Any:
    """A cell that states how it is run over a whole sequence."""
    whole = replace(whole, cell=(cell.forward, cell.backward))
    return cell._replace(traits=replace(cell.traits, whole=whole))


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
