"""Checks of what fit is asked for, before the first step."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fnbp.arrays.checks import as_arrays, check_finite, check_is, check_key, check_size, describe
from fnbp.arrays.placement import placement, summed
from fnbp.construction import once
from fnbp.layer import Context, Layer, mask_behind
from fnbp.losses.loss import Loss, check_target, losses_of
from fnbp.sharding import predicted

STEPS = 2**31 - 1  # steps are counted in int32


def check_traced(*trees: Any) -> None:
    """TypeError if fit itself is traced: it is a Python loop, which looks at values between compiled calls."""
    leaves = jax.tree.leaves(trees, is_leaf=lambda node: isinstance(node, Iterator))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            "fit: it is a Python loop, which cannot run under jit or vmap; for an ensemble write a training step with "
            "fnbp.value_and_grad and vmap that"
        )


def check_together(**held: Any) -> None:
    """ValueError if arrays that were put on devices lie on different ones. held: trees by name."""
    where: dict[str, Any] = {}
    for what, tree in held.items():
        for a in jax.tree.leaves(tree):
            if isinstance(a, jax.Array) and a.committed:
                where.setdefault(what, a.sharding.device_set)
    for what, there in where.items():
        first, on = next(iter(where.items()))
        if there != on:
            raise ValueError(
                f"fit: {first} and {what} were put on different devices, {sorted(map(str, on))} and "
                f"{sorted(map(str, there))}: place both on one mesh, see fnbp.sharding"
            )


def check_optimizer(optimizer: Any) -> None:
    """TypeError unless optimizer is an optax transformation; the message says how to make one."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    hint = ""
    if hasattr(optimizer, "gradient_transformation"):
        hint = "; give its .gradient_transformation()"
    elif callable(optimizer):
        name = getattr(optimizer, "__name__", "adam")
        hint = f"; call it: {name}() with its learning rate, as optax.{name}(1e-3)"
    raise TypeError(f"fit: optimizer must be a GradientTransformation, got {describe(optimizer)}{hint}")


def check_request(net: Layer, loss: Loss, params: Any, key: Any, patience: Any, validation: Any) -> None:
    """ValueError or TypeError if fit cannot start, whatever the data."""
    check_is("fit", "net", net, Layer)
    check_is("fit", "loss", loss, Loss)
    check_key("fit", key)
    for leaf in jax.tree.leaves(params):
        if not isinstance(leaf, (int, float)) and not hasattr(leaf, "dtype"):
            raise TypeError(f"fit: params must be a tree of arrays, got a leaf {describe(leaf)}")
    check_finite("fit", "params", jax.tree.map(jnp.asarray, params))
    if patience is not None:
        check_size("fit", "patience", patience)
        if validation is None:
            raise ValueError("fit: patience needs validation=(x, y)")


def check_steps(start: Any, done: int, steps: Any, epochs: Any, batches: int) -> int:
    """The step to end at, if so many were done before. ValueError or TypeError if start or the number is impossible."""
    if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
        raise TypeError(f"fit: start must be a whole number, got {start!r}")
    if start < 0:
        raise ValueError(f"fit: start must be at least 0, got {start}")
    last = int(start) - done + total_steps(steps, epochs, batches)
    if last > STEPS:
        raise ValueError(f"fit: start + steps must be below 2**31, got {last}: steps are counted in int32")
    return last


def total_steps(steps: Any, epochs: Any, batches: int) -> int:
    """How many steps are asked for; ValueError unless exactly one of the two is given."""
    if (steps is None) == (epochs is None):
        raise ValueError("fit: give steps or epochs, one of the two")
    if steps is not None:
        check_size("fit", "steps", steps)
        return int(steps)
    check_size("fit", "epochs", epochs)
    return int(epochs) * batches


def check_threshold(threshold: Any) -> float:
    """threshold, -inf for None; TypeError or ValueError unless it is a number."""
    if threshold is None:
        return -np.inf
    if isinstance(threshold, jax.Array) and threshold.ndim == 0:
        threshold = threshold.item()
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)):
        raise TypeError(f"fit: threshold must be a number, got {describe(threshold)}")
    if np.isnan(threshold):
        raise ValueError("fit: threshold must be a number, got nan")
    return float(threshold)


def check_opt_state(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, must: tuple[bool, ...]
) -> Any:
    """opt_state; ValueError if it belongs to another optimizer or other params, or is not finite where it must be."""
    due = jax.eval_shape(optimizer.init, params)
    if jax.tree.structure(opt_state) != jax.tree.structure(due):
        raise ValueError(
            f"fit: opt_state belongs to another optimizer or net: expected {kinds(due)}, got {kinds(opt_state)}"
        )
    for a, b in zip(jax.tree.leaves(opt_state), jax.tree.leaves(due), strict=True):
        if jnp.shape(a) != b.shape:
            raise ValueError(
                f"fit: opt_state belongs to other params: an entry must have shape {b.shape}, got {jnp.shape(a)}"
            )
    opt_state = jax.tree.map(jnp.asarray, opt_state)
    check_finite("fit", "opt_state", [a for a, due in zip(jax.tree.leaves(opt_state), must, strict=True) if due])
    return opt_state


