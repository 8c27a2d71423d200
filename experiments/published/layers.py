"""Recurrence, activations, embeddings and rotations, by the backwards of papers, courses and kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.published.entry import Entry, integers, normal

COURSE = "as in CS231n, course notes and assignments"
COURSERA = "Ng, Neural Networks and Deep Learning, week 4"
GREFF = "Greff et al. 2017, arXiv:1503.04069, section II"
HOCHREITER = "Hochreiter & Schmidhuber 1997, its truncated backward"
HENDRYCKS = "Hendrycks & Gimpel 2016, arXiv:1606.08415"
SHAZEER = "Shazeer 2020, arXiv:2002.05202"
ROFORMER = "Su et al. 2021, RoFormer, arXiv:2104.09864"

# --- LSTM ---

LSTM = normal(11, (3, 5), (3, 7), (3, 7), (5, 28), (7, 28), (28,), scale=0.7)
PEEPHOLE = (*normal(12, (3, 5), (3, 7), (3, 7), (5, 28), (7, 28), (28,), scale=0.7), *normal(13, (3, 7)))


def gates(a: jax.Array):
    """i, f, g, o of the sums a."""
    i, f, g, o = jnp.split(a, 4, -1)
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def lstm(x: jax.Array, h: jax.Array, c: jax.Array, W: jax.Array, R: jax.Array, b: jax.Array):
    """One step: c' = f c + i g, h' = o tanh c'."""
    i, f, g, o = gates(x @ W + h @ R + b)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def lstm_backward(truncated: bool = False):
    """do, then dc' = dc + dh o (1 - tanh^2), then all four gates; truncated: no error leaves the cell through them."""

    def backward(args, dy):
        x, h, c, W, R, b = args
        dh, dc = dy
        i, f, g, o = gates(x @ W + h @ R + b)
        t = jnp.tanh(f * c + i * g)
        dc = dc + dh * o * (1 - t**2)
        slopes = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * t * o * (1 - o))
        da = jnp.concatenate(slopes, -1)
        dh_before = jnp.zeros_like(h) if truncated else da @ R.T
        return da @ W.T, dh_before, dc * f, x.T @ da, h.T @ da, da.sum(0)

    return backward


def peephole_lstm(x: jax.Array, h: jax.Array, c: jax.Array, W: jax.Array, R: jax.Array, b: jax.Array, p: jax.Array):
    """One step of the LSTM whose gates see the cell: i and f the old one, o the new one."""
    i, f, g, o = jnp.split(x @ W + h @ R + b, 4, -1)
    c_next = jnp.tanh(g) * jax.nn.sigmoid(i + p[0] * c) + c * jax.nn.sigmoid(f + p[1] * c)
    return jnp.tanh(c_next) * jax.nn.sigmoid(o + p[2] * c_next), c_next


def peephole_backward(args: tuple, dy: jax.Array):
    """dc' = dh o (1 - tanh^2) + p_o do + dc, and dc = f dc' + p_i di + p_f df."""
    x, h, c, W, R, b, p = args
    dh, dc = dy
    i, f, g, o = jnp.split(x @ W + h @ R + b, 4, -1)
    i, f, g = jax.nn.sigmoid(i + p[0] * c), jax.nn.sigmoid(f + p[1] * c), jnp.tanh(g)
    c_next = g * i + c * f
    t, o = jnp.tanh(c_next), jax.nn.sigmoid(o + p[2] * c_next)
    do = dh * t * o * (1 - o)
    dc = dh * o * (1 - t**2) + p[2] * do + dc
    di, df, dg = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2)
    da = jnp.concatenate((di, df, dg, do), -1)
    dp = jnp.stack(((di * c).sum(0), (df * c).sum(0), (do * c_next).sum(0)))
    return da @ W.T, da @ R.T, f * dc + p[0] * di + p[1] * df, x.T @ da, h.T @ da, da.sum(0), dp


# --- dense, GELU, SwiGLU ---

DENSE = normal(14, (11, 5), (5, 3), (3,))
WIDE = normal(15, (11, 7))
SWIGLU = normal(16, (11, 5), (5, 7), (5, 7), (7, 3))


def dense(x: jax.Array, W: jax.Array, b: jax.Array):
    """z = x W + b."""
    return x @ W + b


def dense_backward(mean: bool):
    """dW = x^T dz, db = sum dz, dx = dz W^T; mean: dW and db over m."""

    def backward(args, dz):
        x, W, _ = args
        m = len(x) if mean else 1
        return dz @ W.T, x.T @ dz / m, dz.sum(0) / m

    return backward


ROOT = (2 / np.pi) ** 0.5
CUBE = 0.044715


def gelu(x: jax.Array):
    """y = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return 0.5 * x * (1 + jnp.tanh(ROOT * (x + CUBE * x**3)))


def gelu_by_sech(args: tuple, dy: jax.Array):
    """dx = dy ((1 + tanh u) / 2 + x u' / (2 cosh^2 u))."""
    (x,) = args
    u = ROOT * (x + CUBE * x**3)
    return (dy * (0.5 * (1 + jnp.tanh(u)) + 0.5 * x * ROOT * (1 + 3 * CUBE * x**2) / (jnp.cosh(u) * jnp.cosh(u))),)


def gelu_by_cdf(args: tuple, dy: jax.Array):
    """dx = dy (Phi(x) + x phi(x)): the slope of the exact form."""
    (x,) = args
    return (dy * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)) + x * jnp.exp(-(x**2) / 2) * (2 * np.pi) ** -0.5),)


