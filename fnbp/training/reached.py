"""What training has reached: a Fit at its end, and at any moment before, so that nothing computed is lost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from fnbp.training.loop import Carry, copy
from fnbp.training.progress import Stop


class History(NamedTuple):
    """What happened, step by step.

    loss             J of each step's batch, (steps,); where one was not finite, it is the last
    validation_step  after how many steps validation_loss was measured, (validations,)
    seconds          wall time of the whole, compilation included
    """

    loss: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray
    seconds: float


class Best(NamedTuple):
    """The parameters of the least validation loss."""

    params: Any
    state: Any
    step: int
    loss: float


class Fit(NamedTuple):
    """Where training ended.

    params, state, opt_state   as reached, all finite; opt_state may hold infinities that it began with
    step      how many updates were made of them
    stopped   "steps", "threshold", "patience", "non-finite", "interrupt" (Ctrl-C), "terminated" (SIGTERM), or "error"
    message   the same in a sentence
    best      of the validations, or None without validation
    waited    how many epochs in a row, up to the last, brought no new least validation loss
    least     the least validation loss at the end of an epoch, with which patience compares
    """

    params: Any
    state: Any
    opt_state: Any
    step: int
    history: History
    stopped: str
    message: str
    best: Best | None
    waited: int = 0
    least: float = np.inf


class Resumed(NamedTuple):
    """Where a fit continues."""

    opt_state: Any
    step: int
    best: Best | None
    waited: int
    least: float


class Reached:
    """What training has reached at any moment: never donated, and consistent whenever it is read."""

    def __init__(self, params: Any, state: Any, opt_state: Any, start: Any):
        self.began, self.training = time.perf_counter(), False
        self.now: tuple[Any, int, int] = (
            (params, state, opt_state),
            start,
            0,
        )  # values; their step; how many calls brought them
        self.losses: list[np.ndarray] = []
        self.validations: list[tuple[int, float]] = []
        self.best: Best | None = None
        self.waited, self.least = 0, np.inf

    def begin(self, carry: Carry, resume: Resumed) -> None:
        """From here on there is something to lose."""
        self.now = ((carry.params, carry.state, carry.opt_state), int(resume.step), 0)
        self.best, self.waited, self.least, self.training = resume.best, resume.waited, resume.least, True

    @property
    def step(self) -> int:
        return self.now[1]

    def advance(self, carry: Carry, step: int, losses: np.ndarray) -> None:
        """A call is over. now changes in one piece, so that an exception finds the one or the other."""
        self.losses.append(losses)
        self.now = ((carry.params, carry.state, carry.opt_state), step, len(self.losses))

    def hold(self, carry: Carry) -> None:
        """The same values in other buffers: those that were handed out are about to be donated."""
        self.now = ((carry.params, carry.state, carry.opt_state), *self.now[1:])

    def measure(self, measured: float, whole: bool) -> None:
        """A validation is over. Only one at the end of a whole epoch counts for patience, as an uninterrupted run has
        it: patience then runs out at the same step, however often a run was resumed."""
        (params, state, _), step, _ = self.now
        finite = bool(np.isfinite(measured))
        if finite and (self.best is None or measured < self.best.loss):
            self.best = Best(copy(params), copy(state), step, measured)
        if whole:
            new = finite and measured < self.least
            self.waited, self.least = (0, measured) if new else (self.waited + 1, self.least)
        self.validations.append((step, measured))

    def fit(self, stopped: str, message: str) -> Fit:
        """All of it, as it is handed back."""
        (params, state, opt_state), step, calls = self.now
        steps, measured = zip(*self.validations, strict=True) if self.validations else ((), ())
        losses = np.concatenate(self.losses[:calls]) if calls else np.zeros(0, np.float32)
        seconds = time.perf_counter() - self.began
        history = History(losses, np.asarray(steps, int), np.asarray(measured, float), seconds)
        return Fit(params, state, opt_state, step, history, stopped, message, self.best, self.waited, self.least)


@contextmanager
def nothing_lost(reached: "Reached", stop: Stop) -> Iterator["Reached"]:
    """An exception of the training, or Ctrl-C before it, bears what was reached in its attribute fit."""
    try:
        yield reached
        stop.closing = True  # a second Ctrl-C would lose the Fit now
    except BaseException as error:
        stop.closing = True
        if reached.training or isinstance(error, KeyboardInterrupt):
            error.fit = reached.fit("error", f"{type(error).__name__} after step {reached.step}")  # type: ignore[attr-defined]
            error.add_note(f"fit: what was reached, until step {reached.step}, is in this exception's attribute fit")
        raise


def ended(found: Fit, reason: str) -> Fit:
    """The Fit, with the signal that came meanwhile, if one did, as the reason of its end."""
    if not reason:
        return found
    besides = f"; besides, {found.message}" if found.message else ""
    word = {"interrupt": "interrupted", "terminated": "terminated"}[reason]
    return found._replace(stopped=reason, message=f"{word} after step {found.step}{besides}")
