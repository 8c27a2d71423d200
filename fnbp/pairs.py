"""The contraction kronecker: A and G of a parameter, whose Kronecker product stands for its curvature."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.contractions import CHUNK, Contraction, flat, quadratic

__all__ = ["KroneckerPair", "kronecker"]

MOST = 1 << 26  # elements of the second moment of a gradient that is no matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerPair:
    """A and G of a parameter: of its gradient as a matrix (n_out, n_in), G stands for the rows and A for the columns.

    A, G      the two matrices, also as A, G = pair; axes in front are the layers of a repeat
    turned    True if the parameter is (n_in, ..., n_out), as of an embedding, so that A stands for the rows
    diagonal  True if A is a diagonal, (n_in,)
    """

    A: Any
    G: Any
    turned: bool = field(default=False, metadata={"static": True})
    diagonal: bool = field(default=False, metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        return iter((self.A, self.G))

    def __getitem__(self, i: int) -> Any:
        return (self.A, self.G)[i]

    def fits(self, other: "KroneckerPair") -> bool:
        """True if both stand for matrices of one shape, or of its transpose."""
        one, two = ((pair.A.shape[-1], pair.G.shape[-1]) for pair in (self, other))
        return two == (one if self.turned == other.turned else one[::-1])

    def matrix(self, g: jax.Array) -> jax.Array:
        """An array of the shape of the parameter as (..., n_out, n_in), with as many axes in front as A has."""
        n, front = self.A.shape[-1], g.shape[: self.A.ndim - (1 if self.diagonal else 2)]
        return jnp.swapaxes(g.reshape(*front, n, -1), -1, -2) if self.turned else g.reshape(*front, -1, n)

    def param(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of matrix: in the shape of the parameter."""
        return (jnp.swapaxes(matrix, -1, -2) if self.turned else matrix).reshape(shape)


def kronecker(reduce: str = "expand") -> Contraction:
    """The KroneckerPair (A, G) of each parameter: the second moments of what goes in and of the error of each example.

        expand  A = sum_is x_is x_is^T / (m S)        G = sum_is d_is d_is^T / m
        reduce  A = sum_i xbar_i xbar_i^T / m         G = sum_i dbar_i dbar_i^T / m
                xbar_i the mean over positions, dbar_i the sum

    A parameter that is used in two places has the pair of its outer products in both. Where one place looks up its rows
    and the other scores by them, w = tr A tr G of each place, and A = sum w A / tr A / sum w, G = sum w G / tr G, with
    A and G of the second place exchanged: it stands for the sum of two Kronecker products, and has their trace.

    A bias has A = 1. An embedding has as A the diagonal, (size,), and so have positions, which look up one row after
    the other. What multiplies element by element has A = 1, and as G the second moment of its gradients, which is
    stated: it is no approximation. S counts all positions, those that a mask leaves out too, and m all examples, those
    that fill up a batch too: the more padding, the smaller A.

    Shapes: A (n_in, n_in), G (n_out, n_out); of n layers of a repeat (n, ...).
    Source: Martens & Grosse 2015, arXiv:1503.05671, section 3; Eschenhagen et al. 2023, arXiv:2311.00636, for expand
            and reduce.
    Raises: ValueError if reduce is neither of the two, or, by the name of the layer, if G would have more than 2^26
            numbers.
    """
    if reduce not in ("expand", "reduce"):
        raise ValueError(f"kronecker: reduce must be 'expand' or 'reduce', got {reduce!r}")

    def outers(form):
        x, d = (form.d, form.x) if form.turned else (form.x, form.d)
        if reduce == "reduce":
            d, x = jnp.sum(d, 1, keepdims=True), jnp.mean(x, 1, keepdims=True)
        m = d.shape[0]
        x, d = (a.reshape(-1, a.shape[-1]) for a in (x, d))
        A, G = (x / x.shape[0]).T @ x, (d / m).T @ d
        return KroneckerPair(A, G, form.turned)

    def rows(g):
        g = flat(g)
        if g.shape[1] ** 2 > MOST:
            raise ValueError(f"kronecker: a parameter of {g.shape[1]} numbers that is no matrix has too large a G")
        return KroneckerPair(jnp.ones((1, 1), g.dtype), g.T @ g / g.shape[0])

    def scaled(pair, c):
        return replace(pair, G=quadratic(pair.G, c))

    return Contraction(f"kronecker_{reduce}", rows, outers, joined="whole", scaled=scaled)


def added_pairs(one: KroneckerPair, other: KroneckerPair) -> KroneckerPair:
    """The pair of a parameter that is used in two places, which stands for the sum of both Kronecker products.

        w = tr A tr G of each      A = sum w A / tr A / sum w      G = sum w G / tr G

    It has their trace, and is exact if the parts are multiples of each other. Where one use has as input what is the
    error of the other, as of an embedding that scores too, A and G of the other change places.
    """
    swapped = other.turned != one.turned
    sides = (one.A, other.G if swapped else other.A), (one.G, other.A if swapped else other.G)
    traces = [[jnp.sum(a) if a.ndim == 1 else jnp.trace(a) for a in side] for side in sides]
    weights = [a * g for a, g in zip(*traces, strict=True)]
    whole = sum(weights)

    def mean(side: tuple[Any, ...], trace: list[Any]) -> jax.Array:
        """The mean of two matrices of trace 1; a diagonal if both are."""
        matrices = side if all(a.ndim == 1 for a in side) else [jnp.diag(a) if a.ndim == 1 else a for a in side]
        parts = (w / jnp.where(t > 0, t, 1) * a for w, t, a in zip(weights, trace, matrices, strict=True))
        return sum(parts) / jnp.where(whole > 0, whole, 1)

    A = mean(sides[0], traces[0])
    return KroneckerPair(A, whole * mean(sides[1], traces[1]), one.turned, A.ndim == 1)


def second_moment_in(bases: Any) -> Contraction:
    """sum_i (U_G^T g_i U_A)^2 of each parameter: the second moment of its gradients, seen as matrices, in a basis.

    bases is a tree of params, for each a KroneckerPair of U_A and U_G. A diagonal A has its own numbers as basis.

    Shapes: (n_out, n_in); of n layers of a repeat (n, n_out, n_in).
    """

    def rows(g, bases):
        g = jax.vmap(bases.matrix)(g)
        g = g if bases.diagonal else g @ bases.A
        return jnp.sum(jnp.einsum("op,moi->mpi", bases.G, g) ** 2, 0)

    def outers(form, bases):
        x, d = (form.d, form.x) if form.turned else (form.x, form.d)
        d, x = d @ bases.G, x if bases.diagonal else x @ bases.A
        if d.shape[1] == 1:
            return jnp.einsum("mso,msi->oi", d**2, x**2)
        few = max(1, CHUNK // (d.shape[2] * x.shape[2]))
        parts = [jnp.pad(a, ((0, -len(a) % few), (0, 0), (0, 0))).reshape(-1, few, *a.shape[1:]) for a in (d, x)]

        def add(so_far, part):
            return so_far + jnp.sum(jnp.einsum("mso,msi->moi", *part) ** 2, 0), None

        return jax.lax.scan(add, jnp.zeros((d.shape[2], x.shape[2]), d.dtype), tuple(parts))[0]

    return Contraction("second_moment_in", rows, outers, joined="summed", scaled=quadratic, given=bases)
