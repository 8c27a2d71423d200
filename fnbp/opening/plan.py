"""What is to be done at which step of a program: where a tap is added, and what a factor needs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from fnbp.opening.liveness import live_values, operands_live
from fnbp.opening.meetings import REFUSED, Use, use_of
from fnbp.opening.program import Loop, Program, Step, Value, has_rule


@dataclass(eq=False)
class Plan:
    """The steps of a program, and of the bodies of its loops, that matter to the gradient of a parameter.

    paths   of the parameters, the first inputs of the program
    live    the values by which the outputs are differentiated
    taps    of the steps where a parameter meets data: which of the results get a tap
    uses    of the same steps: how each such operand is used
    makers  the steps that derive live values from parameters, by what they make
    each, known  of each program: the values that factors need, those of every example and the others
    rules   True if there is a derivative of a user's own, which need not be linear in the error
    """

    program: Program
    paths: list[str]
    live: set[Value]
    taps: dict[Step, list[int]] = field(default_factory=dict)
    uses: dict[Step, list[Use]] = field(default_factory=dict)
    makers: dict[Value, Step] = field(default_factory=dict)
    each: dict[Program, dict[Value, None]] = field(default_factory=dict)
    known: dict[Program, dict[Value, None]] = field(default_factory=dict)
    rules: bool = False

    @cached_property
    def outer(self) -> dict[Value, Value]:
        """Of what enters the bodies of loops: what it is outside."""
        return {
            inner: one
            for loop in all_loops(self.program)
            for inner, one in zip(loop.body.inputs, (*loop.starts, *loop.each), strict=True)
        }

    def behind(self, value: Value) -> str:
        """The paths of the parameters that a value is, or is derived from."""
        inputs = dict(zip(self.program.inputs, self.paths, strict=False))
        found: dict[str, None] = {}
        seen: set[Value] = set()

        def visit(value: Value) -> None:
            if value in seen:
                return
            seen.add(value)
            if value in inputs:
                found[inputs[value]] = None
            elif value in self.outer:
                visit(self.outer[value])
            elif value in self.makers:
                for operand in self.makers[value].operands:
                    visit(operand)

        visit(value)
        return ", ".join(found)

    def keep(self, value: Value) -> None:
        """Have a value kept by the program that makes it."""
        if value.home is None:
            return
        kept = self.each if value.kind == "data" else self.known
        kept.setdefault(value.home, {})[value] = None

    def wanted(self, step: Step | Loop) -> list[int]:
        """The operands of a step, not of a loop, by which its live results are differentiated; each once."""
        if isinstance(step, Loop):
            return []
        results = [value in self.live for value in step.results]
        needed = operands_live(step.name, step.params, results, len(step.operands))
        first: dict[Value, int] = {}
        for i, (value, yes) in enumerate(zip(step.operands, needed, strict=True)):
            if yes and value.kind == "param" and value in self.live:
                first.setdefault(value, i)
        return list(first.values())


def plan_of(program: Program, outputs: list[Value], name: str, paths: list[str]) -> Plan:
    """The plan for these outputs of a program. TypeError, by its place, if a step has no derivative."""
    plan = Plan(program, paths, live_values(program, outputs))
    steps = [step for step in all_steps(program) if any(value in plan.live for value in step.results)]
    for step in steps:
        own = plan.wanted(step)
        plan.rules = plan.rules or has_rule(step.name, step.params)
        if own:
            check_derivative(name, plan, step, own)
        if own and all(value.kind != "data" for value in step.results):
            plan.makers.update((value, step) for value in step.results if value in plan.live)
            for value in step.operands:
                plan.keep(value)
    for step in steps:
        own = plan.wanted(step)
        if own and any(value.kind == "data" for value in step.results):
            plan.taps[step] = [j for j, value in enumerate(step.results) if value in plan.live]
            plan.uses[step] = [use_of(step, i, plan.taps[step], plan.makers) for i in own]
            for use in plan.uses[step]:
                for value in use.needs:
                    plan.keep(value)
    return plan


def all_loops(program: Program) -> Iterator[Loop]:
    """The loops of a program, and those within them."""
    for step in program.steps:
        if isinstance(step, Loop):
            yield step
            yield from all_loops(step.body)


def all_steps(program: Program) -> Iterator[Step]:
    """The steps of a program and of all its loops, in order."""
    for step in program.steps:
        if isinstance(step, Loop):
            yield from all_steps(step.body)
        else:
            yield step


def check_derivative(name: str, plan: Plan, step: Step, own: list[int]) -> None:
    """TypeError if a parameter goes into a step by which nothing can be differentiated backwards, or none knows how."""
    if step.name not in REFUSED and not step.params.get("symbolic_zeros"):
        return
    path = ", ".join(plan.behind(step.operands[i]) for i in own)
    if step.name in REFUSED:
        raise TypeError(
            f"{name}: {path} goes into {step.name} at {step.place}, and JAX has no reverse derivative of it; "
            "use lax.scan, or lax.stop_gradient on what goes in"
        )
    raise TypeError(
        f"{name}: {path} goes into {step.name} with symbolic_zeros=True at {step.place}, and its rule depends on what "
        "else is differentiated; open the loss of a model without it"
    )
