"""What training has reached: a Fit at its end, and at any moment before, so that nothing computed is lost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.training.loop import Carry, copy
from fnbp.training.progress import Stop
from fnbp.training.sources import Batch


class History(NamedTuple):
    """What happened, step by step.

    loss             J of each step's batch, (steps,); where one was not finite, it is the last
    validation_step  after how many steps validation_loss was measured, (validations,)
    seconds          wall time of the whole, compilation included
    metrics          by name, each as measured with validation_loss, (validations, ...)
    recorded         by name, what record made of each step, (steps,)
    start            how many steps were made before the first of loss
    """

    loss: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray
    seconds: float
    metrics: dict[str, np.ndarray] = {}  # noqa: RUF012, never written to
    recorded: dict[str, np.ndarray] = {}  # noqa: RUF012
    start: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: lists of numbers, None where one is not finite."""
        return {name: as_json(value) for name, value in self._asdict().items()}

    def steps(self) -> dict[str, np.ndarray]:
        """Columns of a table with a row a step: pandas.DataFrame(history.steps())."""
        return {"step": self.start + 1 + np.arange(len(self.loss)), "loss": self.loss, **self.recorded}

    def validations(self) -> dict[str, np.ndarray]:
        """Columns of a table with a row a validation, of the metrics that are numbers."""
        plain = {name: values for name, values in self.metrics.items() if values.ndim == 1}
        return {"step": self.validation_step, "loss": self.validation_loss, **plain}


