"""What users of JAX would pick instead: the formula as one writes it, or Flax NNX and Equinox, all by jax.vjp."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.cases import image, normal, whole

PLAIN, NNX, EQUINOX = "plain JAX", "Flax NNX", "Equinox"
NEEDS = {PLAIN: "jax", NNX: "flax", EQUINOX: "equinox"}
Peer = tuple[Callable[..., Any], tuple[Any, ...]]


def installed(peer: str) -> bool:
    """True if the package of a peer is there."""
    return importlib.util.find_spec(NEEDS[peer]) is not None


def vjp_of(apply: Callable, params: Any, x: Any) -> Peer:
    """y, gradients and dx of apply(params, x), for a normal dy; x of whole numbers has no dx."""
    y = jax.eval_shape(apply, params, x)

    def run(params, x, dy):
        if jnp.issubdtype(x.dtype, jnp.integer):
            y, pull = jax.vjp(lambda params: apply(params, x), params)
        else:
            y, pull = jax.vjp(apply, params, x)
        return y, pull(dy)

    return run, (params, x, normal(*y.shape, seed=1))


def nnx(make: Callable[[Any, Any], Any], x: Any) -> Peer:
    """A module of Flax NNX. make: (nnx, rngs) -> module."""
    from flax import nnx  # pyright: ignore[reportMissingImports]

    graph, params, rest = nnx.split(make(nnx, nnx.Rngs(0)), nnx.Param, ...)
    return vjp_of(lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), params, x)


def eqx(make: Callable[[Any, Any], Any], x: Any, each: int = 1, call: Callable | None = None) -> Peer:
    """A module of Equinox, mapped over the first axes of x. make: (eqx, key) -> module; call: (module, x) -> y."""
    import equinox  # pyright: ignore[reportMissingImports]

    params, static = equinox.partition(make(equinox, jax.random.key(0)), equinox.is_inexact_array)

    def apply(params, x):
        run: Callable = equinox.combine(params, static)
        run = run if call is None else partial(call, run)
        for _ in range(each):
            run = jax.vmap(run)
        return run(x)

    return vjp_of(apply, params, x)


def causal(nnx: Any, rngs: Any, heads: int, width: int) -> Callable:
    """Causal attention of Flax NNX."""
    attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

    class Causal(nnx.Module):
        def __init__(self):
            self.attention = attention

        def __call__(self, x):
            return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))

    return Causal()


def attended(module: Any, x: Any) -> Any:
    """Causal attention of Equinox."""
    return module(x, x, x, jnp.tril(jnp.ones((len(x), len(x)), bool)))


def turned(state: Callable[[Any], Any], of: Callable[[Any], Any]) -> Callable:
    """A cell of Equinox over a sequence."""

    def call(cell, x):
        def turn(h, x):
            h = cell(x, h)
            return h, of(h)

        return jax.lax.scan(turn, state(jnp.zeros(cell.hidden_size)), x)[1]

    return call


def by_hand(apply: Callable, x: Any, **shapes: tuple[int, ...]) -> Peer:
    """A formula in plain JAX. apply: (params, x) -> y."""
    params = {name: 0.05 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return vjp_of(apply, params, x)


def softmax_attention(heads: int) -> Callable:
    """Causal attention, softmax(q k^T / sqrt d) v of all queries at once."""

    def apply(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], heads, -1) for name in ("Q", "K", "V"))
        s = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(q.shape[-1])
        s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
        o = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, -1), v)
        return o.reshape(x.shape) @ p["O"]

    return apply


def attention_by_hand(heads: int, *shape: int) -> Peer:
    """Causal attention in plain JAX."""
    square = (shape[-1], shape[-1])
    return by_hand(softmax_attention(heads), normal(*shape), Q=square, K=square, V=square, O=square)


def lstm_turn(p: Any, hs: Any, x: Any) -> tuple[Any, Any]:
    """One position of an LSTM."""
    h, s = hs
    i, f, g, o = jnp.split(x @ p["W"] + h @ p["U"] + p["b"], 4, -1)
    s = jax.nn.sigmoid(f) * s + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(s)
    return (h, s), h


def gru_turn(p: Any, h: Any, x: Any) -> tuple[Any, Any]:
    """One position of a GRU."""
    (a_r, a_z, a_k), (e_r, e_z, e_k) = (jnp.split(e, 3, -1) for e in (x @ p["W"] + p["b"], h @ p["U"] + p["c"]))
    z, k = jax.nn.sigmoid(a_z + e_z), jnp.tanh(a_k + jax.nn.sigmoid(a_r + e_r) * e_k)
    h = (1 - z) * k + z * h
    return h, h


def recurrent_by_hand(turn: Callable, start: Callable, gates: int) -> Peer:
    """A recurrent cell of 256 units in plain JAX: lax.scan over the positions."""

    def apply(p, x):
        h = jnp.zeros((x.shape[0], 256))
        return jax.lax.scan(lambda h, x: turn(p, h, x), start(h), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    width = 256 * gates
    return by_hand(apply, normal(*SEQUENCE), W=(128, width), U=(256, width), b=(width,), c=(width,))


def transposed_by_hand() -> Peer:
    """A transposed convolution in plain JAX."""

    def apply(p, x):
        return jax.lax.conv_transpose(x, p["W"], (8,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")) + p["b"]

    return by_hand(apply, normal(4, 1000, 64), W=(16, 64, 64), b=(64,))


LSTM_OF = turned(lambda zero: (zero, zero), lambda h: h[0])
GRU_OF = turned(lambda zero: zero, lambda h: h)
SEQUENCE = (32, 128, 128)

PEERS: dict[str, dict[str, Callable[[], Peer]]] = {
    "dense 1024, (512, 784)": {
        NNX: lambda: nnx(lambda m, rngs: m.Linear(784, 1024, rngs=rngs), normal(512, 784)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.Linear(784, 1024, key=key), normal(512, 784)),
    },
    "conv 32 3x3, (64, 28, 28, 1)": {
        NNX: lambda: nnx(lambda m, rngs: m.Conv(1, 32, (3, 3), rngs=rngs), image(28, 28, 1)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.Conv2d(1, 32, 3, padding=1, key=key), image(1, 28, 28)),
    },
    "conv 64 3x3, (64, 14, 14, 32)": {
        NNX: lambda: nnx(lambda m, rngs: m.Conv(32, 64, (3, 3), rngs=rngs), image(14, 14, 32)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.Conv2d(32, 64, 3, padding=1, key=key), image(32, 14, 14)),
    },
    "conv_transpose 64, 16, stride 8, (4, 1000, 64)": {
        PLAIN: transposed_by_hand,
        NNX: lambda: nnx(lambda m, rngs: m.ConvTranspose(64, 64, (16,), strides=8, rngs=rngs), normal(4, 1000, 64)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.ConvTranspose1d(64, 64, 16, 8, key=key), normal(4, 64, 1000)),
    },
    "max_pool 2x2, (64, 28, 28, 32)": {
        NNX: lambda: nnx(lambda m, rngs: Pool(m, 2, 2), image(28, 28, 32)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.MaxPool2d(2, 2), image(32, 28, 28)),
    },
    "max_pool 3x3, stride 2": {
        NNX: lambda: nnx(lambda m, rngs: Pool(m, 3, 2), image(28, 28, 32)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.MaxPool2d(3, 2), image(32, 28, 28)),
    },
    "layer_norm, (4096, 512)": {
        NNX: lambda: nnx(lambda m, rngs: m.LayerNorm(512, rngs=rngs), normal(4096, 512)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.LayerNorm(512), normal(4096, 512)),
    },
    "rms_norm, (4096, 512)": {
        NNX: lambda: nnx(lambda m, rngs: m.RMSNorm(512, rngs=rngs), normal(4096, 512)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.RMSNorm(512), normal(4096, 512)),
    },
    "group_norm 8, (64, 14, 14, 64)": {
        NNX: lambda: nnx(lambda m, rngs: m.GroupNorm(64, 8, rngs=rngs), image(14, 14, 64)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.GroupNorm(8, 64), image(64, 14, 14)),
    },
    "batch_norm, (64, 14, 14, 64)": {
        NNX: lambda: nnx(lambda m, rngs: m.BatchNorm(64, rngs=rngs), image(14, 14, 64)),
    },
    "embedding 16384 x 256, (8, 256)": {
        NNX: lambda: nnx(lambda m, rngs: m.Embed(16384, 256, rngs=rngs), whole(16384, 8, 256)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.Embedding(16384, 256, key=key), whole(16384, 8, 256), 2),
    },
    "attention, 8 heads, causal, (1, 2048, 512)": {
        PLAIN: lambda: attention_by_hand(8, 1, 2048, 512),
        NNX: lambda: nnx(lambda m, rngs: causal(m, rngs, 8, 512), normal(1, 2048, 512)),
        EQUINOX: lambda: eqx(
            lambda m, key: m.nn.MultiheadAttention(8, 512, key=key), normal(1, 2048, 512), call=attended
        ),
    },
    "attention, 6 heads, causal, (12, 256, 384)": {
        PLAIN: lambda: attention_by_hand(6, 12, 256, 384),
        NNX: lambda: nnx(lambda m, rngs: causal(m, rngs, 6, 384), normal(12, 256, 384)),
        EQUINOX: lambda: eqx(
            lambda m, key: m.nn.MultiheadAttention(6, 384, key=key), normal(12, 256, 384), call=attended
        ),
    },
    "LSTM 256, (32, 128, 128)": {
        PLAIN: lambda: recurrent_by_hand(lstm_turn, lambda h: (h, h), 4),
        NNX: lambda: nnx(lambda m, rngs: m.RNN(m.OptimizedLSTMCell(128, 256, rngs=rngs), rngs=rngs), normal(*SEQUENCE)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.LSTMCell(128, 256, key=key), normal(*SEQUENCE), call=LSTM_OF),
    },
    "GRU 256, (32, 128, 128)": {
        PLAIN: lambda: recurrent_by_hand(gru_turn, lambda h: h, 3),
        NNX: lambda: nnx(lambda m, rngs: m.RNN(m.GRUCell(128, 256, rngs=rngs), rngs=rngs), normal(*SEQUENCE)),
        EQUINOX: lambda: eqx(lambda m, key: m.nn.GRUCell(128, 256, key=key), normal(*SEQUENCE), call=GRU_OF),
    },
}


def Pool(nnx: Any, window: int, stride: int) -> Any:
    """Max pooling as a module of Flax NNX."""

    class Pooled(nnx.Module):
        def __call__(self, x):
            return nnx.max_pool(x, (window, window), (stride, stride))

    return Pooled()
