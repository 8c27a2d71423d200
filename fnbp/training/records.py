"""The record of a run: what was asked for, on what it ran, and its numbers, in a directory of plain files."""

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
STEPS, VALIDATIONS = "steps.jsonl", "validations.jsonl"


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

    Each call adds the lines that are new. A run that goes on from a checkpoint goes on in the same files.

    Options: config: whatever is to be remembered, as JSON. writer: for TensorBoard: an object with the method
             add_scalar(name, value, step), such as torch.utils.tensorboard.SummaryWriter or that of tensorboardX.
    Raises:  TypeError if config is not JSON, or writer has no such method; NotADirectoryError if directory is a file.
    """
    folder = Path(directory).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"run_record: {folder} is a file")
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"run_record: writer needs a method add_scalar(name, value, step), got {describe(writer)}")
    try:
        json.dumps(dict(config or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"run_record: config must be what JSON has: {error}") from None

    def keep(fit: Fit) -> None:
        if not isinstance(fit, Fit):
            raise TypeError(f"run_record: expected a Fit, got {describe(fit)}")
        if jax.process_index() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run.json").exists():
            (folder / "run.json").write_text(json.dumps({"config": dict(config or {}), **surroundings()}, indent=1))
        for name, rows in ((STEPS, rows_of_steps(fit)), (VALIDATIONS, rows_of_validations(fit))):
            tag = "train" if name == STEPS else "validation"
            for row in added(folder / name, rows):
                if writer is not None:
                    write(writer, tag, row)
        if fit.stopped:
            end(folder, fit)

    return keep


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


def rows_of_steps(fit: Fit) -> list[dict[str, Any]]:
    """A row for each step of the history."""
    columns = fit.history.steps()
    return [{name: as_json(column[i]) for name, column in columns.items()} for i in range(len(fit.history.loss))]


def rows_of_validations(fit: Fit) -> list[dict[str, Any]]:
    """A row for each validation of the history, with the metrics that are numbers."""
    columns = fit.history.validations()
    return [{name: as_json(column[i]) for name, column in columns.items()} for i in range(len(columns["step"]))]


def added(path: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Write the rows behind the last step of a file, and yield them."""
    last = last_step(path)
    new = [row for row in rows if row["step"] > last]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in new)
    yield from new


def last_step(path: Path) -> int:
    """The step of the last whole line of a file, 0 without one. What a kill has left of a line is cut off."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return json.loads(whole[whole[:-1].rfind(b"\n") + 1 :])["step"] if whole else 0


def write(writer: Any, tag: str, row: dict[str, Any]) -> None:
    """The numbers of a row, for TensorBoard."""
    for name, value in row.items():
        if name != "step" and value is not None:
            writer.add_scalar(f"{tag}/{name}", value, row["step"])


def end(folder: Path, fit: Fit) -> None:
    """How the run ended, and its figure."""
    best = None if fit.best is None else {"step": fit.best.step, "loss": fit.best.loss}
    told = {"stopped": fit.stopped, "message": fit.message, "step": fit.step, "best": best}
    told["seconds"] = round(fit.history.seconds, 3)
    (folder / "result.json").write_text(json.dumps(told, indent=1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in ((STEPS, "training"), (VALIDATIONS, "validation")):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        drawn = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
        if drawn:
            axes.plot(*np.asarray(drawn).T, label=label, linewidth=1 if name == STEPS else 2)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
