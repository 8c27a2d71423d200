"""What compare costs: seconds from the call to the report, compilation included, each in a process of its own."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.shared import report

MINUTES = 3  # on two CPU cores

NETS = ("digits", "lstm", "lenet", "gpt")


@dataclass
class Settings:
    """Settings of the table."""

    levels: tuple[str, ...] = ("quick", "full")
    """The levels of compare to time."""
    only: str = ""
    """One of digits, lstm, lenet, gpt; by default all."""
    out: Path = Path("results/comparison_cost")
    """The folder for result.json."""


def seconds_of(name: str, level: str) -> float:
    """The seconds of one comparison of a net at its usual loss, here and now."""
    import jax
    import numpy as np

    import fnbp

    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    x, y = {
        "digits": lambda: (drawn(8, 64), rng.integers(0, 10, 8)),
        "lstm": lambda: (drawn(4, 7, 5), rng.integers(0, 3, 4)),
        "lenet": lambda: (drawn(4, 28, 28, 1), rng.integers(0, 10, 4)),
        "gpt": lambda: (rng.integers(0, 11, (2, 8)), rng.integers(0, 11, (2, 8))),
    }[name]()
    net = {
        "digits": lambda: fnbp.models.mlp(30, 10),
        "lstm": lambda: fnbp.models.lstm_classifier(16, 3),
        "lenet": lambda: fnbp.models.lenet(),
        "gpt": lambda: fnbp.models.gpt(vocabulary=11, length=8, layers=2, heads=2, width=16),
    }[name]()
    x, y = (np.asarray(a, np.int32) if a.dtype == np.int64 else a for a in (x, y))
    jax.block_until_ready(jax.numpy.zeros(3) + 1)
    began = time.perf_counter()
    said = fnbp.compare(net, x, loss=fnbp.softmax_cross_entropy(), y=y, level=level)
    seconds = time.perf_counter() - began
    said.raise_if_bad()
    return seconds


def main(settings: Settings) -> int:
    """Time every net at every level. Returns: 0."""
    found = {}
    for name in NETS if not settings.only else (settings.only,):
        if name not in NETS:
            raise report.InputError(f"--only: expected one of {', '.join(NETS)}, got {name}")
        for level in settings.levels:
            code = f"from experiments.comparison_cost import seconds_of; print(seconds_of({name!r}, {level!r}))"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{name} at {level}: {done.stderr.strip().splitlines()[-1]}")
            found[f"{name}_{level}"] = float(done.stdout.split()[-1])
            report.console.print(f"{name} {level}: {found[f'{name}_{level}']:.1f} s")
    report.save(settings.out, settings, found)
    return 0


if __name__ == "__main__":
    report.run(Settings, main)
