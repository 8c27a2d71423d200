"""Initialisers of jax.nn.initializers by name, for weights whose fans stand where fnbp puts them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers

from fnbp.checks import check_floating, choose

FANNED = {
    "glorot_normal": initializers.glorot_normal,
    "glorot_uniform": initializers.glorot_uniform,
    "he_normal": initializers.he_normal,
    "he_uniform": initializers.he_uniform,
    "lecun_normal": initializers.lecun_normal,
    "lecun_uniform": initializers.lecun_uniform,
}


def orthogonal() -> Callable:
    """An orthogonal matrix, found in at least float32: narrower dtypes have no QR decomposition."""
    make = initializers.orthogonal()

    def init(key, shape, dtype):
        return make(key, shape, dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32).astype(dtype)

    return init


PLAIN = {
    "normal": lambda: initializers.normal(1.0),
    "ones": lambda: initializers.ones,
    "orthogonal": orthogonal,
    "zeros": lambda: initializers.zeros,
}


def initialiser(name: str | Callable, in_axis: int = -1, out_axis: int = -2) -> Callable:
    """The initialiser (key, shape, dtype) -> array of that name; a function is returned as it is.

        glorot_*   variance 2 / (fan_in + fan_out)    Glorot & Bengio 2010
        he_*       variance 2 / fan_in                He et al. 2015, arXiv:1502.01852
        lecun_*    variance 1 / fan_in
        normal     variance 1          orthogonal, zeros, ones

    Raises: ValueError, with the nearest name, where there is none of that name.
    """
    if callable(name):
        return name
    if name in FANNED:
        return FANNED[name](in_axis=in_axis, out_axis=out_axis)
    return choose("initialiser", name, {**PLAIN, **FANNED})()


def weights(name: str, shapes: Callable, makers: dict[str, Callable]) -> Callable:
    """The init (key, x) -> params of a layer of that name, a key for each maker.

    shapes: x -> the shape of each parameter, by name; one without a shape is left out.
    """

    def init(key, x):
        check_floating(name, "x", x)
        if not x.shape or not x.shape[-1]:
            raise ValueError(f"{name}: x must have a last axis of at least 1, got shape {x.shape}")
        keys = dict(zip(makers, jax.random.split(key, len(makers)), strict=True))
        return {leaf: makers[leaf](keys[leaf], shape, x.dtype) for leaf, shape in shapes(x).items()}

    return init
