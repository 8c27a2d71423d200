"""fit: training with any optax transformation, from checked data to the first stopping condition."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnbp.arrays.checks import check_finite, check_is
from fnbp.backpropagation import value_and_grad
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.losses.metrics import as_metrics
from fnbp.training.drive import Rule, Watch, drive
from fnbp.training.evaluation import validation_of
from fnbp.training.loop import (
    CAPACITY,
    Batching,
    Carry,
    Data,
    compiled_loop,
    copy,
    is_finite_by_leaf,
    once,
    permutation,
)
from fnbp.training.progress import stoppable
from fnbp.training.reached import Fit, History, Reached, Resumed, ended, nothing_lost
from fnbp.training.requests import (
    arrays_of,
    check_augmented,
    check_data,
    check_functions,
    check_opt_state,
    check_request,
    check_steps,
    check_threshold,
    check_traced,
)
from fnbp.training.steps import as_record

__all__ = ["Fit", "History", "fit"]


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
    augment: Callable[[jax.Array, Any], Any] | None = None,
    drop_last: bool = False,
    metrics: Any = None,
    record: Any = None,
    progress: bool = True,
    callback: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[Fit], bool | None] | None = None,
) -> Fit:
    """Minimise the mean loss over x, y until the first stopping condition.

        params := params + optimizer(gradient of J on the next batch)

    An epoch is a fresh permutation of the examples, drawn on the device from key. If they do not fill its last batch,
    examples of the epoch's front fill it up, which do not count in the loss. Many steps run in one compiled call.
    Nothing is compiled again after the first call, nor in a later fit of an equal net, loss, optimizer and gradient.

    Stops:   the steps (or epochs) are done; the loss of a batch is at most threshold; patience epochs in a row bring no
             new least validation loss; on_epoch returns True; something is not finite (the last finite parameters are
             returned); Ctrl-C or SIGTERM. An exception, of a callback for example, carries what was reached in its
             attribute fit.
    Options: steps, epochs: how many to do, in addition to those done before; give one of the two. validation: a pair
             (x, y), measured after each epoch and at the end; metrics: of it, as in fnbp.evaluate. resume: an earlier
             Fit, from which opt_state, start, best, waited and least are taken; params and state are usually its own.
             opt_state, start: only these two, given by hand. gradient: another maker of gradients, such as
             fnbp.automatic_value_and_grad; what its function returns behind J and state is Step.more. augment: (key,
             (x, y)) -> (x, y), applied to each batch on the device. drop_last: leave out what does not fill the last
             batch. record: functions of a fnbp.Step, one, several or a dict of them, such as fnbp.gradient_norm: a
             number of each step, in history.recorded. callback: called between compiled calls with the step and its
             loss. on_epoch: called after each epoch with a Fit, what was reached so far.
    Memory:  the data, and twice params, state and opt_state: one set is kept to go back to.
    Source:  fnbp/README.md, B1 to B6, one pass a step.
    Raises:  ValueError or TypeError before the first step if sizes, targets, keys or data do not fit; the values of
             tokens, lengths and labels are checked too.
    """
    with stoppable() as stop, nothing_lost(Reached(params, state, opt_state, start), stop) as reached:
        check_traced(params, state, x, y, key, opt_state, validation)
        check_request(net, loss, params, key, batch_size, patience, validation)
        check_functions(optimizer, gradient=gradient, callback=callback, on_epoch=on_epoch, augment=augment)
        check_is("fit", "drop_last", drop_last, bool)
        measures, logged = measures_of(metrics, validation), as_record(record)
        begun = resumed(resume, opt_state, start)
        data, held_out = data_of(net, loss, params, state, (x, y), validation, key, batch_size, augment)
        batching = batching_of(examples_of(data[0]), int(batch_size), drop_last, augment)
        rule = rule_of(begun.step, steps, epochs, threshold, patience, batching.number)
        run = once(compiled_loop, net, loss, gradient, optimizer, batching, logged, CAPACITY)
        at, data = set_out(params, state, optimizer, begun, data, key, rule)
        reached.begin(at[0], begun)
        evaluate = None if held_out is None else validation_of(net, loss, measures, *held_out)
        watch = Watch(evaluate, on_epoch, callback, progress, is_owed(resume, rule.batches))
        found = drive(run, at, data, rule, watch, reached, stop)
    return ended(found, stop.reason)


def data_of(
    net: Layer, loss: Loss, params: Any, state: Any, data: Any, validation: Any, key: Any, batch_size: int, augment: Any
) -> tuple[Any, Any]:
    """The data and those held out, as arrays that fit net and loss."""
    x, y = arrays_of("training data", *data)
    ctx = Context(key, train=True)
    if augment is None:
        examples = check_data("training data", net, loss, params, state, x, y, ctx)
    else:
        examples = check_augmented(net, loss, params, state, x, y, ctx, augment)
    if batch_size > examples:
        raise ValueError(f"fit: batch_size {batch_size} is more than the {examples} examples")
    if validation is not None:
        validation = at, due = arrays_of("validation data", *validation)
        check_data("validation data", net, loss, params, state, at, due, Context())
    return (x, y), validation


def batching_of(examples: int, size: int, drop_last: bool, augment: Callable | None) -> Batching:
    """How batches are taken of so many examples."""
    left_over = examples % size
    return Batching(
        size, examples // size + bool(left_over and not drop_last), bool(left_over) and not drop_last, augment
    )


def measures_of(metrics: Any, validation: Any) -> dict[str, Any]:
    """The metrics by name; ValueError if there are some, and nothing to measure."""
    found = as_metrics("fit", metrics)
    if found and validation is None:
        raise ValueError("fit: metrics need validation=(x, y)")
    return found


def examples_of(x: Any) -> int:
    """How many examples there are."""
    return jax.tree.leaves(x)[0].shape[0]


permuted = jax.jit(permutation, static_argnums=2)


def set_out(
    params: Any, state: Any, optimizer: Any, resume: Resumed, data: Any, key: jax.Array, rule: Rule
) -> tuple[tuple[Carry, jax.Array], Data]:
    """Where the compiled loop begins, in buffers of its own, and the data as it takes them."""
    params, state = jax.tree.map(jnp.asarray, (params, state))
    fresh = optimizer.init(params)
    check_finite("fit", "state", state)
    must = is_finite_by_leaf(fresh)
    opt_state = fresh if resume.opt_state is None else check_opt_state(optimizer, params, resume.opt_state, must)
    key_order, key_layers = jax.random.split(key)
    order = permuted(key_order, rule.start // rule.batches, examples_of(data[0]))
    carry = copy(Carry(params, state, opt_state, jnp.asarray(rule.start, jnp.int32)))
    return (carry, order), Data(data[0], data[1], key_order, key_layers, jnp.asarray(must, bool))


def rule_of(start: Any, steps: Any, epochs: Any, threshold: Any, patience: int | None, batches: int) -> Rule:
    """When to stop, of what was asked for."""
    last = check_steps(start, steps, epochs, batches)
    return Rule(int(start), last, batches, check_threshold(threshold), patience)


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
