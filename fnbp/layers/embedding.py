"""Embeddings of tokens and of positions."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from fnbp.arrays.checks import (
    check_dtype,
    check_floating,
    check_held,
    check_key,
    check_positive,
    check_size,
    concrete,
    describe,
    of_kind,
)
from fnbp.arrays.placement import by_example, each_example, over_examples
from fnbp.arrays.sums import wide
from fnbp.construction import constructor
from fnbp.contractions import sq_norms
from fnbp.factor import Factor, along_examples, register_factor
from fnbp.layer import Context, Layer, parameterless, stateless
from fnbp.layers.initializers import initializer_of
from fnbp.layers.parameters import Shapes, check_numbers, weights
from fnbp.pairs import KroneckerPair
from fnbp.steps import Steps

__all__ = ["embedding", "positions", "sinusoids"]

Tokens = Float[Array, "m t d"]


@register_factor
@dataclass(frozen=True)
class Rows(Factor):
    """dP[t] = sum_i d_i[t]: the gradient of a table that is added position by position, 0 after the last position.

        total        sum of d over examples     (size, n)
        per_example  d_i                        (m, size, n)
        sq_norms     sum of d_i^2               (m,)

    Shapes: d (m, t, n), t at most size, which is static.
    """

    d: jax.Array
    size: int = field(metadata={"static": True})

    def total(self) -> jax.Array:
        return jnp.sum(self.per_example(), 0)

    def per_example(self) -> jax.Array:
        return jnp.pad(self.d, ((0, 0), (0, self.size - self.d.shape[1]), (0, 0)))

    def sq_norms(self) -> jax.Array:
        return jnp.sum(wide(self.d) ** 2, (1, 2))

    def kronecker_expand(self) -> KroneckerPair:
        """As of a table in which position t looks up row t."""
        return self.looked_up().kronecker_expand()

    def kronecker_reduce(self) -> KroneckerPair:
        """The same."""
        return self.looked_up().kronecker_reduce()

    def looked_up(self) -> "Lookup":
        """The same gradient, of a table in which position t looks up row t."""
        return Lookup(self.d, jnp.broadcast_to(jnp.arange(self.d.shape[1]), self.d.shape[:2]), self.size)

    def scaled(self, c: Any) -> "Rows":
        return Rows(along_examples(c, self.d), self.size)


@register_factor
@dataclass(frozen=True)
class Lookup(Factor):
    """dE[id] = the sum of d where x is id: the gradient of a table E in E[x].

        total        d added into the rows of a table of zeros         (size, n)
        per_example  the same, one table for each example              (m, size, n)
        sq_norms     sum_st [x_is = x_it] d_is . d_it, the Gram form, for S positions where S^2 < size n

    An x outside of the table adds nothing.

    Shapes: d (m, ..., n), x (m, ...) of integers, size static.
    Source: Li et al. 2021, arXiv:2110.05679, for the Gram form.
    """

    positional: ClassVar[bool] = True
    d: jax.Array
    x: jax.Array
    size: int = field(metadata={"static": True})

    @over_examples
    def total(self) -> jax.Array:
        table = jnp.zeros((self.size, self.d.shape[-1]), wide(self.d).dtype)
        return table.at[self.x].add(wide(self.d), mode="drop", wrap_negative_indices=False).astype(self.d.dtype)

    @each_example
    def per_example(self) -> jax.Array:
        return jax.vmap(lambda d, x: Lookup(d, x, self.size).total())(self.d, self.x)

    @each_example
    def sq_norms(self) -> jax.Array:
        m, n = self.d.shape[0], self.d.shape[-1]
        d, x = wide(self.d).reshape(m, -1, n), self.x.reshape(m, -1)
        if x.shape[1] ** 2 < self.size * n:
            same = (x[:, :, None] == x[:, None, :]) & ((x >= 0) & (x < self.size))[:, None]
            return jnp.maximum(jnp.einsum("mst,msn,mtn->m", same.astype(d.dtype), d, d), 0)
        return self.contracted(sq_norms)

    @over_examples
    def kronecker_expand(self) -> KroneckerPair:
        """The diagonal of A: how often each row is looked up, in the mean over examples and positions; and G."""
        d, x = wide(self.d).reshape(-1, self.d.shape[-1]), self.x.reshape(-1)
        there = (x >= 0) & (x < self.size)
        counts = jnp.zeros(self.size, d.dtype).at[x].add(1, mode="drop", wrap_negative_indices=False)
        d = jnp.where(there[:, None], d, 0)
        return KroneckerPair(counts / x.size, d.T @ d / self.examples, turned=True, diagonal=True)

    @over_examples
    def kronecker_reduce(self) -> KroneckerPair:
        """The same, of the mean of each example's rows: the diagonal of A."""
        m, n = self.d.shape[0], self.d.shape[-1]
        d, x = wide(self.d).reshape(m, -1, n), self.x.reshape(m, -1)
        d = jnp.where(((x >= 0) & (x < self.size))[..., None], d, 0)
        seen = jax.vmap(lambda x: jnp.zeros(self.size, d.dtype).at[x].add(1, mode="drop", wrap_negative_indices=False))
        A, G = jnp.mean((seen(x) / x.shape[1]) ** 2, 0), jnp.einsum("mn,mp->np", d.sum(1), d.sum(1)) / m
        return KroneckerPair(A, G, turned=True, diagonal=True)

    def scaled(self, c: Any) -> "Lookup":
        return Lookup(along_examples(c, self.d), self.x, self.size)


