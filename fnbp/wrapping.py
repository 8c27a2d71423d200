"""Factors that are another one, but for what becomes of its total and its rows."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fnbp.arrays.placement import laid
from fnbp.contractions import Contraction
from fnbp.factor import Factor, register_factor


@dataclass(frozen=True)
class Wrapped(Factor):
    """A factor that is another one, but for what becomes of its total and its rows."""

    factor: Factor

    @property
    def examples(self) -> int:
        return self.factor.examples

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        return self.factor.sliced

    @property
    def turned(self) -> bool:  # type: ignore[override]
        return self.factor.turned

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        return self.factor.outer()

    def per_example(self) -> jax.Array:
        return self.factor.per_example()

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        return contraction(self.factor, *given)

    def example_axes(self) -> Any:
        return replace(self, factor=self.factor.example_axes())

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> Any:
        inside = self.factor.over_turns(behind)
        return None if inside is None else replace(self, factor=inside)

    def in_turn(self) -> Any:
        return replace(self, factor=self.factor.in_turn())

    def widened(self) -> Any:
        return replace(self, factor=self.factor.widened())

    def scaled(self, c: Any) -> Any:
        return replace(self, factor=self.factor.scaled(c))


@register_factor
@dataclass(frozen=True)
class Formed(Wrapped):
    """A factor beside its total, which the backward has formed on its way. Under jit only what is used is computed.

    total   whole      all else   of the factor
    """

    whole: jax.Array

    def bare(self) -> Factor:
        return self.factor

    def total(self) -> jax.Array:
        return self.whole

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> "Formed | None":
        inside = self.factor.over_turns(behind)
        return None if inside is None else Formed(inside, jnp.sum(self.whole, 0))

    def example_axes(self) -> "Formed":
        return Formed(self.factor.example_axes(), -1)  # type: ignore[arg-type]

    def scaled(self, c: Any) -> Factor:
        return self.factor.scaled(c)

    def weighted(self, c: Any) -> jax.Array:
        return self.factor.weighted(c)


@register_factor
@dataclass(frozen=True)
class Placed(Wrapped):
    """The factor of a parameter that is split over devices: its total is left where the parameter lies."""

    place: NamedSharding = field(metadata={"static": True})

    def bare(self) -> Factor:
        return self.factor

    def total(self) -> jax.Array:
        return laid(self.factor.total(), self.place)
