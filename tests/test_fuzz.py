"""The fuzzer knows every constructor, tells faults from what is as it should be, and finds none."""

import inspect

import jax.numpy as jnp
import jaxtyping
import pytest

import fnbp
from tests import fuzz
from tests.fuzz_cases import KINDS, NAMES, TABLE, Case, draw
from tests.test_house import constructors, returns

SEED, CASES, STEP = 0, 5000, 40


@pytest.fixture(autouse=True)
def as_a_user_meets_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_the_table_covers_every_constructor():
    models = inspect.getmembers(fnbp.models, inspect.isfunction)
    models = {f"models.{name}" for name, f in models if returns(f) == "Layer"}
    helpers = {"stateless", "map_layers", "replace_functions", "loss_from_jax"}  # made of functions
    assert set(TABLE) == (set(constructors()) | models) - helpers


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_table_names_every_option(name):
    function = fnbp
    for part in name.split("."):
        function = getattr(function, part)
    options = [option.lstrip("*").replace("=", ":").split(":") for option in TABLE[name].options.split()]
    parameters = inspect.signature(function).parameters.values()
    assert [option for option, _ in options] == [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
    assert all(kind in KINDS or kind in ("layer", "same") for _, kind in options)


def test_a_case_is_drawn_by_its_seed_and_index():
    assert draw(3, 17) == draw(3, 17)
    assert draw(3, 17) != draw(3, 18)


def planted(kind):
    """A constructor of a layer with a fault of that kind."""

    def constructor(n_out):
        if kind != "accepted":
            fnbp.dense(n_out)

        def forward(params, x):
            if kind == "raw":
                return x[0, 0, 0, 0, 0], ()
            if kind == "nested":
                return [][0], ()
            if kind == "unnamed":
                raise ValueError("x does not fit")
            if kind == "named":
                raise ValueError(f"planted({n_out}): x does not fit")
            return (jnp.log(-(x**2)) if kind == "nan" else 2 * x), ()

        def backward(params, res, dy):
            return {}, (3 if kind == "wrong" else 2) * dy[..., : 2 if kind == "form" else None]

        return fnbp.stateless(lambda key, x: {}, forward, backward, f"planted({n_out})")

    return constructor


@pytest.mark.parametrize(
    ("kind", "call", "marks", "due"),
    [
        ("right", "planted(3)", (), "agrees"),
        ("named", "planted(3)", (), "refused"),
        ("wrong", "planted(3)", (), "wrong"),
        ("raw", "planted(3)", (), "raw"),
        ("nested", "fnbp.serial(planted(3))", (), "raw"),
        ("unnamed", "planted(3)", (), "unnamed"),
        ("unnamed", "fnbp.serial(planted(3))", (), "refused"),
        ("accepted", "planted(-1)", ("n_out=-1",), "accepted"),
        ("nan", "planted(3)", (), "accepted"),
        ("form", "planted(3)", (), "accepted"),
    ],
)
def test_it_tells_planted_faults(kind, call, marks, due, monkeypatch):
    monkeypatch.setitem(NAMES, "planted", planted(kind))
    outcome = fuzz.examine(Case(call, marks=marks))
    assert outcome.kind == due, outcome


def test_a_case_that_takes_too_long_is_slow(monkeypatch):
    def planted(n_out):
        while True:
            n_out += 1

    monkeypatch.setitem(NAMES, "planted", planted)
    assert fuzz.examine(Case("planted(3)"), seconds=0.1).kind == "slow"


def test_the_line_of_a_case_runs():
    line = Case("fnbp.dense(3)", "arr((2, 4))", "spec(arr((2, 4)))").line()
    exec(line, NAMES.copy())


def test_the_command_reports_faults_and_exits_1(monkeypatch, capsys):
    fault = {"kind": "raw", "stage": "init", "message": "IndexError: 3", "line": "net = ...", "seconds": 0.1}
    monkeypatch.setattr(fuzz, "results", lambda tasks, workers: [fault | {"index": 0, "constructor": "dense"}])
    assert fuzz.main(["--cases", "1"]) == 1
    assert "raw dense, 1 times, at init, index 0: IndexError: 3\n    net = ..." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("index", range(0, CASES, STEP))
def test_it_finds_no_fault(index):
    done = fuzz.run((SEED, index, ""))
    assert done["kind"] not in fuzz.FAULTS, f"{done['kind']} at {done['stage']}: {done['message']}\n{done['line']}"
