"""What opened is given, checked before anything is computed."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import describe
from fnbp.layer import Layer
from fnbp.losses.loss import Loss


def check_loss(loss: Any) -> None:
    """TypeError unless loss is a function."""
    if isinstance(loss, (Layer, Loss)) or not callable(loss):
        raise TypeError(f"opened: loss must be a function (params, *example) -> (), got {describe(loss)}")


def shared_of(shared: Any) -> tuple[int, ...]:
    """The numbers of shared arguments. ValueError unless these are numbers from 1 on."""
    places = tuple(shared) if isinstance(shared, (tuple, list)) else (shared,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i > 0 for i in places):
        raise ValueError(f"opened: shared must be numbers of arguments behind params, 1 the first; got {shared!r}")
    return places


def returned_of(name: str, returned: Any, has_aux: bool) -> tuple[Any, Any]:
    """loss, aux. TypeError if what the loss returned is not a real number, or a pair of one and aux."""
    if has_aux and not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"{name}: with has_aux the loss must return (loss, aux), got {describe(returned)}")
    loss, aux = returned if has_aux else (returned, ())
    if isinstance(loss, tuple):
        raise TypeError(f"{name}: the loss must return one number, got {describe(loss)}; with aux: has_aux=True")
    if not is_number(loss):
        raise TypeError(
            f"{name}: the loss of one example must be a real number of shape (), got {describe(loss)}; a loss of a "
            "whole batch loses its mean, and each argument its example axis"
        )
    return loss, aux


def is_number(loss: Any) -> bool:
    """True for one real number."""
    try:
        return jnp.shape(loss) == () and jnp.issubdtype(jnp.result_type(loss), jnp.floating)
    except TypeError:
        return False


def masked(name: str, mask: Any, tree: Any) -> list[bool]:
    """The leaves of a mask. ValueError unless it is a tree of params of True and False."""
    leaves, form = jax.tree.flatten(mask)
    if form != tree or not all(isinstance(one, (bool, np.bool_)) for one in leaves):
        raise ValueError(f"{name}: mask must be a tree of params of True and False, {tree}; got {form}")
    return [bool(one) for one in leaves]


def check_params(name: str, params: Any) -> None:
    """TypeError, by its path, if a parameter is no array of numbers."""
    for where, p in jax.tree_util.tree_leaves_with_path(params):
        path = f"{name}: params{jax.tree_util.keystr(where)}"
        if not hasattr(p, "dtype") and not isinstance(p, (bool, int, float, complex)):
            raise TypeError(
                f"{path} must be an array, got {describe(p)}; of an Equinox model open a function of its arrays: "
                "params, static = eqx.partition(model, eqx.is_inexact_array)"
            )


def check_batch(name: str, loss: Callable[..., Any], shared: tuple[int, ...], batch: tuple[Any, ...]) -> None:
    """ValueError or TypeError unless every argument but the shared ones has the examples as first axis."""
    if max(shared, default=0) > len(batch):
        raise ValueError(f"{name}: argument {max(shared)} is shared, but there are only {len(batch)} behind params")
    sizes: dict[int, str] = {}
    for i, argument in enumerate(batch, 1):
        for where, a in jax.tree_util.tree_leaves_with_path(argument if i not in shared else ()):
            label = f"{argument_name(loss, i)}{jax.tree_util.keystr(where)}"
            if not hasattr(a, "shape") or not a.shape:
                raise TypeError(
                    f"{name}: {label} must be an array with the examples as first axis, got {describe(a)}; what all "
                    f"examples share is named by shared=({i},)"
                )
            sizes.setdefault(a.shape[0], label)
    if not sizes:
        raise ValueError(f"{name}: no argument has an example axis")
    if len(sizes) > 1:
        came = ", ".join(f"{label} has {n}" for n, label in sizes.items())
        raise ValueError(f"{name}: all arguments must have equally many examples as first axis: {came}")
    if 0 in sizes:
        raise ValueError(f"{name}: there are 0 examples")


def argument_name(loss: Callable[..., Any], i: int) -> str:
    """What the loss calls its argument i, params being 0."""
    try:
        parameters = list(inspect.signature(loss).parameters.values())
        own = parameters[min(i, len(parameters) - 1)]
        return own.name if own.kind is not own.VAR_POSITIONAL else f"argument {i}"
    except (TypeError, ValueError, IndexError):
        return f"argument {i}"
