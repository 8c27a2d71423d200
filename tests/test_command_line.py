"""python -m fnbp compare: what it prints, what it writes, its exit codes, and its answers to mistakes."""

import json
import subprocess
import sys

import pytest

from fnbp.__main__ import main

MODULE = """
import jax, jax.numpy as jnp
import fnbp

right = fnbp.serial(fnbp.dense(5), fnbp.tanh())

def make():
    return fnbp.sigmoid()

def not_a_layer():
    return 3

def crashes():
    raise RuntimeError("out of order")

def needs(n):
    return fnbp.dense(n)

def wrong():
    return fnbp.tanh()._replace(backward=lambda params, res, dy: ({}, -dy))

def f(x, w):
    return jnp.sin(x) @ w

def backward(args, dy):
    x, w = args
    return jnp.cos(x) * (dy @ w.T), jnp.sin(x).T @ dy

class inner:
    layer = fnbp.softplus()

@jax.custom_vjp
def g(x):
    return jnp.sin(x)

g.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x),))
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "written_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("written_here", None)
    return tmp_path


def run(*words):
    return main(["compare", *words])


RIGHT = {
    "a_layer": ("written_here:right", "--inputs", "3x7"),
    "a_maker": ("written_here:make",),
    "inside_a_class": ("written_here:inner.layer", "--inputs", "3x7:bfloat16"),
    "a_function": ("written_here:f", "--vjp", "written_here:backward", "--inputs", "3x7", "7x2"),
    "a_custom_vjp_alone": ("written_here:g", "--inputs", "5", "--level", "quick"),
    "a_custom_vjp": ("written_here:g", "--reference", "jax.numpy:sin", "--inputs", "5"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_ends_with_0(name, capsys):
    assert run(*RIGHT[name]) == 0
    assert "manual against automatic: ok" in capsys.readouterr().out


def test_what_is_wrong_ends_with_1_and_is_written_down(module, capsys):
    assert run("written_here:wrong", "--json", "report.json", "--plot", "report.png") == 1
    assert "first fault: tanh -> dx: formula" in capsys.readouterr().out
    assert json.loads((module / "report.json").read_text())["faults"][0]["path"] == "tanh"
    assert (module / "report.png").stat().st_size > 10_000


SLIPS = {
    "no_colon": (("written_here",), "'written_here' is not MODULE:ATTRIBUTE, for example"),
    "no_module": (("nowhere.at_all:x",), "no module named 'nowhere'"),
    "no_attribute": (("written_here:rihgt",), "written_here has no attribute 'rihgt'; did you mean right?"),
    "no_layer": (
        ("written_here:not_a_layer",),
        "written_here:not_a_layer has type int; expected a Layer or a function",
    ),
    "a_function_alone": (("written_here:f",), "give --reference or --vjp to compare it"),
    "no_vjp": (("written_here:f", "--vjp", "written_here:bakward"), "did you mean backward?"),
    "no_shape": (("written_here:right", "--inputs", "3by7"), "'3by7' is not an input; expected for example 7x11"),
    "no_dtype": (("written_here:right", "--inputs", "3x7:floaty"), "'3x7:floaty' is not an input"),
    "one_too_many": (("written_here:right", "--inputs", "3x7", "3"), "a Layer is compared at one x, got 2"),
    "integers": (
        ("written_here:g", "--reference", "jax.numpy:sin", "--inputs", "5:int32:9"),
        "no floating point argument",
    ),
    "params_that_do_not_fit": (
        ("written_here:f", "--vjp", "written_here:backward", "--inputs", "3x7", "3x2"),
        "dot_general",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_ends_with_2_and_a_sentence(name, capsys):
    words, message = SLIPS[name]
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in " ".join(said.err.split()) and "Traceback" not in said.err


def test_a_crash_of_the_subject_ends_with_2_and_its_traceback(capsys):
    assert run("written_here:crashes") == 2
    said = capsys.readouterr()
    assert "RuntimeError: out of order" in said.err and said.out == ""


def test_a_report_that_cannot_be_written_ends_with_2(capsys):
    assert run("written_here:right", "--inputs", "3x7", "--json", "/nowhere/report.json") == 2
    assert "the report cannot be written" in " ".join(capsys.readouterr().err.split())


def test_it_runs_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", "fnbp", "compare", "--help"], capture_output=True, text=True, check=False, cwd=module
    )
    assert done.returncode == 0 and "MODULE:ATTRIBUTE" in done.stdout
