"""Dropout of single numbers, and of whole branches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_key, check_params, check_rate
from fnbp.arrays.masks import elementwise
from fnbp.construction import constructor
from fnbp.layer import Layer, Traits, counting

__all__ = ["drop_path", "dropout"]

X = Float[Array, "*s"]


@constructor
def dropout(rate: float) -> Layer:
    """During training, zero each number with probability rate and rescale the rest. At inference, the identity.

        y = x keep / (1 - rate)      keep ~ Bernoulli(1 - rate)      dx = dy keep / (1 - rate)

    Within shard_map each device draws with its own key: fold in jax.lax.axis_index.

    Shapes:  x, y (...); saved keep, one truth value for each number of x, only during training.
    Source:  Srivastava et al. 2014, JMLR 15, section 4, rescaled during training as in section 10.
    Options: rate: the probability to drop, as in PyTorch, Keras and Flax.
    Raises:  ValueError if rate is outside [0, 1), or training has no Context.key; TypeError if the key is not a random
             key.
    """
    return dropping(f"dropout({rate})", rate, lambda shape: shape)


@constructor
def drop_path(rate: float) -> Layer:
    """During training, zero whole examples with probability rate and rescale the rest. At inference, the identity.

        y = x keep / (1 - rate)      keep ~ Bernoulli(1 - rate), one for each example      dx = dy keep / (1 - rate)

    At the end of a branch, skip(serial(layer, drop_path(rate))), it is stochastic depth: some examples skip the branch.

    Shapes:  x, y (m, ...); saved keep (m, 1, ...), only during training.
    Source:  Huang et al. 2016, arXiv:1603.09382, section 3, rescaled during training.
    Options: rate: the probability to drop; the paper's p is 1 minus it.
    Raises:  ValueError if rate is outside [0, 1), or training has no Context.key; TypeError if the key is not a random
             key.
    """
    return dropping(f"drop_path({rate})", rate, lambda shape: shape[:1] + (1,) * len(shape[1:]))


def dropping(name: str, rate: float, drawn: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Layer:
    """A Layer that keeps some numbers of x. drawn: the shape of x -> the shape of keep."""
    rate = check_rate(name, rate)

    def init(key, x):
        check_key(name, key)
        return {}, {}

    def forward(params: dict, state: dict, x: X, ctx: Any) -> tuple[X, dict, tuple]:
        check_params(name, params, x, {})
        if not ctx.train:
            return x, state, (None,)
        if ctx.key is None:
            raise ValueError(f"{name}: training needs a key, Context(key=jax.random.key(0), train=True)")
        check_key(name, ctx.key)
        chance = jnp.asarray(1 - rate, jnp.float32)  # so that a key draws the same with and without jax_enable_x64
        keep = jax.random.bernoulli(ctx.key, chance, drawn(x.shape))
        return jnp.where(keep, x / (1 - rate), 0), state, (keep,)

    def backward(params: dict, res: tuple, dy: X) -> tuple[dict, X]:
        (keep,) = res
        return {}, dy if keep is None else jnp.where(keep, dy / (1 - rate), 0)

    traits = Traits(elementwise, draws=rate > 0, alone=True)
    return Layer(init, *counting(name, elementwise, forward, backward), name, traits=traits)
