"""Pooling: one number for every window of a channel; and what changes nothing but the shape."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_is, check_key, check_params, shown
from fnbp.arrays.masks import by_position, check_mask, of_positions
from fnbp.arrays.placement import reshaped
from fnbp.arrays.sums import like, wide
from fnbp.layer import Layer, Traits, mask_aware, parameterless
from fnbp.layers.widening import in_wide
from fnbp.layers.windows import Padding, Sizes, Sliding, Windows

__all__ = ["avg_pool", "flatten", "global_avg_pool", "last", "max_pool", "reshape"]

X = Float[Array, "m *s c"]
Y = Float[Array, "m *t c"]
MOST_OFFSETS = 2**16  # in one window: each is a slice of its own


def covered(name: str, at: Windows, x: Any) -> Windows:
    """The same windows; ValueError where one of them holds nothing but padding, or more than anyone slides."""
    if math.prod(at.kernel) > MOST_OFFSETS:
        raise ValueError(f"{name}: kernel {at.kernel} is too large: {math.prod(at.kernel):,} numbers a window")
    if not at.inside().all():
        raise ValueError(f"{name}: padding {at.padding} leaves windows without a number of x, of shape {x.shape}")
    return at


def max_pool(kernel: Sizes, stride: Sizes | None = None, padding: Padding = "VALID") -> Layer:
    """The largest number of every window, channel by channel.

        y[p] = max_k x[p stride + k - low]      k*[p] = the first k that attains it
        dx[i] = sum of dy[p] over all p with p stride + k*[p] - low = i

    At a tie the first position, row by row, takes all of dy, as in PyTorch and under jax.grad. Padding is -inf: no
    finite number loses to it.

    Shapes:   x (m, *size, c); y (m, *count, c); saved k*, one small integer for each y.
    Options:  stride: the kernel's size where none is given. kernel, stride, padding: as in fnbp.conv.
    Raises:   ValueError for a kernel larger than the padded input, and for padding that a window may consist of.
    """
    name = f"max_pool({kernel})"
    slide = Sliding(name, kernel, kernel if stride is None else stride, padding)

    def over(x):
        return covered(name, slide.over(x.shape), x)

    def forward(x: X) -> tuple[Y, tuple]:
        at = over(x)
        views, real = at.views(x, fill=-math.inf), at.real()
        y, first = views[0], jnp.zeros(views[0].shape, jnp.int8 if len(views) < 128 else jnp.int32)
        for k, view in enumerate(views[1:], 1):
            larger = (view > y) | jnp.isnan(view)
            begins = real[k] & ~real[:k].any(0)  # the first that is no padding, which -inf does not exceed
            larger = larger | begins[..., None] if begins.any() else larger
            y, first = jnp.where(larger, view, y), jnp.where(larger, jnp.asarray(k, first.dtype), first)
        return y, (first, like(x))

    def backward(res: tuple, dy: Y) -> X:
        first, like_x = res
        at = over(like_x)
        return at.scatter([jnp.where(first == k, dy, 0) for k in range(len(at.offsets))])

    return parameterless(forward, backward, name)


def avg_pool(
    kernel: Sizes, stride: Sizes | None = None, padding: Padding = "VALID", count_padding: bool = False
) -> Layer:
    """The mean of every window, channel by channel.

        y[p] = sum_k x[p stride + k - low] / n[p]      n[p] = how many numbers of x are in the window
        dx[i] = sum of dy[p] / n[p] over all p, k with p stride + k - low = i

    Shapes:   x (m, *size, c); y (m, *count, c); nothing saved.
    Options:  stride: the kernel's size where none is given. count_padding: padding counts as zeros, n[p] is the size
              of the kernel (PyTorch's count_include_pad, which is its default). kernel, padding: as in fnbp.conv.
    Raises:   ValueError for a kernel larger than the padded input, and for padding that a window may consist of.
    """
    name = f"avg_pool({kernel})"
    slide = Sliding(name, kernel, kernel if stride is None else stride, padding)
    check_is(name, "count_padding", count_padding, bool)

    def over(x):
        at = covered(name, slide.over(x.shape), x)
        n = len(at.offsets) if count_padding else at.inside()[..., None]
        return at, jnp.asarray(n, x.dtype)

    def forward(x: X) -> tuple[Y, tuple]:
        at, n = over(x)
        return jnp.sum(jnp.stack(at.views(x)), 0) / n, (like(x),)

    def backward(res: tuple, dy: Y) -> X:
        (like_x,) = res
        at, n = over(like_x)
        return at.scatter([dy / n] * len(at.offsets))

    return parameterless(*in_wide(forward, backward, x=0), name)


def global_avg_pool() -> Layer:
    """The mean of each channel over all positions.

        y = sum_p x[p] / n      dx[p] = dy / n

    Under a mask, of the n positions of an example that count; y = 0 if none does.

    Shapes: x (m, *size, c), n positions; y (m, c); saved n.
    Source: Lin, Chen & Yan 2013, arXiv:1312.4400, section 3.2.
    Raises: ValueError for an x without positions.
    """

    def positions(x):
        return tuple(range(1, x.ndim - 1))

    def forward(params: dict, x: X, mask: Any) -> tuple[Float[Array, "m c"], tuple]:
        check_params("global_avg_pool", params, x, {})
        if x.ndim < 3 or not all(x.shape[1:]):
            raise ValueError(f"global_avg_pool: x must be (m, *positions, channels), got shape {x.shape}")
        counts = of_positions("global_avg_pool", x, mask)
        n = math.prod(x.shape[1:-1]) if counts is None else how_many(counts, x)
        return (jnp.sum(wide(x), positions(x)) / n).astype(x.dtype), (like(x), n)

    def backward(params: dict, res: tuple, dy: Float[Array, "m c"]) -> tuple[dict, X]:
        like_x, n = res
        spread = jnp.expand_dims((wide(dy) / n).astype(dy.dtype), positions(like_x))
        return {}, jnp.broadcast_to(spread, (dy.shape[0], *like_x.shape[1:]))

    def how_many(counts, x):
        """(m, 1): how many positions of each example count, at least 1."""
        n = jnp.sum(jnp.broadcast_to(counts, (*x.shape[:-1], 1)), positions(x), dtype=wide(x).dtype)
        return jnp.maximum(n, 1)

    return mask_aware(lambda key, x: {}, forward, backward, "global_avg_pool", positions_end)


def positions_end(name: str, x: Any, mask: Any) -> None:
    """The rule of a layer that leaves no positions, and takes those that count into account."""
    by_position(name, x, mask)


def last() -> Layer:
    """What stands at the last position that counts: a sequence's last word.

        y = x[t], t the last position where Context.mask is True      dx[t] = dy, and 0 everywhere else

    Without a mask all positions count. An example none of whose positions counts has y = 0, and no gradient.

    Shapes: x (m, T, ...); y (m, ...); mask (m, T); saved which position it was, one truth value for each.
    Raises: ValueError for a sequence of 0, a mask of another shape; TypeError for a key that is none, a mask that is
            not of bool.
    """

    def init(key, x):
        check_key("last", key)
        return {}, {}

    def forward(params: dict, state: dict, x: Float[Array, "m t *s"], ctx: Any) -> tuple[Any, dict, tuple]:
        check_params("last", params, x, {})
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"last: x must be (m, T, ...) with T at least 1, got shape {x.shape}")
        counts = jnp.ones(x.shape[:2], bool) if ctx.mask is None else ctx.mask
        check_mask("last", counts, x.shape[:2])
        after = jnp.cumsum(counts[:, ::-1], 1)[:, ::-1]  # how many count from here on
        here = counts & (after == 1)
        return jnp.sum(jnp.where(along(here, x), x, 0), 1), state, (here,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *s"]) -> tuple[dict, Any]:
        (here,) = res
        dy = dy[:, None]
        return {}, jnp.where(along(here, dy), dy, 0)

    return Layer(init, forward, backward, "last", traits=Traits(positions_end, alone=True))


def along(here: jax.Array, x: jax.Array) -> jax.Array:
    """(m, T) with axes of 1 behind, as many as x has."""
    return here.reshape(*here.shape, *[1] * (x.ndim - 2))


def reshape(*shape: int) -> Layer:
    """Each example in another shape, its numbers in the same order; -1 once for what is left.

        y = x in the new shape      dx = dy in the shape of x

    Shapes: x (m, *old); y (m, *shape); nothing saved.
    Raises: ValueError where the numbers do not fill the shape; TypeError for sizes that are not whole.
    """
    return reshaping(f"reshape{shape}" if len(shape) != 1 else f"reshape({shape[0]})", shape)


def reshaping(name: str, shape: tuple[int, ...]) -> Layer:
    """reshape under that name."""
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: sizes must be whole numbers, got {shown(size)}")
    if shape.count(-1) > 1 or any(size < -1 or size == 0 for size in shape):
        raise ValueError(f"{name}: sizes must be at least 1, or -1 once")

    def fit(x) -> tuple[int, ...]:
        have, known = math.prod(x.shape[1:]), math.prod(size for size in shape if size != -1)
        if have % known or (-1 not in shape and have != known):
            raise ValueError(
                f"{name}: an example of x, of shape {x.shape[1:]}, has {have} numbers, which do not fill it"
            )
        return tuple(have // known if size == -1 else size for size in shape)

    def forward(x: Float[Array, "m *s"]) -> tuple[Any, tuple]:
        if not x.ndim:
            raise ValueError(f"{name}: x must have a first axis, the examples, got shape ()")
        return reshaped(x, x.shape[0], *fit(x)), (like(x),)

    def backward(res: tuple, dy: Float[Array, "m *t"]) -> Any:
        (like_x,) = res
        return reshaped(dy, dy.shape[0], *like_x.shape[1:])

    return parameterless(forward, backward, name)


def flatten() -> Layer:
    """The numbers of each example in one row.

        y = x, row by row      dx = dy in the shape of x

    Shapes: x (m, *s); y (m, n), n the product of s; nothing saved.
    """
    return reshaping("flatten", (-1,))
