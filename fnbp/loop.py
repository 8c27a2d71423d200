"""The compiled inner loop of training: many steps a call, on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnbp.layer import Context, Layer
from fnbp.losses import Loss

CAPACITY = 1 << 14  # the most steps of one call
EVALUATED = 1024  # examples at once in a validation


class Carry(NamedTuple):
    """What one step hands to the next."""

    params: Any
    state: Any
    opt_state: Any
    step: jax.Array


def permutation(key: jax.Array, epoch: jax.Array | int, examples: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def copy(tree: Any) -> Any:
    """The same values in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)


def mean_loss(net: Layer, loss: Loss) -> Callable:
    """J without a gradient: (params, state, x, y, ctx) -> value."""
    return lambda params, state, x, y, ctx: jnp.mean(loss.forward(net.forward(params, state, x, ctx)[0], y)[0])


def compiled_loop(gradient: Callable, value: Callable, optimizer: Any, batch_size: int, batches: int) -> Callable:
    """(carry, order, data, limit, threshold) -> carry, order, losses (CAPACITY,), are params and state finite.

    Runs steps up to limit, at most CAPACITY of them, and stops behind a loss that is not finite or at most threshold.
    carry and order, the epoch's permutation, are donated.
    """

    def step(carry, order, data):
        x, y, _, key_layers = data
        rows = jax.lax.dynamic_slice_in_dim(order, carry.step % batches * batch_size, batch_size)
        x, y = jax.tree.map(lambda a: jnp.take(a, rows, 0, mode="clip"), (x, y))
        ctx = Context(jax.random.fold_in(key_layers, carry.step), train=True)
        (J, state), grads = gradient(carry.params, carry.state, x, y, ctx)
        updates, opt_state = optimizer.update(
            grads,
            carry.opt_state,
            carry.params,
            value=J,
            grad=grads,
            value_fn=lambda params: value(params, carry.state, x, y, ctx),
        )
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, state, opt_state, carry.step + 1), J

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
                carry.step % batches == 0, lambda: permutation(data[2], number, examples), lambda: order
            )

            def one(loop):
                carry, losses, _ = loop
                at = carry.step - first
                carry, J = step(carry, order, data)
                return carry, losses.at[at].set(J), J.astype(losses.dtype)

            def within(loop):
                return goes_on(loop) & (loop[0].step < (number + 1) * batches)

            return jax.lax.while_loop(within, one, (carry, losses, J)), order

        losses = jnp.full(CAPACITY, jnp.nan, jnp.result_type(float))
        loop, order = jax.lax.while_loop(lambda loop: goes_on(loop[0]), epoch, ((carry, losses, losses[0]), order))
        carry, losses, _ = loop
        return carry, order, losses, finite((carry.params, carry.state))

    return jax.jit(run, donate_argnums=(0, 1))


def finite(tree: Any) -> jax.Array:
    """True where every floating point leaf is finite everywhere."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in floating]))


def evaluation(net: Layer, loss: Loss, x: Any, y: Any) -> Callable[[Any, Any], float]:
    """(params, state) -> J over x, y, in batches of at most EVALUATED examples."""
    x, y = jax.tree.map(jnp.asarray, (x, y))
    examples = jax.tree.leaves(x)[0].shape[0]
    full = examples // EVALUATED * EVALUATED

    def summed(params, state, x, y):
        return jnp.sum(loss.forward(net.forward(params, state, x, Context())[0], y)[0])

    @jax.jit
    def evaluate(params, state, x, y):
        whole = jax.tree.map(lambda a: a[:full].reshape(-1, EVALUATED, *a.shape[1:]), (x, y))
        rest = jax.tree.map(lambda a: a[full:], (x, y))
        sums = jnp.sum(jax.lax.map(lambda xy: summed(params, state, *xy), whole)) if full else 0
        return (sums + (summed(params, state, *rest) if full < examples else 0)) / examples

    return lambda params, state: float(evaluate(params, state, x, y))


def last_finite(run: Callable, kept: tuple[Carry, jax.Array], data: Any, reached: int) -> tuple[Carry, jax.Array]:
    """The loop after the most steps, below reached, that leave params and state finite, by bisection from kept."""

    def replay(limit):
        carry, order, _, is_finite = run(*copy(kept), data, np.int32(limit), jnp.asarray(-np.inf, float))
        return (carry, order), bool(is_finite)

    good, bad = int(kept[0].step), reached
    while bad - good > 1:
        middle = bad - 1 if bad == reached else (good + bad) // 2
        good, bad = (middle, bad) if replay(middle)[1] else (good, middle)
    return replay(good)[0]
