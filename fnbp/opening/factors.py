"""The factors of what no layer of fnbp owns: of any equation, and of values that are derived from parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.placement import each_example, over_examples
from fnbp.arrays.sums import wide
from fnbp.combinators.factors import Shared
from fnbp.contractions import Contraction, dot, total
from fnbp.factor import Factor, along_examples, register_factor
from fnbp.opening.layouts import Layout, along_last
from fnbp.wrapping import Wrapped

__all__ = ["ByVjp", "LaidOut", "Nothing", "Through"]

NONE = -1  # the example axis of an array that has none


@register_factor
@dataclass(frozen=True)
class ByVjp(Factor):
    """The gradient of a value p that is used by one equation, y = run(*operands), of which p is one.

        total        jax.vjp of the equation for all examples at d        per_example  the same, for each example

    Shapes: d, one (m, ...) for each result that has a cotangent; each, the operands of every example, (m, ...); known,
            the others, p among them; run, and which operand is what, are static. jointly is True if JAX has the
            derivative by p only beside those by the operands of every example; linear is False if it need not be linear
            in d: c then holds what the gradients are to be multiplied by.
    """

    d: Any
    each: tuple[Any, ...]
    known: tuple[Any, ...]
    run: Callable = field(metadata={"static": True})
    which: int = field(metadata={"static": True})
    jointly: bool = field(default=False, metadata={"static": True})
    linear: bool = field(default=True, metadata={"static": True})
    c: Any = None

    @property
    def examples(self) -> int:
        return self.d[0].shape[0]

    def with_p(self, p: Any) -> tuple[Any, ...]:
        """known, with another p."""
        return (*self.known[: self.which], p, *self.known[self.which + 1 :])

    @over_examples
    def total(self) -> jax.Array:
        def of_all(p, each):
            def of_one(each, c):
                return self.run(each, self.with_p(p if c is None else weighted(p, c)))

            c = None if self.c is None else jnp.broadcast_to(self.c, self.examples)
            return jax.vmap(of_one, axis_size=self.examples)(each, c)

        return self.pulled(of_all, self.d, self.each)

    @each_example
    def per_example(self) -> jax.Array:
        def of_one(d, each):
            return self.pulled(lambda p, each: self.run(each, self.with_p(p)), d, each)

        rows = jax.vmap(of_one)(self.d, self.each)
        return rows if self.c is None else along_examples(self.c, rows)

    def pulled(self, f: Callable, d: Any, each: Any) -> jax.Array:
        """The cotangent of p in f(p, each)."""
        p = self.known[self.which]
        if not self.jointly:
            return jax.vjp(lambda p: f(p, each), p)[1](d)[0]
        return jax.vjp(f, p, each)[1](d)[0]

    def scaled(self, c: Any) -> "ByVjp":
        if not self.linear:
            return replace(self, c=jnp.asarray(c) if self.c is None else self.c * c)
        return replace(self, d=tuple(along_examples(c, d) for d in self.d))

    def widened(self) -> "ByVjp":
        return self

    def example_axes(self) -> Any:
        none = jax.tree.map(lambda a: NONE, self.known)
        d, each = tuple(0 for _ in self.d), jax.tree.map(lambda a: 0, self.each)
        return replace(self, d=d, each=each, known=none, c=axis_of(self.c))


@register_factor
@dataclass(frozen=True)
class Through(Wrapped):
    """The gradient of a parameter p of which a value h(p) is derived: that of the value, pulled back.

        total = J^T total        per_example = J^T per_example        <g_i, v> = <gradient of the value, J v>

    Shapes: known, what else h reads, p at which; h and which are static. linear is False if h has a derivative of a
            user's own, which need not be linear: c then holds what the gradients are to be multiplied by.
    """

    known: tuple[Any, ...]
    h: Callable = field(metadata={"static": True})
    which: int = field(metadata={"static": True})
    linear: bool = field(default=True, metadata={"static": True})
    c: Any = None

    def of(self, p: Any) -> jax.Array:
        """h(p)."""
        return self.h(*self.known[: self.which], p, *self.known[self.which + 1 :])

    def pull(self, g: Any) -> jax.Array:
        """J^T g."""
        value, pull = jax.vjp(self.of, self.known[self.which])
        return pull(jax.tree.map(lambda g, one: g.astype(one.dtype), g, value))[0]

    def total(self) -> jax.Array:
        if not self.linear:
            return total.of_form(self).astype(jnp.result_type(self.known[self.which]))
        return self.pull(self.factor.total())

    @each_example
    def per_example(self) -> jax.Array:
        rows = jax.vmap(self.pull)(self.factor.per_example())
        return rows if self.c is None else along_examples(self.c, rows)

    def scaled(self, c: Any) -> "Through":
        if not self.linear:
            return replace(self, c=jnp.asarray(c) if self.c is None else self.c * c)
        return super().scaled(c)

    def outer(self) -> None:
        return None

    def over_turns(self, behind: Callable[[jax.Array], jax.Array]) -> None:
        return None

    def dot(self, v: jax.Array) -> jax.Array:
        """The inner product of each example's gradient with v, (m,)."""
        p = self.known[self.which]
        if not self.linear:
            return dot(None).of_form(self, v)
        pushed = jax.jvp(self.of, (p,), (v.astype(jnp.result_type(p)),))[1]
        made = dot(None)(self.factor, pushed)
        return made if jnp.iscomplexobj(p) else made.real

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        return contraction.of_form(self, *given)

    def example_axes(self) -> Any:
        known = jax.tree.map(lambda a: NONE, self.known)
        return replace(self, factor=self.factor.example_axes(), known=known, c=axis_of(self.c))

    def widest(self) -> int:
        return max(jnp.size(self.known[self.which]), self.factor.widest())


