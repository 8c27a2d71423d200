"""Where the batches come from that are not on the device yet: an iterable, or arrays in the memory of the host."""

import base64
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.arrays.checks import describe

END = object()


class Batch(NamedTuple):
    """A batch on the host; counts (size,) tells which examples count, None if all do."""

    x: Any
    y: Any
    counts: np.ndarray | None


class Passes:
    """The batches of an iterable, pass after pass: the source of a Stream.

    batches  an iterable, or a function of the epoch that returns one      at  the number of the next batch
    each     how many batches a pass has; None if that is not known
    """

    def __init__(self, batches: Iterable[Any] | Callable[[int], Iterable[Any]], each: int | None):
        self.batches, self.each = batches, each
        self.by_epoch = callable(batches) and not hasattr(batches, "__iter__")
        self.at = self.turn = self.within = 0
        self.iterator: Iterator[Any] | None = None
        self.held: tuple[Batch, Any] | None = None  # drawn, but not handed out; and the position before it
        self.like: tuple[Any, int] | None = None  # forms of the first batch, and its size

    @property
    def once(self) -> bool:
        """True for an iterator, which begins only once."""
        return hasattr(self.batches, "__next__")

    def next(self) -> Batch:
        """The next batch. ValueError if there is none, or it does not fit the first."""
        batch = self.draw() if self.held is None else self.held[0]
        self.held = None
        self.at += 1
        return batch

    def hold(self, batch: Batch, position: Any) -> None:
        """Hand batch out again, as the next one, with what position was before it was drawn."""
        self.at -= 1
        self.held = batch, position

    def draw(self) -> Batch:
        """A batch of this pass, or the first of the next one."""
        for _ in range(2):
            if self.iterator is None:
                self.iterator, self.within = self.started(), 0
            whole = self.by_epoch and self.within == self.each
            pair = END if whole else self.advanced(self.iterator)
            if pair is not END:
                self.within += 1
                return self.checked(pair)
            self.end()
        raise ValueError(f"fit: epoch {self.turn} of the iterable has no batch")

    def started(self) -> Iterator[Any]:
        """The pass whose turn it is."""
        made: Any = self.batches(self.turn) if self.by_epoch else self.batches  # type: ignore[operator]
        if not hasattr(made, "__iter__"):
            raise TypeError(f"fit: batches(epoch) must return an iterable of batches, got {describe(made)}")
        return iter(made)

    def advanced(self, iterator: Iterator[Any]) -> Any:
        """What the iterator yields, or END; what it raises tells where."""
        try:
            return next(iterator, END)
        except Exception as error:
            error.add_note(f"fit: raised by the iterable of batches, at batch {self.at}")
            raise

    def end(self) -> None:
        """A pass is over. ValueError if it has ended early."""
        if self.once:
            raise ValueError(
                f"fit: the iterator ended after {self.at} batches, and more steps were asked for; it begins only once: "
                "give a list, a loader, or a function of the epoch"
            )
        if not self.within:
            raise ValueError(f"fit: epoch {self.turn} of the iterable has no batch")
        if self.each is not None and self.within != self.each:
            raise ValueError(f"fit: epoch {self.turn} ended after {self.within} batches, expected {self.each}")
        self.turn, self.iterator = self.turn + 1, None

    def checked(self, pair: Any) -> Batch:
        """The batch as NumPy arrays, filled up to the size of the first. ValueError or TypeError if it does not fit."""
        name = f"fit: batch {self.at}"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair (x, y), got {describe(pair)}")
        x, y = jax.tree.map(lambda a: np.asarray(a), tuple(pair))
        sizes = {a.shape[:1] for a in jax.tree.leaves((x, y))}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise ValueError(f"{name} needs equally many examples in x and y, at least 1; got {sorted(sizes)}")
        check_numbers(name, x, y)
        form = jax.tree.map(lambda a: (a.shape[1:], str(a.dtype)), (x, y))
        (m,) = sizes.pop()
        if self.like is None:
            self.like = form, m
        due, size = self.like
        if form != due:
            raise ValueError(f"{name} holds {shown(form)} for each example; the first batch held {shown(due)}")
        if m > size:
            raise ValueError(f"{name} has {m} examples, more than the first, which had {size}")
        if m == size:
            return Batch(x, y, None)
        rows = np.arange(size)
        x, y = jax.tree.map(lambda a: a[rows % m], (x, y))
        return Batch(x, y, rows < m)

    def peek(self) -> Batch:
        """The next batch, which stays the next."""
        position = self.position()
        batch = self.next()
        self.hold(batch, position)
        return batch

    def position(self) -> Any:
        """Where the next batch is, as JSON, if the iterator can tell, as those of grain do; else None."""
        if self.held is not None:
            return self.held[1]
        told = None
        if self.iterator is not None:
            if not hasattr(self.iterator, "get_state") or not hasattr(self.iterator, "set_state"):
                return None
            told = encoded(self.iterator.get_state())  # type: ignore[attr-defined]
        return {"at": self.at, "turn": self.turn, "within": self.within, "state": told}

    def seek(self, step: int, position: Any, anew: bool) -> None:
        """Go to the batch of a step.

        position: where an earlier run says that it is. anew: an iterator is at its beginning; else it goes on where it
        is.
        """
        if position is not None:
            self.at, self.turn, self.within, self.held = position["at"], position["turn"], position["within"], None
            self.iterator = None if position["state"] is None else self.started()
            if self.iterator is not None:
                self.iterator.set_state(decoded(position["state"]))  # type: ignore[attr-defined]
        elif self.once and not anew:
            self.at = step
        elif self.each is not None and not self.once and step >= self.each:
            self.turn, self.iterator, self.held = step // self.each, None, None
            self.at = self.turn * self.each
        while self.at < step:
            self.next()