@constructor
def embedding(size: int, width: int, E: str | Callable = "normal", dtype: Any = None) -> Layer:
    """Look up a row of E for every token.

        y = E[x]      dE[i] = sum of dy over all places with x = i

    Tokens are whole numbers and have no cotangent: dx = None.

    Shapes:  x (m, ...) of integers; y (m, ..., width); E (size, width); saved x.
    Forward: Bengio et al. 2003, JMLR 3, section 2.
    Options: E: initializer of the table, a name (see fnbp.initializer) or a function (key, shape, dtype) -> array.
             dtype: dtype of E, by default JAX's default float.
    Raises:  ValueError if a size is below 1 or, outside jit, a token is outside 0..size-1 (under jit its row is NaN);
             TypeError if x is not an array of integers.
    """
    name = f"embedding({size}, {width})"
    check_size(name, "size", size)
    check_size(name, "width", width)
    check_numbers(name, "E", (size, width))
    if dtype is not None:
        check_dtype(name, dtype)
    make = initializer_of(name, "E", E)

    def init(key, x):
        check_key(name, key)
        check_tokens(name, x, size)
        return {"E": make(key, (size, width), jnp.result_type(float) if dtype is None else dtype)}

    def forward(params: dict, x: Integer[Array, "m *s"]) -> tuple[Float[Array, "m *s d"], tuple]:
        check_held(name, "params", params, {"E": (size, width)})
        check_tokens(name, x, size)
        return by_example(rows_of, x, params["E"]), (x,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *s d"]) -> tuple[dict, None]:
        (x,) = res
        inside = (x >= 0) & (x < size)
        # a token outside of the table, which jit cannot refuse, makes the gradient NaN, as it made y
        return {"E": Lookup(jnp.where(inside[..., None], dy, jnp.nan), jnp.where(inside, x, 0), size)}, None

    return stateless(init, forward, backward, name, mask="elementwise", alone=True)


def rows_of(x: jax.Array, E: jax.Array) -> jax.Array:
    """E[x]; NaN for a token outside of the table, also for a negative one."""
    return jnp.asarray(E).at[x].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def check_tokens(name: str, x: Any, size: int) -> None:
    """Raise a TypeError unless x holds integers; outside jit, a ValueError if one is outside 0..size-1."""
    if not of_kind(x, jnp.integer):
        raise TypeError(f"{name}: x must be an array of integers, got {describe(x)}")
    if concrete(x):
        x = np.asarray(x)
        for first in np.argwhere((x < 0) | (x >= size))[:1].tolist():
            raise ValueError(f"{name}: token {x[tuple(first)]} at index {first} is outside 0..{size - 1}")


@constructor
def positions(length: int, P: str | Callable = "normal") -> Layer:
    """Add a learned row to every position.

        y[t] = x[t] + P[t]      dP[t] = sum dy[t] over examples, 0 after the last t      dx = dy

    Shapes:  x, y (m, t, d), t at most length; P (length, d); nothing saved.
    Forward: Gehring et al. 2017, arXiv:1705.03122, section 3.1.
    Options: P: initializer of the table, a name (see fnbp.initializer) or a function (key, shape, dtype) -> array.
    Raises:  ValueError if length is below 1, or a sequence is empty or longer than length; TypeError if x is not
             floating point.
    """
    name = f"positions({length})"
    check_size(name, "length", length)

    def shapes(x: Any) -> Shapes:
        if len(x.shape) != 3 or not 1 <= x.shape[1] <= length:
            raise ValueError(f"{name}: x must be (m, t, d) with t from 1 to {length}, got shape {x.shape}")
        return {"P": (length, x.shape[-1])}

    init, check = weights(name, shapes, P=initializer_of(name, "P", P))

    def forward(params: dict, x: Tokens) -> tuple[Tokens, tuple]:
        check(params, x)
        return x + params["P"][: x.shape[1]], ()

    def backward(params: dict, res: tuple, dy: Tokens) -> tuple[dict, Tokens]:
        return {"P": Rows(dy, length)}, dy

    def rows(params: dict, x: Any, length: int) -> Any:
        if length > params["P"].shape[0]:
            raise ValueError(f"{name}: a sequence has at most {params['P'].shape[0]} positions, got {length}")
        return params["P"][:length]

    layer = stateless(init, forward, backward, name, mask="position", alone=True)
    return in_steps(layer, rows)


def in_steps(layer: Layer, rows: Callable[[dict, Any, int], Any]) -> Layer:
    """A layer that adds a row of its own to each position, with its steps. rows: (params, x, length) -> (length, d)."""

    def first(params: dict, state: dict, x: Any, length: int) -> tuple[Any, dict]:
        y = layer.forward(params, state, x, Context())[0]
        return y, {"rows": rows(params, x, length), "at": jnp.asarray(x.shape[1], jnp.int32)}

    def then(params: dict, state: dict, kept: dict, x: jax.Array) -> tuple[Any, dict]:
        row = jax.lax.dynamic_slice_in_dim(kept["rows"], kept["at"], 1)
        return x + row, {**kept, "at": kept["at"] + 1}

    return layer._replace(traits=replace(layer.traits, steps=Steps(first, then)))


@constructor
def sinusoids(base: float = 10_000.0) -> Layer:
    """Add sines and cosines of the position, of many wavelengths, to the features.

        y[t, 2i] = x[t, 2i] + sin(t base^(-2i / d))    y[t, 2i + 1] = x[t, 2i + 1] + cos(t base^(-2i / d))
        dx = dy

    Shapes:  x, y (m, t, d); nothing saved.
    Forward: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    Options: base: the ratio of the longest wavelength to the shortest, in the limit of many features.
    Raises:  ValueError if base is not positive, a sequence is empty, or x is not (m, t, d); TypeError if x is not
             floating point.
    """
    base = check_positive("sinusoids", "base", base)

    def waves(t: int, d: int) -> np.ndarray:
        angle = np.arange(t)[:, None] * base ** -(np.arange(0, d, 2) / d)
        return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(t, -1)[:, :d]

    def forward(x: Tokens) -> tuple[Tokens, tuple]:
        check_floating("sinusoids", "x", x)
        if x.ndim != 3 or not x.shape[1]:
            raise ValueError(f"sinusoids: x must be (m, t, d) with t at least 1, got shape {x.shape}")
        return x + jnp.asarray(waves(*x.shape[1:]), x.dtype), ()

    def backward(res: tuple, dy: Tokens) -> Tokens:
        return dy

    layer = parameterless(forward, backward, "sinusoids", "position")
    return in_steps(layer, lambda params, x, length: jnp.asarray(waves(length, x.shape[-1]), x.dtype))
