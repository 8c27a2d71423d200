"""A published backward: its name, its source, its functions, and the expected verdict."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import fnbp
from fnbp.comparison.report import Report


@dataclass(frozen=True)
class Entry:
    """One published backward, rewritten as a user would write it.

    f          the function, or with reference a jax.custom_vjp (or custom_jvp)
    args       the arguments, in float32
    vjp        backward(args, dy) -> cotangents of args, or None
    reference  the plain function that jax.vjp differentiates, or None
    expected   the expected verdict in float32: "ok", "convention" or a kind of fault
    bfloat16   the expected verdict in bfloat16; None if it is not run, and remark says why
    right      True if the formula is right in exact arithmetic
    mended     the name of a clean entry, if this one is found wanting
    deliberate True if it is another rule on purpose
    remark     what a reader must know of it
    """

    name: str
    source: str
    f: Callable
    args: tuple
    vjp: Callable | None = None
    reference: Callable | None = None
    expected: str = "ok"
    bfloat16: str | None = "ok"
    right: bool = True
    mended: str = ""
    deliberate: bool = False
    remark: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def way(self) -> str:
        """The keyword by which compare is given the backward."""
        return "vjp=" if self.vjp else "reference="

    @property
    def plain(self) -> Callable:
        """The function that jax.vjp is to differentiate."""
        return self.reference or self.f

    def cast(self, dtype: Any) -> tuple:
        """The arguments with floating leaves in dtype."""
        return jax.tree.map(lambda a: a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a, self.args)

    def backward(self, args: tuple, dy: Any) -> tuple:
        """The published cotangents."""
        return self.vjp(args, dy) if self.vjp else jax.vjp(self.f, *args)[1](dy)

    def compare(self, dtype: Any, **options: Any) -> Report:
        """Ask compare, at arguments of dtype."""
        options = self.options | options
        return fnbp.compare(self.f, *self.cast(dtype), vjp=self.vjp, reference=self.reference, **options)


def with_backward(f: Callable, saves: Callable, back: Callable) -> Callable:
    """f as a jax.custom_vjp: saves(*args) -> y, res and back(res, dy) -> cotangents."""
    custom = jax.custom_vjp(f)
    custom.defvjp(saves, back)
    return custom


def normal(seed: int, *shapes: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Gaussian arrays in float32."""
    rng = np.random.default_rng(seed)
    return tuple((shift + scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes)


def integers(seed: int, high: int, *shape: int) -> np.ndarray:
    """Labels or tokens below high."""
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)
