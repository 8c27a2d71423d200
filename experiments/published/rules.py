"""Backwards with a rule of their own: clipped, reversed, straight through, implicit, and the choices at a kink."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.published.entry import Entry, normal, with_backward

DOCS = "JAX docs, custom derivative rules"
COURSE = "as in CS231n, course notes and assignments"
BENGIO = "Bengio et al. 2013, arXiv:1308.3432"
GANIN = "Ganin & Lempitsky 2015, arXiv:1409.7495"

X = normal(30, (11, 5))[0]
BOUNDS = (np.float32(-0.5), np.float32(0.5))
CONTRACTION = (*normal(31, (5, 5), scale=0.15), *normal(32, (5,)))


def clip_gradient(low: jax.Array, high: jax.Array, x: jax.Array):
    """y = x."""
    return x


clipped = with_backward(
    clip_gradient,
    lambda low, high, x: (x, (low, high)),
    lambda bounds, dy: (None, None, jnp.clip(dy, *bounds)),
)


def identity(x: jax.Array):
    """y = x."""
    return x


reversed_gradient = with_backward(identity, lambda x: (x, None), lambda _, dy: (-dy,))


def rounded(x: jax.Array):
    """y = round(x)."""
    return jnp.round(x)


def straight_through(x: jax.Array):
    """round(x), by autodiff the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


estimator = with_backward(rounded, lambda x: (jnp.round(x), None), lambda _, dy: (dy,))


def relu(x: jax.Array):
    """y = max(x, 0)."""
    return jnp.maximum(x, 0)


def relu_backward(args: tuple, dy: jax.Array):
    """dx = dy where x > 0."""
    (x,) = args
    return (jnp.where(x > 0, dy, 0),)


def largest(x: jax.Array):
    """The maximum of each row."""
    return jnp.max(x, -1)


def largest_backward(args: tuple, dy: jax.Array):
    """All of dy to every element that is the maximum."""
    (x,) = args
    return (dy[:, None] * (x == jnp.max(x, -1, keepdims=True)),)


def shared_backward(args: tuple, dy: jax.Array):
    """dy in equal parts to every element that is the maximum."""
    (x,) = args
    tie = x == jnp.max(x, -1, keepdims=True)
    return (jnp.where(tie, dy[:, None] / jnp.sum(tie, -1, keepdims=True), 0).astype(x.dtype),)


def first_backward(args: tuple, dy: jax.Array):
    """All of dy to the first element that is the maximum."""
    (x,) = args
    return (dy[:, None] * jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1], dtype=x.dtype),)


def softmax_backward(args: tuple, dy: jax.Array):
    """dx = p dy - p (p . dy), the Jacobian diag(p) - p p^T in one line."""
    (x,) = args
    p = jax.nn.softmax(x)
    return (p * (dy - jnp.sum(dy * p, -1, keepdims=True)),)


# --- a fixed point ---


def step(W: jax.Array, b: jax.Array, x: jax.Array):
    """x' = tanh(W x + b)."""
    return jnp.tanh(W @ x + b)


def unrolled(W: jax.Array, b: jax.Array):
    """The fixed point, by steps enough for float64."""
    return jax.lax.scan(lambda x, _: (step(W, b, x), None), jnp.zeros_like(b), length=60)[0]


def iterated(f: Callable, x: jax.Array, tolerance: Any):
    """x = f(x), until a step is within tolerance."""

    def apart(pair):
        return jnp.max(abs(pair[0] - pair[1])) > tolerance

    return jax.lax.while_loop(apart, lambda pair: (pair[1], f(pair[1])), (x, f(x)))[1]


def fixed_point(tolerance: float | None):
    """The fixed point as a custom_vjp: u = dx + u df/dx, itself a fixed point, then u df/d(W, b)."""

    def least(x):
        return tolerance or 8 * jnp.finfo(x.dtype).eps

    def solve(W, b):
        return iterated(lambda x: step(W, b, x), jnp.zeros_like(b), least(b))

    def saves(W, b):
        x = solve(W, b)
        return x, (W, b, x)

    def back(res, dx):
        W, b, x = res
        _, pull_x = jax.vjp(lambda x: step(W, b, x), x)
        u = iterated(lambda u: dx + pull_x(u)[0], dx, least(dx))
        return jax.vjp(lambda W, b: step(W, b, x), W, b)[1](u)

    return with_backward(solve, saves, back)


DRAWS = {"probes": ("given", "another", "nearby")}
ENTRIES = (
    Entry(
        "clip_gradient",
        DOCS,
        clipped,
        (*BOUNDS, X),
        reference=clip_gradient,
        expected="formula",
        bfloat16="formula",
        right=False,
        deliberate=True,
    ),
    Entry(
        "gradient reversal",
        GANIN,
        reversed_gradient,
        (X,),
        reference=identity,
        expected="formula",
        bfloat16="formula",
        right=False,
        deliberate=True,
    ),
    Entry(
        "straight-through, beside round",
        BENGIO,
        estimator,
        (X,),
        reference=rounded,
        expected="formula",
        bfloat16="formula",
        right=False,
        deliberate=True,
    ),
    Entry(
        "straight-through, beside its own rule",
        BENGIO,
        estimator,
        (X,),
        reference=straight_through,
        expected="convention",
        bfloat16="convention",
        remark="autodiff is told the rule too; differences of the forward tell",
    ),
    Entry(
        "relu, 0 at 0",
        COURSE,
        relu,
        (X,),
        relu_backward,
        expected="convention",
        bfloat16="convention",
        remark="autodiff of max has 1/2 there",
    ),
    Entry(
        "maximum, all of dy to every tie",
        COURSE,
        largest,
        (X,),
        largest_backward,
        expected="formula",
        bfloat16="formula",
        mended="maximum, dy shared by a tie",
        remark="the parts of a tie must sum to dy",
    ),
    Entry("maximum, dy shared by a tie", "ours", largest, (X,), shared_backward),
    Entry(
        "maximum, dy to the first",
        COURSE,
        largest,
        (X,),
        first_backward,
        expected="convention",
        bfloat16="convention",
        remark="autodiff shares dy out among a tie",
    ),
    Entry("softmax, p (dy - p . dy)", "folklore: diag(p) - p p^T", jax.nn.softmax, (X,), softmax_backward),
    Entry(
        "fixed point, steps below 1e-6",
        DOCS + ", implicit differentiation",
        fixed_point(1e-6),
        CONTRACTION,
        reference=unrolled,
        expected="formula",
        bfloat16=None,
        options=DRAWS,
        remark="float64 gains nothing; in bfloat16 it may never stop",
        mended="fixed point, steps below 8 roundings",
    ),
    Entry(
        "fixed point, steps below 8 roundings",
        "ours",
        fixed_point(None),
        CONTRACTION,
        reference=unrolled,
        bfloat16=None,
        options=DRAWS,
    ),
)
