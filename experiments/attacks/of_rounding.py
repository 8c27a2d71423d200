"""Attacks by what is taken for rounding, and right backwards that round as published formulas do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attacks.attack import X, function, square


def variance(x: Any) -> Any:
    """y = the variance of each row"""
    return x.var(1)


NEAR_THREE = (3 + 1e-4 * X).astype(np.float32)


def variance_back(factor: float) -> Any:
    """dx = 2 dy (x - mean) / n, times a factor."""

    def backward(args, dy):
        (x,) = args
        return (factor * dy[:, None] * 2 * (x - x.mean(1, keepdims=True)) / x.shape[1],)

    return backward


def attend(q: Any, k: Any, v: Any) -> Any:
    """y = softmax(q k^T / sqrt(d)) v"""
    p = jax.nn.softmax(jnp.einsum("...id,...jd->...ij", q, k) / np.sqrt(q.shape[-1]), -1)
    return p @ v


def flash(args: Any, do: Any) -> Any:
    """ds = p (dp - sum(do o)), as FlashAttention has it (Dao et al. 2022, arXiv:2205.14135, appendix B)."""
    q, k, v = args
    scale = 1 / np.sqrt(q.shape[-1])
    p = jax.nn.softmax(jnp.einsum("...id,...jd->...ij", q, k) * scale, -1)
    o = p @ v
    dv = jnp.einsum("...ij,...id->...jd", p, do)
    dp = jnp.einsum("...id,...jd->...ij", do, v)
    ds = p * (dp - jnp.sum(do * o, -1, keepdims=True))
    return jnp.einsum("...ij,...jd->...id", ds, k) * scale, jnp.einsum("...ij,...id->...jd", ds, q) * scale, dv


def qkv(seed: int) -> tuple:
    """q, k, v (3, 9, 16)."""
    return tuple(np.random.default_rng(seed).standard_normal((3, 3, 9, 16)).astype(np.float32))


def cubed(x: Any) -> Any:
    """y = x^3 / 3"""
    return x**3 / 3


def shifted_square(x: Any) -> Any:
    """y = ((x + 1e4) - 1e4)^2, which XLA simplifies"""
    return ((x + 1e4) - 1e4) ** 2


ROUNDING = (
    function("rounding", "x.var(1) near 3, off by 1e-6", variance, variance_back(1 + 1e-6), NEAR_THREE),
    function("rounding", "x.var(1) near 3, off by 1e-9", variance, variance_back(1 + 1e-9), NEAR_THREE),
    function(
        "rounding", "a square that cancels", cubed, lambda a, dy: (dy * ((a[0] + 300) ** 2 - 600 * a[0] - 9e4),), X
    ),
    function(
        "rounding",
        "by way of bfloat16",
        square,
        lambda a, dy: ((2 * a[0] * dy).astype(jnp.bfloat16).astype(dy.dtype),),
        X,
    ),
    *(
        function("rounding", f"right: FlashAttention's backward, draw {seed}", attend, flash, *qkv(seed), right=True)
        for seed in range(6)
    ),
    function("rounding", "right: x.var(1) near 3", variance, variance_back(1.0), NEAR_THREE, right=True),
    function(
        "rounding",
        "right: the result in float32",
        square,
        lambda a, dy: ((2 * a[0] * dy).astype(jnp.float32),),
        X,
        right=True,
    ),
    function(
        "rounding",
        "right: (x + 1e4) - 1e4",
        shifted_square,
        lambda a, dy: (2 * ((a[0] + 1e4) - 1e4) * dy,),
        X,
        right=True,
    ),
)
