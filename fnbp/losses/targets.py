"""Targets of a loss: what a label, a distribution, a share must be, where their values are seen and where not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import concrete, describe
from fnbp.arrays.sums import wide

SUM_TOLERANCE = 1e-3  # how far the sum of soft labels may be from 1


def is_labels(a: Any, y: Any) -> bool:
    """True where y holds one number a position, not one a class."""
    return y.ndim == a.ndim - 1


def is_good(a: jax.Array, y: jax.Array) -> jax.Array:
    """For each position, whether y is a label, or a distribution."""
    if is_labels(a, y):
        return (y >= 0) & (y.astype(int) >= 0) & (y.astype(int) < a.shape[-1])
    return (jnp.abs(jnp.sum(wide_of(y), -1) - 1) <= tolerance(y)) & jnp.all(y >= 0, -1)


def wide_of(y: jax.Array) -> jax.Array:
    """y as floating point numbers of at least float32."""
    return wide(y) if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(jnp.float32)


def tolerance(y: Any) -> float:
    """How far the sum of a distribution may be from 1."""
    return max(SUM_TOLERANCE, float(jnp.finfo(y.dtype).eps) if jnp.issubdtype(y.dtype, jnp.floating) else 0)


def check_classes(name: str, a: Any, y: Any, w: np.ndarray | None) -> None:
    """ValueError unless a, y and the weights of the classes fit each other."""
    if a.ndim < 2:
        raise ValueError(f"{name}: prediction must be (m, ..., k), got shape {a.shape}")
    if not hasattr(y, "dtype") or y.shape not in (a.shape[:-1], a.shape):
        came = f"shape {y.shape}" if hasattr(y, "shape") else describe(y)
        raise ValueError(
            f"{name}: target has {came}; prediction of shape {a.shape} needs "
            f"integer labels {a.shape[:-1]} or distributions {a.shape}"
        )
    if w is not None and w.shape != a.shape[-1:]:
        raise ValueError(
            f"{name}: weights of shape {w.shape} are for other classes; a of shape {a.shape} has {a.shape[-1]}"
        )


def check_labels(name: str, y: Any, k: int, counts: Any) -> None:
    """TypeError unless y is of integers; ValueError for one outside 0..k-1 at a position that counts."""
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {describe(y)}")
    if concrete(y) and (counts is None or concrete(counts)):
        y = np.asarray(y)
        bad = ((y < 0) | (y >= k)) & (True if counts is None else np.asarray(counts))
        for first in np.argwhere(bad)[:1].tolist():
            raise ValueError(f"{name}: label {y[tuple(first)]} at index {first} is outside 0..{k - 1}")


def check_distributions(name: str, y: Any, counts: Any) -> None:
    """ValueError for soft labels that are negative or do not sum to 1, at a position that counts."""
    if concrete(y) and (counts is None or concrete(counts)):
        allowed = tolerance(y)
        y = np.asarray(y, float)
        bad = ~((abs(y.sum(-1) - 1) <= allowed) & (y >= 0).all(-1))
        bad = bad if counts is None else bad & np.broadcast_to(np.asarray(counts), bad.shape)
        for first in np.argwhere(bad)[:1].tolist():
            row = y[tuple(first)]
            raise ValueError(
                f"{name}: soft labels at index {first} are no distribution: sum {row.sum():.6g}, least {row.min():.6g}"
            )


def check_unit_interval(name: str, what: str, x: Any, counts: Any, hint: str = "") -> None:
    """ValueError for a number outside [0, 1], NaN among them, at a position that counts."""
    if concrete(x) and (counts is None or concrete(counts)):
        x = np.asarray(x)
        bad = ~((x >= 0) & (x <= 1))
        if counts is not None:
            counts = np.asarray(counts)
            bad = bad & counts.reshape(*counts.shape, *[1] * (bad.ndim - counts.ndim))
        for first in np.argwhere(bad)[:1].tolist():
            raise ValueError(f"{name}: {what} {x[tuple(first)]} at index {first} is outside [0, 1]{hint}")


def in_unit_interval(a: jax.Array) -> jax.Array:
    """Where a is in [0, 1]."""
    return (a >= 0) & (a <= 1)
