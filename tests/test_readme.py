"""The front door: the README and the guide say what is so, in few words, and every block of code in them runs."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fnbp

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "fnbp/README.md")
SEPARATOR = "=== the next block ==="
LIFTS = {"stateless", "map_layers", "replace_functions"}  # they return a Layer but are no layer of their own


def text(page):
    return (ROOT / page).read_text()


def blocks(page):
    return re.findall(r"```python\n(.*?)```", text(page), re.S)


def expected(block):
    """The lines that a block says it prints: after "# > "."""
    return [line.rstrip() for line in re.findall(r"^# > (.*)$", block, re.M)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "fnbp/README.md"])
def test_each_block_of_code_prints_what_it_says(page):
    """All blocks of a page in one process, in order, with warnings as errors."""
    code = blocks(page)
    assert code
    script = f"\nprint({SEPARATOR!r})\n".join(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [part.strip("\n").splitlines() for part in done.stdout.split(SEPARATOR + "\n")]
    for block, lines in zip(code, printed, strict=True):
        assert [line.rstrip() for line in lines] == expected(block), block


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "fnbp/README.md"])
def test_a_line_of_output_stands_where_code_prints(page):
    for block in blocks(page):
        assert ("print(" in block) == bool(expected(block)), block


def test_the_readme_has_at_most_1000_words():
    assert len(text("README.md").split()) <= 1000


def test_the_two_commands_stand_on_the_first_screen():
    first = "\n".join(text("README.md").splitlines()[:30])
    for extra, command in (("experiments", "-m experiments.digits"), ("test", "-m pytest -q -n 2")):
        install = f"python3 -m venv .venv && .venv/bin/pip install -q -e '.[{extra}]'"
        assert f"```sh\n{install} && .venv/bin/python {command}\n```" in first
    assert "<!-- test command -->\n```sh\npython3 -m venv" in first  # .ci/run reads it there


def test_every_layer_and_loss_is_in_the_table_of_what_is_where():
    table = text("README.md").partition("## What is where")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    due = set(fnbp.models.__all__) | {name for name in fnbp.statistics.__all__ if name.islower()}
    for name, value in vars(fnbp).items():
        if inspect.isfunction(value) and not name.startswith("_") and name not in LIFTS:
            made = inspect.signature(value).return_annotation
            if getattr(made, "__name__", made) in ("Layer", "Loss"):
                due.add(name)
    missing = sorted(due - named)
    assert not missing, f'add {missing} to the table "What is where" of README.md, and a line to CHANGELOG.md'


def test_every_name_in_the_table_of_what_is_where_exists():
    table = text("README.md").partition("## What is where")[2].partition("\n## ")[0]
    for path in re.findall(r"`([\w.]+)`", table):
        found = path.removeprefix("fnbp.")
        assert any(hasattr(place, found) for place in (fnbp, fnbp.models, fnbp.statistics)), path


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page):
    for name in re.findall(r"\bexperiments\.(\w+)", text(page)):
        place = ROOT / "experiments" / name
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


@pytest.mark.parametrize("page", [*PAGES, "experiments/README.md", "fnbp/comparison/README.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """Files in backticks, by their path from the root of the repository."""
    for path in re.findall(r"`((?:fnbp|experiments|tests|\.github|\.ci)/[\w./]*)", text(page)):
        assert (ROOT / path).exists(), path


def test_the_guide_has_a_line_for_every_room():
    """In an order in which no room uses one below it in the table."""
    table = text("fnbp/README.md").partition("## The rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.M)
    found = {path.stem for path in (ROOT / "fnbp").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rows) == found - {"__init__"}, 'one line for each room, under "The rooms" of fnbp/README.md'
    for i, room in enumerate(rows):
        place = ROOT / "fnbp" / room
        for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for used in re.findall(r"^from fnbp(?:\.(\w+)[\w.]*)? import (\w+)", path.read_text(), re.M):
                assert (used[0] or used[1]) in rows[: i + 1], f"{path.name} uses {used}, which stands below {room}"


def test_the_guide_defines_the_labels_that_docstrings_cite():
    guide = text("fnbp/README.md")
    for label in ("B1", "B2", "B3", "B4", "B5", "B6"):
        assert guide.count(f"\n**{label}.**") == 1 and guide.count(f"\n| {label} |") == 1, label
    for path in (ROOT / "fnbp").rglob("*.py"):
        assert set(re.findall(r"fnbp/README.md, (B\d)", path.read_text())) <= {f"B{i}" for i in range(1, 7)}, path
