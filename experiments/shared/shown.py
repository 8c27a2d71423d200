"""A table of experiments/README.md: its heads and its rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """A row of a table: a label, then cells; the command of the run is added as the last cell.

    run    "digits/default": a command, and one of its published runs
    cells  texts with figures of that run in them: "{test_accuracy!l:.2%}"; !l is the last entry of a list
    """

    label: str
    run: str
    cells: tuple[str, ...]


class Shown(NamedTuple):
    """A table: the heads of its columns but the last, and its rows."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]
