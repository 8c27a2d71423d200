"""Attention: at every position a weighted mean over others, with weights that say how well they match."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_floating, check_is, check_key, check_params, check_positive, check_size, describe
from fnbp.arrays.masks import check_mask, kept
from fnbp.arrays.placement import reshaped
from fnbp.arrays.sums import wide
from fnbp.construction import constructor
from fnbp.factor import Outer, Sum
from fnbp.layer import Context, Layer, Static, Traits, counting
from fnbp.layers.attending import attend, attend_back
from fnbp.layers.initializers import initializer_of
from fnbp.layers.parameters import Shapes, add_bias, drawn, due, optional, those_of
from fnbp.steps import Steps

__all__ = ["attention"]

Sequence = Float[Array, "m t n"]


@constructor
def attention(
    heads: int,
    kv_heads: int | None = None,
    causal: bool = False,
    rotary: float | None = None,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
    W_out: str | Callable | None = None,
) -> Layer:
    """Multi-head attention of a sequence to itself or, for a pair (x, memory), to another one.

        q = Q x + b_Q    k = K z    v = V z + b_V      z = x, or memory      (head by head)
        p = softmax(q k^T / sqrt d)      o = p v      y = O o + b_O
        do = O^T dy      dv = p^T do      dp = do v^T      ds = p (dp - sum_t dp p)
        dq = ds k / sqrt d      dk = ds^T q / sqrt d      dz = K^T dk + V^T dv      dx = Q^T dq, + dz if z = x
        dQ = dq x^T    dK = dk z^T    dV = dv z^T    dO = dy o^T      db: the sums of dq, dk, dv, dy

    Context.mask, (m, S) or (m, T, S), is True where a position of z counts. A query that sees none has p = 0 and o = 0.
    With more than 64 keys nothing of size T S is held: see fnbp/layers/attending.py.

    Shapes:   x, y (m, T, n); memory (m, S, l); Q (n, n), K, V (kv_heads d, l), O (n, n), d = n / heads;
              saved x, z, q, k, v, o, the mask and, for up to 64 keys, p in at least float32.
    Forward:  Vaswani et al. 2017, arXiv:1706.03762, section 3.2; rotary: Su et al. 2021, arXiv:2104.09864, section
              3.2.2; kv_heads: Ainslie et al. 2023, arXiv:2305.13245, section 2.2.
    Backward: Dao et al. 2022, arXiv:2205.14135, appendix B.2.
    Options:  kv_heads: number of key/value heads; each serves heads / kv_heads query heads. causal: a query sees no
              later position. rotary: base of the rotary embedding (the paper's is 10,000), which turns pairs (2i, 2i+1)
              of q and k by position times base^(-2i / d); K has a bias only with rotary: softmax would not see it. W,
              b: initializers of matrices and biases, or their names; b=None: no biases. W_out: that of O, by default W.
    Raises:   ValueError if sizes, a mask or params do not fit; TypeError if x is not floating point.
    """
    kv = heads if kv_heads is None else kv_heads
    name = f"attention({heads})" if kv == heads else f"attention({heads}, {kv})"
    shapes, makers = shapes_of(name, heads, kv, causal, rotary), makers_of(name, W, b, W_out, rotary)

    def forward(params: dict, state: dict, x: Any, ctx: Any) -> tuple[Sequence, dict, tuple]:
        check_params(name, params, x[0] if isinstance(x, tuple) else x, those_of(makers, shapes(x)))
        pair, (x, z) = Static(isinstance(x, tuple)), check_pair(name, x, heads, rotary)
        z = of_use(z, ctx.mask)
        q, k, v = affine(params, "Q", x), affine(params, "K", z), affine(params, "V", z)
        q_heads, k_heads, v_heads = split_heads(q, kv, heads // kv), split_heads(k, kv), split_heads(v, kv)
        q_turned, k_turned = rotate(q_heads, rotary), rotate(k_heads, rotary)
        o_heads, p = attend(q_turned, k_turned, v_heads, ctx.mask, causal)
        o = merge_heads(o_heads).astype(v.dtype)
        return affine(params, "O", o), state, (x, z, q_turned, k_turned, v_heads, p, o, ctx.mask, pair)

    def backward(params: dict, res: tuple, dy: Sequence) -> tuple[dict, Any]:
        x, z, q_turned, k_turned, v_heads, p, o, mask, pair = res
        do_heads = split_heads(dy @ params["O"], kv, heads // kv)
        dq_turned, dk_turned, dv_heads = attend_back(q_turned, k_turned, v_heads, mask, causal, p, do_heads)
        dq_heads, dk_heads = unrotate(dq_turned, rotary), unrotate(dk_turned, rotary)
        dq, dk, dv = merge_heads(dq_heads), merge_heads(dk_heads), merge_heads(dv_heads)
        factors = {"Q": Outer(dq, x), "K": Outer(dk, z), "V": Outer(dv, z), "O": Outer(dy, o)}
        biases = due(params, b_Q=Sum(dq), b_K=Sum(dk), b_V=Sum(dv), b_O=Sum(dy))
        dx, dz = dq @ params["Q"], dk @ params["K"] + dv @ params["V"]
        return factors | biases, (dx, dz) if pair.value else dx + dz

    steps = steps_of(name, forward, kv, heads // kv, rotary) if causal else None
    passes, traits = counting(name, of_memory, forward, backward), Traits(of_memory, steps=steps)
    return Layer(init_of(name, shapes, makers), *passes, name, traits=traits)


def steps_of(name: str, forward: Callable, kv: int, group: int, rotary: float | None) -> Steps:
    """How causal attention goes from one position to the next: it keeps the keys and values of those before.

    kept: k, turned, and v (m, length, kv, d), 0 behind the last position; at, the number of positions there are.
    """

    def first(params: dict, state: dict, x: Any, length: int) -> tuple[Any, dict]:
        if isinstance(x, tuple):
            raise TypeError(f"{name}: it goes step by step over one sequence, got {describe(x)}")
        y, _, (_, _, _, k_turned, v_heads, *_) = forward(params, state, x, Context())
        behind = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))
        at = jnp.asarray(x.shape[1], jnp.int32)
        return y, {"k": jnp.pad(k_turned, behind), "v": jnp.pad(v_heads, behind), "at": at}

    def then(params: dict, state: dict, kept: dict, x: jax.Array) -> tuple[Any, dict]:
        at, length = kept["at"], kept["k"].shape[1]
        q, k, v = (affine(params, leaf, x) for leaf in "QKV")
        q_turned = rotate(split_heads(q, kv, group), rotary, at=at, length=length)
        k_turned = rotate(split_heads(k, kv), rotary, at=at, length=length)
        keys, values = put_at(kept["k"], at, k_turned), put_at(kept["v"], at, split_heads(v, kv))
        seen = (jnp.arange(length) <= at)[None, None]
        o_heads, _ = attend(q_turned, keys.astype(q.dtype), values.astype(q.dtype), seen, causal=False)
        return affine(params, "O", merge_heads(o_heads).astype(v.dtype)), {"k": keys, "v": values, "at": at + 1}

    return Steps(first, then)


def put_at(kept: jax.Array, at: jax.Array, a: jax.Array) -> jax.Array:
    """kept (m, length, ...) with a (m, 1, ...) at one position, in the dtype of kept."""
    return jax.lax.dynamic_update_slice_in_dim(kept, a.astype(kept.dtype), at, 1)


def of_memory(name: str, x: Any, mask: Any) -> Any:
    """The mask rule of attention: for a pair (x, memory) the mask is of memory, and all positions of y count."""
    pair = x if isinstance(x, tuple) else (x, x)
    if mask is not None and all(len(getattr(a, "shape", ())) > 1 for a in pair):
        check_mask(name, mask, pair[-1].shape[:2], (*pair[0].shape[:2], pair[-1].shape[1]))
    return None if isinstance(x, tuple) else mask


def of_use(z: jax.Array, mask: jax.Array | None) -> jax.Array:
    """z, with 0 at positions that no query sees, since 0 times NaN is NaN."""
    if mask is None:
        return z
    seen = mask.any(1) if mask.ndim == 3 else mask
    return kept(seen, z)


def shapes_of(name: str, heads: int, kv: int, causal: bool, rotary: float | None) -> Callable[[Any], Shapes]:
    """A function from x, or (x, memory), to the shape of each parameter, also of biases that the layer lacks.

    Raises: ValueError or TypeError if the options fit no input.
    """
    check_options(name, heads, kv, causal, rotary)

    def shapes(x: Any) -> Shapes:
        x, z = check_pair(name, x, heads, rotary)
        n, d = x.shape[-1], x.shape[-1] // heads
        matrices = {"Q": (n, n), "K": (kv * d, z.shape[-1]), "V": (kv * d, z.shape[-1]), "O": (n, n)}
        return matrices | {f"b_{leaf}": shape[:1] for leaf, shape in matrices.items()}

    return shapes


def makers_of(
    name: str, W: str | Callable, b: str | Callable | None, W_out: str | Callable | None, rotary: float | None
) -> dict[str, Callable]:
    """The initializer of each parameter that the layer has."""
    init_W, init_b = initializer_of(name, "W", W), optional(name, "b", b)
    init_O = initializer_of(name, "W_out", W if W_out is None else W_out)
    matrices = {"Q": init_W, "K": init_W, "V": init_W, "O": init_O}
    biased = "QVO" if rotary is None else "QKVO"  # without rotary, softmax does not see a bias of k
    return matrices | ({} if init_b is None else {f"b_{leaf}": init_b for leaf in biased})


def split_heads(a: jax.Array, *heads: int) -> jax.Array:
    """Reshape (m, T, n) to (m, T, *heads, d)."""
    return reshaped(a, *a.shape[:2], *heads, a.shape[-1] // math.prod(heads))


def merge_heads(a: jax.Array) -> jax.Array:
    """Reshape (m, T, *heads, d) to (m, T, n)."""
    return reshaped(a, *a.shape[:2], math.prod(a.shape[2:]))


def rotate(a: jax.Array, base: float | None, sign: int = 1, at: jax.Array | None = None, length: int = 0) -> jax.Array:
    """Turn each pair (2i, 2i + 1) of a (m, T, ..., d) at position t by the angle t base^(-2i / d); None: no turn.

    at: the position of the only one in a, which is below length; by default a has all positions from 0 on.
    """
    if base is None:
        return a
    d, T = a.shape[-1], a.shape[1]
    angle = sign * np.arange(T if at is None else length)[:, None] * base ** -(np.arange(0, d, 2) / d)
    cos, sin = (jnp.asarray(f(angle), wide(a).dtype) for f in (np.cos, np.sin))
    if at is not None:
        cos, sin = (jax.lax.dynamic_slice_in_dim(table, at, 1) for table in (cos, sin))
    cos, sin = (table.reshape(T, *[1] * (a.ndim - 3), d // 2) for table in (cos, sin))
    even, odd = wide(a)[..., ::2], wide(a)[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return reshaped(pairs, *a.shape).astype(a.dtype)


def unrotate(a: jax.Array, base: float | None) -> jax.Array:
    """Turn each pair back: the transpose of rotate."""
    return rotate(a, base, -1)


def affine(params: dict, leaf: str, a: jax.Array) -> jax.Array:
    """W a + b, or W a if there is no b."""
    return add_bias(a @ params[leaf].T, params, f"b_{leaf}")


def check_options(name: str, heads: int, kv: int, causal: bool, rotary: float | None) -> None:
    """Raise a ValueError or TypeError if the options fit no input."""
    check_size(name, "heads", heads)
    check_size(name, "kv_heads", kv)
    check_is(name, "causal", causal, bool)
    if heads % kv:
        raise ValueError(f"{name}: heads must be a multiple of kv_heads, got {heads} heads for {kv}")
    if rotary is not None:
        check_positive(name, "rotary", rotary)


def check_pair(name: str, x: Any, heads: int, rotary: float | None) -> tuple[Any, Any]:
    """The inputs of the queries, and of the keys and values. Raise a ValueError or TypeError if they do not fit."""
    if isinstance(x, tuple) and len(x) != 2:
        raise ValueError(f"{name}: expected x, or a pair (x, memory), got a tuple of {len(x)}")
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


def init_of(name: str, shapes: Callable[[Any], Shapes], makers: dict[str, Callable]) -> Callable:
    """The init (key, x) -> params, state."""

    def init(key: Any, x: Any) -> tuple[dict, dict]:
        check_key(name, key)
        return drawn(name, key, shapes(x), makers, (x[0] if isinstance(x, tuple) else x).dtype), {}

    return init
