"""Convolution, its transpose, and a bias for each channel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_size
from fnbp.arrays.masks import Rule, by_position
from fnbp.arrays.placement import each_example, over_examples, reshaped
from fnbp.arrays.sums import wide
from fnbp.construction import constructor
from fnbp.factor import Factor, Sum, along_examples, register_factor
from fnbp.layer import Layer, stateless
from fnbp.layers.initializers import initializer_of
from fnbp.layers.parameters import Shapes, add_bias, due, optional, weights
from fnbp.layers.windows import Axis, Padding, Sizes, Sliding, Windows

__all__ = ["bias", "conv", "conv_transpose"]

FEW_CHANNELS = 16  # below it products for each example are faster with the positions last


@register_factor
@dataclass(frozen=True)
class Correlation(Factor):
    """dW[k] = sum_i sum_p d_i[p] x_i[p stride + k dilation - low]^T: the gradient of the kernel of a convolution.

        total        of d with x                                             (n_out, *kernel, n_in / groups)
        per_example  the same for each example                               (m, n_out, *kernel, n_in / groups)
        outer        the content of a window is one row of x, without groups

    Shapes: d (m, *count, n_out), x (m, *size, n_in); at (the windows), groups and spread are static. spread is True
            for a transposed convolution, in which d and x change places.
    Source: Rochette et al. 2019, arXiv:1912.06015, for per-example gradients as convolutions.
    """

    d: jax.Array
    x: jax.Array
    at: Windows = field(metadata={"static": True})
    groups: int = field(default=1, metadata={"static": True})
    spread: bool = field(default=False, metadata={"static": True})

    @property
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """The array with one entry for each window, and the array that the windows lie over."""
        return (self.x, self.d) if self.spread else (self.d, self.x)

    @property
    def turned(self) -> bool:  # type: ignore[override]
        return self.spread

    @over_examples
    def total(self) -> jax.Array:
        return kernel_gradient(*self.pair, self.at, self.groups)

    @each_example
    def per_example(self) -> jax.Array:
        return kernel_gradients(*self.pair, self.at, self.groups)

    def outer(self) -> tuple[jax.Array, jax.Array] | None:
        if self.groups > 1:
            return None
        each, under = self.pair
        views = jnp.stack(self.at.views(under), -2)
        return each, views.reshape(*views.shape[:-2], -1)

    def scaled(self, c: Any) -> "Correlation":
        return replace(self, d=along_examples(c, self.d))


def correlate(x: jax.Array, W: jax.Array, stride: Any, padding: Any, **options: Any) -> jax.Array:
    """Call lax.conv_general_dilated on x (m, *spatial, n_in) and W (*kernel, n_in / groups, n_out).

    XLA has fast code for this order of axes on the CPU. Outside a loop it converts any other order to this one; inside
    a loop it does not, and is several times slower.
    """
    spatial = range(1, x.ndim - 1)
    of_x, of_W = (0, x.ndim - 1, *spatial), (x.ndim - 1, x.ndim - 2, *(i - 1 for i in spatial))
    orders = lax.ConvDimensionNumbers(of_x, of_W, of_x)
    return lax.conv_general_dilated(x, W, stride, padding, dimension_numbers=orders, **options)


def convolve(x: jax.Array, W: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """Compute y[p] = sum_k W[k] x[p stride + k dilation - low], (m, *count, n_out)."""
    W = jnp.moveaxis(W, 0, -1)
    return correlate(x, W, at.stride, at.padding, rhs_dilation=at.dilation, feature_group_count=groups)


def convolve_back(y: jax.Array, W: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """Compute x[i] = sum of W[k]^T y[p] over all p, k with i = p stride + k dilation - low, (m, *size, n_in).

    The transpose of convolve: a convolution of y, spread out by the stride, with the kernel reversed.
    """
    if has_phases(at, groups):
        return spread_in_phases(y, W, at.axes[0])
    pads = [
        (
            a.extent - 1 - a.low,  # so that y[0] meets x[0] through the offset farthest from it
            a.size + a.low - a.last - 1,  # so that there are size positions
        )
        for a in at.axes
    ]
    return correlate(
        y,
        turned(W, groups),
        (1,) * len(pads),
        pads,
        lhs_dilation=at.stride,
        rhs_dilation=at.dilation,
        feature_group_count=groups,
    )


def turned(W: jax.Array, groups: int) -> jax.Array:
    """W with its offsets reversed and n_in after n_out, group by group: (*kernel, n_out / groups, n_in)."""
    n_out, *kernel, n_in = W.shape
    W = jnp.flip(W, range(1, W.ndim - 1)).reshape(groups, n_out // groups, *kernel, n_in)
    return jnp.moveaxis(W, (0, 1), (-2, -3)).reshape(*kernel, n_out // groups, groups * n_in)


def kernel_gradient(dy: jax.Array, x: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """Compute dW[k] = sum_p dy[p] x[p stride + k dilation - low]^T, (n_out, *kernel, n_in / groups).

    A convolution of x with dy in which examples and channels change places.
    """
    if has_phases(at, groups):
        return kernel_gradient_in_phases(dy, x, at.axes[0])
    pads = [
        (
            a.low,  # as in the forward
            a.extent + a.last - a.size - a.low,  # so that there are as many results as offsets
        )
        for a in at.axes
    ]
    dW = correlate(
        jnp.swapaxes(x, 0, -1),
        jnp.moveaxis(dy, 0, -2),
        at.dilation,
        pads,
        rhs_dilation=at.stride,
        batch_group_count=groups,
    )
    return jnp.swapaxes(dW, 0, -1)


# --- along one axis, in phases of its stride: offset k of a window is phase k mod stride of block p + k // stride ---


def has_phases(at: Windows, groups: int) -> bool:
    """True where a window is a few neighbouring blocks of one stride each, so that products of matrices do."""
    a = at.axes[0]
    return len(at.axes) == 1 and groups == 1 and a.stride > 1 and a.dilation == 1 and a.low >= 0


def kernel_gradient_in_phases(dy: Float[Array, "m p o"], x: Float[Array, "m s i"], a: Axis) -> Float[Array, "o k i"]:
    """As kernel_gradient: dW[t stride + r] = sum_p dy[p] b[p + t, r]^T, b the blocks of x."""
    reach = -(-a.kernel // a.stride)
    length = (a.count + reach - 1) * a.stride
    blocks = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (a.low, length - a.low - a.size, 0), (0, 0, 0)])
    blocks = blocks.reshape(x.shape[0], a.count + reach - 1, -1)
    dW = jnp.stack([jnp.einsum("mpo,mpj->oj", dy, blocks[:, t : t + a.count]) for t in range(reach)], 1)
    return dW.reshape(dy.shape[-1], reach * a.stride, -1)[:, : a.kernel]


def spread_in_phases(y: Float[Array, "m p o"], W: Float[Array, "o k i"], a: Axis) -> Float[Array, "m s i"]:
    """As convolve_back: b[p + t, r] = sum of W[t stride + r]^T y[p], b the blocks of what is returned."""
    reach = -(-a.kernel // a.stride)
    W = jnp.pad(W, ((0, 0), (0, reach * a.stride - a.kernel), (0, 0)))
    W = W.reshape(W.shape[0], reach, -1)
    add_up = jnp.result_type(wide(y), W)  # the parts of a position are added before they are rounded
    products = (jnp.einsum("mpo,oj->mpj", y, W[:, t], preferred_element_type=add_up) for t in range(reach))
    first, *others = (jnp.pad(a, ((0, 0), (t, reach - 1 - t), (0, 0))) for t, a in enumerate(products))
    blocks = sum(others, first).astype(jnp.result_type(y, W))
    x = reshaped(blocks, y.shape[0], (a.count + reach - 1) * a.stride, W.shape[-1] // a.stride)
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (-a.low, a.low + a.size - x.shape[1], 0), (0, 0, 0)])


# --- of each example ---


def kernel_gradients(dy: jax.Array, x: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """kernel_gradient of each example, (m, n_out, *kernel, n_in / groups).

    A product for each line of the kernel, of dy with what the windows see through that line. On the CPU a convolution
    for each example takes longer.
    """
    m, n_out, n_in = x.shape[0], dy.shape[-1], x.shape[-1]
    if groups > 1:
        return jax.vmap(lambda dy, x: kernel_gradient(dy[None], x[None], at, groups))(dy, x)
    views, line = at.views(x), at.kernel[-1]
    dy = dy.reshape(m, -1, n_out)
    lines = []
    for i in range(0, len(views), line):
        if n_in < FEW_CHANNELS:  # positions last, so that the long axis is the contiguous one
            seen = jnp.moveaxis(jnp.stack(views[i : i + line], 1), -1, 2).reshape(m, line * n_in, -1)
            lines.append(jnp.einsum("mkp,mpo->mko", seen, dy))
        else:
            seen = jnp.stack(views[i : i + line], -2).reshape(m, -1, line * n_in)
            lines.append(jnp.einsum("mpk,mpo->mko", seen, dy))
    each = jnp.moveaxis(jnp.concatenate(lines, 1), 1, 2)
    return each.reshape(m, n_out, *at.kernel, n_in)


@constructor
def conv(
    n_out: int,
    kernel: Sizes,
    stride: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
) -> Layer:
    """Multiply every window of the input by a kernel and add a bias.

        y[p] = b + sum_k W[k] x[p stride + k dilation - low]
        dW[k] = sum_p dy[p] x[p stride + k dilation - low]^T      db = sum dy
        dx[i] = sum of W[k]^T dy[p] over all p, k with p stride + k dilation - low = i

    Shapes:   x (m, *size, n_in), of 1, 2 or more spatial axes; y (m, *count, n_out);
              W (n_out, *kernel, n_in / groups); b (n_out,); saved x.
    Forward:  Dumoulin & Visin 2016, arXiv:1603.07285, chapter 2, for the arithmetic of sizes.
    Backward: the same, chapter 4, for dx; dW by the chain rule.
    Options:  kernel, stride, dilation: one number, or one for each spatial axis. padding: "SAME" (JAX's and
              TensorFlow's meaning: ceil(size / stride) windows, an odd position at the high end), "VALID" (none), or
              numbers as in PyTorch: p at each end, one p for each axis, or (low, high) pairs. groups: the channels are
              split into this many groups, each convolved by itself; groups = n_in is depthwise. W: initializer of the
              kernel, a name (see fnbp.initializer) or a function (key, shape, dtype) -> array. b: initializer of the
              bias; b=None: no bias.
    Mask:     a position that does not count is padding. Every position then needs a window: stride 1, padding "SAME".
    Raises:   ValueError if a size is below 1, the kernel is larger than the padded input, groups do not divide n_in and
              n_out, or params do not fit x; TypeError if x is not floating point, or there is a mask and a position has
              no window.
    """
    name = f"conv({n_out}, {kernel})"
    slide = Sliding(name, kernel, stride, padding, dilation)
    check_size(name, "n_out", n_out)
    check_size(name, "groups", groups)
    check_divides(name, "n_out", n_out, groups)

    def over(x: Any) -> Windows:
        check_divides(name, "the channels of x", x.shape[-1], groups)
        return slide.over(x.shape)

    def shapes(x: Any) -> Shapes:
        return {"W": (n_out, *over(x).kernel, x.shape[-1] // groups), "b": (n_out,)}

    init, check = weights(name, shapes, W=initializer_of(name, "W", W, out_axis=0), b=optional(name, "b", b))

    def forward(params: dict, x: Float[Array, "m *s n_in"]) -> tuple[Float[Array, "m *t n_out"], tuple]:
        check(params, x)
        return add_bias(convolve(x, params["W"], over(x), groups), params), (x,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *t n_out"]) -> tuple[dict, Float[Array, "m *s n_in"]]:
        (x,) = res
        dx = convolve_back(dy, params["W"], over(x), groups)
        return due(params, W=Correlation(dy, x, over(x), groups), b=Sum(dy)), dx

    return stateless(init, forward, backward, name, mask=a_window_for_each(over), alone=True)


def a_window_for_each(over: Callable) -> Rule:
    """The mask rule of conv: every position has a window, in which positions that do not count act as padding."""

    def rule(name, x, mask):
        if mask is not None and len(getattr(x, "shape", ())) > 2:
            at = over(x)
            if at.count != at.size or set(at.stride) != {1}:
                raise TypeError(
                    f"{name}: under a mask (Context.mask, or ragged) every position needs a window: stride 1 and as "
                    f"many windows as positions, as with padding='SAME'; got stride {at.stride}, padding {at.padding}"
                )
        return by_position(name, x, mask)

    return rule


@constructor
def conv_transpose(
    n_out: int,
    kernel: Sizes,
    stride: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
) -> Layer:
    """Spread every position of the input over a window of the output: the transpose of a convolution.

        y[i] = b + sum of W[k]^T x[p] over all p, k with p stride + k dilation - low = i
        dW[k] = sum_p x[p] dy[p stride + k dilation - low]^T      db = sum dy
        dx[p] = sum_k W[k] dy[p stride + k dilation - low]

    Shapes:   x (m, *count, n_in); y (m, *size, n_out); b (n_out,); saved x. W (n_in, *kernel, n_out / groups), as
              in the convolution that it transposes.
    Forward:  Dumoulin & Visin 2016, arXiv:1603.07285, chapter 4.
    Backward: dx is the convolution that the forward transposes; dW by the chain rule.
    Options:  as in conv, but padding is that of the convolution it transposes, so it shortens y (PyTorch's meaning of
              a number). "SAME": size = count stride. "VALID": size = (count - 1) stride + the extent of the kernel.
              p: p positions fewer at each end than "VALID".
    Raises:   as conv; ValueError if the padding leaves no position.
    """
    name = f"conv_transpose({n_out}, {kernel})"
    slide = Sliding(name, kernel, stride, padding, dilation)
    check_size(name, "n_out", n_out)
    check_size(name, "groups", groups)
    check_divides(name, "n_out", n_out, groups)

    def over(x: Any) -> Windows:
        """The windows, which lie over y."""
        check_divides(name, "the channels of x", x.shape[-1], groups)
        return slide.behind(x.shape)

    def shapes(x: Any) -> Shapes:
        return {"W": (x.shape[-1], *over(x).kernel, n_out // groups), "b": (n_out,)}

    init, check = weights(name, shapes, W=initializer_of(name, "W", W, 0, -1), b=optional(name, "b", b))

    def forward(params: dict, x: Float[Array, "m *s n_in"]) -> tuple[Float[Array, "m *t n_out"], tuple]:
        check(params, x)
        return add_bias(convolve_back(x, params["W"], over(x), groups), params), (x,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *t n_out"]) -> tuple[dict, Float[Array, "m *s n_in"]]:
        (x,) = res
        dx = convolve(dy, params["W"], over(x), groups)
        return due(params, W=Correlation(dy, x, over(x), groups, spread=True), b=Sum(dy)), dx

    return stateless(init, forward, backward, name, alone=True)


@constructor
def bias(b: str | Callable = "zeros") -> Layer:
    """Add one number to each channel.

        y = x + b
        db = sum dy      dx = dy

    Shapes:  x, y (..., n); b (n,); nothing saved.
    Options: b: initializer of the bias, a name (see fnbp.initializer) or a function (key, shape, dtype) -> array.
    Raises:  ValueError if params do not fit x; TypeError if x is not floating point.
    """

    def shapes(x: Any) -> Shapes:
        return {"b": x.shape[-1:]}

    init, check = weights("bias", shapes, b=initializer_of("bias", "b", b))

    def forward(params: dict, x: Float[Array, "*m n"]) -> tuple[Float[Array, "*m n"], tuple]:
        check(params, x)
        return x + params["b"], ()

    def backward(params: dict, res: tuple, dy: Float[Array, "*m n"]) -> tuple[dict, Float[Array, "*m n"]]:
        return {"b": Sum(dy)}, dy

    return stateless(init, forward, backward, "bias", mask="position", alone=True)


def check_divides(name: str, what: str, value: int, groups: int) -> None:
    """Raise a ValueError unless value, a number of channels, is a multiple of groups."""
    if value % groups:
        raise ValueError(f"{name}: {what} must be a multiple of groups, got {value} for {groups} groups")
