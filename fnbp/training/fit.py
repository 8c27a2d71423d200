"""fit: training with any optax transformation, from checked data to the first stopping condition."""

from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnbp.arrays.checks import check_finite
from fnbp.backpropagation import value_and_grad
from fnbp.layer import Layer
from fnbp.losses.loss import Loss
from fnbp.processes import check_alike, is_shared
from fnbp.training.checkpoints import Nothing, check_alone, run_of, saving
from fnbp.training.data import Stream, Validation, batches_of, validation_data
from fnbp.training.drive import Rule, Watch, drive
from fnbp.training.loop import (
    Carry,
    Data,
    copy,
    is_finite_by_leaf,
)
from fnbp.training.prepare import Form, Request, data_in, evaluation_of, order_of, supply_of
from fnbp.training.progress import stoppable
from fnbp.training.reached import Fit, History, Reached, Resumed, ended, nothing_lost
from fnbp.training.requests import (
    STEPS,
    check_functions,
    check_opt_state,
    check_request,
    check_steps,
    check_threshold,
    check_together,
    check_traced,
    kinds,
)
from fnbp.training.steps import as_record
from fnbp.training.supply import Resident, Streamed

__all__ = ["Fit", "History", "fit"]


def fit(
    net: Layer,
    loss: Loss,
    params: Any,
    state: Any,
    x: Any,
    y: Any = None,
    *,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    threshold: float | None = None,
    validation: tuple[Any, Any] | Validation | None = None,
    patience: int | None = None,
    opt_state: Any = None,
    start: int = 0,
    resume: Fit | None = None,
    checkpoint: Any = None,
    gradient: Callable = value_and_grad,
    record: Any = None,
    progress: bool = True,
    callback: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[Fit], bool | None] | None = None,
) -> Fit:
    """Minimise the mean loss over x, y until the first stopping condition.

        params := params + optimizer(gradient of J on the next batch)

    An epoch is a fresh permutation of the examples, drawn on the device from key; each counts once. Many steps run in
    one compiled call. Nothing is compiled again after the first, nor in a later fit of an equal net, loss, optimizer:
    a function that reads what changes in between, a global variable for example, sees it as it was.

    Stops:   the steps (or epochs) are done; the loss of a batch is at most threshold; patience epochs in a row bring no
             new least validation loss; on_epoch returns True; something is not finite (the last finite parameters are
             returned); Ctrl-C or SIGTERM. An exception carries what was reached in its attribute fit.
    Options: x, y: arrays; or x is fnbp.Batches(x, y, size), with more options, or fnbp.Stream(loader), whose batches
             come one by one. steps, epochs: how many to do, in addition to those done before; give one of the two.
             validation: a pair (x, y), or fnbp.Validation, with metrics; measured after each epoch and at the end.
             resume: an earlier Fit, from which opt_state, start, best, waited, least and ahead are taken. opt_state,
             start: only these two. checkpoint: a directory, or fnbp.Checkpoints, to write to and to go on from; steps
             and epochs are then the total, and params and state those of a new run. gradient: another maker of
             gradients; what it returns behind J and state is Step.more; where a batch was filled up, its y is a pair
             (y, which count), as its loss takes it. record: functions of fnbp.Step, such as
             fnbp.gradient_norm, for history.recorded. callback: called between compiled calls with the step and its
             loss. on_epoch: called after each epoch with the Fit so far.
    Memory:  the data, or two chunks of at most 8 MiB of a stream; and twice params, state and opt_state: one set is
             kept to go back to.
    Source:  fnbp/README.md, B1 to B6, one pass a step.
    Raises:  ValueError or TypeError before the first step if sizes, targets, keys or data do not fit.
    """
    data, held_out, logged = batches_of(x, y, batch_size), validation_data(validation), as_record(record)
    request = Request(net, loss, params, state, data, held_out, optimizer, key, gradient, logged, checkpoint)
    until = Until(steps, epochs, threshold, patience)
    return train(request, until, Earlier(resume, opt_state, start), Watch(None, on_epoch, callback, progress, False))


class Until(NamedTuple):
    """When fit is to stop."""

    steps: int | None
    epochs: int | None
    threshold: float | None
    patience: int | None


class Earlier(NamedTuple):
    """What fit is to go on from."""

    resume: Fit | None
    opt_state: Any
    start: int


