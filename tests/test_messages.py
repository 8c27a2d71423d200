"""What a newcomer reads after a slip: the layer, what came, what was expected, and the remedy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import fnbp
from fnbp.arrays.checks import describe

KEY, X = jax.random.key(0), jnp.zeros((2, 4))
IMAGES = jnp.zeros((2, 3, 32, 32))
INFINITE = float("inf")


def forward(layer, x, shape=None, params=None):
    """A layer that was made for x, or for zeros of that shape, on x."""
    made, state = layer.init(KEY, x if shape is None else jnp.zeros(shape))
    return layer.forward(made if params is None else params, state, x, fnbp.Context())


def mine(x):
    return x


@dataclasses.dataclass
class Held:
    a: np.ndarray
    b: np.ndarray


FUNCTIONS = [
    (
        lambda: fnbp.serial(fnbp.dense(3), jax.nn.relu),
        r"fnbp\.relu\(\) is the layer of that name; fnbp\.from_jax\(f\) mak",
    ),
    (
        lambda: fnbp.serial(jnp.sin),
        r"serial: part 0 must be a Layer, got .*sin; fnbp\.from_jax\(f\) makes a Layer of a JAX",
    ),
    (lambda: fnbp.skip(fnbp.relu), r"skip: the layer must be a Layer, got function relu; call it: relu\(\)$"),
    (lambda: fnbp.skip(fnbp.dense), r"got function dense; call it: dense\(\.\.\.\)$"),
    (lambda: fnbp.serial(lambda: fnbp.relu()), r"if it makes one, call it: <lambda>\(\); fnbp\.from_jax"),
    (lambda: fnbp.value_and_grad(fnbp.relu(), fnbp.mean_squared_error), r"call it: mean_squared_error\(\)$"),
    (
        lambda: fnbp.value_and_grad(fnbp.relu(), optax.softmax_cross_entropy),
        r"fnbp\.softmax_cross_entropy\(\) is the loss of that name; fnbp\.loss_from_jax\(f\) makes a Loss of a "
        r"function \(prediction, target\) -> losses \(m,\)$",
    ),
    (
        lambda: fnbp.value_and_grad(fnbp.relu(), lambda p, t: p),
        r"got function <lambda>; fnbp\.loss_from_jax\(f\) makes a",
    ),
    (lambda: fnbp.value_and_grad(fnbp.relu(), "mse"), r"loss must be a Loss, got str 'mse'$"),
    (
        lambda: fnbp.serial([fnbp.relu(), fnbp.tanh()]),
        r"got a list of 2: .*; serial takes layers one by one: serial\(\*l",
    ),
    (lambda: fnbp.serial(fnbp.tanh() for _ in range(2)), r"serial takes layers one by one: serial\(\*layers\)"),
    (
        lambda: fnbp.parallel((fnbp.relu(),)),
        r"parallel\(sum\): part 0 .* parallel takes layers one by one: parallel\(\*l",
    ),
    (
        lambda: fnbp.stacked([fnbp.rnn_cell(3)]),
        r"stacked: part 0 .*; stacked takes layers one by one: stacked\(\*layers\)",
    ),
    (
        lambda: fnbp.serial(fnbp.relu())({}, X),
        r"serial: a Layer is not called; its forward is net\.forward\(params, st",
    ),
    (lambda: fnbp.dense(3, W=fnbp.relu()), r"dense\(3\): W must be an initializer, .* got Layer relu"),
    (lambda: fnbp.initializer(fnbp.relu()), r"unknown initializer relu\(\)"),
    (lambda: fnbp.backprop(fnbp.relu(), fnbp.mean_squared_error(), fnbp.relu()), r"contract must be .* got Layer relu"),
    (
        lambda: fnbp.from_jax(lambda p, x: x, fnbp.relu()),
        r"from_jax: init must be a function \(key, x\) -> params, got La",
    ),
    (lambda: fnbp.from_jax(lambda p, x: x, {}), r"from_jax: init must be a function .* got an empty dict"),
    (lambda: fnbp.from_jax(3), r"from_jax: expected a Layer or a function apply\(params, x\), got int 3"),
    (
        lambda: fnbp.from_jax(jnp.sin),
        r"from_jax: sin must take \(params, x\); for a function of x alone: from_jax\(lambda params, x: sin\(x\)\)$",
    ),
    (
        lambda: fnbp.from_jax(mine, name="other"),
        r"from_jax: mine must take .* from_jax\(lambda params, x: mine\(x\)\)$",
    ),
    (lambda: fnbp.from_jax(lambda a, b, c: a), r"from_jax: the function must take \(params, x\)$"),
    (lambda: fnbp.transformer_block(4, 2, norm="layer_norm"), r"transformer_block: norm must be a constructor"),
    (lambda: fnbp.transformer_block(4, 2, mlp=fnbp.relu), r"transformer_block: mlp must be a Layer.*call it: relu\(\)"),
]
INITIALISERS = [
    (
        lambda: fnbp.dense(8, 16),
        r"dense\(8\): W must be an initializer, a name or a function \(key, shape, dtype\) -> array, got 16; the "
        r"number of inputs is inferred from x$",
    ),
    (lambda: fnbp.dense(8, "glorot"), r"dense\(8\): W: unknown initializer 'glorot'; did you mean 'glorot_"),
    (lambda: fnbp.dense(8, b=1), r"dense\(8\): b must be an initializer"),
    (lambda: fnbp.dense(8, ["a"]), r"dense\(8\): W must be an initializer, .* got \['a'\]"),
    (lambda: fnbp.conv(8, 3, W="a"), r"conv\(8, 3\): W: unknown initializer 'a'"),
    (lambda: fnbp.conv(8, 3, b="a"), r"conv\(8, 3\): b: unknown initializer 'a'"),
    (lambda: fnbp.conv_transpose(8, 3, W="a"), r"conv_transpose\(8, 3\): W: unknown initializer 'a'"),
    (lambda: fnbp.conv_transpose(8, 3, b="a"), r"conv_transpose\(8, 3\): b: unknown initializer 'a'"),
    (lambda: fnbp.bias("a"), r"bias: b: unknown initializer 'a'"),
    (lambda: fnbp.embedding(3, 5, "a"), r"embedding\(3, 5\): E: unknown initializer 'a'"),
    (lambda: fnbp.positions(3, "a"), r"positions\(3\): P: unknown initializer 'a'"),
    (lambda: fnbp.rnn_cell(3, "a"), r"rnn_cell\(3\): W: unknown initializer 'a'"),
    (lambda: fnbp.lstm_cell(3, U="a"), r"lstm_cell\(3\): U: unknown initializer 'a'"),
    (lambda: fnbp.gru_cell(3, U=5), r"gru_cell\(3\): U must be an initializer"),
    (lambda: fnbp.attention(2, W="a"), r"attention\(2\): W: unknown initializer 'a'"),
    (lambda: fnbp.attention(2, b=0), r"attention\(2\): b must be an initializer"),
    (lambda: fnbp.attention(2, W_out="a"), r"attention\(2\): W_out: unknown initializer 'a'"),
    (lambda: fnbp.gelu_mlp(8, 4, W_out=0), r"dense\(4\): W must be an initializer"),
    (
        lambda: fnbp.dense(8, lambda *_: X).init(KEY, X),
        r"dense\(8\): the initializer of W must make shape \(8, 4\), got fl",
    ),
    (
        lambda: fnbp.dense(8, jax.nn.initializers.he_normal).init(KEY, X),
        r"dense\(8\): W: he_normal makes an initializer",
    ),
    (lambda: fnbp.parallel(fnbp.relu(), join="add"), r"parallel: unknown join 'add'"),
    (lambda: fnbp.models.mlp(3, activation="rleu"), r"mlp: unknown activation 'rleu'; did you mean 'relu'"),
    (lambda: fnbp.models.lenet(activation="rleu"), r"lenet: unknown activation 'rleu'; did you mean 'relu'"),
    (lambda: fnbp.activation(["relu"]), r"unknown activation \['relu'\]\. There are"),
]
FINITE = [
    (lambda value=value, f=f: f(value), rf"{name}: {what} must be a (finite )?number")
    for value in (INFINITE, float("nan"), "a", np.complex64(1), 10**400)
    for name, what, f in (
        ("leaky_relu", "slope", fnbp.leaky_relu),
        ("elu", "alpha", fnbp.elu),
        ("layer_norm", "eps", fnbp.layer_norm),
        ("rms_norm", "eps", fnbp.rms_norm),
        (r"group_norm\(2\)", "eps", lambda eps: fnbp.group_norm(2, eps)),
        ("batch_norm", "eps", lambda eps: fnbp.batch_norm(eps=eps)),
        ("batch_norm", "momentum", fnbp.batch_norm),
        (r"attention\(2\)", "rotary", lambda base: fnbp.attention(2, rotary=base)),
        ("sinusoids", "base", fnbp.sinusoids),
        (r"dropout\(.*\)", "rate", fnbp.dropout),
        (r"drop_path\(.*\)", "rate", fnbp.drop_path),
        ("transformer_block", "rate", lambda rate: fnbp.transformer_block(4, 2, rate=rate)),
        ("stacked", "rate", lambda rate: fnbp.stacked(fnbp.rnn_cell(3), rate=rate)),
        ("gpt", "rate", lambda rate: fnbp.models.gpt(5, 7, 2, 2, 4, rate)),
        ("gru_classifier", "rate", lambda rate: fnbp.models.gru_classifier(5, 7, 2, rate)),
    )
]
OPTIONS = [
    (lambda: fnbp.dropout(True), r"dropout\(True\): rate must be a number, got True"),
    (lambda: fnbp.transformer_block(4, 2, rate=None), r"transformer_block: rate must be a number, got None"),
    (lambda: fnbp.transformer_block(4, 2, causal="x"), r"transformer_block: causal must be a bool, got str 'x'"),
    (lambda: fnbp.scan(fnbp.rnn_cell(3), reverse="x"), r"scan: reverse must be a bool, got str 'x'"),
    (lambda: fnbp.residual(3, project="x"), r"residual\(3\): project must be a bool, got str 'x'"),
    (lambda: fnbp.serial(name=3), r"serial: name must be a str, got int 3"),
    (lambda: fnbp.from_jax(mine, name=3), r"from_jax: name must be a str, got int 3"),
    (lambda: fnbp.stateless(mine, mine, mine, 3), r"stateless: name must be a str, got int 3"),
    (lambda: fnbp.bidirectional(fnbp.rnn_cell(3), 0), r"scan: the cell must be a Layer, got int 0"),
    (
        lambda: fnbp.embedding(3, 5, dtype=int),
        r"embedding\(3, 5\): dtype must be a floating point dtype, got <class 'int'>",
    ),
    (
        lambda: fnbp.embedding(3, 5, dtype="floaty"),
        r"embedding\(3, 5\): dtype must be a floating point dtype, got 'floaty'",
    ),
    (lambda: fnbp.binary_cross_entropy("x"), r"binary_cross_entropy: from_logits must be a bool, got str 'x'"),
]
HUGE = [
    (lambda: fnbp.dense(10**12), r"dense\(1000000000000\): n_out is too large"),
    (lambda: fnbp.conv(10**12, 3), r"conv\(1000000000000, 3\): n_out is too large"),
    (lambda: fnbp.embedding(10**12, 3), r"embedding\(.*\): size is too large"),
    (
        lambda: fnbp.embedding(10**9, 10**9),
        r"embedding\(.*\): E of shape .* is too large: 1,000,000,000,000,000,000 numb",
    ),
    (lambda: fnbp.positions(10**12), r"positions\(.*\): length is too large"),
    (lambda: fnbp.lstm_cell(10**12), r"lstm_cell\(.*\): n is too large"),
    (lambda: fnbp.lstm_cell(2**31 - 1).init(KEY, (None, X)), r"lstm_cell\(.*\): U of shape .* is too large"),
    (lambda: fnbp.dense(2**31 - 1).init(KEY, jnp.zeros((1, 64))), r"dense\(.*\): W of shape .* is too large"),
    (lambda: fnbp.conv(3, 10**6).init(KEY, jnp.zeros((2, 5, 5, 3))), r"conv\(3, 1000000\): W of shape .* is too large"),
    (lambda: fnbp.conv(3, 3, padding=10**12), r"conv\(3, 3\): padding must be"),
    (
        lambda: forward(fnbp.max_pool(1000, padding="SAME"), jnp.zeros((2, 500, 500, 3))),
        r"max_pool\(1000\): kernel \(1000, 1000\) is too large: 1,000,000 numbers a window",
    ),
]
LAST = r"; channels are last: \(m, height, width, channels\)$"
CHANNELS = [
    (lambda: forward(fnbp.conv(5, 5, padding="VALID"), IMAGES), r"conv\(5, 5\): the kernel spans.*" + LAST),
    (lambda: forward(fnbp.max_pool(5), IMAGES), r"max_pool\(5\): the kernel spans.*" + LAST),
    (lambda: forward(fnbp.conv(5, 3), IMAGES, (2, 32, 32, 3)), r"conv\(5, 3\): params\['W'\] has shape.*" + LAST),
    (lambda: forward(fnbp.models.lenet(), jnp.zeros((2, 1, 28, 28))), r"max_pool\(2\): the kernel spans.*" + LAST),
    (lambda: forward(fnbp.models.resnet(8), IMAGES, (2, 32, 32, 3)), r"conv\(16, \(3, 3\)\): params.*" + LAST),
]
H = r"or None for zeros; got "
CELLS = [
    (
        lambda: forward(fnbp.rnn_cell(3), ((jnp.zeros((2, 3)),), X)),
        r"rnn_cell\(3\): h must be one array of shape \(2, 3\), " + H + r"a tuple of 1: float32 of shape \(2, 3\)$",
    ),
    (
        lambda: forward(fnbp.gru_cell(3), ([jnp.zeros((2, 3))], X)),
        r"gru_cell\(3\): h must be one array.*" + H + "a list",
    ),
    (
        lambda: forward(fnbp.lstm_cell(3), ([jnp.zeros((2, 3))] * 2, X)),
        r"lstm_cell\(3\): h must be a tuple \(h, s\), both arrays of shape \(2, 3\), " + H + "a list of 2",
    ),
    (
        lambda: forward(fnbp.lstm_cell(3), (jnp.zeros((2, 3)), X)),
        r"lstm_cell\(3\): h must be a tuple .* got float32 of",
    ),
    (
        lambda: forward(fnbp.rnn_cell(3), (jnp.zeros((2, 3), int), X)),
        r"rnn_cell\(3\): h must be a floating point array",
    ),
    (
        lambda: fnbp.rnn_cell(3).init(KEY, X),
        r"rnn_cell\(3\): a cell takes a pair \(h, x\), .* got float32 of shape \(2, 4\)",
    ),
]
ALL = FUNCTIONS + INITIALISERS + FINITE + OPTIONS + HUGE + CHANNELS + CELLS


@pytest.mark.parametrize(("call", "message"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_the_message_is(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)


NUMBERS = np.zeros((50, 50))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": NUMBERS, "b": 1}, "a dict of 2: 'a', 'b'"),
        ({}, "an empty dict"),
        (
            [NUMBERS] * 9,
            "a list of 9: float64 of shape (50, 50), float64 of shape (50, 50), float64 of shape (50, 50), ...",
        ),
        (Held(NUMBERS, NUMBERS), "Held of a, b"),
        (fnbp.relu(), "Layer relu"),
        (fnbp.relu, "function relu"),
        ("a" * 999, "str " + "'" + "a" * 76 + "..."),
        ({1: NUMBERS}.values(), None),
    ],
)
def test_a_value_is_described_in_few_words(value, text):
    told = describe(value)
    assert len(told) <= 160 and "\n" not in told
    assert text is None or told == text
