"""What preconditioners make of Kronecker factors: trees of params whose leaves are KroneckerPairs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.sums import wide
from fnbp.pairs import KroneckerPair


def mapped(f: Callable[..., Any], pairs: Any, *trees: Any) -> Any:
    """The tree of f(pair, what stands there in the others)."""
    return jax.tree.map(f, pairs, *trees, is_leaf=lambda node: isinstance(node, KroneckerPair))


def zeros(forms: Any) -> Any:
    """Zeros of these shapes and dtypes."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), forms)


# --- moving averages ---


def moved(averages: Any, found: Any, decay: float) -> Any:
    """decay times the averages + (1 - decay) times what was found."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b.astype(a.dtype), averages, found)


def corrected(averages: Any, times: jax.Array, decay: float) -> Any:
    """Averages that began at 0, divided by 1 - decay^times, the sum of their weights."""
    return jax.tree.map(lambda a: a / (1 - decay ** times.astype(a.dtype)), averages)


# --- of one pair ---


def damped_inverse(pair: KroneckerPair, damping: float) -> KroneckerPair:
    """(A + pi sqrt(damping))^-1 and (G + sqrt(damping) / pi)^-1, pi^2 = (tr A / n_in) / (tr G / n_out).

    pi is 1 where A or G is 0, as of rows that nothing has looked up yet.
    """
    A = jnp.mean(pair.A if pair.diagonal else jnp.diagonal(pair.A, axis1=-2, axis2=-1), -1)
    G = jnp.mean(jnp.diagonal(pair.G, axis1=-2, axis2=-1), -1)
    there = (A != 0) & (G != 0)
    pi = jnp.sqrt(jnp.where(there, A, 1) / jnp.where(there, G, 1))
    return replace(input_inverse(pair, pi * damping**0.5), G=inverse(pair.G, damping**0.5 / pi))


def input_inverse(pair: KroneckerPair, damping: Any) -> KroneckerPair:
    """(A + damping)^-1 alone; one damping for each layer of a repeat, or for all."""
    damping = jnp.broadcast_to(jnp.asarray(damping, pair.A.dtype), pair.A.shape[: front(pair)])
    A = 1 / (pair.A + damping[..., None]) if pair.diagonal else inverse(pair.A, damping)
    return replace(pair, A=A, G=None)


def front(pair: KroneckerPair) -> int:
    """How many axes in front of A are layers of a repeat."""
    return pair.A.ndim - (1 if pair.diagonal else 2)


def inverse(matrix: jax.Array, damping: jax.Array) -> jax.Array:
    """(matrix + damping)^-1 of symmetric matrices (..., n, n), by Cholesky; NaN if one is not positive definite."""
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    root = jnp.linalg.cholesky(matrix + damping[..., None, None] * eye)
    half = jax.lax.linalg.triangular_solve(root, jnp.broadcast_to(eye, root.shape), left_side=True, lower=True)
    return jnp.swapaxes(half, -1, -2) @ half


def applied(pair: KroneckerPair, g: jax.Array) -> jax.Array:
    """G g A of a gradient, seen as a matrix; G g A with a diagonal A, or without G."""
    made = pair.matrix(wide(g).astype(pair.A.dtype))
    made = made * pair.A[..., None, :] if pair.diagonal else made @ pair.A
    made = made if pair.G is None else pair.G @ made
    return pair.param(made, g.shape).astype(g.dtype)


def bases_of(pair: KroneckerPair) -> KroneckerPair:
    """The eigenvectors of A and G. A diagonal stays as it is: its basis is that of its own numbers."""
    A = pair.A if pair.diagonal else jnp.linalg.eigh(pair.A)[1]
    return replace(pair, A=A, G=jnp.linalg.eigh(pair.G)[1])


def divided(bases: KroneckerPair, by: jax.Array, g: jax.Array) -> jax.Array:
    """U_G ((U_G^T g U_A) / by) U_A^T of a gradient, seen as a matrix."""
    U_A, U_G = None if bases.diagonal else bases.A, bases.G
    made = jnp.swapaxes(U_G, -1, -2) @ bases.matrix(wide(g).astype(U_G.dtype))
    made = (made if U_A is None else made @ U_A) / by
    made = U_G @ (made if U_A is None else made @ jnp.swapaxes(U_A, -1, -2))
    return bases.param(made, g.shape).astype(g.dtype)
