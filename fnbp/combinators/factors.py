"""Factors made of factors: of a parameter in a loop, or in another dtype."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.contraction import Contracted, is_open
from fnbp.contractions import Contraction
from fnbp.factor import Factor, Mixed, register_factor
from fnbp.wrapping import Wrapped


@dataclass(frozen=True)
class Turns(Factor):
    """The factors of every turn of a loop: all their arrays have the turn as first axis, the example behind it."""

    factor: Factor

    @property
    def examples(self) -> int:
        return jax.tree.map(lambda a: a[0], self.factor).examples

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        return self.factor.sliced

    def example_axes(self) -> Any:
        return replace(self, factor=jax.tree.map(behind, self.factor.example_axes()))

    def scaled(self, c: Any) -> Any:
        return replace(self, factor=jax.vmap(lambda factor: factor.scaled(c))(self.factor))

    def widened(self) -> Any:
        return replace(self, factor=self.factor.widened())

    def totals(self) -> jax.Array:
        """total of each turn, (n, the shape of the parameter)."""
        return jax.vmap(lambda factor: factor.total())(self.factor)

    def rows(self) -> jax.Array:
        """per_example of each turn, (n, m, the shape of the parameter)."""
        return jax.vmap(lambda factor: factor.per_example())(self.factor)


def behind(axis: int) -> int:
    """An axis, with one more in front; -1, for none, stays."""
    return axis + 1 if axis >= 0 else axis


@register_factor
@dataclass(frozen=True)
class Stacked(Turns):
    """The factors of n layers of one shape, from a loop over depth.

    total        of each layer                              (n, the shape of the parameter)
    per_example  of each layer, the example first           (m, n, the shape of the parameter)
    """

    def total(self) -> jax.Array:
        return self.totals()

    def per_example(self) -> jax.Array:
        return jnp.moveaxis(self.rows(), 0, 1)

    def in_turn(self) -> Factor:
        return self.factor

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        given = tuple(one.in_turn() if isinstance(one, Factor) else one for one in given)
        return contraction.depth(jax.lax.map(lambda turn: contraction(turn[0], *turn[1]), (self.factor, given)))


@register_factor
@dataclass(frozen=True)
class Shared(Turns):
    """The factors of one parameter in every turn of a loop over time.

    total, per_example   the sum over time
    """

    def total(self) -> jax.Array:
        return jnp.sum(self.totals(), 0)

    def per_example(self) -> jax.Array:
        return jnp.sum(self.rows(), 0)


@register_factor
@dataclass(frozen=True)
class Cast(Wrapped):
    """A factor in one dtype of a parameter in another.

    total   in dtype, the parameter's      per_example, outer   in rows, at least as wide as both
    """

    dtype: Any = field(metadata={"static": True})
    rows: Any = field(metadata={"static": True})

    def total(self) -> jax.Array:
        return self.factor.total().astype(self.dtype)

    def per_example(self) -> jax.Array:
        return self.factor.per_example().astype(self.rows)

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        form = self.factor.outer()
        return None if form is None else (form[0].astype(self.rows), form[1].astype(self.rows))

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        made = contraction(self.factor, *given)
        return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, self.rows)), made)


def over_depth(node: Any) -> Any:
    """One factor of all layers of a loop over depth, or what was made of the factor of each."""
    if isinstance(node, Contracted):
        return node.over_depth(over_depth)
    return Stacked(node) if isinstance(node, Factor) and not isinstance(node, Mixed) else node


def turns(turn: Callable, start: Any, each: Any, **options: Any) -> tuple[Any, tuple[Any, list[jax.Array]], Any]:
    """lax.scan of turn: (carry, each) -> carry, (factors, y). What two factors share leaves it once, and what came in
    does not leave it.

    Returns: the last carry; the factors of all turns, as together takes them; every y.
    """
    form: list[Any] = []  # of the factors, and for each leaf its number among what came in and what leaves

    def once(carry, each):
        carry, (factors, y) = turn(carry, each)
        known, (leaf, tree) = jax.tree.leaves(each), jax.tree.flatten(factors)
        number, new = {id(a): i for i, a in enumerate(known)}, []
        for a in leaf:
            if id(a) not in number:
                number[id(a)] = len(known) + len(new)
                new.append(a)
        form[:] = [jax.tree.unflatten(tree, [number[id(a)] for a in leaf])]
        return carry, (new, y)

    carry, (new, y) = jax.lax.scan(once, start, each, **options)
    return carry, (form[0], [*jax.tree.leaves(each), *new]), y


def together(form: Any, arrays: list[jax.Array]) -> Any:
    """The tree of that form, of numbers, with the arrays of these numbers."""
    return jax.tree.map(lambda i: arrays[i], form)


def over_time(form: Any, arrays: list[jax.Array]) -> Any:
    """One factor of all turns of a loop over time, for each of a turn; a finished gradient is summed over them.

    form, arrays: as turns returns them; what is one array for two weights stays one.
    """
    moved: dict[int, jax.Array] = {}  # each array once

    def behind(a: jax.Array) -> jax.Array:
        if id(a) not in moved:
            moved[id(a)] = jnp.moveaxis(a, 0, 1) if a.ndim > 1 else a
        return moved[id(a)]

    def of_turns(node: Any) -> Any:  # a node of numbers
        if not isinstance(node, Factor):
            return jnp.sum(arrays[node], 0)
        turns = together(node, arrays)
        whole = turns.over_turns(behind)
        return Shared(turns) if whole is None else whole

    return jax.tree.map(of_turns, form, is_leaf=is_open)
