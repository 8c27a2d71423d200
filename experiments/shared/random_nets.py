"""Random nets, inputs and losses for the experiments on compare."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnbp

ACTIVATIONS = (
    fnbp.identity,
    fnbp.sigmoid,
    fnbp.tanh,
    fnbp.relu,
    fnbp.leaky_relu,
    fnbp.elu,
    fnbp.softplus,
    fnbp.silu,
    fnbp.gelu,
    lambda: fnbp.gelu(approximate=True),
    fnbp.softmax,
    fnbp.log_softmax,
)


class Drawn(NamedTuple):
    """A net with everything that compare takes."""

    net: fnbp.Layer
    x: jax.Array
    params: Any
    state: Any
    loss: fnbp.Loss | None
    y: Any


SIZES = (1, 2, 3, 5, 11, 17)  # a few, so that what is compiled for one net serves another


def size(rng: np.random.Generator, most: int = SIZES[-1]) -> int:
    """One of the sizes."""
    return int(rng.choice([n for n in SIZES if n <= most]))


def random_net(rng: np.random.Generator, depth: int, width: int = 17) -> fnbp.Layer:
    """serial of depth layers: dense, activations, and paths around a few of them."""
    layers: list[fnbp.Layer] = []
    n = size(rng, width)
    layers.append(fnbp.dense(n))
    while len(layers) < depth:
        choice = rng.random()
        if choice < 0.4:
            n = size(rng, width)
            layers.append(fnbp.dense(n))
        elif choice < 0.85:
            layers.append(ACTIVATIONS[rng.integers(len(ACTIVATIONS))]())
        else:
            inner = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]()
            layers.append(fnbp.skip(fnbp.serial(fnbp.dense(size(rng, width)), inner, fnbp.dense(n))))
    return fnbp.serial(*layers)


def random_subject(rng: np.random.Generator, values: np.random.Generator, depth: int, dtype: Any) -> Drawn:
    """A net, a size and a loss from rng; parameters, an input of some scale and targets from values."""
    net = random_net(rng, depth)
    m, n = size(rng), size(rng)
    shape = (m, n) if rng.random() < 0.8 else (m, size(rng, 5), n)
    x = jnp.asarray(values.standard_normal(shape) * np.exp(values.uniform(-3, 2)), dtype)
    params, state = jax.jit(net.init)(jax.random.key(int(values.integers(1 << 31))), x)
    scale = np.exp(values.uniform(-1, 1))
    params = jax.tree.map(
        lambda p: jnp.asarray((np.asarray(p, float) + 0.1 * values.standard_normal(p.shape)) * scale, dtype), params
    )
    shapes = jax.eval_shape(lambda p, s, x: net.forward(p, s, x, fnbp.Context())[0], params, state, x)
    loss, y = random_loss(rng, values, shapes)
    return Drawn(net, x, params, state, loss, y)


def random_loss(rng: np.random.Generator, values: np.random.Generator, prediction: Any) -> tuple[fnbp.Loss | None, Any]:
    """A loss with targets that fit the prediction, or none."""
    k = prediction.shape[-1]
    choices = [
        (None, None),
        (None, None),
        (fnbp.softmax_cross_entropy(), values.integers(0, k, prediction.shape[:-1]).astype(np.int32)),
        (fnbp.softmax_cross_entropy(), values.dirichlet(np.ones(k), prediction.shape[:-1]).astype(np.float32)),
        (fnbp.mean_squared_error(), values.standard_normal(prediction.shape).astype(prediction.dtype)),
        (fnbp.half_squared_error(), values.standard_normal(prediction.shape).astype(prediction.dtype)),
        (fnbp.binary_cross_entropy(from_logits=True), values.uniform(0, 1, prediction.shape).astype(prediction.dtype)),
    ]
    return choices[rng.integers(len(choices))]
