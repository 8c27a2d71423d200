"""Training: the loop of the document's section 3.2, steps 1 to 5, on the device, with any optax transformation."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fnbp.backpropagation import value_and_grad
from fnbp.checks import check_finite, check_is, check_key, check_size
from fnbp.layer import Context, Layer
from fnbp.loop import CAPACITY, Carry, compiled_loop, copy, evaluation, last_finite, mean_loss, permutation
from fnbp.losses import Loss

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

    params, state, opt_state   as reached, all finite
    step      how many updates were made of them
    stopped   "steps", "threshold", "patience", "non-finite" or "interrupt"
    message   the same in a sentence
    best      of the validations, or None without validation
    """

    params: Any
    state: Any
    opt_state: Any
    step: int
    history: History
    stopped: str
    message: str
    best: Best | None


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
    gradient: Callable = value_and_grad,
    progress: bool = True,
    callback: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[int, Any, Any], None] | None = None,
) -> Fit:
    """Minimise the mean loss over x, y until the first stopping condition.

        params := params + optimizer(gradient of J on the next batch)

    An epoch is a fresh permutation of the examples, drawn on the device from key; examples that do not fill the last
    batch sit that epoch out. Many steps run in one compiled call; nothing is recompiled after the first.

    Stops:   steps (or epochs) are done; a batch's loss is at most threshold; patience validations in a row bring no
             new least loss; a loss is not finite (the last finite parameters are handed back); Ctrl-C.
    Options: validation: (x, y) measured after each epoch. opt_state, start: go on from an earlier Fit, its opt_state
             and step. gradient: another maker of gradients, such as fnbp.automatic_value_and_grad. callback: called
             between compiled calls with the step and its loss. on_epoch: called after each epoch with the step, the
             params and the state, which the next step overwrites: measure them, or copy them.
    Memory:  the data, and twice params, state and opt_state: one set is kept to go back to.
    Source:  the document, section 3.2.
    Raises:  ValueError or TypeError before the first step, for sizes, targets, keys or data that do not fit.
    """
    check_is("fit", "net", net, Layer)
    check_is("fit", "loss", loss, Loss)
    check_is("fit", "optimizer", optimizer, optax.GradientTransformation)
    params, state, x, y = jax.tree.map(jnp.asarray, (params, state, x, y))
    examples = check_request(net, loss, params, state, x, y, key, batch_size, validation, patience)
    if start < 0:
        raise ValueError(f"fit: start must be at least 0, got {start}")
    batches = examples // batch_size
    last = start + total_steps(steps, epochs, batches)
    optimizer = optax.with_extra_args_support(optimizer)
    run = compiled_loop(gradient(net, loss), mean_loss(net, loss), optimizer, batch_size, batches)
    key_order, key_layers = jax.random.split(key)
    order = jax.jit(permutation, static_argnums=2)(key_order, start // batches, examples)
    opt_state = optimizer.init(params) if opt_state is None else check_opt_state(optimizer, params, opt_state)
    carry = copy(Carry(params, state, opt_state, jnp.asarray(start)))
    rule = Rule(start, last, batches, -np.inf if threshold is None else threshold, patience)
    evaluate = evaluation(net, loss, *validation) if validation is not None else None
    watch = Watch(evaluate, on_epoch, callback, progress)
    return drive(run, (carry, order), (x, y, key_order, key_layers), rule, watch)


def check_opt_state(optimizer: optax.GradientTransformation, params: Any, opt_state: Any) -> Any:
    """opt_state; ValueError where it is of another optimizer, or of other params."""
    due = jax.eval_shape(optimizer.init, params)
    if jax.tree.structure(opt_state) != jax.tree.structure(due):
        raise ValueError(f"fit: opt_state is of another optimizer or net: got {kinds(opt_state)}, due {kinds(due)}")
    for a, b in zip(jax.tree.leaves(opt_state), jax.tree.leaves(due), strict=True):
        if jnp.shape(a) != b.shape:
            raise ValueError(f"fit: opt_state is of other params: an entry has shape {jnp.shape(a)}, due {b.shape}")
    return opt_state


def kinds(state: Any) -> str:
    """The names of the types in a state: (ScaleByAdamState, EmptyState)."""
    if type(state) is tuple:
        return f"({', '.join(map(kinds, state))})"
    return type(state).__name__


def check_request(net, loss, params, state, x, y, key, batch_size, validation, patience) -> int:
    """How many examples there are; ValueError or TypeError for what fit cannot start with."""
    check_key("fit", key)
    check_size("fit", "batch_size", batch_size)
    check_finite("fit", "params", params)
    examples = check_data("training data", net, loss, params, state, x, y)
    if batch_size > examples:
        raise ValueError(f"fit: batch_size {batch_size} is more than the {examples} examples")
    if validation is not None:
        check_data("validation data", net, loss, params, state, *validation)
    if patience is not None:
        check_size("fit", "patience", patience)
        if validation is None:
            raise ValueError("fit: patience needs validation=(x, y)")
    return examples


def check_data(what: str, net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any) -> int:
    """How many examples there are; ValueError or TypeError where the data do not fit each other, net or loss."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((x, y))}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(f"fit: {what} need equally many examples, at least 1; got {sorted(sizes)}")
    check_finite("fit", f"{what}: x", x)
    check_finite("fit", f"{what}: y", y)
    prediction = jax.eval_shape(lambda p, s, x: net.forward(p, s, x, Context())[0], params, state, x)
    loss.check(prediction, y)
    return sizes.pop()[0]


def total_steps(steps: Any, epochs: Any, batches: int) -> int:
    """How many steps were asked for; ValueError unless by exactly one of the two."""
    if (steps is None) == (epochs is None):
        raise ValueError("fit: give steps or epochs, one of the two")
    if steps is not None:
        check_size("fit", "steps", steps)
        return steps
    check_size("fit", "epochs", epochs)
    return epochs * batches


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

    @property
    def epochs(self) -> bool:
        return self.evaluate is not None or self.on_epoch is not None


def drive(run, at: tuple[Carry, jax.Array], data, rule: Rule, watch: Watch) -> Fit:
    """Call the compiled loop until a stopping condition holds, and keep what it brings."""
    began, step, pace, waited, stopped = time.perf_counter(), rule.start, 1, 0, ""
    losses: list[np.ndarray] = []
    validations: list[tuple[int, float]] = []
    best = None
    with interruptible() as interrupted, bar(rule, watch.progress) as show:
        while not stopped:
            limit = min(step + pace, rule.last)
            if watch.epochs:
                limit = min(limit, (step // rule.batches + 1) * rule.batches)
            kept, called = copy(at), time.perf_counter()
            carry, order, got, is_finite = run(*at, data, np.int32(limit), jnp.asarray(rule.threshold, float))
            at, reached = (carry, order), int(carry.step)
            losses.append(np.asarray(got)[: reached - step])
            final = float(losses[-1][-1])
            if not (is_finite and np.isfinite(final)):
                at, stopped = last_finite(run, kept, data, reached), "non-finite"
            elif final <= rule.threshold:
                stopped = "threshold"
            at_end = stopped != "non-finite" and (reached % rule.batches == 0 or reached == rule.last)
            if at_end and watch.on_epoch is not None:
                watch.on_epoch(reached, carry.params, carry.state)
            if at_end and watch.evaluate is not None:
                measured = watch.evaluate(carry.params, carry.state)
                validations.append((reached, measured))
                waited += 1
                if np.isfinite(measured) and (best is None or measured < best.loss):
                    best, waited = Best(copy(carry.params), copy(carry.state), reached, measured), 0
                if waited == rule.patience:
                    stopped = stopped or "patience"
            show(reached, final, validations)
            if watch.callback is not None:
                watch.callback(reached, final)
            stopped = stopped or ("steps" if reached == rule.last else "interrupt" if interrupted.is_set() else "")
            if limit - step == pace and time.perf_counter() - called < CALL_SECONDS:
                pace = min(2 * pace, CAPACITY)
            step = reached
    steps, measured = (np.asarray(column) for column in zip(*validations, strict=True)) if validations else ((), ())
    history = History(
        np.concatenate(losses), np.asarray(steps, int), np.asarray(measured, float), time.perf_counter() - began
    )
    carry, ended = at[0], int(at[0].step)
    message = explain(stopped, step, ended, final, rule)
    return Fit(carry.params, carry.state, carry.opt_state, ended, history, stopped, message, best)


def explain(stopped: str, step: int, ended: int, final: float, rule: Rule) -> str:
    """Why training stopped, in a sentence."""
    cause = "its update is not" if np.isfinite(final) else f"its loss is {final:.6g}"
    return {
        "steps": f"all {step - rule.start} steps done, the last loss is {final:.6g}",
        "threshold": f"the loss of step {step} is {final:.6g}, at most the threshold {rule.threshold:.6g}",
        "patience": f"no new least validation loss in {rule.patience} validations, at step {step}",
        "interrupt": f"interrupted after step {step}",
        "non-finite": f"step {step} is not finite, {cause}; these parameters are of step {ended}",
    }[stopped]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a compiled call ends and its result is kept; a second Ctrl-C raises."""
    pressed = threading.Event()

    def handler(signum, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def bar(rule: Rule, shown: bool) -> Iterator[Callable]:
    """A progress bar with the loss and steps/s: show(step, loss, validations)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as progress:
        task = progress.add_task("training", total=rule.last - rule.start, rate="")
        began = time.perf_counter()

        def show(step, loss, validations):
            rate = f"{(step - rule.start) / (time.perf_counter() - began):,.0f} steps/s"
            measured = f" validation {validations[-1][1]:.4f}" if validations else ""
            progress.update(task, completed=step - rule.start, description=f"loss {loss:.4f}{measured}", rate=rate)

        yield show
