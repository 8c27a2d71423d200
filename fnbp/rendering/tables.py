"""Tables for a terminal, and the same in plain text for logs; a net as such a table."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from math import prod
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fnbp.arrays.checks import check_array, check_is, choose, describe
from fnbp.layer import Context, Layer, child, map_layers
from fnbp.naming import leaf_name

__all__ = ["NetTable", "tabulate"]


class Tabular(ABC):
    """What has a __rich__ table: rich prints it in colour, str() gives it in plain text."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The table."""

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=120, no_color=True).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


@dataclass(frozen=True)
class Node:
    """One layer of a net.

    path        "serial[0].dense(128)"
    depth       how many combinators it stands in
    leaf        False for a combinator, which has no output and no parameters of its own here
    output      the shape of what it returns, or the tuple of them; inside a repeat, in each turn
    parameters  the shape of each parameter by name; inside a repeat, with the turns as first axis
    note        the caller's
    """

    path: str
    name: str
    depth: int
    leaf: bool
    output: tuple[Any, ...] | None
    parameters: Mapping[str, tuple[int, ...]]
    note: str = ""

    @property
    def count(self) -> int:
        """How many numbers its parameters hold."""
        return sum(prod(shape) for shape in self.parameters.values())


@dataclass(frozen=True)
class NetTable(Tabular):
    """A net as a table: each layer with the shape of its output, its parameters, and their number.

    rows   one Node for each layer and combinator, first to last
    total  how many numbers all parameters hold
    """

    name: str
    rows: tuple[Node, ...]

    @property
    def total(self) -> int:
        return sum(row.count for row in self.rows)

    def __rich__(self) -> Table:
        noted, nested = any(row.note for row in self.rows), any(row.depth and not row.leaf for row in self.rows)
        table = Table(title=Text(f"{self.name}: {self.total:,} parameters"), title_justify="left")
        for column in ("layer", "output", "parameters", "count", *(["note"] if noted else [])):
            table.add_column(
                column, justify="right" if column == "count" else "left", no_wrap=column in ("layer", "output")
            )
        for row in self.rows:
            if nested or row.leaf:
                held = "  ".join(f"{name} {form(shape)}" for name, shape in row.parameters.items())
                cells = ["" if row.output is None else form(row.output), held, f"{row.count:,}" if held else ""]
                shown = "  " * row.depth + (row.path if not nested or not row.depth else last_of(row))
                table.add_row(*map(Text, [shown if nested else row.path, *cells, *([row.note] if noted else [])]))
        return table


def last_of(row: Node) -> str:
    """The end of a path that says which part it is: "[0].dense(128)"."""
    return row.path[: len(row.path) - len(row.name)].rpartition("[")[2].join(("[", row.name))


def form(shape: tuple[Any, ...]) -> str:
    """A shape in letters, 5x7; of several, (5x7, 5x3)."""
    if any(isinstance(part, tuple) for part in shape):
        return f"({', '.join(map(form, shape))})"
    return "x".join(map(str, shape)) or "scalar"


def tabulate(
    net: Layer,
    x: Any,
    params: Any = None,
    state: Any = None,
    ctx: Context = Context(),
    notes: Mapping[str, str] | None = None,
) -> NetTable:
    """Show a net as a table: every layer by its path, with the shape of its output and its parameters.

        print(fnbp.tabulate(net, x))      fnbp.tabulate(net, x).total

    Nothing is computed: all shapes follow from that of x. A tied parameter is listed in the first of its two places;
    frozen weights are no parameters.

    Options: x: an array, a jax.ShapeDtypeStruct, or the tuple that net takes. params, state: those that the net would
             begin with, if None. ctx: the Context of the forward. notes: a text for each path, in a column of its own.
    Raises:  TypeError if net is not a Layer, x holds no array, or ctx is not a Context; ValueError if params or state
             do not belong to the net, x does not fit it, or a note is for a path that there is not.
    """
    check_is("tabulate", "net", net, Layer)
    check_is("tabulate", "ctx", ctx, Context)
    for leaf in jax.tree.leaves(x) or [x]:
        check_array("tabulate", "x", leaf)
    if notes is not None and not isinstance(notes, Mapping):
        raise TypeError(f"tabulate: notes must be a dict of texts by path, got {describe(notes)}")
    if params is None or state is None:
        first = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
        params, state = (due if given is None else given for given, due in zip((params, state), first, strict=True))
    outputs: dict[str, Any] = {}
    jax.eval_shape(map_layers(noting(outputs), net).forward, params, state, x, ctx)
    nodes = tuple(nodes_of(net, params, outputs, notes or {}))
    for path in notes or {}:
        choose("path", path, {node.path: node for node in nodes}, "tabulate: ")
    return NetTable(net.name, nodes)


def noting(outputs: dict[str, Any]) -> Any:
    """For map_layers: layers that write the shape of what they return into outputs, while they are traced."""

    def at(path: str, layer: Layer) -> Layer:
        def forward(params: Any, state: Any, x: Any, ctx: Context) -> Any:
            y, state, res = layer.forward(params, state, x, ctx)
            shapes = tuple(tuple(a.shape) for a in jax.tree.leaves(y))
            outputs[path] = shapes[0] if len(shapes) == 1 else shapes
            return y, state, res

        return layer._replace(forward=forward)

    return at


def nodes_of(net: Layer, params: Any, outputs: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[Node]:
    """Every node of a net, first to last, each before its parts."""

    def walk(path: str, layer: Layer, held: Any, depth: int) -> Iterator[Node]:
        leaf = layer.rebuild is None
        shapes = parameters_of(held) if leaf else {}
        yield Node(path, layer.name, depth, leaf, outputs.get(path), shapes, notes.get(path, ""))
        for i, part in enumerate(layer.parts):
            yield from walk(child(path, i, part), part, held[i], depth + 1)

    return walk(net.name, net, params, 0)


def parameters_of(held: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree, by its keys: {"W": (3, 5)}, {"0.W": (3, 5)}."""
    found = jax.tree_util.tree_flatten_with_path(held)[0]
    return {leaf_name(keys): tuple(leaf.shape) for keys, leaf in found}
