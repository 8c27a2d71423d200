"""The one registry of layers under test, and the tools that every property test draws from."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import fnbp
from tests import oracles


class Case(NamedTuple):
    """A layer under test.

    id: the public name, and after a colon which of its options. shapes: of x, all distinct primes, the example first.
    oracle: (params, x) -> y by NumPy and SciPy in float64. torch: the same by PyTorch, where it is installed:
    (torch.nn.functional, params, x) -> y. state: what stands for the initial state. tokens: x is of integers below it.
    mixes: an example's y depends on other examples.
    """

    id: str
    layer: fnbp.Layer
    shapes: tuple[tuple[int, ...], ...]
    oracle: Callable[[Any, np.ndarray], np.ndarray]
    torch: Callable | None = None
    context: fnbp.Context = fnbp.Context()
    state: Callable[[Any], Any] = lambda state: state
    tokens: int = 0
    mixes: bool = False


ELEMENTWISE = ((7, 11), (5, 3, 13), (1, 2))
FEATURES = ((7, 11), (5, 3, 11), (1, 17, 11))


def affine(p, x):
    return x @ p["W"].T + p["b"]


def two_dense(p, x):
    return special.expit(affine(p[2], np.tanh(affine(p[0], x))))


def standard(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def shifted(p, x):
    return p["gamma"] * x + p["beta"]


def batch_normed_conv(p, x, stride=1):
    """The two convolutions of a residual block."""
    h = np.maximum(shifted(p[1], standard(oracles.conv(x, p[0]["W"], stride=stride), (0, 1, 2))), 0)
    return shifted(p[4], standard(oracles.conv(h, p[3]["W"]), (0, 1, 2)))


def gelu(x):
    return x * special.ndtr(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * special.expit(x)


def of_block(p, x):
    """A transformer block: five heads, gelu."""
    (norm, attend), (second, mlp) = p[0][0], p[1][0]
    h = x + oracles.attention(attend, shifted(norm, standard(x, -1)), 5, causal=True)
    return h + affine(mlp[2], gelu(affine(mlp[0], shifted(second, standard(h, -1)))))


def torch_ones(x):
    return x.new_ones(x.shape[1])


def kept(rate, shape):
    return np.asarray(jax.random.bernoulli(jax.random.key(3), np.float32(1 - rate), shape))


def kept_paths(rate, x):
    """As the second part of a serial in a skip draws."""
    key = jax.random.fold_in(jax.random.key(3), 1)
    return np.asarray(jax.random.bernoulli(key, np.float32(1 - rate), (len(x),))).reshape(-1, *[1] * (x.ndim - 1))


def waves(t, d):
    table = np.zeros((t, d))
    for pos in range(t):
        for j in range(d):
            angle = pos / 10_000 ** ((j - j % 2) / d)
            table[pos, j] = np.cos(angle) if j % 2 else np.sin(angle)
    return table


def turned(cell, p, x):
    """A cell of PyTorch's, turned over time: its last h, and every h."""
    h = x.new_zeros(len(x), p["U"].shape[1])
    h, ys = (h, h) if cell is lstm_cell else h, []
    for t in range(x.shape[1]):
        h = cell(x[:, t], h, p["W"], p["U"], p["b"], p["c"])
        ys.append(h[0] if cell is lstm_cell else h)
    return h, sys.modules["torch"].stack(ys, 1)


def rnn_tanh_cell(*args):
    return sys.modules["torch"].rnn_tanh_cell(*args)


def lstm_cell(*args):
    return sys.modules["torch"].lstm_cell(*args)


def gru_cell(*args):
    return sys.modules["torch"].gru_cell(*args)


def of_torch(F, p, x, heads, causal=False):
    """By torch's own attention."""
    part = lambda leaf, a: F.linear(a, p[leaf], p.get(f"b_{leaf}"))  # noqa: E731
    q, k, v = (part(leaf, x).unflatten(-1, (heads, -1)).movedim(2, 1) for leaf in "QKV")
    return part("O", F.scaled_dot_product_attention(q, k, v, is_causal=causal).movedim(1, 2).flatten(2))


