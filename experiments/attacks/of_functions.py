"""Attacks by forward rules, cotangents, complex numbers, rules of autodiff, magnitudes, values and rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attacks.attack import POSITIVE, X, custom, function, rng, square

# --- a custom_vjp whose forward rule returns another value ---


def tanh(x: Any) -> Any:
    """y = tanh(x)"""
    return jnp.tanh(x)


def tanh_back(y: Any, dy: Any) -> Any:
    """dx = dy (1 - y^2)"""
    return (dy * (1 - y**2),)


def off_by(scale: float) -> Any:
    """A forward rule that returns (1 + scale) y."""
    return lambda x: (jnp.tanh(x) * (1 + scale), jnp.tanh(x))


FORWARD_RULES = (
    custom("forward rule", "off by 1e-4", tanh, off_by(1e-4), tanh_back, X),
    custom("forward rule", "off by 1e-9", tanh, off_by(1e-9), tanh_back, X),
    custom(
        "forward rule",
        "another function at large x",
        tanh,
        lambda x: (jnp.where(abs(x) > 4, 1.5, jnp.tanh(x)), jnp.tanh(x)),
        tanh_back,
        X,
    ),
    custom(
        "forward rule",
        "0 where x is 0, not 1",
        jnp.cos,
        lambda x: (jnp.where(x == 0, 0, jnp.cos(x)), x),
        lambda x, dy: (-dy * jnp.sin(x),),
        X,
    ),
    custom("forward rule", "right", tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), tanh_back, X, right=True),
)


# --- cotangents ---


def square_with(change: Callable[[Any], Any]) -> Any:
    """The backward of x^2, of a changed cotangent."""
    return lambda args, dy: (2 * args[0] * change(dy),)


COTANGENTS = (
    function("dy", "clipped at 1e7", square, square_with(lambda dy: jnp.clip(dy, -1e7, 1e7)), X),
    function("dy", "flushed below 1e-15", square, square_with(lambda dy: jnp.where(abs(dy) < 1e-15, 0, dy)), X),
    function(
        "dy",
        "NaN where dy is all 0",
        square,
        square_with(lambda dy: dy * (jnp.linalg.norm(dy) / jnp.linalg.norm(dy))),
        X,
    ),
    function(
        "dy", "1e-6 more where dy is all 0", square, lambda args, dy: (2 * args[0] * dy + 1e-6 * jnp.all(dy == 0),), X
    ),
    function(
        "dy",
        "rows of dy that are 0 get the mean",
        square,
        square_with(lambda dy: jnp.where(jnp.all(dy == 0, 1, keepdims=True), dy.mean(), dy)),
        X,
    ),
    function("dy", "wrong for a constant dy", square, square_with(lambda dy: jnp.where(dy.std() == 0, 2 * dy, dy)), X),
    function(
        "dy",
        "clipped by norm at 1e4",
        square,
        square_with(lambda dy: dy * jnp.minimum(1, 1e4 / jnp.maximum(jnp.linalg.norm(dy), 1e-30))),
        X,
    ),
    function(
        "dy",
        "wrong where its elements differ by 1e5",
        square,
        square_with(lambda dy: jnp.where(abs(dy) < 1e-5 * abs(dy).max(), 0, dy)),
        X,
    ),
    function(
        "dy",
        "right: scaled by its own size",
        square,
        square_with(lambda dy: (dy / jnp.maximum(abs(dy).max(), 1e-30)) * jnp.maximum(abs(dy).max(), 1e-30)),
        X,
        right=True,
    ),
)


# --- complex numbers ---

Z = (X + 1j * rng.standard_normal(X.shape)).astype(np.complex64)


def times(a: Any, z: Any) -> Any:
    """y = a z, a real"""
    return a * z


def modulus(z: Any) -> Any:
    """y = |z|^2"""
    return jnp.abs(z) ** 2


COMPLEX = (
    function(
        "complex",
        "conjugate forgotten beside a real argument",
        times,
        lambda a, dy: (jnp.real(dy * jnp.conj(a[1])), dy * a[0]),
        X,
        Z,
    ),
    function("complex", "conjugate of a squared modulus", modulus, lambda a, dy: (2 * a[0] * dy,), Z),
    function(
        "complex",
        "imaginary part dropped",
        lambda z: z**2,
        lambda a, dy: ((2 * jnp.real(a[0]) * dy).astype(dy.dtype),),
        Z,
    ),
    function("complex", "sign of the imaginary part", jnp.imag, lambda a, dy: (1j * dy.astype(a[0].dtype),), Z),
    function("complex", "right: a z", times, lambda a, dy: (jnp.real(dy * a[1]), dy * a[0]), X, Z, right=True),
    function("complex", "right: |z|^2", modulus, lambda a, dy: (2 * jnp.conj(a[0]) * dy,), Z, right=True),
    function("complex", "right: fft", jnp.fft.fft, lambda a, dy: (jnp.fft.fft(dy),), Z, right=True),
)


# --- where autodiff has no answer, or a wrong one ---


def root(x: Any) -> Any:
    """y = sqrt(x) where x > 0: autodiff is NaN elsewhere."""
    return jnp.where(x > 0, jnp.sqrt(x), 0)


def power_of(x: Any) -> Any:
    """y = x^1.5 where x > 0"""
    return jnp.where(x > 0, x**1.5, 0)


def safe_log(x: Any) -> Any:
    """y = log(x) where x > 0.1"""
    return jnp.where(x > 0.1, jnp.log(x), 0)


@jax.custom_jvp
def doubled_rule(x: Any) -> Any:
    """sin, with a rule of its own that is twice the derivative."""
    return jnp.sin(x)


doubled_rule.defjvps(lambda dx, y, x: 2 * jnp.cos(x) * dx)


@jax.custom_jvp
def absolute_rule(x: Any) -> Any:
    """x, with the rule of |x|."""
    return 1.0 * x


absolute_rule.defjvps(lambda dx, y, x: jnp.sign(x) * dx)


@jax.custom_vjp
def lost_rule(x: Any) -> Any:
    """x^2, whose own backward is x."""
    return x**2


lost_rule.defvjp(lambda x: (x**2, x), lambda x, dy: (x * dy,))


def root_slope(x: Any) -> Any:
    """The slope of root."""
    return jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


NO_ANSWER = (
    function(
        "no answer",
        "slope 7 of a root at x < 0",
        root,
        lambda a, dy: (dy * jnp.where(a[0] > 0, root_slope(a[0]), 7),),
        X,
    ),
    function(
        "no answer",
        "slope 1 of a root at x < 0",
        root,
        lambda a, dy: (dy * jnp.where(a[0] > 0, root_slope(a[0]), 1),),
        X,
    ),
    function(
        "no answer",
        "slope -1 of a power at x < 0",
        power_of,
        lambda a, dy: (dy * jnp.where(a[0] > 0, 1.5 * abs(a[0]) ** 0.5, -1),),
        X,
    ),
    function(
        "no answer",
        "slope of a logarithm out of its domain",
        safe_log,
        lambda a, dy: (dy * jnp.where(a[0] > 0.1, 1 / a[0], 3),),
        X,
    ),
    function("a rule", "a rule that is twice the slope", doubled_rule, lambda a, dy: (2 * jnp.cos(a[0]) * dy,), X),
    function("a rule", "the rule of |x| for x", absolute_rule, lambda a, dy: (jnp.sign(a[0]) * dy,), X),
    function("a rule", "a custom_vjp in the forward, half the slope", lost_rule, lambda a, dy: (a[0] * dy,), X),
    function("no answer", "right: the root", root, lambda a, dy: (dy * root_slope(a[0]),), POSITIVE, right=True),
)


# --- small elements beside large ones ---


def exponential(x: Any) -> Any:
    """y = e^x"""
    return jnp.exp(x)


WIDE = np.linspace(-20, 5, 77, dtype=np.float32).reshape(7, 11)
COLUMN = np.where(np.arange(11) == 3, np.float32(1e-16), np.float32(1)) * X


def scaled_columns(x: Any) -> Any:
    """y = x^2, of columns of other scales"""
    return x**2


BANDS = (
    function(
        "bands",
        "exp wrong at x < -8",
        exponential,
        lambda a, dy: (dy * jnp.exp(a[0]) * jnp.where(a[0] < -8, 1.5, 1),),
        WIDE,
    ),
    function(
        "bands", "exp is 0 at x < -15", exponential, lambda a, dy: (dy * jnp.where(a[0] < -15, 0, jnp.exp(a[0])),), WIDE
    ),
    function(
        "bands",
        "a column of scale 1e-16",
        scaled_columns,
        lambda a, dy: (2 * dy * a[0] * jnp.where(jnp.arange(11) == 3, 2, 1),),
        COLUMN,
    ),
    function(
        "bands",
        "a column of scale 1e-16 with another's sign",
        scaled_columns,
        lambda a, dy: (2 * dy * a[0] * jnp.where(jnp.arange(11) == 3, -1, 1),),
        COLUMN,
    ),
    function("bands", "right", exponential, lambda a, dy: (dy * jnp.exp(a[0]),), WIDE, right=True),
    function(
        "bands",
        "right: 1 - y^2 where y is near 1",
        tanh,
        lambda a, dy: (dy * (1 - jnp.tanh(a[0]) ** 2),),
        WIDE,
        right=True,
    ),
)


# --- values that are seldom met ---


def flag(x: Any, on: Any) -> Any:
    """y = x^2 where a flag is on, else x"""
    return jnp.where(on, x**2, x)


VALUES = (
    function("values", "x == 1", square, lambda a, dy: (dy * jnp.where(a[0] == 1, 3, 2 * a[0]),), X),
    function("values", "x == -1", square, lambda a, dy: (dy * jnp.where(a[0] == -1, 3, 2 * a[0]),), X),
    function(
        "values", "all x equal", square, lambda a, dy: (dy * jnp.where(jnp.all(a[0] == a[0][0, 0]), 3, 2) * a[0],), X
    ),
    function(
        "values", "all x 0", exponential, lambda a, dy: (dy * jnp.where(jnp.all(a[0] == 0), 0, jnp.exp(a[0])),), X
    ),
    function(
        "values",
        "a whole row constant",
        square,
        lambda a, dy: (dy * jnp.where(a[0].std(1, keepdims=True) == 0, 1, 2) * a[0],),
        X,
    ),
    function("values", "x above 3.7", square, lambda a, dy: (dy * jnp.where(a[0] > 3.7, 3, 2) * a[0],), X),
    function(
        "values", "x exactly 0.3", square, lambda a, dy: (dy * jnp.where(a[0] == jnp.float32(0.25), 3, 2) * a[0],), X
    ),
    function(
        "values",
        "between 11 and 12",
        square,
        lambda a, dy: (dy * jnp.where((a[0] > 11) & (a[0] < 12), 3, 2) * a[0],),
        X,
    ),
    function(
        "values",
        "a flag that is True",
        flag,
        lambda a, dy: (dy * jnp.where(a[1], a[0], 1), None),
        X,
        np.zeros(X.shape, bool) | (np.arange(11) == 2) & (np.arange(7) == 0)[:, None],
    ),
    function(
        "values",
        "denormals",
        square,
        lambda a, dy: (dy * jnp.where((abs(a[0]) < 1e-38) & (a[0] != 0), 3, 2) * a[0],),
        X,
    ),
    function(
        "values",
        "all flags are False",
        flag,
        lambda a, dy: (dy * jnp.where(a[1], 2 * a[0], jnp.where(jnp.any(a[1]), 1, 2)), None),
        X,
        X > 0,
    ),
    function(
        "values", "a sum above 1000", square, lambda a, dy: (dy * jnp.where(jnp.sum(a[0]) > 1000, 3, 2) * a[0],), X
    ),
    function("values", "all x negative", square, lambda a, dy: (dy * jnp.where(jnp.all(a[0] < 0), 3, 2) * a[0],), X),
)