class Rows:
    """Batches of arrays that stay in the memory of the host, or in a mapped file: the source of Batches(host=True).

    order  the epoch -> the order of its examples      size  of a batch
    """

    def __init__(self, x: Any, y: Any, size: int, examples: int, drop_last: bool, order: Callable[[int], np.ndarray]):
        self.x, self.y, self.size, self.examples, self.order = x, y, size, examples, order
        self.each = examples // size + (bool(examples % size) and not drop_last)
        self.at, self.epoch = 0, -1
        self.rows = np.arange(examples)

    def next(self) -> Batch:
        """The batch of step at: a part of the epoch's order; the last one begins again at its front."""
        epoch, number = divmod(self.at, self.each)
        if epoch != self.epoch:
            self.epoch, self.rows = epoch, self.order(epoch)
        places = number * self.size + np.arange(self.size)
        x, y = jax.tree.map(lambda a: np.asarray(a[self.rows[places % self.examples]]), (self.x, self.y))
        check_numbers(f"fit: batch {self.at}", x, y)
        self.at += 1
        return Batch(x, y, places < self.examples if places[-1] >= self.examples else None)

    def hold(self, batch: Batch, position: Any) -> None:
        """Hand batch out again."""
        self.at -= 1

    def peek(self) -> Batch:
        """The first batch, which stays the first."""
        batch = self.next()
        self.at, self.epoch = 0, -1
        return batch

    def position(self) -> None:
        """The step says all."""

    def seek(self, step: int, position: Any, anew: bool) -> None:
        """Go to the batch of a step."""
        self.at = step


def check_numbers(name: str, x: Any, y: Any) -> None:
    """ValueError, with the first place, if a batch holds NaN or infinity."""
    for what, tree in (("x", x), ("y", y)):
        for leaf in jax.tree.leaves(tree):
            if leaf.dtype.kind in "fc" and not np.isfinite(leaf).all():
                first = tuple(int(i) for i in np.argwhere(~np.isfinite(leaf))[0])
                raise ValueError(f"{name}: {what} holds {leaf[first]} at index {first}")
            if leaf.dtype.kind in "OSU":
                raise TypeError(f"{name}: {what} must be numbers, got {describe(leaf)}")


def shown(form: Any) -> str:
    """The forms of x and y of an example."""
    leaves = jax.tree.leaves(form, is_leaf=lambda node: isinstance(node, tuple) and isinstance(node[-1], str))
    return ", ".join(f"{dtype} {shape}" for shape, dtype in leaves)


def encoded(state: Any) -> Any:
    """What an iterator says of its place, as JSON."""
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}


def decoded(told: Any) -> Any:
    """What the iterator had said."""
    return base64.b64decode(told["bytes"]) if "bytes" in told else told["json"]
