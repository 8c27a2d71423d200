"""A loss that fnbp.opened is to open, and the tools that make the many of them."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

M = 5  # examples


class Case(NamedTuple):
    """A loss to open.

    id: the kind, and after a colon which of it. make: () -> (loss, params, batch), in float64. shared: which arguments
    of the loss, params being 0, have no axis of examples. has_aux: the loss returns a value and more. refused: what the
    error says, in any order, of a loss that JAX refuses too. either: the same, of a loss that may be right instead.
    tolerance: of the gradients of single examples. floor: the least scale of an error, where rounding alone makes a
    gradient other than 0. linear: False where a rule of the loss is not linear in the error, so that the gradient of
    the mean is not the mean of gradients. contracted: False where squares of the gradient have no one meaning. quick:
    every contraction of it is tested each time.
    """

    id: str
    make: Callable[[], tuple[Callable, Any, tuple]]
    shared: tuple[int, ...] = ()
    has_aux: bool = False
    refused: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    tolerance: float = 1e-12
    floor: float = 0.0
    linear: bool = True
    contracted: bool = True
    quick: bool = False


def case(id: str, loss: Callable, params: Any, *batch: Any, **options: Any) -> Case:
    """A case of a loss whose params and batch are drawn: see drawn."""

    def make():
        rng = np_rng(id)
        leads = [() if i in options.get("shared", ()) else (M,) for i in range(1, len(batch) + 1)]
        return loss, drawn(rng, params), tuple(drawn(rng, one, lead) for one, lead in zip(batch, leads, strict=True))

    return Case(id, make, **options)


def np_rng(id: str) -> np.random.Generator:
    """Random numbers of the case's own."""
    return np.random.default_rng(zlib.crc32(id.encode()))


def drawn(rng: np.random.Generator, tree: Any, lead: tuple[int, ...] = ()) -> Any:
    """A tree of arrays from one of shapes, of functions (rng, lead) -> array, and of arrays."""

    def one(leaf):
        if is_shape(leaf):
            return jnp.asarray(rng.normal(size=(*lead, *leaf)))
        return leaf(rng, lead) if callable(leaf) else jnp.asarray(leaf)

    return jax.tree.map(one, tree, is_leaf=is_shape)


def is_shape(leaf: Any) -> bool:
    return type(leaf) is tuple and all(type(n) is int for n in leaf)


def below(n: int, *shape: int) -> Callable:
    """Integers below n."""
    return lambda rng, lead: jnp.asarray(rng.integers(0, n, (*lead, *shape)))


def bits(*shape: int) -> Callable:
    return lambda rng, lead: jnp.asarray(rng.random((*lead, *shape)) < 0.5)


def positive(*shape: int) -> Callable:
    """Numbers between 0.5 and 1.5."""
    return lambda rng, lead: jnp.asarray(0.5 + rng.random((*lead, *shape)))


def narrow(dtype: Any, *shape: int) -> Callable:
    return lambda rng, lead: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype)


def complexes(*shape: int) -> Callable:
    return lambda rng, lead: jnp.asarray(rng.normal(size=(*lead, *shape)) + 1j * rng.normal(size=(*lead, *shape)))


def keys(rng: np.random.Generator, lead: tuple[int, ...]) -> jax.Array:
    """A random key for each example."""
    key = jax.random.key(int(rng.integers(99)))
    return jax.random.split(key, lead) if lead else key


def filled(params: Any, seed: int = 0) -> Any:
    """Params of a library, each inexact leaf drawn anew in float64."""
    rng = np.random.default_rng(seed)
    inexact = lambda a: jnp.issubdtype(a.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.5) if inexact(a) else a, params)


def energy(a: Any) -> jax.Array:
    """A number whose slope in each entry differs."""
    return jnp.sum(jnp.sin(a) + a * a)


DENSE, SQUARE, TWO = {"w": (3, 7), "b": (7,)}, {"w": (3, 3)}, {"v": (3,), "w": (3,)}


def dense(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def symmetric(w: jax.Array) -> jax.Array:
    """A positive definite matrix of a matrix of three rows."""
    return w @ w.T + jnp.eye(3)