def train(request: Request, until: Until, earlier: Earlier, watch: Watch) -> Fit:
    """Check what was asked for, go on from what there is, train, and keep the end."""
    net, loss, params, state, batches, validation, optimizer, key, gradient, _, checkpoint = request
    began = Reached(params, state, earlier.opt_state, earlier.start)
    with stoppable() as stop, saving(checkpoint) as saver, nothing_lost(began, stop) as reached:
        check_traced(params, state, key, earlier.opt_state, data_in(batches), data_in(validation))
        check_request(net, loss, params, key, until.patience, validation)
        check_functions(optimizer, gradient=gradient, callback=watch.callback, on_epoch=watch.on_epoch)
        check_alone(checkpoint, *earlier)
        check_devices(request, until, earlier)
        begun = resumed(*earlier)
        if isinstance(batches, Stream):
            rule_of(begun.step, 0, until, batches.number, watch.on_epoch)  # before a batch is drawn
        evaluate = evaluation_of(request)
        supply, form = supply_of(request, () if earlier.resume is None else earlier.resume.ahead)
        begun = from_checkpoint(saver, request, form) or begun
        done = 0 if checkpoint is None else begun.step
        rule = rule_of(begun.step, done, until, supply.number, watch.on_epoch)
        at, data = set_out(request, begun, supply, rule)
        reached.begin(at[0], begun)
        watch = watch._replace(evaluate=evaluate, owed=is_owed(earlier.resume or begun, rule.batches))
        with closing(supply):
            supply.begin(data, rule.start, rule.last, begun.position, anew=checkpoint is not None)
            saver.position, reached.rest = supply.position, supply.rest
            found = drive(supply, at, rule, watch, reached, stop, saver)
            saver.finish(found)
    return ended(found._replace(ahead=supply.rest(found.step)), stop.reason)


def check_devices(request: Request, until: Until, earlier: Earlier) -> None:
    """ValueError if arrays lie on different devices, or processes that share params hold different other things."""
    batches, resume = request.batches, earlier.resume
    opt_state = earlier.opt_state if resume is None else getattr(resume, "opt_state", None)
    data, held_out = data_in(batches), data_in(request.validation)
    named = {"params": request.params, "state": request.state, "opt_state": opt_state}
    check_together(**named, **{"the data": data, "the validation data": held_out})
    if is_shared(request.params):
        here = None if getattr(batches, "host", False) else data  # those of a host come, and are looked at, in parts
        size = getattr(batches, "size", None), getattr(batches, "drop_last", None), getattr(batches, "epoch", None)
        asked = {"settings": repr((until, size, earlier.start)), "state": request.state, "keys": request.key}
        check_alike("fit", {**asked, "data": here, "validation data": held_out})


def set_out(
    request: Request, resume: Resumed, supply: Resident | Streamed, rule: Rule
) -> tuple[tuple[Carry, jax.Array], Data]:
    """Where the compiled loop begins, in buffers of its own, and what it reads beside the batches."""
    given = (request.params, request.state) if resume.history is None else (resume.params, resume.state)
    params, state = jax.tree.map(jnp.asarray, given)
    optimizer, key = request.optimizer, request.key
    fresh = optimizer.init(params)
    check_finite("fit", "state", state)
    must = is_finite_by_leaf(fresh)
    opt_state = fresh if resume.opt_state is None else check_opt_state(optimizer, params, resume.opt_state, must)
    key_order, key_layers = jax.random.split(key)
    order = order_of(key, rule.start // rule.batches, supply.examples)
    carry = copy(Carry(params, state, opt_state, jnp.asarray(rule.start, jnp.int32)))
    return (carry, order), Data(None, None, key_order, key_layers, jnp.asarray(must, bool))


def from_checkpoint(saver: Nothing, request: Request, form: Form) -> Resumed | None:
    """What a checkpoint holds; None if there is none yet. ValueError if it is of another run."""
    if request.checkpoint is None:
        return None
    params, state = jax.tree.map(jnp.asarray, (request.params, request.state))
    fresh = request.optimizer.init(params)
    settings = {"batch_size": form.size, "drop_last": form.drop_last, "data": form.arrays}
    run = run_of(request.net, request.loss, params, kinds(fresh), request.key, **settings)
    return saver.load(run, params, state, fresh)


def rule_of(start: Any, done: int, until: Until, batches: int | None, on_epoch: Any) -> Rule:
    """When to stop, of what was asked for; done: how many of the steps that were asked for were done before."""
    if batches is None:
        for name, wanted in (("epochs", until.epochs), ("patience", until.patience), ("on_epoch", on_epoch)):
            if wanted is not None:
                raise ValueError(f"fit: {name} needs to know how many batches an epoch has: Stream(batches, epoch=...)")
        batches = STEPS
    last = check_steps(start, done, until.steps, until.epochs, batches)
    return Rule(int(start), last, batches, check_threshold(until.threshold), until.patience)


def is_owed(earlier: Fit | Resumed, batches: int) -> bool:
    """Whether that run ended with an epoch, but before its validation, as by an exception of it."""
    if earlier.history is None or not len(earlier.history.loss) or earlier.step % batches:
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
