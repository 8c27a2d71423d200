"""Floating point operations of the products in a program: matrix products and convolutions, those of loops too."""

import math
from typing import Any

import jax
from jax.extend import core


def products_of(function: Any, *args: Any) -> int:
    """2 n for each number that a product or a convolution makes of n pairs, times the turns of the scans around it.

    XLA's own count takes the body of a loop once. Of several branches the first counts, of a while loop one turn.
    """
    return in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def in_jaxpr(jaxpr: Any) -> int:
    """The operations of all equations."""
    return sum(map(of_equation, jaxpr.eqns))


def of_equation(eqn: Any) -> int:
    """The operations of one equation."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
    if name == "conv_general_dilated":
        return of_convolution(eqn.params, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, out.shape)
    inner = [part for value in eqn.params.values() for part in jaxprs_in(value)]
    if name == "cond":
        inner = inner[:1]
    return (eqn.params["length"] if name == "scan" else 1) * sum(map(in_jaxpr, inner))


def of_convolution(params: Any, image: Any, kernel: Any, out: Any) -> int:
    """Of each number of the result as many pairs as meet data: none where x is only padding, or zeros put between."""
    numbers = params["dimension_numbers"]
    places = [image[axis] for axis in numbers.lhs_spec[2:]]
    window = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    ends = [out[axis] for axis in numbers.out_spec[2:]]
    met = 1
    for axis, (n, k, m) in enumerate(zip(places, window, ends, strict=True)):
        stride, low = params["window_strides"][axis], params["padding"][axis][0]
        between, apart = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        met *= sum(
            (at := i * stride + j * apart - low) % between == 0 and 0 <= at // between < n
            for i in range(m)
            for j in range(k)
        )
    features = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    return 2 * met * features


def jaxprs_in(value: Any) -> list[Any]:
    """The programs among the parameters of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [part for one in value for part in jaxprs_in(one)] if isinstance(value, (tuple, list)) else []
