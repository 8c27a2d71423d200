"""A manual backward inside a Flax model of NNX: params are nnx.Param, state is nnx.BatchStat."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fnbp


class Manual(nnx.Module):
    """Any Layer of fnbp as a module of NNX."""

    def __init__(self, layer, x, rngs):
        params, state = layer.init(rngs.params(), x)
        self.params, self.state = (
            nnx.data(jax.tree.map(kind, tree)) for kind, tree in ((nnx.Param, params), (nnx.BatchStat, state))
        )
        self.apply = fnbp.to_jax(layer, with_state=True)

    def __call__(self, x, ctx=fnbp.Context()):
        held = (jax.tree.map(lambda one: one[...], tree, is_leaf=is_variable) for tree in (self.params, self.state))
        y, new = self.apply(*held, x, ctx)
        jax.tree.map(lambda one, a: one.set_value(a), self.state, new, is_leaf=is_variable)
        return y


def is_variable(node):
    """True for what NNX holds in the place of an array."""
    return isinstance(node, nnx.Variable)


class Classifier(nnx.Module):
    """A layer of Flax behind one of fnbp."""

    def __init__(self, layer, x, rngs):
        self.features, self.scores = Manual(layer, x, rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, ctx=fnbp.Context()):
        return self.scores(self.features(x, ctx))


@nnx.jit
@nnx.value_and_grad
def loss(model, x, y):
    """The mean cross-entropy in training."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x, fnbp.Context(train=True)), y).mean()


block = fnbp.serial(fnbp.dense(16), fnbp.batch_norm(), fnbp.gelu(), fnbp.dense(8))
x, y = jax.random.normal(jax.random.key(0), (12, 5)), jnp.arange(12) % 3
model, same = Classifier(block, x, nnx.Rngs(1)), Classifier(fnbp.from_jax(block), x, nnx.Rngs(1))
ours, theirs = loss(model, x, y), loss(same, x, y)  # the same net by jax.vjp, to compare
print("same gradients:", all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), ours, theirs))))
optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
for _ in range(30):
    optimizer.update(model, loss(model, x, y)[1])
print("the loss falls:", bool(loss(model, x, y)[0] < ours[0] / 2))
print("steps that the statistics have seen:", model.features.state[1]["count"][...])
