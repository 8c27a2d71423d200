"""The report of compare: for a person at a terminal, for a log, for JSON, and as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import jax
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fnbp.comparison.numerics import FLOAT64_BACKENDS
from fnbp.measurement import Cost
from fnbp.rendering.tables import Tabular

FAULTS = {  # the gravest first
    "raises": "the backward raises",
    "structure": "its tree, shape or dtype is not that of the argument",
    "random": "it returns another value each time",
    "nonfinite": "it has NaN or infinity, and autodiff has none",
    "formula": "it is wrong in float64: the formula is wrong",
    "example": "its total is right, but not what its factors make of each example",
    "disputed": "autodiff agrees with it, and differences of the forward contradict both: the forward has a wrong rule",
    "precision": "it is right in float64, but less accurate than autodiff in the dtype of the arguments",
    "jit": "it differs, or fails, under jit",
    "vmap": "it differs, or fails, under vmap",
    "programs": "it differs, or fails, within another program",
    "sharded": "it differs, or fails, when spread over devices",
    "one_argument": "it differs, or fails, if the other arguments are fixed",
    "forwards": "its rule forwards is not that of the gradient",
    "second_order": "its own derivative is not that of the gradient it returns",
    "forward": "the two functions return different values",
}
SEVERITY = {kind: i for i, kind in enumerate((*FAULTS, "inherits", "convention", "ok"))}


@dataclass(frozen=True)
class Row:
    """One leaf: the gradient of a parameter or an argument of one layer.

    path       "serial[3].dense(17)", or the name of a function
    leaf       "W", or "x" for the input's cotangent
    kind       "ok"; a fault, which is a key of FAULTS; "inherits": right, but given a wrong delta in the whole pass; or
               "convention": at a kink or a tie the two choose different slopes, or autodiff follows a rule of its own
    error      |manual - automatic| / |automatic| in float64, at the given arguments, of the layer by itself
    limit      the error that rounding may make there: 64 times the noise of this leaf
    z          the error over the rounding noise of this leaf, at the worst probe; above 64 the formula is wrong
    rho        the error of manual over that of automatic in the dtype of the arguments, or None if it was not measured
    whole      the error at the end of the whole backward pass; None for a function and for a loss
    probe      the probe that shows the fault
    index      the worst element there; manual and automatic are its two values
    hint       the likely mistake
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "ok"
    error: float = 0.0
    limit: float = 0.0
    z: float = 0.0
    rho: float | None = None
    whole: float | None = None
    probe: str = ""
    index: tuple[int, ...] = ()
    manual: float = float("nan")
    automatic: float = float("nan")
    hint: str = ""

    @property
    def ok(self) -> bool:
        """True unless the row is a fault."""
        return self.kind not in FAULTS

    @property
    def verdict(self) -> str:
        """The kind as the table shows it: a fault in capitals."""
        return self.kind if self.ok else self.kind.upper()


@dataclass(frozen=True)
class Findings:
    """What was found of one subject.

    rows          one for each leaf, after those that stand for no single leaf
    checks        how each transform went, whether differences agree, and whether each example does, by name
    calls         how often each side was called
    cost          time and memory of both sides, or None
    """

    rows: list[Row]
    notes: list[str]
    conventions: list[Row] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    cost: Cost | None = None


