"""What every experiment does around its claim: read settings, print tables, write a figure and a result.json."""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fnbp

matplotlib.use("Agg")
console = Console(width=None if sys.stdout.isatty() else 120)

INK, MANUAL, AUTOMATIC, ACCENT = "#222222", "#0b6e99", "#e08e0b", "#b3261e"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


class InputError(Exception):
    """A mistake of the person at the keyboard, reported in a sentence without a traceback."""


def run(settings_type: type, main: Callable[[Any], int]) -> None:
    """Parse the command line into settings, run main on them, and exit with its code, or with 2 after an InputError."""
    settings = tyro.cli(settings_type, description=sys.modules[settings_type.__module__].__doc__)
    try:
        if getattr(settings, "out", None) is not None:
            make_folder(settings.out)
        code = main(settings)
    except InputError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        code = 2
    sys.exit(code)


def make_folder(out: Path) -> None:
    """Make the folder for results before anything is computed. Raises: InputError if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from error


def save(out: Path, settings: Any, measured: dict[str, Any]) -> None:
    """Write result.json: the command, its settings, the measured figures, the day, the versions, the device."""
    result = {
        "command": command_of(settings),
        "date": date.today().isoformat(),
        "settings": {name: plain(value) for name, value in asdict(settings).items()},
        "measured": {name: plain(value) for name, value in measured.items()},
        "versions": versions(),
        "device": device(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"\nsaved {out / 'result.json'}", highlight=False)


PLACES = (
    "out",
    "data_folder",
    "download",
    "jobs",
    "resume",
    "checkpoint",
    "rank",
    "coordinator",
)  # settings that change no figure


def command_of(settings: Any) -> str:
    """What a shell is given to run with these settings: "python -m experiments.digits --seed 1"."""
    module = sys.modules[type(settings).__module__]
    spec = getattr(module, "__spec__", None)
    name = (spec.name if spec is not None else module.__name__).removesuffix(".__main__")
    words = [f"python -m {name}"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in PLACES and value != field.default:
            words += option(field.name.replace("_", "-"), value)
    return " ".join(words)


def option(name: str, value: Any) -> list[str]:
    """The words of one option on a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *(shlex.quote(str(one)) for one in values)]


def plain(value: Any) -> Any:
    """A value in the types of JSON."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def share_compiled(folder: str) -> None:
    """In a worker process: load what other workers have compiled. Call it before the first computation."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def spread(f: Callable, tasks: list[tuple], jobs: int, log: Path, title: str) -> Iterator[dict[str, Any]]:
    """Run f on every task, in processes that share what they compile; write each result to log as it comes."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as compiled,
        log.open("w") as lines,
        ProcessPoolExecutor(jobs, spawn, share_compiled, (compiled,)) as pool,
    ):
        waiting = [pool.submit(f, *task) for task in tasks]
        for done in track(as_completed(waiting), title, total=len(waiting), console=console):
            result = done.result()
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            yield result


def versions() -> dict[str, str]:
    """The versions of the software that the figures depend on."""
    modules = {"jax": jax, "numpy": np, "optax": optax}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


def device() -> dict[str, Any]:
    """The device and the machine that run this process."""
    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def count(params: Any) -> int:
    """The number of numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def accuracy(net: fnbp.Layer) -> Callable[[Any, Any, Any, Any], jax.Array]:
    """(params, state, x, y) -> the fraction of examples whose largest output is that of their label; jitted."""

    @jax.jit
    def fraction(params, state, x, y):
        prediction, _, _ = net.forward(params, state, x, fnbp.Context())
        return (prediction.argmax(-1) == y).mean()

    return fraction


def figures(rows: list[tuple[str, str]]) -> Table:
    """A table of measured figures, one on each line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    return table
