"""experiments.distributed: processes that agree with one device, that die, that do not answer, that disagree."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import distributed
from experiments.shared.report import InputError

ROOT = Path(__file__).parents[1]


def words(out, *options):
    return [sys.executable, "-m", "experiments.distributed", *map(str, options), "--out", str(out)]


def begin(out, *options):
    return subprocess.Popen(
        words(out, *options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain()
    )


def plain():
    return {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}


@pytest.mark.parametrize(
    "given, text",
    [
        ({"processes": 0}, "--processes must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"devices": 0}, "--devices must be at least 1, got 0"),
        ({"rank": 0}, "give --rank and --coordinator together"),
        ({"coordinator": "127.0.0.1:1"}, "give --rank and --coordinator together"),
        ({"rank": 2, "coordinator": "127.0.0.1:1", "processes": 2}, "--rank must be from 0 to 1, got 2"),
        ({"cluster": True, "processes": 2}, "leave out --processes and --rank"),
    ],
)
def test_what_is_refused(given, text):
    with pytest.raises(InputError, match=text):
        distributed.main(distributed.Settings(**given))


@pytest.mark.parametrize("given, text", [({"batch_size": 6}, "6 cannot be split over 4"), ({"model": 3}, "--model 3")])
def test_a_mesh_that_does_not_fit_is_refused(given, text):
    with pytest.raises(InputError, match=text):
        distributed.main(distributed.Settings(**given))


def test_a_coordinator_that_does_not_answer_is_told_in_time():
    began = time.monotonic()
    where = f"127.0.0.1:{distributed.free_port()}"
    with pytest.raises(InputError, match=f"the coordinator {where} did not answer within 0.5 s"):
        distributed.check_answers(where, 0.5)
    assert time.monotonic() - began < 5
    with pytest.raises(InputError, match=r"must be an address such as 10\.0\.0\.1:5000, got here"):
        distributed.check_answers("here", 0.5)


def test_the_options_of_a_process_give_the_settings_again():
    settings = distributed.Settings(train="gpt", devices=2, fully=True, steps=7, out=Path("a b"))
    assert distributed.options(settings) == [
        "--train", "gpt", "--devices", "2", "--fully", "--steps", "7", "--out", "'a b'",
    ]  # fmt: skip


def test_four_devices_agree_with_one(tmp_path):
    assert distributed.main(distributed.Settings(steps=20, fully=True, out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["devices"] == 4 and measured["losses_apart"] <= 1e-5 and measured["share_of_parameters"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("processes, options", [(2, ()), (4, ("--fully",)), (2, ("--train", "gpt", "--explicit"))])
def test_processes_have_the_losses_of_one(tmp_path, processes, options):
    done = begin(tmp_path, "--processes", processes, *options)
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 0, said
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["processes"] == processes
    assert measured["losses_apart"] <= 1e-5 and measured["gradients_apart"] <= 1e-5


def children(of):
    """The processes that it has started, by the order in which they were."""
    text = Path(f"/proc/{of.pid}/task/{of.pid}/children").read_text()
    return [int(number) for number in text.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_run_with_an_error_and_it_goes_on(tmp_path, which):
    saved = tmp_path / "saved"
    run = begin(tmp_path, "--processes", 2, "--steps", 20_000, "--checkpoint", saved)
    try:
        until = time.monotonic() + 240
        while not saved.exists() or not any(path.name.isdigit() for path in saved.iterdir()):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        os.kill(children(run)[which], signal.SIGKILL)
        killed = time.monotonic()
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1 and time.monotonic() - killed < distributed.GRACE + 20
    assert f"error: process {which} of 2 was killed by SIGKILL" in said
    reached = max(int(path.name) for path in saved.iterdir() if path.name.isdigit())
    run = begin(tmp_path, "--processes", 2, "--steps", reached + 20, "--checkpoint", saved)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and re.search(r"one device and many +agree", said), said
    assert (saved / str(reached + 20)).exists()


@pytest.mark.slow
def test_processes_that_were_given_different_settings_say_so(tmp_path):
    where = f"127.0.0.1:{distributed.free_port()}"
    common = ("--processes", 2, "--coordinator", where, "--timeout", 60)
    runs = [begin(tmp_path, *common, "--rank", rank, "--seed", rank) for rank in (0, 1)]
    for rank, run in enumerate(runs):
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 2, said
        assert f"different settings; process {rank} has seed {rank}" in " ".join(said.split())
