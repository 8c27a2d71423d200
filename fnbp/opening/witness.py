"""An opened loss held against vmap(jax.grad), for a few examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.opening.net import paths_of


def by_vmap(loss: Any, params: Any, axes: list[int | None], batch: tuple[Any, ...]) -> dict[str, Any]:
    """The gradient of each example by vmap(jax.grad), of every floating-point parameter by its path."""
    leaves, tree = jax.tree.flatten(params)
    named = list(zip(paths_of(params), leaves, strict=True))
    own = {path: p for path, p in named if jnp.issubdtype(jnp.result_type(p), jnp.inexact)}

    def of_one(own, *example):
        return loss(jax.tree.unflatten(tree, [own.get(path, p) for path, p in named]), *example)

    return jax.vmap(jax.grad(of_one), (None, *axes))(own, *batch)


def alike(a: Any, b: Any) -> bool:
    """True if two arrays are equal but for rounding, and not finite at the same places."""
    a, b = np.asarray(a), np.asarray(b)
    fine = np.isfinite(b)
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), fine):
        return False
    room = 1e4 * float(jnp.finfo(b.dtype).eps) * np.max(np.abs(b[fine]), initial=0)
    return bool(np.all(np.abs(a[fine] - b[fine]) <= room))
