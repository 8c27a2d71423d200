"""What runs here lowers for other devices too: every layer, and a training step of every model."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

import fnbp
from tests.cases import CASES, draw, eager_vjp

DEVICES = ("cuda", "rocm", "tpu")
IMAGES, ROWS, TOKENS = (2, 28, 28, 1), (2, 28, 28), (2, 131)
MODELS = {
    "mlp": (fnbp.models.mlp(32, 10), (2, 17), (2,)),
    "lenet": (fnbp.models.lenet(), IMAGES, (2,)),
    "resnet": (fnbp.models.resnet(8), (2, 16, 16, 3), (2,)),
    "lstm_classifier": (fnbp.models.lstm_classifier(16, 10), ROWS, (2,)),
    "gru_classifier": (fnbp.models.gru_classifier(16, 10), ROWS, (2,)),
    "gpt": (fnbp.models.gpt(13, 131, 2, 2, 16, rate=0.1), TOKENS, TOKENS),
}


def lowered(f, *args):
    """f, lowered for other devices."""
    return export.export(jax.jit(f), platforms=DEVICES)(*args)


def those(ids, quick):
    """All ids as parameters, of which pytest without options takes the quick ones."""
    return [pytest.param(id, marks=[] if id in quick else [pytest.mark.slow]) for id in ids]


@pytest.mark.parametrize("id", those([case.id for case in CASES], ("attention:blocks", "scan:lstm_in_chunks", "conv")))
def test_a_layer_lowers_for_other_devices(id):
    case = next(case for case in CASES if case.id == id)
    params, state, x, dy = draw(case, case.shapes[0], jnp.float32)

    passes = lambda params, x, dy: eager_vjp(case, params, state, x, dy)  # noqa: E731
    assert lowered(passes, params, x, dy).platforms == DEVICES


@pytest.mark.parametrize("name", those(MODELS, ("mlp", "gpt")))
def test_a_training_step_lowers_for_other_devices(name):
    net, of_x, of_y = MODELS[name]
    x = jnp.zeros(of_x, jnp.int32 if name == "gpt" else jnp.float32)
    params, state = net.init(jax.random.key(0), x)
    optimizer = optax.adam(1e-3)

    def step(params, state, opt_state, x, y, key):
        gradient = fnbp.value_and_grad(net, fnbp.softmax_cross_entropy())
        (J, state), grads = gradient(params, state, x, y, fnbp.Context(key, train=True))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, J

    args = params, state, optimizer.init(params), x, jnp.zeros(of_y, jnp.int32), jax.random.key(1)
    assert lowered(step, *args).platforms == DEVICES


def test_what_is_of_one_device_alone_does_not_lower():
    alone = lambda x: jax.lax.platform_dependent(x, cpu=jnp.sin)  # noqa: E731
    with pytest.raises(NotImplementedError):
        lowered(alone, jnp.ones(3))
