"""Initializers of jax.nn.initializers by name, for weights whose fans stand where fnbp puts them."""

import warnings
from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import initializers

from fnbp.arrays.checks import choose, describe, shown

__all__ = ["initialiser", "initializer"]

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


def initializer(name: str | Callable, in_axis: int = -1, out_axis: int = -2) -> Callable:
    """The initializer (key, shape, dtype) -> array of that name; a function is returned as it is.

        glorot_*   variance 2 / (fan_in + fan_out)    Glorot & Bengio 2010
        he_*       variance 2 / fan_in                He et al. 2015, arXiv:1502.01852
        lecun_*    variance 1 / fan_in
        normal     variance 1          orthogonal, zeros, ones

    Raises: ValueError, with the nearest name, where there is none of that name.
    """
    if callable(name) and not hasattr(name, "backward"):  # a Layer is callable, to say that it is not
        return name
    if isinstance(name, str) and name in FANNED:
        return FANNED[name](in_axis=in_axis, out_axis=out_axis)
    return choose("initializer", name, {**PLAIN, **FANNED})()


def initialiser(name: str | Callable, in_axis: int = -1, out_axis: int = -2) -> Callable:
    """The former spelling of fnbp.initializer. Deprecated."""
    warnings.warn("fnbp.initialiser is now fnbp.initializer", DeprecationWarning, stacklevel=2)
    return initializer(name, in_axis, out_axis)


def initializer_of(
    layer: str, leaf: str, given: str | Callable, in_axis: int = -1, out_axis: int = -2, hint: str = ""
) -> Callable:
    """initializer, for a parameter of a layer. ValueError, with the names of both, for what is none, or makes another
    shape; hint: what else a person may have meant by it."""
    if isinstance(given, str):
        try:
            make = initializer(given, in_axis, out_axis)
        except ValueError as error:
            raise ValueError(f"{layer}: {leaf}: {error}") from None
        return make if given in ("zeros", "ones", "normal") else of_matrices(layer, leaf, given, make)
    if not callable(given) or hasattr(given, "backward"):
        raise ValueError(
            f"{layer}: {leaf} must be an initializer, a name or a function (key, shape, dtype) -> array, got "
            f"{describe(given) if callable(given) else shown(given)}{hint}"
        )

    def init(key, shape, dtype):
        made = given(key, shape, dtype)
        if callable(made):
            name = getattr(given, "__name__", "f")
            raise TypeError(f"{layer}: {leaf}: {name} makes an initializer; call it: {leaf}={name}()")
        if jnp.shape(made) != tuple(shape):
            raise ValueError(f"{layer}: the initializer of {leaf} must make shape {tuple(shape)}, got {describe(made)}")
        return made

    return init


def of_matrices(layer: str, leaf: str, name: str, make: Callable) -> Callable:
    """An initializer that counts the inputs and outputs of a matrix. ValueError, with both names, for anything less."""

    def init(key, shape, dtype):
        if len(shape) < 2:
            raise ValueError(
                f"{layer}: {leaf}: {name} is for matrices, {leaf} has shape {tuple(shape)}; use normal, ones or zeros"
            )
        return make(key, shape, dtype)

    return init
