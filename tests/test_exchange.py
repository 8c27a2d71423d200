"""Every layer of the table beside its counterpart in PyTorch, Linen and NNX: outputs, gradients, and both ways back."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from fnbp.exchange.blocks import BLOCKS
from fnbp.exchange.nodes import node_of
from fnbp.exchange.table import TABLE, counterpart
from tests.cases import relative
from tests.test_house import LAYERS, constructors

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is missing (extra: peers)")
needs_flax = pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="Flax is missing (extra: examples)")
TRAINING = fnbp.Context(train=True)


class Pair(NamedTuple):
    """A layer and its counterpart.

    module: of the other library. x: the shape of the input; (m, T) with tokens. use: (module, x) -> y with our axes.
    """

    layer: fnbp.Layer
    module: Callable[[Any], Any]
    x: tuple[int, ...]
    use: Callable[[Any, Any], Any] = lambda module, x: module(x)
    tokens: int = 0
    ctx: fnbp.Context = fnbp.Context()


def channels_second(module, x):
    return module(x.movedim(-1, 1)).movedim(1, -1)


def first(module, x):
    return module(x)[0]


def from_rest(module, x):
    """A cell of PyTorch, from h = 0."""
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def to_itself(module, x):
    return module(x, x, x, need_weights=False)[0]


def causal(module, x):
    import torch

    return module(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype))


def of_memory(module, x):
    """x, and its first two features as what it attends to."""
    return module(x, x[..., :2], x[..., :2], need_weights=False)[0]


RNN = {"batch_first": True}
TORCH = {
    "dense": Pair(fnbp.dense(7), lambda nn: nn.Linear(5, 7), (3, 11, 5)),
    "dense, square": Pair(fnbp.dense(5), lambda nn: nn.Linear(5, 5), (3, 5)),
    "dense without b": Pair(fnbp.dense(7, b=None), lambda nn: nn.Linear(5, 7, bias=False), (3, 5)),
    "conv of 1 axis": Pair(fnbp.conv(7, 3), lambda nn: nn.Conv1d(5, 7, 3, padding=1), (2, 11, 5), channels_second),
    "conv of 2 axes": Pair(
        fnbp.conv(7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        lambda nn: nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (2, 11, 13, 5),
        channels_second,
    ),
    "conv, square": Pair(fnbp.conv(3, 3), lambda nn: nn.Conv2d(3, 3, 3, padding=1), (3, 3, 3, 3), channels_second),
    "conv of groups, without b": Pair(
        fnbp.conv(15, 2, padding="VALID", groups=5, b=None),
        lambda nn: nn.Conv2d(10, 15, 2, groups=5, bias=False),
        (2, 7, 3, 10),
        channels_second,
    ),
    "conv, depthwise": Pair(
        fnbp.conv(5, 3, groups=5), lambda nn: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 7, 11, 5), channels_second
    ),
    "conv_transpose": Pair(
        fnbp.conv_transpose(7, (3, 2), stride=2, padding="VALID"),
        lambda nn: nn.ConvTranspose2d(5, 7, (3, 2), stride=2),
        (2, 11, 13, 5),
        channels_second,
    ),
    "conv_transpose, square": Pair(
        fnbp.conv_transpose(3, 3, padding=1),
        lambda nn: nn.ConvTranspose2d(3, 3, 3, padding=1),
        (3,) * 4,
        channels_second,
    ),
    "conv_transpose of groups": Pair(
        fnbp.conv_transpose(15, 2, stride=3, padding="VALID", groups=5),
        lambda nn: nn.ConvTranspose1d(10, 15, 2, stride=3, groups=5),
        (2, 7, 10),
        channels_second,
    ),
    "layer_norm": Pair(fnbp.layer_norm(), lambda nn: nn.LayerNorm(5), (3, 11, 5)),
    "rms_norm": Pair(fnbp.rms_norm(), lambda nn: nn.RMSNorm(5, eps=1e-6), (3, 11, 5)),
    "group_norm": Pair(fnbp.group_norm(3), lambda nn: nn.GroupNorm(3, 6), (2, 5, 7, 6), channels_second),
    "batch_norm": Pair(fnbp.batch_norm(), lambda nn: nn.BatchNorm2d(5), (2, 7, 11, 5), channels_second),
    "batch_norm in training": Pair(
        fnbp.batch_norm(0.3), lambda nn: nn.BatchNorm1d(5, momentum=0.3), (7, 5), channels_second, ctx=TRAINING
    ),
    "embedding": Pair(fnbp.embedding(13, 5), lambda nn: nn.Embedding(13, 5), (3, 7), tokens=13),
    "embedding, square": Pair(fnbp.embedding(5, 5), lambda nn: nn.Embedding(5, 5), (3, 7), tokens=5),
    "positions": Pair(
        fnbp.positions(11), lambda nn: nn.Embedding(11, 5), (3, 7, 5), lambda module, x: x + module.weight[: x.shape[1]]
    ),
    "attention": Pair(
        fnbp.attention(2), lambda nn: nn.MultiheadAttention(6, 2, batch_first=True), (3, 5, 6), to_itself
    ),
    "attention without b": Pair(
        fnbp.attention(5, b=None), lambda nn: nn.MultiheadAttention(5, 5, bias=False, **RNN), (3, 7, 5), to_itself
    ),
    "transformer_block": Pair(
        fnbp.transformer_block(6, 3),
        lambda nn: nn.TransformerEncoderLayer(6, 3, 24, 0.0, "gelu", norm_first=True, **RNN),
        (2, 5, 6),
        causal,
    ),
    "rnn_cell": Pair(fnbp.rnn_cell(7), lambda nn: nn.RNNCell(5, 7), (3, 5), from_rest),
    "lstm_cell": Pair(fnbp.lstm_cell(7), lambda nn: nn.LSTMCell(5, 7), (3, 5), from_rest),
    "gru_cell": Pair(fnbp.gru_cell(7), lambda nn: nn.GRUCell(5, 7), (3, 5), from_rest),
    "rnn": Pair(fnbp.scan(fnbp.rnn_cell(7)), lambda nn: nn.RNN(5, 7, **RNN), (3, 11, 5), first),
    "lstm": Pair(fnbp.scan(fnbp.lstm_cell(7)), lambda nn: nn.LSTM(5, 7, **RNN), (3, 11, 5), first),
    "lstm, square": Pair(fnbp.scan(fnbp.lstm_cell(5)), lambda nn: nn.LSTM(5, 5, **RNN), (5, 5, 5), first),
    "gru": Pair(fnbp.scan(fnbp.gru_cell(7)), lambda nn: nn.GRU(5, 7, **RNN), (3, 11, 5), first),
    "gru, square": Pair(fnbp.scan(fnbp.gru_cell(5)), lambda nn: nn.GRU(5, 5, **RNN), (5, 5, 5), first),
    "stacked": Pair(
        fnbp.stacked(*[fnbp.gru_cell(7)] * 3), lambda nn: nn.GRU(5, 7, num_layers=3, **RNN), (3, 11, 5), first
    ),
    "bidirectional": Pair(
        fnbp.bidirectional(fnbp.lstm_cell(7)), lambda nn: nn.LSTM(5, 7, bidirectional=True, **RNN), (3, 11, 5), first
    ),
}


def cell_of(layer):
    """True for a cell, which takes (h, x)."""
    return layer.name.split("(")[0].endswith("_cell")


def apply_of(pair, state):
    """(params, x) -> y, with the manual backward."""
    apply = fnbp.to_jax(pair.layer, state, pair.ctx)
    return (lambda params, x: apply(params, (rest(pair, params, x), x))[1]) if cell_of(pair.layer) else apply


def rest(pair, params, x):
    """h of zeros; of an LSTM also s."""
    h = jnp.zeros((len(x), params["U"].shape[1]))
    return (h, h) if "lstm" in pair.layer.name else h


def shapes_of(pair):
    """params and state of a pair's layer, as shapes."""
    x = jax.ShapeDtypeStruct(pair.x, jnp.int32 if pair.tokens else jnp.result_type(float))
    return jax.eval_shape(pair.layer.init, jax.random.key(0), (None, x) if cell_of(pair.layer) else x)


