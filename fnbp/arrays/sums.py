"""Sums that keep their digits: in at least float32, a mean less its own rounding, log(1 + small)."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32: the dtype in which sums are taken."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def like(tree: Any) -> Any:
    """Arrays without examples: they carry the dtypes of a tree, and its shapes behind the first axis."""
    return jax.tree.map(lambda a: jnp.zeros((0, *a.shape[1:]), a.dtype), tree)


def mean(x: jax.Array, axes: Any, counts: jax.Array | None = None) -> jax.Array:
    """The mean over axes, which stay as axes of 1; over those that count if some do not. x is 0 where it does not."""
    if counts is None:
        return jnp.mean(x, axes, keepdims=True)
    n = jnp.sum(jnp.broadcast_to(counts, x.shape), axes, keepdims=True, dtype=x.dtype)
    return jnp.sum(x, axes, keepdims=True) / jnp.where(n > 0, n, 1)


def centre(x: jax.Array, axes: Any, counts: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The mean of x over axes, and the mean of what is left without it, which is the rounding of the first."""
    mu = mean(x, axes, counts)
    return mu, mean(left(x, (mu, jnp.zeros((), x.dtype)), counts), axes, counts)


def left(x: jax.Array, centre: tuple[jax.Array, jax.Array], counts: jax.Array | None = None) -> jax.Array:
    """x less its mean, in two steps: a constant row leaves exactly 0. 0 where x does not count."""
    mu, rounding = centre
    less = (x - mu) - rounding
    return less if counts is None else jnp.where(counts, less, 0)


def log_total(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """M and r, so that log sum e^a = M + log(1 + r), over the last axis, which stays as an axis of 1.

        M = max a      r = the sum of e^(a_j - M) over all but one a_j = M

    Not log of the sum, which rounds r away where it is small: the loss of a confident and right prediction.
    """
    M = jnp.max(a, -1, keepdims=True)
    whole = jnp.sum(jnp.exp(a - M), -1, keepdims=True)
    again = jax.lax.optimization_barrier(M)  # or the compiler keeps every e^(a - M) between the two sums
    others = jnp.sum(jnp.where(a < again, jnp.exp(a - again), 0), -1, keepdims=True)
    return M, jnp.where(whole < 1.5, others, whole - 1)  # below 1.5 one a_j alone is M


def complement(p: jax.Array, r: jax.Array) -> jax.Array:
    """1 - p of p = softmax(a), with the r of log_total(a): near p = 1 it is r / (1 + r), which keeps its digits."""
    return jnp.where(p > 0.5, r / (1 + r), 1 - p)
