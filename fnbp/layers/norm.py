"""Normalisation over the features of a position, over groups of channels, or over the batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fnbp.arrays.checks import (
    check_floating,
    check_held,
    check_key,
    check_last_axis,
    check_number,
    check_positive,
    check_size,
    concrete,
)
from fnbp.arrays.masks import by_position, of_positions
from fnbp.arrays.placement import in_shard_map, reshaped
from fnbp.arrays.sums import centre, left, mean, wide
from fnbp.construction import constructor
from fnbp.factor import Mixed, Product, Sum
from fnbp.layer import Layer, Static, Traits, counting, mask_aware, stateless
from fnbp.layers.initializers import initializer
from fnbp.layers.parameters import Shapes, weights
from fnbp.layers.widening import in_wide

__all__ = ["batch_norm", "group_norm", "layer_norm", "rms_norm"]

Features = Float[Array, "*m d"]
Channels = Float[Array, "m *s c"]
ONES, ZEROS = initializer("ones"), initializer("zeros")


def gain_and_shift(x: Any) -> Shapes:
    """The shapes of gamma and beta: one number for each channel."""
    return {"gamma": x.shape[-1:], "beta": x.shape[-1:]}


@constructor
def layer_norm(eps: float = 1e-5) -> Layer:
    """Normalise the features of each position to mean 0 and variance 1, then scale and shift them.

        x^ = (x - mean x) rstd    rstd = (var x + eps)^-1/2    y = gamma x^ + beta
        dgamma = sum dy x^        dbeta = sum dy               dx^ = gamma dy
        dx = rstd (dx^ - mean dx^ - x^ mean(dx^ x^))

    Shapes:   x, y (..., d); gamma, beta (d,); means over d; saved x, mean and rstd (..., 1).
    Forward:  Ba, Kiros & Hinton 2016, arXiv:1607.06450, section 3.
    Backward: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, with means over features.
    Options:  eps: is added to the variance.
    Raises:   ValueError if eps is not positive or params do not fit x; TypeError if x is not floating point.
    """
    eps = check_positive("layer_norm", "eps", eps)
    init, check = weights("layer_norm", gain_and_shift, gamma=ONES, beta=ZEROS)

    def forward(params: dict, x: Features) -> tuple[Features, tuple]:
        check(params, x)
        mu = centre(x, -1)
        x_left = left(x, mu)
        rstd = jax.lax.rsqrt(mean(x_left**2, -1) + eps)
        return params["gamma"] * x_left * rstd + params["beta"], (x, mu, rstd)

    def backward(params: dict, res: tuple, dy: Features) -> tuple[dict, Features]:
        x, mu, rstd = res
        x_hat = left(x, mu) * rstd
        dx_hat = params["gamma"] * dy
        dx = rstd * (dx_hat - mean(dx_hat, -1) - x_hat * mean(dx_hat * x_hat, -1))
        return {"gamma": Product(dy, x_hat), "beta": Sum(dy)}, dx

    return stateless(init, *in_wide(forward, backward), "layer_norm", mask="position", alone=True)


@constructor
def rms_norm(eps: float = 1e-6) -> Layer:
    """Normalise the features of each position to mean square 1, then scale them.

        x^ = x rstd    rstd = (mean x^2 + eps)^-1/2    y = gamma x^
        dgamma = sum dy x^    dx^ = gamma dy    dx = rstd (dx^ - x^ mean(dx^ x^))

    Shapes:   x, y (..., d); gamma (d,); means over d; saved x, rstd (..., 1).
    Forward:  Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
    Backward: by the chain rule, as in layer_norm without the mean.
    Options:  eps: is added to the mean square.
    Raises:   ValueError if eps is not positive or params do not fit x; TypeError if x is not floating point.
    """
    eps = check_positive("rms_norm", "eps", eps)

    def shapes(x: Any) -> Shapes:
        return {"gamma": x.shape[-1:]}

    init, check = weights("rms_norm", shapes, gamma=ONES)

    def forward(params: dict, x: Features) -> tuple[Features, tuple]:
        check(params, x)
        rstd = jax.lax.rsqrt(mean(x**2, -1) + eps)
        return params["gamma"] * x * rstd, (x, rstd)

    def backward(params: dict, res: tuple, dy: Features) -> tuple[dict, Features]:
        x, rstd = res
        x_hat = x * rstd
        dx_hat = params["gamma"] * dy
        dx = rstd * (dx_hat - x_hat * mean(dx_hat * x_hat, -1))
        return {"gamma": Product(dy, x_hat)}, dx

    return stateless(init, *in_wide(forward, backward), "rms_norm", mask="position", alone=True)


@constructor
def group_norm(groups: int, eps: float = 1e-5) -> Layer:
    """Normalise each group of channels of an example to mean 0 and variance 1, then scale and shift its channels.

        x^ = (x - mean x) rstd    rstd = (var x + eps)^-1/2    y = gamma x^ + beta
        dgamma = sum dy x^        dbeta = sum dy               dx^ = gamma dy
        dx = rstd (dx^ - mean dx^ - x^ mean(dx^ x^))

    Shapes:   x, y (m, *s, c); gamma, beta (c,); means over the positions and the c / groups channels of a group;
              saved x, mean and rstd (m, 1, groups, 1).
    Forward:  Wu & He 2018, arXiv:1803.08494, section 3.1.
    Backward: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, with means over a group.
    Options:  groups: number of groups, which divides c. eps: is added to the variance.
    Raises:   ValueError if groups are below 1 or do not divide c, eps is not positive, or params do not fit x;
              TypeError if x is not floating point.
    """
    name = f"group_norm({groups})"
    check_size(name, "groups", groups)
    eps = check_positive(name, "eps", eps)
    axes = (1, 3)

    def shapes(x: Any) -> Shapes:
        if len(x.shape) < 2 or x.shape[-1] % groups:
            raise ValueError(f"{name}: x must be (m, *s, c), c a multiple of groups, got shape {x.shape}")
        return gain_and_shift(x)

    def grouped(x):
        return reshaped(x, x.shape[0], math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups)

    def those_that_count(x, mask):
        counts = of_positions(name, x, mask)
        return None if counts is None else grouped(jnp.broadcast_to(counts, x.shape).astype(x.dtype)) > 0

    init, check = weights(name, shapes, gamma=ONES, beta=ZEROS)

    def forward(params: dict, x: Channels, mask: Any) -> tuple[Channels, tuple]:
        check(params, x)
        counts = those_that_count(x, mask)
        mu = centre(grouped(x), axes, counts)
        x_left = left(grouped(x), mu, counts)
        rstd = jax.lax.rsqrt(mean(x_left**2, axes, counts) + eps)
        return params["gamma"] * reshaped(x_left * rstd, *x.shape) + params["beta"], (x, mu, rstd, counts)

    def backward(params: dict, res: tuple, dy: Channels) -> tuple[dict, Channels]:
        x, mu, rstd, counts = res
        x_hat = left(grouped(x), mu, counts) * rstd
        dx_hat = grouped(params["gamma"] * dy)
        dx = rstd * (dx_hat - mean(dx_hat, axes, counts) - x_hat * mean(dx_hat * x_hat, axes, counts))
        return {"gamma": Product(dy, reshaped(x_hat, *x.shape)), "beta": Sum(dy)}, reshaped(dx, *x.shape)

    return mask_aware(init, *in_wide(forward, backward), name, by_position)


def over_batch(a: jax.Array, n: Any) -> jax.Array:
    """The mean of each channel over the n examples and positions that count; a is 0 where it does not count."""
    return jnp.sum(a, range(a.ndim - 1)) / n


def how_many(x: jax.Array, counts: Any) -> Any:
    """The number n of entries of a channel that count."""
    n = x.size // x.shape[-1]
    if counts is None:
        return n
    each = n // counts.size  # positions for each truth value
    if not concrete(counts):
        return jnp.sum(counts, dtype=x.dtype) * each
    return int(np.sum(counts)) * each


def of_batch(x: jax.Array, state: dict, momentum: float, counts: Any) -> tuple[tuple, jax.Array, jax.Array, dict]:
    """Mean and variance of a batch, the number n that they are taken over, and the state that has followed them."""
    if in_shard_map():
        raise ValueError(
            "batch_norm: within shard_map it would see the examples of one device only; train it under jit, on a batch "
            "that is sharded over the mesh"
        )
    n = how_many(x, counts)
    if concrete(n) and n < 2:
        came = "only one number a channel, which has no variance" if n else "no numbers, so no mean"
        where = "" if counts is None else ", at positions that count"
        raise ValueError(f"batch_norm: x of shape {x.shape} has {came}{where}")
    mu = over_batch(x, n)
    mu = mu, over_batch(left(x, (mu, jnp.zeros((), x.dtype)), counts), n)
    var = over_batch(left(x, mu, counts) ** 2, n)
    new = {"mean": mu[0] + mu[1], "var": var * (n / (n - 1))}
    if not concrete(n):  # a batch of padding has no variance: it becomes NaN, since jit cannot raise
        var, new = jax.tree.map(lambda a: jnp.where(n >= 2, a, jnp.nan), (var, new))
    followed = {k: ((1 - momentum) * state[k] + momentum * new[k]).astype(state[k].dtype) for k in new}
    return mu, var, jnp.asarray(n, x.dtype), followed | {"count": state["count"] + 1}


def of_state(state: dict) -> tuple[tuple, jax.Array, None, dict]:
    """Mean and variance from training, no n, and the state as it is."""
    if concrete(state["count"]) and not np.any(np.asarray(state["count"])):
        raise ValueError(
            "batch_norm: no training step yet, so there are no running statistics; for the batch's own: "
            "Context(train=True)"
        )
    zero = jnp.zeros_like(state["mean"])
    return (state["mean"], zero), jnp.where(state["count"] > 0, state["var"], jnp.nan), None, state


@constructor
def batch_norm(momentum: float = 0.1, eps: float = 1e-5) -> Layer:
    """Normalise each channel to mean 0 and variance 1, then scale and shift it.

        x^ = (x - mean x) rstd    rstd = (var x + eps)^-1/2    y = gamma x^ + beta
        dgamma = sum dy x^        dbeta = sum dy               dx^ = gamma dy
        training   dx = rstd (dx^ - mean dx^ - x^ mean(dx^ x^))       inference   dx = rstd dx^

    During training (Context.train) mean and var are those of the batch, over examples and positions, and the state
    follows them: mean := (1 - momentum) mean + momentum mean of x, and var likewise with the variance over n - 1. At
    inference they are those of the state. Training mixes the examples, so only the total of the factors is defined.

    Shapes:   x, y (m, *s, c); gamma, beta (c,); state mean, var (c,) and count () of training steps; saved x, mean and
              rstd (c,), n (), which positions count, and whether it was training.
    Forward:  Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1 and, at inference, algorithm 2.
    Backward: the same, section 3.
    Options:  momentum: PyTorch's meaning, new = (1 - momentum) old + momentum batch; Flax's momentum is 1 minus it.
              eps: is added to the variance.
    Raises:   ValueError if an option is out of range, params do not fit x, training sees only one number a channel, or,
              outside jit, inference comes before any training step (under jit y is then NaN); TypeError if x is not
              floating point.
    """
    eps = check_positive("batch_norm", "eps", eps)
    momentum = check_number("batch_norm", "momentum", momentum)
    if not 0 < momentum <= 1:
        raise ValueError(f"batch_norm: momentum must be in (0, 1], got {momentum}")
    init_params, check = weights("batch_norm", gain_and_shift, gamma=ONES, beta=ZEROS)

    def init(key, x):
        check_key("batch_norm", key)
        check_floating("batch_norm", "x", x)
        check_last_axis("batch_norm", x)
        zeros = jnp.zeros(x.shape[-1:], wide(jnp.zeros((), x.dtype)).dtype)
        return init_params(key, x), {"mean": zeros, "var": zeros + 1, "count": jnp.zeros((), jnp.int32)}

    def forward(params: dict, state: dict, x: Channels, ctx) -> tuple[Channels, dict, tuple]:
        check(params, x)
        check_held("batch_norm", "state", state, {"mean": x.shape[-1:], "var": x.shape[-1:], "count": ()})
        counts = of_positions("batch_norm", x, ctx.mask)
        mu, var, n, new_state = of_batch(x, state, momentum, counts) if ctx.train else of_state(state)
        rstd = jax.lax.rsqrt(var + eps)
        y = params["gamma"] * left(x, mu) * rstd + params["beta"]
        return y, new_state, (x, mu, rstd, n, counts, Static(ctx.train))

    def backward(params: dict, res: tuple, dy: Channels) -> tuple[dict, Channels]:
        x, mu, rstd, n, counts, training = res
        x_hat = left(x, mu, counts) * rstd
        dx_hat = params["gamma"] * dy
        factors = {"gamma": Product(dy, x_hat), "beta": Sum(dy)}
        if not training.value:
            return factors, rstd * dx_hat
        dx = rstd * (dx_hat - over_batch(dx_hat, n) - x_hat * over_batch(dx_hat * x_hat, n))
        return {leaf: Mixed(factor.total()) for leaf, factor in factors.items()}, dx

    functions = counting("batch_norm", by_position, *in_wide(forward, backward, x=2))
    return Layer(init, *functions, "batch_norm", traits=Traits(by_position, mixes="training", alone=True))