def swiglu(x: jax.Array, W: jax.Array, V: jax.Array, W_2: jax.Array):
    """y = (silu(x W) x V) W_2."""
    return (jax.nn.silu(x @ W) * (x @ V)) @ W_2


def swiglu_backward(args: tuple, dy: jax.Array):
    """da = dh b s (1 + a (1 - s)) and db = dh a s, of h = silu(a) b, s = sigma(a)."""
    x, W, V, W_2 = args
    a, b = x @ W, x @ V
    s = jax.nn.sigmoid(a)
    dh = dy @ W_2.T
    da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s
    return da @ W.T + db @ V.T, x.T @ da, x.T @ db, (a * s * b).T @ dy


# --- embedding, rotary positions ---

TABLE, TOKENS = normal(17, (7, 3))[0], integers(18, 7, 2, 11)
HEADS, POSITIONS = normal(19, (5, 2, 6))[0], np.arange(5, dtype=np.int32)


def embedding(W: jax.Array, tokens: jax.Array):
    """y = W of the tokens."""
    return W[tokens]


def embedding_scatter(args: tuple, dy: jax.Array):
    """dW sums dy over every place where the token stands."""
    W, tokens = args
    return jnp.zeros_like(W).at[tokens].add(dy), None


def embedding_buffered(args: tuple, dy: jax.Array):
    """dW[tokens] += dy as NumPy has it: if a token comes twice, only the last one counts."""
    W, tokens = args
    dW = jnp.zeros_like(W)
    return dW.at[tokens].set(dW[tokens] + dy), None


def embedding_padded(args: tuple, dy: jax.Array):
    """No gradient for token 0, which pads."""
    return embedding_scatter(args, dy)[0].at[0].set(0), None


def turned(x: jax.Array, positions: jax.Array, sign: float = 1):
    """Halves of x turned by the angles of their positions."""
    half = x.shape[-1] // 2
    angle = sign * positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate((a * cos - b * sin, a * sin + b * cos), -1)


def turned_in_pairs(x: jax.Array, positions: jax.Array, sign: float = 1):
    """Neighbours in x turned by the angles of their positions."""
    mixed = jnp.concatenate((x[..., 0::2], x[..., 1::2]), -1)
    a, b = jnp.split(turned(mixed, positions, sign), 2, -1)
    return jnp.stack((a, b), -1).reshape(x.shape)


def rotary(x: jax.Array, positions: jax.Array):
    """y = R x in neighbouring pairs."""
    return turned_in_pairs(x, positions)


def rotary_halves(x: jax.Array, positions: jax.Array):
    """y = R x in halves."""
    return turned(x, positions)


ENTRIES = (
    Entry("LSTM step", COURSE + ", gates in PyTorch's order", lstm, LSTM, lstm_backward()),
    Entry(
        "LSTM step, truncated",
        HOCHREITER,
        lstm,
        LSTM,
        lstm_backward(truncated=True),
        expected="formula",
        bfloat16="formula",
        right=False,
        deliberate=True,
        remark="errors leave the cell only by its output",
    ),
    Entry("LSTM step with peepholes", GREFF, peephole_lstm, PEEPHOLE, peephole_backward),
    Entry(
        "dense, dW and db over m",
        COURSERA,
        dense,
        DENSE,
        dense_backward(mean=True),
        expected="formula",
        bfloat16="formula",
        right=False,
        remark="the course's dz is that of the summed loss",
        mended="dense",
    ),
    Entry("dense", "ours", dense, DENSE, dense_backward(mean=False)),
    Entry("GELU by 1 / cosh^2", "llm.c", gelu, WIDE, gelu_by_sech),
    Entry(
        "GELU, slope of the exact form",
        HENDRYCKS + ", on the tanh form",
        gelu,
        WIDE,
        gelu_by_cdf,
        expected="formula",
        bfloat16="formula",
        right=False,
        remark="off by a thousandth",
        mended="GELU by 1 / cosh^2",
    ),
    Entry("SwiGLU", SHAZEER, swiglu, SWIGLU, swiglu_backward),
    Entry("embedding, scatter-add", COURSE, embedding, (TABLE, TOKENS), embedding_scatter),
    Entry(
        "embedding, dW[tokens] += dy",
        "NumPy's +=, which course notes warn of",
        embedding,
        (TABLE, TOKENS),
        embedding_buffered,
        expected="formula",
        bfloat16="formula",
        right=False,
        mended="embedding, scatter-add",
    ),
    Entry(
        "embedding, no gradient for padding",
        "PyTorch's padding_idx",
        embedding,
        (TABLE, TOKENS),
        embedding_padded,
        expected="formula",
        bfloat16="formula",
        right=False,
        deliberate=True,
    ),
    Entry(
        "rotary positions, neighbours",
        ROFORMER,
        rotary,
        (HEADS, POSITIONS),
        lambda args, dy: (turned_in_pairs(dy, args[1], -1), None),
    ),
    Entry(
        "rotary positions, halves",
        "GPT-NeoX",
        rotary_halves,
        (HEADS, POSITIONS),
        lambda args, dy: (turned(dy, args[1], -1), None),
    ),
)
