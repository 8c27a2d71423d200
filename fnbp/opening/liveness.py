"""Which values the outputs of a program depend on by a derivative: what is not live gets no tap."""

from typing import Any

from jax.extend import core

from fnbp.opening.program import FLAT, INLINED, Loop, Program, Value, inner_of, opened_up, sizes_of


def live_values(program: Program, outputs: list[Value]) -> set[Value]:
    """The values by which these outputs of a program are differentiated."""
    live = {value for value in outputs if value.differentiable}
    mark(program, live)
    return live


def mark(program: Program, live: set[Value]) -> None:
    """Add what makes live values, last step first."""
    for step in reversed(program.steps):
        if isinstance(step, Loop):
            mark_loop(step, live)
        elif step.name not in FLAT:
            wanted = [value in live for value in step.results]
            if any(wanted):
                needed = operands_live(step.name, step.params, wanted, len(step.operands))
                live.update(v for v, yes in zip(step.operands, needed, strict=True) if yes and v.differentiable)


def mark_loop(loop: Loop, live: set[Value]) -> None:
    """The same for a loop: what is carried into a turn is live if a later turn needs it."""
    carried = len(loop.starts)
    live.update(inner for inner, outer in zip(loop.body.outputs, loop.results, strict=True) if outer in live)
    before = -1
    while before != len(live):
        before = len(live)
        mark(loop.body, live)
        for entering, leaving in zip(loop.body.inputs[:carried], loop.body.outputs[:carried], strict=True):
            if entering in live and leaving.differentiable:
                live.add(leaving)
    for inner, outer in zip(loop.body.inputs, (*loop.starts, *loop.each), strict=True):
        if inner in live:
            live.add(outer)


# --- within calls that stay closed ---


def operands_live(name: str, params: dict[str, Any], wanted: list[bool], many: int) -> list[bool]:
    """Which operands of an equation are needed for the derivatives of the wanted results: all, but for calls."""
    if name in FLAT:
        return [False] * many
    if name in INLINED:
        return inputs_live(inner_of(params)[0], wanted)
    if name == "scan":
        return turns_live(inner_of(params)[0], sizes_of(params), wanted)
    if name == "while":  # its condition has no derivative
        needed = turns_live(opened_up(params["body_jaxpr"])[0], (params["body_nconsts"], len(wanted)), wanted)
        return [False] * params["cond_nconsts"] + needed
    if name == "cond":  # its index has no derivative
        branches = (inputs_live(opened_up(jaxpr)[0], wanted) for jaxpr in params["branches"])
        return [False, *map(any, zip(*branches, strict=True))]
    return [True] * many


def inputs_live(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs of a jaxpr are needed for the derivatives of the wanted outputs."""
    live = {v for v, yes in zip(jaxpr.outvars, wanted, strict=True) if yes and isinstance(v, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs):
            needed = operands_live(eqn.primitive.name, eqn.params, outs, len(eqn.invars))
            live.update(v for v, yes in zip(eqn.invars, needed, strict=True) if yes and isinstance(v, core.Var))
    return [v in live for v in jaxpr.invars]


def turns_live(jaxpr: Any, sizes: tuple[int, int], wanted: list[bool]) -> list[bool]:
    """The same of the body of a loop. sizes: how many inputs are the same in every turn, and how many are carried."""
    many, carried = sizes
    wanted = list(wanted)
    while True:
        needed = inputs_live(jaxpr, wanted)
        more = [yes or needed[many + i] if i < carried else yes for i, yes in enumerate(wanted)]
        if more == wanted:
            return needed
        wanted = more
