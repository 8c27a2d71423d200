"""Right functions that lose digits: each with its backward by hand, and arguments at which it is ill-conditioned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Lossy(NamedTuple):
    """A function, its right backward (args, dy) -> cotangents, and a draw of arguments by the digits they lose."""

    f: Callable
    backward: Callable
    draw: Callable[[np.random.Generator, int], tuple]


def near(centre: float) -> Callable[[np.random.Generator, int], tuple]:
    """Rows beside a centre, at a distance of 10^-lost."""
    return lambda rng, lost: (centre + 10.0**-lost * rng.standard_normal((5, 7)),)


def variance(x: jax.Array) -> jax.Array:
    """The variance of each row."""
    return x.var(1)


def variance_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = 2 dy (x - mean) / n"""
    (x,) = args
    return (2 * dy[:, None] * (x - x.mean(1, keepdims=True)) / x.shape[1],)


def solve(A: jax.Array, b: jax.Array) -> jax.Array:
    """A^-1 b"""
    return jnp.linalg.solve(A, b)


def solve_backward(args: tuple, dy: jax.Array) -> tuple:
    """db = A^-T dy      dA = -db y^T"""
    A, b = args
    db = jnp.linalg.solve(A.T, dy)
    return -jnp.outer(db, jnp.linalg.solve(A, b)), db


def singular(rng: np.random.Generator, lost: int) -> tuple:
    """A matrix with a singular value of 10^-lost, and a vector."""
    u, _, v = np.linalg.svd(rng.standard_normal((5, 5)))
    return u @ np.diag([1, 1, 1, 1, 10.0**-lost]) @ v, rng.standard_normal(5)


def inverse_trace(A: jax.Array) -> jax.Array:
    """trace A^-1"""
    return jnp.trace(jnp.linalg.inv(A))


def inverse_trace_backward(args: tuple, dy: jax.Array) -> tuple:
    """dA = -dy (A^-2)^T"""
    inverse = jnp.linalg.inv(args[0])
    return (-dy * (inverse @ inverse).T,)


def squares(x: jax.Array, y: jax.Array) -> jax.Array:
    """x^2 - y^2, of neighbours"""
    return x * x - y * y


def squares_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = 2 x dy      dy = -2 y dy"""
    x, y = args
    return 2 * x * dy, -2 * y * dy


def neighbours(rng: np.random.Generator, lost: int) -> tuple:
    """Numbers, and others beside them."""
    x = rng.standard_normal((5, 7))
    return x, x * (1 + 10.0**-lost * rng.standard_normal((5, 7)))


def remainder(x: jax.Array) -> jax.Array:
    """log(1 + x) - x"""
    return jnp.log1p(x) - x


def remainder_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = -dy x / (1 + x)"""
    return (-dy * args[0] / (1 + args[0]),)


def alternating(x: jax.Array) -> jax.Array:
    """The running sum of each row with alternating signs, of neighbours"""
    return jnp.cumsum(x * (-1.0) ** jnp.arange(x.shape[1]), 1)


def alternating_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx_j = (-1)^j times the sum over i >= j of dy_i"""
    return (jnp.flip(jnp.cumsum(jnp.flip(dy, 1), 1), 1) * (-1.0) ** jnp.arange(dy.shape[1]),)


def expanded(x: jax.Array) -> jax.Array:
    """(x - 1)^5 by its coefficients, which cancel near 1"""
    return x**5 - 5 * x**4 + 10 * x**3 - 10 * x**2 + 5 * x - 1


def expanded_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = 5 dy (x^4 - 4 x^3 + 6 x^2 - 4 x + 1)"""
    (x,) = args
    return (5 * dy * (x**4 - 4 * x**3 + 6 * x**2 - 4 * x + 1),)


def log_sum(x: jax.Array) -> jax.Array:
    """log sum exp of each row, of large numbers"""
    return jax.nn.logsumexp(x, 1)


def log_sum_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = dy softmax(x)"""
    return (dy[:, None] * jax.nn.softmax(args[0], 1),)


def length(x: jax.Array) -> jax.Array:
    """The norm of each row, of small numbers"""
    return jnp.sqrt(jnp.sum(x * x, 1))


def length_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = dy x / |x|"""
    (x,) = args
    return (dy[:, None] * x / jnp.sqrt(jnp.sum(x * x, 1, keepdims=True)),)


def angle(x: jax.Array, y: jax.Array) -> jax.Array:
    """The cosine of the angle between two rows, of almost parallel ones"""
    return jnp.sum(x * y, 1) / jnp.sqrt(jnp.sum(x * x, 1) * jnp.sum(y * y, 1))


def angle_backward(args: tuple, dy: jax.Array) -> tuple:
    """dx = dy (y / (|x| |y|) - cos x / |x|^2)      dy: the same, exchanged"""
    x, y = args
    X, Y = (jnp.sum(a * a, 1, keepdims=True) for a in (x, y))
    size, cos = jnp.sqrt(X * Y), jnp.sum(x * y, 1, keepdims=True) / jnp.sqrt(X * Y)
    return dy[:, None] * (y / size - cos * x / X), dy[:, None] * (x / size - cos * y / Y)


LOSSY: tuple[Lossy, ...] = (
    Lossy(variance, variance_backward, near(3)),
    Lossy(solve, solve_backward, singular),
    Lossy(inverse_trace, inverse_trace_backward, lambda rng, lost: singular(rng, lost)[:1]),
    Lossy(squares, squares_backward, neighbours),
    Lossy(remainder, remainder_backward, near(0)),
    Lossy(alternating, alternating_backward, near(1)),
    Lossy(expanded, expanded_backward, near(1)),
    Lossy(log_sum, log_sum_backward, near(300)),
    Lossy(length, length_backward, near(0)),
    Lossy(angle, angle_backward, neighbours),
)


def compare_lossy(seed: int) -> Any:
    """Compare one of them, at arguments that lose 1 to 5 digits. Returns: the report."""
    import fnbp

    one, rng = LOSSY[seed % len(LOSSY)], np.random.default_rng([11, seed])
    args = tuple(np.asarray(a, np.float32) for a in one.draw(rng, 1 + seed // len(LOSSY) % 5))
    return fnbp.compare(one.f, *args, vjp=one.backward, key=jax.random.key(seed))
