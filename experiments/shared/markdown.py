"""The tables of experiments/README.md, written from the published results."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from experiments.shared.commands import EXPERIMENTS, commands
from experiments.shared.report import InputError
from experiments.shared.results import RESULTS, read
from experiments.shared.shown import Row, Shown
from experiments.shared.tables import TABLES

README = EXPERIMENTS / "README.md"
MARK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Filler(Formatter):
    """Puts figures into texts: a list is written entry by entry, and !l is the last entry of lists in lists."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        name, *keys = re.findall(r"[^\[\]]+", field_name)
        value = kwargs[name]
        for key in keys:
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value, name

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        while conversion == "l" and isinstance(value, list):
            value = value[-1]
        return value if conversion == "l" else super().convert_field(value, conversion)  # type: ignore[arg-type]

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, list):
            return ", ".join(self.format_field(one, format_spec) for one in value)
        return super().format_field(value, format_spec)


def cells_of(row: Row) -> list[str]:
    """The cells of a row with its figures in them. InputError if a run or a figure is not there."""
    name, _, run = row.run.partition("/")
    runs = read(name)
    if run not in runs:
        raise InputError(f"results/{name}.json has no run {run!r}; it has {', '.join(map(repr, runs))}")
    record = runs[run]
    try:
        filled = [Filler().vformat(cell, (), record["figures"]) for cell in row.cells]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"results/{name}.json, {run}: no figure for the row {row.label!r}: {error!r}") from error
    return [row.label, *filled, f"`{record['command']}`"]


def table_of(shown: Shown) -> str:
    """A table in Markdown."""
    lines = [[*shown.heads, "command"], ["---"] * (len(shown.heads) + 1), *map(cells_of, shown.rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def notes() -> str:
    """What must be known of each run, in Markdown."""
    said: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for run, record in read(path.stem).items():
            of = f"{record['machine']}, Python {record['python']}, jax {record['jax']}, {record['date']}"
            said.setdefault(f"{of}. {record['note']}".strip(), []).append(f"{path.stem}/{run}")
    lines = (f"| {', '.join(runs)} | {what} |\n" for what, runs in said.items())
    return "| runs | measured on |\n| --- | --- |\n" + "".join(lines)


def list_of_commands() -> str:
    """Every command with its claim and its minutes, in Markdown."""
    lines = (f"| `{command.line}` | {command.claim} | {command.minutes:g} |\n" for command in commands())
    return "| command | what it claims | minutes |\n| --- | --- | --- |\n" + "".join(lines)


def rendered(text: str) -> str:
    """A text with every table between its marks made anew. InputError if a table is unknown, or one is not shown."""
    whole: Mapping[str, Any] = {"commands": list_of_commands, "runs": notes}
    seen = []

    def one(found: re.Match) -> str:
        name = found[2]
        seen.append(name)
        if name not in TABLES and name not in whole:
            raise InputError(f"{README.name}: there is no table {name!r}")
        return found[1] + (whole[name]() if name in whole else table_of(TABLES[name])) + found[3]

    made = MARK.sub(one, text)
    missing = [name for name in (*TABLES, *whole) if name not in seen]
    if missing:
        raise InputError(f"{README.name} does not show the tables {', '.join(missing)}")
    return made
