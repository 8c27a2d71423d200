"""A function of one example as a list of steps, and what each value depends on.

    known   on no example, and nothing is differentiated by it: constants, what is behind stop_gradient, integers
    param   on no example, but on parameters: a parameter, or what is derived from some
    data    on the example; within a loop on the turn, too

The body of a loop names values of the programs around it as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, eval_jaxpr
from jax.extend import core

Kind = Literal["known", "param", "data"]

INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
FLAT = ("stop_gradient", "floor", "ceil", "round", "sign", "is_finite", "nextafter")  # of derivative 0 everywhere
LIBRARIES = ("jax", "flax", "equinox", "haiku", "optax", "jaxtyping")


@dataclass(eq=False)
class Value:
    """One array of a program.

    home  the program that makes it; None for a constant, which is const
    """

    aval: Any
    kind: Kind
    home: "Program | None" = None
    const: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape for one example."""
        return self.aval.shape

    @property
    def differentiable(self) -> bool:
        """True if a derivative by it can be other than 0: floating-point and complex arrays."""
        return isinstance(self.aval, ShapedArray) and jnp.issubdtype(self.aval.dtype, jnp.inexact)


@dataclass(frozen=True)
class Place:
    """Where a step stands: the path of its module, by JAX's name stack, and file:line of the caller."""

    path: str
    line: str

    def __str__(self) -> str:
        return f"{self.line} ({self.path})" if self.path else self.line


@dataclass(eq=False)
class Step:
    """One equation: results = run(*operands)."""

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    run: Callable[..., Sequence[Any]]
    place: Place
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Loop:
    """lax.scan: a body that is run turn by turn.

    starts    the first values of what is carried        each   arrays of which every turn sees one entry
    results   the last of what is carried, then one entry of every turn
    """

    body: "Program"
    starts: tuple[Value, ...]
    each: tuple[Value, ...]
    results: tuple[Value, ...]
    place: Place
    length: int
    options: dict[str, Any]


@dataclass(eq=False)
class Program:
    """Steps in order; inputs, and what leaves it. Of a loop: what is carried, then what each turn sees."""

    around: "Program | None"
    inputs: list[Value] = field(default_factory=list)
    steps: list[Step | Loop] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """How many loops are around it."""
        return 0 if self.around is None else 1 + self.around.depth


def read(f: Callable[..., list[Any]], kinds: list[Kind], avals: list[Any], name: str) -> Program:
    """The program of f, a function of arrays to a list of arrays, traced with shapes only. kinds: of its arguments.

    What leaves it, and depends on no example, leaves it by a step of its own, named "identity".

    Raises: TypeError if f writes into a jax.Ref what a parameter may have to do with, or, as a hint, if Flax refuses to
            change its variables in the trace.
    """
    try:
        jaxpr = jax.make_jaxpr(f)(*avals)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":
            raise
        raise TypeError(
            f"{name}: Flax does not change variables of another trace: {error}; merge a copy of them: "
            "nnx.merge(graphdef, params, copy=True)"
        ) from error
    program = Program(None)
    program.inputs = [Value(v.aval, kind, program) for v, kind in zip(jaxpr.jaxpr.invars, kinds, strict=True)]
    outputs = read_equations(program, jaxpr.jaxpr, jaxpr.consts, program.inputs, "")
    program.outputs = [as_data(program, value, Place("", "what the function returns")) for value in outputs]
    return program