@register_factor
@dataclass(frozen=True)
class Together(Factor):
    """The factors of several values, for a Through that is not linear: total and per_example are tuples."""

    factors: tuple[Factor, ...]

    @property
    def examples(self) -> int:
        return self.factors[0].examples

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        return all(factor.sliced for factor in self.factors)

    def total(self) -> Any:
        return tuple(factor.total() for factor in self.factors)

    def per_example(self) -> Any:
        return tuple(factor.per_example() for factor in self.factors)

    def scaled(self, c: Any) -> "Together":
        return Together(tuple(factor.scaled(c) for factor in self.factors))

    def widened(self) -> "Together":
        return Together(tuple(factor.widened() for factor in self.factors))

    def example_axes(self) -> Any:
        return Together(tuple(factor.example_axes() for factor in self.factors))

    def widest(self) -> int:
        return max(factor.widest() for factor in self.factors)


@register_factor
@dataclass(frozen=True)
class LaidOut(Wrapped):
    """A factor whose gradient is that of a parameter but for the order and the shape of its numbers."""

    layout: Layout = field(metadata={"static": True})

    def total(self) -> jax.Array:
        return self.layout.move(self.factor.total())

    def per_example(self) -> jax.Array:
        return self.layout.move(self.factor.per_example())

    @property
    def turned(self) -> bool:  # type: ignore[override]
        form = jax.eval_shape(lambda factor: factor.outer(), self.factor)
        sides = None if form is None else self.layout.sides(form[1].shape[-1])
        return self.factor.turned != (sides is not None and sides[2])

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        form = self.factor.outer()
        sides = None if form is None else self.layout.sides(form[1].shape[-1])
        if form is None or sides is None:
            return None
        rows, columns = along_last(form[0], sides[0]), along_last(form[1], sides[1])
        return (columns, rows) if sides[2] else (rows, columns)

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        if contraction.moved is None:
            return contraction.of_form(self, *given)
        before = []
        for one in given:
            theirs = one.bare() if isinstance(one, Factor) else one
            if not isinstance(theirs, Factor):
                before.append(self.layout.back(theirs))
            elif isinstance(theirs, LaidOut) and theirs.layout == self.layout:
                before.append(theirs.factor)
            else:
                return contraction.of_form(self, *given)
        return contraction.moved(contraction(self.factor, *before), self.layout.move)


@register_factor
@dataclass(frozen=True)
class Nothing(Factor):
    """The gradient of a parameter that the loss does not depend on: 0 of its shape.

    Shapes: d (m,), zeros; shape and dtype are static.
    """

    d: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    def total(self) -> jax.Array:
        return jnp.zeros(self.shape, self.dtype)

    def per_example(self) -> jax.Array:
        return jnp.zeros((self.examples, *self.shape), self.dtype)

    def sq_norms(self) -> jax.Array:
        """0, (m,)."""
        return jnp.zeros_like(wide(self.d))

    def dot(self, v: jax.Array) -> jax.Array:
        """0, (m,)."""
        return self.sq_norms()

    def scaled(self, c: Any) -> "Nothing":
        return self


def weighted(p: jax.Array, c: jax.Array) -> jax.Array:
    """p, whose cotangent is multiplied by c."""
    fixed = jax.lax.stop_gradient(p)
    return fixed + (c * (p - fixed)).astype(p.dtype)


def axis_of(c: Any) -> int | None:
    """The example axis of weights: one number of all examples has none."""
    return None if c is None else 0 if jnp.ndim(c) else NONE


def laid_out(factor: Factor, layout: Layout | None) -> Factor | None:
    """A factor in another layout; None if there is no such layout."""
    if layout is None or layout.trivial:
        return None if layout is None else factor
    return LaidOut(factor, layout)


def over_turns(factor: Factor) -> Factor:
    """One factor of a parameter that is the same in all turns of a loop. Its arrays have the turn as first axis."""
    whole = factor.over_turns(lambda a: jnp.moveaxis(a, 0, 1))
    return Shared(factor) if whole is None else whole
