"""Attention: every position a weighted mean of what others hold, the weights by how well they match."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fnbp.arrays.checks import check_floating, check_is, check_key, check_params, check_positive, check_size, describe
from fnbp.arrays.masks import check_mask, kept
from fnbp.arrays.placement import reshaped
from fnbp.arrays.sums import wide
from fnbp.factor import Outer, Sum
from fnbp.layer import Layer, Traits, counting
from fnbp.layers.initializers import check_numbers, initializer_of

__all__ = ["attention"]

Sequence = Float[Array, "m t n"]
Queries = Float[Array, "m t kv g d"]
Keys = Float[Array, "m s kv d"]
Weights = Float[Array, "m kv g t s"]
Seen = Bool[Array, "#m 1 1 #t s"]


def attention(
    heads: int,
    kv_heads: int | None = None,
    causal: bool = False,
    rotary: float | None = None,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
    W_out: str | Callable | None = None,
) -> Layer:
    """Multi-head attention: of a sequence to itself, or, given a pair (x, memory), to another.

        q = Q x + b_Q    k = K z    v = V z + b_V      z = x, or memory      (head by head)
        p = softmax(q k^T / sqrt d)      o = p v      y = O o + b_O
        do = O^T dy      dv = p^T do      dp = do v^T      ds = p (dp - sum_t dp p)
        dq = ds k / sqrt d      dk = ds^T q / sqrt d      dz = K^T dk + V^T dv      dx = Q^T dq, + dz where z = x
        dQ = dq x^T    dK = dk z^T    dV = dv z^T    dO = dy o^T      db: the sums of dq, dk, dv, dy

    The mask, Context.mask, is True where a position of z counts: (m, S), or (m, T, S) for each query its own. causal:
    none sees what comes after it. A query that sees nothing has p = 0, so o = 0 and no gradient. rotary: q and k
    turned, two numbers at a time, by their position times base^(-2 i / d); 10,000 is the base of the paper. kv_heads:
    so many heads of k and v, each for heads / kv_heads of q. A bias of k adds the same to all scores of a query, which
    softmax does not see: there is one, b_K, with rotary alone.

    Shapes:   x, y (m, T, n); memory (m, S, l); Q (n, n), K, V (kv_heads d, l), O (n, n), d = n / heads;
              saved x, z, q, k, v, o, and p (m, kv_heads, heads / kv_heads, T, S) in at least float32.
    Forward:  Vaswani et al. 2017, arXiv:1706.03762, section 3.2; rotary: Su et al. 2021, arXiv:2104.09864, section
              3.2.2; kv_heads: Ainslie et al. 2023, arXiv:2305.13245, section 2.2.
    Backward: Dao et al. 2022, arXiv:2205.14135, appendix B.2.
    Options:  W, b: an initializer by name (see fnbp.initializer) or a function; b=None: without. W_out: O's, if other.
    Raises:   ValueError for heads that do not divide n, kv_heads that do not divide heads, an odd d with rotary, a
              sequence of 0, a mask of another shape, params that do not fit; TypeError for x not in floating point.
    """
    kv = heads if kv_heads is None else kv_heads
    name = f"attention({heads})" if kv == heads else f"attention({heads}, {kv})"
    shapes = shapes_of(name, heads, kv, causal, rotary, "" if b is None else "QVO" if rotary is None else "QKVO")

    def forward(params: dict, state: dict, x: Any, ctx: Any) -> tuple[Sequence, dict, tuple]:
        due = shapes(x)
        check_params(name, params, x[0] if isinstance(x, tuple) else x, due)
        apart = () if isinstance(x, tuple) else None  # told by the structure of res, which no transformation touches
        x, z = check_pair(name, x, heads, rotary)
        seen, z = visible(x, z, ctx.mask, causal), of_use(z, ctx.mask)
        q, k, v = affine(params, "Q", x), affine(params, "K", z), affine(params, "V", z)
        q, k, v = turned(by_head(q, kv, heads // kv), rotary), turned(by_head(k, kv), rotary), by_head(v, kv)
        o, p = attend(q, k, v, seen)
        return affine(params, "O", merged(o)), state, (x, z, q, k, v, p, o, apart)

    def backward(params: dict, res: tuple, dy: Sequence) -> tuple[dict, Any]:
        x, z, q, k, v, p, o, apart = res
        do = reshaped(dy @ params["O"], *q.shape)
        dq, dk, dv = attend_back(q, k, v, p, do)
        dq, dk, dv = map(merged, (turned(dq, rotary, back=True), turned(dk, rotary, back=True), dv))
        factors = {"Q": Outer(dq, x), "K": Outer(dk, z), "V": Outer(dv, z), "O": Outer(dy, merged(o))}
        factors |= {leaf: Sum(factors[leaf[-1]].d) for leaf in params if leaf.startswith("b_")}
        dx, dz = dq @ params["Q"], dk @ params["K"] + dv @ params["V"]
        return factors, dx + dz if apart is None else (dx, dz)

    functions = counting(name, of_memory, forward, backward)
    return Layer(init_of(name, shapes, W, b, W_out), *functions, name, traits=Traits(of_memory))


def of_memory(name: str, x: Any, mask: Any) -> Any:
    """The rule of attention: of a pair (x, memory) the mask speaks of memory, and all positions of y count."""
    pair = x if isinstance(x, tuple) else (x, x)
    if mask is not None and all(len(getattr(a, "shape", ())) > 1 for a in pair):
        check_mask(name, mask, pair[-1].shape[:2], (*pair[0].shape[:2], pair[-1].shape[1]))
    return None if isinstance(x, tuple) else mask


def of_use(z: jax.Array, mask: jax.Array | None) -> jax.Array:
    """z, and 0 at positions that no query sees: there 0 times NaN would be NaN."""
    if mask is None:
        return z
    seen = mask.any(1) if mask.ndim == 3 else mask
    return kept(seen, z)


def shapes_of(name: str, heads: int, kv: int, causal: bool, rotary: float | None, biased: str) -> Callable:
    """x, or (x, memory) -> the shape of each parameter. ValueError or TypeError for options that fit no input."""
    check_options(name, heads, kv, causal, rotary)

    def shapes(x):
        x, z = check_pair(name, x, heads, rotary)
        n, d = x.shape[-1], x.shape[-1] // heads
        due = {"Q": (n, n), "K": (kv * d, z.shape[-1]), "V": (kv * d, z.shape[-1]), "O": (n, n)}
        return due | {f"b_{leaf}": due[leaf][:1] for leaf in biased}

    return shapes


def attend(q: Queries, k: Keys, v: Keys, seen: Seen | None) -> tuple[Queries, Weights]:
    """o and p. Where seen is False p is 0."""
    s = jnp.einsum("mtkgd,mskd->mkgts", wide(q), wide(k)) / np.sqrt(q.shape[-1])
    s = s if seen is None else jnp.where(seen, s, -jnp.inf)
    most = jnp.max(s, -1, keepdims=True)
    e = jnp.exp(s - jax.lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0)))  # a row of -inf: e = 0
    total = jnp.sum(e, -1, keepdims=True)
    p = e / jnp.where(total == 0, 1, total)
    return jnp.einsum("mkgts,mskd->mtkgd", p, wide(v)).astype(v.dtype), p


def attend_back(q: Queries, k: Keys, v: Keys, p: Weights, do: Queries) -> tuple[Queries, Keys, Keys]:
    """dq, dk, dv of do."""
    do = wide(do)
    dv = jnp.einsum("mkgts,mtkgd->mskd", p, do)
    dp = jnp.einsum("mtkgd,mskd->mkgts", do, wide(v))
    ds = p * (dp - jnp.sum(dp * p, -1, keepdims=True)) / np.sqrt(q.shape[-1])
    dq = jnp.einsum("mkgts,mskd->mtkgd", ds, wide(k))
    dk = jnp.einsum("mkgts,mtkgd->mskd", ds, wide(q))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def by_head(a: jax.Array, *heads: int) -> jax.Array:
    """The features of each head apart: (m, T, n) as (m, T, *heads, d)."""
    return reshaped(a, *a.shape[:2], *heads, a.shape[-1] // math.prod(heads))


def merged(a: jax.Array) -> jax.Array:
    """All heads side by side: (m, T, ...) as (m, T, n)."""
    return reshaped(a, *a.shape[:2], math.prod(a.shape[2:]))


def turned(a: jax.Array, base: float | None, back: bool = False) -> jax.Array:
    """Each pair of numbers (2i, 2i + 1) at position t turned by t base^(-2 i / d), or back. a is (m, T, ..., d)."""
    if base is None:
        return a
    d = a.shape[-1]
    angle = np.arange(a.shape[1])[:, None] * base ** -(np.arange(0, d, 2) / d)
    angle = angle.reshape(a.shape[1], *[1] * (a.ndim - 3), d // 2)
    cos, sin = (jnp.asarray(f(angle), wide(a).dtype) for f in (np.cos, np.sin))
    sin = -sin if back else sin
    even, odd = wide(a)[..., ::2], wide(a)[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return reshaped(pairs, *a.shape).astype(a.dtype)


def affine(params: dict, leaf: str, a: jax.Array) -> jax.Array:
    """W a + b, or W a where there is no b."""
    y = a @ params[leaf].T
    return y + params[f"b_{leaf}"] if f"b_{leaf}" in params else y


def visible(x: jax.Array, z: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array | None:
    """What each query sees, (m, 1, 1, T, S); None for all."""
    seen = jnp.tril(jnp.ones((x.shape[1], z.shape[1]), bool))[None] if causal else None
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[:, None]
        seen = mask if seen is None else seen & mask
    return None if seen is None else seen[:, None, None]


def check_options(name: str, heads: int, kv: int, causal: bool, rotary: float | None) -> None:
    """ValueError or TypeError for options that fit no input."""
    check_size(name, "heads", heads)
    check_size(name, "kv_heads", kv)
    check_is(name, "causal", causal, bool)
    if heads % kv:
        raise ValueError(f"{name}: heads must be a multiple of kv_heads, got {heads} heads for {kv}")
    if rotary is not None:
        check_positive(name, "rotary", rotary)


def check_pair(name: str, x: Any, heads: int, rotary: float | None) -> tuple[Any, Any]:
    """Where the queries come from, and where keys and values do; ValueError or TypeError for what fits no heads."""
    if isinstance(x, tuple) and len(x) != 2:
        raise ValueError(f"{name}: x, or (x, memory), is due; got a tuple of {len(x)}")
    x, z = x if isinstance(x, tuple) else (x, x)
    for what, a in (("x", x), ("memory", z)):
        check_floating(name, what, a)
        if len(a.shape) != 3 or not all(a.shape[1:]):
            raise ValueError(f"{name}: {what} must be (m, T, n) with T and n at least 1, got shape {tuple(a.shape)}")
    if x.shape[0] != z.shape[0] or x.dtype != z.dtype:
        raise ValueError(f"{name}: x and memory must be alike, got {describe(x)} and {describe(z)}")
    if x.shape[-1] % heads or (rotary is not None and x.shape[-1] // heads % 2):
        even = ", an even number for each with rotary" if rotary is not None else ""
        came = f"{x.shape[-1]} features for {heads} heads"
        raise ValueError(f"{name}: the features of x must be a multiple of heads{even}; got {came}")
    return x, z


def init_of(
    name: str, shapes: Callable, W: str | Callable, b: str | Callable | None, W_out: str | Callable | None
) -> Callable:
    """(key, x) -> params, state."""
    init_W, init_b, init_O = (
        initializer_of(name, "W", W),
        initializer_of(name, "b", "zeros" if b is None else b),
        initializer_of(name, "W_out", W if W_out is None else W_out),
    )

    def init(key, x):
        check_key(name, key)
        due, dtype = shapes(x), (x[0] if isinstance(x, tuple) else x).dtype
        keys = jax.random.split(key, len(due))
        made = {}
        for k, (leaf, shape) in zip(keys, due.items(), strict=True):
            check_numbers(name, leaf, shape)
            make = init_b if len(shape) == 1 else init_O if leaf == "O" else init_W
            made[leaf] = make(k, shape, dtype)
        return made, {}

    return init
