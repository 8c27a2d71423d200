"""How a factor goes back through what is derived from parameters: from that of the result to that of an operand.

Where the result has the form of the operand (a transpose, a product of two matrices), so has the factor. Anything else
ends here: Through then takes all steps from there to the parameters at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.combinators.factors import Cast
from fnbp.factor import Added, Factor, Outer
from fnbp.opening.factors import LaidOut, laid_out
from fnbp.opening.layouts import Layout
from fnbp.opening.program import Step

SAME = ("copy", "copy_p", "sharding_constraint", "optimization_barrier")
MOST = 16  # uses of one value whose factors go back one by one

Values = tuple[Any, ...]
Pull = Callable[[Step, int, int, Factor, Values], Factor | None]
PULLS: dict[str, Pull] = {}


def pull(*names: str) -> Callable[[Pull], Pull]:
    """Register how a factor goes back through these primitives: (step, operand, result, factor, the values of the
    operands) -> the factor of the operand, or None if it has no such form."""

    def register(function: Pull) -> Pull:
        PULLS.update(dict.fromkeys(names, function))
        return function

    return register


def pulled(step: Step, i: int, j: int, factor: Factor, values: tuple[Any, ...]) -> Factor | None:
    """The factor of operand i, given that of result j; None if it has no form of its own."""
    own = PULLS.get(step.name)
    if own is None or uses(factor) > MOST or sum(one is step.operands[i] for one in step.operands) > 1:
        return None
    return own(step, i, j, factor, values)


def uses(factor: Factor) -> int:
    """How many factors are added."""
    inner = getattr(factor, "factor", None)
    if isinstance(factor, Added):
        return uses(factor.one) + uses(factor.other)
    return 1 if inner is None else uses(inner)


@pull(*SAME)
def of_same(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p."""
    return factor if i == j and len(step.operands) == len(step.results) else None


@pull("neg")
def of_negative(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = -p."""
    return factor.scaled(-1)


@pull("add", "add_any", "sub")
def of_sum(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p + q."""
    if step.operands[i].shape != step.results[0].shape:
        return None
    return factor.scaled(-1) if step.name == "sub" and i == 1 else factor


@pull("mul")
def of_multiple(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = c p, c a number."""
    if step.operands[1 - i].shape or step.operands[i].shape != step.results[0].shape:
        return None
    return None if jnp.iscomplexobj(values[1 - i]) else factor.scaled(values[1 - i])


@pull("convert_element_type")
def of_cast(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p in another dtype."""
    old, new = step.operands[0].aval.dtype, step.results[0].aval.dtype
    if not jnp.issubdtype(old, jnp.floating) or not jnp.issubdtype(new, jnp.floating):
        return None
    return Cast(factor, np.dtype(old), np.dtype(jnp.promote_types(old, new)))


@pull("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
def of_reshape(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p in another shape; a broadcast that repeats numbers has no form of its own."""
    before, after = step.operands[0].shape, step.results[0].shape
    if (
        len(step.operands) > 1
        or np.prod(before) != np.prod(after)
        or (step.params.get("dimensions") and step.name == "reshape")
    ):
        return None
    return in_layout(factor, after, lambda layout: layout.reshaped(before))


@pull("transpose")
def of_transpose(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p^T."""
    axes = tuple(int(axis) for axis in np.argsort(step.params["permutation"]))
    return in_layout(factor, step.results[0].shape, lambda layout: layout.transposed(axes))


def in_layout(factor: Factor, shape: tuple[int, ...], change: Callable[[Layout], Layout | None]) -> Factor | None:
    """A factor of that shape, its layout changed."""
    if isinstance(factor, LaidOut):
        return laid_out(factor.factor, change(factor.layout))
    return laid_out(factor, change(Layout.of(shape)))


@pull("dot_general")
def of_dot(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p q^T with the gradient sum_s a_s b_s^T: that of p is sum_s a_s (q^T b_s)^T, that of q sum_s b_s (p^T a_s)^T,
    whichever axes are summed over."""
    contract, batch = step.params["dimension_numbers"]
    other = step.operands[1 - i]
    if any(batch) or any(len(value.shape) != 2 for value in step.operands) or len(contract[0]) != 1:
        return None
    form = jax.eval_shape(lambda factor: factor.outer(), factor)
    if form is None or (form[0].shape[-1], form[1].shape[-1]) != step.results[0].shape:
        return None
    rows, columns = factor.outer()  # type: ignore[misc]
    stays, changes = (rows, columns) if i == 0 else (columns, rows)
    changes = jnp.tensordot(changes, values[1 - i], ((-1,), (1 - contract[1 - i][0],)))
    dtype = jnp.result_type(factor_dtype(factor))
    d, x = stays.astype(dtype), changes.astype(dtype)
    error_first = factor.turned == (i == 1)  # of rows and columns, then of what stays and changes
    n, r = d.shape[-1], other.shape[contract[1 - i][0]]
    layout = Layout.of((n, r) if error_first else (r, n))
    made = Outer(d, x) if error_first else Outer(x, d)
    if (contract[i][0] == 0) == error_first:
        return laid_out(made, layout.transposed((1, 0)))
    return made


def factor_dtype(factor: Factor) -> Any:
    """The dtype of the total."""
    return jax.eval_shape(factor.total).dtype


@pull("concatenate")
def of_parts(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = [p, q, ...]: the part of the gradient that belongs to p, of a sum of outer products."""
    along = step.params["dimension"]
    start = sum(value.shape[along] for value in step.operands[:i])
    return of_matrix(step, factor, along, lambda a: a[..., start : start + step.operands[i].shape[along]])


@pull("slice")
def of_part(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y = p[start:end] along one axis: 0 elsewhere, of a sum of outer products."""
    if step.params["strides"] is not None:
        return None
    return of_padded(step, factor, step.params["start_indices"])


@pull("split")
def of_split(step: Step, i: int, j: int, factor: Factor, values: Values) -> Factor | None:
    """y_j = part j of p along one axis."""
    start = [0] * len(step.operands[0].shape)
    start[step.params["axis"]] = sum(step.params["sizes"][:j])
    return of_padded(step, factor, start, j)


def of_padded(step: Step, factor: Factor, start: Any, j: int = 0) -> Factor | None:
    """The factor of an array of which result j is the part from start on."""
    before, after = step.operands[0].shape, step.results[j].shape
    cut = [k for k, (n, m) in enumerate(zip(before, after, strict=True)) if n != m]
    if not cut:
        return factor
    if len(cut) > 1:
        return None
    (k,) = cut
    ends = (start[k], before[k] - start[k] - after[k])
    return of_matrix(step, factor, k, lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [ends]), j)


def of_matrix(step: Step, factor: Factor, axis: int, change: Callable[[Any], Any], j: int = 0) -> Factor | None:
    """The factor with one side of its outer products changed, of a result that is a vector or a matrix."""
    shape = step.results[j].shape
    form = jax.eval_shape(lambda factor: factor.outer(), factor)
    if len(shape) > 2 or form is None or (form[0].shape[-1], form[1].shape[-1]) != (*shape, 1)[:2]:
        return None
    rows, columns = factor.outer()  # type: ignore[misc]
    rows, columns = (change(rows), columns) if axis == 0 else (rows, change(columns))
    n, r = rows.shape[-1], columns.shape[-1]
    if not factor.turned:
        made, layout = Outer(rows, columns), Layout.of((n, r))
    else:
        made, layout = Outer(columns, rows), Layout.of((r, n)).transposed((1, 0))
    assert layout is not None
    return laid_out(made, layout if len(shape) == 2 else layout.reshaped((n,)))
