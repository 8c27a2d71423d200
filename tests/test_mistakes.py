"""The mistakes: their right backwards are right, each mistake is one, and compare names some of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from experiments.mistakes import __main__ as mistakes
from experiments.mistakes.catalogue import CATALOGUE
from experiments.shared import report

pytestmark = pytest.mark.slow  # compare on every entry

CASES = {(m.f, m.draw): [n for n in CATALOGUE if (n.f, n.draw) == (m.f, m.draw)] for m in CATALOGUE}
FAST = {"xla_backend_optimization_level": 0}


def wide(args):
    """Floating arguments in float64."""
    return tuple(a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args)


def relative(a, b):
    """Infinite for another shape; NaN for NaN."""
    return np.linalg.norm(a - b) / (np.linalg.norm(b) or 1) if a.shape == b.shape else np.inf


def test_all_numbers_are_there_and_no_title_is_there_twice():
    assert [m.number for m in CATALOGUE] == sorted(m.number for m in CATALOGUE)
    assert {m.number for m in CATALOGUE} == set(range(1, 55))
    assert len({(m.f, m.title) for m in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    "group", CASES.values(), ids=[f"{group[0].number}-{f.__name__}" for (f, _), group in CASES.items()]
)
def test_right_backwards_equal_jax_and_mistaken_ones_do_not(group, x64):
    f, args = group[0].f, wide(group[0].args(1))
    y = jax.eval_shape(f, *args)
    dy = np.random.default_rng(2).standard_normal(y.shape)

    def gradients(args, dy):
        moving = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]
        automatic = jax.vjp(f, *args)[1](dy)
        sides = [automatic, group[0].right(args, dy), *(m.wrong(args, dy) for m in group)]
        return [[side[i] for i in moving] for side in sides]

    compiled = jax.jit(gradients).lower(args, dy).compile(compiler_options=FAST)
    automatic, right, *wrong = jax.tree.map(np.asarray, compiled(args, dy))
    assert max(map(relative, right, automatic)) < 1e-9
    for m, side in zip(group, wrong, strict=True):
        assert not all(relative(a, b) < 1e-9 for a, b in zip(side, automatic, strict=True)), m.title


@pytest.mark.parametrize(
    "title, kind, leaf, hint",
    [
        ("dW transposed", "formula", "W", "transposed"),
        ("relu'(0) = 1", "convention", "x", "kink"),
        ("dW noisy: rounded at random", "random", "W", "called twice"),
    ],
)
def test_compare_names_the_mistake(title, kind, leaf, hint):
    (mistake,) = (m for m in CATALOGUE if m.title == title)
    said = fnbp.compare(mistake.f, *mistake.args(0), vjp=mistake.wrong, probes=("given",), transforms=())
    row = said.first_fault or said.conventions[0]
    assert said.ok == (kind == "convention")
    assert (row.kind, row.leaf) == (kind, leaf) and hint in row.hint


def test_the_table_of_one_mistake(tmp_path, capsys):
    assert mistakes.main(mistakes.Settings(only=(48,), out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["ok"] and measured["caught"] == measured["faults"] == 1
    assert measured["conventions_recognised"] == 1 and measured["false_alarms"] == 0
    assert "explained: convention" in capsys.readouterr().out


def test_an_unknown_number_is_refused(tmp_path):
    with pytest.raises(report.InputError, match="no mistake 55"):
        mistakes.main(mistakes.Settings(only=(55,), out=tmp_path))
