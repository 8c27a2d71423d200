"""List every experiment, with what it claims and the minutes that it takes; publish results; render their tables."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.shared.commands import commands
from experiments.shared.markdown import README, rendered
from experiments.shared.report import InputError, console
from experiments.shared.results import publish


@dataclass(frozen=True)
class Settings:
    """Without options: the list."""

    publish: Path | None = None
    """A folder with the result.json of a run: copy its figures into experiments/results, then render the tables."""
    run: str = "default"
    """The name that the published run gets; a run of the same name is replaced."""
    note: str = ""
    """What a reader must know of that run."""
    write: bool = False
    """Render the tables of experiments/README.md."""


def main(settings: Settings) -> int:
    """List, publish or render."""
    if settings.publish is not None:
        console.print(f"wrote {publish(settings.publish, settings.run, settings.note)}", highlight=False)
    if settings.write or settings.publish is not None:
        README.write_text(rendered(README.read_text()))
        console.print(f"wrote {README}", highlight=False)
        return 0
    console.print(listing())
    return 0


def listing() -> Table:
    """Every command, what it claims, and the minutes that it takes on two CPU cores."""
    table = Table(title="python -m experiments.NAME --help", title_justify="left")
    for column in ("NAME", "what it claims", "minutes"):
        table.add_column(column, justify="right" if column == "minutes" else "left", no_wrap=column != "what it claims")
    for command in commands():
        table.add_row(command.name, command.claim, "" if command.minutes is None else f"{command.minutes:g}")
    return table


try:
    code = main(tyro.cli(Settings, description=__doc__))
except InputError as error:
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
    code = 2
sys.exit(code)
