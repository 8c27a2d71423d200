"""The compiled inner loop of training: many steps a call, on the device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from fnbp.arrays.placement import laid, rows_of
from fnbp.layer import Context, Layer, mask_behind
from fnbp.losses.loss import Loss, losses_of
from fnbp.losses.weights import counting_some
from fnbp.sharding import predicted
from fnbp.training.steps import Record, Step, recorded

CAPACITY = 1 << 14  # the most steps of one call
APART = 2**32 - 1  # of the key of augment from those of layers, which count from 0


class Carry(NamedTuple):
    """What one step hands to the next."""

    params: Any
    state: Any
    opt_state: Any
    step: jax.Array


class Data(NamedTuple):
    """What every step reads.

    x, y        all examples; or, with one more axis, the batches of the steps from first on
    key_order   of the order of the examples in an epoch
    key_layers  of the layers that draw
    must        for each leaf of opt_state, whether it must be finite
    """

    x: Any
    y: Any
    key_order: jax.Array
    key_layers: jax.Array
    must: jax.Array
    first: Any = None


class Batching(NamedTuple):
    """How batches are taken of the examples.

    size     examples of a batch
    number   of batches in an epoch; None if Data holds batches
    partial  True if the last batch of an epoch is filled up with examples that do not count
    augment  (key, (x, y)) -> (x, y), or None
    place    where on a mesh each batch lies, or None
    """

    size: int
    number: int | None
    partial: bool
    augment: Callable | None
    place: NamedSharding | None = None


def permutation(key: jax.Array, epoch: jax.Array | int, examples: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def copy(tree: Any) -> Any:
    """The same values in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)


def losses_at(net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any, ctx: Context) -> jax.Array:
    """The loss of each example, (m,), without a gradient."""
    prediction = predicted(net, params, state, x, ctx)
    return losses_of(loss, prediction, y, mask_behind(net, x, ctx.mask))[0]


def one_step(
    net: Layer, loss: Loss, gradient_of: Callable, transformation: Any, augment: Callable | None, record: Record
) -> Callable:
    """(carry, x, y, key_layers) -> carry, logs: the gradient of a batch, the update, and what is recorded of them."""
    gradient, optimizer = gradient_of(net, loss), optax.with_extra_args_support(transformation)

    def step(carry, x, y, key_layers):
        key = jax.random.fold_in(key_layers, carry.step)
        if augment is not None:
            x, y = augmented(augment, key, x, y)
        ctx = Context(key, train=True)
        (J, state, *more), grads = gradient(carry.params, carry.state, x, y, ctx)

        def value_of(params, batch=None, loss=loss):  # a line search hands on what it does not know itself
            return jnp.mean(losses_at(net, loss, params, carry.state, x, y, ctx))

        updates, opt_state = optimizer.update(
            grads,
            carry.opt_state,
            carry.params,
            value=J,
            grad=grads,
            value_fn=value_of,
            batch=(carry.state, x, y, ctx),
            loss=loss,
        )
        params = optax.apply_updates(carry.params, updates)
        seen = Step(J, carry.params, grads, updates, opt_state, *more)
        return Carry(params, state, opt_state, carry.step + 1), {"loss": J, **recorded(record, seen)}

    return step


def augmented(augment: Callable, key: jax.Array, x: Any, y: Any) -> tuple[Any, Any]:
    """The batch as augment returns it; the marks of examples that count stay beside their y."""
    key = jax.random.fold_in(key, APART)
    if isinstance(y, Marked):
        x, target = augment(key, (x, y.target))
        return x, Marked(target, y.counts)
    return augment(key, (x, y))


class Marked(NamedTuple):
    """A target, and which examples count."""

    target: Any
    counts: Any


def batch_of(data: Data, order: jax.Array, step: jax.Array, batching: Batching) -> tuple[Any, Any]:
    """The examples of a step: a part of the epoch's order. The last one begins again at its front, which is Marked."""
    if batching.number is None:
        return jax.tree.map(lambda a: a[step - data.first], (data.x, data.y))
    first = step % batching.number * batching.size
    if not batching.partial:
        rows = jax.lax.dynamic_slice_in_dim(order, first, batching.size)
        return jax.tree.map(lambda a: rows_of(a, rows), (data.x, data.y))
    at, examples = first + jnp.arange(batching.size), order.shape[0]
    x, y = jax.tree.map(lambda a: rows_of(a, order[at % examples]), (data.x, data.y))
    return x, Marked(y, at < examples)


