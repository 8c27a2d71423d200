"""Initializers of jax.nn.initializers by name, for weights of shape (n_out, n_in)."""

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
    """Make an initializer of orthogonal matrices, in at least float32: narrower dtypes have no QR decomposition."""
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
    """Return the initializer (key, shape, dtype) -> array called name; a function is returned as it is.

        glorot_*   variance 2 / (fan_in + fan_out)    Glorot & Bengio 2010
        he_*       variance 2 / fan_in                He et al. 2015, arXiv:1502.01852
        lecun_*    variance 1 / fan_in
        normal     variance 1          orthogonal, zeros, ones

    Options: in_axis, out_axis: the axes of the shape that count inputs and outputs; of W in fnbp the last two.
    Raises:  ValueError, with the nearest name, if no initializer is called so.
    """
    if callable(name) and not hasattr(name, "backward"):  # a Layer is callable, to say that it is not
        return name
    if isinstance(name, str) and name in FANNED:
        return FANNED[name](in_axis=in_axis, out_axis=out_axis)
    return choose("initializer", name, {**PLAIN, **FANNED})()


def initialiser(name: str | Callable, in_axis: int = -1, out_axis: int = -2) -> Callable:
    """Deprecated spelling of fnbp.initializer."""
    warnings.warn("fnbp.initialiser is now fnbp.initializer", DeprecationWarning, stacklevel=2)
    return initializer(name, in_axis, out_axis)


def initializer_of(
    layer: str, leaf: str, given: str | Callable, in_axis: int = -1, out_axis: int = -2, hint: str = ""
) -> Callable:
    """Return the initializer of parameter leaf of a layer, from what the user gave.

    Options: hint: what else the user may have meant, for the message.
    Raises:  ValueError, with the names of both, if given is not an initializer, or makes another shape.
    """
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
    """make, which counts inputs and outputs. Raise a ValueError, with both names, if the parameter is not a matrix."""

    def init(key, shape, dtype):
        if len(shape) < 2:
            raise ValueError(
                f"{layer}: {leaf}: {name} is for matrices, {leaf} has shape {tuple(shape)}; use normal, ones or zeros"
            )
        return make(key, shape, dtype)

    return init
