"""What the programs of tests/fuzz_losses.py are made of, and how a line of one is drawn.

A program is a list of lines. A line defines one value or several, and may hold blocks: the functions of its loop, of
its branches. A Scope is where a line is drawn: it knows the values that the line may use.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests import fuzz_losses_names

LARGEST, RANK, LEAVES, ARGUMENTS = 64, 4, 6, 4

# --- values, lines, blocks ---


class Value(NamedTuple):
    """A value of a program. kind: P if it depends on params, D on the example, DP on both. tame: its numbers are
    small."""

    text: str
    shape: tuple[int, ...]
    kind: str = ""
    tame: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))


@dataclass
class Block:
    """A function within a line: its first lines, its own, and what it returns."""

    head: str
    lines: list["Line"]
    results: list[str]
    single: bool = False

    def render(self) -> list[str]:
        returned = self.results[0] if self.single else f"({''.join(f'{one}, ' for one in self.results)})"
        return [*self.head.split("\n"), *indented([*render(self.lines), f"return {returned}"])]


@dataclass
class Line:
    """A statement that defines outs, after the functions that it uses."""

    outs: list[Value]
    text: str
    blocks: list[Block] = field(default_factory=list)

    def render(self) -> list[str]:
        return [*(line for block in self.blocks for line in block.render()), self.text]


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def render(lines: Sequence[Line]) -> list[str]:
    return [text for line in lines for text in line.render()]


def names(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


@dataclass
class Program:
    """A loss, its params and its batch. leaves and arguments: name -> source. dtype: float64, float32 or mixed.
    loosest: the narrowest dtype on the way. tags: what it was drawn of."""

    lines: list[Line]
    terms: list[str]
    leaves: dict[str, str]
    arguments: dict[str, str]
    form: str = "dict"
    packed: bool = False
    dtype: str = "float64"
    loosest: str = "float64"
    second: str = "sq_norms"
    jit: bool = True
    tags: tuple[str, ...] = ()

    def source(self) -> str:
        """Python that defines params, batch and loss."""
        read, made = {
            "dict": (", ".join(f'p["{name}"]' for name in self.leaves), "{%s}"),
            "tuple": ("p", "(%s,)"),
            "nested": (", ".join(f'p["a"][{i}]["b"]' for i in range(len(self.leaves))), '{"a": [%s]}'),
            "bare": ("p", "%s"),
        }[self.form]
        item = {"dict": '"{0}": {1}', "nested": '{{"b": {1}}}'}.get(self.form, "{1}")
        params = made % ", ".join(item.format(*one) for one in self.leaves.items())
        left = ", ".join(self.leaves) + ("," if self.form == "tuple" else "")
        body = [f"{left} = {read}"] if self.leaves else []
        given = list(self.arguments)
        if self.packed:
            body += [f"{', '.join(given)}, = {', '.join(f'd[{name!r}]' for name in given)},"]
            batch = f"({{{', '.join(f'{name!r}: {text}' for name, text in self.arguments.items())}}},)"
        else:
            batch = f"({''.join(f'{text}, ' for text in self.arguments.values())})"
        body += [*render(self.lines), f"return {' + '.join(self.terms)}"]
        head = f"def loss(p, {'d' if self.packed else ', '.join(given)}):"
        return "\n".join([f"params = {params}", f"batch = {batch}", "", head, *indented(body), ""])

    def script(self) -> str:
        """The same, to be run alone."""
        x64 = [] if self.dtype != "float64" else ['jax.config.update("jax_enable_x64", True)']
        return "\n".join(["from tests.fuzz_losses_names import *", *x64, "", self.source()])

    def run(self) -> dict[str, Any]:
        """params, batch and loss."""
        space = dict(vars(fuzz_losses_names))
        exec(self.source(), space)
        return {name: space[name] for name in ("params", "batch", "loss")}


# --- drawing ---


@dataclass
class Root:
    """What all scopes of a program share."""

    rng: np.random.Generator
    dtype: str = "float64"
    loosest: str = "float64"
    m: int = 3
    count: int = 0
    leaves: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    ints: list[tuple[Value, int]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)


class Scope:
    """Where a line is drawn. own: the values of this block; outer: those around it, which a sealed one does not read.
    alone: it draws of parameters alone."""

    def __init__(self, root: Root, outer: "Scope | None" = None, own: Sequence[Value] = (), sealed: bool = False):
        self.root, self.rng, self.sealed = root, root.rng, sealed
        self.outer = [] if outer is None else [*outer.outer, *outer.own]
        self.own, self.ints = list(own), [] if outer is None else list(outer.ints)
        self.depth, self.alone = (0, False) if outer is None else (outer.depth + 1, outer.alone)
        self.lines: list[Line] = []

    # chance

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both among them."""
        return int(self.rng.integers(low, high + 1))

    def choose(self, of: Sequence[Any]) -> Any:
        return of[int(self.rng.integers(len(of)))]

    def dim(self) -> int:
        return self.choose((2, 3, 3, 4))

    def dims(self, rank: int) -> tuple[int, ...]:
        return tuple(self.dim() for _ in range(rank))

    def kind(self, kind: str = "") -> str:
        """The kind, or any where it is open; none in a sealed scope, which holds arguments and constants."""
        return "" if self.sealed else "P" if self.alone else kind or self.choose(("P", "P", "P", "D", "D", ""))

    def name(self, letter: str) -> str:
        self.root.count += 1
        return f"{letter}{self.root.count}"

    # values

    def visible(self, kind: str = "") -> list[Value]:
        """The values that may be read: those of the block are three times as likely, and every leaf is there."""
        values = [*self.own] * 3 + ([] if self.sealed else [*self.outer, *self.root.values])
        values = [v for v in values if "D" not in v.kind or not self.alone]
        return [v for v in values if not kind or self.sealed or (v.kind == "P" if kind == "P" else "D" in v.kind)]

    def fresh(self, kind: str, shape: tuple[int, ...]) -> Value:
        """A new leaf of params, or a new argument; a constant where nothing around may be read."""
        root, seed = self.root, self.whole(0, 999)
        if self.sealed:
            return Value(f"arr({seed}, {shape})", shape, "", True)
        kind = kind or self.choose("PD")
        dtype = f", '{self.choose(['float32', 'bfloat16'])}'" if root.dtype == "mixed" else ""
        if kind == "P":
            name = self.name("w")
            root.leaves[name] = f"arr({seed}, {shape}{dtype})"
        else:
            name = self.name("x")
            root.arguments[name] = f"arr({seed}, {(root.m, *shape)}{dtype})"
        root.values.append(Value(name, shape, kind, True))
        root.kinds[name] = kind
        return root.values[-1]

    def full(self, kind: str) -> bool:
        """True where there are leaves, or arguments, enough."""
        return len(self.root.leaves) >= LEAVES if kind == "P" else len(self.root.arguments) >= ARGUMENTS

    def pick(self, kind: str = "", rank: int = 0) -> Value:
        """A value of at least that rank."""
        kind = self.kind(kind)
        fits = [v for v in self.visible(kind) if len(v.shape) >= rank]
        if fits and (self.chance(0.85) or self.full(kind)):
            return self.choose(fits[-12:] if self.chance(0.5) else fits)
        return self.get(kind, self.dims(max(rank, self.whole(0, 3))), 0.2)

    def get(self, kind: str, shape: tuple[int, ...], reuse: float = 0.65) -> Value:
        """A value of that shape: one there is, another made to fit, or a fresh one."""
        kind = self.kind(kind)
        there = self.visible(kind)
        exact = [v for v in there if v.shape == shape]
        if exact and self.chance(reuse):
            return self.choose(exact)
        if there and (self.chance(0.25) or self.full(kind)):
            return self.fit(self.choose(exact or there), shape)
        return self.fresh(kind, shape)

    def fit(self, v: Value, shape: tuple[int, ...]) -> Value:
        """The value in that shape."""
        if v.shape == shape:
            return v
        size = int(np.prod(shape, dtype=int))
        if v.size == size:
            text = f"{v}.reshape({shape})"
        elif not v.shape:
            text = f"jnp.broadcast_to({v}, {shape})"
        elif v.size > size:
            text = f"{v}.reshape(-1)[{v.size - size}:].reshape({shape})"
        else:
            text = f"jnp.resize({v}, {shape})"
        return v._replace(text=text, shape=shape)

    def soft(self, v: Value) -> Value:
        """The value made small."""
        if v.tame:
            return v
        return v._replace(text=self.choose((f"jnp.tanh({v})", f"jnp.sin({v})", f"jnp.cos({v})")), tame=True)

    def cast(self, v: Any) -> str:
        """In the dtype of the program, where dtypes are mixed."""
        return f"jnp.asarray({v}, 'float32')" if self.root.dtype == "mixed" else str(v)

    def index(self, n: int, shape: tuple[int, ...] = ()) -> Value:
        """Integers below n: of the data, mostly; of params, of a loop, or constant."""
        if self.sealed:
            return Value(f"ints({self.whole(0, 999)}, {n}, {shape})", shape)
        there = [v for v, below in (*self.root.ints, *self.ints * 3) if below <= n and v.shape == shape]
        there = [v for v in there if "D" not in v.kind or not self.alone]
        if there and self.chance(0.6):
            return self.choose(there)
        seed, roll = self.whole(0, 999), self.rng.random()
        if roll > 0.9 and not shape:
            v = self.pick("P")
            return Value(f"jnp.clip(jnp.sum({v} > 0), 0, {n - 1})", shape, v.kind)
        if roll < (0.6 if self.alone else 0.2):
            return Value(f"ints({seed}, {n}, {shape})", shape)
        if (roll < 0.3 or self.alone) and len(self.root.leaves) < LEAVES:
            name = self.name("n")
            self.root.leaves[name] = f"ints({seed}, {n}, {shape})"
            value = Value(name, shape)
        else:
            name = self.name("k")
            self.root.arguments[name] = f"ints({seed}, {n}, {(self.root.m, *shape)})"
            value = Value(name, shape, "D")
        self.root.kinds[name] = value.kind
        self.root.ints.append((value, n))
        return value

    # lines

    def emit(self, text: str, shape: tuple[int, ...], tame: bool = False, blocks: Sequence[Block] = ()) -> Value:
        """A line that defines one value."""
        return self.define("{0}", text, [shape], tame, blocks)[0]

    def emit_all(self, text: str, shapes: Sequence[tuple], blocks: Sequence[Block] = (), form: str = "") -> list[Value]:
        """A line that defines several values; text: of their tuple, in that form."""
        return self.define(form or "".join(f"{{{i}}}, " for i in range(len(shapes))), text, shapes, False, blocks)

    def define(self, form: str, text: str, shapes: Sequence[tuple], tame: bool, blocks: Sequence[Block]) -> list[Value]:
        read = names("\n".join([text, *(line for block in blocks for line in block.render())]))
        kind = "".join(sorted({letter for name in read for letter in self.root.kinds.get(name, "")}))
        outs = [Value(self.name("a"), tuple(shape), kind, tame) for shape in shapes]
        self.root.kinds.update((v.text, kind) for v in outs)
        self.lines.append(Line(outs, f"{form.format(*outs).rstrip()} = {text}", list(blocks)))
        self.own += outs
        return outs

    def block(self, name: str, given: Sequence[Value], head: str, shapes: Sequence[tuple], **options: Any) -> Block:
        """A function of one to three lines. given: what it is given; shapes: of its results; ints: more integers."""
        inner = Scope(self.root, self, given, self.sealed or options.get("sealed", False))
        inner.ints += options.get("ints", [])
        for _ in range(self.whole(1, 2 if self.depth else 3)):
            options["step"](inner)
        results = [inner.result(shape, given) for shape in shapes]
        return Block(
            head or f"def {name}({', '.join(map(str, given))}):", inner.lines, results, options.get("single", False)
        )

    def result(self, shape: tuple[int, ...], given: Sequence[Value]) -> str:
        """What a block returns in that shape: of its last values, mostly."""
        if self.chance(0.12) and given:  # handed through
            value = self.choose(given)
        elif self.chance(0.1) and not self.sealed:
            value = self.get("P", shape)
        else:
            read = names("\n".join(line.text.partition(" = ")[2] for line in self.lines))
            loose = [v for v in self.own if v.text not in read] or self.own or [self.get("P", shape)]
            some = {self.fit(self.soft(v), shape).text: 1 for v in (self.choose(loose), self.choose(loose))}
            return self.cast(self.choose((" + ", " * ")).join(some))
        return self.cast(self.fit(value, shape))
