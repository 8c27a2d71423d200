"""The gradient of a weight, before the sum over examples, and the contractions that finish it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 1 << 22  # elements of per-example matrices formed at once, where sq_norms has to form them


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32: the dtype in which sums are taken."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


class Factor(ABC):
    """What a backward returns for one parameter: an unfinished sum over examples, linear in the error d.

    Axis 0 is the example. Axes between it and the last are positions that share the parameter (time, pixels).
    """

    d: jax.Array

    @abstractmethod
    def total(self) -> jax.Array:
        """The sum over examples and positions: the shape of the parameter."""

    @abstractmethod
    def per_example(self) -> jax.Array:
        """The gradient of each example: (m, the shape of the parameter)."""

    @abstractmethod
    def sq_norms(self) -> jax.Array:
        """The squared norm of each example's gradient, (m,), without forming the gradients where that is cheaper."""

    @abstractmethod
    def scaled(self, c: Any) -> "Factor":
        """The factor with d times c: a number, or one number for each example, (m,)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outer(Factor):
    """dW = sum_i d_i x_i^T, the gradient of W in x @ W.T.

        total        d^T x                                     (n_out, n_in)
        per_example  d_i x_i^T, summed over positions          (m, n_out, n_in)
        sq_norms     |d_i|^2 |x_i|^2, for one position
                     sum_st (d_is . d_it) (x_is . x_it), the Gram form, for S positions where S^2 < n_out n_in

    Shapes: d (m, ..., n_out), x (m, ..., n_in).
    Source: Goodfellow 2015, arXiv:1510.01799, for one position; Li et al. 2021, arXiv:2110.05679, for the Gram form.
    """

    d: jax.Array
    x: jax.Array

    def total(self) -> jax.Array:
        return jnp.einsum("...o,...i->oi", self.d, self.x)

    def per_example(self) -> jax.Array:
        return jnp.einsum("m...o,m...i->moi", self.d, self.x)

    def sq_norms(self) -> jax.Array:
        m, n_out, n_in = self.d.shape[0], self.d.shape[-1], self.x.shape[-1]
        d, x = (wide(a).reshape(m, -1, a.shape[-1]) for a in (self.d, self.x))
        positions = d.shape[1]
        if positions == 1:
            return jnp.sum(d**2, (1, 2)) * jnp.sum(x**2, (1, 2))
        if positions**2 < n_out * n_in:
            gram = jnp.einsum("mso,mto->mst", d, d) * jnp.einsum("msi,mti->mst", x, x)
            return jnp.maximum(jnp.sum(gram, (1, 2)), 0)  # a sum of squares; rounding can leave it below 0
        chunk = min(m, max(1, CHUNK // (n_out * n_in)))
        return jax.lax.map(lambda dx: jnp.sum((dx[0].T @ dx[1]) ** 2), (d, x), batch_size=chunk)

    def scaled(self, c: Any) -> "Outer":
        return Outer(along_examples(c, self.d), self.x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum(Factor):
    """db = sum_i d_i, the gradient of b in x + b.

        total        sum of d over examples and positions      (n,)
        per_example  d_i, summed over positions                (m, n)
        sq_norms     |sum over positions of d_i|^2             (m,)

    Shapes: d (m, ..., n).
    """

    d: jax.Array

    def total(self) -> jax.Array:
        return jnp.sum(self.d, range(self.d.ndim - 1))

    def per_example(self) -> jax.Array:
        return jnp.sum(self.d, range(1, self.d.ndim - 1))

    def sq_norms(self) -> jax.Array:
        return jnp.sum(jnp.sum(wide(self.d), range(1, self.d.ndim - 1)) ** 2, -1)

    def scaled(self, c: Any) -> "Sum":
        return Sum(along_examples(c, self.d))


def along_examples(c: Any, d: jax.Array) -> jax.Array:
    """c d, where c is a number or holds one for each example."""
    c = jnp.asarray(c, wide(d).dtype)
    return (c.reshape(c.shape + (1,) * (d.ndim - 1) if c.ndim else ()) * wide(d)).astype(d.dtype)


def total(factor: Factor) -> jax.Array:
    """The sum over examples. Under backprop: the gradient of the mean loss J."""
    return factor.total()


def keep(factor: Factor) -> Factor:
    """The factor itself, to rescale or to contract later. Under backprop its d is of each example's own loss."""
    return factor


def sq_norms(factor: Factor) -> jax.Array:
    """The squared norm of each example's gradient, (m,), in at least float32."""
    return factor.sq_norms()


def per_example(factor: Factor) -> jax.Array:
    """Each example's gradient, (m, the shape of the parameter): m times the memory of total."""
    return factor.per_example()
