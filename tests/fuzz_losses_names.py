"""What the sources of tests/fuzz_losses.py call: numbers, views, and functions with derivatives of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def arr(seed: int, shape: tuple[int, ...], dtype: str | None = None) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(0.7 * np.random.default_rng(seed).normal(size=shape), dtype)


def ints(seed: int, n: int, shape: tuple[int, ...]) -> jax.Array:
    """Integers from 0 to n - 1."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, n, shape))


def mask(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """True and False, a constant."""
    return np.random.default_rng(seed).random(shape) < 0.6


view = jax.jit(lambda w: w.T)
itself = jax.jit(lambda w: w)
mixed = jax.jit(lambda w, x: (w, jnp.flip(w, 0) if w.ndim else w, jnp.sin(w * x)))
limited = jax.custom_vjp(lambda w: w)  # its rule is not linear
limited.defvjp(lambda w: (w, None), lambda _, g: (0.3 * jnp.tanh(3 * g),))
straight = jax.custom_vjp(lambda w: jnp.round(2 * w) / 2)
straight.defvjp(lambda w: (jnp.round(2 * w) / 2, None), lambda _, g: (g,))
against = jax.custom_vjp(lambda w: w)
against.defvjp(lambda w: (w, None), lambda _, g: (-0.5 * g,))
scaled = jax.custom_vjp(lambda x, s, b: x * s + b)  # three arguments of one shape; its rule doubles that of s
scaled.defvjp(lambda x, s, b: (x * s + b, (x, s)), lambda res, g: (g * res[1], 2 * g * res[0], g))
product = jax.custom_vjp(lambda x, w: x @ w)
product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, 3 * (res[0].T @ g)))
asked = jax.custom_vjp(lambda x, w: x * w)  # its rule asks which arguments have a derivative
asked.defvjp(
    lambda x, w: (x.value * w.value, (x.value, w.value, x.perturbed, w.perturbed)),
    lambda res, g: (g * res[1] * (1 + res[2]), g * res[0] * (1 + res[3])),
    symbolic_zeros=True,
)
powered = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(lambda n, x: x**n)
powered.defvjp(lambda n, x: (x**n, x), lambda n, x, g: (g * x**n,))


def doubled(f):
    """f with a rule of its own: twice the derivative."""
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda *c: jax.vjp(f, *c), lambda back, g: tuple(2 * d for d in back(g)))
    return ruled


def halved(f):
    """f with a rule of its own: half the derivative."""
    ruled = jax.custom_jvp(f)
    ruled.defjvp(lambda c, t: (f(*c), 0.5 * jax.jvp(f, c, t)[1]))
    return ruled


@jax.custom_jvp
def kinked(a, b):
    return jnp.where(a > b, a, b)


@kinked.defjvp
def kinked_jvp(primals, tangents):
    return kinked(*primals), 0.25 * tangents[0] + 0.75 * tangents[1]


@jax.custom_jvp
def bent(a):
    return jnp.sin(a)


@bent.defjvp
def bent_jvp(primals, tangents):
    return bent(*primals), 3 * jnp.cos(primals[0]) * tangents[0]
