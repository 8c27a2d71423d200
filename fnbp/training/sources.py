"""Where the batches come from that are not on the device yet: an iterable, or arrays in the memory of the host."""

import base64
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_representable, describe

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
    ahead    batches that were drawn and not handed out yet, and the position before each
    tells    True to ask the iterator for its position
    """

    tells = False

    def __init__(self, batches: Iterable[Any] | Callable[[int], Iterable[Any]], each: int | None):
        self.batches, self.each = batches, each
        self.by_epoch = callable(batches) and not hasattr(batches, "__iter__")
        self.at = self.turn = self.within = 0
        self.iterator: Iterator[Any] | None = None
        self.ahead: deque[tuple[Batch, Any]] = deque()
        self.like: tuple[Any, int] | None = None  # forms of the first batch, and its size

    @property
    def once(self) -> bool:
        """True for an iterator, which begins only once."""
        return hasattr(self.batches, "__next__")

    def next(self) -> Batch:
        """The next batch. ValueError if there is none, or it does not fit the first."""
        batch = self.ahead.popleft()[0] if self.ahead else self.draw()
        self.at += 1
        return batch

    def take(self, batches: Iterable[Batch]) -> None:
        """Of an iterator hand these out first: an earlier fit has drawn them, and not trained on them."""
        self.ahead.extend((batch, None) for batch in batches if self.once)
        if self.ahead:
            x, y, _ = self.ahead[0][0]
            self.like = form_of(x, y), jax.tree.leaves(x)[0].shape[0]

    def rest(self) -> tuple[Batch, ...]:
        """What was drawn and not handed out."""
        return tuple(batch for batch, _ in self.ahead)

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
        x, y = jax.tree.map(np.array, tuple(pair))  # a loader may write its next batch over this one
        sizes = {a.shape[:1] for a in jax.tree.leaves((x, y))}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise ValueError(f"{name} needs equally many examples in x and y, at least 1; got {sorted(sizes)}")
        check_numbers(name, x, y)
        form = form_of(x, y)
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
        self.at -= 1
        self.ahead.appendleft((batch, position))
        return batch

    def position(self) -> Any:
        """Where the next batch is, as JSON, if the iterator can tell, as those of grain do; else None."""
        if self.ahead:
            return self.ahead[0][1]
        if not self.tells:
            return None
        told = None
        if self.iterator is not None:
            if not hasattr(self.iterator, "get_state") or not hasattr(self.iterator, "set_state"):
                return None
            told = encoded(self.iterator.get_state())  # type: ignore[attr-defined]
        return {"at": self.at, "turn": self.turn, "within": self.within, "state": told}

    def seek(self, step: int, position: Any, anew: bool, stopped: Callable[[], bool]) -> None:
        """Go to the batch of a step.

        position: where an earlier run says that it is. anew: an iterator is at its beginning; else it goes on where it
        is. stopped: whether to give up.
        """
        if position is not None:
            self.at, self.turn, self.within = position["at"], position["turn"], position["within"]
            self.ahead.clear()
            self.iterator = None if position["state"] is None else self.started()
            if self.iterator is not None:
                self.iterator.set_state(decoded(position["state"]))  # type: ignore[attr-defined]
        elif self.once and not anew:
            self.at = step
        elif self.each is not None and step >= self.each and (self.by_epoch or isinstance(self.batches, list)):
            self.turn, self.iterator = step // self.each, None  # other loaders may shuffle in each pass
            self.at = self.turn * self.each
            self.ahead.clear()
        while self.at < step and not stopped():
            self.next()


class Rows:
    """Batches of arrays that stay in the memory of the host, or in a mapped file: the source of Batches(host=True).

    order  the epoch -> the order of its examples      size  of a batch
    """

    once = tells = False

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

    def take(self, batches: Iterable[Batch]) -> None:
        """All are still there."""

    def rest(self) -> tuple[Batch, ...]:
        """Nothing is lost."""
        return ()

    def peek(self) -> Batch:
        """The first batch, which stays the first."""
        batch = self.next()
        self.at, self.epoch = 0, -1
        return batch

    def position(self) -> None:
        """The step says all."""

    def seek(self, step: int, position: Any, anew: bool, stopped: Callable[[], bool]) -> None:
        """Go to the batch of a step."""
        self.at = step


def check_numbers(name: str, x: Any, y: Any) -> None:
    """ValueError, with the first place, if a batch holds NaN or infinity, or what the device has no number for."""
    for what, tree in (("x", x), ("y", y)):
        check_representable(name, what, tree)
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all():
                first = tuple(int(i) for i in np.argwhere(~np.isfinite(leaf))[0])
                raise ValueError(f"{name}: {what} holds {leaf[first]} at index {first}")
            if leaf.dtype.kind in "OSU":
                raise TypeError(f"{name}: {what} must be numbers, got {describe(leaf)}")


def form_of(x: Any, y: Any) -> Any:
    """The shape and dtype of an example, for each array."""
    return jax.tree.map(lambda a: (a.shape[1:], str(a.dtype)), (x, y))


def shown(form: Any) -> str:
    """The forms of x and y of an example."""
    leaves = jax.tree.leaves(form, is_leaf=lambda node: isinstance(node, tuple) and isinstance(node[-1], str))
    return ", ".join(f"{dtype} {shape}" for shape, dtype in leaves)


def encoded(state: Any) -> Any:
    """What an iterator says of its place, as JSON."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        return {"json": json.loads(json.dumps(state, default=lambda number: number.item()))}  # as it is now
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"fit: get_state of the iterator must return bytes, or what JSON has: {error}") from error


def decoded(told: Any) -> Any:
    """What the iterator had said."""
    return base64.b64decode(told["bytes"]) if "bytes" in told else told["json"]
