"""fit in two processes that share parameters: what differs between them is told, and neither waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.distributed import free_port

ROOT = Path(__file__).parents[1]


def said(task):
    """What each of the two processes prints, line by line."""
    port = str(free_port())
    words = [sys.executable, "-W", "ignore", "-m", "tests.two_processes", task]
    given = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "XLA_FLAGS": ""}
    runs = [subprocess.Popen([*words, str(rank), port], **given, env=env) for rank in (0, 1)]
    try:
        done = [run.communicate(timeout=180) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], done
    return [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in done]


@pytest.mark.slow
def test_what_the_processes_hold_is_compared():
    due = (
        "fit: the processes hold different data; each gives the same, and all of it",
        "fit: the processes hold different keys; each",
        "fit: the processes hold different settings; each",
        "fit: the processes hold different settings; each",
        "split: the processes hold different arrays; each",
        "fit: the processes hold different validation data; each",
        "fit: the processes hold different batches from ",
    )
    for lines in said("different"):
        for line, words in zip(lines, due, strict=True):
            assert line.startswith(f"ValueError: {words}")


@pytest.mark.slow
def test_what_one_process_asks_or_raises_ends_both():
    there = "RuntimeError: fit: an exception was raised in another process; see what that one wrote"
    first, second = said("one_asks")
    assert first == ["asked 4", there, there, there]
    zero = "ZeroDivisionError: integer division or modulo by zero"
    assert second == ["asked 4", zero, zero, "OSError: the disk is gone"]


@pytest.mark.slow
def test_a_loader_that_is_late_in_one_process_changes_nothing():
    assert said("one_is_late") == [["True"], ["True"]]


@pytest.mark.slow
def test_what_is_split_over_processes_comes_back_whole():
    assert said("whole_at_last") == [["True", "True"], ["True", "True"]]
