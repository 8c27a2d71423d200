"""The parameters of a layer: drawn, checked, and a factor for each. Some may be absent, as a bias with b=None."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fnbp.arrays.checks import check_floating, check_last_axis, check_params
from fnbp.factor import Factor
from fnbp.layers.initializers import initializer_of

MOST_NUMBERS = 2**36  # of one parameter: 256 GiB in float32

Shapes = Mapping[str, tuple[int, ...]]


def weights(name: str, shapes: Callable[[Any], Shapes], **makers: Callable | None) -> tuple[Callable, Callable]:
    """Make the init (key, x) -> params of the layer called name, and its check (params, x) -> None.

    Options: shapes: a function from x to the shape of each parameter, by name. makers: an initializer for each
             parameter; None if the layer has no such parameter, even if shapes lists it.
    """

    def held(x: Any) -> Shapes:
        return those_of(makers, shapes(x))

    def init(key: Any, x: Any) -> dict[str, jax.Array]:
        check_floating(name, "x", x)
        check_last_axis(name, x)
        return drawn(name, key, shapes(x), makers, x.dtype)

    def check(params: Any, x: Any) -> None:
        check_params(name, params, x, held)

    return init, check


def drawn(
    name: str, key: Any, shapes: Shapes, makers: Mapping[str, Callable | None], dtype: Any
) -> dict[str, jax.Array]:
    """Draw the parameters of a layer, one key for each maker. Raise a ValueError if one exceeds any device."""
    held = those_of(makers, shapes)
    for leaf, shape in held.items():
        check_numbers(name, leaf, shape)
    keys = dict(zip(makers, jax.random.split(key, len(makers)), strict=True))
    return {leaf: make(keys[leaf], held[leaf], dtype) for leaf, make in makers.items() if make is not None}


def those_of(makers: Mapping[str, Callable | None], shapes: Shapes) -> Shapes:
    """The shapes of the parameters that the layer has."""
    return {leaf: shape for leaf, shape in shapes.items() if makers.get(leaf) is not None}


def optional(name: str, leaf: str, given: str | Callable | None) -> Callable | None:
    """The initializer of parameter leaf of the layer called name; None, for no such parameter, if given is None."""
    return None if given is None else initializer_of(name, leaf, given)


def add_bias(z: jax.Array, params: Mapping[str, Any], leaf: str = "b") -> jax.Array:
    """z + b, or z if the layer has no bias of that name."""
    return z + params[leaf] if leaf in params else z


def due(params: Mapping[str, Any], **factors: Factor) -> dict[str, Factor]:
    """A factor for each parameter that the layer has."""
    return {leaf: factor for leaf, factor in factors.items() if leaf in params}


def check_numbers(name: str, leaf: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if a parameter of that shape has more numbers than any device holds."""
    if math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"{name}: {leaf} of shape {shape} is too large: {math.prod(shape):,} numbers")