def kinds(state: Any) -> str:
    """The names of the types in a state: (ScaleByAdamState, EmptyState)."""
    if type(state) is tuple:
        return f"({', '.join(map(kinds, state))})"
    return type(state).__name__


def arrays_of(what: str, x: Any, y: Any) -> tuple[Any, Any]:
    """Data as JAX arrays; TypeError if something is not an array; the message says how to make one."""
    for name, tree in (("x", x), ("y", y)):
        if isinstance(tree, (bool, int, float)):  # no example at all: check_data says so
            continue
        for leaf in jax.tree.leaves(tree, is_leaf=lambda node: node is None or isinstance(node, Iterator)):
            if not hasattr(leaf, "dtype") or leaf.dtype == object or leaf.dtype.kind in "SU":
                came = describe(tree) if isinstance(tree, (list, tuple, dict)) else describe(leaf)
                raise TypeError(
                    f"fit: {what}: {name} must be an array, or a tree of arrays, with the examples as first axis; got "
                    f"{came}; make it one: jnp.asarray({name})"
                )
    return as_arrays("fit", f"{what}: x", x), as_arrays("fit", f"{what}: y", y)


def check_data(
    what: str, net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any, ctx: Context, whole: bool = True
) -> int:
    """How many examples there are; ValueError or TypeError if the data do not fit each other, the net or the loss.

    whole: these are all data, so that something must count in the loss.

    The layers check values too, of tokens and lengths: they are given x itself, but only the shapes of params, and at
    inference of state: batch_norm has no statistics yet.
    """
    examples = check_examples(what, x, y)
    try:
        if ctx.train:
            prediction = jax.eval_shape(lambda p: predicted(net, p, state, x, ctx), params)
        else:
            prediction = jax.eval_shape(lambda p, s: predicted(net, p, s, x, ctx), params, state)
    except TypeError as error:
        if any(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(x)):
            error.add_note("fit: x is uint8; give floating point numbers: x.astype('float32') / 255")
        raise
    mask = mask_behind(net, x, ctx.mask)
    check_target(loss, prediction, y, mask)
    if whole:
        check_counts(what, loss, prediction, y, mask, examples)
    return examples


def check_counts(what: str, loss: Loss, prediction: Any, y: Any, mask: Any, examples: int) -> None:
    """ValueError if nothing counts in the loss, as where each label is its ignore_index.

    The loss of a prediction of NaN tells: it is NaN, unless nothing counts. A few examples are looked at a time.
    """
    size = examples if any(placement(a) is not None for a in jax.tree.leaves(y)) else 64
    form = tuple((a.shape[1:], a.dtype) for a in jax.tree.leaves(prediction))
    counts = once(any_counts, loss, jax.tree.structure(prediction), form)
    for start in range(0, examples, size):
        if counts(*jax.tree.map(lambda a, start=start: a[start : start + size], (y, mask))):
            return
    raise ValueError(f"fit: {what}: nothing counts in the loss {loss.name}: is each label its ignore_index?")


def any_counts(loss: Loss, tree: Any, form: tuple[Any, ...]) -> Callable[[Any, Any], jax.Array]:
    """(y, mask) -> whether the loss of any example depends on the prediction; compiled."""

    def counts(y, mask):
        m = jax.tree.leaves(y)[0].shape[0]
        lost = jax.tree.unflatten(tree, [jnp.full((m, *shape), jnp.nan, dtype) for shape, dtype in form])
        return jnp.any(jnp.isnan(losses_of(loss, lost, y, mask)[0]))

    return jax.jit(functools.partial(summed, counts))


def check_examples(what: str, x: Any, y: Any) -> int:
    """How many examples there are; ValueError if x and y differ in that, there is none, or one is not finite."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((x, y))}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(f"fit: {what} need equally many examples, at least 1; got {sorted(sizes)}")
    check_finite("fit", f"{what}: x", x)
    check_finite("fit", f"{what}: y", y)
    return sizes.pop()[0]


def check_augmented(
    what: str, net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any, ctx: Context, augment: Callable
) -> int:
    """As check_data, for x and y as augment returns them: their shapes, and the values of those that it is given."""
    examples = check_examples(what, x, y)
    made = jax.eval_shape(augment, ctx.key, (x, y))
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise TypeError(f"fit: augment must return (x, y), got {describe(made)}")
    after = {leaf.shape[:1] for leaf in jax.tree.leaves(made)}
    if after != {(examples,)}:
        raise ValueError(f"fit: augment must return as many examples as it is given, {examples}; got {after}")
    prediction = jax.eval_shape(lambda p, x: predicted(net, p, state, x, ctx), params, made[0])
    jax.eval_shape(lambda p, t: loss.forward(p, t)[0], prediction, made[1])
    return examples


def check_functions(optimizer: Any, **functions: Callable | None) -> None:
    """TypeError unless optimizer is one, and each of the others a function or None."""
    check_optimizer(optimizer)
    for name, f in functions.items():
        if not callable(f) and (f is not None or name == "gradient"):
            raise TypeError(f"fit: {name} must be a function, got {describe(f)}")
