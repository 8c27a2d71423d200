"""Targets of a loss: labels, distributions and numbers in [0, 1], checked where jit does not hide their values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import concrete, describe
from fnbp.arrays.sums import wide

SUM_TOLERANCE = 1e-3  # the largest distance of the sum of soft labels from 1


def is_labels(a: Any, y: Any) -> bool:
    """True if y holds one number for each position, not one for each class."""
    return y.ndim == a.ndim - 1


def is_good(a: jax.Array, y: jax.Array) -> jax.Array:
    """True at positions where y is a label in 0..k-1, or a distribution."""
    if is_labels(a, y):
        return (y >= 0) & (y.astype(int) >= 0) & (y.astype(int) < a.shape[-1])
    return (jnp.abs(jnp.sum(wide_of(y), -1) - 1) <= tolerance(y)) & jnp.all(y >= 0, -1)


def wide_of(y: jax.Array) -> jax.Array:
    """y in floating point, of at least float32."""
    return wide(y) if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(jnp.float32)


def tolerance(y: Any) -> float:
    """The largest distance of the sum of a distribution from 1."""
    return max(SUM_TOLERANCE, float(jnp.finfo(y.dtype).eps) if jnp.issubdtype(y.dtype, jnp.floating) else 0)


def check_classes(name: str, a: Any, y: Any, w: np.ndarray | None) -> None:
    """Raise a ValueError unless a, y and the weights of the classes fit each other."""
    if a.ndim < 2:
        raise ValueError(f"{name}: prediction must be (m, ..., k), got shape {a.shape}")
    if not hasattr(y, "dtype") or y.shape not in (a.shape[:-1], a.shape):
        came = f"shape {y.shape}" if hasattr(y, "shape") else describe(y)
        raise ValueError(
            f"{name}: target has {came}; prediction of shape {a.shape} needs "
            f"integer labels {a.shape[:-1]} or distributions {a.shape}"
        )
    if w is not None and w.shape != a.shape[-1:]:
        classes = f"the {a.shape[-1]} classes of a prediction of shape {a.shape}"
        raise ValueError(f"{name}: weights of shape {w.shape} do not fit {classes}")


def check_labels(name: str, y: Any, k: int, counts: Any) -> None:
    """Raise a TypeError unless y holds integers, a ValueError if one is outside 0..k-1 at a position that counts."""
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {describe(y)}")
    if concrete(y) and (counts is None or concrete(counts)):
        y = np.asarray(y)
        bad = counting(counts, (y < 0) | (y >= k))
        for first in np.argwhere(bad)[:1].tolist():
            raise ValueError(f"{name}: label {y[tuple(first)]} at index {first} is outside 0..{k - 1}")


def check_distributions(name: str, y: Any, counts: Any) -> None:
    """Raise a ValueError if soft labels are negative or do not sum to 1, at a position that counts."""
    if concrete(y) and (counts is None or concrete(counts)):
        allowed = tolerance(y)
        y = np.asarray(y, float)
        bad = ~((abs(y.sum(-1) - 1) <= allowed) & (y >= 0).all(-1))
        bad = counting(counts, bad)
        for first in np.argwhere(bad)[:1].tolist():
            row = y[tuple(first)]
            came = f"sum {row.sum():.6g}, least {row.min():.6g}"
            raise ValueError(f"{name}: soft labels at index {first} are not a distribution: {came}")


def check_unit_interval(name: str, what: str, x: Any, counts: Any, hint: str = "") -> None:
    """Raise a ValueError if a number, at a position that counts, is outside [0, 1] or NaN."""
    if concrete(x) and (counts is None or concrete(counts)):
        x = np.asarray(x)
        bad = counting(counts, ~((x >= 0) & (x <= 1)))
        for first in np.argwhere(bad)[:1].tolist():
            raise ValueError(f"{name}: {what} {x[tuple(first)]} at index {first} is outside [0, 1]{hint}")


def counting(counts: Any, bad: np.ndarray) -> np.ndarray:
    """bad, but only at positions that count; counts may be of examples, (m,), or None."""
    if counts is None:
        return bad
    counts = np.asarray(counts)
    return bad & counts.reshape(*counts.shape, *[1] * (bad.ndim - counts.ndim))


def in_unit_interval(a: jax.Array) -> jax.Array:
    """True where a is in [0, 1]."""
    return (a >= 0) & (a <= 1)
