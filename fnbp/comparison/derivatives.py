"""More of a manual backward than its values: its own derivative, its cotangents one by one, and a rule forwards."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fnbp.comparison.differences import floating_names, slopes_of
from fnbp.comparison.evaluation import Evaluator
from fnbp.comparison.leaf import Leaf, worst_spot
from fnbp.comparison.numerics import arithmetic, as_jax, first_line, is_complex, is_inexact, real_pairs, relative, rms
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.subject import flatten

Leaves = Mapping[str, Leaf]
Outcome = tuple[list[Row], str]
STEPS = (2.0**-12, 2.0**-14, 2.0**-16)
ROOM = 1e-5  # differences of a right derivative agree to about 1e-8, beside no kink


def fixed_in_turn(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Mapping[str, Any]) -> Outcome:
    """A custom_vjp differentiated by one argument alone, the others fixed: its rule must not need them all."""
    subject = evaluator.subject
    args, fixed, dy = as_jax((probes[0].args, probes[0].fixed, probes[0].dy))
    if subject.forward is subject.reference or len(args) < 2:
        return [], ""
    rows = []
    for i, arg in enumerate(args):
        if not any(map(is_inexact, jax.tree.leaves(arg))):
            continue
        evaluator.count(manual=1)
        others = [None] * len(args)
        alone = lambda a, i=i: subject.forward((*args[:i], a, *args[i + 1 :]), fixed)  # noqa: E731
        try:
            (d,) = jax.vjp(alone, arg)[1](dy)
            found, _ = flatten(subject, args, (*others[:i], d, *others[i + 1 :]))
        except Exception as error:
            hint = f"with the other arguments fixed it raises {type(error).__name__}: {first_line(error)}"
            return [leaf.row("one_argument", hint=hint) for leaf in leaves.values()], "WRONG"
        prefix = subject.names[i]
        for name, leaf in leaves.items():
            if name.split(".")[0] == prefix:
                m, right = (np.asarray(side[name], np.float64) for side in (found, expected))
                if relative(m, right) > leaf.leeway:
                    hint = f"with the other arguments fixed it differs by {relative(m, right):.1e}"
                    rows.append(leaf.row("one_argument", hint=hint, **worst_spot(m, right)))
    return rows, "WRONG" if rows else "ok"


def second_order(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Mapping[str, Any]) -> Outcome:
    """The derivative of the manual backward in args and in dy, by jax.jvp, beside differences of it, in float64."""
    subject, rng = evaluator.subject, np.random.default_rng(0)
    with arithmetic(np.float64):
        args, fixed, dy = probes[0].of(np.float64)
        flat, tree = jax.tree.flatten((args, dy))
        moving = [np.asarray(a) for a in flat if is_inexact(a)]
        direction = [rng.standard_normal(a.shape) * (rms(a) or 1.0) for a in moving]

        def gradients(leaves):
            left = iter(leaves)
            here, d = jax.tree.unflatten(tree, [next(left) if is_inexact(a) else a for a in flat])
            return flatten(subject, here, subject.manual(here, fixed, d))[0]

        evaluator.count(manual=2 * len(STEPS) + 1)
        try:
            along = [v.astype(a.dtype) for a, v in zip(moving, direction, strict=True)]
            _, derivative = jax.jvp(gradients, (list(map(as_jax, moving)),), (list(map(as_jax, along)),))
            if any(map(is_complex, moving)):
                return [], "not tried: complex arguments"
            sides = {
                h: [gradients([a + s * h * v for a, v in zip(moving, direction, strict=True)]) for s in (1, -1)]
                for h in STEPS
            }
        except Exception as error:
            return [], f"not possible: {type(error).__name__}: {first_line(error)}"
    rows = []
    for name, leaf in leaves.items():
        claimed = np.asarray(derivative[name], np.float64)
        found = [(np.asarray(up[name]) - np.asarray(down[name])) / (2 * h) for h, (up, down) in sides.items()]
        size = max(np.linalg.norm(claimed), np.linalg.norm(found[1]), np.finfo(np.float64).tiny)
        steady = np.linalg.norm(found[1] - found[2]) <= ROOM * size
        apart = np.linalg.norm(found[1] - claimed)
        if steady and apart > 10 * ROOM * size and size > 1e-12:
            hint = "its own derivative, as jax.hvp takes it, is not that of the gradient it returns"
            rows.append(leaf.row("second_order", hint=hint, **worst_spot(claimed, found[1])))
    return rows, "WRONG" if rows else "ok"


def forwards(evaluator: Evaluator, probes: list[Probe], leaves: Leaves, expected: Mapping[str, Any]) -> Outcome:
    """A custom_jvp forwards: jax.jvp of it beside the automatic gradient, along one direction, in float64.

    sum of dy . jvp(v)  =  sum of v . automatic
    """
    subject, rng = evaluator.subject, np.random.default_rng(0)
    if subject.forward is subject.reference or not leaves:
        return [], ""
    with arithmetic(np.float64):
        args, fixed, dy = probes[0].of(np.float64)
        flat, tree = jax.tree.flatten(args)
        drawn = [tangent_of(a, rng) for a in flat]
        try:
            _, tangent = jax.jvp(lambda *args: subject.forward(args, fixed), args, jax.tree.unflatten(tree, drawn))
        except TypeError:  # a custom_vjp has no way forwards
            return [], ""
        except Exception as error:
            return [], f"not possible: {type(error).__name__}: {first_line(error)}"
    evaluator.count(manual=1)
    pairs = zip(jax.tree.leaves(tangent), jax.tree.leaves(dy), strict=True)
    claimed = sum(float(np.sum(np.real(np.asarray(t) * d))) for t, d in pairs if is_inexact(t))
    automatic = slopes_of(subject, evaluator.at(probes[0], np.float64).automatic)
    moved = [real_pairs(v) for v in drawn if is_inexact(v)]
    terms = [automatic[name] * v for name, v in zip(floating_names(subject), moved, strict=True)]
    right, size = float(sum(np.sum(t) for t in terms)), float(sum(np.sum(abs(t)) for t in terms))
    if abs(claimed - right) <= max(1e-9, *(leaf.limit for leaf in leaves.values())) * size:
        return [], "ok"
    hint = f"forwards its rule gives {claimed:.6g} along a direction, where the gradient gives {right:.6g}"
    return [leaf.row("forwards", hint=hint) for leaf in list(leaves.values())[:1]], "WRONG"


def tangent_of(a: Any, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian tangent of an array, or JAX's zeros without a dtype for integers."""
    if not is_inexact(a):
        return np.zeros(np.shape(a), jax.dtypes.float0)
    return rng.standard_normal(a.shape).astype(a.dtype)
