"""What can be seen of an opened loss: every use of a parameter, and what comes out and is told there."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table
from rich.text import Text

from fnbp.factor import Added, Factor
from fnbp.opening.passes import Record
from fnbp.opening.plan import Plan
from fnbp.opening.program import Loop, Program, Step, Value
from fnbp.rendering.tables import Tabular

__all__ = ["ParameterUse", "Uses"]


class ParameterUse(NamedTuple):
    """One use of a parameter.

    parameter  its path, or the paths of those that the value is derived from
    module     the path of the module, by JAX's name stack; "" where there is none
    line       file:line
    primitive  the equation        rule  how the factor is made
    shape      of what comes out, for one example; the turns of loops in front
    bytes      of the factor, for the batch that was given
    """

    parameter: str
    module: str
    line: str
    primitive: str
    rule: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Uses(Tabular):
    """Every use of every parameter, in order, which prints as a table.

    rows    a ParameterUse each      factors  path -> the kind of the factor that a contraction sees
    """

    rows: tuple[ParameterUse, ...]
    factors: dict[str, str]

    def __rich__(self) -> Table:
        table = Table(title=Text("where parameters meet data"), title_justify="left")
        for head in ("parameter", "line", "equation", "factor by", "for one example", "MB"):
            table.add_column(head, justify="right" if head == "MB" else "left", overflow="fold")
        for row in self.rows:
            shape = " x ".join(map(str, row.shape)) or "()"
            cells = row.parameter, short(row.line), row.primitive, row.rule, shape, f"{row.bytes / 1e6:.3g}"
            table.add_row(*map(Text, cells))
        for path, kind in self.factors.items():
            if kind == "Nothing":
                table.add_row(Text(path), Text("never used: its gradient is 0"))
        return table


def short(line: str) -> str:
    """file:line without folders."""
    path, _, number = line.rpartition(":")
    return f"{Path(path).name}:{number}" if path else line


def uses_of(plan: Plan, factors: dict[str, Factor], m: int) -> Uses:
    """The table of a plan, for m examples. factors: of each path, or their shapes."""
    rows = []
    for step, turns in tapped_steps(plan, plan.program, ()):
        d = tuple(struct(step.results[j], m) for j in plan.taps[step])
        for use in plan.uses[step]:
            values = [struct(value, m if value.kind == "data" else None) for value in use.needs]
            size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(use.make, d, *values)))
            for one in turns:
                size *= one
            shape = (*turns, *step.results[plan.taps[step][0]].shape)
            name = plan.behind(use.of)
            rows.append(ParameterUse(name, step.place.path, step.place.line, step.name, use.rule, shape, size))
    return Uses(tuple(rows), {path: kind_of(factor) for path, factor in factors.items()})


def tapped_steps(plan: Plan, program: Program, turns: tuple[int, ...]) -> Iterator[tuple[Step, tuple[int, ...]]]:
    """The steps where a parameter meets data, each with the turns of the loops around it."""
    for step in program.steps:
        if isinstance(step, Loop):
            yield from tapped_steps(plan, step.body, (*turns, step.length))
        elif step in plan.taps:
            yield step, turns


def struct(value: Value, m: int | None) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value, for all examples if it is of one."""
    return jax.ShapeDtypeStruct(value.shape if m is None else (m, *value.shape), value.aval.dtype)


def kind_of(factor: Factor) -> str:
    """Outer, Through(Sum), Outer + Lookup: the classes of a factor."""
    if isinstance(factor, Added):
        return f"{kind_of(factor.one)} + {kind_of(factor.other)}"
    inner = getattr(factor, "factor", None)
    return type(factor).__name__ + ("" if inner is None else f"({kind_of(inner)})")


def keep_outputs(plan: Plan) -> None:
    """Have what comes out where a parameter meets data kept."""
    for step, results in plan.taps.items():
        for j in results:
            plan.keep(step.results[j])


def seen_at(plan: Plan, deltas: list[Any], record: Record) -> tuple[OrderedDict, OrderedDict]:
    """Outputs and deltas at every use, (m, *turns, ...), by module path, parameter, equation and file:line."""
    outputs: OrderedDict[str, Any] = OrderedDict()
    told: OrderedDict[str, Any] = OrderedDict()
    for step, own, values in walked(plan, plan.program, deltas, record):
        names = dict.fromkeys(plan.behind(use.of) for use in plan.uses[step])
        place = f"{step.place.path} " if step.place.path else ""
        label = unique(f"{place}{', '.join(names)} {step.name} {short(step.place.line)}", outputs)
        outputs[label], told[label] = (one[0] if len(one) == 1 else one for one in (values, own))
    return outputs, told


def walked(plan: Plan, program: Program, deltas: list[Any], record: Record) -> Iterator[tuple[Step, Any, Any]]:
    """(step, its deltas, its outputs) where a parameter meets data."""
    rest, loops = iter(deltas), iter(record.loops)
    for step in program.steps:
        if isinstance(step, Loop):
            yield from walked(plan, step.body, next(rest), next(loops))
        elif step in plan.taps:
            kept = list(plan.each[program])
            yield step, next(rest), tuple(record.each[kept.index(step.results[j])] for j in plan.taps[step])


def unique(label: str, known: Any) -> str:
    """The label, with a number behind it if there is one of that name."""
    i = 2
    name = label
    while name in known:
        name, i = f"{label} #{i}", i + 1
    return name
