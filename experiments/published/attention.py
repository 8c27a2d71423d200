"""Attention by the backwards of FlashAttention: what of the softmax is saved, and how p comes back from it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.published.entry import Entry, normal, with_backward

FLASH = "Dao et al. 2022, FlashAttention, arXiv:2205.14135, appendix B"
FLASH_2 = "Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2"

QKV = normal(10, (5, 7), (11, 7), (11, 3))
LARGE = (QKV[0] * np.float32(50), QKV[1] * np.float32(50), QKV[2])
ORDINARY = {"probes": ("given", "another", "nearby", "zeros", "ties")}  # large scores have an entry of their own
MASK = np.tril(np.ones((5, 11), bool), 6)
MASK[2] = False  # one query may see nothing


def scores(q: jax.Array, k: jax.Array):
    """S = q k^T / sqrt(d)."""
    return q @ k.T / q.shape[-1] ** 0.5


def attention(q: jax.Array, k: jax.Array, v: jax.Array):
    """o = softmax(q k^T / sqrt(d)) v."""
    return jax.nn.softmax(scores(q, k)) @ v


def from_p(q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, p: jax.Array, do: jax.Array, tau: float):
    """dv = p^T do, dp = do v^T, D = rowsum(do o), ds = p (dp - D), dq = tau ds k, dk = tau ds^T q."""
    D = jnp.sum(do * o, -1, keepdims=True)
    ds = p * (do @ v.T - D)
    return tau * ds @ k, tau * ds.T @ q, p.T @ do


def attention_saves_max_and_sum(q: jax.Array, k: jax.Array, v: jax.Array):
    """o, with the maximum m and the sum l of each row saved."""
    s = scores(q, k)
    m = jnp.max(s, -1, keepdims=True)
    total = jnp.sum(jnp.exp(s - m), -1, keepdims=True)
    o = attention(q, k, v)
    return o, (q, k, v, o, m, total)


def flash_backward(res: tuple, do: jax.Array):
    """p = e^(s - m) / l anew."""
    q, k, v, o, m, total = res
    return from_p(q, k, v, o, jnp.exp(scores(q, k) - m) / total, do, q.shape[-1] ** -0.5)


def attention_saves_log_sum(q: jax.Array, k: jax.Array, v: jax.Array):
    """o, with L = log sum e^s of each row saved."""
    o = attention(q, k, v)
    return o, (q, k, v, o, jax.nn.logsumexp(scores(q, k), axis=-1, keepdims=True))


def flash_2_backward(res: tuple, do: jax.Array):
    """p = e^(s - L) anew."""
    q, k, v, o, L = res
    return from_p(q, k, v, o, jnp.exp(scores(q, k) - L), do, q.shape[-1] ** -0.5)


def flash_2_to_the_letter(res: tuple, do: jax.Array):
    """The algorithm as it is printed, where s = q k^T: dq and dk have no 1 / sqrt(d)."""
    q, k, v, o, L = res
    return from_p(q, k, v, o, jnp.exp(scores(q, k) - L), do, 1.0)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array):
    """Attention to the keys that mask allows; 0 for a query that may see none."""
    s = jnp.where(mask, scores(q, k), -jnp.inf)
    some = mask.any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, s, 0)) @ v, 0)


def masked_backward(empty: float):
    """p = e^(s - L), L = log sum e^s; empty: what L is of a row with no key, where the sum is 0."""

    def backward(args, do):
        q, k, v, mask = args
        s = jnp.where(mask, scores(q, k), -jnp.inf)
        L = jnp.where(mask.any(-1, keepdims=True), jax.nn.logsumexp(s, axis=-1, keepdims=True), empty)
        p = jnp.exp(s - L)
        return *from_p(q, k, v, p @ v, p, do, q.shape[-1] ** -0.5), None

    return backward


def repeated(f: Callable):
    """f with every key twice, as tokens that come twice have them: the two share a row's weight evenly."""

    def attend(q, k, v):
        return f(q, jnp.concatenate((k, k)), jnp.concatenate((v, v)))

    return attend


flash = with_backward(attention, attention_saves_max_and_sum, flash_backward)
flash_2 = with_backward(attention, attention_saves_log_sum, flash_2_backward)


ENTRIES = (
    Entry("attention, p from m and l", FLASH, flash, QKV, reference=attention),
    Entry("attention, p from log-sum-exp", FLASH_2, flash_2, QKV, reference=attention, options=ORDINARY),
    Entry(
        "attention, log-sum-exp, scores in the thousands",
        FLASH_2,
        repeated(flash_2),
        LARGE,
        reference=repeated(attention),
        expected="precision",
        bfloat16="precision",
        remark="L itself is rounded to a part in 10,000 of p",
        mended="attention, m and l, scores in the thousands",
    ),
    Entry(
        "attention, m and l, scores in the thousands",
        FLASH,
        repeated(flash),
        LARGE,
        reference=repeated(attention),
    ),
    Entry(
        "attention, algorithm 2 to the letter",
        FLASH_2 + ", on scaled scores",
        with_backward(attention, attention_saves_log_sum, flash_2_to_the_letter),
        QKV,
        reference=attention,
        expected="formula",
        bfloat16="formula",
        right=False,
        options=ORDINARY,
        remark="the paper leaves the scale out",
        mended="attention, p from log-sum-exp",
    ),
    Entry(
        "masked attention, L = -inf",
        FLASH_2 + ", a row with no key",
        masked_attention,
        (*QKV, MASK),
        masked_backward(-jnp.inf),
        expected="nonfinite",
        bfloat16="nonfinite",
        right=False,
        remark="e^(-inf + inf)",
        mended="masked attention, L = +inf",
    ),
    Entry(
        "masked attention, L = +inf",
        "the published FlashAttention kernels",
        masked_attention,
        (*QKV, MASK),
        masked_backward(jnp.inf),
    ),
)