def read_equations(
    program: Program, jaxpr: Any, consts: Any, inputs: Sequence[Value], path: str, line: str | None = None
) -> list[Value]:
    """Append the steps of a jaxpr to a program, those of inner calls too. Returns: what the jaxpr returns.

    path: of the module around it. line: where a function of a library was called, in which no line is of interest.
    """
    known: dict[Any, Value] = {v: constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def value_of(atom: Any) -> Value:
        return constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(map(value_of, eqn.invars))
        place = Place(joined(path, str(eqn.source_info.name_stack)), line_of(eqn) if line is None else line)
        if eqn.primitive.name in INLINED and any(value.kind == "param" for value in operands):
            jaxpr_inside, more = inner_of(eqn.params)
            at = place.line if line is None and library_of(source_of(jaxpr_inside)) else line
            results = read_equations(program, jaxpr_inside, more, operands, place.path, at)
        elif eqn.primitive.name == "scan" and {"param", "data"} <= {value.kind for value in operands}:
            results = read_loop(program, eqn, operands, place, line)
        else:
            results = append(program, eqn, operands, place)
        known.update((v, value) for v, value in zip(eqn.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def append(program: Program, eqn: Any, operands: tuple[Value, ...], place: Place) -> list[Value]:
    """Append the step of an equation: to the program, or, if all turns have the same, in front of the loop; but a rule
    of a user's own, which need not be linear, sees the error of each turn."""
    name = eqn.primitive.name
    kinds = {value.kind for value in operands}
    stays = eqn.effects or ("param" in kinds and has_rule(name, eqn.params))
    while program.around is not None and not stays and all(outside(program, value) for value in operands):
        program = program.around
    kind: Kind = "data" if "data" in kinds else "param" if "param" in kinds and name not in FLAT else "known"
    check_arrays(name, place, operands, eqn.outvars)
    results = []
    for v in eqn.outvars:
        value = Value(v.aval, kind, program)
        if kind == "param" and not value.differentiable:
            value.kind = "known"
        results.append(value)
    program.steps.append(Step(name, operands, tuple(results), alone(eqn), place, eqn.params))
    return results


def check_arrays(name: str, place: Place, operands: Sequence[Value], results: Any) -> None:
    """TypeError if an equation writes into a jax.Ref, or reads one: what depends on it is not seen."""
    if not all(isinstance(one.aval, ShapedArray) for one in (*operands, *results)):
        raise TypeError(
            f"opened: {name} at {place} works on a jax.Ref, and what is read from it may depend on parameters; "
            "write the loss without it"
        )


def outside(program: Program, value: Value) -> bool:
    """True if a value depends neither on the example nor on the turn of the loop that program is the body of."""
    return value.kind != "data" and value.home is not program


def as_data(program: Program, value: Value, place: Place) -> Value:
    """The value, or, if it depends on no example, what a step named "identity" makes of it."""
    if value.kind == "data":
        return value
    made = Value(value.aval, "data", program)
    program.steps.append(Step("identity", (value,), (made,), lambda a: [a], place))
    return made


def read_loop(program: Program, eqn: Any, operands: tuple[Value, ...], place: Place, line: str | None) -> list[Value]:
    """Append a loop. What is carried and never changes is no part of it; what else is carried, or depends on the turn,
    is data in the body, and a parameter that is carried becomes so in front of the loop."""
    jaxpr, consts = inner_of(eqn.params)
    many, carried = sizes_of(eqn.params)
    fixed, starts, each = operands[:many], list(operands[many : many + carried]), operands[many + carried :]
    same = [jaxpr.outvars[i] is jaxpr.invars[many + i] for i in range(carried)]
    starts = [start if same[i] else as_data(program, start, place) for i, start in enumerate(starts)]
    body = Program(program)
    turning = [Value(start.aval, "data", body) for i, start in enumerate(starts) if not same[i]]
    seen = [Value(v.aval, "param" if value.kind == "param" else "data", body)
            for v, value in zip(jaxpr.invars[many + carried :], each, strict=True)]  # fmt: skip
    body.inputs = [*turning, *seen]
    rest = iter(turning)
    inside = [*fixed, *(start if same[i] else next(rest) for i, start in enumerate(starts)), *seen]
    outputs = read_equations(body, jaxpr, consts, inside, place.path, line)
    moving = [value for i, value in enumerate(outputs) if i >= carried or not same[i]]
    body.outputs = [as_data(body, value, place) for value in moving]
    results = iter([Value(v.aval, "data", program)
                    for i, v in enumerate(eqn.outvars) if i >= carried or not same[i]])  # fmt: skip
    made = [starts[i] if i < carried and same[i] else next(results) for i in range(len(eqn.outvars))]
    own = tuple(value for i, value in enumerate(made) if i >= carried or not same[i])
    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    changing = tuple(start for i, start in enumerate(starts) if not same[i])
    program.steps.append(Loop(body, changing, tuple(each), own, place, eqn.params["length"], options))
    return made


def inside_out(program: Program) -> Iterator[Program]:
    """The bodies of all loops of a program, and itself."""
    for step in program.steps:
        if isinstance(step, Loop):
            yield from inside_out(step.body)
    yield program


# --- what JAX keeps in a jaxpr ---


def constant(value: Any) -> Value:
    """A constant as a value."""
    with jax.ensure_compile_time_eval():  # an array, not a tracer that a rule of a user's own could hold on to
        const = jnp.asarray(value) if isinstance(value, np.ndarray) else value
    return Value(jax.typeof(const), "known", const=const)


def has_rule(name: str, params: dict[str, Any]) -> bool:
    """True if an equation, or one within it, has a reverse derivative of a user's own."""
    inside = (eqn for jaxpr in core.jaxprs_in_params(params) for eqn in jaxpr.eqns)
    return name.startswith("custom_vjp") or any(has_rule(eqn.primitive.name, eqn.params) for eqn in inside)


def inner_of(params: dict[str, Any]) -> tuple[Any, Any]:
    """The jaxpr among the parameters of an equation that calls it, and its constants."""
    return opened_up(next(value for value in params.values() if isinstance(value, (core.Jaxpr, core.ClosedJaxpr))))


def opened_up(jaxpr: Any) -> tuple[Any, Any]:
    """A jaxpr, closed or not, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())


def sizes_of(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are the same in every turn, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    fixed, carried, _ = params["ft_in"].unpack()
    return len(fixed), len(carried)


def alone(eqn: Any) -> Callable[..., Sequence[Any]]:
    """The function of one equation: by a jaxpr that has no other, so that rules of a user's own stay in force."""
    wanted = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    inputs = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
    names = [("",) * len(values) for values in (inputs, wanted)]
    about = core.DebugInfo("opened", eqn.primitive.name, *names)
    mesh = jax.sharding.get_abstract_mesh()

    def jaxpr() -> core.Jaxpr:
        own = eqn
        if jax.sharding.get_abstract_mesh() != mesh:  # where Explicit axes have become Auto ones
            own = core.new_jaxpr_eqn(eqn.invars, eqn.outvars, eqn.primitive, eqn.params, eqn.effects, eqn.source_info)
        return core.Jaxpr((), inputs, wanted, [own], own.effects, about)

    def run(*operands: Any) -> Sequence[Any]:
        given = {v: a for v, a in zip(eqn.invars, operands, strict=True) if isinstance(v, core.Var)}
        made = iter(eval_jaxpr(jaxpr(), (), *(given[v] for v in inputs)))
        return [None if isinstance(v, core.DropVar) else next(made) for v in eqn.outvars]

    return run


def joined(path: str, more: str) -> str:
    """Two name stacks as one."""
    return "/".join(part for part in (path, more) if part)


def source_of(jaxpr: Any) -> str:
    """The file of the function that a jaxpr was traced from."""
    return getattr(getattr(jaxpr, "debug_info", None), "func_filename", None) or ""


def line_of(eqn: Any) -> str:
    """file:line of the innermost caller that is neither in JAX nor in a library of layers."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback is not None else []
    own = [frame for frame in frames if not library_of(frame.file_name)]
    frame = next(iter(own or frames), None)
    return f"{frame.file_name}:{frame.line_num}" if frame is not None else "unknown place"


def library_of(name: str) -> bool:
    """True for a file of JAX or of a library of layers."""
    parts = Path(name).parts
    return "site-packages" in parts and parts[parts.index("site-packages") + 1] in LIBRARIES
