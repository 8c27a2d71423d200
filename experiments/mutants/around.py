"""Layers around those that mutants are tried in: with fixed lengths, with a start, as a leaf, with finished factors."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import fnbp

LENGTHS = np.array([3, 5, 1, 0, 7])


def of_lengths(layer: fnbp.Layer) -> fnbp.Layer:
    """A ragged layer as a layer of x, with fixed lengths."""

    def init(key, x):
        return layer.init(key, (x, LENGTHS[: x.shape[0]]))

    def forward(params, state, x, ctx):
        return layer.forward(params, state, (x, LENGTHS[: x.shape[0]]), ctx)

    def backward(params, res, dy):
        factors, (dx, _) = layer.backward(params, res, dy)
        return factors, dx

    # by its place in the batch: alone, an example would have another length
    return fnbp.Layer(init, forward, backward, layer.name, traits=replace(layer.traits, mixes="always"))


def closed(layer: fnbp.Layer) -> fnbp.Layer:
    """A combinator as a leaf: its factors come out open, and are contracted only then."""
    return fnbp.replace_functions(layer, forward=layer.forward)


def with_start(scan: fnbp.Layer, given: bool) -> fnbp.Layer:
    """A scan as a layer of x: it starts at the first position of x, or at None, and returns y plus the end."""

    def start(x):
        return (x[:, 0] if given else None), x

    def forward(params, state, x, ctx):
        (end, y), state, res = scan.forward(params, state, start(x), ctx)
        return y + sum(part[:, None] for part in jax.tree.leaves(end)), state, (res, end)

    def backward(params, res, dy):
        res, end = res
        factors, (dstart, dx) = scan.backward(params, res, (jax.tree.map(lambda _: dy.sum(1), end), dy))
        return factors, dx if dstart is None else dx.at[:, 0].add(dstart)

    return fnbp.replace_functions(scan, lambda key, x: scan.init(key, start(x)), forward, backward)


def cell_of(layer: fnbp.Layer) -> fnbp.Layer:
    """A cell of a layer that keeps the shape: h = y = f(x + h)."""

    def init(key, x):
        return layer.init(key, x[1])

    def forward(params, state, x, ctx):
        h, x = x
        y, state, res = layer.forward(params, state, x if h is None else x + h, ctx)
        return (y, y), state, res

    def backward(params, res, dy):
        factors, dx = layer.backward(params, res, dy[0] + dy[1])
        return factors, (dx, dx)

    return fnbp.Layer(init, forward, backward, f"cell of {layer.name}", traits=replace(layer.traits, alone=False))


def finished(layer: fnbp.Layer) -> fnbp.Layer:
    """A layer whose backward returns gradients in place of factors."""

    def backward(params, res, dy):
        factors, dx = layer.backward(params, res, dy)
        return {name: factor.total() for name, factor in factors.items()}, dx

    return layer._replace(backward=backward)


def gain(per_example: type) -> fnbp.Layer:
    """One number times all of x, its gradient formed for each example already."""

    def init(key, x):
        return {"s": jnp.ones((), x.dtype)}

    def forward(params, x):
        return params["s"] * x, (x,)

    def backward(params, res, dy):
        axes = range(1, dy.ndim)
        return {"s": per_example(jnp.sum(dy * res[0], axes))}, params["s"] * dy

    return fnbp.stateless(init, forward, backward, "gain")


def gains(per_example: type) -> fnbp.Layer:
    """y = G_1 x + G_2 x^2, number by number, the gradient of G formed for each example already."""

    def init(key, x):
        return {"G": jnp.ones((x.shape[-1], 2), x.dtype)}

    def forward(params, x):
        return params["G"][:, 0] * x + params["G"][:, 1] * x**2, (x,)

    def backward(params, res, dy):
        (x,), G = res, params["G"]
        return {"G": per_example(jnp.stack([dy * x, dy * x**2], -1))}, dy * (G[:, 0] + 2 * x * G[:, 1])

    return fnbp.stateless(init, forward, backward, "gains")


def of_some(counting_some: Callable, loss: fnbp.Loss) -> fnbp.Loss:
    """A loss of which every third example does not count."""
    inner = counting_some(loss)

    def forward(p, t, mask=None):
        return inner.forward(p, (t, jnp.arange(p.shape[0]) % 3 != 1), *(() if mask is None else (mask,)))

    return fnbp.Loss(forward, inner.backward, "of some", lambda p, t, mask=None: None, takes_mask=True)


def used_twice(added: type) -> fnbp.Layer:
    """y = W x + W x^2: one matrix in two places."""

    def init(key, x):
        return {"W": jnp.ones((5, x.shape[-1]), x.dtype)}

    def forward(params, x):
        return (x + x**2) @ params["W"].T, (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"W": added(fnbp.Outer(dy, x), fnbp.Outer(dy, x**2))}, (1 + 2 * x) * (dy @ params["W"])

    return fnbp.stateless(init, forward, backward, "used twice")


def nearly_flat(n: int) -> fnbp.Layer:
    """x (m, k) spread over n outputs, each near the k-th of x / 16 that it stands for.

    Where log_softmax behind it rounds its y, all of a kind are rounded alike, and dx, a sum over each kind, shows it;
    the rounding of the result averages out.
    """
    offsets = np.linspace(-0.02, 0.02, n)

    def kinds(k: int) -> np.ndarray:
        return np.eye(k)[np.arange(n) % k] / 16

    def init(key, x):
        return {}

    def forward(params, x):
        return x @ jnp.asarray(kinds(x.shape[-1]), x.dtype).T + jnp.asarray(offsets, x.dtype), (x,)

    def backward(params, res, dy):
        (x,) = res
        return {}, dy @ jnp.asarray(kinds(x.shape[-1]), dy.dtype)

    return fnbp.stateless(init, forward, backward, "nearly_flat")
