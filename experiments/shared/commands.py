"""The commands of the experiments: what each claims and how long it takes, as its own file says."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

EXPERIMENTS = Path(__file__).parents[1]
STARTS = "report.run(Settings, main)"  # the last line of every command


class Command(NamedTuple):
    """A command: its name, its file, the first line of its docstring, and the minutes on two CPU cores."""

    name: str
    path: Path
    claim: str
    minutes: float | None

    @property
    def line(self) -> str:
        """What a shell is given."""
        return f"python -m experiments.{self.name}"


@cache
def commands() -> tuple[Command, ...]:
    """Every command, by name, read once. Nothing is imported."""
    paths = [*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("*/__main__.py")]
    return tuple(sorted(command_of(path) for path in paths if STARTS in path.read_text()))


def command_of(path: Path) -> Command:
    """What a file says of itself."""
    tree = ast.parse(path.read_text())
    claim = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Command(path.parent.name if path.stem == "__main__" else path.stem, path, claim, minutes_of(tree))


def minutes_of(tree: ast.Module) -> float | None:
    """The number that the module calls MINUTES, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MINUTES":
            return float(ast.literal_eval(node.value))
    return None
