"""A row says where one array of another library stands in a layer of ours, and in which order of axes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Held = Mapping[str, Any]  # of one layer: its parameters and its state by name, arrays or only their shapes


class Order(NamedTuple):
    """The order of axes in the other library: there and back, for an array of any number of axes."""

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def moving(source: int, target: int) -> Order:
    """One axis moves: there from source to target."""
    return Order(lambda a: np.moveaxis(a, source, target), lambda a: np.moveaxis(a, target, source))


SAME = Order(lambda a: a, lambda a: a)
TURNED = Order(lambda a: a.T, lambda a: a.T)  # (n_out, n_in) as (n_in, n_out)
CHANNELS_SECOND = moving(-1, 1)  # (n_out, *kernel, n_in) as (n_out, n_in, *kernel)
OUT_LAST = moving(0, -1)  # (n_out, *kernel, n_in) as (*kernel, n_in, n_out)
MOST = np.iinfo(np.int32).max
# a count of steps, there of any size and 0 for statistics that were set by hand: what stands in a state is in use
COUNT = Order(lambda a: a.astype(np.int64), lambda a: np.clip(a.astype(np.float64), 1, MOST).astype(np.int64))
# a kernel (n_in, *kernel, n_out) that is transposed, as one that is not: (*kernel, n_in, n_out), offsets reversed
REVERSED = Order(
    lambda a: np.moveaxis(np.flip(a, tuple(range(1, a.ndim - 1))), 0, -2),
    lambda a: np.flip(np.moveaxis(a, -2, 0), tuple(range(1, a.ndim - 1))),
)


def split_out(heads: int) -> Order:
    """(heads d, n) as (n, heads, d)."""
    return Order(lambda a: a.T.reshape(a.shape[1], heads, -1), lambda a: a.reshape(a.shape[0], -1).T)


def split_in(heads: int) -> Order:
    """(n, heads d) as (heads, d, n)."""
    return Order(lambda a: a.T.reshape(heads, -1, a.shape[0]), lambda a: a.reshape(-1, a.shape[-1]).T)


def split(heads: int) -> Order:
    """(heads d,) as (heads, d)."""
    return Order(lambda a: a.reshape(heads, -1), lambda a: a.reshape(-1))


@dataclass(frozen=True)
class Piece:
    """A leaf of ours, or part i of its n along the first axis.

    plus  a second leaf: there is only the sum of both, and from there the second one is 0
    like  the layer has no such leaf: there it is 0, of the shape of that one, and from there it is dropped
    """

    leaf: str
    part: tuple[int, int] = (0, 1)
    plus: str | None = None
    like: str | None = None

    def size(self, held: Held) -> int:
        """The number of rows."""
        return held[self.leaf if self.leaf in held else str(self.like)].shape[0] // self.part[1]

    def of(self, held: Held) -> np.ndarray:
        """The array."""
        if self.leaf not in held:
            return np.zeros_like(held[str(self.like)])
        whole = held[self.leaf]
        i, n = self.part
        rows = slice(None) if n == 1 else slice(i * len(whole) // n, (i + 1) * len(whole) // n)
        taken = whole if n == 1 else whole[rows]
        return taken if self.plus is None else taken + held[self.plus][rows]


@dataclass(frozen=True)
class Row:
    """One array of another library: pieces of ours, one after the other along the first axis, in its order of axes."""

    theirs: str
    pieces: tuple[Piece, ...]
    order: Order = SAME

    def there(self, held: Held) -> np.ndarray:
        """The array of the other library."""
        pieces = [piece.of(held) for piece in self.pieces]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return np.array(self.order.there(whole), order="C")

    def shape(self, held: Held) -> tuple[int, ...]:
        """The shape of the array of the other library."""
        nothing = {leaf: np.broadcast_to(np.zeros((), bool), a.shape) for leaf, a in held.items()}
        pieces = [piece.of(nothing) for piece in self.pieces]
        return self.order.there(pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).shape

    def back(self, held: Held, theirs: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each piece, and the array of it."""
        whole = self.order.back(theirs)
        if len(self.pieces) == 1:
            yield self.pieces[0], whole
            return
        ends = np.cumsum([piece.size(held) for piece in self.pieces])
        yield from zip(self.pieces, np.split(whole, ends[:-1]), strict=True)

    def stands_for(self, held: Held) -> bool:
        """True if the layer has what this row is about: a layer with b=None has no row for its bias."""
        return any(piece.leaf in held or piece.like in held for piece in self.pieces)


def row(theirs: str, *ours: str | Piece, order: Order = SAME) -> Row:
    """The array theirs, of these leaves."""
    return Row(theirs, tuple(Piece(one) if isinstance(one, str) else one for one in ours), order)


@dataclass(frozen=True)
class Counterpart:
    """What a layer is in another library.

    rows       each array of it
    otherwise  what a leaf is if no array is there for it; its rows may be absent
    zero       pieces that have no place there: they must be 0, and from there they are
    suffix     what the names end in, beside the module's: "_l0"
    """

    rows: tuple[Row, ...]
    otherwise: Mapping[str, Any] = field(default_factory=dict)
    zero: tuple[Piece, ...] = ()
    suffix: str = ""

    def of(self, held: Held) -> tuple[Row, ...]:
        """The rows of a layer that has these leaves."""
        return tuple(one for one in self.rows if one.stands_for(held))

    def optional(self, one: Row) -> bool:
        """True if the array may be absent."""
        return all(piece.leaf in self.otherwise for piece in one.pieces)

    def there(self, held: Held) -> dict[str, np.ndarray]:
        """The arrays of the other library. ValueError if ours has what has no place there."""
        for piece in self.zero:
            if np.any(piece.of(held)):
                i, n = piece.part
                raise ValueError(f"part {i + 1} of {n} of its {piece.leaf} must be 0: there is no place for it there")
        return {one.theirs: one.there(held) for one in self.of(held)}

    def back(self, held: Held, theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves, of the arrays that are there; a leaf that none of them tells is not in the result."""
        found = {leaf: np.full(held[leaf].shape, value) for leaf, value in self.otherwise.items() if leaf in held}
        parts: dict[str, dict[int, np.ndarray]] = {}
        for one in self.of(held):
            if one.theirs in theirs:
                for piece, array in one.back(held, theirs[one.theirs]):
                    parts.setdefault(piece.leaf, {})[piece.part[0]] = array
                    if piece.plus is not None:
                        parts.setdefault(piece.plus, {})[piece.part[0]] = np.zeros_like(array)
        for piece in self.zero:
            i, n = piece.part
            parts[piece.leaf][i] = np.zeros((held[piece.leaf].shape[0] // n, *held[piece.leaf].shape[1:]))
        for leaf, pieces in parts.items():
            if leaf in held:
                found[leaf] = pieces[0] if len(pieces) == 1 else np.concatenate([pieces[i] for i in sorted(pieces)])
        return found
