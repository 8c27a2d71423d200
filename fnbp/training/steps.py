"""What can be recorded of each training step: numbers that a compiled loop writes beside the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnbp.arrays.checks import check_name, describe

__all__ = ["Step", "gradient_norm", "learning_rate", "update_norm"]


class Step(NamedTuple):
    """One step of training, as functions of fit's record see it.

    value      J of the batch
    params     before the update
    grads      what gradient returned: the tree of params
    updates    what the optimizer adds to params
    opt_state  after the update
    more       what gradient returned beside J and the state, or None
    """

    value: jax.Array
    params: Any
    grads: Any
    updates: Any
    opt_state: Any
    more: Any = None


Record = tuple[tuple[str, Callable[[Step], Any]], ...]


def gradient_norm(step: Step) -> jax.Array:
    """The norm of the gradient of all parameters, |dJ/dtheta|."""
    return optax.tree.norm(step.grads)


def update_norm(step: Step) -> jax.Array:
    """The norm of the update of all parameters."""
    return optax.tree.norm(step.updates)


def learning_rate(step: Step) -> jax.Array:
    """The learning rate, of an optimizer that holds it in its state: optax.inject_hyperparams(optax.adam)(schedule).

    Raises: ValueError if the state holds none, or several.
    """
    held = optax.tree.get_all_with_path(step.opt_state, "learning_rate")
    found = [value for _, value in held if hasattr(value, "dtype")]  # a schedule's own state has the name, too
    if len(found) != 1:
        raise ValueError(
            f"learning_rate: the state of the optimizer holds {len(found)} learning rates, expected 1; "
            "optax.inject_hyperparams(optax.adam)(learning_rate=...) keeps it there"
        )
    return jnp.asarray(found[0])


def as_record(record: Any) -> Record:
    """What to record, by name, of a dict, of several functions, or of one.

    Raises: TypeError if one is not a function; ValueError if two have one name, or one is called "loss" or "step".
    """
    if record is None:
        return ()
    if not isinstance(record, dict):
        several = record if isinstance(record, (tuple, list)) else (record,)
        pairs = [(getattr(one, "__name__", None), one) for one in several]
    else:
        pairs = list(record.items())
    for name, f in pairs:
        if not callable(f) or hasattr(f, "backward"):
            raise TypeError(f"fit: record takes functions of a Step, such as fnbp.gradient_norm, got {describe(f)}")
        check_name("fit: record", name)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or {"loss", "step"} & {*names}:
        raise ValueError(f"fit: record must have different names, none of them loss or step; got {names}")
    return tuple(pairs)


def recorded(record: Record, step: Step) -> dict[str, Any]:
    """What the functions make of a step. ValueError if one returns other than a number."""
    found = {name: f(step) for name, f in record}
    for name, value in found.items():
        dtype = jnp.result_type(value)
        if jnp.shape(value) or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise ValueError(f"fit: record {name} must return a real number, got {describe(value)}")
    return {name: jnp.asarray(value) for name, value in found.items()}
