"""The forward with taps, and the factors that their cotangents give.

A tap is a zero that is added to what a step returns where a parameter meets data. One vjp by the taps alone gives the
error there for every example, and forms no gradient of a parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnbp.combinators.factors import Stacked
from fnbp.factor import Factor
from fnbp.opening.factors import Through, Together, over_turns
from fnbp.opening.plan import Plan
from fnbp.opening.program import Loop, Program, Step, Value, has_rule
from fnbp.opening.pulls import pulled

Arrays = dict[Value, Any]


class Record(NamedTuple):
    """What a program keeps of a run: values of every example, the others, and the records of its loops."""

    each: Any
    known: Any
    loops: Any


# --- forward ---


def taps_of(plan: Plan, program: Program, front: tuple[int, ...]) -> list[Any]:
    """A zero for every result that gets a tap; front: the axes in front, of examples and turns. -0.0, since that
    changes no sign."""

    def zero(value: Value) -> jax.Array:
        return jnp.full((*front, *value.shape), -0.0, value.aval.dtype)

    taps = []
    for step in program.steps:
        if isinstance(step, Loop):
            taps.append(taps_of(plan, step.body, (*front, step.length)))
        elif step in plan.taps:
            taps.append(tuple(zero(step.results[j]) for j in plan.taps[step]))
    return taps


def run(plan: Plan, program: Program, arrays: Arrays, taps: list[Any]) -> tuple[list[Any], Record]:
    """Run a program for one example. arrays: of its inputs, and of the programs around it."""
    arrays, rest, loops = dict(arrays), iter(taps), []
    for step in program.steps:
        if isinstance(step, Loop):
            made, record = run_loop(plan, step, arrays, next(rest))
            loops.append(record)
        else:
            made = list(run_step(plan, step, [at(arrays, value) for value in step.operands]))
            for j, tap in zip(plan.taps.get(step, ()), next(rest) if step in plan.taps else (), strict=True):
                made[j] = made[j] + tap
        arrays.update(zip(step.results, made, strict=True))
    kept = [[arrays[value] for value in of.get(program, ())] for of in (plan.each, plan.known)]
    return [at(arrays, value) for value in program.outputs], Record(kept[0], kept[1], loops)


def run_step(plan: Plan, step: Step, operands: list[Any]) -> Any:
    """The results of a step. TypeError, by its parameters and its place, if JAX does not map it over examples."""
    try:
        return step.run(*operands)
    except RuntimeError as error:  # of a primitive that JAX cannot map, or of the device
        if step not in plan.uses or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        names = ", ".join(plan.behind(use.of) for use in plan.uses[step])
        raise TypeError(f"opened: {names} goes into {step.name} at {step.place}: {error}") from error


def run_loop(plan: Plan, loop: Loop, arrays: Arrays, taps: list[Any]) -> tuple[list[Any], Record]:
    """Run a loop turn by turn."""
    many = len(loop.starts)

    def turn(carried, given):
        each, taps = given
        inside = {**arrays, **dict(zip(loop.body.inputs, (*carried, *each), strict=True))}
        made, record = run(plan, loop.body, inside, taps)
        return made[:many], (made[many:], record)

    starts, each = ([at(arrays, value) for value in values] for values in (loop.starts, loop.each))
    last, (rows, record) = lax.scan(turn, starts, (each, taps), loop.length, **loop.options)
    return [*last, *rows], record


def at(arrays: Arrays, value: Value) -> Any:
    """The array of a value."""
    return arrays[value] if value.const is None else value.const


def axes_of(program: Program, each: Any, known: Any) -> Record:
    """A number for all values of every example, and one for the others, in the form of a record."""
    loops = [axes_of(step.body, each, known) for step in program.steps if isinstance(step, Loop)]
    return Record(each, known, loops)


def for_all(plan: Plan, axes: list[int | None], many: int) -> Callable[..., Any]:
    """(taps, inputs) -> outputs, record: run for all examples. axes: 0 for the inputs that have one an example."""

    def of_one(taps, inputs):
        return run(plan, plan.program, dict(zip(plan.program.inputs, inputs, strict=True)), taps)

    return jax.vmap(of_one, (0, axes), (0, axes_of(plan.program, 0, None)), axis_size=many)


# --- backward ---


def factors_of(plan: Plan, program: Program, deltas: list[Any], record: Record, arrays: Arrays) -> dict[Value, Factor]:
    """The factor of every input of a program, and of every value around it, that its outputs depend on.

    deltas: the cotangents of the taps, for all examples.
    """
    arrays = arrays | dict(zip(plan.each.get(program, ()), record.each, strict=True))
    arrays = arrays | dict(zip(plan.known.get(program, ()), record.known, strict=True))
    found: dict[Value, Factor] = {}

    def add(value: Value, factor: Factor) -> None:
        found[value] = found[value] + factor if value in found else factor

    tapped = [step for step in program.steps if isinstance(step, Loop) or step in plan.taps]
    of_step = dict(zip(tapped, deltas, strict=True))
    of_loop = dict(zip((step for step in tapped if isinstance(step, Loop)), record.loops, strict=True))
    for step in reversed(program.steps):
        if isinstance(step, Loop):
            for value, factor in factors_of_loop(plan, step, of_step[step], of_loop[step], arrays).items():
                add(value, factor)
        elif step in plan.uses:
            for use in plan.uses[step]:
                add(use.of, use.make(of_step[step], *(at(arrays, value) for value in use.needs)))
        else:
            behind = {j: found.pop(value) for j, value in enumerate(step.results) if value in found}
            behind = {j: factor for j, factor in behind.items() if step.results[j] in plan.makers}
            for results, factor in apart(step, behind):
                for source, own in factors_behind(plan, step, results, factor, arrays):
                    add(source, own)
    return found


def apart(step: Step, behind: dict[int, Factor]) -> list[tuple[list[int], Factor]]:
    """The factors of the results of a step that go back by themselves: each, but all at once through a rule of a
    user's own, which need not be linear."""
    if len(behind) > 1 and has_rule(step.name, step.params):
        return [([*behind], Together(tuple(behind.values())))]
    return [([j], factor) for j, factor in behind.items()]


