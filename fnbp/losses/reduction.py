"""What each position adds to a loss: which count, and whether an example or a position is the unit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_number, choose, describe

REDUCTIONS = {
    "examples": lambda counts, m: jnp.sum(counts, range(1, counts.ndim), keepdims=True),
    "tokens": lambda counts, m: jnp.sum(counts) / m,
    "sum": lambda counts, m: jnp.ones((), counts.dtype),
}


def shares(reduce: str, losses: jax.Array, counts: Any) -> Any:
    """w, how much each loss adds to its example's: a number, or (m, *s) for losses (m, *s) of which some do not count.

    examples  w = c / (sum of c over the example)       the mean over what counts
    tokens    w = c m / (sum of c over the batch)       an example weighs as what counts of it
    sum       w = c
    """
    if counts is None:
        return 1.0 if reduce == "sum" else 1 / int(np.prod(losses.shape[1:]))
    counts = counts.reshape(*counts.shape, *[1] * (losses.ndim - counts.ndim))
    counts = jnp.broadcast_to(counts, losses.shape).astype(losses.dtype)
    many = REDUCTIONS[reduce](counts, losses.shape[0])
    return counts / jnp.where(many > 0, many, 1)  # nothing counts: the loss is 0, without a gradient


def share(w: Any, a: jax.Array) -> jax.Array:
    """a times its share; 0 where it does not count, whatever stands there."""
    if not isinstance(w, jax.Array):
        return a if w == 1 else a * w
    w = w.reshape(*w.shape, *[1] * (a.ndim - w.ndim))
    return jnp.where(w > 0, a * w, 0)


def summed_up(w: Any, losses: jax.Array) -> jax.Array:
    """The sum of the shares over all axes but the first."""
    return jnp.sum(share(w, losses), range(1, losses.ndim))


def counted(mask: Any, target: Any, ignore_index: Any) -> Any:
    """Which positions count, by the mask and by their label; None for all."""
    if ignore_index is None:
        return mask
    kept = target != ignore_index
    if mask is None:
        return kept
    return kept & mask.reshape(*mask.shape, *[1] * (kept.ndim - mask.ndim))


def only(counts: Any, a: jax.Array) -> jax.Array:
    """a, and 0 where it does not count: what stands there may be NaN, and 0 times NaN is NaN."""
    if counts is None:
        return a
    return jnp.where(counts.reshape(*counts.shape, *[1] * (a.ndim - counts.ndim)), a, jnp.zeros((), a.dtype))


def check_reduce(name: str, reduce: Any) -> None:
    """ValueError unless reduce is "examples" or "tokens"."""
    choose("reduce", reduce, {"examples": 0, "tokens": 0}, f"{name}: ")


def check_smoothing(name: str, label_smoothing: Any) -> None:
    """ValueError or TypeError unless label_smoothing is a number in [0, 1)."""
    check_number(name, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1), got {label_smoothing}")


def check_weights(name: str, what: str, weights: Any) -> np.ndarray | None:
    """weights as an array; ValueError or TypeError unless they are finite numbers of at least 0, or None."""
    if weights is None:
        return None
    try:
        array = np.asarray(weights, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {what} must be numbers, got {describe(weights)}") from error
    if array.ndim > 1 or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{name}: {what} must be one number or a row of them, finite and at least 0, got {weights!r}")
    return array


def check_options(name: str, ignore_index: Any, label_smoothing: Any, reduce: Any) -> None:
    """ValueError or TypeError for an option out of range."""
    check_ignored(name, ignore_index)
    check_smoothing(name, label_smoothing)
    check_reduce(name, reduce)


def check_ignored(name: str, ignore_index: Any) -> None:
    """TypeError unless ignore_index is a whole number or None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer))):
        raise TypeError(f"{name}: ignore_index must be a whole number or None, got {ignore_index!r}")
