"""Windows that slide over the spatial axes of (m, *spatial, channels): for convolution and pooling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnbp.checks import LARGEST, check_size, first_channels, shown

Sizes = int | Sequence[int]
Padding = str | int | Sequence[Any]


@dataclass(frozen=True)
class Windows:
    """Windows over one input: static, hashable. One number of each for every spatial axis.

        window p, offset k, along one axis:   position p stride + k dilation - low

    size      of the input            kernel   how many offsets
    padding   (low, high): how many positions lie beyond the ends; negative ones leave some out
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def count(self) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        return tuple((n + sum(p) - e) // s + 1 for n, p, e, s in self.each("size", "padding", "extent", "stride"))

    @property
    def extent(self) -> tuple[int, ...]:
        """From a window's first position to its last."""
        return tuple((k - 1) * d + 1 for k, d in self.each("kernel", "dilation"))

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Where the offsets lie from a window's first position, row by row."""
        return list(product(*(range(0, e, d) for e, d in self.each("extent", "dilation"))))

    def each(self, *names: str) -> Any:
        """One tuple of the named numbers for each axis."""
        return zip(*(getattr(self, name) for name in names), strict=True)

    def views(self, x: jax.Array, fill: float = 0) -> list[jax.Array]:
        """For each offset, what the windows hold there: (m, *count, channels). Beyond the ends stands fill."""
        pads = [(0, 0, 0), *((low, high, 0) for low, high in self.padding), (0, 0, 0)]
        x = lax.pad(x, jnp.asarray(fill, x.dtype), pads)
        steps = (1, *self.stride, 1)

        def view(offset: tuple[int, ...]) -> jax.Array:
            ends = (o + (c - 1) * s + 1 for o, c, s in zip(offset, self.count, self.stride, strict=True))
            return lax.slice(x, (0, *offset, 0), (x.shape[0], *ends, x.shape[-1]), steps)

        return [view(offset) for offset in self.offsets]

    def scatter(self, views: list[jax.Array]) -> jax.Array:
        """The transpose of views: every number added to the position that it came from, (m, *size, channels)."""

        def placed(offset: tuple[int, ...], view: jax.Array) -> jax.Array:
            pads = [(0, 0, 0)]
            for o, (n, c, s, (low, _)) in zip(offset, self.each("size", "count", "stride", "padding"), strict=True):
                pads.append((o - low, n - (o - low) - ((c - 1) * s + 1), s - 1))
            return lax.pad(view, jnp.zeros((), view.dtype), [*pads, (0, 0, 0)])

        first, *others = map(placed, self.offsets, views)
        return sum(others, first)

    def real(self) -> np.ndarray:
        """For each offset of each window, whether it lies within the input: (offsets, *count)."""
        along = [
            np.asarray([(0 <= p * s + o - low) & (p * s + o - low < n) for o in range(0, e, d)])
            for n, c, s, e, d, (low, _) in self.each("size", "count", "stride", "extent", "dilation", "padding")
            for p in [np.arange(c)]
        ]
        offsets = product(*(range(len(rows)) for rows in along))
        grids = ([rows[k] for rows, k in zip(along, at, strict=True)] for at in offsets)
        return np.asarray([prod(np.meshgrid(*grid, indexing="ij")) for grid in grids]).astype(bool)

    def inside(self) -> np.ndarray:
        """How many positions of each window lie within the input, (*count)."""
        return self.real().sum(0)


# --- convolution, written for the axes (m, *spatial, channels) and W (n_out, *kernel, n_in / groups) ---


def correlate(x: jax.Array, W: jax.Array, stride: Any, padding: Any, **options: Any) -> jax.Array:
    """lax.conv_general_dilated of x (m, *spatial, n_in) with W (*kernel, n_in / groups, n_out).

    XLA has fast code for these orders of axes on the CPU. Outside loops it brings any order into this one; inside it
    does not, and is several times slower.
    """
    spatial = range(1, x.ndim - 1)
    of_x, of_W = (0, x.ndim - 1, *spatial), (x.ndim - 1, x.ndim - 2, *(i - 1 for i in spatial))
    orders = lax.ConvDimensionNumbers(of_x, of_W, of_x)
    return lax.conv_general_dilated(x, W, stride, padding, dimension_numbers=orders, **options)


def convolve(x: jax.Array, W: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """y[p] = sum_k W[k] x[p stride + k dilation - low], (m, *count, n_out)."""
    W = jnp.moveaxis(W, 0, -1)
    return correlate(x, W, at.stride, at.padding, rhs_dilation=at.dilation, feature_group_count=groups)


def convolve_back(y: jax.Array, W: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """x[i] = sum of W[k]^T y[p] over all p, k that meet at i = p stride + k dilation - low, (m, *size, n_in).

    The transpose of convolve: y spread out by the stride, under the kernel turned round.
    """
    pads = []
    for n, c, s, e, (low, _) in at.each("size", "count", "stride", "extent", "padding"):
        pads.append((e - 1 - low, n + low - (c - 1) * s - 1))
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
    """W with its offsets in reverse and n_in behind n_out, group by group: (*kernel, n_out / groups, n_in)."""
    n_out, *kernel, n_in = W.shape
    W = jnp.flip(W, range(1, W.ndim - 1)).reshape(groups, n_out // groups, *kernel, n_in)
    return jnp.moveaxis(W, (0, 1), (-2, -3)).reshape(*kernel, n_out // groups, groups * n_in)


def kernel_gradient(dy: jax.Array, x: jax.Array, at: Windows, groups: int = 1) -> jax.Array:
    """dW[k] = sum_p dy[p] x[p stride + k dilation - low]^T, (n_out, *kernel, n_in / groups).

    A convolution of x by dy in which examples and channels have changed places.
    """
    pads = []
    for n, c, s, d, k, (low, _) in at.each("size", "count", "stride", "dilation", "kernel", "padding"):
        pads.append((low, (k - 1) * d + (c - 1) * s + 1 - n - low))
    dW = correlate(
        jnp.swapaxes(x, 0, -1),
        jnp.moveaxis(dy, 0, -2),
        at.dilation,
        pads,
        rhs_dilation=at.stride,
        batch_group_count=groups,
    )
    return jnp.swapaxes(dW, 0, -1)


# --- what a layer is asked for, before its input is known ---


@dataclass(frozen=True)
class Sliding:
    """The options of a layer that slides windows; each is one number, or one for every spatial axis.

        SAME    as many windows as stride fits into the input: ceil(n / stride), the odd position at the high end
        VALID   no padding
        p       p positions at each end;   (p, q): for each axis;   ((low, high), ...): for each end of each axis

    Raises: ValueError or TypeError for options that fit no input.
    """

    name: str
    kernel: Sizes
    stride: Sizes = 1
    padding: Padding = "VALID"
    dilation: Sizes = 1

    def __post_init__(self):
        for what in ("kernel", "stride", "dilation"):
            value = getattr(self, what)
            for one in value if isinstance(value, (tuple, list)) else (value,):
                check_size(self.name, what, one)
        told = self.padding if not isinstance(self.padding, str) else 0 if self.padding in ("SAME", "VALID") else None
        for one in np.ravel(np.asarray(told, object)):
            if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or not 0 <= one <= LARGEST:
                raise ValueError(
                    f"{self.name}: padding must be 'SAME', 'VALID', or numbers of at least 0, got {shown(self.padding)}"
                )

    def over(self, shape: tuple[int, ...]) -> Windows:
        """The windows over an x of that shape, (m, *size, channels).

        Raises: ValueError for an x without spatial axes, options for another number of axes, a kernel larger than
                the padded input.
        """
        free = self.free(shape)
        at = replace(free, size=tuple(shape[1:-1]))
        if self.padding == "SAME":
            over = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in at.each("size", "stride", "extent")]
            at = replace(at, padding=tuple((n // 2, n - n // 2) for n in over))
        if any(n + sum(p) < e for n, p, e in at.each("size", "padding", "extent")):
            raise ValueError(
                f"{self.name}: the kernel spans {at.extent} positions, x of shape {shape} has {at.size}, "
                f"padded by {at.padding}{first_channels(shape)}"
            )
        return at

    def behind(self, shape: tuple[int, ...]) -> Windows:
        """The windows whose counts are those of that shape, (m, *count, channels): over what a transposed convolution
        returns.

            SAME    size = count stride      VALID   size = (count - 1) stride + extent      else   less the padding

        Raises: ValueError as over, and where the padding leaves nothing.
        """
        free, count = self.free(shape), shape[1:-1]
        if self.padding == "SAME":
            size = (c * s for c, s in zip(count, free.stride, strict=True))
            return self.over((shape[0], *size, shape[-1]))
        spans = zip(count, free.stride, free.extent, free.padding, strict=True)
        size = tuple((c - 1) * s + e - sum(p) for c, s, e, p in spans)
        if min(size) < 1:
            raise ValueError(f"{self.name}: padding {free.padding} leaves nothing of x of shape {shape}")
        return replace(free, size=size)

    def free(self, shape: tuple[int, ...]) -> Windows:
        """The options for every spatial axis of that shape, size and SAME still open."""
        axes = len(shape) - 2
        if axes < 1:
            raise ValueError(f"{self.name}: x must be (m, *spatial, channels), got shape {shape}")

        def each(what: str, value: Any) -> tuple[Any, ...]:
            if isinstance(value, (int, np.integer)):
                return (int(value),) * axes
            if len(value) != axes:
                raise ValueError(
                    f"{self.name}: {what} {tuple(value)} is for {len(value)} spatial axes, "
                    f"x of shape {shape} has {axes}"
                )
            return tuple(value)

        ends = [np.ravel(p) for p in each("padding", 0 if isinstance(self.padding, str) else self.padding)]
        if any(len(p) not in (1, 2) for p in ends):
            raise ValueError(f"{self.name}: padding of an axis must be p or (low, high), got {self.padding!r}")
        pads = tuple((int(p[0]), int(p[-1])) for p in ends)
        kernel, stride, dilation = (each(what, getattr(self, what)) for what in ("kernel", "stride", "dilation"))
        return Windows((1,) * axes, kernel, stride, dilation, pads)