CONV = lambda F: F.conv1d, lambda F: F.conv2d, lambda F: F.conv3d
CONV_T = lambda F: F.conv_transpose1d, lambda F: F.conv_transpose2d
MAX_POOL = lambda F: F.max_pool1d, lambda F: F.max_pool2d
AVG_POOL = lambda F: F.avg_pool1d, lambda F: F.avg_pool2d


def channels_last(f, x, W=None, *args, **options):
    """A function of PyTorch's, whose channels come second, on x and W whose channels come last."""
    arrays = [a.movedim(-1, 1) for a in (x, W) if a is not None]
    return f(*arrays, *args, **options).movedim(1, -1)


CASES = (
    Case("identity", fnbp.identity(), ELEMENTWISE, lambda p, x: x),
    Case("sigmoid", fnbp.sigmoid(), ELEMENTWISE, lambda p, x: special.expit(x), lambda F, p, x: F.sigmoid(x)),
    Case("tanh", fnbp.tanh(), ELEMENTWISE, lambda p, x: np.tanh(x), lambda F, p, x: F.tanh(x)),
    Case("relu", fnbp.relu(), ELEMENTWISE, lambda p, x: np.maximum(x, 0), lambda F, p, x: F.relu(x)),
    Case(
        "leaky_relu",
        fnbp.leaky_relu(0.2),
        ELEMENTWISE,
        lambda p, x: np.where(x < 0, 0.2 * x, x),
        lambda F, p, x: F.leaky_relu(x, 0.2),
    ),
    Case(
        "elu",
        fnbp.elu(1.7),
        ELEMENTWISE,
        lambda p, x: np.where(x > 0, x, 1.7 * (np.exp(x) - 1)),
        lambda F, p, x: F.elu(x, 1.7),
    ),
    Case("softplus", fnbp.softplus(), ELEMENTWISE, lambda p, x: np.log(1 + np.exp(x)), lambda F, p, x: F.softplus(x)),
    Case("silu", fnbp.silu(), ELEMENTWISE, lambda p, x: x * special.expit(x), lambda F, p, x: F.silu(x)),
    Case("gelu", fnbp.gelu(), ELEMENTWISE, lambda p, x: x * special.ndtr(x), lambda F, p, x: F.gelu(x)),
    Case(
        "gelu:tanh",
        fnbp.gelu(approximate=True),
        ELEMENTWISE,
        lambda p, x: gelu_tanh(x),
        lambda F, p, x: F.gelu(x, approximate="tanh"),
    ),
    Case(
        "log_softmax",
        fnbp.log_softmax(),
        ELEMENTWISE,
        lambda p, x: special.log_softmax(x, -1),
        lambda F, p, x: F.log_softmax(x, -1),
    ),
    Case("softmax", fnbp.softmax(), ELEMENTWISE, lambda p, x: special.softmax(x, -1), lambda F, p, x: F.softmax(x, -1)),
    Case("dense", fnbp.dense(13), FEATURES, affine, lambda F, p, x: F.linear(x, p["W"], p["b"])),
    Case(
        "serial",
        fnbp.serial(fnbp.dense(13), fnbp.tanh(), fnbp.dense(5), fnbp.sigmoid()),
        FEATURES,
        two_dense,
        lambda F, p, x: F.sigmoid(F.linear(F.tanh(F.linear(x, p[0]["W"], p[0]["b"])), p[2]["W"], p[2]["b"])),
    ),
    Case(
        "skip",
        fnbp.serial(fnbp.dense(13), fnbp.skip(fnbp.serial(fnbp.dense(13), fnbp.sigmoid()))),
        FEATURES,
        lambda p, x: affine(p[0], x) + special.expit(affine(p[1][0][0], affine(p[0], x))),
    ),
    Case("skip:one", fnbp.skip(fnbp.dense(11)), FEATURES, lambda p, x: x + affine(p[0], x)),
    Case(
        "dense:without_b",
        fnbp.dense(13, b=None),
        FEATURES,
        lambda p, x: x @ p["W"].T,
        lambda F, p, x: F.linear(x, p["W"]),
    ),
    Case("bias", fnbp.bias(), ELEMENTWISE, lambda p, x: x + p["b"]),
    Case(
        "conv",
        fnbp.conv(7, 3),
        ((3, 11, 13, 5), (2, 17, 5), (2, 5, 3, 7, 11)),
        lambda p, x: oracles.conv(x, p["W"], p["b"]),
        lambda F, p, x: channels_last(CONV[x.dim() - 3](F), x, p["W"], p["b"], padding=1),
    ),
    Case(
        "conv:strided",
        fnbp.conv(7, (3, 2), stride=(2, 3), padding=((1, 2), (0, 3)), dilation=(2, 1)),
        ((3, 11, 13, 5), (2, 7, 5, 1)),
        lambda p, x: oracles.conv(x, p["W"], p["b"], (2, 3), ((1, 2), (0, 3)), (2, 1)),
    ),
    Case(
        "conv:same",
        fnbp.conv(7, (2, 5), stride=(3, 2)),
        ((3, 11, 13, 5), (2, 7, 17, 3)),
        lambda p, x: oracles.conv(x, p["W"], p["b"], (3, 2)),
    ),
    Case(
        "conv:groups",
        fnbp.conv(10, 3, stride=2, padding=1, groups=5, b=None),
        ((3, 11, 13, 5), (2, 17, 5)),
        lambda p, x: oracles.conv(x, p["W"], 0.0, 2, 1, 1, 5),
        lambda F, p, x: channels_last(CONV[x.dim() - 3](F), x, p["W"], None, stride=2, padding=1, groups=5),
    ),
    Case(
        "conv:pairs",
        fnbp.serial(fnbp.dense(6), fnbp.conv(15, (3, 5), groups=3)),
        ((2, 7, 11, 5),),
        lambda p, x: oracles.conv(affine(p[0], x), p[1]["W"], p[1]["b"], groups=3),
        lambda F, p, x: channels_last(
            F.conv2d, F.linear(x, p[0]["W"], p[0]["b"]), p[1]["W"], p[1]["b"], padding="same", groups=3
        ),
    ),
    Case(
        "conv:valid",
        fnbp.conv(13, 5, padding="VALID", dilation=2),
        ((2, 11, 17, 1), (2, 17, 3)),
        lambda p, x: oracles.conv(x, p["W"], p["b"], 1, "VALID", 2),
        lambda F, p, x: channels_last(CONV[x.dim() - 3](F), x, p["W"], p["b"], dilation=2),
    ),
    Case(
        "conv_transpose",
        fnbp.conv_transpose(7, 3, stride=2, padding=1),
        ((3, 11, 13, 5), (2, 17, 3)),
        lambda p, x: oracles.conv_transpose(x, p["W"], p["b"], [2 * n - 1 for n in x.shape[1:-1]], 2, 1),
        lambda F, p, x: channels_last(CONV_T[x.dim() - 3](F), x, p["W"], p["b"], stride=2, padding=1),
    ),
    Case(
        "conv_transpose:same",
        fnbp.conv_transpose(7, (5, 2), stride=(3, 2)),
        ((3, 5, 7, 2),),
        lambda p, x: oracles.conv_transpose(x, p["W"], p["b"], (3 * x.shape[1], 2 * x.shape[2]), (3, 2)),
    ),
    Case(
        "conv_transpose:groups",
        fnbp.conv_transpose(10, 3, stride=2, padding="VALID", dilation=2, groups=5, b=None),
        ((2, 7, 3, 5),),
        lambda p, x: oracles.conv_transpose(x, p["W"], 0.0, [2 * n + 3 for n in x.shape[1:-1]], 2, "VALID", 2, 5),
        lambda F, p, x: channels_last(F.conv_transpose2d, x, p["W"], None, stride=2, dilation=2, groups=5),
    ),
    Case(
        "conv_transpose:pairs",
        fnbp.serial(fnbp.dense(6), fnbp.conv_transpose(15, 3, stride=2, padding=1, groups=3, b=None)),
        ((2, 5, 7, 3),),
        lambda p, x: oracles.conv_transpose(
            affine(p[0], x), p[1]["W"], 0.0, [2 * n - 1 for n in x.shape[1:-1]], 2, 1, 1, 3
        ),
        lambda F, p, x: channels_last(
            F.conv_transpose2d, F.linear(x, p[0]["W"], p[0]["b"]), p[1]["W"], None, stride=2, padding=1, groups=3
        ),
    ),
    Case(
        "max_pool",
        fnbp.max_pool(2),
        ((3, 11, 13, 5), (2, 17, 3)),
        lambda p, x: oracles.pool(lambda held: held.max(0), x, 2),
        lambda F, p, x: channels_last(MAX_POOL[x.dim() - 3](F), x, kernel_size=2),
    ),
    Case(
        "max_pool:overlapping",
        fnbp.max_pool(3, stride=2, padding="SAME"),
        ((3, 11, 13, 5), (2, 7, 5, 3)),
        lambda p, x: oracles.pool(lambda held: held.max(0), x, 3, 2, "SAME"),
        lambda F, p, x: channels_last(F.max_pool2d, x, kernel_size=3, stride=2, padding=1),
    ),
    Case(
        "avg_pool",
        fnbp.avg_pool((2, 3)),
        ((3, 11, 13, 5),),
        lambda p, x: oracles.pool(lambda held: held.mean(0), x, (2, 3)),
        lambda F, p, x: channels_last(F.avg_pool2d, x, kernel_size=(2, 3)),
    ),
    Case(
        "avg_pool:overlapping",
        fnbp.avg_pool(3, stride=2, padding="SAME"),
        ((3, 11, 13, 5), (2, 17, 7)),
        lambda p, x: oracles.pool(lambda held: held.mean(0), x, 3, 2, "SAME"),
        lambda F, p, x: channels_last(
            AVG_POOL[x.dim() - 3](F), x, kernel_size=3, stride=2, padding=1, count_include_pad=False
        ),
    ),
    Case(
        "avg_pool:counting",
        fnbp.avg_pool(3, stride=2, padding=1, count_padding=True),
        ((3, 11, 13, 5),),
        lambda p, x: oracles.pool(lambda held: held.sum(0) / 9, x, 3, 2, 1),
        lambda F, p, x: channels_last(F.avg_pool2d, x, kernel_size=3, stride=2, padding=1),
    ),
    Case(
        "global_avg_pool",
        fnbp.global_avg_pool(),
        ((3, 11, 13, 5), (2, 17, 3)),
        lambda p, x: x.mean(tuple(range(1, x.ndim - 1))),
    ),
    Case("reshape", fnbp.reshape(-1, 5), ((3, 5, 13, 11), (2, 5)), lambda p, x: x.reshape(len(x), -1, 5)),
    Case("flatten", fnbp.flatten(), ((3, 5, 13, 11), (2, 5)), lambda p, x: x.reshape(len(x), -1)),
    Case(
        "layer_norm",
        fnbp.layer_norm(),
        FEATURES,
        lambda p, x: standard(x, -1) * p["gamma"] + p["beta"],
        lambda F, p, x: F.layer_norm(x, x.shape[-1:], p["gamma"], p["beta"]),
    ),
    Case(
        "rms_norm",
        fnbp.rms_norm(),
        FEATURES,
        lambda p, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["gamma"],
        lambda F, p, x: F.rms_norm(x, x.shape[-1:], p["gamma"], 1e-6),
    ),
    Case(
        "group_norm",
        fnbp.group_norm(3),
        ((2, 5, 7, 3), (2, 5, 3)),
        lambda p, x: standard(x, tuple(range(1, x.ndim - 1))) * p["gamma"] + p["beta"],
        lambda F, p, x: channels_last(lambda x: F.group_norm(x, 3, p["gamma"], p["beta"]), x),
    ),
    Case(
        "group_norm:pairs",
        fnbp.serial(fnbp.dense(6), fnbp.group_norm(3)),
        ((2, 5, 7, 3), (3, 5, 7)),
        lambda p, x: (
            standard(affine(p[0], x).reshape(len(x), -1, 3, 2), (1, 3)).reshape(*x.shape[:-1], 6) * p[1]["gamma"]
            + p[1]["beta"]
        ),
        lambda F, p, x: channels_last(
            lambda x: F.group_norm(x, 3, p[1]["gamma"], p[1]["beta"]), F.linear(x, p[0]["W"], p[0]["b"])
        ),
    ),
    Case(
        "group_norm:one",
        fnbp.group_norm(1),
        ((2, 5, 7, 3), (5, 11)),
        lambda p, x: standard(x, tuple(range(1, x.ndim))) * p["gamma"] + p["beta"],
        lambda F, p, x: channels_last(lambda x: F.group_norm(x, 1, p["gamma"], p["beta"]), x),
    ),
    Case(
        "batch_norm",
        fnbp.batch_norm(),
        ((7, 11), (5, 3, 11), (2, 5, 7, 3)),
        lambda p, x: standard(x, tuple(range(x.ndim - 1))) * p["gamma"] + p["beta"],
        lambda F, p, x: channels_last(lambda x: F.batch_norm(x, None, None, p["gamma"], p["beta"], True), x),
        context=fnbp.Context(train=True),
        mixes=True,
    ),
    Case(
        "batch_norm:in_use",
        fnbp.batch_norm(),
        ((7, 11), (2, 5, 7, 3)),
        lambda p, x: (x - 0.3) / np.sqrt(1.7 + 1e-5) * p["gamma"] + p["beta"],
        lambda F, p, x: channels_last(
            lambda x: F.batch_norm(x, 0.3 * torch_ones(x), 1.7 * torch_ones(x), p["gamma"], p["beta"]), x
        ),
        state=lambda s: {"mean": s["mean"] + 0.3, "var": s["var"] + 0.7, "count": s["count"] + 1},
    ),
    Case(
        "dropout",
        fnbp.dropout(0.3),
        ELEMENTWISE,
        lambda p, x: x * kept(0.3, x.shape) / 0.7,
        context=fnbp.Context(jax.random.key(3), train=True),
    ),
    Case("dropout:in_use", fnbp.dropout(0.3), ELEMENTWISE, lambda p, x: x),
    Case(
        "drop_path",
        fnbp.skip(fnbp.serial(fnbp.dense(11), fnbp.drop_path(0.3))),
        FEATURES,
        lambda p, x: x + affine(p[0][0], x) * kept_paths(0.3, x) / 0.7,
        context=fnbp.Context(jax.random.key(3), train=True),
    ),
    Case(
        "embedding",
        fnbp.embedding(13, 3),
        ((5, 11), (7,), (1, 2, 17)),
        lambda p, x: p["E"][x],
        lambda F, p, x: F.embedding(x, p["E"]),
        tokens=13,
    ),
    Case("positions", fnbp.positions(17), ((7, 5, 3), (2, 17, 3)), lambda p, x: x + p["P"][: x.shape[1]]),
    Case("sinusoids", fnbp.sinusoids(), ((7, 5, 3), (2, 17, 11)), lambda p, x: x + waves(*x.shape[1:])),
    Case(
        "rnn_cell",
        fnbp.scan(fnbp.rnn_cell(13)),
        ((7, 3, 11), (2, 1, 5)),
        oracles.rnn,
        lambda F, p, x: turned(rnn_tanh_cell, p, x)[1],
    ),
    Case(
        "lstm_cell",
        fnbp.scan(fnbp.lstm_cell(13)),
        ((7, 3, 11), (2, 1, 5)),
        oracles.lstm,
        lambda F, p, x: turned(lstm_cell, p, x)[1],
    ),
    Case(
        "gru_cell",
        fnbp.scan(fnbp.gru_cell(13)),
        ((7, 3, 11), (2, 1, 5)),
        oracles.gru,
        lambda F, p, x: turned(gru_cell, p, x)[1],
    ),
    Case(
        "attention",
        fnbp.attention(1),
        ((3, 5, 7), (2, 11, 5)),
        lambda p, x: oracles.attention(p, x, 1),
        lambda F, p, x: of_torch(F, p, x, 1),
    ),
    Case(
        "attention:causal",
        fnbp.attention(5, causal=True, b=None),
        ((2, 7, 5),),
        lambda p, x: oracles.attention(p, x, 5, causal=True),
        lambda F, p, x: of_torch(F, p, x, 5, True),
    ),
    Case(
        "attention:rotary",
        fnbp.serial(fnbp.dense(12), fnbp.tanh(), fnbp.attention(6, 2, causal=True, rotary=100.0)),
        ((2, 7, 5),),
        lambda p, x: oracles.attention(p[2], np.tanh(affine(p[0], x)), 6, 2, True, 100.0),
    ),
    Case(
        "attention:blocks",
        fnbp.attention(7, 1, causal=True),
        ((2, 131, 7),),
        lambda p, x: oracles.attention(p, x, 7, 1, True),
    ),
    Case("scan", fnbp.scan(fnbp.lstm_cell(5), reverse=True), ((7, 3, 11),), lambda p, x: oracles.lstm(p, x, True)),
    Case(
        "scan:lstm_in_chunks",
        fnbp.scan(fnbp.lstm_cell(5), reverse=True),
        ((2, 19, 3),),
        lambda p, x: oracles.lstm(p, x, True),
    ),
    Case("scan:gru_in_chunks", fnbp.scan(fnbp.gru_cell(5)), ((2, 19, 3),), oracles.gru),
    Case(
        "parallel",
        fnbp.parallel(fnbp.dense(13), fnbp.serial(fnbp.dense(13), fnbp.tanh())),
        FEATURES,
        lambda p, x: affine(p[0], x) + np.tanh(affine(p[1][0], x)),
    ),
    Case(
        "parallel:product",
        fnbp.parallel(fnbp.dense(13), fnbp.serial(fnbp.dense(13), fnbp.sigmoid()), fnbp.dense(13), join="product"),
        FEATURES,
        lambda p, x: affine(p[0], x) * special.expit(affine(p[1][0], x)) * affine(p[2], x),
    ),
    Case(
        "parallel:concat",
        fnbp.parallel(fnbp.scan(fnbp.lstm_cell(5)), fnbp.scan(fnbp.gru_cell(3), reverse=True), join="concat"),
        ((7, 3, 11),),
        lambda p, x: np.concatenate([oracles.lstm(p[0], x), oracles.gru(p[1], x, True)], -1),
    ),
    Case(
        "repeat",
        fnbp.repeat(fnbp.serial(fnbp.dense(11), fnbp.tanh()), 3),
        FEATURES,
        lambda p, x: functools.reduce(lambda x, i: np.tanh(x @ p[0][0]["W"][i].T + p[0][0]["b"][i]), range(3), x),
    ),
    Case(
        "repeat:twice",
        fnbp.repeat(fnbp.repeat(fnbp.skip(fnbp.dense(11)), 3), 2),
        ((7, 11),),
        lambda p, x: functools.reduce(
            lambda x, i: x + x @ p[0][0][0]["W"][i].T + p[0][0][0]["b"][i], np.ndindex(2, 3), x
        ),
    ),
    Case(
        "remat",
        fnbp.remat(fnbp.serial(fnbp.dense(13), fnbp.tanh())),
        FEATURES,
        lambda p, x: np.tanh(affine(p[0][0], x)),
    ),
    Case(
        "freeze", fnbp.freeze(fnbp.dense(13, "ones", "ones")), FEATURES, lambda p, x: x.sum(-1)[..., None] + np.ones(13)
    ),
    Case(
        "tie",
        fnbp.tie(fnbp.serial(fnbp.embedding(13, 3), fnbp.dense(3), fnbp.dense(13, b=None)), (0, "E"), (2, "W")),
        ((5, 7), (2, 11)),
        lambda p, x: affine(p[0][1], p[0][0]["E"][x]) @ p[0][0]["E"].T,
        tokens=13,
    ),
    Case("last", fnbp.last(), ((5, 3, 11), (2, 7), (1, 2, 3, 5)), lambda p, x: x[:, -1]),
    Case(
        "residual",
        fnbp.residual(3),
        ((5, 7, 2, 3),),
        lambda p, x: np.maximum(batch_normed_conv(p[0][0], x) + x, 0),
        context=fnbp.Context(train=True),
        mixes=True,
    ),
    Case(
        "residual:strided",
        fnbp.residual(13, 2),
        ((5, 7, 2, 3),),
        lambda p, x: np.maximum(
            batch_normed_conv(p[0][0], x, 2)
            + shifted(p[0][1][1], standard(oracles.conv(x, p[0][1][0]["W"], stride=2), (0, 1, 2))),
            0,
        ),
        context=fnbp.Context(train=True),
        mixes=True,
    ),
    Case("gelu_mlp", fnbp.gelu_mlp(13, 7), FEATURES, lambda p, x: affine(p[2], gelu(affine(p[0], x)))),
    Case(
        "gelu_mlp:tanh",
        fnbp.gelu_mlp(13, 7, approximate=True),
        FEATURES,
        lambda p, x: affine(p[2], gelu_tanh(affine(p[0], x))),
        lambda F, p, x: F.linear(F.gelu(F.linear(x, p[0]["W"], p[0]["b"]), approximate="tanh"), p[2]["W"], p[2]["b"]),
    ),
    Case(
        "swiglu",
        fnbp.swiglu(13, 7),
        FEATURES,
        lambda p, x: (silu(x @ p[0][0][0]["W"].T) * (x @ p[0][1]["W"].T)) @ p[1]["W"].T,
    ),
    Case(
        "transformer_block",
        fnbp.transformer_block(5, 5),
        ((2, 7, 5),),
        lambda p, x: of_block(p, x),
    ),
    Case(
        "bidirectional",
        fnbp.bidirectional(fnbp.gru_cell(5)),
        ((7, 3, 11),),
        lambda p, x: np.concatenate([oracles.gru(p[0], x), oracles.gru(p[1], x, True)], -1),
    ),
    Case(
        "stacked",
        fnbp.stacked(fnbp.lstm_cell(5), fnbp.gru_cell(3)),
        ((7, 3, 11),),
        lambda p, x: oracles.gru(p[1], oracles.lstm(p[0], x)),
    ),
    Case("from_jax", fnbp.from_jax(fnbp.dense(13)), FEATURES, affine),
)


