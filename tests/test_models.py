"""The models: their gradients, their trainings, their sizes, and what they refuse."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from tests.cases import relative

rng = np.random.default_rng(0)
IMAGES = rng.standard_normal((7, 28, 28, 1)).astype(np.float32)
SMALL = rng.standard_normal((7, 11, 13, 3)).astype(np.float32)
ROWS = rng.standard_normal((7, 5, 3)).astype(np.float32)
LENGTHS = np.array([5, 1, 3, 0, 2, 4, 5])
TEXT = rng.integers(0, 13, (7, 5))
LABELS = rng.integers(0, 10, 7)
MODELS = {  # net, x, y
    "mlp": (fnbp.models.mlp(31, 17, 10), ROWS[:, 0], LABELS),
    "lenet": (fnbp.models.lenet(), IMAGES, LABELS),
    "resnet": (fnbp.models.resnet(8, width=2), SMALL, LABELS),
    "lstm_classifier": (fnbp.models.lstm_classifier(11, 10, 2, rate=0.1), ROWS, LABELS),
    "gru_classifier": (fnbp.ragged(fnbp.models.gru_classifier(11, 10)), (ROWS, LENGTHS), LABELS),
    "gpt": (fnbp.models.gpt(13, 5, 3, 2, 6, rate=0.1), TEXT, np.roll(TEXT, -1, 1)),
}
models = pytest.mark.parametrize("name", MODELS)


def test_every_model_is_here():
    assert set(fnbp.models.__all__) - {"generate"} == set(MODELS)


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@models
def test_gradients_are_the_automatic_ones(x64, name):
    net, x, y = MODELS[name]
    loss, ctx = fnbp.softmax_cross_entropy(), fnbp.Context(jax.random.key(1), train=True)
    params, state = wide(jax.jit(net.init)(jax.random.key(0), x))
    args = (params, state, wide(x), y, ctx)
    manual, automatic = (
        jax.jit(make(net, loss))(*args) for make in (fnbp.value_and_grad, fnbp.automatic_value_and_grad)
    )
    assert relative(manual, automatic) <= 1e-11


@pytest.mark.slow
@models
def test_20_steps_have_the_losses_of_the_automatic_gradient(name):
    net, x, y = MODELS[name]
    loss, key = fnbp.softmax_cross_entropy(), jax.random.key(1)
    params, state = jax.jit(net.init)(jax.random.key(0), x)
    losses = [
        fnbp.fit(
            net, loss, params, state, x, y, optimizer=optax.adam(1e-3), key=key, batch_size=7, steps=20,
            gradient=gradient, progress=False,
        ).history.loss
        for gradient in (fnbp.value_and_grad, fnbp.automatic_value_and_grad)
    ]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-3:].mean() < losses[0][:3].mean()


def count(net, x):
    params, _ = jax.eval_shape(net.init, jax.random.key(0), x)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_sizes_are_those_of_the_papers():
    # LeNet-5 with every map seen: 156 + 2,416 + 48,120 + 10,164 + 850
    assert count(fnbp.models.lenet(), IMAGES) == 61_706
    # He et al., table 6: 0.27M for 20 layers and 0.85M for 56, here with two 1x1 convolutions and their norms more
    image = np.zeros((1, 32, 32, 3), np.float32)
    assert count(fnbp.models.resnet(20), image) == 269_722 + 2_560 + 192
    assert round(count(fnbp.models.resnet(56), image) / 1e6, 2) == 0.86
    # E, P; 12 width^2 a block with its biases (b_K is none) and norms; the last norm
    block = 12 * 128**2 + (3 + 5 + 4) * 128
    assert count(fnbp.models.gpt(65, 64, 4, 4, 128), np.zeros((1, 64), int)) == (65 + 64 + 2) * 128 + 4 * block
    lstm = 4 * (28 + 128 + 2) * 128
    assert count(fnbp.models.lstm_classifier(128, 10), np.zeros((1, 28, 28), np.float32)) == lstm + 1_290


def test_a_gpt_sees_no_later_token():
    net, x, _ = MODELS["gpt"]
    params, state = net.init(jax.random.key(0), x)
    changed = x.copy()
    changed[:, 3] = (x[:, 3] + 1) % 13
    before, after = (net.forward(params, state, a, fnbp.Context())[0] for a in map(jnp.asarray, (x, changed)))
    assert relative(after[:, :3], before[:, :3]) == 0
    assert relative(after[:, 3:], before[:, 3:]) > 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fnbp.models.mlp(), r"mlp: expected at least one width"),
        (lambda: fnbp.models.resnet(18), r"resnet: depth must be 6 n \+ 2 \(8, 14, 20, ...\), got 18"),
        (lambda: fnbp.models.resnet(2), r"got 2"),
        (lambda: fnbp.models.lstm_classifier(5, 3, 0), r"lstm_classifier: layers must be at least 1, got 0"),
        (lambda: fnbp.models.gpt(13, 5, 2, 3, 8), r"gpt: width must be a multiple of heads, got 8 for 3"),
        (lambda: fnbp.transformer_block(0, 2), r"transformer_block: width must be at least 1, got 0"),
    ],
)
def test_it_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_image_too_small_for_lenet_is_refused_and_the_place_is_named():
    with pytest.raises(ValueError, match=r"conv\(16, \(5, 5\)\): the kernel spans") as told:
        fnbp.models.lenet().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    assert "lenet[3].conv(16, (5, 5))" in "\n".join([str(told.value), *told.value.__notes__])


def readme_step(net):
    """The README's training step, as it stands there, for a net."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"<!-- training step -->\n```python\n(.*?)```", readme, re.S)[1]
    code = block.partition("\n\ntrained")[0]
    room = {"jax": jax, "fnbp": fnbp, "net": net, "loss": fnbp.softmax_cross_entropy()}
    exec(compile(code, "README.md", "exec"), room)
    return room["step"], room["optimizer"]


LONG = jax.random.randint(jax.random.key(0), (6, 5), 0, 7)
STEPS = {
    "mlp": (fnbp.models.mlp(5, 3), (6, 4)),
    "lenet": (fnbp.models.lenet(3), (6, 28, 28, 1)),
    "resnet": (fnbp.models.resnet(8, 3, 2), (6, 8, 8, 3)),
    "lstm_classifier": (fnbp.models.lstm_classifier(4, 3, 2, rate=0.5), (6, 5, 2)),
    "gru_classifier": (fnbp.models.gru_classifier(4, 3, 2, rate=0.5), (6, 5, 2)),
    "gpt": (fnbp.models.gpt(7, 5, 1, 1, 4, rate=0.5), None),
}


def test_every_model_has_a_training_step():
    own = {name: getattr(fnbp.models, name) for name in fnbp.models.__all__}
    assert set(STEPS) == {name for name in own if name != "generate" and inspect.isfunction(own[name])}


@pytest.mark.parametrize("name", STEPS)
def test_the_readmes_training_step_trains_every_model(name):
    net, shape = STEPS[name]
    x = LONG if shape is None else jax.random.normal(jax.random.key(1), shape)
    y = jnp.roll(x, -1, 1) if shape is None else jnp.arange(6) % 3
    params, state = net.init(jax.random.key(0), x)
    step, optimizer = readme_step(net)
    opt_state = optimizer.init(params)
    draws = any(leaf.traits.draws for _, leaf in fnbp.leaves(net))
    values = {}
    for key in (2, 3):
        after, new, _, value = step(params, state, opt_state, x, y, jax.random.key(key))
        assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((after, new, value)))
        values[key] = float(value)
    assert (values[2] != values[3]) == draws
