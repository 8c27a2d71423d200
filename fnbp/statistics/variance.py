"""How much the gradients of single examples differ: variance of every number, and the noise scale of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.arrays.sums import wide
from fnbp.backpropagation import backprop
from fnbp.contractions import second_moment, sq_norms, total
from fnbp.layer import Context, Layer, leaves
from fnbp.losses.loss import Loss
from fnbp.statistics.of_opened import opens

__all__ = ["Moments", "NoiseScale", "moments", "noise_scale"]


class Moments(NamedTuple):
    """Of every number of the gradient, trees of params: mean, variance over examples, mean^2 / variance."""

    mean: Any
    variance: Any
    signal_to_noise: Any


@opens
def moments(net: Layer, loss: Loss) -> Callable[..., Any]:
    """Make the function of the moments of single gradients: (params, state, x, y, ctx) -> (value, state), Moments.

        mean = sum_i g_i / m      variance = (sum_i g_i^2 - m mean^2) / (m - 1)      signal_to_noise = mean^2 / variance

    mean is the gradient of J. The variance is that of single examples, without bias; rounding cannot leave it below 0.
    It is a difference: where the gradients are nearly alike it has lost digits, and all of them where it is below
    mean^2 times the rounding of the dtype. A number that no example changes, a row of an embedding for example, has the
    ratio 0. In fit every example must count: Batches(..., drop_last=True).

    Source: Dangel, Kunstner & Hennig 2020, arXiv:1912.10985, for the second moment in the same backward.
    Raises: ValueError if there is one example; TypeError, by its name, if a layer mixes the examples.
    """
    run = backprop(net, loss, {"mean": total, "squares": second_moment})

    def moments_of(params, state, x, y, ctx=Context()):
        m = several("moments", x)
        done = run(params, state, x, y, ctx)
        mean, squares = done.grads["mean"], done.grads["squares"]
        variance = jax.tree.map(lambda g, s: jnp.maximum(s - m * wide(g) ** 2, 0) / (m - 1), mean, squares)
        ratio = jax.tree.map(lambda g, v: wide(g) ** 2 / jnp.where((g == 0) & (v == 0), 1, v), mean, variance)
        return (done.value, done.state), Moments(mean, variance, ratio)

    return moments_of


class NoiseScale(NamedTuple):
    """The noise scale, and of which two numbers it is the ratio.

    scale   trace / square: about the batch at which more examples begin to bring less
    trace   of the covariance of single gradients      square  |gradient|^2 without noise
    by_layer  path -> (trace, square) of each layer; the layers of a repeat are one
    """

    scale: jax.Array
    trace: jax.Array
    square: jax.Array
    by_layer: dict[str, tuple[jax.Array, jax.Array]]


@opens
def noise_scale(net: Layer, loss: Loss, norms_only: bool = False) -> Callable[..., Any]:
    """Make the function of the gradient and its noise: (params, state, x, y, ctx) -> (value, state, NoiseScale), grads.

        trace = m / (m - 1) (mean_i |g_i|^2 - |g|^2)      square = (m |g|^2 - mean_i |g_i|^2) / (m - 1)
        scale = trace / square, g the mean of the g_i

    trace and square are without bias, their ratio is not: average both over steps before dividing. square may be
    negative where the gradient is nothing but noise. trace is a difference; rounding cannot leave it below 0.

    It drops into fit: fit(..., gradient=noise_scale, record={"trace": lambda step: step.more.trace}). Every example
    must count: Batches(..., drop_last=True). With reduce="tokens" an example weighs as many tokens as it has, over
    those of the batch, and so do its gradient and this noise.

    Options: norms_only: of norm layers alone, whose norms cost nearly nothing: of every layer whose constructor, or
             name if it has none, ends with "norm".
    Source:  McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; Gray et al. 2024, arXiv:2411.00999, for norm
             layers.
    Raises:  ValueError if there is one example, of which no noise can be told, or norms_only finds no norm layer;
             TypeError, by its name, if a layer mixes the examples.
    """
    run = backprop(net, loss, {"gradient": total, "squares": sq_norms})

    def noise_scale_of(params, state, x, y, ctx=Context()):
        m = several("noise_scale", x)
        done = run(params, state, x, y, ctx)
        grads, squares = done.grads["gradient"], done.grads["squares"]
        by_layer = {}
        for path, layer, own, each in leaves(net, grads, squares):
            if jax.tree.leaves(own) and (is_norm(layer) or not norms_only):
                single = sum(jnp.mean(one) for one in jax.tree.leaves(each))
                whole = sum(jnp.sum(wide(g) ** 2) for g in jax.tree.leaves(own))
                by_layer[path] = jnp.maximum(single - whole, 0) * m / (m - 1), (m * whole - single) / (m - 1)
        if not by_layer:
            raise ValueError(f"noise_scale: {net.name} has no {'norm layer' if norms_only else 'parameters'}")
        trace, square = (jnp.sum(jnp.stack([pair[i] for pair in by_layer.values()])) for i in (0, 1))
        return (done.value, done.state, NoiseScale(trace / square, trace, square, by_layer)), grads

    return noise_scale_of


def is_norm(layer: Layer) -> bool:
    """True for a layer that says by the name of its constructor, or by its own, that it normalises."""
    name = layer.name.partition("(")[0] if layer.made is None else layer.made.constructor.__name__
    return name.endswith("norm")


def several(name: str, x: Any) -> int:
    """How many examples there are. ValueError if it is one: its gradient says nothing of how others differ."""
    m = jax.tree.leaves(x)[0].shape[0]
    if m < 2:
        raise ValueError(f"{name}: a batch of 1 has no variance; give at least 2 examples, or add up several batches")
    return m