def draw(case: Case, shape: tuple[int, ...], dtype: Any = float, seed: int = 0):
    """params away from their initial zeros, state, x, and a random cotangent of y. NumPy draws: nothing compiles."""
    rng = np.random.default_rng([seed, *shape])
    dtype = jnp.zeros((), dtype).dtype
    x = jnp.asarray(rng.integers(0, case.tokens, shape), jnp.int32) if case.tokens else normal(rng, shape, dtype)
    shapes, state = jax.eval_shape(case.layer.init, jax.random.key(0), x)
    if jax.tree.leaves(state):
        state = case.state(case.layer.init(jax.random.key(0), x)[1])
    if case.tokens:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
    params = jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype) / 2, shapes)
    y = jax.eval_shape(case.layer.forward, params, state, x, case.context)[0]
    return params, state, x, normal(rng, y.shape, y.dtype)


def normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


@functools.cache
def compiled(case_id: str) -> tuple[Callable, Callable]:
    """forward (params, state, x) -> y, and vjp (params, state, x, dy) -> gradients, dx; both jitted once a case."""
    case = next(case for case in CASES if case.id == case_id)

    def forward(params, state, x):
        return case.layer.forward(params, state, x, case.context)[0]

    return jax.jit(forward), jax.jit(lambda *args: eager_vjp(case, *args))


