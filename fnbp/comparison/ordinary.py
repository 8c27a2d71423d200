"""What rounding of ordinary accuracy makes of a gradient: so large an error is no fault in a narrow dtype."""

from typing import Any

import jax
import numpy as np

from fnbp.comparison.evaluation import RefusedError
from fnbp.comparison.leaf import Sight
from fnbp.comparison.numerics import arithmetic, as_jax, is_inexact, relative, roundoff
from fnbp.comparison.rounding import shaken
from fnbp.comparison.subject import flatten

SUMS = {
    "dot_general",
    "reduce_sum",
    "cumsum",
    "conv_general_dilated",
}  # their results are rounded, whoever computes them
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
SEEDS = 2


def allowed_by_inputs(at: Sight) -> float:
    """How far the right gradient moves, relatively, as each number of args and dy moves by one rounding; 0 if the
    subject refuses such points."""
    unit = 2 * roundoff(at.values.mw.dtype)
    try:
        moved = [at.evaluator.evaluate(shaken(at.probe, unit, seed), np.float64).automatic for seed in range(SEEDS)]
    except RefusedError:
        return 0.0
    found = [relative(at.seen(gradients), at.a) for gradients in moved]
    return max(found) if np.isfinite(found).all() else 0.0


def allowed_by_sums(at: Sight) -> float:
    """How far the manual gradient moves, relatively, as each sum in its code is rounded once, computed in float64.

    A published formula may subtract two sums that are equal where autodiff cancels in another order.
    """
    unit, subject = 2 * roundoff(at.values.mw.dtype), at.evaluator.subject
    try:
        with arithmetic(np.float64):
            args, fixed, dy = as_jax(at.probe.of(np.float64))
            names = lambda args, fixed, dy: flatten(subject, args, subject.manual(args, fixed, dy))[0]  # noqa: E731
            code, shape = jax.make_jaxpr(names, return_shape=True)(args, fixed, dy)
            found = []
            for seed in range(SEEDS):
                flat = rounded(
                    code.jaxpr, code.consts, jax.tree.leaves((args, fixed, dy)), unit, np.random.default_rng(seed)
                )
                gradients = jax.tree.unflatten(jax.tree.structure(shape), flat)
                found.append(relative(at.seen({name: np.asarray(d) for name, d in gradients.items()}), at.m))
            size = np.linalg.norm(at.m) / np.linalg.norm(at.a)
        return max(found) * size if np.isfinite(found).all() else 0.0
    except Exception:  # it cannot be traced, or holds what cannot be run step by step
        return 0.0


def rounded(jaxpr: Any, consts: Any, args: list[Any], unit: float, rng: np.random.Generator) -> list[Any]:
    """Run a code step by step, and move the result of each sum by at most unit of itself."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(v: Any) -> Any:
        return v.val if hasattr(v, "val") else known[v]

    for equation in jaxpr.eqns:
        inputs, inside = (
            [value(v) for v in equation.invars],
            equation.params.get("jaxpr") or equation.params.get("call_jaxpr"),
        )
        if equation.primitive.name in CALLS and hasattr(inside, "consts"):
            outputs = rounded(inside.jaxpr, inside.consts, inputs, unit, rng)
        else:
            made = equation.primitive.bind(*inputs, **equation.params)
            outputs = list(made) if equation.primitive.multiple_results else [made]
        if equation.primitive.name in SUMS:
            outputs = [y * (1 + unit * rng.uniform(-1, 1, y.shape)) if is_inexact(y) else y for y in outputs]
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [value(v) for v in jaxpr.outvars]
