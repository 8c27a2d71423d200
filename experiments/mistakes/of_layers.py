"""Norms, softmax, attention, recurrence, embeddings, convolution: as mistakes_nets has them, f, backward and a draw."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from experiments.mistakes.of_nets import draw, gaussian, labels

# --- softmax and the loss of a language model ---


def softmax(z: jax.Array):
    """p = softmax(z) along each row."""
    return jax.nn.softmax(z)


def softmax_backward(args: tuple, dp: jax.Array, mistake: str = ""):
    """dz = p (dp - sum p dp)"""
    p = jax.nn.softmax(*args)
    axis = 0 if mistake == "softmax backward along the wrong axis" else -1
    dz = p * (dp - jnp.sum(p * dp, axis, keepdims=True))
    if mistake == "softmax Jacobian, its diagonal alone":
        dz = p * (1 - p) * dp
    return (dz,)


SOFTMAX = softmax, softmax_backward, draw((7, 5))

SMOOTHING, Z_LOSS, IGNORED = 0.1, 1e-4, -1


def token_loss(z: jax.Array, y: jax.Array):
    """Cross-entropy with labels smoothed by 0.1 and a z-loss of 1e-4, the mean over rows with a label."""
    lse = jax.nn.logsumexp(z, -1)
    picked = jnp.take_along_axis(z, jnp.maximum(y, 0)[:, None], -1)[:, 0]
    loss = lse - (1 - SMOOTHING) * picked - SMOOTHING * z.mean(-1) + Z_LOSS * lse**2
    valid = y != IGNORED
    return jnp.sum(jnp.where(valid, loss, 0)) / jnp.maximum(valid.sum(), 1)


def token_loss_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dz = (p - target + 2e-4 lse p) / n_valid, 0 in rows without a label"""
    z, y = args
    p, lse = jax.nn.softmax(z), jax.nn.logsumexp(z, -1, keepdims=True)
    valid = (y != IGNORED)[:, None]
    hot = jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)
    target = hot if mistake == "label smoothing ignored" else (1 - SMOOTHING) * hot + SMOOTHING / z.shape[1]
    dz = p - target
    if mistake != "z-loss omitted":
        dz = dz + 2 * Z_LOSS * lse * p
    n = len(z) if mistake == "divided by all rows, not the valid" else jnp.maximum(valid.sum(), 1)
    if mistake == "ignored rows not masked":
        valid = jnp.ones_like(valid)
    return dJ * jnp.where(valid, dz, 0) / n, None


def draw_token_loss(rng: np.random.Generator):
    """Logits and labels, three of them -1."""
    y = labels(rng, 17, 13)
    y[rng.permutation(13)[:3]] = IGNORED
    return gaussian(rng, 13, 17), y


TOKEN_LOSS = token_loss, token_loss_backward, draw_token_loss


# --- norms ---

EPSILON = 1e-5


def layernorm(x: jax.Array, gamma: jax.Array, beta: jax.Array):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + 1e-5) over each row."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return gamma * (x - mean) / jnp.sqrt(var + EPSILON) + beta


def layernorm_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = (g - mean g - xhat mean(g xhat)) / sqrt(var + 1e-5), g = gamma dy"""
    x, gamma, _ = args
    n = x.shape[-1] - (mistake == "N - 1 for N, width 1021")
    epsilon = 0 if mistake == "epsilon of the layernorm omitted" else EPSILON
    rstd = 1 / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
    xhat = (x - x.mean(-1, keepdims=True)) * rstd
    g = gamma * dy
    mean_g, mean_gx = (jnp.sum(a, -1, keepdims=True) / n for a in (g, g * xhat))
    if mistake == "mean term of the layernorm left out":
        mean_g = 0
    if mistake == "xhat term of the layernorm left out":
        mean_gx = 0
    return (g - mean_g - xhat * mean_gx) * rstd, jnp.sum(dy * xhat, 0), dy.sum(0)


LAYERNORM = layernorm, layernorm_backward, draw((7, 11), (11,), (11,))
WIDE_LAYERNORM = layernorm, layernorm_backward, draw((7, 1021), (1021,), (1021,))


def batchnorm(x: jax.Array, gamma: jax.Array, beta: jax.Array):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + 1e-5) over the batch."""
    return gamma * (x - x.mean(0)) / jnp.sqrt(x.var(0) + EPSILON) + beta


