"""A training script of Equinox that logs the noise scale of its gradients: three lines changed, marked fnbp."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import fnbp  # fnbp


class Reader(eqx.Module):
    """A GRU over a sequence, and a linear head."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        self.cell, self.head = eqx.nn.GRUCell(3, 16, key=key), eqx.nn.Linear(16, 1, key=key)

    def __call__(self, xs):
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(16), xs)
        return self.head(h)[0]


key = jax.random.key(0)
params, static = eqx.partition(Reader(key), eqx.is_inexact_array)


def loss(params, x, y):
    """The squared error of one sequence."""
    return (eqx.combine(params, static)(x) - y) ** 2


x = jax.random.normal(key, (256, 6, 3))
y = x[:, :, 0].mean(1) + 0.1 * jax.random.normal(key, (256,))
optimizer = optax.adam(3e-3)
noise_scale = fnbp.statistics.noise_scale(fnbp.opened(loss))  # fnbp


@jax.jit
def step(params, state, x, y):
    """One step: before, jax.value_and_grad of the mean of jax.vmap(loss)."""
    (value, _, noise), grads = noise_scale(params, x, y)  # fnbp
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, noise.trace, noise.square


state, log = optimizer.init(params), []
for i in range(200):
    rows = jax.random.randint(jax.random.fold_in(key, i), (32,), 0, 256)
    params, state, *seen = step(params, state, x[rows], y[rows])
    log.append(seen)
value, trace, square = (jnp.array(column) for column in zip(*log, strict=True))
print("the loss falls:", bool(value[-20:].mean() < value[:20].mean() / 3))
early, late = (float(trace[at].mean() / square[at].mean()) for at in (slice(0, 20), slice(-100, None)))
print(f"noise scale: about {early:.0f} examples early, {late:.0f} late; it grows: {late > early}")
