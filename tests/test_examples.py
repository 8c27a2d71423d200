"""Every example of experiments/examples runs from a shell, and prints what it is meant to show."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "examples"
PRINTED = {  # name -> what it prints, as regular expressions, and the package that it needs
    "check_custom_vjp": (
        [
            "backward: right",
            "forgetful: wrong",
            "dx is wrong: .* a term with the mean of dy x is missing or wrong",
        ],
        "jax",
    ),
    "in_flax": (
        [
            "same gradients: True",
            "the loss falls: True",
            "steps that the statistics have seen: 30",
            r"in use: \(12, 3\)",
        ],
        "flax",
    ),
    "in_nnx": (
        ["same gradients: True", "the loss falls: True", "steps that the statistics have seen: 32"],
        "flax",
    ),
    "in_equinox": (["the loss falls: True", "steps that the statistics have seen: 101"], "equinox"),
    "opened_flax": (
        [
            "the loss falls: True",
            "norms of the gradients of 96 images, all finite: True",
            "the kernel of the convolution: a correlation",
        ],
        "flax",
    ),
    "opened_equinox": (["the loss falls: True", "noise scale: .* it grows: True"], "equinox"),
    "new_layer": (["True", r"\(17,\)"], "jax"),
    "train_and_save": (
        [
            *(rf"serial\[{i}\]\.dense\({n}\)\.{leaf}" for i, n in ((0, 64), (2, 10)) for leaf in "Wb"),
            "the same after loading: True",
            "91% of 360 digits",
            "for PyTorch: 0.weight 0.bias 2.weight 2.bias",
        ],
        "safetensors",
    ),
    "classifier": (
        [
            r"(steps|patience): .*",
            r"accuracy 9[3-9]% at step \d+; 6 files",
            "again: the same",
        ],
        "orbax",
    ),
}


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60


def test_a_whole_training_takes_15_statements():
    body = ast.parse((FOLDER / "classifier.py").read_text()).body[1:]  # but for the docstring
    made = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    (last,) = [
        i for i, node in enumerate(made) if isinstance(node, ast.Assign) and ast.unparse(node).startswith("test =")
    ]
    assert last + 1 <= 15


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name):
    expected, package = PRINTED[name]
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.examples.{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line, pattern in zip(done.stdout.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), line
