"""A manual backward inside a Flax model: fnbp.to_jax makes a jax.custom_vjp of any layer or net."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import fnbp

block = fnbp.serial(fnbp.layer_norm(), fnbp.dense(16), fnbp.gelu(), fnbp.dense(8))
manual = fnbp.to_jax(block)  # manual(params, x), for jax.grad
automatic = fnbp.to_jax(fnbp.from_jax(block))  # the same net by jax.vjp, to compare


class Classifier(nn.Module):
    """Two layers of Flax around one of fnbp."""

    middle: Callable

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        params = self.param("block", lambda key: block.init(key, x)[0])
        return nn.Dense(3)(x + self.middle(params, x))


def loss(params, model, x, y):
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


x, y = jax.random.normal(jax.random.key(0), (12, 5)), jnp.arange(12) % 3
params = Classifier(manual).init(jax.random.key(1), x)
ours, theirs = (jax.grad(loss)(params, Classifier(middle), x, y) for middle in (manual, automatic))
print("same gradients:", all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), ours, theirs))))

before = loss(params, Classifier(manual), x, y)
for _ in range(20):
    gradient = jax.grad(loss)(params, Classifier(manual), x, y)
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
print("the loss falls:", bool(loss(params, Classifier(manual), x, y) < before / 2))
