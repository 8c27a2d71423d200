"""The gradient of a weight before the sum over examples: what a backward returns for each parameter.

The indices, here and wherever a factor stands:

    m  the example, always the first axis        o  the outputs of a weight
    s  positions that share the weight           i  its inputs
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.nodes import register_factor
from fnbp.arrays.placement import einsum
from fnbp.arrays.sums import wide
from fnbp.contractions import Contraction, rows_of, sq_norms
from fnbp.pairs import KroneckerPair, added_pairs, kronecker

__all__ = ["Factor", "Outer", "Product", "Sum", "register_factor"]

TALL = 4  # times as many outputs as inputs, from which dW is formed by its transpose
MIXED = "it mixes the examples of a batch, so no example has a gradient of its own; only total is defined"


class Factor(ABC):
    """An unfinished sum over examples, linear in the error d: what a backward returns for one parameter.

    Axis 0 is the example. Axes between it and the last are positions that share the parameter (time, pixels).

    Which one, for the gradient of a parameter p and the cotangent dy of what it is part of:

        y = x p^T, a matrix                Outer(dy, x)         y = conv(x, p)               Correlation(dy, x, ...)
        y = x + p, a number a feature      Sum(dy)              y = p[x], rows of a table    Lookup(dy, x, rows)
        y = p x, a number a feature        Product(dy, x)       y[t] = x[t] + p[t]           Rows(dy, length)
        anything else: a scalar, a table, a tensor of any rank  PerExample(g), g (m, *shape of p)

    A factor of your own is a frozen dataclass, registered by fnbp.register_factor, with the three abstract methods
    below and a field d, the error, whose first axis is the example; or with a property examples in place of d. Every
    contraction then has what it needs. A method with the name of a contraction, sq_norms for example, is a faster way.

        positional  True if every axis between the example and the last is a position that shares the parameter: a
                    loop over time then adds its turns as one more such axis, instead of summing turn by turn
        sliced      True if every array of the factor has the example as first axis, or as example_axes says
        turned      True if the second of outer is the error, and the first what came in
    """

    d: jax.Array
    positional: ClassVar[bool] = False
    sliced: ClassVar[bool] = True
    turned: ClassVar[bool] = False

    @property
    def examples(self) -> int:
        """m, how many examples there are. TypeError if the factor has no d to tell."""
        d = getattr(self, "d", None)
        if d is None:
            kind = type(self).__name__
            raise TypeError(f"{kind}: a Factor needs a field d, the error, (m, ...), or a property examples")
        return d.shape[0]

    @abstractmethod
    def total(self) -> jax.Array:
        """The sum over examples and positions: the shape of the parameter."""

    @abstractmethod
    def per_example(self) -> jax.Array:
        """The gradient of each example: (m, the shape of the parameter)."""

    @abstractmethod
    def scaled(self, c: Any) -> "Factor":
        """The factor with d times c: a number, or one number for each example, (m,)."""

    def weighted(self, c: Any) -> jax.Array:
        """The sum over examples of the gradient of each times c: total of scaled."""
        return self.scaled(c).total()

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        """d (m, ..., n_out) and x (m, ..., n_in), if the gradient of an example is the sum of d x^T over positions,
        reshaped; else None."""
        return None

    def sq_norms(self) -> jax.Array:
        """The squared norm of each example's gradient, (m,), without forming the gradients where that is cheaper."""
        return self.contracted(sq_norms)

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        """The value of a contraction, by the forms that the factor has."""
        return contraction.of_form(self, *given)

    def faster(self, name: str) -> Callable | None:
        """Its own way to the contraction of that name: a method that its class defines; or None."""
        own = getattr(type(self), name, None)
        return None if own is None or own is getattr(Factor, name, None) else getattr(self, name)

    def widened(self) -> "Factor":
        """The factor in at least float32."""
        return jax.tree.map(lambda a: wide(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a, self)

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> "Factor | None":
        """The factor of all turns of a loop over time, if the arrays of this one have the turn as first axis, which
        behind puts behind the example; None if its form has no place for such an axis."""
        return jax.tree.map(behind, self) if self.positional else None

    def in_turn(self) -> "Factor":
        """The factor of one turn of a loop, if this is that of all turns."""
        return self

    def bare(self) -> "Factor":
        """The factor as its layer returned it, without where its parameter lies."""
        return self

    def example_axes(self) -> Any:
        """For each array of the factor, which of its axes is the example: 0, or behind those of loops around it; -1 if
        all examples share it."""
        return jax.tree.map(lambda a: 0, self)

    def widest(self) -> int:
        """How many numbers are formed for one example on the way to its gradient, at most."""
        return int(np.prod(jax.eval_shape(self.total).shape))

    def __add__(self, other: Any) -> "Factor":
        """The factor of a parameter that is used in two places."""
        return Added(self, other) if isinstance(other, Factor) else NotImplemented


@register_factor
@dataclass(frozen=True)
class Outer(Factor):
    """dW = sum_i d_i x_i^T, the gradient of W in x @ W.T.

        total        d^T x                                     (n_out, n_in)
        per_example  d_i x_i^T, summed over positions          (m, n_out, n_in)

    Shapes: d (m, ..., n_out), x (m, ..., n_in).
    """

    d: jax.Array
    x: jax.Array
    positional: ClassVar[bool] = True

    def total(self) -> jax.Array:
        if self.d.shape[-1] < TALL * self.x.shape[-1]:
            return einsum("...o,...i->oi", self.d, self.x)
        # on the CPU a tall dW is slow to form, its transpose is not; without the barrier XLA turns that round again
        return jax.lax.optimization_barrier(einsum("...i,...o->io", self.x, self.d)).T

    def per_example(self) -> jax.Array:
        return einsum("m...o,m...i->moi", self.d, self.x)

    def outer(self) -> tuple[jax.Array, jax.Array]:
        return self.d, self.x

    def scaled(self, c: Any) -> "Outer":
        return Outer(along_examples(c, self.d), self.x)

    def weighted(self, c: Any) -> jax.Array:
        if self.x.shape[-1] < self.d.shape[-1]:  # one side of the product is enough, the smaller one
            return Outer(self.d, along_examples(c, self.x)).total()
        return self.scaled(c).total()


@register_factor
@dataclass(frozen=True)
class Sum(Factor):
    """db = sum_i d_i, the gradient of b in x + b.

        total        sum of d over examples and positions      (n,)
        per_example  d_i, summed over positions                (m, n)

    Shapes: d (m, ..., n).
    """

    d: jax.Array
    positional: ClassVar[bool] = True

    def total(self) -> jax.Array:
        return jnp.sum(self.d, range(self.d.ndim - 1))

    def per_example(self) -> jax.Array:
        return jnp.sum(self.d, range(1, self.d.ndim - 1))

    def outer(self) -> tuple[jax.Array, jax.Array]:
        return self.d, jnp.ones_like(self.d[..., :1])

    def scaled(self, c: Any) -> "Sum":
        return Sum(along_examples(c, self.d))


@register_factor
@dataclass(frozen=True)
class Product(Factor):
    """dg = sum_i d_i x_i, element by element: the gradient of g in g x.

        total        sum of d x over examples and positions    (n,)
        per_example  d_i x_i, summed over positions            (m, n)

    Shapes: d, x (m, ..., n).
    """

    d: jax.Array
    x: jax.Array
    positional: ClassVar[bool] = True

    def total(self) -> jax.Array:
        return einsum("...n,...n->n", wide(self.d), wide(self.x)).astype(self.d.dtype)

    def per_example(self) -> jax.Array:
        return einsum("m...n,m...n->mn", wide(self.d), wide(self.x)).astype(self.d.dtype)

    def scaled(self, c: Any) -> "Product":
        return Product(along_examples(c, self.d), self.x)


@register_factor
@dataclass(frozen=True)
class PerExample(Factor):
    """dp = sum_i d_i, the gradient of each example formed already: for scalars, tables, tensors of any rank.

        total        sum of d over examples    (the shape of the parameter)
        per_example  d                         (m, the shape of the parameter)

    Shapes: d (m, the shape of the parameter): m times the memory of the gradient.
    """

    d: jax.Array

    def total(self) -> jax.Array:
        return jnp.sum(self.d, 0)

    def per_example(self) -> jax.Array:
        return self.d

    def scaled(self, c: Any) -> "PerExample":
        return PerExample(along_examples(c, self.d))


@register_factor
@dataclass(frozen=True)
class Mixed(Factor):
    """A finished gradient of a layer that mixes the examples, so that no example has a gradient of its own.

    Shapes: d, of the parameter.
    Raises: TypeError from every contraction but total.
    """

    d: jax.Array

    def total(self) -> jax.Array:
        return self.d

    def per_example(self) -> jax.Array:
        raise TypeError(MIXED)

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        raise TypeError(MIXED)

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> "Mixed":
        return Mixed(jnp.sum(self.d, 0))

    def scaled(self, c: Any) -> "Mixed":
        raise TypeError(MIXED)


@register_factor
@dataclass(frozen=True)
class Added(Factor):
    """The sum of two factors of one parameter that is used in two places.

    total, per_example   the sum of both
    """

    one: Factor
    other: Factor

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        return self.one.sliced and self.other.sliced

    def example_axes(self) -> "Added":
        return Added(self.one.example_axes(), self.other.example_axes())

    @property
    def examples(self) -> int:
        return self.one.examples

    def total(self) -> jax.Array:
        return self.one.total() + self.other.total()

    def per_example(self) -> jax.Array:
        return self.one.per_example() + self.other.per_example()

    @property
    def turned(self) -> bool:  # type: ignore[override]
        return self.one.turned

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        one, other = self.one.outer(), self.other.outer()
        if one is None or other is None or self.one.turned != self.other.turned:
            return None
        if one[0].shape[-1] != other[0].shape[-1]:  # as of a vector, which is a row in one place, a column in the other
            return None
        d, x = (jnp.concatenate([positions_in_one(a) for a in pair], 1) for pair in zip(one, other, strict=True))
        return d, x

    def kronecker_expand(self) -> KroneckerPair:
        """Of both as one sum of outer products, or, if they are none, the pair that stands for the sum of two."""
        return self.pair(kronecker("expand"))

    def kronecker_reduce(self) -> KroneckerPair:
        """The same."""
        return self.pair(kronecker("reduce"))

    def pair(self, contraction: Contraction) -> KroneckerPair:
        """The pair of Kronecker factors that this contraction makes."""
        if self.outer() is not None:
            return contraction.of_form(self)
        one, other = contraction(self.one), contraction(self.other)
        return added_pairs(one, other) if one.fits(other) else contraction.rows(rows_of(self))

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> "Added | None":
        one, other = self.one.over_turns(behind), self.other.over_turns(behind)
        return None if one is None or other is None else Added(one, other)

    def in_turn(self) -> "Added":
        return Added(self.one.in_turn(), self.other.in_turn())

    def widened(self) -> "Added":
        return Added(self.one.widened(), self.other.widened())

    def scaled(self, c: Any) -> "Added":
        return Added(self.one.scaled(c), self.other.scaled(c))


def positions_in_one(a: jax.Array) -> jax.Array:
    """(m, ..., n) with all positions along one axis."""
    return a.reshape(a.shape[0], -1, a.shape[-1])


def along_examples(c: Any, d: jax.Array) -> jax.Array:
    """c d, where c is a number or holds one for each example."""
    c = jnp.asarray(c, wide(d).dtype)
    return (c.reshape(c.shape + (1,) * (d.ndim - 1) if c.ndim else ()) * wide(d)).astype(d.dtype)
