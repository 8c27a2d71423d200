"""A training script of Flax, with clipped gradients: three lines changed, marked fnbp."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import fnbp  # fnbp


class Classifier(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(4)(nn.relu(nn.Dense(32)(x.reshape(*x.shape[:-3], -1))))


def loss(params, x, y):
    """The cross-entropy of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(model.apply(params, x)), y)


key, model = jax.random.key(0), Classifier()
y = jnp.arange(96) % 4
x = 0.5 * jax.random.normal(key, (96, 8, 8, 1)) + jax.nn.one_hot(y, 4).repeat(16, 1).reshape(96, 8, 8, 1)
params = model.init(key, x[0])
optimizer = optax.adam(1e-2)
clipped = fnbp.statistics.clipped(fnbp.opened(loss), limit=1.0)  # fnbp


@jax.jit
def step(params, state, x, y):
    """One step: before, jax.value_and_grad of the mean of jax.vmap(loss)."""
    (value, _), grads = clipped(params, x, y)  # fnbp
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


state, values = optimizer.init(params), []
for _ in range(40):
    params, state, value = step(params, state, x, y)
    values.append(value)
print("the loss falls:", bool(values[-1] < values[0] / 4))

losses, squares = fnbp.opened(loss, fnbp.sq_norms)(params, x, y)
norms = jnp.sqrt(sum(jax.tree.leaves(squares)))
print("norms of the gradients of", norms.shape[0], "images, all finite:", bool(jnp.isfinite(norms).all()))
uses = fnbp.opened(loss).uses(params, x, y)  # print(uses) shows every place where a parameter meets data
print("the kernel of the convolution:", uses.rows[0].rule)
