"""Training: the loop of the document's section 3.2, steps 1 to 5, on the device, with any optax transformation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from fnbp.arrays.checks import check_finite
from fnbp.backpropagation import value_and_grad
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.training.loop import (
    CAPACITY,
    Carry,
    compiled_loop,
    copy,
    evaluation,
    is_finite_by_leaf,
    last_finite,
    once,
    permutation,
)
from fnbp.training.progress import Stop, bar, stoppable
from fnbp.training.requests import (
    arrays_of,
    check_data,
    check_functions,
    check_opt_state,
    check_request,
    check_steps,
    check_threshold,
    check_traced,
)

__all__ = ["Fit", "History", "fit"]

CALL_SECONDS = 0.2  # how long one call of the compiled loop is meant to take, and Ctrl-C to wait


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


def fit(
    net: Layer,
    loss: Loss,
    params: Any,
    state: Any,
    x: Any,
    y: Any,
    *,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
    steps: int | None = None,
    epochs: int | None = None,
    threshold: float | None = None,
    validation: tuple[Any, Any] | None = None,
    patience: int | None = None,
    opt_state: Any = None,
    start: int = 0,
    resume: Fit | None = None,
    gradient: Callable = value_and_grad,
    progress: bool = True,
    callback: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[int, Any, Any], None] | None = None,
) -> Fit:
    """Minimise the mean loss over x, y until the first stopping condition.

        params := params + optimizer(gradient of J on the next batch)

    An epoch is a fresh permutation of the examples, drawn on the device from key; examples that do not fill the last
    batch sit that epoch out. Many steps run in one compiled call; nothing is recompiled after the first, nor in a later
    fit of the same net, loss, optimizer and gradient.

    Stops:   steps (or epochs) are done; a batch's loss is at most threshold; patience epochs in a row bring no new
             least validation loss; something is not finite (the last finite parameters are handed back); Ctrl-C or
             SIGTERM. An exception, of a callback for one, bears what was reached in its attribute fit.
    Options: validation: (x, y) measured after each epoch and at the end. steps, epochs: counted from start, in addition
             to what was done before. resume: an earlier Fit, from which opt_state, start, best, waited and least are
             taken; params and state are usually its own. opt_state, start: the same by hand, for these two alone.
             gradient: another maker of gradients, such as fnbp.automatic_value_and_grad. callback: called between
             compiled calls with the step and its loss. on_epoch: called after each epoch with the step, the params and
             the state, which the next step overwrites: measure them, or copy them.
    Memory:  the data, and twice params, state and opt_state: one set is kept to go back to.
    Source:  the document, section 3.2.
    Raises:  ValueError or TypeError before the first step, for sizes, targets, keys or data that do not fit, the values
             of tokens, lengths and labels among them.
    """
    with stoppable() as stop, nothing_lost(Reached(params, state, opt_state, start), stop) as reached:
        check_traced(params, state, x, y, key, opt_state, validation)
        check_request(net, loss, params, key, batch_size, patience, validation)
        check_functions(optimizer, gradient=gradient, callback=callback, on_epoch=on_epoch)
        begun = resumed(resume, opt_state, start)
        data, held_out = data_of(net, loss, params, state, (x, y), validation, key, batch_size)
        rule = rule_of(begun.step, steps, epochs, threshold, patience, examples_of(data) // batch_size)
        run = once(compiled_loop, net, loss, gradient, optimizer, int(batch_size), rule.batches, CAPACITY)
        at, data = set_out(params, state, optimizer, begun, data, key, rule)
        reached.begin(at[0], begun)
        evaluate = None if held_out is None else evaluation(net, loss, *held_out)
        watch = Watch(evaluate, on_epoch, callback, progress, is_owed(resume, rule.batches))
        found = drive(run, at, data, rule, watch, reached, stop)
    return ended(found, stop.reason)


def data_of(
    net: Layer, loss: Loss, params: Any, state: Any, data: Any, validation: Any, key: Any, batch_size: int
) -> tuple[Any, Any]:
    """The data and those held out, as arrays that fit net and loss."""
    x, y = arrays_of("training data", *data)
    examples = check_data("training data", net, loss, params, state, x, y, Context(key, train=True))
    if batch_size > examples:
        raise ValueError(f"fit: batch_size {batch_size} is more than the {examples} examples")
    if validation is not None:
        validation = at, due = arrays_of("validation data", *validation)
        check_data("validation data", net, loss, params, state, at, due, Context())
    return (x, y), validation


def examples_of(data: Any) -> int:
    """How many examples there are."""
    return jax.tree.leaves(data)[0].shape[0]


def set_out(
    params: Any, state: Any, optimizer: Any, resume: "Resumed", data: Any, key: jax.Array, rule: "Rule"
) -> tuple[tuple[Carry, jax.Array], Any]:
    """Where the compiled loop begins, in buffers of its own, and the data as it takes them."""
    params, state = jax.tree.map(jnp.asarray, (params, state))
    fresh = optimizer.init(params)
    check_finite("fit", "state", state)
    must = is_finite_by_leaf(fresh)
    opt_state = fresh if resume.opt_state is None else check_opt_state(optimizer, params, resume.opt_state, must)
    key_order, key_layers = jax.random.split(key)
    order = permuted(key_order, rule.start // rule.batches, examples_of(data))
    carry = copy(Carry(params, state, opt_state, jnp.asarray(rule.start, jnp.int32)))
    return (carry, order), (*data, key_order, key_layers, jnp.asarray(must, bool))


def rule_of(start: Any, steps: Any, epochs: Any, threshold: Any, patience: int | None, batches: int) -> "Rule":
    """When to stop, of what was asked for."""
    last = check_steps(start, steps, epochs, batches)
    return Rule(int(start), last, batches, check_threshold(threshold), patience)


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


permuted = jax.jit(permutation, static_argnums=2)


class Resumed(NamedTuple):
    """Where a fit goes on from."""

    opt_state: Any
    step: int
    best: Best | None
    waited: int
    least: float


def is_owed(earlier: Fit | None, batches: int) -> bool:
    """Whether that Fit ended with an epoch, but before its validation, as by an exception of it."""
    if earlier is None or not len(earlier.history.loss) or earlier.step % batches:
        return False
    return earlier.step not in earlier.history.validation_step


def resumed(resume: Any, opt_state: Any, start: Any) -> Resumed:
    """Where to go on from; TypeError for what is no Fit, ValueError if the same is told twice."""
    if resume is None:
        return Resumed(opt_state, start, None, 0, np.inf)
    if not isinstance(resume, Fit):
        raise TypeError(f"fit: resume must be a Fit, what an earlier fit returned; got {type(resume).__name__}")
    if opt_state is not None or not isinstance(start, int) or start:
        raise ValueError("fit: resume brings opt_state and start along; give either resume or these")
    return Resumed(resume.opt_state, resume.step, resume.best, resume.waited, resume.least)


class Rule(NamedTuple):
    """When to stop, in numbers."""

    start: int
    last: int
    batches: int
    threshold: float
    patience: int | None


class Watch(NamedTuple):
    """Who looks on: between compiled calls, and after each epoch."""

    evaluate: Callable | None
    on_epoch: Callable | None
    callback: Callable | None
    progress: bool
    owed: bool  # a validation before the first step

    @property
    def epochs(self) -> bool:
        return self.evaluate is not None or self.on_epoch is not None


class Reached:
    """What training has reached at any moment: alive whatever is donated, consistent whenever it is asked."""

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
        """A validation is over. It is waited for at the end of a whole epoch alone, where an uninterrupted run has
        one too: patience then runs out at the same step, however often a run was resumed."""
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


def drive(
    run: Callable, at: tuple[Carry, jax.Array], data: Any, rule: Rule, watch: Watch, reached: Reached, stop: Stop
) -> Fit:
    """Call the compiled loop until a stopping condition holds, and keep what it brings."""
    step, pace, final = rule.start, 1, np.nan
    stopped = validate(watch, rule, reached) if watch.owed else ""
    with bar(rule.start, rule.last, watch.progress, Progress) as show:
        while not stopped and not stop.reason:
            limit = min(step + pace, rule.last)
            if watch.epochs:
                limit = min(limit, (step // rule.batches + 1) * rule.batches)
            kept, called = copy(at), time.perf_counter()
            reached.hold(kept[0])
            carry, order, got, is_finite = run(*at, data, np.int32(limit), jnp.asarray(rule.threshold, float))
            at, done = (carry, order), int(carry.step)
            losses = np.asarray(got)[: done - step]
            final, step, asked = float(losses[-1]), done, limit - step
            if not (is_finite and np.isfinite(final)):
                at, stopped = last_finite(run, kept, data, done), "non-finite"
            reached.advance(at[0], int(at[0].step), losses)
            if not stopped:
                stopped = "threshold" if final <= rule.threshold else ""
                if step % rule.batches == 0 or step == rule.last:
                    out_of_patience = end_of_epoch(watch, rule, reached)  # the epoch that stops is measured too
                    stopped = stopped or out_of_patience
            show(step, final, reached.validations)
            if watch.callback is not None:
                watch.callback(step, final)
            stopped = stopped or ("steps" if step == rule.last else "")
            if asked == pace and time.perf_counter() - called < CALL_SECONDS:
                pace = min(2 * pace, CAPACITY)
    return reached.fit(stopped, explain(stopped, step, reached.step, final, rule))


def end_of_epoch(watch: Watch, rule: Rule, reached: Reached) -> str:
    """Show and measure what an epoch has brought; "patience" if that has run out, else ""."""
    (params, state, _), step, _ = reached.now
    stopped = validate(watch, rule, reached)  # before on_epoch, whose exception would lose it
    if watch.on_epoch is not None:
        watch.on_epoch(step, params, state)
    return stopped


def validate(watch: Watch, rule: Rule, reached: Reached) -> str:
    """Measure what was reached; "patience" if that has run out, else ""."""
    if watch.evaluate is None:
        return ""
    (params, state, _), step, _ = reached.now
    whole = step % rule.batches == 0
    reached.measure(watch.evaluate(params, state), whole)
    return "patience" if whole and rule.patience is not None and reached.waited >= rule.patience else ""


def explain(stopped: str, step: int, ended: int, final: float, rule: Rule) -> str:
    """Why training stopped, in a sentence."""
    broken, cause = (ended + 1, "its update is not") if np.isfinite(final) else (step, f"its loss is {final:.6g}")
    return {
        "": "",
        "steps": f"all {step - rule.start} steps done, the last loss is {final:.6g}",
        "threshold": f"the loss of step {step} is {final:.6g}, at most the threshold {rule.threshold:.6g}",
        "patience": f"no new least validation loss in {rule.patience} validations, at step {step}",
        "non-finite": f"step {broken} is not finite, {cause}; these parameters are of step {ended}",
    }[stopped]
