"""The mean of a loss over positions: which of them count, and whether examples or positions weigh the same."""

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
    """1 / s, which each position adds to the loss of its example, and 0 where it does not count.

    examples  s = sum of c over the example         the mean over the positions that count
    tokens    s = sum of c over the batch / m       every position of the batch weighs the same
    sum       s = 1

    c is 1 where a position counts. A number if all count, else (m, *s), the shape of losses.
    """
    if counts is None:
        return 1.0 if reduce == "sum" else 1 / int(np.prod(losses.shape[1:]))
    counts = counts.reshape(*counts.shape, *[1] * (losses.ndim - counts.ndim))
    counts = jnp.broadcast_to(counts, losses.shape).astype(losses.dtype)
    many = REDUCTIONS[reduce](counts, losses.shape[0])
    return counts / jnp.where(many > 0, many, 1)  # if no position counts, loss and gradient are 0


def share(w: Any, a: jax.Array) -> jax.Array:
    """a / s, for w = 1 / s; 0 where w is 0, even if a is NaN there."""
    if not isinstance(w, jax.Array):
        return a if w == 1 else a * w
    w = w.reshape(*w.shape, *[1] * (a.ndim - w.ndim))
    return jnp.where(w > 0, a * w, 0)


def summed_up(w: Any, losses: jax.Array) -> jax.Array:
    """The sum of losses / s over all axes but the first, for w = 1 / s."""
    return jnp.sum(share(w, losses), range(1, losses.ndim))


def counted(mask: Any, target: Any, ignore_index: Any) -> Any:
    """True where a position counts, by the mask and by its label; None if all count."""
    if ignore_index is None:
        return mask
    kept = target != ignore_index
    if mask is None:
        return kept
    return kept & mask.reshape(*mask.shape, *[1] * (kept.ndim - mask.ndim))


def how_many(counts: Any, shape: tuple[int, ...]) -> Any:
    """How many positions of that shape count."""
    if counts is None:
        return float(np.prod(shape))
    counts = counts.reshape(*counts.shape, *[1] * (len(shape) - counts.ndim))
    return jnp.sum(jnp.broadcast_to(counts, shape), dtype=jnp.float32)


def only(counts: Any, a: jax.Array) -> jax.Array:
    """a, with 0 at positions that do not count: a may be NaN there, and 0 times NaN is NaN."""
    if counts is None:
        return a
    return jnp.where(counts.reshape(*counts.shape, *[1] * (a.ndim - counts.ndim)), a, jnp.zeros((), a.dtype))


def check_reduce(name: str, reduce: Any) -> None:
    """Raise a ValueError unless reduce is "examples" or "tokens"."""
    choose("reduce", reduce, {"examples": 0, "tokens": 0}, f"{name}: ")


def check_smoothing(name: str, label_smoothing: Any) -> float:
    """label_smoothing as a float. Raise a ValueError or TypeError unless it is a number in [0, 1)."""
    check_number(name, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1), got {label_smoothing}")
    return float(label_smoothing)


def check_z_loss(name: str, z_loss: Any) -> float:
    """z_loss as a float. Raise a ValueError or TypeError unless it is a finite number of at least 0."""
    c = check_number(name, "z_loss", z_loss)
    if c < 0:
        raise ValueError(f"{name}: z_loss must be at least 0, got {z_loss}")
    return c


def check_weights(name: str, what: str, weights: Any) -> np.ndarray | None:
    """Return weights as an array, or None. Raise a ValueError or TypeError unless they are finite and at least 0."""
    if weights is None:
        return None
    try:
        array = np.asarray(weights, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {what} must be numbers, got {describe(weights)}") from error
    if array.ndim > 1 or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{name}: {what} must be one number or a row of them, finite and at least 0, got {weights!r}")
    return array


def check_options(name: str, ignore_index: Any, label_smoothing: Any, reduce: Any) -> float:
    """label_smoothing as a float. Raise a ValueError or TypeError if an option is out of range."""
    check_ignored(name, ignore_index)
    check_reduce(name, reduce)
    return check_smoothing(name, label_smoothing)


def check_ignored(name: str, ignore_index: Any) -> None:
    """Raise a TypeError unless ignore_index is a whole number or None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer))):
        raise TypeError(f"{name}: ignore_index must be a whole number or None, got {ignore_index!r}")
