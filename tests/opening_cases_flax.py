"""Losses to open: modules of Flax, linen and nnx."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.opening_case import Case, M, below, case, drawn, energy, filled, keys, np_rng


def linen(id, build, *batch, loss=None, **options):
    """The energy of what a module makes, or loss(module, variables, *example)."""

    def make():
        module, examples = build(), tuple(drawn(np_rng(id), one, (M,)) for one in batch)
        variables = module.init(jax.random.key(0), *(jax.tree.map(lambda a: a[0], one) for one in examples))
        rest = {name: value for name, value in variables.items() if name != "params"}
        of_module = loss or (lambda module, variables, *example: energy(module.apply(variables, *example)))
        return (
            lambda p, *example: of_module(module, {"params": p, **rest}, *example),
            filled(variables["params"]),
            examples,
        )

    return Case(id, make, **options)


class Attends(nn.Module):
    """One table embeds and scores."""

    def setup(self):
        self.embed, self.mix = nn.Embed(7, 3), nn.Dense(3)

    def __call__(self, x):
        return self.embed.attend(jnp.tanh(self.mix(self.embed(x))))


class SpectralDense(nn.Module):
    update: bool

    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(7))(x, update_stats=self.update)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + jnp.tanh(nn.Dense(3)(h)), None


class Stack(nn.Module):
    """Three blocks, their parameters stacked, or one whose parameters are shared."""

    shared: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Residual) if self.remat else Residual
        how = {"variable_broadcast": "params"} if self.shared else {"variable_axes": {"params": 0}}
        return nn.scan(block, split_rngs={"params": not self.shared}, length=3, **how)()(x, None)[0]


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(nn.Dense, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True})(
            7
        )(x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(7)(x), rng=key)


class Looped(nn.Module):
    """A cell that is called at each position, by a loop of Python."""

    @nn.compact
    def __call__(self, xs):
        cell, h = nn.GRUCell(7), jnp.zeros(7)
        for x in xs:
            h, _ = cell(h, x)
        return h


def attention(**options):
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=False, **options)


def with_statistics(module, variables, *example):
    y, changed = module.apply(variables, *example, mutable=["batch_stats"])
    return energy(y), changed


def gru(n):
    return nn.RNN(nn.GRUCell(n, param_dtype=jnp.float64))


def recurrent(cell, *shape):
    return linen(f"linen: {cell.__name__}", lambda: nn.RNN(cell(7, param_dtype=jnp.float64)), *shape or ((5, 3),))


LINEN = (
    linen("linen: Dense", lambda: nn.Dense(7), (3,), quick=True),
    linen("linen: Dense, positions", lambda: nn.Dense(7), (11, 3)),
    linen("linen: DenseGeneral", lambda: nn.DenseGeneral((2, 7), axis=(-2, -1)), (5, 3)),
    linen("linen: Einsum", lambda: nn.Einsum((2, 3, 7), "td,hdo->tho"), (5, 3)),
    linen("linen: Conv", lambda: nn.Conv(7, (3, 2)), (5, 7, 3)),
    linen("linen: Conv, grouped", lambda: nn.Conv(6, (3,), feature_group_count=3, strides=2), (11, 3)),
    linen("linen: ConvTranspose", lambda: nn.ConvTranspose(7, (3,), strides=(2,)), (5, 3)),
    linen("linen: ConvLocal", lambda: nn.ConvLocal(7, (3,)), (5, 2)),
    linen("linen: LayerNorm", lambda: nn.LayerNorm(), (5, 7)),
    linen("linen: RMSNorm", lambda: nn.RMSNorm(), (5, 7)),
    linen("linen: GroupNorm", lambda: nn.GroupNorm(2), (5, 6)),
    linen("linen: InstanceNorm", lambda: nn.InstanceNorm(), (2, 5, 7)),
    linen("linen: BatchNorm, in use", lambda: nn.BatchNorm(use_running_average=True), (7,)),
    linen("linen: WeightNorm", lambda: nn.WeightNorm(nn.Dense(7)), (3,), quick=True),
    linen("linen: SpectralNorm", lambda: SpectralDense(False), (3,)),
    linen("linen: SpectralNorm, updated", lambda: SpectralDense(True), (3,), loss=with_statistics, has_aux=True),
    linen("linen: Embed", lambda: nn.Embed(7, 3), below(7, 5)),
    linen("linen: Embed, attend", Attends, below(7, 5), quick=True),
    linen("linen: attention", attention, (5, 6)),
    linen("linen: attention, qk norm", lambda: attention(normalize_qk=True), (5, 6)),
    recurrent(nn.LSTMCell),
    recurrent(nn.OptimizedLSTMCell),
    recurrent(nn.GRUCell),
    recurrent(nn.MGUCell),
    recurrent(nn.SimpleCell),
    linen("linen: ConvLSTMCell", lambda: nn.RNN(nn.ConvLSTMCell(2, (3,), param_dtype=jnp.float64)), (3, 5, 2)),
    linen("linen: Bidirectional", lambda: nn.Bidirectional(gru(7), gru(2)), (5, 3)),
    linen("linen: a cell in a loop", Looped, (2, 3)),
    linen("linen: vmap", Heads, (3,)),
    linen("linen: scan", Stack, (3,), quick=True),
    linen("linen: scan, shared", lambda: Stack(shared=True), (3,)),
    linen("linen: scan, remat", lambda: Stack(remat=True), (3,)),
    linen("linen: Sequential, PReLU", lambda: nn.Sequential([nn.Dense(7), nn.PReLU(), nn.Dense(2)]), (3,)),
    linen("linen: jit", lambda: nn.jit(nn.Dense)(7), (3,)),
    linen("linen: Dense in bfloat16", lambda: nn.Dense(7, dtype=jnp.bfloat16), (3,), tolerance=2e-2),
    linen("linen: Dropout", Dropped, (3,), keys),
)


def of_nnx(id, build, *batch, call=lambda model, *example: model(*example), copy=True, **options):
    """The energy of what a module makes, merged of its parameters and the rest."""

    def make():
        definition, params, rest = nnx.split(build(nnx.Rngs(0)), nnx.Param, ...)
        loss = lambda p, *example: energy(call(nnx.merge(definition, p, rest, copy=copy), *example))  # noqa: E731
        return loss, filled(params), tuple(drawn(np_rng(id), one, (M,)) for one in batch)

    return Case(id, make, **options)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.mix = nnx.Embed(7, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(jnp.tanh(self.mix(self.embed(x))))


class Twice(nnx.Module):
    """A module at two places of a graph: one leaf."""

    def __init__(self, rngs):
        self.first = self.second = Block(rngs)

    def __call__(self, x):
        return self.second(self.first(x))


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.dropout = nnx.Linear(3, 7, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


def stack(rngs):
    return nnx.vmap(Block)(rngs.split(3))


def in_depth(model, x):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, model)


def over_data(model, xs):
    return nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, xs)


def keyed(model, x, key):
    return nnx.Dropout(0.5, deterministic=False)(model(x), rngs=nnx.Rngs(dropout=key))


def nnx_attention(rngs):
    return nnx.MultiHeadAttention(2, 6, decode=False, normalize_qk=True, use_bias=False, rngs=rngs)


def spectral(rngs):
    return nnx.SpectralNorm(nnx.Linear(3, 7, rngs=rngs), param_dtype=jnp.float64, rngs=rngs)


def adapted(rngs):
    return nnx.LoRA(3, 2, 7, base_module=nnx.Linear(3, 7, rngs=rngs), rngs=rngs)


NNX = (
    of_nnx("nnx: Linear", lambda r: nnx.Linear(3, 7, rngs=r), (3,), quick=True),
    of_nnx("nnx: LinearGeneral", lambda r: nnx.LinearGeneral((5, 3), (2, 7), axis=(-2, -1), rngs=r), (5, 3)),
    of_nnx("nnx: Einsum", lambda r: nnx.Einsum("td,hdo->tho", (2, 3, 7), (2, 7), rngs=r), (5, 3)),
    of_nnx("nnx: LoRA", adapted, (3,)),
    of_nnx("nnx: LoRALinear", lambda r: nnx.LoRALinear(3, 7, lora_rank=2, rngs=r), (3,)),
    of_nnx("nnx: attention, qk norm", nnx_attention, (5, 6), tolerance=1e-6),
    of_nnx("nnx: Conv", lambda r: nnx.Conv(3, 7, (3,), rngs=r), (11, 3)),
    of_nnx("nnx: ConvTranspose", lambda r: nnx.ConvTranspose(3, 7, (3,), strides=2, rngs=r), (5, 3)),
    of_nnx("nnx: Embed", lambda r: nnx.Embed(7, 3, rngs=r), below(7, 5), tolerance=1e-6),
    of_nnx("nnx: Embed, attend", Tied, below(7, 5), tolerance=1e-6),
    of_nnx("nnx: LayerNorm", lambda r: nnx.LayerNorm(7, rngs=r), (5, 7)),
    of_nnx("nnx: BatchNorm, in use", lambda r: nnx.BatchNorm(7, use_running_average=True, rngs=r), (5, 7)),
    of_nnx("nnx: SpectralNorm", spectral, (3,)),
    of_nnx("nnx: WeightNorm", lambda r: nnx.WeightNorm(nnx.Linear(3, 7, rngs=r), rngs=r), (3,)),
    of_nnx("nnx: LSTM", lambda r: nnx.RNN(nnx.LSTMCell(3, 7, param_dtype=jnp.float64, rngs=r), rngs=r), (5, 3)),
    of_nnx("nnx: GRU", lambda r: nnx.RNN(nnx.GRUCell(3, 7, param_dtype=jnp.float64, rngs=r), rngs=r), (5, 3)),
    of_nnx("nnx: a module twice", Twice, (3,)),
    of_nnx("nnx: scan", stack, (3,), call=in_depth, quick=True),
    of_nnx("nnx: vmap", Block, (2, 3), call=over_data),
    of_nnx("nnx: remat", Block, (3,), call=lambda model, x: nnx.remat(lambda model, x: model(x))(model, x)),
    of_nnx("nnx: jit", Block, (3,), call=lambda model, x: nnx.jit(lambda model, x: model(x))(model, x)),
    of_nnx("nnx: Dropout, keys", lambda r: nnx.Linear(3, 7, rngs=r), (3,), keys, call=keyed),
    of_nnx("nnx: Dropout, its own stream", Noisy, (3,)),
    of_nnx("nnx: Dropout, not copied", Noisy, (3,), copy=False, refused=("copy",)),
    case("nnx: functional", lambda p, x: energy(nnx.softplus(x @ p["w"])), {"w": (3, 7)}, (3,)),
)

CASES = LINEN + NNX
