"""The report: rows and faults, the table in a terminal and in a log, the figure."""

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnbp
from fnbp.comparison.report import FAULTS, Row

RIGHT = Row("serial[0].dense(3)", "W", (3, 7), "float32", error=1e-16, limit=7e-15, z=1.2, rho=0.9, whole=2e-16)
WRONG = Row(
    "serial[2].tanh",
    "x",
    (13, 3),
    "float32",
    "formula",
    0.5,
    7e-15,
    1e14,
    None,
    0.5,
    "given",
    (3, 1),
    0.25,
    -0.5,
    "it is x",
)
BELOW = Row("serial[1].relu", "x", (13, 3), "float32", "inherits", 0.0, 7e-15, 0.0, 0.0, 0.5)
KINK = Row(
    "serial[1].relu", "x", (13, 3), "float32", "convention", probe="zeros", index=(0, 0), manual=1.0, automatic=0.0
)
REPORT = fnbp.Report((RIGHT, BELOW, WRONG), {"jit": "ok", "vmap": "WRONG"}, ("a note",), (KINK,))


def test_faults_come_from_the_output_down():
    low = Row("serial[0].dense(3)", "b", (3,), "float32", "precision")
    report = fnbp.Report((RIGHT, low, BELOW, WRONG))
    assert report.faults == (WRONG, low) and report.first_fault is WRONG and not report.ok


def test_what_inherits_or_is_a_convention_is_no_fault():
    report = fnbp.Report((RIGHT, KINK))
    assert report.ok and report.faults == () and report.first_fault is None
    report.raise_if_bad()


def test_worst_is_the_largest_error_by_itself_or_in_the_whole_pass():
    assert REPORT.worst == 0.5
    assert fnbp.Report((RIGHT,)).worst == 2e-16
    assert fnbp.Report(()).worst == 0.0


@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_is_one(kind):
    row = Row("f", "x", (), "float32", kind)
    assert not row.ok and row.verdict == kind.upper() and not fnbp.Report((row,)).ok


def test_the_plain_text_says_it_all():
    text = str(REPORT)
    lines = text.splitlines()
    assert lines[0].strip() == "manual against automatic: WRONG"
    flat = " ".join(text.split())
    assert (
        "first fault: serial[2].tanh -> dx: formula on 'given', worst at [3, 1]: manual +0.25, automatic -0.5: it is x"
        in flat
    )
    assert "serial[1].relu -> dx: convention on 'zeros'" in flat
    assert "1 leaves below inherit the error; told the right delta, they are right" in flat
    assert "jit ok · vmap WRONG" in flat and "note: a note" in flat
    assert "\x1b" not in text
    assert all(
        name in flat for name in ("layer", "leaf", "shape", "error", "z", "rho", "whole pass", "verdict", "FORMULA")
    )


def test_a_clean_report_is_short():
    text = str(fnbp.Report((RIGHT,), {"jit": "ok"}))
    assert "manual against automatic: ok" in text and "fault" not in text and text.splitlines()[-1] == "jit ok"


def test_colours_are_only_for_a_terminal():
    console = Console(force_terminal=True, width=150, record=True)
    with console.capture() as capture:
        console.print(REPORT)
    assert "\x1b[" in capture.get()


def test_a_column_for_the_whole_pass_only_where_there_is_one():
    alone = Row("f", "x", (3,), "float32")
    assert "whole pass" not in str(fnbp.Report((alone,)))


def test_the_figure_shows_every_leaf_and_marks_the_fault(tmp_path):
    figure = REPORT.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    (axes,) = figure.axes
    assert [label.get_text().split()[-1] for label in axes.get_yticklabels()] == ["dW", "dx", "dx"]
    assert "first fault: serial[2].tanh -> dx" in figure.get_suptitle()
    crosses = [line for line in axes.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(0.5, 2)]


def test_errors_of_zero_and_infinity_stay_on_the_figure():
    infinite = Row("f", "x", (3,), "float32", "nonfinite", error=np.inf)
    figure = fnbp.Report((infinite, RIGHT)).plot()
    low, high = figure.axes[0].get_xlim()
    for line in figure.axes[0].lines:
        assert all(low < x < high for x in line.get_xdata())


ODD_NAMES = ["d[/x]", "block[encoder]", "[bold]", "a\\[b]", "$x_1$", ":smile:"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_printed_as_it_is(name, tmp_path):
    layer = fnbp.tanh()._replace(name=name)
    net = fnbp.serial(fnbp.dense(3), layer, name=name)
    x = jnp.ones((5, 2))
    wrong = fnbp.map_layers(
        lambda path, leaf: leaf._replace(backward=lambda p, res, dy: ({}, -dy)) if leaf.name == name else leaf, net
    )
    report = fnbp.compare(wrong, x, probes=("given",), transforms=())
    assert name in str(report) and name in report.first_fault.path
    report.plot(tmp_path / "figure.png")
