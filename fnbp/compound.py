"""Factors made of factors: of a parameter in a loop, in two places, in two dtypes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.factor import CHUNK, Factor, keep, per_example, register_factor, sq_norms, total
from fnbp.placement import each_example
from fnbp.sums import wide


@register_factor
@dataclass(frozen=True)
class Stacked(Factor):
    """The factors of n layers of one shape, from a loop over depth: all their arrays have the depth as first axis.

    total        of each                                    (n, the shape of the parameter)
    per_example  of each, the example first                 (m, n, the shape of the parameter)
    sq_norms     summed over the depth                      (m,)
    """

    factor: Factor

    @property
    def d(self) -> jax.Array:  # type: ignore[override]
        """The error, the example first: (m, n, ...)."""
        return jnp.moveaxis(jax.vmap(error)(self.factor), 0, 1)

    @property
    def examples(self) -> int:
        return first_turn(self.factor).examples

    def total(self) -> jax.Array:
        return jax.vmap(total)(self.factor)

    def per_example(self) -> jax.Array:
        return jnp.moveaxis(jax.vmap(per_example)(self.factor), 0, 1)

    def sq_norms(self) -> jax.Array:
        return jnp.sum(jax.lax.map(sq_norms, self.factor), 0)

    def scaled(self, c: Any) -> "Stacked":
        return Stacked(jax.vmap(lambda factor: factor.scaled(c))(self.factor))


@register_factor
@dataclass(frozen=True)
class Shared(Factor):
    """The factors of one parameter in every turn of a loop over time: all their arrays have the time as first axis.

    total, per_example   the sum over time      sq_norms   of each example's sum
    """

    factor: Factor

    @property
    def d(self) -> jax.Array:  # type: ignore[override]
        """The error, the example first: (m, T, ...)."""
        return jnp.moveaxis(jax.vmap(error)(self.factor), 0, 1)

    @property
    def examples(self) -> int:
        return first_turn(self.factor).examples

    def total(self) -> jax.Array:
        return jnp.sum(jax.vmap(total)(self.factor), 0)

    def per_example(self) -> jax.Array:
        return jnp.sum(jax.vmap(per_example)(self.factor), 0)

    def sq_norms(self) -> jax.Array:
        rows = wide(self.per_example())
        return jnp.sum(rows**2, range(1, rows.ndim))

    def scaled(self, c: Any) -> "Shared":
        return Shared(jax.vmap(lambda factor: factor.scaled(c))(self.factor))


@register_factor
@dataclass(frozen=True)
class Added(Factor):
    """The sum of two factors of one parameter that is used in two places.

    total, per_example   the sum of both                    sq_norms   of each example's sum, formed a few at once
    """

    one: Factor
    other: Factor

    @property
    def d(self) -> jax.Array:  # type: ignore[override]
        """The error in the first place."""
        return self.one.d

    @property
    def examples(self) -> int:
        return self.one.examples

    def total(self) -> jax.Array:
        return self.one.total() + self.other.total()

    def per_example(self) -> jax.Array:
        return self.one.per_example() + self.other.per_example()

    @each_example
    def sq_norms(self) -> jax.Array:
        if not sliced(self):
            rows = wide(self.per_example())
            return jnp.sum(rows**2, range(1, rows.ndim))
        axes = example_axes(self)

        def alone(both: Added) -> jax.Array:
            rows = jax.tree.map(jnp.expand_dims, both, axes).per_example()[0]
            return jnp.sum(wide(rows) ** 2)

        elements = int(np.prod(jax.eval_shape(self.total).shape))
        examples = jax.tree.map(lambda a, axis: jnp.moveaxis(a, axis, 0), self, axes)
        return jax.lax.map(alone, examples, batch_size=min(self.examples, max(1, CHUNK // elements)))

    def scaled(self, c: Any) -> "Added":
        return Added(self.one.scaled(c), self.other.scaled(c))


@register_factor
@dataclass(frozen=True)
class Cast(Factor):
    """A factor in one dtype of a parameter in another: what is made of it is in the other."""

    factor: Factor
    dtype: Any = field(metadata={"static": True})

    @property
    def d(self) -> jax.Array:  # type: ignore[override]
        """The error, in its own dtype."""
        return self.factor.d

    @property
    def examples(self) -> int:
        return self.factor.examples

    def total(self) -> jax.Array:
        return self.factor.total().astype(self.dtype)

    def per_example(self) -> jax.Array:
        return self.factor.per_example().astype(self.dtype)

    def sq_norms(self) -> jax.Array:
        return self.factor.sq_norms()

    def scaled(self, c: Any) -> "Cast":
        return Cast(self.factor.scaled(c), self.dtype)


def sliced(factor: Any) -> bool:
    """True if all arrays of a factor have an axis of examples."""
    if isinstance(factor, Added):
        return sliced(factor.one) and sliced(factor.other)
    return sliced(factor.factor) if isinstance(factor, (Stacked, Shared, Cast)) else factor.sliced


def error(factor: Factor) -> jax.Array:
    """d of a factor."""
    return factor.d


def first_turn(factor: Any) -> Any:
    """The factor of the first turn of a loop."""
    return jax.tree.map(lambda a: a[0], factor)


def example_axes(factor: Any) -> Any:
    """For each array of a factor, which axis the example is: behind those of the loops around it."""
    if isinstance(factor, (Stacked, Shared)):
        return replace(factor, factor=jax.tree.map(lambda axis: axis + 1, example_axes(factor.factor)))
    if isinstance(factor, Added):
        return Added(example_axes(factor.one), example_axes(factor.other))
    if isinstance(factor, Cast):
        return replace(factor, factor=example_axes(factor.factor))
    return jax.tree.map(lambda a: 0, factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contracted:
    """What a contraction made of a factor, on its way out of the loops that the factor was in."""

    value: Any
    contract: Callable = field(metadata={"static": True})


def is_open(node: Any) -> bool:
    """True for what is not yet as the caller will see it."""
    return isinstance(node, (Factor, Contracted))


def is_contracted(node: Any) -> bool:
    """True for a Contracted, however deep in loops."""
    while isinstance(node, Stacked):
        node = node.factor
    return isinstance(node, Contracted)


def out_of_depth(node: Any) -> Any:
    """The value of a Contracted; of one in a Stacked, as if the Stacked itself had been contracted.

    What a contraction of your own makes keeps the depth as its first axis.
    """
    if isinstance(node, Contracted):
        return node.value
    if not isinstance(node, Stacked) or not is_contracted(node):
        return node
    inside: Any = node.factor
    while isinstance(inside, Stacked):
        inside = inside.factor
    values = jax.vmap(out_of_depth)(node.factor)
    if inside.contract is sq_norms:
        return jnp.sum(values, 0)
    if inside.contract is per_example:
        return jnp.moveaxis(values, 0, 1)
    return Stacked(values) if inside.contract is keep else values
