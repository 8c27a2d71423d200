"""A manual backward inside an Equinox model: params are a field of a module, state is in its eqx.nn.State."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

import fnbp


class Manual(eqx.Module):
    """Any Layer of fnbp as an Equinox module, for a batch."""

    params: dict | tuple
    index: eqx.nn.StateIndex
    apply: Callable = eqx.field(static=True)

    def __init__(self, layer, x, key):
        self.params, state = layer.init(key, x)
        self.index = eqx.nn.StateIndex(state)
        self.apply = fnbp.to_jax(layer, with_state=True)

    def __call__(self, x, state, ctx=fnbp.Context()):
        y, new = self.apply(self.params, state.get(self.index), x, ctx)
        return y, state.set(self.index, new)


class Regressor(eqx.Module):
    """An Equinox model with a recurrent net of fnbp inside."""

    reader: Manual
    head: eqx.nn.Linear

    def __init__(self, layer, x, key):
        self.reader, self.head = Manual(layer, x, key), eqx.nn.Linear(11, 1, key=key)

    def __call__(self, x, state, ctx=fnbp.Context()):
        y, state = self.reader(x, state, ctx)
        return jax.vmap(self.head)(y), state


def loss(model, state, x, y):
    """The mean squared error, and the new state."""
    prediction, state = model(x, state, fnbp.Context(train=True))
    return jnp.mean((prediction[:, 0] - y) ** 2), state


x = jax.random.normal(jax.random.key(0), (32, 6, 3))
y = x[:, :, 0].sum(1)
reader = fnbp.serial(fnbp.scan(fnbp.lstm_cell(11)), fnbp.last(), fnbp.batch_norm())
model, state = eqx.nn.make_with_state(Regressor)(reader, x, jax.random.key(1))
gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
(first, _), _ = gradient(model, state, x, y)
for _ in range(100):
    (_, state), grads = gradient(model, state, x, y)
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
value, state = loss(model, state, x, y)
print("the loss falls:", bool(value < first / 4))
print("steps that the statistics have seen:", state.get(model.reader.index)[2]["count"])
