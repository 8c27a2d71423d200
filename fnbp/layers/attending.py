"""What attention computes of queries, keys and values: the weights p, what they make of v, and back; see attention.

With few keys p is kept for the backward. With more, it is formed for a block of queries at a time, against all keys
that they see, and again in the backward: nothing of size T S is held.

Source: Rabe & Staats 2021, arXiv:2112.05682, section 2, for attention without an array of size T S.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fnbp.arrays.placement import reshaped, varying
from fnbp.arrays.sums import wide

SHORT = 64  # keys; up to that many the weights p are kept for the backward, else formed again, block by block
BLOCK = 128  # queries whose weights are formed at once
LOOPS = 8  # of causal blocks: more of them compute less for nothing, and take longer to compile

Queries = Float[Array, "m t kv g d"]
Keys = Float[Array, "m s kv d"]
Weights = Float[Array, "kv m t g s"]
HeadQueries = Float[Array, "m t g d"]
HeadKeys = Float[Array, "m s d"]
HeadWeights = Float[Array, "m t g s"]
Seen = Bool[Array, "#m #t s"]


# --- one key head: its weights p, what they make of v, and back ---


def weights(q: HeadQueries, k: HeadKeys, seen: Seen | None) -> HeadWeights:
    """p = softmax(q k^T / sqrt d), 0 where seen is False."""
    s = jnp.einsum("mtgd,msd->mtgs", wide(q), wide(k)) / math.sqrt(q.shape[-1])
    s = s if seen is None else jnp.where(seen[:, :, None], s, -jnp.inf)
    most = jnp.max(s, -1, keepdims=True)
    e = jnp.exp(s - jax.lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0)))  # a row of -inf: e = 0
    total = jnp.sum(e, -1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def weighted(p: HeadWeights, v: HeadKeys) -> HeadQueries:
    """o = p v."""
    return jnp.einsum("mtgs,msd->mtgd", p, wide(v))


def weighted_back(
    q: HeadQueries, k: HeadKeys, v: HeadKeys, p: HeadWeights, do: HeadQueries
) -> tuple[HeadQueries, HeadKeys, HeadKeys]:
    """dq, dk, dv from do."""
    dv = jnp.einsum("mtgs,mtgd->msd", p, do)
    dp = jnp.einsum("mtgd,msd->mtgs", do, wide(v))
    ds = p * (dp - jnp.sum(dp * p, -1, keepdims=True)) / math.sqrt(q.shape[-1])
    dq = jnp.einsum("mtgs,msd->mtgd", ds, wide(k))
    dk = jnp.einsum("mtgs,mtgd->msd", ds, wide(q))
    return dq, dk, dv


# --- all heads: at once where p is kept, else block by block ---


def attend(q: Queries, k: Keys, v: Keys, mask: Any, causal: bool) -> tuple[Queries, Weights | None]:
    """o, and p if the keys are few enough to keep it."""
    T, S = q.shape[1], k.shape[1]
    if S > SHORT and T > 1:
        return compiled(attend_in_blocks)(q, k, v, mask, causal=causal), None

    def at_once(q, k, v):
        p = weights(q, k, visible(mask, causal, 0, T, S))
        return weighted(p, v), p

    o, p = jax.vmap(at_once)(*map(heads_first, (q, k, v)))
    return heads_behind(o), p


def attend_back(
    q: Queries, k: Keys, v: Keys, mask: Any, causal: bool, p: Weights | None, do: Queries
) -> tuple[Queries, Keys, Keys]:
    """dq, dk, dv from do."""
    if p is None:
        dq, dk, dv = compiled(attend_back_in_blocks)(q, k, v, mask, do, causal=causal)
    else:
        heads: list[Any] = [*map(heads_first, (q, k, v)), p, heads_first(wide(do))]
        dq, dk, dv = map(heads_behind, jax.vmap(weighted_back)(*heads))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def attend_in_blocks(q: Queries, k: Keys, v: Keys, mask: Any, causal: bool) -> Queries:
    """o, of a block of queries at a time."""

    def of_head(q, k, v):
        def block(nothing, keys, seen, q):
            return nothing, weighted(weights(q, k[:, :keys], seen), v[:, :keys])

        return over_blocks(block, None, k.shape[1], mask, causal, q)[1]

    return heads_behind(head_by_head(of_head, *map(heads_first, (q, k, v))))


def attend_back_in_blocks(
    q: Queries, k: Keys, v: Keys, mask: Any, do: Queries, causal: bool
) -> tuple[Queries, Keys, Keys]:
    """dq, dk, dv from do, of a block of queries at a time, whose p is formed again."""

    def of_head(q, k, v, do):
        def block(carry, keys, seen, q, do):
            k_seen, v_seen = k[:, :keys], v[:, :keys]
            dq, dk, dv = weighted_back(q, k_seen, v_seen, weights(q, k_seen, seen), do)
            return (added(carry[0], dk), added(carry[1], dv)), dq

        dtype = jnp.result_type(*map(wide, (q, k, v)), do)
        start = [varying(jnp.zeros_like(a, dtype), q, k, v, do, mask) for a in (k, v)]
        (dk, dv), dq = over_blocks(block, tuple(start), k.shape[1], mask, causal, q, do)
        return dq, dk, dv

    dq, dk, dv = map(heads_behind, head_by_head(of_head, *map(heads_first, (q, k, v, wide(do)))))
    return dq, dk, dv


@functools.cache
def compiled(f: Callable) -> Any:
    """f, compiled: outside jit its loops would be compiled at every call."""
    return jax.jit(f, static_argnames="causal")


def over_blocks(block: Callable, carry: Any, S: int, mask: Any, causal: bool, *arrays: jax.Array) -> tuple[Any, Any]:
    """block(carry, keys, seen, *rows) -> carry, y for each block of queries in order; keys: how many it may see.

    arrays: (m, T, ...), of which rows are those of one block. If causal, later blocks see more keys: 8 loops, one
    behind the other, each over blocks that take the same number of them.

    Returns: the last carry, and y of all queries, (m, T, ...).
    """
    T = arrays[0].shape[1]
    count = -(-T // BLOCK)
    size = -(-T // count)
    by_query = mask is not None and mask.ndim == 3
    masks: list[Any] = [mask] if by_query else []
    padded = [jnp.pad(a, ((0, 0), (0, count * size - T), *[(0, 0)] * (a.ndim - 2))) for a in (*arrays, *masks)]
    ys = []
    for those in np.array_split(np.arange(count), min(count, LOOPS if causal else 1)):
        first, end = int(those[0]), int(those[-1]) + 1
        keys = min(end * size, S) if causal else S

        def one(carry, each, keys=keys):
            number, *rows = each
            own = rows[-1] if by_query else mask
            seen = visible(own, causal, number * size, size, keys)
            return block(carry, keys, seen, *rows[: len(arrays)])

        rows = [reshaped(a[:, first * size : end * size], a.shape[0], len(those), size, *a.shape[2:]) for a in padded]
        carry, y = jax.lax.scan(one, carry, (jnp.arange(first, end), *(jnp.moveaxis(a, 1, 0) for a in rows)))
        y = jnp.moveaxis(y, 0, 1)
        ys.append(reshaped(y, y.shape[0], len(those) * size, *y.shape[3:]))
    return carry, jnp.concatenate(ys, 1)[:, :T]


def added(whole: HeadKeys, first: Float[Array, "m r d"]) -> HeadKeys:
    """A sum over all keys, with what the first of them get from one block."""
    return jax.lax.dynamic_update_slice_in_dim(whole, whole[:, : first.shape[1]] + first, 0, 1)


def head_by_head(f: Callable, *heads: jax.Array) -> Any:
    """f of each head: on a CPU one after the other, whose arrays then stay in its cache, elsewhere at once."""
    return jax.lax.platform_dependent(
        *heads, cpu=lambda *heads: jax.lax.map(lambda one: f(*one), heads), default=lambda *heads: jax.vmap(f)(*heads)
    )


def heads_first(a: jax.Array) -> jax.Array:
    """(m, T, kv, ...) as (kv, m, T, ...)."""
    return jnp.moveaxis(a, 2, 0)


def heads_behind(a: jax.Array) -> jax.Array:
    """(kv, m, T, ...) as (m, T, kv, ...)."""
    return jnp.moveaxis(a, 0, 2)


def visible(mask: jax.Array | None, causal: bool, first: Any, T: int, keys: int) -> jax.Array | None:
    """True where one of T queries, of which that is the first, sees one of the first keys; None if all see all.

    Shapes: (m or 1, T or 1, keys); mask (m, S), or (m, T, S) of these queries.
    """
    seen = (first + jnp.arange(T)[:, None] >= jnp.arange(keys))[None] if causal else None
    if mask is None:
        return seen
    mask = mask[:, None, :keys] if mask.ndim == 2 else mask[..., :keys]
    return mask if seen is None else seen & mask