def drawn(shape, i, positive=False):
    numbers = np.random.default_rng(i).standard_normal(shape)
    return np.abs(numbers) + 0.5 if positive else numbers


def input_of(pair):
    return np.random.default_rng(0).integers(0, pair.tokens, pair.x) if pair.tokens else drawn(pair.x, 1)


def torch_module(pair):
    """The module, with every number of it drawn."""
    import torch

    module = pair.module(torch.nn).double().train(pair.ctx.train)
    held = {
        name: torch.tensor(drawn(a.shape, i, "var" in name)) if a.is_floating_point() else torch.tensor(3)
        for i, (name, a) in enumerate(module.state_dict().items())
    }
    module.load_state_dict(held)
    return module


def held_of(module):
    return {name: a.detach().numpy().copy() for name, a in module.state_dict().items()}


def without_key_bias(name, a):
    """The bias of K as it comes back: 0."""
    if name.endswith("in_proj_bias"):
        a = a.copy()
        a[len(a) // 3 : 2 * len(a) // 3] = 0
    return a


@needs_torch
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", TORCH)
def test_outputs_and_gradients_are_pytorchs(x64, name):
    import torch

    pair = TORCH[name]
    module, x = torch_module(pair), input_of(pair)
    before = held_of(module)
    params, state = fnbp.from_torch(pair.layer, module.state_dict(), *shapes_of(pair))
    given = torch.tensor(x, requires_grad=not pair.tokens)
    theirs = pair.use(module, given)
    dy = drawn(theirs.shape, 2)
    theirs.backward(torch.tensor(dy))
    ours, pull = jax.vjp(lambda p, x: apply_of(pair, state)(p, x), params, jnp.asarray(x))
    dparams, dx = pull(jnp.asarray(dy))
    assert relative(ours, theirs.detach().numpy()) <= 1e-12
    if not pair.tokens:
        assert relative(dx, given.grad.numpy()) <= 1e-12
    gradients = fnbp.to_torch(pair.layer, dparams, None)
    for key, parameter in module.named_parameters():
        scale = max(1.0, np.abs(gradients[key]).max())
        np.testing.assert_allclose(gradients[key], parameter.grad.numpy(), rtol=0, atol=1e-12 * scale, err_msg=key)
    back = fnbp.to_torch(pair.layer, params, state)
    assert back.keys() == before.keys()
    for key, a in before.items():
        np.testing.assert_array_equal(back[key], without_key_bias(key, a), err_msg=key)
        assert back[key].dtype == a.dtype


@needs_torch
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", TORCH)
def test_a_module_loads_ours_and_gives_them_back(x64, name):
    import torch

    pair = TORCH[name]
    params, state = (
        jax.tree.map(lambda a: jnp.asarray(np.abs(drawn(a.shape, len(a.shape))) + 1, a.dtype), tree)
        for tree in shapes_of(pair)
    )
    module = pair.module(torch.nn).double().eval()
    weights = fnbp.to_torch(pair.layer, params, state)
    module.load_state_dict({key: torch.tensor(a) for key, a in weights.items()})
    x = input_of(pair)
    theirs = pair.use(module, torch.tensor(x)).detach().numpy()
    ours = apply_of(pair._replace(ctx=fnbp.Context()), state)(params, jnp.asarray(x))
    assert relative(ours, theirs) <= 1e-12
    for one, other in zip(
        jax.tree.leaves(fnbp.from_torch(pair.layer, module.state_dict(), params, state)),
        jax.tree.leaves((params, state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@needs_torch
def test_training_goes_on_with_pytorchs_statistics(x64):
    import torch

    pair = TORCH["batch_norm in training"]
    module, x = torch_module(pair), input_of(pair)
    params, state = fnbp.from_torch(pair.layer, module.state_dict(), *shapes_of(pair))
    module(torch.tensor(x))
    _, state, _ = pair.layer.forward(params, state, jnp.asarray(x), TRAINING)
    for key, a in fnbp.to_torch(pair.layer, params, state).items():
        np.testing.assert_allclose(a, held_of(module)[key], rtol=1e-13, err_msg=key)
    assert state["count"] == 4


@needs_torch
def test_attention_to_a_memory_of_another_width_is_pytorchs(x64):
    import torch

    module = torch.nn.MultiheadAttention(6, 3, kdim=2, vdim=2, batch_first=True).double()
    net, x = fnbp.attention(3), drawn((3, 5, 6), 1)
    pair = jnp.asarray(x), jnp.asarray(x[..., :2])
    params, state = fnbp.from_torch(net, module.state_dict(), *jax.eval_shape(net.init, jax.random.key(0), pair))
    assert relative(fnbp.apply(net, params, state, pair), of_memory(module, torch.tensor(x)).detach().numpy()) <= 1e-12
    assert set(fnbp.to_torch(net, params, state)) == set(module.state_dict())


# --- Flax ---


def tolerance(name, layout):
    """1e-12; NNX's attention rounds to float32 on its way, whatever dtype it is told."""
    return 1e-5 if layout == "nnx" and "attention" in name else 1e-12


WIDE = {"dtype": np.float64, "param_dtype": np.float64}  # some modules compute in float32 unless told
FLAX = {  # layer, module of Linen, module of NNX, x, tokens
    "dense": (fnbp.dense(7), lambda nn: nn.Dense(7), lambda nnx, r: nnx.Linear(5, 7, rngs=r), (3, 11, 5), 0),
    "dense, square": (fnbp.dense(5), lambda nn: nn.Dense(5), lambda nnx, r: nnx.Linear(5, 5, rngs=r), (3, 5), 0),
    "dense without b": (
        fnbp.dense(7, b=None),
        lambda nn: nn.Dense(7, use_bias=False),
        lambda nnx, r: nnx.Linear(5, 7, use_bias=False, rngs=r),
        (3, 5),
        0,
    ),
    "conv": (
        fnbp.conv(7, (3, 2), stride=(2, 1), dilation=(1, 2)),
        lambda nn: nn.Conv(7, (3, 2), strides=(2, 1), kernel_dilation=(1, 2)),
        lambda nnx, r: nnx.Conv(5, 7, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), rngs=r),
        (2, 11, 13, 5),
        0,
    ),
    "conv, square": (
        fnbp.conv(3, 3),
        lambda nn: nn.Conv(3, (3, 3)),
        lambda nnx, r: nnx.Conv(3, 3, (3, 3), rngs=r),
        (3, 3, 3, 3),
        0,
    ),
    "conv of groups": (
        fnbp.conv(15, 2, groups=5, b=None),
        lambda nn: nn.Conv(15, (2,), feature_group_count=5, use_bias=False),
        lambda nnx, r: nnx.Conv(10, 15, (2,), feature_group_count=5, use_bias=False, rngs=r),
        (2, 7, 10),
        0,
    ),
    "conv_transpose": (
        fnbp.conv_transpose(7, (3, 2), stride=2, padding="VALID"),
        lambda nn: nn.ConvTranspose(7, (3, 2), strides=(2, 2), padding="VALID"),
        lambda nnx, r: nnx.ConvTranspose(5, 7, (3, 2), strides=(2, 2), padding="VALID", rngs=r),
        (2, 11, 13, 5),
        0,
    ),
    "conv_transpose, square": (
        fnbp.conv_transpose(3, 3),
        lambda nn: nn.ConvTranspose(3, (3, 3)),
        lambda nnx, r: nnx.ConvTranspose(3, 3, (3, 3), rngs=r),
        (3, 3, 3, 3),
        0,
    ),
    "layer_norm": (
        fnbp.layer_norm(1e-6),
        lambda nn: nn.LayerNorm(),
        lambda nnx, r: nnx.LayerNorm(5, rngs=r),
        (3, 11, 5),
        0,
    ),
    "rms_norm": (fnbp.rms_norm(), lambda nn: nn.RMSNorm(), lambda nnx, r: nnx.RMSNorm(5, rngs=r), (3, 11, 5), 0),
    "group_norm": (
        fnbp.group_norm(3, 1e-6),
        lambda nn: nn.GroupNorm(3),
        lambda nnx, r: nnx.GroupNorm(6, num_groups=3, rngs=r),
        (2, 5, 7, 6),
        0,
    ),
    "batch_norm": (
        fnbp.batch_norm(),
        lambda nn: nn.BatchNorm(use_running_average=True),
        lambda nnx, r: nnx.BatchNorm(5, use_running_average=True, rngs=r),
        (2, 7, 11, 5),
        0,
    ),
    "embedding": (
        fnbp.embedding(13, 5),
        lambda nn: nn.Embed(13, 5),
        lambda nnx, r: nnx.Embed(13, 5, rngs=r, **WIDE),
        (3, 7),
        13,
    ),
    "attention": (
        fnbp.attention(2),
        lambda nn: nn.MultiHeadDotProductAttention(2),
        lambda nnx, r: nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=r, **WIDE),
        (3, 5, 6),
        0,
    ),
    "attention without b": (
        fnbp.attention(5, b=None),
        lambda nn: nn.MultiHeadDotProductAttention(5, use_bias=False),
        lambda nnx, r: nnx.MultiHeadAttention(num_heads=5, in_features=5, use_bias=False, decode=False, rngs=r, **WIDE),
        (3, 7, 5),
        0,
    ),
    **{
        name + kind: (
            fnbp.scan(cell(n)),
            lambda nn, made=made, n=n: nn.RNN(getattr(nn, made)(n, **WIDE)),
            lambda nnx, r, made=made, n=n: nnx.RNN(getattr(nnx, made)(5, n, rngs=r, **WIDE)),
            (3, 11, 5),
            0,
        )
        for kind, n in (("", 7), (", square", 5))
        for name, cell, made in (
            ("rnn", fnbp.rnn_cell, "SimpleCell"),
            ("lstm", fnbp.lstm_cell, "LSTMCell"),
            ("gru", fnbp.gru_cell, "GRUCell"),
        )
    },
    "bidirectional": (
        fnbp.bidirectional(fnbp.lstm_cell(7)),
        lambda nn: nn.Bidirectional(nn.RNN(nn.LSTMCell(7, **WIDE)), nn.RNN(nn.LSTMCell(7, **WIDE))),
        lambda nnx, r: nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(5, 7, rngs=r, **WIDE), rngs=r),
            nnx.RNN(nnx.LSTMCell(5, 7, rngs=r, **WIDE), rngs=r),
            rngs=r,
        ),
        (3, 11, 5),
        0,
    ),
}


