"""Compare anyone's function: a jax.custom_vjp beside a plain twin, or a function beside its backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_finite, check_is, describe
from fnbp.comparison.numerics import as_jax, as_numpy_32, first_line, index_of_largest, is_inexact, real_pairs
from fnbp.comparison.plan import Plan, check_no_lists, is_inside
from fnbp.comparison.report import Row
from fnbp.comparison.sizes import MORE_SIZES
from fnbp.comparison.subject import Subject, subject_of_function

FLOAT0 = jax.dtypes.float0
FORWARDS_DIFFER = 1e3  # roundings of the dtype, relative to the largest value


def plan_of_function(
    f: Any,
    args: tuple,
    reference: Callable | None,
    vjp: Callable | None,
    sizes: Callable[[int], tuple] | None = None,
    name: str | None = None,
    domain: Callable[..., Any] | None = None,
) -> Plan:
    """Plan the comparison of a function: it is the one subject, unless it and its reference return different values.

    Without reference and vjp, a jax.custom_vjp is compared with its own primal function.

    Raises: TypeError for what is no function, for other than one of reference and vjp, and for what jax.vjp cannot
            differentiate; ValueError for arguments that hold no floating point numbers, or some that are not finite.
    """
    if reference is None and vjp is None and isinstance(f, (jax.custom_vjp, jax.custom_jvp)) and not f.nondiff_argnums:
        reference = f.fun
    check_function(f, args, reference, vjp)
    check_is("compare", "name", name or "", str)
    name = name or name_of(f)
    check_arguments(name, args)
    args = as_numpy_32(args)
    if domain is not None and not is_inside(domain, args):
        raise ValueError(f"compare: the arguments of {name} lie outside of its domain")
    if sizes is not None:
        check_sizes(name, sizes, args)
    subject = subject_of_function(name, f, args, reference, vjp, sizes, domain)
    different = compare_forwards(subject, args) if reference is not None else []
    check_differentiable(subject, args)
    notes = (
        () if sizes else (f"{name}: only the sizes that were given were tried; give sizes=lambda n: args of size n",)
    )
    return Plan([] if different else [subject], lambda rows: different or rows, notes)


def name_of(f: Any) -> str:
    """The name of a function, or of the type of another callable."""
    return getattr(f, "__name__", type(f).__name__)


def check_function(f: Any, args: tuple, reference: Callable | None, vjp: Callable | None) -> None:
    """TypeError unless f is a function with one way to compare it."""
    if isinstance(f, type) or not callable(f):
        raise TypeError(f"compare: subject must be a Layer or a function, got {describe(f)}")
    name = name_of(f)
    if (getattr(f, "__module__", None) or "").startswith("fnbp.layers"):
        raise TypeError(f"compare: {name} makes a layer; call it: {name}()")
    if getattr(f, "nondiff_argnums", ()):
        raise TypeError(
            f"compare: {name} has nondiff_argnums: close over those arguments, as in "
            f"compare(lambda x: {name}(x, 3), x, reference=plain)"
        )
    for what, given in (("reference", reference), ("vjp", vjp)):
        if given is not None and not callable(given):
            raise TypeError(f"compare: {what} must be a function, got {describe(given)}")
    if reference is not None and vjp is not None:
        raise TypeError(f"compare: {name} is given reference= and vjp=; give one of the two")
    if reference is None and vjp is None:
        raise TypeError(
            f"compare: {name} has no backward to compare: give reference=plain for a jax.custom_vjp, or "
            "vjp=backward, backward(args, cotangent) -> cotangents of args"
        )
    check_no_lists(name, args)


def check_sizes(name: str, sizes: Any, args: tuple) -> None:
    """TypeError unless sizes is a function of a size that returns arguments as those that were given: as many, with
    floating point numbers where they have some."""
    if not callable(sizes):
        raise TypeError(f"compare: sizes must be a function, n -> the arguments at size n, got {describe(sizes)}")
    n, made = first_size(name, sizes)
    if not isinstance(made, (tuple, list)) or len(made) != len(args):
        came = f"{len(made)} of them" if isinstance(made, (tuple, list)) else describe(made)
        raise TypeError(f"compare: sizes must return a tuple of the {len(args)} arguments of {name}, got {came}")
    for i, (arg, other) in enumerate(zip(args, as_numpy_32(tuple(made)), strict=True)):
        if list(map(is_inexact, jax.tree.leaves(arg))) != list(map(is_inexact, jax.tree.leaves(other))):
            ours, theirs = (", ".join(map(describe, jax.tree.leaves(tree))) for tree in (arg, other))
            raise TypeError(f"compare: argument {i} of {name} is {ours}, but sizes({n}) returns {theirs} there")


def first_size(name: str, sizes: Callable[[int], Any]) -> tuple[int, Any]:
    """The first size that sizes takes, and the arguments at it. ValueError if it takes none of those that are tried."""
    first: Exception | None = None
    for n in (2, 1, *MORE_SIZES):
        try:
            return n, sizes(n)
        except Exception as error:  # it may refuse odd numbers, or small ones
            first = first or error
    raise ValueError(
        f"compare: sizes of {name} takes none of the sizes that are tried; sizes(2) raises {type(first).__name__}: "
        f"{first_line(first or ValueError())}"
    ) from first


def check_arguments(name: str, given: tuple) -> None:
    """TypeError or ValueError unless every argument is an array, one of them of floating point, and all are finite."""
    leaves = jax.tree.leaves(as_numpy_32(given))
    for i, leaf in enumerate(leaves):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"compare: leaf {i} of the arguments of {name} is {describe(leaf)}: close over it instead")
    if not any(is_inexact(a) for a in leaves):
        found = ", ".join(map(describe, leaves)) or "none"
        raise ValueError(f"compare: {name} has no floating point argument to differentiate, got {found}")
    numbers = jax.tree.map(lambda a: a if hasattr(a, "dtype") else np.asarray(a), given)
    check_finite("compare", f"what {name} is given", numbers)


def check_differentiable(subject: Subject, args: tuple) -> None:
    """TypeError if the reference returns nothing to differentiate, or jax.vjp cannot differentiate it."""

    def pulled(*args):
        y, pull = jax.vjp(lambda *a: subject.reference(a, subject.fixed), *args)
        flat, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, y))
        zeros = [jnp.zeros(a.shape, a.dtype) if is_inexact(a) else np.zeros(a.shape, FLOAT0) for a in flat]
        return [d for d in jax.tree.leaves(pull(jax.tree.unflatten(tree, zeros))) if is_inexact(d)]

    try:
        y = jax.eval_shape(lambda *args: subject.reference(args, subject.fixed), *args)
    except Exception as error:
        error.add_note(f"compare: {subject.path} was called with {', '.join(map(describe, jax.tree.leaves(args)))}")
        raise
    if not any(is_inexact(a) for a in jax.tree.leaves(y)):
        found = ", ".join(describe(a) for a in jax.tree.leaves(y)) or "nothing"
        raise TypeError(f"compare: {subject.path} must return a floating point array to be differentiated, got {found}")
    try:
        jax.eval_shape(pulled, *args)
    except Exception as error:
        raise TypeError(
            f"compare: jax.vjp cannot differentiate {subject.path}, so there is nothing to compare with: "
            f"{first_line(error)}"
        ) from error


def compare_forwards(subject: Subject, args: tuple) -> list[Row]:
    """A row of kind "forward" for each output in which a custom_vjp and its reference differ.

    Raises: ValueError if they return different shapes or dtypes.
    """
    shapes = [jax.eval_shape(lambda *a, f=f: f(a, subject.fixed), *args) for f in (subject.forward, subject.reference)]
    ours, theirs = ([(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in shapes)
    if ours != theirs or jax.tree.structure(shapes[0]) != jax.tree.structure(shapes[1]):
        text = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in side) for side in (ours, theirs)]
        raise ValueError(f"compare: {subject.path} returns {text[0]}, its reference {text[1]}; they must match")
    rows = []
    y, expected = (jax.tree.leaves(f(as_jax(args), subject.fixed)) for f in (subject.forward, subject.reference))
    for i, (a, b) in enumerate(zip(y, expected, strict=True)):
        a, b = real_pairs(a), real_pairs(b)
        eps = float(jnp.finfo(y[i].dtype).eps) if is_inexact(y[i]) else 0.0
        error = float(np.max(abs(a - b), initial=0)) / (float(np.max(abs(b), initial=0)) or 1.0)
        if error > FORWARDS_DIFFER * eps:
            index = index_of_largest(abs(a - b))
            hint = f"the functions themselves differ by {error:.1e}: the reference is a different function"
            spot = {"index": index, "manual": float(a[index]), "automatic": float(b[index])}
            leaf = "y" if len(y) == 1 else f"y[{i}]"
            rows.append(Row(subject.path, leaf, a.shape, str(y[i].dtype), "forward", error=error, hint=hint, **spot))
    return rows