@dataclass(frozen=True)
class Report(Tabular):
    """What compare found: rows from input to output, faults from the last layer to the first.

    checks       by name: how each transform went, whether differences of the forward agree with autodiff, and whether
                 what factors make of one example is its gradient
    notes        what was not tried and why, one line each
    conventions  where manual and automatic differ and both are right
    calls        how often each side was called: "manual", "automatic"
    costs        by path: time and memory of both sides, if they were asked for
    """

    rows: tuple[Row, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    conventions: tuple[Row, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[Row, ...]:
        """The rows that are faults, in the order in which a backward pass meets them."""
        paths = dict.fromkeys(row.path for row in self.rows)
        return tuple(row for path in reversed(paths) for row in self.rows if row.path == path and not row.ok)

    @property
    def first_fault(self) -> Row | None:
        """The fault that a backward pass meets first, or None."""
        return next(iter(self.faults), None)

    @property
    def ok(self) -> bool:
        """True if there is no fault."""
        return not self.faults

    @property
    def worst(self) -> float:
        """The largest relative error at the given arguments, of a layer by itself or of the whole pass."""
        return max((max(row.error, row.whole or 0.0) for row in self.rows), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON; a number that is not finite becomes text."""

        def as_values(row: Row) -> dict[str, Any]:
            values = asdict(row) | {"ok": row.ok, "shape": list(row.shape), "index": list(row.index)}
            return {k: str(v) if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}

        return {
            "ok": self.ok,
            "worst": self.worst if isfinite(self.worst) else str(self.worst),
            "rows": [as_values(row) for row in self.rows],
            "faults": [as_values(row) for row in self.faults],
            "conventions": [as_values(row) for row in self.conventions],
            "checks": dict(self.checks),
            "notes": list(self.notes),
            "calls": dict(self.calls),
            "costs": {path: cost.to_dict() for path, cost in self.costs.items()},
        }

    def raise_if_bad(self) -> None:
        """Raise AssertionError, with the report as its message, unless every row is ok."""
        if not self.ok:
            raise AssertionError(f"manual and automatic gradients differ\n{self}")

    def plot(self, path: Any = None) -> Any:
        """Draw each leaf's error, by itself and in the whole pass; save the figure if there is a path.

        Returns: a matplotlib Figure. Raises: ImportError without matplotlib.
        """
        from fnbp.comparison.figure import draw

        return draw(self, path)

    def __rich__(self) -> RenderableType:  # type: ignore[override]
        return Group(self.table(), *self.lines())

    def table(self) -> Table:
        """The table: a row for each leaf."""
        title = "manual against automatic: " + ("ok" if self.ok else "WRONG")
        table = Table(title=title, title_justify="left", title_style="bold" if self.ok else "bold red")
        whole = any(row.whole is not None for row in self.rows)
        prices = ("time", "memory") if self.costs else ()
        numbers = ("error", "z", "rho", *(("whole pass",) if whole else ()), *prices)
        priced: set[str] = set()
        for name in ("layer", "leaf", "shape", *numbers, "verdict"):
            table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name != "layer")
        for row in self.rows:
            style = {"ok": "", "inherits": "yellow", "convention": "cyan"}.get(row.kind, "bold red")
            shape = "x".join(map(str, row.shape)) or "()"
            cells = [f"{row.error:.1e}", short(row.z), "-" if row.rho is None else f"{row.rho:.2g}"]
            if whole:
                cells.append("-" if row.whole is None else f"{row.whole:.1e}")
            if prices:
                cells += ["", ""] if row.path in priced else self.price_of(row.path)
                priced.add(row.path)
            # as Text: brackets in a name are not markup
            table.add_row(Text(row.path), Text(row.leaf), shape, *cells, row.verdict, style=style)
        return table

    def price_of(self, path: str) -> list[str]:
        """Time and memory of a layer's manual backward over autodiff's, for the table."""
        cost = self.costs.get(path)
        ratios = (cost.time_ratio, cost.memory_ratio) if cost else (None, None)
        return ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]

    def lines(self) -> list[Text]:
        """The lines below the table: the first fault, the other faults, conventions, checks, notes."""
        found = []
        for i, row in enumerate(self.faults):
            found.append(
                Text(("first fault: " if i == 0 else "also: ") + line_of(row), "bold red" if i == 0 else "red")
            )
        for row in self.conventions:
            found.append(Text(line_of(row), "cyan"))
        inherited = sum(row.kind == "inherits" for row in self.rows)
        if inherited:
            found.append(
                Text(f"{inherited} leaves below inherit the error; told the right delta, they are right", "yellow")
            )
        if self.checks:
            found.append(Text(" · ".join(f"{name} {word}" for name, word in self.checks.items())))
        if self.calls:
            found.append(Text("called: " + ", ".join(f"{side} {n:,} times" for side, n in self.calls.items()), "dim"))
        return found + [Text(f"note: {note}", "dim") for note in self.notes]


def report_of(
    rows: Iterable[Row], found: Sequence[Findings], transforms: Iterable[str], more: Iterable[str] = ()
) -> Report:
    """The Report of these rows, with the checks, notes and conventions of every subject."""
    checks: dict[str, str] = {}
    for name in (*transforms, "differences", "examples"):
        words = [one.checks[name] for one in found if name in one.checks]
        if words:
            checks[name] = next((w for w in words if w == "WRONG"), next((w for w in words if w != "ok"), "ok"))
    notes = [*(note for one in found for note in one.notes), *more]
    if jax.default_backend() not in FLOAT64_BACKENDS:
        notes.append(f"{jax.default_backend()} has no float64: the float64 side ran on the CPU")
    conventions = tuple(row for one in found for row in one.conventions)
    costs = {one.rows[0].path: one.cost for one in found if one.cost and one.rows}
    calls = {side: sum(one.calls.get(side, 0) for one in found) for side in ("manual", "automatic")}
    return Report(tuple(rows), checks, tuple(dict.fromkeys(notes)), conventions, calls, costs)


def short(z: float) -> str:
    """z for the table."""
    return f"{z:.1f}" if z < 1000 else f"{z:.0e}"


def line_of(row: Row) -> str:
    """A row in one line."""
    where = f"{row.path} -> d{row.leaf}" if row.leaf else row.path
    where = row.path if row.kind == "forward" else where
    values = f", worst at {list(row.index)}: manual {row.manual:+.6g}, automatic {row.automatic:+.6g}"
    values = values if row.manual == row.manual or row.automatic == row.automatic else ""
    probe = f" on {row.probe!r}" if row.probe else ""
    return f"{where}: {row.kind}{probe}{values}{': ' + row.hint if row.hint else ''}"