def all_drawn(tree):
    leaves, form = jax.tree.flatten_with_path(tree)
    numbers = [
        jnp.asarray(drawn(a.shape, i, "var" in jax.tree_util.keystr(keys))) for i, (keys, a) in enumerate(leaves)
    ]
    return jax.tree.unflatten(form, numbers)


def in_flax(name, layout):
    """The layer, (weights, x) -> y of the module, its weights, all drawn, and x."""
    import flax.linen as nn
    from flax import nnx

    layer, of_linen, of_nnx, shape, tokens = FLAX[name]
    x = np.random.default_rng(0).integers(0, tokens, shape) if tokens else drawn(shape, 1)
    if layout == "linen":
        module = of_linen(nn)
        return layer, module.apply, all_drawn(module.init(jax.random.key(0), jnp.asarray(x))), x
    graph, held, rest = nnx.split(of_nnx(nnx, nnx.Rngs(0)), (nnx.Param, nnx.BatchStat), ...)
    pure = all_drawn(nnx.to_pure_dict(held))

    def use(weights, x):
        state, others = jax.tree.map(lambda a: a, (held, rest))  # copies, which belong to the trace at hand
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(graph, state, others)(x)

    return layer, use, pure, x


def as_they_flow(layer, layout, params, state):
    """A gradient without what from_flax does not fill: of two biases that are one there, the second."""
    root = node_of(layer.name, layer, params, state)
    gone = {}
    for leaf in root.leaves():
        of = counterpart(layout, leaf.made, leaf.held)
        for piece in [piece for one in of.rows for piece in one.pieces] + list(of.zero):
            name = piece.leaf if piece in of.zero else piece.plus
            if name is not None:
                i, n = piece.part
                whole = gone.setdefault(f"{leaf.path}.{name}", np.array(leaf.held[name]))
                whole[i * len(whole) // n : (i + 1) * len(whole) // n] = 0
    return fnbp.with_named(layer, params, gone)


def flat(tree):
    return {jax.tree_util.keystr(keys): a for keys, a in jax.tree_util.tree_leaves_with_path(tree)}


LAYOUTS = ["linen", pytest.param("nnx", marks=pytest.mark.slow)]


@needs_flax
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FLAX)
def test_outputs_and_gradients_are_flaxs(x64, name, layout):
    layer, use, weights, x = in_flax(name, layout)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x))
    params, state = fnbp.from_flax(layer, weights, *shapes, layout=layout)
    x = jnp.asarray(x)
    theirs, their_pull = jax.vjp(use, weights, x)
    ours, pull = jax.vjp(fnbp.to_jax(layer, state), params, x)
    dy = jnp.asarray(drawn(theirs.shape, 2))
    (dparams, dx), (their_dparams, their_dx) = pull(dy), their_pull(dy)
    near = tolerance(name, layout)
    assert relative(ours, theirs) <= near
    if jnp.issubdtype(x.dtype, jnp.floating):
        assert relative(dx, their_dx) <= near
    gradients = flat(fnbp.to_flax(layer, as_they_flow(layer, layout, dparams, state), None, layout=layout))
    for key, a in flat(their_dparams).items():
        if "mean" not in key and "var" not in key:
            scale = max(1.0, np.abs(a).max())
            np.testing.assert_allclose(gradients[key], a, rtol=0, atol=near * scale, err_msg=key)
    back = flat(fnbp.to_flax(layer, params, state, layout=layout))
    assert back.keys() == flat(weights).keys()
    for key, a in flat(weights).items():
        np.testing.assert_array_equal(back[key], np.zeros_like(a) if "['key']['bias']" in key else a, err_msg=key)


