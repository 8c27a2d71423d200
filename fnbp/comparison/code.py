"""What the code of a function shows without being run: the numbers in it, its dtypes, and rules of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import is_inexact, real_pairs

COMPARING = {"lt", "le", "gt", "ge", "eq", "ne", "max", "min", "clamp", "jit", "pjit"}  # jit: jnp.clip is one
RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "pure_callback", "io_callback"}
MOST = 12  # numbers that are tried of one code


def jaxpr_of(f: Callable, *args: Any) -> Any:
    """The code of f at arguments of these shapes, or None if it cannot be traced."""
    try:
        return jax.make_jaxpr(f)(*args)
    except Exception:
        return None


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a code, those of the functions inside it too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns if jaxpr is not None else ():
        yield equation
        for value in equation.params.values():
            for inside in value if isinstance(value, (tuple, list)) else (value,):
                inside = getattr(inside, "jaxpr", inside)  # of a closed one
                if hasattr(inside, "eqns"):
                    yield from equations(inside)


def numbers_in(*codes: Any) -> tuple[float, ...]:
    """The numbers that stand in codes, other than 0: first those that something is compared with."""
    compared: dict[float, None] = {}
    others: dict[float, None] = {}
    for code in codes:
        for equation, value in constants(code):
            if value and np.isfinite(value) and 1e-300 < abs(value) < 3.5e38:
                (compared if equation in COMPARING else others)[value] = None
    return tuple(dict.fromkeys([*compared, *others]))[:MOST]


def constants(code: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a code, each with the name of the operation that takes it; "" for those that it closes over."""
    for equation in equations(code):
        for v in equation.invars:
            if hasattr(v, "val") and np.ndim(v.val) == 0 and np.issubdtype(np.result_type(v.val), np.number):
                yield equation.primitive.name, float(np.real(v.val))
    for array in getattr(code, "consts", ()):
        if np.size(array) <= MOST and is_inexact(array):
            yield from (("", float(value)) for value in np.ravel(real_pairs(array)))


def has_narrow_constant(code: Any) -> bool:
    """True if a code, traced at float64, holds a number that was rounded to float32: one of its 24 binary digits."""
    return any(value == float(np.float32(value)) and long_fraction(value) for name, value in constants(code) if name)


def long_fraction(value: float) -> bool:
    """True if a number needs more than 20 binary digits."""
    fraction, _ = np.frexp(value)
    return bool(np.isfinite(value) and (fraction * 2**20) % 1)


def computes_narrow(jaxpr: Any) -> bool:
    """True if a code, traced at float64, computes a floating point number of fewer bits; or if it cannot be read."""
    if jaxpr is None:
        return True
    dtypes = [v.aval.dtype for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "dtype")]
    return any(jnp.issubdtype(d, jnp.inexact) and jnp.finfo(d).bits < 64 for d in dtypes)


def rules_in(jaxpr: Any) -> set[str]:
    """The operations of a code whose slope autodiff is told: "stop_gradient", which says so openly, and rules."""
    return {e.primitive.name for e in equations(jaxpr)} & {*RULES, "stop_gradient"}


def reacts(f: Callable, one: tuple, other: tuple) -> bool:
    """True if f, at other than at one, is another code or returns another tree: as at another static context.

    False if it cannot be traced at other.
    """

    def traced(at: tuple) -> Any:
        try:
            code, returned = jax.make_jaxpr(f, return_shape=True)(*at)
        except Exception:
            return None
        return str(code), jax.tree.structure(returned)

    return (there := traced(other)) is not None and traced(one) != there
