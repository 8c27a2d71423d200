"""What is timed: layers, heads with their loss, models and training steps, each with random data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnbp
from fnbp.contraction import contracted
from fnbp.contractions import total
from fnbp.layer import map_layers

Sides = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]  # manual, automatic, their arguments


@dataclass(frozen=True)
class Case:
    """Something that is timed.

    name   as the tables say it; PEERS of in_jax and in_torch have it too
    sides  () -> the manual function, the automatic one, and their arguments
    quick  True if --quick takes it
    """

    name: str
    sides: Callable[[], Sides]
    quick: bool = False


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(below: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Whole numbers."""
    return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


def labelled(classes: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers, with a label for each example."""
    return normal(*shape), whole(classes, shape[0])


def of_layer(layer: fnbp.Layer, x: np.ndarray, train: bool = False) -> Sides:
    """y, the gradients of all parameters and dx, for a normal dy."""
    ctx = fnbp.Context(jax.random.key(1), train=train)
    finished = map_layers(contracted(total), layer)
    params, state = layer.init(jax.random.key(0), x)
    y = jax.eval_shape(layer.forward, params, state, x, ctx)[0]

    def manual(params, state, x, dy):
        y, state, res = finished.forward(params, state, x, ctx)
        return y, state, *finished.backward(params, res, dy)

    def automatic(params, state, x, dy):
        if jnp.issubdtype(x.dtype, jnp.integer):
            y, pull, state = jax.vjp(lambda params: layer.forward(params, state, x, ctx)[:2], params, has_aux=True)
            return y, state, *pull(dy), None
        y, pull, state = jax.vjp(lambda p, x: layer.forward(p, state, x, ctx)[:2], params, x, has_aux=True)
        return y, state, *pull(dy)

    return manual, automatic, (params, state, x, normal(*y.shape, seed=1))


def of_model(net: fnbp.Layer, data: tuple[Any, Any], manual: Any = None, train: bool = False) -> Sides:
    """The value and its gradient. manual: the loss of the manual side, if it computes the same in another way."""
    loss = fnbp.softmax_cross_entropy()
    ctx = fnbp.Context(jax.random.key(1), train=train)
    sides = fnbp.value_and_grad(net, manual or loss), fnbp.automatic_value_and_grad(net, loss)
    ours, theirs = (lambda *args, side=side: side(*args, ctx) for side in sides)
    return ours, theirs, (*net.init(jax.random.key(0), data[0]), *data)


def of_step(net: fnbp.Layer, data: tuple[Any, Any], manual: Any = None) -> Sides:
    """A training step: value, gradient and Adam's update."""
    *sides, args = of_model(net, data, manual, train=True)
    adam = optax.adam(1e-3)

    def step(side, params, state, x, y, opt_state):
        value, grads = side(params, state, x, y)
        updates, opt_state = adam.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    return partial(step, sides[0]), partial(step, sides[1]), (*args, adam.init(args[0]))


def head(classes: int, positions: int, width: int) -> Sides:
    """A vocabulary head and its loss."""
    net, data = fnbp.dense(classes, b=None, W="normal"), (normal(positions, width), whole(classes, positions))
    manual = fnbp.backprop(net, fnbp.linear_cross_entropy())
    plain = fnbp.softmax_cross_entropy()

    def ours(params, state, x, y):
        done = manual(params, state, x, y)
        return done.value, done.grads, done.dx

    def theirs(params, state, x, y):
        def J(params, x):
            return jnp.mean(plain.forward(net.forward(params, state, x, fnbp.Context())[0], y)[0])

        value, grads = jax.value_and_grad(J, (0, 1))(params, x)
        return value, *grads

    return ours, theirs, (*net.init(jax.random.key(0), data[0]), *data)


def cnn() -> fnbp.Layer:
    """Two convolutions and two fully connected layers."""
    convolutions = (fnbp.conv(32, 3), fnbp.relu(), fnbp.max_pool(2), fnbp.conv(64, 3), fnbp.relu(), fnbp.max_pool(2))
    return fnbp.serial(*convolutions, fnbp.flatten(), fnbp.dense(128), fnbp.relu(), fnbp.dense(10))


def letters(vocabulary: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, and the token after each."""
    text = whole(vocabulary, batch, length + 1)
    return text[:, :-1], text[:, 1:]


def recurrent(cell: Callable[[int], fnbp.Layer]) -> Sides:
    """A cell of 256 units over 128 positions."""
    return of_layer(fnbp.scan(cell(256)), normal(32, 128, 128))


def image(*shape: int) -> np.ndarray:
    """64 images, or what a layer made of them."""
    return normal(64, *shape)


NANO = (65, 256, 6, 6, 384)  # letters, length, layers, heads, width
LINEAR = fnbp.linear_cross_entropy()

LAYERS = (
    Case("dense 1024, (512, 784)", lambda: of_layer(fnbp.dense(1024), normal(512, 784)), True),
    Case("dense 1024, (4096, 128)", lambda: of_layer(fnbp.dense(1024), normal(4096, 128))),
    Case("conv 32 3x3, (64, 28, 28, 1)", lambda: of_layer(fnbp.conv(32, 3), image(28, 28, 1)), True),
    Case("conv 64 3x3, (64, 14, 14, 32)", lambda: of_layer(fnbp.conv(64, 3), image(14, 14, 32)), True),
    Case(
        "conv_transpose 64, 16, stride 8, (4, 1000, 64)",
        lambda: of_layer(fnbp.conv_transpose(64, (16,), stride=8), normal(4, 1000, 64)),
    ),
    Case("max_pool 2x2, (64, 28, 28, 32)", lambda: of_layer(fnbp.max_pool(2), image(28, 28, 32)), True),
    Case("max_pool 3x3, stride 2", lambda: of_layer(fnbp.max_pool(3, stride=2), image(28, 28, 32))),
    Case("avg_pool 2x2, (64, 28, 28, 32)", lambda: of_layer(fnbp.avg_pool(2), image(28, 28, 32))),
    Case("batch_norm, (64, 14, 14, 64)", lambda: of_layer(fnbp.batch_norm(), image(14, 14, 64), train=True), True),
    Case("group_norm 8, (64, 14, 14, 64)", lambda: of_layer(fnbp.group_norm(8), image(14, 14, 64))),
    Case("layer_norm, (4096, 512)", lambda: of_layer(fnbp.layer_norm(), normal(4096, 512)), True),
    Case("rms_norm, (4096, 512)", lambda: of_layer(fnbp.rms_norm(), normal(4096, 512))),
    Case("gelu, (4096, 512)", lambda: of_layer(fnbp.gelu(), normal(4096, 512)), True),
    Case("silu, (4096, 512)", lambda: of_layer(fnbp.silu(), normal(4096, 512))),
    Case("swiglu 512, (1024, 512)", lambda: of_layer(fnbp.swiglu(1024, 512), normal(1024, 512))),
    Case("dropout 0.1, (4096, 512)", lambda: of_layer(fnbp.dropout(0.1), normal(4096, 512), train=True)),
    Case("embedding 16384 x 256, (8, 256)", lambda: of_layer(fnbp.embedding(16384, 256), whole(16384, 8, 256))),
    Case(
        "attention, 8 heads, causal, (1, 2048, 512)",
        lambda: of_layer(fnbp.attention(8, causal=True), normal(1, 2048, 512)),
    ),
    Case(
        "attention, 6 heads, causal, (12, 256, 384)",
        lambda: of_layer(fnbp.attention(6, causal=True), normal(12, 256, 384)),
        True,
    ),
    Case("LSTM 256, (32, 128, 128)", lambda: recurrent(fnbp.lstm_cell), True),
    Case("GRU 256, (32, 128, 128)", lambda: recurrent(fnbp.gru_cell)),
)
HEADS = (
    Case("head and loss, 2048 x 256 x 16384", lambda: head(16384, 2048, 256)),
    Case("head and loss, 2048 x 512 x 32768", lambda: head(32768, 2048, 512)),
)
MODELS = (
    Case("MLP 784-1024-1024-10, 512", lambda: of_model(fnbp.models.mlp(1024, 1024, 10), labelled(10, 512, 784)), True),
    Case("LeNet, 64", lambda: of_model(fnbp.models.lenet(), labelled(10, 64, 28, 28, 1)), True),
    Case("CNN 32-64, 64", lambda: of_model(cnn(), labelled(10, 64, 28, 28, 1))),
    Case("resnet(20), 32", lambda: of_model(fnbp.models.resnet(20), labelled(10, 32, 32, 32, 3), train=True)),
    Case(
        "LSTM classifier 128, (64, 28, 28)",
        lambda: of_model(fnbp.models.lstm_classifier(128, 10), labelled(10, 64, 28, 28)),
    ),
    Case("gpt, nanoGPT recipe, 12 x 256", lambda: of_model(fnbp.models.gpt(*NANO), letters(65, 12, 256))),
)
STEPS = (
    Case("step of LeNet, 64", lambda: of_step(fnbp.models.lenet(), labelled(10, 64, 28, 28, 1)), True),
    Case(
        "step of a gpt, 8192 positions, width 128, 4 layers",
        lambda: of_step(fnbp.models.gpt(65, 8192, 4, 4, 128), letters(65, 1, 8192)),
    ),
    Case(
        "step of a gpt, vocabulary 16384, linear_cross_entropy",
        lambda: of_step(fnbp.models.gpt(16384, 256, 2, 4, 256), letters(16384, 8, 256), LINEAR),
    ),
)
GROUPS = {"layers": LAYERS, "heads": HEADS, "models": MODELS, "training steps": STEPS}
