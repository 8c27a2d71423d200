"""What each call of the compiled loop reads: all examples, on the device, or a chunk of batches that came just now."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fnbp.arrays.checks import as_arrays
from fnbp.processes import check_alike, least, put_whole
from fnbp.training.loop import Data, Marked
from fnbp.training.progress import Stop
from fnbp.training.sources import Batch, Passes, Rows

CHUNK_BYTES = 1 << 23  # of the batches that are brought to the device at once
CHUNK_BATCHES = 128
FILL_SECONDS = 0.1  # a chunk is handed on, however few batches it has, when so much time has passed
CLOSE_SECONDS = 5.0  # how long to wait for the batch that is being drawn when fit ends


class Call(NamedTuple):
    """A call of the compiled loop: run(*at, data, limit, threshold)."""

    run: Callable
    data: Data
    limit: int


class Resident:
    """All examples lie on the device, and one call may pass through many epochs of them."""

    def __init__(self, run: Callable, number: int | None, x: Any, y: Any, examples: int):
        self.run, self.number, self.x, self.y, self.examples = run, number, x, y, examples
        self.data: Data | None = None

    def begin(self, data: Data, start: int, last: int, position: Any, anew: bool) -> None:
        """Every call reads the same data."""
        self.data = data._replace(x=self.x, y=self.y)

    def call(self, step: int, limit: int, stop: Stop) -> Call | None:
        """The call that goes on from step."""
        assert self.data is not None
        return Call(self.run, self.data, limit)

    def position(self, step: int) -> Any:
        """The step says all."""

    def rest(self, step: int) -> tuple[Batch, ...]:
        """None: all examples are still there."""
        return ()

    def fault(self, step: int) -> str:
        """Nothing: all examples were checked."""
        return ""

    def close(self) -> None:
        """Nothing was begun."""


class Drawn(NamedTuple):
    """A batch, and the positions of the source before it and behind it; or what the source raised."""

    batch: Batch | BaseException
    before: Any = None
    behind: Any = None


class Chunk(NamedTuple):
    """The batches of the steps from first up to stop, stacked; positions: of the source before each, and at the end."""

    batches: list[Batch]
    first: int
    stop: int
    x: Any
    y: Any
    counts: Any
    positions: list[Any]


class Streamed:
    """Batches come from a source, a chunk at a time; they are drawn in a thread, ahead of the training.

    runs: the compiled loop for whole batches, and for batches of which some examples do not count. place: where on a
    mesh each batch lies, or None; of several processes each draws the same batches. check(name, x, y) raises ValueError
    or TypeError if a batch does not fit the net or the loss.
    """

    examples = 0  # on the device, to be put in order

    def __init__(
        self,
        runs: tuple[Callable, Callable],
        number: int | None,
        source: Passes | Rows,
        most: int,
        place: NamedSharding | None,
        check: Callable[[str, Any, Any], Any],
    ):
        self.runs, self.number, self.source, self.most, self.place, self.check = (
            runs, number, source, most, place, check,
        )  # fmt: skip
        self.data: Data | None = None
        self.chunk: Chunk | None = None  # on the device
        self.ahead: Chunk | None = None  # on the device, too
        self.drawn: deque[Drawn] = deque()
        self.changed, self.closed, self.last = threading.Condition(), False, 0
        self.shared = place is not None and not place.is_fully_addressable
        self.sought: tuple[int, Any, bool] = 0, None, False
        self.thread = threading.Thread(target=self.draw, daemon=True, name="fnbp batches")

    def begin(self, data: Data, start: int, last: int, position: Any, anew: bool) -> None:
        """Go to the batch of step start, and begin to draw."""
        self.data, self.last = data, last
        self.sought = start, position, anew
        self.thread.start()

    def draw(self) -> None:
        """Go to the first batch, then draw batch after batch, at most two chunks ahead."""
        batch, behind = self.drawn_from(lambda: self.source.seek(*self.sought, stopped=lambda: self.closed))
        while isinstance(batch, BaseException) or (self.source.at < self.last and not self.closed):
            before = behind
            if not isinstance(batch, BaseException):
                batch, behind = self.drawn_from(self.source.next)
            with self.changed:
                self.drawn.append(Drawn(batch, before, behind))
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.closed or len(self.drawn) < 2 * self.most)
            if isinstance(batch, BaseException):
                return

    def drawn_from(self, draw: Callable[[], Any]) -> tuple[Any, Any]:
        """What draw returns, or raises, and the position of the source behind it."""
        try:
            return draw(), self.source.position()
        except BaseException as error:
            return error, None

    def call(self, step: int, limit: int, stop: Stop) -> Call | None:
        """The call that goes on from step; None if a signal came while the batches did not."""
        assert self.data is not None
        if self.chunk is None or step >= self.chunk.stop:
            chunk, self.ahead = self.ahead or self.take(step, stop), None
            if chunk is None:
                return None
            self.chunk = chunk
        chunk = self.chunk
        ready = len(self.drawn) >= min(self.most, self.last - chunk.stop) > 0 and not self.shared
        if self.ahead is None and ready and isinstance(self.drawn[0].batch, Batch):
            self.ahead = self.take(chunk.stop, stop)  # copied while the device works
        y = chunk.y if chunk.counts is None else Marked(chunk.y, chunk.counts)
        data = self.data._replace(x=chunk.x, y=y, first=np.int32(chunk.first))
        return Call(self.runs[chunk.counts is not None], data, min(limit, chunk.stop))

    def take(self, first: int, stop: Stop) -> Chunk | None:
        """A chunk of the batches that were drawn: whole ones, or one that is not whole. None if a signal came first.

        What the source raised is raised when its turn has come. Of several processes each takes as many.
        """
        taken = self.waited(first, stop)
        failed = bool(taken) and isinstance(taken[0].batch, BaseException)
        number = 0 if failed else len(taken)
        if self.shared:
            number = least(number)
        with self.changed:
            self.drawn.extendleft(reversed(taken[number:]))
        if failed and isinstance(error := taken[0].batch, BaseException):
            raise error
        return self.stacked(first, taken[:number]) if number else None

    def waited(self, first: int, stop: Stop) -> list[Drawn]:
        """The batches of the next chunk, or what the source raised instead; none if a signal came first."""
        until = time.perf_counter() + FILL_SECONDS
        with self.changed:
            while not self.drawn or (len(self.drawn) < min(self.most, self.last - first) and not self.failed):
                late = time.perf_counter() > until
                if self.drawn and late:
                    break
                if stop.reason:
                    return []
                self.changed.wait(0.05)
            taken = [self.drawn.popleft()]
            while self.drawn and len(taken) < self.most and is_whole(taken[-1]) and is_whole(self.drawn[0]):
                taken.append(self.drawn.popleft())
            self.changed.notify_all()
        return taken

    @property
    def failed(self) -> bool:
        """True if nothing more will be drawn."""
        return bool(self.drawn) and isinstance(self.drawn[-1].batch, BaseException)

    def stacked(self, first: int, taken: list[Drawn]) -> Chunk:
        """Batches under one more axis, as long as that of every chunk, so that the loop is compiled once."""
        batches = [one.batch for one in taken if isinstance(one.batch, Batch)]
        stop, positions = first + len(batches), [*(one.before for one in taken), taken[-1].behind]
        most = self.most if is_whole(taken[0]) else 1
        x, y = (under_one(most, trees) for trees in ([one.x for one in batches], [one.y for one in batches]))
        counts = None if is_whole(taken[0]) else under_one(1, [batches[0].counts])
        if self.place is None:
            x, y = jax.tree.map(jnp.asarray, (x, y))
        else:
            if self.shared:
                check_alike("fit", {f"batches from {first} on": (x, y, counts)})
            where = NamedSharding(self.place.mesh, PartitionSpec(None, *self.place.spec))
            x, y, counts = put_whole((x, y, counts), where)
        return Chunk(batches, first, stop, x, y, counts, positions)

    def position(self, step: int) -> Any:
        """Where the batch of a step is, for a source that can tell; else None."""
        chunk = self.chunk
        if chunk is None or not chunk.first <= step <= chunk.stop:
            return None
        return chunk.positions[step - chunk.first]

    def rest(self, step: int) -> tuple[Batch, ...]:
        """The batches from a step on that an iterator, which begins only once, has yielded. Ask behind close."""
        if not self.source.once:
            return ()
        chunks = [chunk for chunk in (self.chunk, self.ahead) if chunk is not None]
        batches = [batch for chunk in chunks for batch in chunk.batches[max(0, step - chunk.first) :]]
        with self.changed:  # a loader that hangs may end now
            drawn = [one.batch for one in self.drawn if isinstance(one.batch, Batch)]
        return (*batches, *drawn, *self.source.rest())

    def fault(self, step: int) -> str:
        """What does not fit in the batch of a step, or "". Later batches than the first are looked at only then."""
        chunk = self.chunk
        if chunk is None or not chunk.first <= step < chunk.stop:
            return ""
        x, y, _ = chunk.batches[step - chunk.first]
        try:
            self.check(f"batch {step}", as_arrays("fit", "x", x), as_arrays("fit", "y", y))
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Draw no more; wait for the batch that is being drawn, since an iterator cannot be used twice at once."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join(CLOSE_SECONDS)


def is_whole(drawn: Drawn) -> bool:
    """True for a batch of which all examples count."""
    return isinstance(drawn.batch, Batch) and drawn.batch.counts is None


def under_one(most: int, trees: list[Any]) -> Any:
    """Trees of arrays stacked, and filled up with zeros to most of them."""

    def stack(*leaves):
        whole = np.zeros((most, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            whole[i] = leaf
        return whole

    return jax.tree.map(stack, *trees)


def batches_at_once(batch: Any) -> int:
    """How many batches make a chunk."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return max(1, min(CHUNK_BATCHES, CHUNK_BYTES // max(size, 1)))
