"""A manual backward inside an Equinox model: params are a field of a module, the function is static."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

import fnbp


class Manual(eqx.Module):
    """Any Layer of fnbp as an Equinox module, for a batch."""

    params: dict | tuple
    apply: Callable = eqx.field(static=True)

    def __init__(self, layer, x, key):
        self.params = layer.init(key, x)[0]
        self.apply = fnbp.to_jax(layer)

    def __call__(self, x):
        return self.apply(self.params, x)


class Regressor(eqx.Module):
    """An Equinox model with a recurrent net of fnbp inside."""

    reader: Manual
    head: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.head)(self.reader(x))


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss(model, x, y):
    """The mean squared error."""
    return jnp.mean((model(x)[:, 0] - y) ** 2)


x = jax.random.normal(jax.random.key(0), (32, 6, 3))
y = x[:, :, 0].sum(1)
reader = Manual(fnbp.serial(fnbp.scan(fnbp.lstm_cell(11)), fnbp.last()), x, jax.random.key(1))
model = Regressor(reader, eqx.nn.Linear(11, 1, key=jax.random.key(2)))
first, _ = loss(model, x, y)
for _ in range(100):
    _, gradient = loss(model, x, y)
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))
print("the loss falls:", bool(loss(model, x, y)[0] < first / 4))
