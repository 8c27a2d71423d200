"""Windows that slide over the spatial axes of (m, *spatial, channels), for convolution and pooling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnbp.arrays.checks import LARGEST, check_size, first_channels, shown

Sizes = int | Sequence[int]
Padding = str | int | Sequence[Any]


@dataclass(frozen=True)
class Axis:
    """Windows along one axis of an input.

        offset k of window p is at position p stride + k dilation - low

    size   positions of the input           stride     from one window to the next
    kernel offsets of a window              dilation   from one offset to the next
    low, high   padding: number of positions beyond each end; a negative number leaves some out
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    low: int = 0
    high: int = 0

    @property
    def extent(self) -> int:
        """Number of positions that a window spans."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def count(self) -> int:
        """Number of windows."""
        return (self.size + self.low + self.high - self.extent) // self.stride + 1

    @property
    def last(self) -> int:
        """Where the last window begins, relative to the first."""
        return (self.count - 1) * self.stride

    @property
    def offsets(self) -> range:
        """Where the offsets of a window lie, relative to its first position."""
        return range(0, self.extent, self.dilation)

    @property
    def real(self) -> np.ndarray:
        """True where an offset of a window lies within the input: (kernel, count)."""
        at = np.add.outer(self.offsets, np.arange(self.count) * self.stride) - self.low
        return (at >= 0) & (at < self.size)


@dataclass(frozen=True)
class Windows:
    """Windows over one input, axis by axis: a static, hashable value."""

    axes: tuple[Axis, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Number of positions of the input along each axis."""
        return tuple(a.size for a in self.axes)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Number of offsets of a window along each axis."""
        return tuple(a.kernel for a in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """Step from one window to the next along each axis."""
        return tuple(a.stride for a in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Step from one offset to the next along each axis."""
        return tuple(a.dilation for a in self.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Number of positions beyond the two ends of each axis."""
        return tuple((a.low, a.high) for a in self.axes)

    @property
    def count(self) -> tuple[int, ...]:
        """Number of windows along each axis."""
        return tuple(a.count for a in self.axes)

    @property
    def extent(self) -> tuple[int, ...]:
        """Number of positions that a window spans along each axis."""
        return tuple(a.extent for a in self.axes)

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Where the offsets of a window lie, relative to its first position, row by row."""
        return list(product(*(a.offsets for a in self.axes)))

    def views(self, x: jax.Array, fill: float = 0) -> list[jax.Array]:
        """For each offset, the entry of every window at it: (m, *count, channels). Padding has the value fill."""
        pads = [(0, 0, 0), *((a.low, a.high, 0) for a in self.axes), (0, 0, 0)]
        x = lax.pad(x, jnp.asarray(fill, x.dtype), pads)

        def view(offset: tuple[int, ...]) -> jax.Array:
            ends = (o + a.last + 1 for o, a in zip(offset, self.axes, strict=True))
            return lax.slice(x, (0, *offset, 0), (x.shape[0], *ends, x.shape[-1]), (1, *self.stride, 1))

        return [view(offset) for offset in self.offsets]

    def scatter(self, views: list[jax.Array]) -> jax.Array:
        """The transpose of views: add every number to the position that it came from, (m, *size, channels)."""

        def placed(offset: tuple[int, ...], view: jax.Array) -> jax.Array:
            pads = [
                (o - a.low, a.size - (o - a.low) - (a.last + 1), a.stride - 1)  # from where it was read, up to size
                for o, a in zip(offset, self.axes, strict=True)
            ]
            return lax.pad(view, jnp.zeros((), view.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

        first, *others = map(placed, self.offsets, views)
        return sum(others, first)

    def real(self) -> np.ndarray:
        """True where an offset of a window lies within the input: (offsets, *count)."""
        along = product(*(a.real for a in self.axes))
        return np.asarray([prod(np.meshgrid(*rows, indexing="ij")) for rows in along]).astype(bool)

    def inside(self) -> np.ndarray:
        """Number of positions of each window that lie within the input, (*count)."""
        return self.real().sum(0)


@dataclass(frozen=True)
class Sliding:
    """The options of a layer that slides windows; each is one number, or one number for every spatial axis.

        SAME    ceil(size / stride) windows, an odd position of padding at the high end, as in JAX and TensorFlow
        VALID   no padding
        p       p positions at each end, as in PyTorch;   (p, q): for each axis;   ((low, high), ...): for each end

    Raises: ValueError or TypeError if the options fit no input.
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

        Raises: ValueError if x has no spatial axes, the options are for another number of axes, or the kernel is larger
                than the padded input.
        """
        axes = [replace(a, size=size) for a, size in zip(self.free(shape), shape[1:-1], strict=True)]
        at = Windows(tuple(map(same, axes) if self.padding == "SAME" else axes))
        if any(a.size + a.low + a.high < a.extent for a in at.axes):
            raise ValueError(
                f"{self.name}: the kernel spans {at.extent} positions, x of shape {shape} has {at.size}, "
                f"padded by {at.padding}{first_channels(shape)}"
            )
        return at

    def behind(self, shape: tuple[int, ...]) -> Windows:
        """The windows over what a transposed convolution of an x of that shape, (m, *count, channels), returns.

            SAME    size = count stride      VALID   size = (count - 1) stride + extent      else   less the padding

        Raises: ValueError as over, and if the padding leaves no position.
        """
        counted = list(zip(self.free(shape), shape[1:-1], strict=True))
        if self.padding == "SAME":
            return self.over((shape[0], *(count * a.stride for a, count in counted), shape[-1]))
        sizes = [(count - 1) * a.stride + a.extent - a.low - a.high for a, count in counted]
        at = Windows(tuple(replace(a, size=size) for (a, _), size in zip(counted, sizes, strict=True)))
        if min(at.size) < 1:
            raise ValueError(f"{self.name}: padding {at.padding} leaves nothing of x of shape {shape}")
        return at

    def free(self, shape: tuple[int, ...]) -> list[Axis]:
        """The options for every spatial axis of that shape, without the size and the padding of SAME."""
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
        options = (each(what, getattr(self, what)) for what in ("kernel", "stride", "dilation"))
        return [Axis(1, k, s, d, int(p[0]), int(p[-1])) for k, s, d, p in zip(*options, ends, strict=True)]


def same(a: Axis) -> Axis:
    """The axis with the padding of SAME: ceil(size / stride) windows, an odd position at the high end."""
    missing = max((-(-a.size // a.stride) - 1) * a.stride + a.extent - a.size, 0)
    return replace(a, low=missing // 2, high=missing - missing // 2)