@needs_flax
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FLAX)
def test_flax_takes_ours_and_gives_back_the_same_function(x64, name, layout):
    layer, use, _, x = in_flax(name, layout)
    x = jnp.asarray(x)
    params, state = jax.tree.map(
        lambda a: jnp.asarray(np.abs(drawn(a.shape, a.size)) + 1, a.dtype),
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )
    if layout == "nnx" and name.startswith("gru"):
        with pytest.raises(ValueError, match=r"part 3 of 3 of its c must be 0: there is no place for it there"):
            fnbp.to_flax(layer, params, state, layout=layout)
        params["c"] = params["c"].at[-params["c"].size // 3 :].set(0)
    weights = fnbp.to_flax(layer, params, state, layout=layout)
    assert relative(use(weights, x), fnbp.apply(layer, params, state, x)) <= tolerance(name, layout)
    again = fnbp.from_flax(layer, weights, params, state, layout=layout)
    assert relative(fnbp.apply(layer, *again, x), fnbp.apply(layer, params, state, x)) <= 1e-12
    if not any(word in name for word in ("rnn", "lstm", "gru", "bidirectional")):  # two biases come back as their sum
        for one, other in zip(
            jax.tree.leaves(again), jax.tree.leaves((params, state | {"count": 1} if state else state)), strict=True
        ):
            np.testing.assert_array_equal(one, other)


@needs_flax
@pytest.mark.parametrize("layout", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_cells_of_flax_are_ours(x64, name, layout):
    import flax.linen as nn
    from flax import nnx

    cell, made = {
        "rnn": (fnbp.rnn_cell(7), "SimpleCell"), "lstm": (fnbp.lstm_cell(7), "LSTMCell"),
        "gru": (fnbp.gru_cell(7), "GRUCell"),
    }[name]  # fmt: skip
    x = jnp.asarray(drawn((3, 5), 1))
    h = jnp.zeros((3, 7))
    carry = (h, h) if name == "lstm" else h
    if layout == "linen":
        module = getattr(nn, made)(7)
        weights = all_drawn(module.init(jax.random.key(0), carry, x))
        theirs = module.apply(weights, carry, x)[1]
    else:
        module = getattr(nnx, made)(5, 7, rngs=nnx.Rngs(0), **WIDE)
        held = nnx.state(module, nnx.Param)
        weights = all_drawn(nnx.to_pure_dict(held))
        nnx.replace_by_pure_dict(held, weights)
        nnx.update(module, held)
        theirs = module(carry, x)[1]
    params, state = fnbp.from_flax(
        cell, weights, *jax.eval_shape(cell.init, jax.random.key(0), (None, x)), layout=layout
    )
    assert relative(cell.forward(params, state, (None, x), fnbp.Context())[0][1], theirs) <= 1e-12


# --- params and state of another layer ---


def spoilt(params, state):
    """(what was done, params, state) of trees that do not belong to the layer: each leaf missing, or another shape."""
    for which, tree in enumerate((params, state)):
        for name, a in tree.items():
            yield f"{name} missing", *put(which, {k: b for k, b in tree.items() if k != name}, params, state)
            longer = (a.shape[0] + 1, *a.shape[1:]) if a.shape else (2,)
            shapes = {"deeper": (*a.shape, 1), "longer": longer, "a number": ()}
            for how, shape in shapes.items():
                if shape != a.shape:
                    yield f"{name} {how}", *put(which, tree | {name: jnp.ones(shape, a.dtype)}, params, state)
        yield "a stranger", *put(which, tree | {"stranger": jnp.ones(3)}, params, state)


def put(which, tree, params, state):
    return (tree, state) if which == 0 else (params, tree)


FREE = {("rms_norm", "gamma longer"), ("conv_transpose", "W longer"), ("conv", "W deeper")}  # these fit another x


@pytest.mark.parametrize("name", TORCH)
def test_params_and_state_of_another_layer_are_refused(name):
    layer = TORCH[name].layer
    ones = tuple(jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tree) for tree in shapes_of(TORCH[name]))
    if layer.parts:
        ones = tuple(jax.tree.map(lambda a: jnp.ones((3, *a.shape)), tree) for tree in ones)
        with pytest.raises(ValueError, match=r"to_torch: params and state do not belong to "):
            fnbp.to_torch(layer, *ones)
        return
    weights = fnbp.to_torch(layer, *ones)
    calls = (
        lambda params, state: fnbp.to_torch(layer, params, state),
        lambda params, state: fnbp.to_flax(layer, params, state),
        lambda params, state: fnbp.from_torch(layer, weights, params, state),
        lambda params, state: fnbp.from_flax(layer, {"params": {}}, params, state),
    )
    for i, (what, params, state) in enumerate(spoilt(*ones)):
        if (layer.name.split("(")[0], what) not in FREE:
            with pytest.raises(ValueError, match=rf"do not belong to {re.escape(layer.name)}: "):
                calls[i % len(calls)](params, state)
                raise AssertionError(what)


# --- the table ---


def test_every_layer_is_in_the_table_or_has_no_weights():
    known = {f.__name__ for f in (*TABLE, *BLOCKS)}
    transparent = {"serial", "skip", "parallel", "repeat", "ragged", "remat", "cast", "freeze", "tie", "from_jax"}
    of_layers = {"residual", "gelu_mlp", "swiglu"}  # nests of layers that are in the table
    empty = {"identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "log_softmax"}
    empty |= {"softmax", "dropout", "drop_path", "sinusoids", "max_pool", "avg_pool", "global_avg_pool", "last"}
    empty |= {"reshape", "flatten"}
    assert LAYERS == (known - {"gpt"}) | transparent | of_layers | empty
    assert not known & (transparent | of_layers | empty)
    for name in empty:
        made = {"leaky_relu": (), "dropout": (0.5,), "drop_path": (0.5,), "max_pool": (2,), "avg_pool": (2,)}
        layer = constructors()[name](*made.get(name, (1, -1) if name == "reshape" else ()))
        x = jax.ShapeDtypeStruct((2, 4, 6), jnp.result_type(float))
        assert not jax.tree.leaves(jax.eval_shape(layer.init, jax.random.key(0), x)), name


def test_every_entry_of_the_table_is_tried():
    for layers, elsewhere in (
        ([pair.layer for pair in TORCH.values()], set()),
        ([layer for layer, *_ in FLAX.values()], {"rnn_cell", "lstm_cell", "gru_cell", "positions"}),
    ):
        tried = {part.made.constructor for layer in layers for part in every(layer)}
        in_torch = {f for f, of in BLOCKS.items() if "torch" in of} if not elsewhere else {fnbp.bidirectional}
        assert {f.__name__ for f in (set(TABLE) | in_torch) - tried} == {"bias"} | elsewhere


@pytest.mark.parametrize("layout", ["linen", "nnx"])
def test_positions_are_an_embed(layout):
    net = fnbp.positions(7)
    params, state = net.init(jax.random.key(0), jnp.zeros((2, 5, 3)))
    weights = fnbp.to_flax(net, params, state, layout=layout)
    (table,) = flat(weights).values()
    np.testing.assert_array_equal(table, params["P"])
    assert "embedding" in str(weights)


def every(layer):
    yield layer
    for part in layer.parts:
        yield from every(part)