def factors_behind(
    plan: Plan, step: Step, results: list[int], factor: Factor, arrays: Arrays
) -> list[tuple[Value, Factor]]:
    """The factors of what results are derived from: of the operands where they have a form of their own, else of the
    parameters that these operands are derived from."""
    found, rest = [], []
    values = tuple(at(arrays, value) for value in step.operands)
    for i in plan.wanted(step):
        own = pulled(step, i, results[0], factor, values) if len(results) == 1 else None
        if own is None:
            rest.append(step.operands[i])
        else:
            found.append((step.operands[i], own))
    if not rest:
        return found
    chain, sources = chain_to(plan, step, rest)
    read = dict.fromkeys(value for one in (*chain, step) for value in one.operands if value.const is None)
    given = [value for value in read if plan.makers.get(value) not in chain]
    fixed = [value for value in step.operands if value.const is None and value not in rest]

    def h(*known):
        env = dict(zip(given, known[: len(given)], strict=True))
        for one in chain:
            env.update(zip(one.results, one.run(*(at(env, value) for value in one.operands)), strict=True))
        env.update(zip(fixed, known[len(given) :], strict=True))
        made = step.run(*(at(env, value) for value in step.operands))
        return made[results[0]] if len(results) == 1 else tuple(made[j] for j in results)

    known = tuple(arrays[value] for value in (*given, *fixed))
    linear = not has_rule(step.name, step.params)
    return found + [(source, Through(factor, known, h, given.index(source), linear)) for source in sources]


def chain_to(plan: Plan, step: Step, values: list[Value]) -> tuple[list[Step], list[Value]]:
    """The steps by which values are derived within one program, first to last, and the live values they start from:
    parameters, what other programs make, and what a rule of a user's own makes, which sees all errors at once."""
    chain: list[Step] = []
    sources: dict[Value, None] = {}

    def visit(value: Value) -> None:
        maker = plan.makers.get(value)
        if maker is None or value.home is not step.results[0].home or has_rule(maker.name, maker.params):
            if value.kind == "param" and value in plan.live:
                sources[value] = None
        elif maker not in chain:
            for operand in maker.operands:
                visit(operand)
            chain.append(maker)

    for value in values:
        visit(value)
    return chain, list(sources)


def factors_of_loop(plan: Plan, loop: Loop, deltas: Any, record: Record, arrays: Arrays) -> dict[Value, Factor]:
    """The factors of what a loop reads: one for all turns of what is the same in each, and one for each turn of what
    each turn sees an entry of."""
    values: list[Value] = []

    def of_turn(deltas, record):
        found = factors_of(plan, loop.body, deltas, record, arrays)
        values[:] = found
        return list(found.values())

    if not jax.tree.leaves(deltas):
        return {}
    turns = jax.vmap(of_turn, (1, axes_of(loop.body, 1, 0)))(deltas, record)
    outer = dict(zip(loop.body.inputs, (*loop.starts, *loop.each), strict=True))
    found: dict[Value, Factor] = {}
    for value, factor in zip(values, turns, strict=True):
        if value in outer:
            value, factor = outer[value], Stacked(factor)
        else:
            factor = over_turns(factor)
        found[value] = found[value] + factor if value in found else factor
    return found
