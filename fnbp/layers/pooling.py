"""Pooling, one number for every window of a channel; and layers that only change the shape."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_is, check_key, check_params, shown
from fnbp.arrays.masks import by_position, check_mask, of_positions
from fnbp.arrays.placement import reshaped
from fnbp.arrays.sums import like, wide
from fnbp.construction import constructor
from fnbp.layer import Layer, Traits, mask_aware, parameterless
from fnbp.layers.widening import in_wide
from fnbp.layers.windows import Padding, Sizes, Sliding, Windows

__all__ = ["avg_pool", "flatten", "global_avg_pool", "last", "max_pool", "reshape"]

X = Float[Array, "m *s c"]
Y = Float[Array, "m *t c"]
MOST_OFFSETS = 2**16  # of one window, each of which becomes a slice


def covered(name: str, at: Windows, x: Any) -> Windows:
    """Return at. Raise a ValueError if a window holds only padding, or too many numbers."""
    if math.prod(at.kernel) > MOST_OFFSETS:
        raise ValueError(f"{name}: kernel {at.kernel} is too large: {math.prod(at.kernel):,} numbers a window")
    if not at.inside().all():
        raise ValueError(f"{name}: padding {at.padding} leaves windows without a number of x, of shape {x.shape}")
    return at


@constructor
def max_pool(kernel: Sizes, stride: Sizes | None = None, padding: Padding = "VALID") -> Layer:
    """Take the largest number of every window, channel by channel.

        y[p] = max_k x[p stride + k - low]      k*[p] = the first k that attains it
        dx[i] = sum of dy[p] over all p with p stride + k*[p] - low = i

    At a tie the first position, row by row, takes all of dy, as in PyTorch and under jax.grad. Padding is -inf, so it
    is never larger than a number of x.

    Shapes:   x (m, *size, c); y (m, *count, c); saved k*, one small integer for each y.
    Options:  kernel, padding: as in fnbp.conv. stride: as in fnbp.conv, by default the size of the kernel (as in
              PyTorch; in Flax it is 1).
    Raises:   ValueError if the kernel is larger than the padded input, or a window holds only padding.
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
            begins = real[k] & ~real[:k].any(0)  # the first that is not padding, also if it is -inf itself
            larger = larger | begins[..., None] if begins.any() else larger
            y, first = jnp.where(larger, view, y), jnp.where(larger, jnp.asarray(k, first.dtype), first)
        return y, (first, like(x))

    def backward(res: tuple, dy: Y) -> X:
        first, like_x = res
        at = over(like_x)
        return at.scatter([jnp.where(first == k, dy, 0) for k in range(len(at.offsets))])

    return parameterless(forward, backward, name)


@constructor
def avg_pool(
    kernel: Sizes, stride: Sizes | None = None, padding: Padding = "VALID", count_padding: bool = False
) -> Layer:
    """Take the mean of every window, channel by channel.

        y[p] = sum_k x[p stride + k - low] / n[p]      n[p] = the number of positions of x in the window
        dx[i] = sum of dy[p] / n[p] over all p, k with p stride + k - low = i

    Shapes:   x (m, *size, c); y (m, *count, c); nothing saved.
    Options:  kernel, padding: as in fnbp.conv. stride: as in fnbp.conv, by default the size of the kernel (as in
              PyTorch; in Flax it is 1). count_padding: True if padding counts as zeros, so that n[p] is the size of the
              kernel: count_include_pad of PyTorch and Flax, which is True by default there.
    Raises:   ValueError if the kernel is larger than the padded input, or a window holds only padding.
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


@constructor
def global_avg_pool() -> Layer:
    """Take the mean of each channel over all positions.

        y = sum_p x[p] / n      dx[p] = dy / n

    Under a mask, the mean is over the n positions of an example that count; y = 0 if none does.

    Shapes: x (m, *size, c), n positions; y (m, c); saved n.
    Source: Lin, Chen & Yan 2013, arXiv:1312.4400, section 3.2.
    Raises: ValueError if x has no positions.
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
        """The number of positions of each example that count, at least 1: (m, 1)."""
        n = jnp.sum(jnp.broadcast_to(counts, (*x.shape[:-1], 1)), positions(x), dtype=wide(x).dtype)
        return jnp.maximum(n, 1)

    return mask_aware(lambda key, x: {}, forward, backward, "global_avg_pool", positions_end)


def positions_end(name: str, x: Any, mask: Any) -> None:
    """The mask rule of a layer that reads the mask, and whose y has no positions."""
    by_position(name, x, mask)


@constructor
def last() -> Layer:
    """Take the features at the last position of a sequence that counts.

        y = x[t], t the last position where Context.mask is True      dx[t] = dy, and 0 everywhere else

    Without a mask all positions count. An example without positions that count has y = 0 and no gradient.

    Shapes: x (m, T, ...); y (m, ...); mask (m, T); saved one truth value for each position, True at t.
    Raises: ValueError if a sequence is empty or the mask has another shape; TypeError if key is not a random key, or
            the mask is not of bool.
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
        after = jnp.cumsum(counts[:, ::-1], 1)[:, ::-1]  # how many positions count from here on
        here = counts & (after == 1)
        return jnp.sum(jnp.where(along(here, x), x, 0), 1), state, (here,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *s"]) -> tuple[dict, Any]:
        (here,) = res
        dy = dy[:, None]
        return {}, jnp.where(along(here, dy), dy, 0)

    return Layer(init, forward, backward, "last", traits=Traits(positions_end, alone=True))


def along(here: jax.Array, x: jax.Array) -> jax.Array:
    """here (m, T) with axes of 1 appended, so that it broadcasts with x."""
    return here.reshape(*here.shape, *[1] * (x.ndim - 2))


@constructor
def reshape(*shape: int) -> Layer:
    """Reshape each example, its numbers in the same order.

        y = x in the new shape      dx = dy in the shape of x

    Shapes:  x (m, *old); y (m, *shape); nothing saved.
    Options: shape: sizes without the axis of the examples; one of them may be -1, which is then inferred.
    Raises:  ValueError if the numbers do not fill the shape; TypeError if a size is not a whole number.
    """
    return reshaping(f"reshape{shape}" if len(shape) != 1 else f"reshape({shape[0]})", shape)


def reshaping(name: str, shape: tuple[int, ...]) -> Layer:
    """Make the layer of reshape and of flatten, under that name."""
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


@constructor
def flatten() -> Layer:
    """Reshape each example to one row.

        y = x, row by row      dx = dy in the shape of x

    Shapes: x (m, *s); y (m, n), n the product of s; nothing saved.
    """
    return reshaping("flatten", (-1,))
