"""Where a parameter meets data: the factor of each operand of one equation that depends on parameters alone.

A rule is written for one primitive, with the factor that a layer of fnbp would return; any other primitive, and any
other form of these, has ByVjp. To add a rule is one function here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnbp.combinators.factors import Stacked
from fnbp.factor import Factor, Outer, PerExample, Product, Sum
from fnbp.layers.convolution import Correlation
from fnbp.layers.embedding import Lookup, Rows
from fnbp.layers.windows import Axis, Windows
from fnbp.opening.factors import ByVjp, LaidOut, over_turns
from fnbp.opening.layouts import Layout
from fnbp.opening.program import Step, Value, has_rule

Makers = dict[Value, Step]  # of a value that is derived from parameters: the step that makes it
JOINTLY = ("pad",)  # whose transpose fails if the padding alone is differentiated
REFUSED = ("while", "pure_callback", "io_callback")


@dataclass(frozen=True)
class Use:
    """One use of a value that depends on parameters alone.

    of     the value         rule   how its factor is made
    needs  the values that make takes    make   (d of each result that has a cotangent, values) -> the factor
    """

    of: Value
    rule: str
    needs: tuple[Value, ...]
    make: Callable[..., Factor]


Rule = Callable[[Step, int, Makers], Use | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of these primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def use_of(step: Step, i: int, results: list[int], makers: Makers) -> Use:
    """The use of operand i of a step. results: the numbers of those that have a cotangent."""
    own = RULES.get(step.name)
    dtypes = {jnp.issubdtype(value.aval.dtype, jnp.complexfloating) for value in (step.operands[i], *step.results)}
    alike = len(step.results) == len(dtypes) == 1  # a real operand has the real part of a complex gradient
    made = own(step, i, makers) if own is not None and alike else None
    return by_vjp(step, i, results, makers) if made is None else made


# --- any equation ---


def by_vjp(step: Step, i: int, results: list[int], makers: Makers) -> Use:
    """The use of an operand of any equation, with the broadcast that made it, if there is one."""
    operand = step.operands[i]
    of, spread = before_broadcast(operand, makers)
    values = [of if value is operand else value for value in step.operands]
    each = tuple(dict.fromkeys(value for value in values if value.kind == "data"))
    known = tuple(dict.fromkeys(value for value in values if value.kind != "data" and value.const is None))

    linear = not has_rule(step.name, step.params)

    def run(given: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:
        at = dict(zip((*each, *known), (*given, *others), strict=True))
        operands = [at[value] if value.const is None else value.const for value in values]
        operands = [
            spread(a) if value is of and old is operand else a
            for a, value, old in zip(operands, values, step.operands, strict=True)
        ]
        made = step.run(*operands)
        return tuple(made[j] for j in results)

    def make(d: Any, *arrays: Any) -> Factor:
        jointly = step.name in JOINTLY and all(value.differentiable for value in each)
        return ByVjp(tuple(d), arrays[: len(each)], arrays[len(each) :], run, known.index(of), jointly, linear)

    return Use(of, "the derivative of the equation", (*each, *known), make)


def before_broadcast(value: Value, makers: Makers) -> tuple[Value, Callable[[Any], Any]]:
    """What a value was before its broadcast, and that broadcast; itself and nothing, if there was none."""
    step = makers.get(value)
    if step is None or step.name != "broadcast_in_dim" or len(step.operands) > 1:
        return value, lambda a: a
    return next(iter(step.operands)), lambda a: step.run(a)[0]


# --- a parameter as it is ---


@rule("identity")
def of_identity(step: Step, i: int, makers: Makers) -> Use:
    """y = p: dp = dy."""
    shape = step.operands[i].shape
    return Use(step.operands[i], "itself", (), lambda d: flat_sum(d[0].reshape(d[0].shape[0], -1), shape))


# --- number by number ---


@rule("add", "add_any", "sub")
def of_sum(step: Step, i: int, makers: Makers) -> Use | None:
    """y = x + p: dp = dy, summed over positions. y = x - p: dp = -dy."""
    minus = step.name == "sub" and i == 1
    of, at = spread_of(step.operands[i], step.results[0].shape, makers)
    return Use(of, "a sum", (), lambda d: flat_sum(-at(d[0]) if minus else at(d[0]), of.shape))


@rule("mul")
def of_product(step: Step, i: int, makers: Makers) -> Use | None:
    """y = x p: dp = dy x, summed over positions."""
    other, shape = step.operands[1 - i], step.results[0].shape
    if other.kind != "data":
        return None
    of, at = spread_of(step.operands[i], shape, makers)

    def make(d, x):
        x = x.reshape(x.shape[0], *(other.shape or [1] * len(shape)))
        x = at(jnp.broadcast_to(x, (x.shape[0], *shape)))
        return shaped(Product(at(d[0]), x), x.shape[-1:], of.shape)

    return Use(of, "a product", (other,), make)


def spread_of(value: Value, shape: tuple[int, ...], makers: Makers) -> tuple[Value, Callable[[jax.Array], jax.Array]]:
    """What a value was before it was broadcast to shape, and how an array of that shape, for every example, becomes
    (m, *positions, n), with the numbers of that value last."""
    step = makers.get(value)
    of, dims = value, range(len(value.shape))
    if step is not None and step.name == "broadcast_in_dim" and len(step.operands) == 1:
        of, dims = step.operands[0], step.params["broadcast_dimensions"]
    own = [axis for axis, n in zip(dims, of.shape, strict=True) if n == shape[axis]]
    positions = [axis for axis in range(len(shape)) if axis not in own]
    sizes = [shape[axis] for axis in positions]
    n = math.prod(shape[axis] for axis in own)

    def arranged(a: jax.Array) -> jax.Array:
        a = a.transpose(0, *(1 + axis for axis in positions), *(1 + axis for axis in own))
        return a.reshape(a.shape[0], *sizes, n)

    return of, arranged


def flat_sum(d: jax.Array, shape: tuple[int, ...]) -> Factor:
    """The factor of what is added, d (m, *positions, n): without positions of a table row by row, of a scalar or a
    tensor that of each example."""
    if d.ndim == 2 and len(shape) == 2:
        return Rows(d.reshape(d.shape[0], *shape), shape[0])
    if d.ndim == 2 and len(shape) != 1:
        return PerExample(d.reshape(d.shape[0], *shape))
    return shaped(Sum(d), d.shape[-1:], shape)


def shaped(factor: Factor, start: tuple[int, ...], shape: tuple[int, ...]) -> Factor:
    """A factor whose gradient is of shape start, in another shape."""
    layout = Layout.of(start).reshaped(shape)
    return factor if layout.trivial else LaidOut(factor, layout)


# --- products of matrices ---


@rule("dot_general")
def of_dot(step: Step, i: int, makers: Makers) -> Use | None:
    """y = x p^T: dp = dy^T x, whichever axes are summed over; an axis that both have is one matrix after the other."""
    p, x = step.operands[i], step.operands[1 - i]
    if x.kind != "data":
        return None
    (contract, batch) = step.params["dimension_numbers"]
    mine, theirs = (contract[i], contract[1 - i]), (batch[i], batch[1 - i])
    order = sorted(range(len(mine[0])), key=lambda k: mine[0][k])
    summed, x_summed = [mine[0][k] for k in order], [mine[1][k] for k in order]
    both, x_both = list(theirs[0]), list(theirs[1])
    free = [axis for axis in range(len(p.shape)) if axis not in (*summed, *both)]
    x_free = [axis for axis in range(len(x.shape)) if axis not in (*x_summed, *x_both)]
    sizes = lambda value, axes: [value.shape[axis] for axis in axes]  # noqa: E731
    b, o, n_in = (math.prod(sizes(p, axes)) for axes in (both, free, summed))
    positions = sizes(x, x_free)
    of_p, of_x = len(free), len(x_free)
    at_free = range(len(both) + (0 if i == 0 else of_x), len(both) + (of_p if i == 0 else of_x + of_p))
    at_x = range(len(both) + (of_p if i == 0 else 0), len(both) + (of_p + of_x if i == 0 else of_x))
    ends = tuple(np.argsort([*both, *free, *summed]))
    layout = Layout.of((*sizes(p, both), *sizes(p, free), *sizes(p, summed))).transposed(ends)
    if layout is None:
        return None

    def rows(a: jax.Array, front: Any, middle: Any, last: Any, n: int) -> jax.Array:
        """(m, ...) as (b, m, *positions, n), or without b where there is one matrix."""
        a = a.transpose(*(1 + axis for axis in front), 0, *(1 + axis for axis in (*middle, *last)))
        a = a.reshape(b, a.shape[len(both)], *positions, n)
        return a if both else a[0]

    def make(d, x):
        dy = rows(d[0], range(len(both)), at_x, at_free, o)
        x = rows(x, x_both, x_free, x_summed, n_in)
        if not both:
            return moved(Outer(dy, x), (o, n_in), layout)
        if o == n_in == 1:
            dy, x = (jnp.moveaxis(a[..., 0], 0, -1) for a in (dy, x))
            return moved(Product(dy, x), (b,), layout)
        return moved(Stacked(Outer(dy, x)), (b, o, n_in), layout)

    return Use(p, "outer products" if not both else f"outer products of {b} matrices", (x,), make)


def moved(factor: Factor, start: tuple[int, ...], layout: Layout) -> Factor:
    """A factor whose gradient is of shape start, which is the start of a layout but for how its axes are split."""
    layout = Layout(start, layout.digits, layout.shape)
    return factor if layout.trivial else LaidOut(factor, layout)


# --- convolutions ---


@rule("conv_general_dilated")
def of_convolution(step: Step, i: int, makers: Makers) -> Use | None:
    """y = p * x: dp is the correlation of dy and x; several images of one example are summed over."""
    x, kernel, given = step.operands[0], step.operands[1], step.params
    if i != 1 or x.kind != "data" or given["batch_group_count"] != 1:
        return None
    of_x, of_kernel, of_y = given["dimension_numbers"]
    spatial = range(2, len(of_x))
    spread = [
        (n - 1) * gap + 1 for n, gap in zip((x.shape[of_x[k]] for k in spatial), given["lhs_dilation"], strict=True)
    ]
    axes = [
        Axis(n, kernel.shape[of_kernel[k]], stride, gap, low, high)
        for k, n, stride, gap, (low, high) in zip(
            spatial, spread, given["window_strides"], given["rhs_dilation"], given["padding"], strict=True
        )
    ]
    if min(axis.count for axis in axes) < 1 or min(kernel.shape) < 1:
        return None
    at, groups = Windows(tuple(axes)), given["feature_group_count"]
    start = (kernel.shape[of_kernel[0]], *at.kernel, kernel.shape[of_kernel[1]])
    layout = Layout.of(start).transposed(tuple(np.argsort([of_kernel[0], *of_kernel[2:], of_kernel[1]])))
    if layout is None:
        return None
    images = x.shape[of_x[0]]

    def channels_last(a: jax.Array, spec: Any) -> jax.Array:
        """(images, m, *spatial, channels)."""
        return a.transpose(1 + spec[0], 0, *(1 + axis for axis in spec[2:]), 1 + spec[1])

    def make(d, x):
        dy, x = channels_last(d[0], of_y), channels_last(x, of_x)
        gaps = [(0, 0, 0), (0, 0, 0), *((0, 0, gap - 1) for gap in given["lhs_dilation"]), (0, 0, 0)]
        x = lax.pad(x, jnp.zeros((), x.dtype), gaps)
        if images == 1:
            return moved(Correlation(dy[0], x[0], at, groups), start, layout)
        return moved(over_turns(Correlation(dy, x, at, groups)), start, layout)

    return Use(kernel, "a correlation", (x,), make)


# --- rows of tables ---


@rule("gather")
def of_lookup(step: Step, i: int, makers: Makers) -> Use | None:
    """y = p[x], rows of a table: dp adds dy into the rows that were looked up."""
    table, x = step.operands[:2]
    numbers, mode = step.params["dimension_numbers"], step.params["mode"]
    if i != 0 or x.kind != "data" or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    others = [n for k, n in enumerate(table.shape) if k != axis]
    whole = [n for k, n in enumerate(step.params["slice_sizes"]) if k != axis]
    if numbers.collapsed_slice_dims != (axis,) or whole != others or not others:
        return None
    kept = list(numbers.offset_dims)
    positions = [k for k in range(len(step.results[0].shape)) if k not in kept]

    def make(d, x):
        return looked_up(d[0], x[..., 0], table.shape, axis, positions, kept, mode == lax.GatherScatterMode.CLIP)

    return Use(table, "rows of a table", (x,), make)


@rule("dynamic_slice")
def of_slice(step: Step, i: int, makers: Makers) -> Use | None:
    """y = p[x:x+1], one row of a table."""
    table, *starts = step.operands
    moving = [k for k, (n, size) in enumerate(zip(table.shape, step.params["slice_sizes"], strict=True)) if n != size]
    if i != 0 or len(moving) != 1 or len(table.shape) < 2:
        return None
    (axis,) = moving
    if step.params["slice_sizes"][axis] != 1 or starts[axis].kind != "data":
        return None
    kept = [k for k in range(len(table.shape)) if k != axis]

    def make(d, x):
        x = jnp.where(x < 0, x + table.shape[axis], x) if jnp.issubdtype(x.dtype, jnp.signedinteger) else x
        return looked_up(jnp.squeeze(d[0], 1 + axis), x, table.shape, axis, [], list(range(len(kept))), True)

    return Use(table, "rows of a table", (starts[axis],), make)


def looked_up(
    d: jax.Array, x: jax.Array, shape: tuple[int, ...], axis: int, positions: list[int], kept: list[int], clip: bool
) -> Factor:
    """The factor of a table of that shape, whose rows lie along axis. d (m, ...): which axes are positions, and which
    are those of a row."""
    d = d.transpose(0, *(1 + k for k in positions), *(1 + k for k in kept))
    d = d.reshape(*d.shape[: 1 + len(positions)], -1)
    if clip:
        x = jnp.clip(x, 0, shape[axis] - 1)
    others = [k for k in range(len(shape)) if k != axis]
    layout = Layout.of((shape[axis], *(shape[k] for k in others))).transposed(tuple(np.argsort([axis, *others])))
    assert layout is not None
    return moved(Lookup(d, x, shape[axis]), (shape[axis], d.shape[-1]), layout)
