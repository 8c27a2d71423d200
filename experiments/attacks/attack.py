"""An attack: one backward, and how compare is asked about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import fnbp
from fnbp.comparison.report import Report

rng = np.random.default_rng(0)
X = rng.standard_normal((7, 11)).astype(np.float32)
SEQUENCE = rng.standard_normal((3, 5, 6)).astype(np.float32)
POSITIVE = abs(X) + 0.1
W = rng.standard_normal((5, 11)).astype(np.float32)
B = rng.standard_normal(5).astype(np.float32)


@dataclass(frozen=True)
class Attack:
    """One backward, and how compare is asked about it.

    of     the class: what must be tried, or compared, to see the mistake
    right  True if the backward is right, and must not be accused
    """

    of: str
    title: str
    run: Callable[[], Report]
    right: bool = False


def function(
    of: str, title: str, f: Callable, backward: Callable, *args: Any, right: bool = False, **more: Any
) -> Attack:
    """compare(f, *args, vjp=backward)"""
    return Attack(of, title, lambda: fnbp.compare(f, *args, vjp=backward, **more), right)


def custom(
    of: str, title: str, f: Callable, rule: Callable, back: Callable, *args: Any, right: bool = False, **more: Any
) -> Attack:
    """compare of a jax.custom_vjp with that forward rule and backward, against its own primal function."""

    def run() -> Report:
        made = jax.custom_vjp(f)
        made.defvjp(rule, back)
        return fnbp.compare(made, *args, **more)

    return Attack(of, title, run, right)


def layer(of: str, title: str, made: Callable[[], fnbp.Layer], x: Any, right: bool = False, **more: Any) -> Attack:
    """compare(layer, x)"""
    return Attack(of, title, lambda: fnbp.compare(made(), x, **more), right)


def square(x: Any) -> Any:
    """y = x^2"""
    return x**2
