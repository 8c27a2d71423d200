"""A manual backward inside a Flax model of Linen: params, and state among the batch_stats."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import fnbp

block = fnbp.serial(fnbp.dense(16), fnbp.batch_norm(), fnbp.gelu(), fnbp.dense(8))


class Manual(nn.Module):
    """Any Layer of fnbp as a module of Linen."""

    layer: fnbp.Layer

    @nn.compact
    def __call__(self, x, train=False):
        params = self.param("params", lambda key: self.layer.init(key, x)[0])
        state = self.variable("batch_stats", "state", lambda: self.layer.init(jax.random.key(0), x)[1])
        ctx = fnbp.Context(self.make_rng("dropout") if self.has_rng("dropout") else None, train=train)
        y, new = fnbp.to_jax(self.layer, with_state=True)(params, state.value, x, ctx)
        if train and not self.is_initializing():
            state.value = new
        return y


class Classifier(nn.Module):
    """Two layers of Flax around one of fnbp."""

    layer: fnbp.Layer

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        return nn.Dense(3)(x + Manual(self.layer)(x, train))


def loss(params, held, layer, x, y):
    """The mean cross-entropy, and the new state."""
    scores, new = Classifier(layer).apply({"params": params, **held}, x, True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean(), new


x, y = jax.random.normal(jax.random.key(0), (12, 5)), jnp.arange(12) % 3
held = Classifier(block).init(jax.random.key(1), x, True)
params, held = held["params"], {"batch_stats": held["batch_stats"]}
gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)

(first, _), ours = gradient(params, held, block, x, y)
_, theirs = gradient(params, held, fnbp.from_jax(block), x, y)  # the same net by jax.vjp, to compare
print("same gradients:", all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), ours, theirs))))
for _ in range(30):
    (_, held), grads = gradient(params, held, block, x, y)
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
print("the loss falls:", bool(loss(params, held, block, x, y)[0] < first / 2))
print("steps that the statistics have seen:", held["batch_stats"]["Manual_0"]["state"][1]["count"])
print("in use:", jax.tree.map(jnp.shape, Classifier(block).apply({"params": params, **held}, x)))
