"""Where the numbers of an array stand after reshapes and transposes of its axes."""

import math
from dataclasses import dataclass, replace

import jax

Digits = tuple[tuple[int, int], ...]  # (size, stride) in the array at the start


@dataclass(frozen=True)
class Layout:
    """An array of shape start, its numbers moved into shape.

    digits  the axes of start, split and put in the order of shape: size, and stride within start
    """

    start: tuple[int, ...]
    digits: Digits
    shape: tuple[int, ...]

    @staticmethod
    def of(start: tuple[int, ...]) -> "Layout":
        """Nothing moved."""
        strides = [math.prod(start[i + 1 :]) for i in range(len(start))]
        return Layout(start, tuple((n, s) for n, s in zip(start, strides, strict=True) if n != 1), start)

    @property
    def trivial(self) -> bool:
        """True if nothing is moved and the shape is the same."""
        return self.start == self.shape and self.flat

    @property
    def flat(self) -> bool:
        """True if the numbers are in the order of start."""
        return self.digits == self.first

    @property
    def first(self) -> Digits:
        """The digits in the order of start."""
        return tuple(sorted(self.digits, key=lambda digit: -digit[1]))

    def reshaped(self, shape: tuple[int, ...]) -> "Layout":
        """The same numbers in the same order in another shape."""
        return replace(self, shape=shape)

    def transposed(self, axes: tuple[int, ...]) -> "Layout | None":
        """With the axes of shape in another order; None if these are no axes of start, split."""
        parts = self.axes()
        if parts is None:
            return None
        digits = tuple(digit for axis in axes for digit in parts[axis])
        return replace(self, digits=digits, shape=tuple(self.shape[axis] for axis in axes))

    def axes(self) -> list[list[tuple[int, int]]] | None:
        """The digits of each axis of shape."""
        rest, found = list(merged(self.digits)), []
        for size in self.shape:
            own = []
            while size > 1:
                (n, stride), *rest = rest
                if n > size and n % size == 0:
                    n, rest = size, [(n // size, stride), *rest]
                    stride *= rest[0][0]
                if size % n:
                    return None
                own.append((n, stride))
                size //= n
            found.append(own)
        return found

    def move(self, a: jax.Array) -> jax.Array:
        """An array whose last axes are start, moved; axes in front stay."""
        return self.along(a, self.start, self.first, self.digits, self.shape)

    def back(self, a: jax.Array) -> jax.Array:
        """The inverse of move."""
        return self.along(a, self.shape, self.digits, self.first, self.start)

    @staticmethod
    def along(
        a: jax.Array, before: tuple[int, ...], digits: Digits, wanted: Digits, after: tuple[int, ...]
    ) -> jax.Array:
        """a reshaped into digits, transposed into the wanted order, reshaped."""
        front = a.shape[: a.ndim - len(before)]
        if digits == wanted:
            return a.reshape(*front, *after)
        n = len(front)
        a = a.reshape(*front, *(size for size, _ in digits))
        return a.transpose(*range(n), *(n + digits.index(digit) for digit in wanted)).reshape(*front, *after)

    def sides(self, columns: int) -> tuple[Digits, Digits, bool] | None:
        """Start seen as a matrix of so many columns: the digits of its rows and of its columns in the order of shape,
        and True if the columns come first; None if rows and columns are mixed."""
        rows, cols, order = [], [], []
        for size, stride in self.digits:
            if stride >= columns:
                rows.append((size, stride // columns))
                order.append(0)
            elif size * stride <= columns:
                cols.append((size, stride))
                order.append(1)
            elif columns % stride == 0 and size % (columns // stride) == 0:
                rows.append((size * stride // columns, 1))
                cols.append((columns // stride, stride))
                order += [0, 1]
            else:
                return None
        if order != sorted(order) and order != sorted(order, reverse=True):
            return None
        return tuple(rows), tuple(cols), bool(order) and order[0] == 1 and 0 in order


def merged(digits: Digits) -> Digits:
    """Neighbours that are one axis of start as one digit."""
    made: list[tuple[int, int]] = []
    for size, stride in digits:
        if made and made[-1][1] == size * stride:
            made[-1] = (made[-1][0] * size, stride)
        else:
            made.append((size, stride))
    return tuple(made)


def along_last(a: jax.Array, digits: Digits) -> jax.Array:
    """a with the numbers of its last axis in the order of digits."""
    return Layout(a.shape[-1:], digits, a.shape[-1:]).move(a)
