"""Whole nets beside modules of PyTorch and Flax: where each layer finds its place, GPT-2, and what is refused."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import relative
from tests.test_exchange import drawn, held_of, needs_flax, needs_torch

KEY = jax.random.key(0)
HAS_TORCH = importlib.util.find_spec("torch") is not None


def made(net, x, dtype=float):
    """params and state of a net, as shapes."""
    return jax.eval_shape(net.init, KEY, jax.ShapeDtypeStruct(x, jnp.result_type(dtype)))


def filled(net, x, dtype=float):
    """params and state of a net, drawn."""
    return tuple(
        jax.tree.map(lambda a: jnp.asarray(np.abs(drawn(a.shape, a.size)) + 1, a.dtype), tree)
        for tree in made(net, x, dtype)
    )


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, other)))


ROWS = jnp.ones((13, 5))

# --- round trips, without any other library ---

NETS = {
    "mlp": (fnbp.models.mlp(7, 5), (3, 11)),
    "lenet": (fnbp.models.lenet(), (2, 28, 28, 1)),
    "resnet": (fnbp.models.resnet(8, width=2), (2, 8, 8, 3)),
    "lstm_classifier": (fnbp.models.lstm_classifier(7, 5, 2, rate=0.5), (3, 11, 2)),
    "gru_classifier": (fnbp.models.gru_classifier(7, 5), (3, 11, 2)),
    "gpt": (fnbp.models.gpt(13, 7, 3, 2, 10, rate=0.1), (3, 7)),
    "wrappers": (
        fnbp.serial(
            fnbp.cast(fnbp.dense(7), "bfloat16"), fnbp.remat(fnbp.skip(fnbp.dense(7))), fnbp.from_jax(fnbp.dense(5))
        ),
        (3, 11),
    ),
    "repeat": (fnbp.repeat(fnbp.serial(fnbp.repeat(fnbp.skip(fnbp.dense(5)), 2), fnbp.batch_norm()), 3), (3, 5)),
    "freeze": (fnbp.serial(fnbp.freeze(fnbp.serial(fnbp.dense(7), fnbp.batch_norm())), fnbp.dense(2)), (3, 5)),
    "bidirectional": (fnbp.serial(*[fnbp.bidirectional(fnbp.lstm_cell(5))] * 2), (3, 7, 2)),
    "swiglu": (fnbp.transformer_block(4, 2, norm=fnbp.rms_norm, mlp=fnbp.swiglu(7, 4)), (2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_a_net_comes_back_from_pytorchs_names_bit_by_bit(name):
    net, x = NETS[name]
    params, state = filled(net, x, int if name == "gpt" else float)
    weights = fnbp.to_torch(net, params, state)
    shapes = made(net, x, int if name == "gpt" else float)
    assert equal(fnbp.from_torch(net, weights, *shapes), (params, state))


@pytest.mark.parametrize("layout", ["linen", "nnx"])
@pytest.mark.parametrize("name", [name for name in NETS if not re.search("lstm|gru|bidirectional", name)])
def test_a_net_comes_back_from_flaxs_names_bit_by_bit(name, layout):
    net, x = NETS[name]
    params, state = filled(net, x, int if name == "gpt" else float)
    weights = fnbp.to_flax(net, params, state, layout=layout)
    again = fnbp.from_flax(net, weights, params, state, layout=layout)
    assert equal(again[0], params)


def test_wrappers_do_not_change_the_names():
    net, wrapped = fnbp.dense(5), fnbp.remat(fnbp.cast(fnbp.skip(fnbp.freeze(fnbp.dense(5))), "bfloat16"))
    assert fnbp.to_torch(net, *filled(net, (3, 5))).keys() == fnbp.to_torch(wrapped, *filled(wrapped, (3, 5))).keys()


def test_a_layer_with_another_backward_has_the_counterpart_of_its_forward():
    net = fnbp.dense(5)
    aligned = fnbp.replace_functions(net, backward=lambda params, res, dy: ({}, dy))
    params, state = filled(net, (3, 5))
    assert equal(fnbp.to_torch(aligned, params, state), fnbp.to_torch(net, params, state))
    other = fnbp.replace_functions(net, forward=net.forward.__call__)
    with pytest.raises(TypeError, match=r"to_torch: dense\(5\) has no counterpart: the table of fnbp.exchange has no"):
        fnbp.to_torch(other, params, state)


def test_weights_take_the_dtype_of_the_net_and_bfloat16_leaves_as_float32():
    net = fnbp.dense(5)
    params, state = filled(net, (3, 7))
    low, _ = fnbp.from_torch(net, fnbp.to_torch(net, params, state), made(net, (3, 7), jnp.bfloat16)[0], state)
    assert low["W"].dtype == jnp.bfloat16
    out = fnbp.to_torch(net, low, state)["weight"]
    assert out.dtype == np.float32 and np.array_equal(out, low["W"].astype(np.float32))


def test_batch_norm_without_a_count_has_been_trained():
    net = fnbp.batch_norm()
    params, state = filled(net, (3, 5))
    weights = fnbp.to_torch(net, params, state)
    del weights["num_batches_tracked"]
    assert fnbp.from_torch(net, weights, params, state)[1]["count"] == 1


MOST = 2**31 - 1
COUNTS = [(0, 1), (-3, 1), (1, 1), (7, 7), (MOST, MOST), (2**31, MOST), (2**32, MOST), (2**40, MOST), (2**63 - 1, MOST)]
COUNTERS = [(np.int64(given), due) for given, due in COUNTS]
COUNTERS += [(np.int8(5), 5), (np.uint64(2**64 - 1), MOST), (np.float32(2**31), MOST), (np.float16(3), 3)]


@pytest.mark.parametrize(("given", "due"), COUNTERS)
def test_running_statistics_hold_whatever_their_counter_says(given, due):
    net = fnbp.batch_norm()
    params, state = filled(net, (3, 5))
    weights = fnbp.to_torch(net, params, state) | {"num_batches_tracked": np.asarray(given)}
    _, taken = fnbp.from_torch(net, weights, params, state)
    assert taken["count"] == due and taken["count"].dtype == jnp.int32
    x = drawn((3, 5), 1).astype(np.float32)
    y = fnbp.apply(net, params, state, x)
    assert relative(fnbp.apply(net, params, taken, x), y) <= 1e-6
    assert relative(jax.jit(lambda state: fnbp.apply(net, params, state, x))(taken), y) <= 1e-6


@needs_torch
def test_a_fresh_batch_norm_uses_its_statistics_as_pytorchs_does(x64):
    import torch

    net, module, x = fnbp.batch_norm(), torch.nn.BatchNorm1d(5).double().eval(), drawn((3, 5), 1)
    params, state = fnbp.from_torch(net, module.state_dict(), *made(net, x.shape))
    assert relative(fnbp.apply(net, params, state, x), module(torch.tensor(x)).detach().numpy()) <= 1e-12


GONE = ("running_mean", "running_var", "num_batches_tracked", "mean", "var")


@pytest.mark.parametrize("layout", ["torch", "linen", "nnx"])
@pytest.mark.parametrize("name", [name for name in NETS if not re.search("lstm|gru|bidirectional|gpt", name)])
def test_a_tree_of_gradients_is_put_out_without_a_state(name, layout):
    net, x = NETS[name]
    params, state = filled(net, x)
    gradients = jax.tree.map(lambda a: -a, params)

    def put_out(params, state):
        if layout == "torch":
            return fnbp.to_torch(net, params, state)
        return {jax.tree_util.keystr(keys): a for keys, a in jax.tree_util.tree_leaves_with_path(
            fnbp.to_flax(net, params, state, layout=layout)
        )}  # fmt: skip

    weights, found = put_out(params, state), put_out(gradients, None)
    frozen = [key for key in weights if name == "freeze" and re.search(r"^\D*0", key)]
    statistics = [key for key in weights if re.search(f"({'|'.join(GONE)})('\\])?$", key)]
    assert set(found) == set(weights) - set(frozen) - set(statistics)
    for key, a in found.items():
        np.testing.assert_array_equal(a, -weights[key], err_msg=key)


def test_gradients_of_a_net_with_frozen_layers_keep_its_places():
    net = fnbp.serial(fnbp.freeze(fnbp.repeat(fnbp.skip(fnbp.dense(5)), 2)), fnbp.batch_norm(), fnbp.dense(3))
    params, state = filled(net, (7, 5))
    path = "serial[0].freeze(repeat(2)).repeat(2)[0].skip[0].dense(5)"
    places = {path: "blocks.{}.fc", "serial[1].batch_norm": "norm", "serial[2].dense(3)": "head"}
    assert "blocks.1.fc.weight" in fnbp.to_torch(net, params, state, places)
    assert [*fnbp.to_torch(net, params, None, places)] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"params must hold \[\], got \['W'\]"):
        fnbp.to_torch(net, ({"W": ROWS}, *params[1:]), None)
    with pytest.raises(ValueError, match=r"do not belong to serial\[1\]\.batch_norm: .* must hold \['beta', 'gamma'\]"):
        fnbp.to_torch(net, (params[0], {"gamma": ROWS[0]}, params[2]), None)
    for nothing in (None, (None, *params[1:])):
        with pytest.raises(ValueError, match=r"params must have 3 entries|params must hold|must be a dict"):
            fnbp.to_torch(net, nothing, None)
    with pytest.raises(ValueError, match=r"serial: state must have 3 entries, one for each layer, got a NoneType"):
        fnbp.from_torch(net, {}, params, None)


# --- places ---


@needs_torch
def test_layers_take_modules_in_their_order(x64):
    import torch
    from torch import nn

    settings = {"dropout": 0.0, "activation": "gelu", "norm_first": True, "batch_first": True}
    stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    reader = nn.LSTM(5, 5, num_layers=2, bidirectional=True, batch_first=True)
    blocks = nn.ModuleList([nn.TransformerEncoderLayer(10, 2, 40, **settings) for _ in range(3)])
    head = nn.Linear(10, 7)
    module = nn.ModuleDict({"stem": stem, "reader": reader, "blocks": blocks, "head": head}).double().eval()
    net = fnbp.serial(
        fnbp.conv(5, 3, b=None), fnbp.batch_norm(), fnbp.relu(), fnbp.reshape(-1, 5),
        fnbp.bidirectional(fnbp.lstm_cell(5)), fnbp.bidirectional(fnbp.lstm_cell(5)),
        fnbp.repeat(fnbp.transformer_block(10, 2, causal=False), 3), fnbp.dense(7),
    )  # fmt: skip
    for i, parameter in enumerate(module.parameters()):
        parameter.data = torch.tensor(drawn(parameter.shape, i)) / 2
    stem.state_dict()["1.num_batches_tracked"].fill_(1)
    x = drawn((2, 3, 2, 3), 1)
    params, state = fnbp.from_torch(net, module.state_dict(), *made(net, x.shape))
    h = stem(torch.tensor(x).movedim(-1, 1)).movedim(1, -1).flatten(1, 2)
    h, _ = reader(h)
    for block in blocks:
        h = block(h)
    assert relative(fnbp.apply(net, params, state, x), head(h).detach().numpy()) <= 1e-12

    places = {
        "serial[0].conv(5, 3)": "stem.0", "serial[1].batch_norm": "stem.1", "serial[4].parallel(concat)": "reader",
        "serial[5].parallel(concat)[0].scan(lstm_cell(5))": "reader.*_l1",
        "serial[5].parallel(concat)[1].scan(lstm_cell(5), reverse)": "reader.*_l1_reverse",
        "serial[6].repeat(3)": "blocks", "serial[7].dense(7)": "head",
    }  # fmt: skip
    back = fnbp.to_torch(net, params, state, places)
    assert back.keys() == held_of(module).keys()
    assert equal(fnbp.from_torch(net, dict(reversed(back.items())), params, state, places), (params, state))
    places["serial[6].repeat(3)[0].transformer_block(10, 2)"] = "blocks.{}"
    assert fnbp.to_torch(net, params, state, places).keys() == back.keys()


def test_places_tell_layers_apart_that_stand_in_another_order():
    net = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(5))
    params, state = filled(net, (3, 5))
    places = {"serial[0].dense(5)": "z.first", "serial[2].dense(5)": "a.second"}
    weights = fnbp.to_torch(net, params, state, places)
    turned = dict(sorted(weights.items()))
    assert next(iter(turned)) == "a.second.bias"
    assert equal(fnbp.from_torch(net, turned, params, state, places)[0], params)
    swapped = fnbp.from_torch(net, turned, params, state)[0]
    assert equal(swapped, (params[2], {}, params[0]))
    some = fnbp.from_torch(net, turned, params, state, {"serial[0].dense(5)": "z.first"})[0]
    assert equal(some, params)


@needs_flax
@pytest.mark.parametrize("layout", ["linen", "nnx"])
def test_sequential_of_flax_needs_no_places(x64, layout):
    from flax import linen, nnx

    net = fnbp.serial(fnbp.dense(7), fnbp.relu(), fnbp.serial(fnbp.dense(5), fnbp.tanh()))
    x = jnp.asarray(drawn((3, 11), 1))
    params, state = filled(net, x.shape)
    weights = fnbp.to_flax(net, params, state, layout=layout)
    if layout == "linen":
        inner = linen.Sequential([linen.Dense(5), linen.tanh])
        theirs = linen.Sequential([linen.Dense(7), linen.relu, inner]).apply(weights, x)
    else:
        r = nnx.Rngs(0)
        inner = nnx.Sequential(nnx.Linear(7, 5, rngs=r), nnx.tanh)
        module = nnx.Sequential(nnx.Linear(11, 7, rngs=r), nnx.relu, inner)
        held = nnx.state(module)
        nnx.replace_by_pure_dict(held, weights)
        nnx.update(module, held)
        theirs = module(x)
    assert relative(fnbp.apply(net, params, state, x), theirs) <= 1e-12


@needs_flax
def test_a_compact_module_of_linen_needs_places(x64):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(7)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.Dense(5)(nn.relu(x))

    net, x = fnbp.serial(fnbp.dense(7), fnbp.batch_norm(), fnbp.relu(), fnbp.dense(5)), jnp.asarray(drawn((3, 11), 1))
    places = {"serial[0].dense(7)": "Dense_0", "serial[1].batch_norm": "BatchNorm_0", "serial[3].dense(5)": "Dense_1"}
    params, state = fnbp.from_flax(net, Net().init(KEY, x), *made(net, x.shape), places)
    weights = fnbp.to_flax(net, params, state, places)
    assert relative(fnbp.apply(net, params, state, x), Net().apply(weights, x)) <= 1e-6  # drawn in float32
    assert set(weights) == {"params", "batch_stats"}


LSTM, BACK = fnbp.scan(fnbp.lstm_cell(3)), fnbp.scan(fnbp.lstm_cell(3), reverse=True)


def named_as(net, suffix):
    """The weights of a scan, their names ending in suffix."""
    weights = fnbp.to_torch(net, *filled(net, (2, 5, 7)))
    return {re.sub(r"_l0(_reverse)?$", suffix, name): a for name, a in weights.items()}


@pytest.mark.parametrize("cell", [fnbp.rnn_cell(3), fnbp.lstm_cell(3), fnbp.gru_cell(3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_takes_weights_of_its_own_direction_and_says_how_to_take_others(cell, reverse):
    net = fnbp.scan(cell, reverse=reverse)
    params, state = filled(net, (2, 5, 7))
    for own in ("_l0_reverse", "_l3_reverse") if reverse else ("_l0", "_l3"):
        assert equal(fnbp.from_torch(net, named_as(net, own), params, state), (params, state))
    due = "weight_ih_l0_reverse" if reverse else "weight_ih_l0"
    for other in ("", "_l0", "_l1") if reverse else ("", "_l0_reverse"):
        for before in ("", "reader.lstm."):
            weights = {before + name: a for name, a in named_as(net, other).items()}
            place = f"{before}*{other}"
            says = (
                rf"no entry {due} of shape .* the next entry that is left is {before}weight_ih{other}, which "
                rf"places={{{re.escape(repr(net.name))}: {re.escape(repr(place))}}} takes, if that is meant; there are"
            )
            with pytest.raises(ValueError, match=says):
                fnbp.from_torch(net, weights, params, state)
            assert equal(fnbp.from_torch(net, weights, params, state, {net.name: place}), (params, state))


def test_directions_that_stand_in_another_order_are_not_mistaken():
    net = fnbp.parallel(BACK, LSTM)
    params, state = filled(net, (2, 5, 7))
    weights = named_as(LSTM, "_l0") | named_as(BACK, "_l0_reverse")
    path = "parallel(sum)[0].scan(lstm_cell(3), reverse)"
    says = r"in its turn, .* that is left is weight_ih_l0_reverse, which places={.*: '\*_l0_reverse'} takes"
    with pytest.raises(ValueError, match=says):
        fnbp.from_torch(net, weights, params, state)
    assert equal(fnbp.from_torch(net, weights, params, state, {path: "*_l0_reverse"}), (params, state))


# --- GPT-2 ---


def gpt2(vocabulary, length, layers, heads, width):
    """GPT-2 in PyTorch, with the names and shapes of its published weights."""
    import torch
    from torch import nn

    class Conv1D(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(0.02 * torch.randn(n_in, n_out)),
                nn.Parameter(0.1 * torch.randn(n_out)),
            )

        def forward(self, x):
            return x @ self.weight + self.bias

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = Conv1D(width, 3 * width), Conv1D(width, width)

        def forward(self, x):
            q, k, v = (a.unflatten(-1, (heads, -1)).movedim(2, 1) for a in self.c_attn(x).chunk(3, -1))
            scores = q @ k.mT / (width // heads) ** 0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            o = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
            return self.c_proj(o.movedim(1, 2).flatten(2))

    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

        def forward(self, x):
            return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(width), Attention()
            self.ln_2, self.mlp = nn.LayerNorm(width), Perceptron()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.wte.weight.data *= 0.02
            self.h, self.ln_f = nn.ModuleList([Block() for _ in range(layers)]), nn.LayerNorm(width)

        def forward(self, x):
            h = self.wte(x) + self.wpe.weight[: x.shape[1]]
            for block in self.h:
                h = block(h)
            return self.ln_f(h)

    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer, self.lm_head = Model(), nn.Linear(width, vocabulary, bias=False)
            self.lm_head.weight = self.transformer.wte.weight

        def forward(self, x):
            return self.lm_head(self.transformer(x))

    torch.manual_seed(0)
    return WithHead()


def differences(sizes, x):
    """|ours - theirs| / |theirs| of the scores, and the largest of all gradients, by the mean cross-entropy."""
    import torch

    module, y = gpt2(*sizes), np.roll(x, -1, 1)
    net = fnbp.models.gpt(*sizes, approximate=True)
    params, state = fnbp.from_torch(net, module.state_dict(), *made(net, x.shape, int), layout="gpt2")
    scores = module(torch.tensor(x))
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor(y).flatten()).backward()
    done = jax.jit(fnbp.backprop(net, fnbp.softmax_cross_entropy()))(params, state, x, y)
    gradients = fnbp.to_torch(net, done.grads, None, layout="gpt2")
    assert gradients.keys() == module.state_dict().keys()
    worst = 0.0
    for name, parameter in module.named_parameters():
        theirs, ours = parameter.grad.numpy(), gradients[name]
        if name.endswith("c_attn.bias"):  # that of the keys is 0, but for rounding
            theirs, ours = (np.concatenate([a[: len(a) // 3], a[2 * len(a) // 3 :]]) for a in (theirs, ours))
        worst = max(worst, np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    back = fnbp.to_torch(net, params, state, layout="gpt2")
    for name, a in module.state_dict().items():
        a = a.numpy().copy()
        if name.endswith("c_attn.bias"):
            a[len(a) // 3 : 2 * len(a) // 3] = 0
        np.testing.assert_array_equal(back[name], a)
    return relative(done.prediction, scores.detach().numpy()), worst


@needs_torch
def test_a_small_gpt2_is_pytorchs():
    x = np.random.default_rng(0).integers(0, 13, (2, 7))
    assert max(differences((13, 11, 3, 2, 10), x)) <= 1e-5


@needs_torch
@pytest.mark.slow
def test_gpt2_small_is_pytorchs():
    x = np.random.default_rng(0).integers(0, 50257, (1, 16))
    output, gradient = differences((50257, 1024, 12, 12, 768), x)
    print(f"GPT-2 small: scores differ by {output:.1e}, gradients by {gradient:.1e} at most")
    assert output <= 1e-4 and gradient <= 1e-4


GPT, TOKENS = fnbp.models.gpt(13, 7, 2, 2, 6, approximate=True), (3, 7)


GPT_WEIGHTS = fnbp.to_torch(GPT, *filled(GPT, TOKENS, int), layout="gpt2")


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "module.transformer."])
def test_what_wrappers_of_modules_put_before_the_names_of_gpt2_is_left_out(before):
    params, state = filled(GPT, TOKENS, int)
    weights = dict(GPT_WEIGHTS)
    if before == "module.transformer.":
        weights = {name.removeprefix("transformer."): a for name, a in weights.items() if name != "lm_head.weight"}
    weights = {before + name: a for name, a in weights.items()}
    assert equal(fnbp.from_torch(GPT, weights, params, state, layout="gpt2"), (params, state))


def test_gpt2_is_not_taken_into_a_net_with_an_exact_gelu():
    exact = fnbp.models.gpt(13, 7, 2, 2, 6)
    params, state = filled(exact, TOKENS, int)
    for net, trees in ((exact, (params, state)), (fnbp.cast(exact, "bfloat16"), ((params,), (state,)))):
        with pytest.raises(
            ValueError, match=r"gelu, turn 0 is exact, .*; expected gelu\(approximate=True\), as models"
        ):
            fnbp.from_torch(net, GPT_WEIGHTS, *trees, layout="gpt2")
    weights = fnbp.to_torch(exact, params, state, layout="gpt2")
    assert equal(fnbp.from_torch(exact, fnbp.to_torch(exact, params, state), params, state), (params, state))
    mlp = fnbp.serial(fnbp.dense(5), fnbp.silu(), fnbp.dense(3))
    places = {"serial[0].dense(5)": "transformer.0", "serial[2].dense(3)": "transformer.2"}
    trees = filled(mlp, (3, 7))
    own = fnbp.to_torch(mlp, *trees, places, layout="gpt2")
    assert equal(fnbp.from_torch(mlp, own, *trees, places, layout="gpt2"), trees)
    assert weights.keys() == GPT_WEIGHTS.keys()


def test_published_weights_of_gpt2_are_taken_without_their_prefix_masks_and_head():
    params, state = filled(GPT, TOKENS, int)
    weights = fnbp.to_torch(GPT, params, state, layout="gpt2")
    bare = {name.removeprefix("transformer."): a for name, a in weights.items() if name != "lm_head.weight"}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 7, 7)), "h.1.attn.masked_bias": np.array(-1e4)}
    assert equal(fnbp.from_torch(GPT, bare, params, state, layout="gpt2"), (params, state))
    assert weights["transformer.h.1.attn.c_attn.weight"].shape == (6, 18)
    assert weights["transformer.h.1.mlp.c_fc.weight"].shape == (6, 24)


# --- numbers that the net does not hold ---

DENSE = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(2))
PARAMS, STATE = filled(DENSE, (3, 7))
WEIGHTS = fnbp.to_torch(DENSE, PARAMS, STATE)
FLAX_NNX = fnbp.to_flax(DENSE, PARAMS, STATE, layout="nnx")
FLAX, GROUPED = fnbp.to_flax(DENSE, PARAMS, STATE), fnbp.conv_transpose(4, 3, groups=2)


@pytest.mark.parametrize("name", NETS)
def test_numbers_that_are_not_finite_or_become_so_are_refused(name):
    net, x = NETS[name]
    dtype = int if name == "gpt" else float
    params, state = filled(net, x, dtype)
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float16), params)
    weights = fnbp.to_torch(net, params, state)
    floating = [name for name in weights if not name.endswith("num_batches_tracked")]
    for i, entry in enumerate(floating[:8]):
        narrow = not re.search("running_", entry) and name != "freeze"  # what stands in the state is not halved here
        bad = (1e5 if narrow else np.nan, np.nan, np.inf, -np.inf)[i % 4]
        a = weights[entry].copy()
        a.flat[a.size - 1] = bad
        last = tuple(n - 1 for n in a.shape)
        says = rf"{re.escape(entry)}.*{re.escape(str(a.flat[-1]))} at index {re.escape(str(last))}"
        with pytest.raises(ValueError, match="from_torch: " + says):
            fnbp.from_torch(net, weights | {entry: a}, half if narrow else params, state)


@pytest.mark.parametrize(("layout", "entry"), [("linen", r"layers_0\.kernel"), ("nnx", r"layers\.0\.kernel")])
def test_numbers_of_flax_that_the_net_does_not_hold_are_refused(layout, entry):
    weights = fnbp.to_flax(DENSE, jax.tree.map(lambda a: a * 1e5, PARAMS), STATE, layout=layout)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS)
    with pytest.raises(
        ValueError, match=rf"from_flax: {entry} holds .* at index \(0, 0\), which float16 does not hold"
    ):
        fnbp.from_flax(DENSE, weights, half, STATE, layout=layout)


def test_numbers_beyond_float32_are_refused_without_x64():
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)
    weights = WEIGHTS | {"2.bias": np.array([1.0, 1e300])}
    with pytest.raises(ValueError, match=r"2\.bias holds 1e\+300 at index \(1,\), which float32 does not hold"):
        fnbp.from_torch(DENSE, weights, params, STATE)


def test_a_tiny_number_is_rounded():
    half = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS)
    params, _ = fnbp.from_torch(DENSE, WEIGHTS | {"2.bias": np.array([1.0, 1e-30], np.float32)}, half, STATE)
    np.testing.assert_array_equal(params[2]["b"], [1, 0])


@pytest.mark.parametrize("layout", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet", "bidirectional"])
def test_bfloat16_leaves_for_flax_as_bfloat16(name, layout):
    net, x = NETS[name]
    params, state = filled(net, x)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    weights = fnbp.to_flax(net, low, state, layout=layout)
    kinds = {str(a.dtype) for a in jax.tree.leaves(weights.get("params", weights) if layout == "linen" else weights)}
    assert kinds == ({"bfloat16", "float32"} if layout == "nnx" and name == "resnet" else {"bfloat16"})
    again, _ = fnbp.from_flax(net, weights, low, state, layout=layout)
    assert name == "bidirectional" or equal(again, low)


# --- where parameters lie ---


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("layout", ["torch", "linen"])
def test_what_is_taken_lies_where_the_parameters_lie(explicit, layout):
    net = fnbp.serial(fnbp.repeat(fnbp.transformer_block(16, 2), 2), fnbp.freeze(fnbp.dense(8)), fnbp.batch_norm())
    params, state = filled(net, (3, 5, 16))
    placed = fnbp.sharding.place(net, params, fnbp.sharding.mesh(data=2, model=2, explicit=explicit), fully=True)
    assert any(any(a.sharding.spec) for a in jax.tree.leaves(placed))
    there = jax.tree.map(lambda a: jax.device_put(a, jax.devices()[3]), state)
    to, of = (fnbp.to_torch, fnbp.from_torch) if layout == "torch" else (fnbp.to_flax, fnbp.from_flax)
    weights = to(net, params, state)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), placed)
    for given in (placed, shapes):
        taken, still = of(net, weights, given, there)
        assert equal(taken, params)
        for a, b in zip(jax.tree.leaves((taken, still)), jax.tree.leaves((given, there)), strict=True):
            assert a.sharding == b.sharding
    plain = jax.tree.leaves(of(net, weights, params, state))
    assert all(isinstance(a, jax.Array) and not a.committed for a in plain)


# --- what is refused ---


def test_a_module_of_flax_without_weights_has_no_variables():
    net = fnbp.serial(fnbp.relu())
    assert fnbp.from_flax(net, {}, *filled(net, (3, 5))) == (({},), ({},))


def changed(**arrays):
    return {
        name: a
        for name, a in (WEIGHTS | {k.replace("_", ".", 1): a for k, a in arrays.items()}).items()
        if a is not None
    }


def take(weights, places=None, net=DENSE, **options):
    return fnbp.from_torch(net, weights, PARAMS, STATE, places, **options)


def give(net, x, places=None, dtype=float, **options):
    return fnbp.to_torch(net, *filled(net, x, dtype), places, **options)


def user_layer():
    init = lambda key, x: {"g": jnp.ones(x.shape[-1])}  # noqa: E731
    return fnbp.stateless(init, lambda p, x: (p["g"] * x, (x,)), lambda p, res, dy: ({}, dy), "mine")


REFUSED = [
    (
        lambda: take(changed(**{"2_bias": None})),
        ValueError,
        r"from_torch: no entry 2\.bias of shape \(2,\), which serial\[2\]\.dense\(2\)\.b of shape \(2,\) needs; there "
        r"are 0\.weight, 0\.bias, 2\.weight",
    ),
    (
        lambda: take({"0.weight": WEIGHTS["0.weight"]}),
        ValueError,
        r"no entry 0\.bias of shape \(5,\), which serial\[0\]\.dense\(5\)\.b of shape \(5,\) needs",
    ),
    (
        lambda: take(changed(**{"2_weight": np.ones((5, 2))})),
        ValueError,
        r"from_torch: 2\.weight has shape \(5, 2\), serial\[2\]\.dense\(2\)\.W of shape \(2, 5\) needs \(2, 5\)",
    ),
    (
        lambda: take(changed(**{"3_weight": np.ones((5, 3))})),
        ValueError,
        r"from_torch: nothing in serial takes 3\.weight of shape \(5, 3\)",
    ),
    (
        lambda: take({"norm.running_mean": np.ones(3), **WEIGHTS}),
        ValueError,
        r"no entry weight of shape \(5, 7\), which .*\.W of shape \(5, 7\) needs; the next entry that is left is no",
    ),
    (lambda: take({}), ValueError, r"no entry weight .*; the next entry that is left is none; there are"),
    (lambda: take([1]), TypeError, r"from_torch: weights must be a dict of arrays by name, got a list of 1"),
    (lambda: take(changed(**{"2_bias": "x"})), ValueError, r"2\.bias has shape \(\)"),
    (lambda: take(changed(**{"2_bias": object()})), TypeError, r"from_torch: 2\.bias must be an array, got object"),
    (
        lambda: take({0: WEIGHTS["0.weight"]}),
        TypeError,
        r"from_torch: names of weights must be texts, such as '0\.weight', got 0",
    ),
    (
        lambda: fnbp.from_torch(fnbp.layer_norm(), {"weight": ROWS[0]}, {"gamma": 1.0, "beta": ROWS[0]}, {}),
        TypeError,
        r"from_torch: params\['gamma'\] must be an array, got float 1\.0",
    ),
    (
        lambda: fnbp.to_flax(fnbp.batch_norm(), {}, {"count": 1}),
        TypeError,
        r"to_flax: state\['count'\] must be an array, got int 1",
    ),
    (
        lambda: fnbp.from_torch(GPT, {f"module.{name}": a for name, a in GPT_WEIGHTS.items() if "wte" not in name and
                                      "head" not in name}, *made(GPT, TOKENS, int), layout="gpt2"),
        ValueError,
        r"no entry transformer\.wte\.weight of .*; there are transformer\.wpe\.weight",
    ),
    (lambda: take(WEIGHTS, net=fnbp.relu), TypeError, r"from_torch: net must be a Layer, got function relu; call it"),
    (lambda: take(WEIGHTS, net=fnbp.dense(5)), ValueError, r"dense\(5\): params must be a dict, got a tuple of 3"),
    (lambda: take(WEIGHTS, net=fnbp.serial(fnbp.dense(5))), ValueError, r"serial: params must have 1 entries"),
    (lambda: take(WEIGHTS, layout="keras"), ValueError, r"from_torch: unknown layout 'keras'"),
    (lambda: take(WEIGHTS, ["fc"]), TypeError, r"from_torch: places must be a dict, such as .* got a list of 1"),
    (
        lambda: take(WEIGHTS, {"serial[0].dense(6)": "fc"}),
        ValueError,
        r"no layer of serial is 'serial\[0\]\.dense\(6\)'; the nearest is serial\[0\]\.dense\(5\)",
    ),
    (
        lambda: take(WEIGHTS, {"serial[0].dense(5)": "a.*.*"}),
        TypeError,
        r"the place of serial\[0\]\.dense\(5\) must be a text with at most one \*",
    ),
    (
        lambda: take(WEIGHTS, {"serial[0].dense(5)": "0", "serial[2].dense(2)": "0"}),
        ValueError,
        r"from_torch: serial\[0\]\.dense\(5\)\.W of shape \(5, 7\) and serial\[2\].* have one place, 0\.weight",
    ),
    (
        lambda: fnbp.to_torch(DENSE, PARAMS, STATE, {"serial[0].dense(5)": "0", "serial[2].dense(2)": "0"}),
        ValueError,
        r"to_torch: serial\[0\]\.dense\(5\) and serial\[2\]\.dense\(2\) have one place, 0\.weight",
    ),
    (
        lambda: give(fnbp.serial(fnbp.dense(5), fnbp.bias()), (3, 7)),
        TypeError,
        r"to_torch: serial\[1\]\.bias has no counterpart: PyTorch has no module that adds only a bias",
    ),
    (
        lambda: give(fnbp.skip(fnbp.attention(2, rotary=10.0)), (3, 5, 8)),
        TypeError,
        r"skip\[0\]\.attention\(2\) has no counterpart: torch.nn.MultiheadAttention has no rotary embedding",
    ),
    (
        lambda: give(fnbp.attention(2, 1), (3, 5, 8)),
        TypeError,
        r"attention\(2, 1\) has no counterpart: torch.nn.MultiheadAttention has as many key/value heads as heads",
    ),
    (lambda: give(fnbp.scan(user_cell()), (3, 5, 7)), TypeError, r"only scans of rnn_cell, lstm_cell and gru_cell"),
    (lambda: give(user_layer(), (3, 7)), TypeError, r"mine has no counterpart: the table of fnbp.exchange has no"),
    (
        lambda: fnbp.from_torch(
            GPT, fnbp.to_torch(GPT, *filled(GPT, TOKENS, int)) | {"4.weight": np.ones((13, 6))}, *made(GPT, TOKENS, int)
        ),
        ValueError,
        r"from_torch: tie has one parameter at \(0, 'E'\) and \(4, 'W'\), and their entries differ",
    ),
    (
        lambda: take(changed(**{"2_bias": np.ones(2, int)})),
        TypeError,
        r"2\.bias must be of floating point numbers, got int64 of shape \(2,\)",
    ),
    (lambda: take(WEIGHTS, {"serial": "a.*"}), ValueError, r"serial has several layers, so its place has no \*, got"),
    (
        lambda: take(WEIGHTS, {"serial[0].dense(5)": "a.{}"}),
        ValueError,
        r"the place of serial\[0\]\.dense\(5\) may have 0 \{\}, one for each repeat around it, got 'a\.\{\}'",
    ),
    *[
        (
            lambda variables=variables: fnbp.from_flax(DENSE, variables, PARAMS, STATE),
            ValueError,
            r"from_flax: variables hold " + came + r"; expected 'params', and 'batch_stats' if there are any" + hint,
        )
        for variables, came, hint in (
            (FLAX | {"ema": FLAX["params"]}, r"'ema'", "$"),
            ({"ema": FLAX["params"]}, r"'ema'", r': give {"params": \.\.\.}'),
            (FLAX["params"], r"'layers_0', 'layers_2'", r': give {"params": \.\.\.}, or say layout="nnx"'),
            (FLAX["params"]["layers_0"], r"'kernel', 'bias'", r': give {"params": \.\.\.}, or say layout="nnx"'),
            (FLAX_NNX, r"'layers'", r': give {"params": \.\.\.}, or say layout="nnx"'),
        )
    ],
    (lambda: fnbp.from_flax(DENSE, {}, PARAMS, STATE), ValueError, r"from_flax: no entry layers_0\.kernel .* are none"),
    (
        lambda: fnbp.from_flax(DENSE, FLAX | {"batch_stats": FLAX["params"]}, PARAMS, STATE),
        ValueError,
        r"from_flax: params and batch_stats both hold layers_0\.(bias|kernel)",
    ),
    (
        lambda: fnbp.from_flax(DENSE, {"params": np.ones(3)}, PARAMS, STATE),
        TypeError,
        r"from_flax: variables\['params'\] must be a dict, got float64 of shape \(3,\)",
    ),
    (
        lambda: fnbp.from_flax(DENSE, FLAX, PARAMS, STATE, layout="nnx"),
        ValueError,
        r"from_flax: no entry layers\.0\.kernel .* there are params\.layers_0\.kernel",
    ),
    (lambda: fnbp.from_flax(DENSE, 3, PARAMS, STATE), TypeError, r"from_flax: variables must be a dict, got int 3"),
    (lambda: fnbp.from_flax(DENSE, FLAX, PARAMS, STATE, layout="torch"), ValueError, r"unknown layout 'torch'"),
    (lambda: fnbp.to_flax(DENSE, PARAMS, STATE, layout="x"), ValueError, r"to_flax: unknown layout 'x'"),
    (
        lambda: fnbp.from_flax(DENSE, {"params": {"Dense_0": FLAX["params"]["layers_0"]}}, PARAMS, STATE),
        ValueError,
        r"from_flax: no entry layers_0\.kernel of shape \(7, 5\), which serial\[0\].* there are Dense_0\.kernel",
    ),
    (
        lambda: fnbp.to_flax(GROUPED, *filled(GROUPED, (2, 5, 6))),
        TypeError,
        r"to_flax: conv_transpose\(4, 3\) has no counterpart: ConvTranspose of Flax has no groups",
    ),
]  # fmt: skip


FROZEN, DEEP = fnbp.freeze(fnbp.dense(5)), fnbp.repeat(fnbp.skip(fnbp.dense(5)), 3)
TIED = fnbp.tie(fnbp.serial(fnbp.embedding(13, 5), fnbp.dense(13, b=None)), (0, "E"), (1, "W"))
TWO, FIVE = (filled(fnbp.repeat(fnbp.skip(fnbp.dense(5)), n), (3, 5)) for n in (2, 5))
STRANGERS = [  # net, params, state, what the message says
    (FROZEN, {"W": ROWS}, filled(FROZEN, (3, 7))[1], r"freeze\(dense\(5\)\): params must hold \[\], got \['W'\]"),
    (FROZEN, {}, {}, r"state must hold 'params' and 'state' of the layer, got an empty dict"),
    (FROZEN, {}, {"params": {}, "state": {}}, r"freeze\(dense\(5\)\)\.dense\(5\): .* params must hold \['W', 'b'\]"),
    (DEEP, *TWO, r"repeat\(3\): .* first axis of 3, got \[\(2,\)\]"),
    (DEEP, *FIVE, r"repeat\(3\): .* first axis of 3, got \[\(5,\)\]"),
    (TIED, (({"E": ROWS}, {"W": ROWS}),), (({}, {}),), r"tie: params hold \(1, 'W'\), which is \(0, 'E'\) here"),
    (TIED, (({"E": ROWS},),), (({}, {}),), r"\(1,\) leads nowhere in params"),
    (TIED, (({}, {}),), (({}, {}),), r"\(0, 'E'\) leads nowhere in params"),
    (fnbp.dense(5), {"W": {"W": ROWS}, "b": ROWS}, {}, r"dense\(5\): params\['W'\] must be an array, got a dict"),
    (fnbp.relu(), {"W": ROWS}, {}, r"relu has no counterpart"),
    (fnbp.dense(5), {"W": jnp.ones((5, 7), int), "b": ROWS[0]}, {}, r"dense\(5\)\.W must be of floating point .*int"),
]  # fmt: skip


@pytest.mark.parametrize(("net", "params", "state", "message"), STRANGERS)
def test_params_and_state_of_another_net_are_refused(net, params, state, message):
    for call in (
        lambda: fnbp.to_torch(net, params, state),
        lambda: fnbp.to_flax(net, params, state, layout="nnx"),
        lambda: fnbp.from_torch(net, {"weight": ROWS}, params, state),
        lambda: fnbp.from_flax(net, {"params": {}}, params, state),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def user_cell():
    return fnbp.stateless(
        lambda key, hx: {"g": jnp.ones(hx[1].shape[-1])},
        lambda p, hx: ((hx[1], hx[1]), ()),
        lambda p, res, d: ({}, d),
        "mine",
    )


def tensors():
    """Tensors of PyTorch that NumPy does not take, and what their message says."""
    import torch

    matrix = torch.ones(5, 7)
    yield "float8", matrix.to(torch.float8_e4m3fn), "Float8"
    yield "on no device", matrix.to("meta"), "meta"
    yield "sparse", matrix.to_sparse(), "[Ss]parse"
    yield "negative", torch.complex(matrix, matrix).conj().imag, "negative bit"
    yield "lazy", torch.nn.LazyLinear(5).weight, "uninitialized"


@needs_torch
@pytest.mark.parametrize("which", range(5))
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_that_numpy_does_not_take_is_named(which):
    _, tensor, says = [*tensors()][which]
    with pytest.raises(TypeError, match=rf"from_torch: 0\.weight must be an array that NumPy takes, got .*{says}"):
        take(WEIGHTS | {"0.weight": tensor})


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[re.sub(r"\W+", " ", m)[:60] for *_, m in REFUSED])
def test_it_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
