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


def softmax_parts(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax(a) and softmax(a) over the last axis.

        log y_hat_j = a_j - M - log(1 + r)      M = max a, r = the sum of e^(a_j - M) over all but one a_j = M

    Not log(sum), which rounds r away where it is small: the loss of a confident and right prediction.
    """
    shifted = a - jnp.max(a, -1, keepdims=True)
    e = jnp.exp(shifted)
    at_most = jnp.sum(shifted == 0, -1, keepdims=True, dtype=a.dtype)
    r = jnp.sum(jnp.where(shifted == 0, 0, e), -1, keepdims=True) + (at_most - 1)
    return shifted - jnp.log1p(r), e / (1 + r)


def complement(p: jax.Array) -> jax.Array:
    """1 - p for distributions p over the last axis; near p = 1, where 1 - p loses its digits, the sum of the others."""
    most = p > 0.5
    return jnp.where(most, jnp.sum(jnp.where(most, 0, p), -1, keepdims=True), 1 - p)
