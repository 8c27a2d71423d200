"""Time several sides of one thing in turns, those of PyTorch in a process of their own."""

import multiprocessing
import os
import time
from typing import Any

import numpy as np

from experiments.bench import in_torch
from experiments.shared.timing import REST, SAMPLE_SECONDS, Side


def in_rotation(sides: dict[str, Side], seconds: float, least: int, most: int, rest: bool) -> dict[str, np.ndarray]:
    """The seconds of one call of each side, in samples taken in turns; each turn begins with another side.

    seconds: how long all samples may take, but for the least number of them, or 3 of sides that take longer than that
    for one. rest: before each sample.
    """
    calls, whole = {}, 0.0
    for name, side in sides.items():
        once = side(1)  # warms up
        whole += once
        calls[name] = max(1, round(SAMPLE_SECONDS / (side(1) if once < seconds else once)))
    least = min(least, 3) if whole > seconds else least
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names, began, turn = list(sides), time.perf_counter(), 0
    while turn < least or (turn < most and time.perf_counter() - began < seconds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if rest:
                time.sleep(REST)
            taken[name].append(sides[name](calls[name]))
        turn += 1
    return {name: np.asarray(each) for name, each in taken.items()}


def quotients(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """The quartiles of the pairwise ratios: low, median, high."""
    return [float(q) for q in np.percentile(ours / theirs, (25, 50, 75))]


class Torch:
    """The process of PyTorch, for one case after another.

    In one process its threads and those of XLA would take each other's cores. So PyTorch has one of its own, with as
    many threads as there are cores; only one of both works at a time, and both rest before each sample.
    """

    def __init__(self, compiled: bool = False):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.process = spawn.Process(target=in_torch.serve, args=(there, threads, compiled), daemon=True)
        self.process.start()
        there.close()

    def ask(self, *what: Any) -> Any:
        """Send a question and wait for its answer."""
        self.pipe.send(what)
        return self.pipe.recv()

    def side(self, name: str) -> Side:
        """A case, to be timed there."""
        self.ask("make", name)
        return lambda calls: self.ask("time", calls)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()