def manual_vjp(case: Case, params, state, x, dy):
    """Gradients and dx by the layer's own backward, jitted."""
    return compiled(case.id)[1](params, state, x, dy)


def eager_vjp(case: Case, params, state, x, dy):
    """Gradients and dx by the layer's own backward."""
    _, _, res = case.layer.forward(params, state, x, case.context)
    factors, dx = case.layer.backward(params, res, dy)
    return jax.tree.map(finish, factors, is_leaf=lambda f: isinstance(f, fnbp.Factor)), dx


def finish(leaf):
    return leaf.total() if isinstance(leaf, fnbp.Factor) else leaf


def relative(a, b) -> float:
    """|a - b| / |b| over all leaves of a tree, the worst of them."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    worst = 0.0
    for one, other in pairs:
        one, other = np.asarray(one, float), np.asarray(other, float)
        assert one.shape == other.shape
        size = np.linalg.norm(other)
        difference = np.linalg.norm(one - other)
        worst = np.maximum(worst, difference / size if size else difference)  # NaN stays
    return float(worst)


def sum_of_squares() -> fnbp.Loss:
    """A loss whose delta is random enough: 1/2 sum_j c_j (p_j - j)^2 with c growing."""

    def weights(p):
        return jnp.linspace(0.5, 1.5, int(np.prod(p.shape[1:])), dtype=p.dtype).reshape(p.shape[1:])

    def forward(p, t):
        return jnp.sum(weights(p) * (p - t) ** 2 / 2, range(1, p.ndim)), (p, t)

    def backward(res):
        p, t = res
        return weights(p) * (p - t)

    return fnbp.Loss(forward, backward, "sum_of_squares")