def batchnorm_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = gamma (dy - mean dy - xhat mean(dy xhat)) / sqrt(var + 1e-5)"""
    x, gamma, _ = args
    rstd = 1 / jnp.sqrt(x.var(0) + EPSILON)
    xhat = (x - x.mean(0)) * rstd
    dx = gamma * rstd * (dy - dy.mean(0) - xhat * (dy * xhat).mean(0))
    dgamma = jnp.sum(dy * xhat, 0)
    if mistake == "batch statistics held constant":
        dx = gamma * rstd * dy
    if mistake == "dgamma from x, not xhat":
        dgamma = jnp.sum(dy * x, 0)
    return dx, dgamma, dy.sum(0)


BATCHNORM = batchnorm, batchnorm_backward, draw((13, 5), (5,), (5,))


# --- attention ---


def attention_weights(q: jax.Array, k: jax.Array):
    """Causal softmax(q k^T / sqrt(d)): heads (kv, group), each group of queries shares a head of keys."""
    s = jnp.einsum("tkgd,skd->kgts", q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(jnp.tri(len(q), dtype=bool), s, -jnp.inf))


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array):
    """o = softmax(q k^T / sqrt(d)) v, causal, with fewer heads of keys than of queries."""
    return jnp.einsum("kgts,skd->tkgd", attention_weights(q, k), v)


def grouped_attention_backward(args: tuple, do: jax.Array, mistake: str = ""):
    """ds = p (dp - sum p dp)      dq = ds k / sqrt(d)      dk = sum over the group of ds^T q / sqrt(d)"""
    q, k, v = args
    p = attention_weights(q, k)
    dp = jnp.einsum("tkgd,skd->kgts", do, v)
    ds = p * (dp - jnp.sum(p * dp, -1, keepdims=True))
    scale = {"1/sqrt(d) left out": 0, "1/sqrt(d) taken twice": 2}.get(mistake, 1)
    ds = ds * q.shape[-1] ** (-scale / 2)
    dk, dv = jnp.einsum("kgts,tkgd->gskd", ds, q), jnp.einsum("kgts,tkgd->gskd", p, do)
    if mistake == "mean over the heads of a group":
        return jnp.einsum("kgts,skd->tkgd", ds, k), dk.mean(0), dv.mean(0)
    if mistake == "one head of a group alone":
        return jnp.einsum("kgts,skd->tkgd", ds, k), dk[0], dv[0]
    return jnp.einsum("kgts,skd->tkgd", ds, k), dk.sum(0), dv.sum(0)


GROUPED_ATTENTION = grouped_attention, grouped_attention_backward, draw((11, 2, 3, 7), (11, 2, 7), (11, 2, 7))


def masked_weights(q: jax.Array, k: jax.Array, mask: jax.Array):
    """softmax(q k^T / sqrt(d) where mask); a row that is masked throughout is 0."""
    alive = mask.any(-1, keepdims=True)
    s = jnp.where(mask | ~alive, q @ k.T / math.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.where(alive, jax.nn.softmax(s), 0)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array):
    """o = masked_weights v."""
    return masked_weights(q, k, mask) @ v


def masked_attention_backward(args: tuple, do: jax.Array, mistake: str = ""):
    """ds = p (dp - sum p dp) with p computed again      dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)"""
    q, k, v, mask = args
    p = masked_weights(q, k, mask)
    if mistake == "softmax of a row fully masked":
        p = jax.nn.softmax(jnp.where(mask, q @ k.T / math.sqrt(q.shape[-1]), -jnp.inf))
    dp = do @ v.T
    ds = p * (dp - jnp.sum(p * dp, -1, keepdims=True)) / math.sqrt(q.shape[-1])
    return ds @ k, ds.T @ q, p.T @ do, None


def draw_masked_attention(rng: np.random.Generator):
    """A row of the mask all False, one all True."""
    mask = rng.random((5, 11)) < 0.7
    mask[2], mask[3] = False, True
    return *draw((5, 7), (11, 7), (11, 3))(rng), mask


MASKED_ATTENTION = masked_attention, masked_attention_backward, draw_masked_attention


def rotate(x: jax.Array, sign: float = 1):
    """Each pair (x_i, x_{i + d/2}) of position t turned by sign t / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(len(x))[:, None, None] * 10000.0 ** -(jnp.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), sign * jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rope(x: jax.Array):
    """Rotary positions of (length, heads, d)."""
    return rotate(x)


