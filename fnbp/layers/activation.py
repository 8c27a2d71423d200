"""Activations: elementwise ones, and the two that normalise along the last axis."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_is, check_last_axis, check_number, choose
from fnbp.arrays.sums import log_total
from fnbp.construction import constructor
from fnbp.layer import Layer, parameterless
from fnbp.layers.widening import in_wide

__all__ = [
    "activation",
    "elu",
    "gelu",
    "identity",
    "leaky_relu",
    "log_softmax",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]

X = Float[Array, "*s"]


@constructor
def identity() -> Layer:
    """Return the input as it is.

        y = x      dx = dy

    Shapes: x, y (...); nothing saved.
    """

    def forward(x: X) -> tuple[X, tuple]:
        return x, ()

    def backward(res: tuple, dy: X) -> X:
        return dy

    return parameterless(forward, backward, "identity", "elementwise")


@constructor
def sigmoid() -> Layer:
    """The logistic function.

        y = 1 / (1 + e^-x)      dx = dy y (1 - y)

    Shapes:   x, y (...); saved y.
    Backward: fnbp/README.md, B4, with sigma'(x) = sigma(x) (1 - sigma(x)).
    """

    def forward(x: X) -> tuple[X, tuple]:
        y = jax.nn.sigmoid(x)
        return y, (y,)

    def backward(res: tuple, dy: X) -> X:
        (y,) = res
        return dy * y * (1 - y)

    return parameterless(forward, backward, "sigmoid", "elementwise")


@constructor
def tanh() -> Layer:
    """The hyperbolic tangent.

        y = tanh x      dx = dy (1 + y) (1 - y)

    Shapes:   x, y (...); saved y.
    Backward: fnbp/README.md, B4, with tanh'(x) = 1 - tanh^2 x.
    """

    def forward(x: X) -> tuple[X, tuple]:
        y = jnp.tanh(x)
        return y, (y,)

    def backward(res: tuple, dy: X) -> X:
        (y,) = res
        return dy * (1 + y) * (1 - y)  # 1 - y^2, without its cancellation near |y| = 1

    return parameterless(forward, backward, "tanh", "elementwise")


@constructor
def relu() -> Layer:
    """The rectified linear unit.

        y = max(x, 0)      dx = dy where x > 0, else 0

    Shapes:   x, y (...); saved x > 0, one byte for each element.
    Kink:     dx = 0 at x = 0, as in jax.nn.relu.
    Forward:  Nair & Hinton 2010, Rectified linear units improve restricted Boltzmann machines, ICML.
    Backward: fnbp/README.md, B4.
    """

    def forward(x: X) -> tuple[X, tuple]:
        return jax.nn.relu(x), (x > 0,)

    def backward(res: tuple, dy: X) -> X:
        (positive,) = res
        return jnp.where(positive, dy, 0)

    return parameterless(forward, backward, "relu", "elementwise")


@constructor
def leaky_relu(slope: float = 0.01) -> Layer:
    """The rectified linear unit with a slope below zero.

        y = x where x >= 0, else slope x      dx = dy where x >= 0, else slope dy

    Shapes:  x, y (...); saved x >= 0, one byte for each element.
    Kink:    dx = dy at x = 0, as in jax.nn.leaky_relu.
    Options: slope: dy/dx below zero.
    """
    slope = check_number("leaky_relu", "slope", slope)

    def forward(x: X) -> tuple[X, tuple]:
        positive = x >= 0
        return jnp.where(positive, x, slope * x), (positive,)

    def backward(res: tuple, dy: X) -> X:
        (positive,) = res
        return jnp.where(positive, dy, slope * dy)

    return parameterless(forward, backward, f"leaky_relu({slope:g})", "elementwise")


@constructor
def elu(alpha: float = 1.0) -> Layer:
    """The exponential linear unit.

        y = x where x > 0, else alpha (e^x - 1)      dx = dy where x > 0, else dy alpha e^x

    Shapes:  x, y (...); saved x.
    Kink:    dx = alpha dy at x = 0, which matters unless alpha = 1.
    Forward: Clevert et al. 2015, arXiv:1511.07289.
    Options: alpha: y tends to -alpha far below zero.
    """
    alpha = check_number("elu", "alpha", alpha)

    def forward(x: X) -> tuple[X, tuple]:
        return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x))), (x,)

    def backward(res: tuple, dy: X) -> X:
        (x,) = res
        # from x, not as y + alpha, which cancels far below 0
        return jnp.where(x > 0, dy, dy * (alpha * jnp.exp(jnp.where(x > 0, 0, x))))

    return parameterless(forward, backward, f"elu({alpha:g})", "elementwise")


@constructor
def softplus() -> Layer:
    """The smooth rectified linear unit.

        y = log(1 + e^x)      dx = dy sigma(x)

    Shapes: x, y (...); saved x.
    """

    def forward(x: X) -> tuple[X, tuple]:
        return jax.nn.softplus(x), (x,)

    def backward(res: tuple, dy: X) -> X:
        (x,) = res
        return dy * jax.nn.sigmoid(x)

    return parameterless(forward, backward, "softplus", "elementwise")


@constructor
def silu() -> Layer:
    """The sigmoid linear unit, also called swish.

        y = x s      dx = dy s (1 + x (1 - s))      s = sigma(x)

    Shapes:  x, y (...); saved x.
    Forward: Hendrycks & Gimpel 2016, arXiv:1606.08415; Elfwing et al. 2017, arXiv:1702.03118.
    """

    def forward(x: X) -> tuple[X, tuple]:
        return x * jax.nn.sigmoid(x), (x,)

    def backward(res: tuple, dy: X) -> X:
        (x,) = res
        s = jax.nn.sigmoid(x)
        return dy * s * (1 + x * (1 - s))

    return parameterless(*in_wide(forward, backward, x=0), "silu", "elementwise")


@constructor
def gelu(approximate: bool = False) -> Layer:
    """The Gaussian error linear unit, exact or in its tanh form.

        exact   y = x Phi(x)                     dx = dy (Phi + x phi)
                Phi = erfc(-x / sqrt 2) / 2      phi = e^(-x^2/2) / sqrt(2 pi)
        tanh    y = x s                          dx = dy s (1 + 2 x (1 - s) u')
                s = (1 + tanh u) / 2 = sigma(2u) u = sqrt(2/pi) (x + 0.044715 x^3)

    Shapes:  x, y (...); saved x.
    Forward: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    Options: approximate: True for the tanh form. JAX's gelu is the tanh form by default, PyTorch's is exact.
    Raises:  TypeError if approximate is not a bool.
    """
    check_is("gelu", "approximate", approximate, bool)
    if approximate:
        return gelu_tanh()

    def forward(x: X) -> tuple[X, tuple]:
        return x * jax.scipy.special.erfc(-x * math.sqrt(0.5)) / 2, (x,)

    def backward(res: tuple, dy: X) -> X:
        (x,) = res
        Phi = jax.scipy.special.erfc(-x * math.sqrt(0.5)) / 2
        phi = jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return dy * (Phi + x * phi)

    return parameterless(*in_wide(forward, backward, x=0), "gelu", "elementwise")


def gelu_tanh() -> Layer:
    """gelu in its tanh form, y = x s."""

    def share(x):  # s as a sigmoid: (1 + tanh u) / 2 cancels below 0
        return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    def forward(x: X) -> tuple[X, tuple]:
        return x * share(x), (x,)

    def backward(res: tuple, dy: X) -> X:
        (x,) = res
        s, slope = share(x), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return dy * s * (1 + 2 * x * (1 - s) * slope)

    # in a narrow dtype x^2 overflows where 1 - s is 0
    return parameterless(*in_wide(forward, backward, x=0), "gelu(approximate)", "elementwise")


@constructor
def log_softmax() -> Layer:
    """The logarithm of softmax, over the last axis.

        y = x - log sum e^x      dx = dy - e^y sum dy

    Shapes: x, y (..., k); saved y in at least float32, the dtype of the sums over k.
    """

    def forward(x: Float[Array, "*m k"]) -> tuple[Float[Array, "*m k"], tuple]:
        check_last_axis("log_softmax", x)
        M, r = log_total(x)
        y = (x - M) - jnp.log1p(r)
        return y, (y,)

    def backward(res: tuple, dy: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
        (y,) = res
        return dy - jnp.exp(y) * jnp.sum(dy, -1, keepdims=True)

    return parameterless(*in_wide(forward, backward, x=0), "log_softmax", "position")


@constructor
def softmax() -> Layer:
    """Turn scores into a distribution over the last axis.

        y = e^x / sum e^x      dx = y (dy - sum(dy y))

    Before softmax_cross_entropy leave it out: that loss contains it, in a stable form.

    Shapes:  x, y (..., k); saved y in at least float32, the dtype of the sums over k: near 1, a narrower y has no
             digit of 1 - y.
    Forward: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.3.
    """

    def forward(x: Float[Array, "*m k"]) -> tuple[Float[Array, "*m k"], tuple]:
        check_last_axis("softmax", x)
        y = jax.nn.softmax(x, -1)
        return y, (y,)

    def backward(res: tuple, dy: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
        (y,) = res
        return y * (dy - jnp.sum(dy * y, -1, keepdims=True))

    return parameterless(*in_wide(forward, backward, x=0), "softmax", "position")


ACTIVATIONS = {
    f.__name__: f for f in (identity, sigmoid, tanh, relu, leaky_relu, elu, softplus, silu, gelu, log_softmax, softmax)
}


def activation(name: str, **options: Any) -> Layer:
    """Make the activation called name, for settings that come as text: activation("elu", alpha=0.5).

    Raises: ValueError, with the nearest name, if no activation is called so.
    """
    return choose("activation", name, ACTIVATIONS, "activation: ")(**options)