def as_json(value: Any) -> Any:
    """Arrays and dicts of them as lists, with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return [as_json(one) for one in value]
    number = value.item() if isinstance(value, np.generic) else value
    return number if np.isfinite(number) else None


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
    stopped   "steps", "threshold", "patience", "asked" (by on_epoch), "non-finite", "interrupt" (Ctrl-C), "terminated"
              (SIGTERM), or "error"
    message   the same in a sentence
    best      of the validations, or None without validation
    waited    how many epochs in a row, up to the last, brought no new least validation loss
    least     the least validation loss at the end of an epoch, with which patience compares
    ahead     batches that an iterator had yielded when training stopped; resume trains on them first
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
    ahead: tuple[Batch, ...] = ()


class Resumed(NamedTuple):
    """Where a fit continues."""

    opt_state: Any
    step: int
    best: Best | None
    waited: int
    least: float
    params: Any = None
    state: Any = None
    history: History | None = None
    position: Any = None


class Reached:
    """What training has reached at any moment: never donated, and consistent whenever it is read."""

    def __init__(self, params: Any, state: Any, opt_state: Any, start: Any):
        self.began, self.training = time.perf_counter(), False
        self.now: tuple[Any, int, int] = (
            (params, state, opt_state),
            start,
            0,
        )  # values; their step; how many calls brought them
        self.logs: list[dict[str, np.ndarray]] = []
        self.validations: list[tuple[int, dict[str, Any]]] = []
        self.best: Best | None = None
        self.waited, self.least, self.start = 0, np.inf, 0
        self.rest: Callable[[int], tuple[Batch, ...]] = lambda step: ()
        self.columns: tuple[int, dict[str, np.ndarray]] = 0, {}  # of so many validations, as history has them

    def begin(self, carry: Carry, resume: Resumed) -> None:
        """From here on there is something to lose."""
        self.now = ((carry.params, carry.state, carry.opt_state), int(resume.step), 0)
        self.best, self.waited, self.least, self.training = resume.best, resume.waited, resume.least, True
        if resume.history is None:
            self.start = int(resume.step)
        else:
            self.recall(resume.history)

    def recall(self, history: History) -> None:
        """What happened before goes on here, as if it had been one run."""
        self.began -= history.seconds
        logs = {"loss": history.loss, **history.recorded}
        self.logs = [{name: values[: self.step] for name, values in logs.items()}]  # but for what was NaN
        self.now = (*self.now[:2], 1)
        for i, (step, J) in enumerate(zip(history.validation_step, history.validation_loss, strict=True)):
            self.validations.append((int(step), {"loss": J, **{name: m[i] for name, m in history.metrics.items()}}))

    @property
    def step(self) -> int:
        return self.now[1]

    @property
    def last_loss(self) -> float:
        """The loss of the last step that is known here; NaN before the first."""
        return float(self.logs[-1]["loss"][-1]) if self.logs and len(self.logs[-1]["loss"]) else float("nan")

    def advance(self, carry: Carry, step: int, logs: dict[str, np.ndarray]) -> None:
        """A call is over. now changes in one piece, so that an exception finds the one or the other."""
        self.logs.append(logs)
        self.now = ((carry.params, carry.state, carry.opt_state), step, len(self.logs))

    def hold(self, carry: Carry) -> None:
        """The same values in other buffers: those that were handed out are about to be donated."""
        self.now = ((carry.params, carry.state, carry.opt_state), *self.now[1:])

    def measure(self, figures: dict[str, Any], whole: bool) -> None:
        """A validation is over. Only one at the end of a whole epoch counts for patience, as an uninterrupted run has
        it: patience then runs out at the same step, however often a run was resumed."""
        (params, state, _), step, _ = self.now
        figures, measured = flat(figures), figures["loss"]
        finite = bool(np.isfinite(measured))
        if finite and (self.best is None or measured < self.best.loss):
            self.best = Best(copy(params), copy(state), step, measured)
        if whole:
            new = finite and measured < self.least
            self.waited, self.least = (0, measured) if new else (self.waited + 1, self.least)
        self.validations.append((step, figures))

    def fit(self, stopped: str, message: str) -> Fit:
        """All of it, as it is handed back."""
        (params, state, opt_state), step, calls = self.now
        return Fit(
            params, state, opt_state, step, self.history(calls), stopped, message, self.best, self.waited, self.least
        )

    def measured(self) -> dict[str, np.ndarray]:
        """The validations as columns: those of the last time, and what is new."""
        count, columns = self.columns
        rows = [figures for _, figures in self.validations]
        fresh = together(rows[count:], np.stack)
        if {name: a.shape[1:] for name, a in columns.items()} == {name: a.shape[1:] for name, a in fresh.items()}:
            columns = {name: np.concatenate([a, fresh[name]]) for name, a in columns.items()}
        elif fresh:
            columns = together(rows, np.stack)
        self.columns = len(rows), columns
        return dict(columns)

    def history(self, calls: int) -> History:
        """What happened until then."""
        steps = np.asarray([step for step, _ in self.validations], int)
        measured = self.measured()
        recorded = together(self.logs[:calls], np.concatenate)
        if calls == len(self.logs) > 1:  # joined once, not in each epoch again
            self.logs = [recorded.copy()]
            self.now = (*self.now[:2], 1)
        validation_loss = np.asarray(measured.pop("loss", ()), float)
        losses = recorded.pop("loss", np.zeros(0, np.float32))
        seconds = time.perf_counter() - self.began
        return History(losses, steps, validation_loss, seconds, measured, recorded, self.start)


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures by name; those of a metric that finishes with a dict, by the name of the metric and theirs."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(value):
            found[name + "".join(f".{getattr(key, 'key', getattr(key, 'idx', key))}" for key in keys)] = leaf
    return found


def together(rows: list[dict[str, Any]], join: Callable[[list[Any]], np.ndarray]) -> dict[str, np.ndarray]:
    """One dict of what join makes of each name; NaN where a row lacks it, or has it in another shape than the last.

    A run that goes on from a checkpoint may measure or record other things than before.
    """
    last = {name: np.asarray(value) for row in rows for name, value in row.items()}

    def column(name: str) -> list[np.ndarray]:
        return [beside(np.asarray(row["loss"]), np.asarray(row.get(name, np.nan)), last[name]) for row in rows]

    return {name: join(column(name)) for name in last}


def beside(loss: np.ndarray, value: np.ndarray, last: np.ndarray) -> np.ndarray:
    """value if it has the form of the last one; else NaN: one for each loss of a call, or in the last one's shape."""
    due = loss.shape if loss.ndim else last.shape
    return value if value.shape == due else np.full(due, np.nan)


@contextmanager
def nothing_lost(reached: "Reached", stop: Stop) -> Iterator["Reached"]:
    """An exception of the training, or Ctrl-C before it, bears what was reached in its attribute fit."""
    try:
        yield reached
        stop.closing = True  # a second Ctrl-C would lose the Fit now
    except BaseException as error:
        stop.closing = True
        if reached.training or isinstance(error, KeyboardInterrupt):
            found = reached.fit("error", f"{type(error).__name__} after step {reached.step}")
            error.fit = found._replace(ahead=reached.rest(reached.step))  # type: ignore[attr-defined]
            error.add_note(f"fit: what was reached, until step {reached.step}, is in this exception's attribute fit")
        raise


def ended(found: Fit, reason: str) -> Fit:
    """The Fit, with the signal that came meanwhile, if one did, as the reason of its end."""
    if not reason:
        return found
    besides = f"; besides, {found.message}" if found.message else ""
    word = {"interrupt": "interrupted", "terminated": "terminated"}[reason]
    return found._replace(stopped=reason, message=f"{word} after step {found.step}{besides}")
