"""The compiled inner loop of training: many steps a call, on the device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnbp.arrays.placement import rows_of, summed
from fnbp.layer import Context, Layer, mask_behind
from fnbp.losses.loss import Loss, losses_of

CAPACITY = 1 << 14  # the most steps of one call
EVALUATED = 1024  # examples at once in a validation


class Carry(NamedTuple):
    """What one step hands to the next."""

    params: Any
    state: Any
    opt_state: Any
    step: jax.Array


class Data(NamedTuple):
    """What every step reads.

    x, y        all examples                       key_order   of the order of the examples in an epoch
    key_layers  of the layers that draw            must        for each leaf of opt_state, whether it must be finite
    """

    x: Any
    y: Any
    key_order: jax.Array
    key_layers: jax.Array
    must: jax.Array


def permutation(key: jax.Array, epoch: jax.Array | int, examples: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def copy(tree: Any) -> Any:
    """The same values in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)


def once(maker: Callable, *args: Any) -> Any:
    """maker(*args), made once for equal arguments, so that what is compiled for them is compiled once.

    Layers, losses and optax transformations are equal if their functions are the same objects.
    """
    try:
        hash(args)
    except TypeError:
        return maker(*args)
    return made(maker, *args)


@functools.lru_cache(maxsize=16, typed=True)  # a NamedTuple equals another of the same functions, whatever its type
def made(maker: Callable, *args: Any) -> Any:
    """maker(*args), of the last calls."""
    return maker(*args)


def losses_at(net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any, ctx: Context) -> jax.Array:
    """The loss of each example, (m,), without a gradient."""
    prediction = net.forward(params, state, x, ctx)[0]
    return losses_of(loss, prediction, y, mask_behind(net, x, ctx.mask))[0]


def one_step(
    net: Layer, loss: Loss, gradient_of: Callable, transformation: Any, batch_size: int, batches: int
) -> Callable:
    """(carry, order, data) -> carry, J: the next batch, its gradient, the update."""
    gradient, optimizer = gradient_of(net, loss), optax.with_extra_args_support(transformation)

    def step(carry, order, data):
        rows = jax.lax.dynamic_slice_in_dim(order, carry.step % batches * batch_size, batch_size)
        x, y = jax.tree.map(lambda a: rows_of(a, rows), (data.x, data.y))
        ctx = Context(jax.random.fold_in(data.key_layers, carry.step), train=True)
        (J, state), grads = gradient(carry.params, carry.state, x, y, ctx)
        updates, opt_state = optimizer.update(
            grads,
            carry.opt_state,
            carry.params,
            value=J,
            grad=grads,
            value_fn=lambda params: jnp.mean(losses_at(net, loss, params, carry.state, x, y, ctx)),
        )
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, state, opt_state, carry.step + 1), J

    return step


def compiled_loop(
    net: Layer, loss: Loss, gradient_of: Callable, transformation: Any, batch_size: int, batches: int, capacity: int
) -> Callable:
    """(carry, order, data, limit, threshold) -> carry, order, losses (capacity,), is everything finite.

    Runs steps up to limit, at most capacity of them, and stops behind a loss that is not finite or at most threshold.
    carry and order, the epoch's permutation, are donated. params and state must be finite, and those leaves of
    opt_state that data.must names.
    """
    step = one_step(net, loss, gradient_of, transformation, batch_size, batches)

    def run(carry, order, data, limit, threshold):
        first, examples = carry.step, order.shape[0]

        def goes_on(loop):
            carry, _, J = loop
            fine = jnp.isfinite(J) & (J > threshold)
            return (carry.step < limit) & (fine | (carry.step == first))

        def epoch(loop):
            (carry, losses, J), order = loop
            number = carry.step // batches
            order = jax.lax.cond(
                carry.step % batches == 0, lambda: permutation(data.key_order, number, examples), lambda: order
            )

            def one(loop):
                carry, losses, _ = loop
                at = carry.step - first
                carry, J = step(carry, order, data)
                return carry, losses.at[at].set(J), J.astype(losses.dtype)

            def within(loop):
                return goes_on(loop) & (loop[0].step // batches == number)

            return jax.lax.while_loop(within, one, (carry, losses, J)), order

        losses = jnp.full(capacity, jnp.nan, jnp.result_type(float))
        loop, order = jax.lax.while_loop(lambda loop: goes_on(loop[0]), epoch, ((carry, losses, losses[0]), order))
        carry, losses, _ = loop
        moments = zip(data.must, jax.tree.leaves(carry.opt_state), strict=True)
        fine = [~must | finite(leaf) for must, leaf in moments]
        return carry, order, losses, jnp.all(jnp.asarray([finite((carry.params, carry.state)), *fine]))

    return jax.jit(run, donate_argnums=(0, 1))


def finite(tree: Any) -> jax.Array:
    """True where every floating point leaf is finite everywhere."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in floating]))


def is_finite_by_leaf(tree: Any) -> tuple[bool, ...]:
    """For each leaf, whether it is finite everywhere."""
    return tuple(bool(finite(leaf)) for leaf in jax.tree.leaves(tree))


def evaluation(net: Layer, loss: Loss, x: Any, y: Any) -> Callable[[Any, Any], float]:
    """(params, state) -> J over x, y, in batches of at most EVALUATED examples."""
    evaluate = once(evaluator, net, loss, EVALUATED)
    return lambda params, state: float(evaluate(params, state, x, y))


def evaluator(net: Layer, loss: Loss, batch: int) -> Callable:
    """(params, state, x, y) -> J, compiled."""

    def evaluate(params, state, x, y):
        examples = jax.tree.leaves(x)[0].shape[0]
        full = examples // batch * batch
        of = lambda x, y: jnp.sum(losses_at(net, loss, params, state, x, y, Context()))  # noqa: E731
        whole = jax.tree.map(lambda a: a[:full].reshape(-1, batch, *a.shape[1:]), (x, y))
        rest = jax.tree.map(lambda a: a[full:], (x, y))
        sums = jnp.sum(jax.lax.map(lambda xy: of(*xy), whole)) if full else 0
        return (sums + (of(*rest) if full < examples else 0)) / examples

    return jax.jit(functools.partial(summed, evaluate))


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