def rope_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = dy turned back"""
    return (rotate(dy, 1 if mistake == "turned on, not back" else -1),)


ROPE = rope, rope_backward, draw((11, 3, 14))


def dropout(x: jax.Array, key: jax.Array):
    """y = x mask / 0.7, of 0.3 dropped."""
    return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, 0)


def dropout_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = dy mask / 0.7"""
    x, key = args
    if mistake == "a fresh mask":
        key = jax.random.fold_in(key, 1)
    dx = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), dy / 0.7, 0)
    if mistake == "1/(1 - p) left out":
        dx = dx * 0.7
    return dx, None


DROPOUT = dropout, dropout_backward, lambda rng: (gaussian(rng, 7, 11), jax.random.key(int(rng.integers(1 << 31))))


# --- sequences and tokens ---


def rnn(x: jax.Array, h0: jax.Array, Wx: jax.Array, Wh: jax.Array, b: jax.Array):
    """h_t = tanh(x_t Wx^T + h_{t-1} Wh^T + b), all of them; x (length, batch, features)."""

    def step(h, x_t):
        h = jnp.tanh(x_t @ Wx.T + h @ Wh.T + b)
        return h, h

    return lax.scan(step, h0, x)[1]


def rnn_backward(args: tuple, dhs: jax.Array, mistake: str = ""):
    """dz_t = (dh_t + dz_{t+1} Wh) (1 - h_t^2), from the last step to the first"""
    x, h0, Wx, Wh, _ = args
    hs = rnn(*args)
    before = jnp.concatenate([h0[None], hs[:-1]])
    going = jnp.ones(len(x), x.dtype)
    if mistake == "backpropagation through time cut midway":
        going = going.at[len(x) // 2].set(0)

    def step(dh, now):
        dh_t, h_t, goes = now
        dz = (dh * goes + dh_t) * (1 - h_t**2)
        return dz @ Wh, dz

    dh0, dz = lax.scan(step, jnp.zeros_like(h0), (dhs, hs, going), reverse=True)
    dx = dz @ Wx
    if mistake == "time loop ends a step early":
        dz = dz.at[0].set(0)
    if mistake == "dh0 zero":
        dh0 = jnp.zeros_like(h0)
    if mistake == "dWh from h_t, not h_{t-1}":
        before = hs
    return dx, dh0, jnp.einsum("tmi,tmj->ij", dz, x), jnp.einsum("tmi,tmj->ij", dz, before), dz.sum((0, 1))


RNN = rnn, rnn_backward, draw((11, 3, 5), (3, 7), (7, 5), (7, 7), (7,))


def embedding(E: jax.Array, tokens: jax.Array):
    """y = E[tokens]."""
    return E[tokens]


def embedding_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dE[token] = the sum of dy where it stands"""
    E, tokens = args
    at = jnp.zeros_like(E).at[tokens]
    return at.set(dy) if mistake == "scattered by set, not add" else at.add(dy), None


EMBEDDING = embedding, embedding_backward, lambda rng: (gaussian(rng, 13, 5), labels(rng, 13, 3, 11))


def tied(E: jax.Array, W: jax.Array, tokens: jax.Array):
    """logits = tanh(E[tokens] W^T) E^T: the embedding is the unembedding too."""
    return jnp.tanh(E[tokens] @ W.T) @ E.T


def tied_backward(args: tuple, dz: jax.Array, mistake: str = ""):
    """dE of both uses"""
    E, W, tokens = args
    x = E[tokens]
    h = jnp.tanh(x @ W.T)
    du = dz @ E * (1 - h**2)
    dE = dz.T @ h
    if mistake != "gradient of one of two tied uses":
        dE = dE.at[tokens].add(du @ W)
    return dE, du.T @ x, None


TIED = tied, tied_backward, lambda rng: (*draw((13, 5), (5, 5))(rng), labels(rng, 13, 11))


# --- images ---

IMAGES, KERNEL = "NHWC", "HWIO"


def conv(x: jax.Array, K: jax.Array):
    """y = x * K, a cross-correlation without padding."""
    return lax.conv_general_dilated(x, K, (1, 1), "VALID", dimension_numbers=(IMAGES, KERNEL, IMAGES))


def conv_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = dy, padded, * K flipped, with its channels swapped      dK = x * dy over the batch"""
    x, K = args
    flipped = K if mistake == "kernel not flipped" else K[::-1, ::-1]
    around = [(n - 1, n - 1) for n in K.shape[:2]]
    back = flipped.swapaxes(2, 3)
    dx = lax.conv_general_dilated(dy, back, (1, 1), around, dimension_numbers=(IMAGES, KERNEL, IMAGES))
    dK = lax.conv_general_dilated(x, dy, (1, 1), "VALID", dimension_numbers=("CHWN", "IHWO", "HWNC"))
    return dx, dK


CONV = conv, conv_backward, draw((2, 7, 11, 3), (3, 2, 3, 5))


def max_pool(x: jax.Array):
    """The largest of every two along the length; x (batch, length, channels)."""
    return x.reshape(len(x), -1, 2, x.shape[-1]).max(2)


def max_pool_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dy in equal parts to all that are largest"""
    (x,) = args
    pairs = x.reshape(len(x), -1, 2, x.shape[-1])
    largest = (pairs == pairs.max(2, keepdims=True)).astype(x.dtype)
    ties = largest.sum(2, keepdims=True)
    share = largest / ties
    if mistake == "a tie goes to its first":
        share = largest * (jnp.cumsum(largest, 2) == 1)
    if mistake == "a tie is multiplied, not shared":
        share = largest * ties
    return ((dy[:, :, None] * share).reshape(x.shape),)


MAX_POOL = max_pool, max_pool_backward, lambda rng: (np.round(gaussian(rng, 3, 14, 5)),)


# --- devices ---


def mesh():
    """Up to four devices in a row."""
    devices = jax.devices()[:4]
    return jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


ROWS, ALL = PartitionSpec("batch"), PartitionSpec()


def sharded(x: jax.Array, W: jax.Array):
    """a = tanh(x W^T), the batch spread over the devices."""
    return jax.shard_map(lambda x, W: jnp.tanh(x @ W.T), mesh=mesh(), in_specs=(ROWS, ALL), out_specs=ROWS)(x, W)


def sharded_backward(args: tuple, da: jax.Array, mistake: str = ""):
    """dW = the sum over devices of dz^T x"""

    x, W = args

    def local(x, W, da):
        dz = da * (1 - jnp.tanh(x @ W.T) ** 2)
        dW = dz.T @ x
        return dz @ W, dW if mistake == "psum of dW forgotten" else lax.psum(dW, "batch")

    specs = {"in_specs": (ROWS, ALL, ROWS), "out_specs": (ROWS, ALL)}
    return jax.shard_map(local, mesh=mesh(), check_vma=False, **specs)(x, W, da)


SHARDED = sharded, sharded_backward, draw((12, 7), (5, 7))
