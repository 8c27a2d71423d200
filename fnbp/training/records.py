"""The record of a run: what was asked for, on what it ran, and its numbers, in a directory of plain files."""

import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnbp.arrays.checks import describe
from fnbp.training.reached import Fit, as_json

__all__ = ["run_record"]

PACKAGES = ("fnbp", "jax", "jaxlib", "optax", "numpy")
RUN, STEPS, VALIDATIONS, RESULT = "run.json", "steps.jsonl", "validations.jsonl", "result.json"


def run_record(
    directory: str | Path, config: Mapping[str, Any] | None = None, writer: Any = None
) -> Callable[[Fit], None]:
    """Make a function of a Fit that keeps the record of a run up to date: for on_epoch, and for what fit returns.

        keep = run_record("runs/a", config={"rate": 0.01})
        keep(fit(..., on_epoch=keep))

    run.json           config, the command, versions, devices
    steps.jsonl        {"step": 1, "loss": 2.3, ...} for each step: the loss, and what record makes of the step
    validations.jsonl  {"step": 100, "loss": 0.4, "accuracy": 0.9} for each validation
    result.json        how the run ended, once it has
    loss.png           both losses, at the end, if matplotlib is installed

    Each call brings the files to what the Fit holds: it adds the lines that are new. Lines of steps before those of the
    Fit, as when fit was called with resume, stay; others, of another run in the same directory, are replaced.

    Options: config: whatever is to be remembered, as JSON has it. writer: for TensorBoard: an object with the method
             add_scalar(name, value, step), such as torch.utils.tensorboard.SummaryWriter or that of tensorboardX; it is
             given the lines that are new.
    Raises:  ValueError if the directory holds the record of a run with another config; TypeError if directory is not a
             path, config is not JSON, or writer has no such method; NotADirectoryError if directory is a file.
    """
    if not isinstance(directory, (str, Path)) or not str(directory):
        raise TypeError(f"run_record: directory must be a path, got {describe(directory)}")
    folder = Path(directory).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"run_record: {folder} is a file")
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"run_record: writer needs a method add_scalar(name, value, step), got {describe(writer)}")
    asked = copy_of(config)
    check_same(folder, asked)
    files = ((STEPS, lines_of(folder / STEPS)), (VALIDATIONS, lines_of(folder / VALIDATIONS)))

    def keep(fit: Fit) -> None:
        if not isinstance(fit, Fit):
            raise TypeError(f"run_record: expected a Fit, got {describe(fit)}")
        if jax.process_index() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN).exists():
            replace(folder / RUN, json.dumps({"config": asked, **surroundings()}, indent=1))
        for name, extend in files:
            columns = fit.history.steps() if name == STEPS else fit.history.validations()
            for row in extend(fit.history.start, columns):
                write(writer, "train" if name == STEPS else "validation", row)
        if fit.stopped:
            end(folder, fit)
        else:
            (folder / RESULT).unlink(missing_ok=True)  # of a run that goes on

    return keep


def copy_of(config: Any) -> dict[str, Any]:
    """config as JSON has it, now. TypeError if it has not."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"run_record: config must be a dict, got {describe(config)}")
    try:
        return json.loads(json.dumps(dict(config or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"run_record: config must be what JSON has: {error}") from None


def check_same(folder: Path, config: dict[str, Any]) -> None:
    """ValueError if the directory holds the record of a run with another config."""
    path = folder / RUN
    if not config or not path.exists():
        return
    there = json.loads(path.read_text())["config"]
    names = [name for name in {**there, **config} if there.get(name) != config.get(name)]
    if names:
        told = ", ".join(f"{name} is {there.get(name)} there, {config.get(name)} here" for name in names)
        raise ValueError(f"run_record: {folder} holds the record of another run: {told}; give another directory")


def surroundings() -> dict[str, Any]:
    """On what a run ran."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "number": len(devices)},
        "processes": jax.process_count(),
        "machine": platform.platform(),
    }


def lines_of(path: Path) -> Callable[[int, dict[str, np.ndarray]], Iterator[dict[str, Any]]]:
    """Make a function (start, columns) that brings a file to a row a line, and yields the rows that are new.

    Lines of steps up to start stay, and so do those that are as the rows have it.
    """
    done: tuple[int, int, str, int] = -1, 0, "", 0  # start, how many rows the file holds behind it, the last, its size

    def extend(start: int, columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        nonlocal done
        number, (since, have, last, size) = len(columns["step"]), done
        whole = have > 0 and path.exists() and path.stat().st_size == size
        if whole and since == start and have <= number and line_of(columns, have - 1) == last:
            new = [line_of(columns, i) for i in range(have, number)]
            with path.open("a") as file:
                file.writelines(new)
        else:
            there, lines = lines_in(path), [line_of(columns, i) for i in range(number)]
            kept = [line for step, line in there if step <= start]
            pairs = zip((line for step, line in there if step > start), lines, strict=False)
            replace(path, "".join([*kept, *lines]))
            new = lines[sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
        done = start, number, line_of(columns, number - 1) if number else "", path.stat().st_size
        yield from map(json.loads, new)

    return extend


def line_of(columns: dict[str, np.ndarray], i: int) -> str:
    """A row of a table as a line of JSON."""
    return json.dumps({name: as_json(column[i]) for name, column in columns.items()}) + "\n"


def lines_in(path: Path) -> list[tuple[int, str]]:
    """The lines of a file and their steps, but for those that are no JSON, as a kill may leave one."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append((int(json.loads(line)["step"]), line + "\n"))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def replace(path: Path, text: str) -> None:
    """Write a file in one piece: after a kill it is the old one or the new one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def write(writer: Any, tag: str, row: dict[str, Any]) -> None:
    """The numbers of a row, for TensorBoard, if there is a writer."""
    for name, value in row.items():
        if writer is not None and name != "step" and value is not None:
            writer.add_scalar(f"{tag}/{name}", value, row["step"])


def end(folder: Path, fit: Fit) -> None:
    """How the run ended, and its figure."""
    best = None if fit.best is None else {"step": fit.best.step, "loss": fit.best.loss}
    told = {"stopped": fit.stopped, "message": fit.message, "step": fit.step, "best": best}
    told["seconds"] = round(fit.history.seconds, 3)
    replace(folder / RESULT, json.dumps(told, indent=1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in ((STEPS, "training"), (VALIDATIONS, "validation")):
        rows = [json.loads(line) for _, line in lines_in(folder / name)]
        drawn = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
        if drawn:
            axes.plot(*np.asarray(drawn).T, label=label, linewidth=1 if name == STEPS else 2)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