def on_mesh(batch: Any, place: NamedSharding | None) -> Any:
    """A batch where it is to lie."""
    return batch if place is None else jax.tree.map(lambda a: laid(a, place), batch)


def compiled_loop(
    net: Layer,
    loss: Loss,
    gradient_of: Callable,
    transformation: Any,
    batching: Batching,
    record: Record,
    capacity: int,
) -> Callable:
    """(carry, order, data, limit, threshold) -> carry, order, logs, is everything finite.

    logs: the loss of each step, and what is recorded of it, each (capacity,).

    Runs steps up to limit, at most capacity of them, and stops behind a loss that is not finite or at most threshold.
    carry and order, the epoch's permutation, are donated. params and state must be finite, and those leaves of
    opt_state that data.must names.
    """
    loss = counting_some(loss) if batching.partial else loss
    step = one_step(net, loss, gradient_of, transformation, batching.augment, record)
    batches = batching.number

    def run(carry, order, data, limit, threshold):
        first = carry.step

        def goes_on(loop):
            carry, _, J = loop
            fine = jnp.isfinite(J) & (J > threshold)
            return (carry.step < limit) & (fine | (carry.step == first))

        def one(order, loop):
            carry, logs, _ = loop
            at = carry.step - first
            x, y = on_mesh(batch_of(data, order, carry.step, batching), batching.place)
            carry, now = step(carry, x, y, data.key_layers)
            now = jax.tree.map(lambda a, b: a.astype(b.dtype), now, logs)
            return carry, jax.tree.map(lambda kept, a: kept.at[at].set(a), logs, now), now["loss"]

        def epoch(loop):
            (carry, logs, J), order = loop
            number = carry.step // batches
            fresh = functools.partial(permutation, data.key_order, number, order.shape[0])
            order = jax.lax.cond(carry.step % batches == 0, fresh, lambda: order)

            def within(loop):
                return goes_on(loop) & (loop[0].step // batches == number)

            return jax.lax.while_loop(within, functools.partial(one, order), (carry, logs, J)), order

        empty = jnp.full(capacity, jnp.nan, jnp.result_type(float))
        loop = carry, {"loss": empty, **{name: empty for name, _ in record}}, empty[0]
        if batches is None:
            loop = jax.lax.while_loop(goes_on, functools.partial(one, order), loop)
        else:
            loop, order = jax.lax.while_loop(lambda loop: goes_on(loop[0]), epoch, (loop, order))
        carry, logs, _ = loop
        moments = zip(data.must, jax.tree.leaves(carry.opt_state), strict=True)
        fine = [~must | finite(leaf) for must, leaf in moments]
        return carry, order, logs, jnp.all(jnp.asarray([finite((carry.params, carry.state)), *fine]))

    return jax.jit(run, donate_argnums=(0, 1))


def finite(tree: Any) -> jax.Array:
    """True where every floating point leaf is finite everywhere."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in floating]))


def is_finite_by_leaf(tree: Any) -> tuple[bool, ...]:
    """For each leaf, whether it is finite everywhere."""
    return tuple(bool(finite(leaf)) for leaf in jax.tree.leaves(tree))


def last_finite(run: Callable, kept: tuple[Carry, jax.Array], data: Data, reached: int) -> tuple[Carry, jax.Array]:
    """The loop after the most steps, below reached, that leave everything finite, by bisection from kept."""

    def replay(limit):
        carry, order, _, is_finite = run(*copy(kept), data, np.int32(limit), jnp.asarray(-np.inf, float))
        return (carry, order), bool(is_finite)

    good, bad = int(kept[0].step), reached
    while bad - good > 1:
        middle = bad - 1 if bad == reached else (good + bad) // 2
        good, bad = (middle, bad) if replay(middle)[1] else (good, middle)
    return replay(good)[0]
