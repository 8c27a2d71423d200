"""Results that are published: one file for each command in experiments/results, with a record of each of its runs."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from experiments.shared.commands import EXPERIMENTS, commands
from experiments.shared.report import PLACES, InputError

RESULTS = EXPERIMENTS / "results"
SCHEMA: dict[str, type | tuple[type, ...]] = {  # of one run
    "command": str,
    "machine": str,
    "python": str,
    "jax": str,
    "date": str,  # 2026-11-25
    "settings": dict,  # those that differ from the defaults, or all
    "figures": dict,  # each with its name
    "note": str,  # what a reader must know of this run; ""
}
MOST = 24  # numbers that a figure may hold
LONGEST = 60  # letters of a text among the figures


def read(name: str) -> dict[str, dict[str, Any]]:
    """The published runs of a command, by the name of the run. InputError if a run does not follow SCHEMA."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: publish a run of `python -m experiments.{name}` first")
    runs = json.loads(path.read_text())
    for run, record in runs.items():
        check(f"{path.name}, {run}", record)
    return runs


def check(where: str, record: Any) -> None:
    """Raise InputError unless a record of a run has every entry of SCHEMA and no other."""
    if not isinstance(record, dict) or set(record) != set(SCHEMA):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: expected the entries {sorted(SCHEMA)}, got {found}")
    for name, kind in SCHEMA.items():
        if not isinstance(record[name], kind):
            raise InputError(f"{where}: {name} must be of type {kind}, got {record[name]!r}")
    known = {command.name for command in commands()}
    called = re.match(r"python -m experiments\.(\w+)", record["command"])
    if called is None or called[1] not in known:
        raise InputError(f"{where}: {record['command']!r} is not a command of experiments/")
    if not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", record["date"]):
        raise InputError(f"{where}: expected a date such as 2026-11-25, got {record['date']!r}")


def publish(folder: Path, run: str, note: str = "") -> Path:
    """Copy the figures of folder/result.json, as a command wrote it, into experiments/results as the run of that name.

    Returns: the file. Raises: InputError if there is no such result, or it was written by an older version.
    """
    source = folder / "result.json"
    if not source.is_file():
        raise InputError(f"{source} does not exist: run a command with --out {folder} first")
    result = json.loads(source.read_text())
    if "command" not in result:
        raise InputError(f"{source} does not say which command wrote it: run the command again")
    record = {
        "command": result["command"],
        "machine": f"{result['device']['kind']}, {result['device']['cores']} cores, {result['device']['machine']}",
        "python": result["versions"]["python"],
        "jax": result["versions"]["jax"],
        "date": result.get("date") or date.today().isoformat(),
        "settings": {name: value for name, value in result["settings"].items() if name not in PLACES},
        "figures": small(result["measured"]),
        "note": note,
    }
    check(str(source), record)
    name = record["command"].split()[2].removeprefix("experiments.")
    target = RESULTS / f"{name}.json"
    runs = json.loads(target.read_text()) if target.is_file() else {}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(runs | {run: record}, indent=2) + "\n")
    return target


def small(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures without long lists, as of the losses of every step, and without long texts."""

    def fits(value: Any) -> bool:
        if isinstance(value, str):
            return len(value) <= LONGEST
        if isinstance(value, dict):
            return len(value) <= MOST
        return not isinstance(value, list) or (len(value) <= MOST and not any(isinstance(v, dict) for v in value))

    return {name: small(value) if isinstance(value, dict) else value for name, value in measured.items() if fits(value)}
