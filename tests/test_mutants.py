"""The mutants: every backward is found and spoilt, their names last, and compare catches what it should."""

import ast
import functools
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest

import fnbp
from experiments.mutants import __main__ as mutants
from experiments.mutants import catalogue as mutations
from experiments.mutants import code as mutations_code
from experiments.mutants import equivalent as mutations_equivalent
from experiments.mutants import sites as mutations_sites
from experiments.mutants import trials as mutations_trials
from experiments.shared import report
from fnbp.layers import activation

ROOT = Path(__file__).parents[1]


@functools.cache
def catalogue():
    return mutations.catalogue()


def named(part):
    """The first mutant whose id is that; * is for anything."""
    is_that = mutations_equivalent.pattern(part).fullmatch
    return next(m for m in catalogue() if is_that(m.id))


HELPED = {  # their backward is another function's, which is held to have mutants instead
    "activation": "tanh",
    "flatten": "reshaping",
    "reshape": "reshaping",
    "dropout": "dropping",
    "drop_path": "dropping",
    "binary_cross_entropy": "of_logits",
}
OTHERS = {"dropping", "Outer", "Sum", "of_pairs", "parameterless", "counting", "of_logits", "of_probabilities"}
OTHERS |= {"one_part", "JOINS", "cut", "times_others", "Turns", "Stacked", "Shared", "Cast", "Lookup", "Correlation"}
SHARED = {"share", "left", "mean", "complement", "kept", "where", "over_batch", "convolve_back", "over_time"}


def test_every_backward_of_the_library_is_spoilt():
    of = Counter(mutant.owner for mutant in catalogue())
    made = set(mutations_trials.constructors()) - set(HELPED)
    assert {"dense", "gelu", "serial", "skip", "softmax_cross_entropy", "half_squared_error"} <= made
    for name in {*made, *HELPED.values(), *OTHERS, *SHARED}:
        assert of[name] >= 3, name
    sites = {mutant.site for mutant in catalogue()}
    for file in mutations_sites.files():
        tops = ast.parse((mutations_sites.PACKAGE / file).read_text()).body
        for owner, node in (
            (top.name, node) for top in tops if isinstance(top, ast.FunctionDef) for node in ast.walk(top)
        ):
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("backward", "dloss")):
                assert f"{owner}.{node.name}" in sites


def test_ids_are_many_unique_and_the_same_each_time():
    ids = [mutant.id for mutant in catalogue()]
    assert len(ids) >= 1000 and len(set(ids)) == len(ids)
    assert [mutant.id for mutant in mutations.catalogue()] == ids
    codes = {(mutant.file, mutant.statement, mutant.code) for mutant in catalogue()}
    assert len(codes) == len(ids)


def test_every_mutant_is_python():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mutant in catalogue():
            compile(mutant.code, mutant.id, "exec")


def test_a_mutant_is_the_library_but_for_one_statement():
    mutant = named("layers/activation.py:tanh.backward:sign: y -> -y in dy * (1 + y) * (1 - y)")
    fresh = mutations_code.run(mutant.file, mutant.code, mutant.statement, mutant.id)
    assert "1 + -y" in mutant.code or "1 - -y" in mutant.code
    assert set(fresh.ACTIVATIONS) == set(activation.ACTIVATIONS)
    ours, theirs = fnbp.tanh(), fresh.tanh()
    y, _, res = ours.forward({}, {}, jnp.ones(3) / 2, fnbp.Context())
    assert (theirs.forward({}, {}, jnp.ones(3) / 2, fnbp.Context())[0] == y).all()
    assert (theirs.backward({}, res, y)[1] != ours.backward({}, res, y)[1]).all()


CAUGHT = (
    ("layers/activation.py:gelu_tanh.backward:constant: 0.044715 -> 0.044715044715 in *", "formula"),
    ("layers/activation.py:softplus.backward:precision: result: through float32", "formula"),
    ("layer.py:parameterless.backward_lifted:zeroed: dx: one element zeroed", "formula"),
    ("layers/norm.py:batch_norm.backward:name: counts -> dy in left(x, mu, counts)", "formula"),
    ("arrays/sums.py:wide:moved: result: summed over axis 0", "formula"),
    ("layers/activation.py:sigmoid.backward:traced: result: needs its values", "jit"),
    ("layers/activation.py:log_softmax.forward saves:residual: y: saved in bfloat16", "formula"),
    ("layers/dense.py:dense.backward:zeroed: Outer[0] of 'W': one element zeroed", "formula"),
    ("losses/squared.py:half_squared_error.dloss:stray term: result: a stray 1e-8", "formula"),
    ("losses/loss.py:of_pairs.backward:dropped: share(at, dloss(wide(p), t)) -> dloss(wide(p), t)*", "formula"),
    ("combinators/wrappers.py:skip.backward:dropped: dy + dx -> dx in *", "formula"),
    ("factor.py:Sum.total:scaled: result: divided by its last axis", "formula"),
)


@pytest.mark.parametrize(("part", "fault"), CAUGHT, ids=[part for part, _ in CAUGHT])
def test_compare_catches(part, fault):
    found = mutations_trials.judged(named(part), with_peer=False)
    assert (found["fault"], found["in"]) == (fault, "float32")


def test_an_equivalent_mutant_survives_with_a_reason():
    mutant = named("layers/activation.py:relu.forward saves:residual: x > 0 -> x >= 0 in (x > 0,)")
    found = mutations_trials.judged(mutant, with_peer=False)
    assert found["fault"] == "" and mutations_equivalent.reason_of(mutant.id)


def test_reasons_are_of_mutants_that_exist():
    for text, reason in mutations_equivalent.EQUIVALENT:
        assert reason and any(mutations_equivalent.pattern(text).fullmatch(m.id) for m in catalogue()), text


@pytest.mark.parametrize("name", sorted(set(mutations_trials.constructors()) - {"activation"}))
def test_every_constructor_has_trials(name):
    assert mutations_trials.trials(name), f"add calls of {name} to TABLE in experiments/mutants/table.py"


def test_a_constructor_that_cannot_be_called_is_named():
    with pytest.raises(report.InputError, match=r"TABLE .* has no call of nowhere"):
        mutations_trials.trials("nowhere")


@pytest.mark.slow
def test_the_command_judges_in_processes_of_its_own(tmp_path):
    options = ["--only", "identity.backward", "--limit", "2", "--no-originals", "--no-peer", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "experiments.mutants", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "mutants.jsonl").read_text().splitlines()) == 2


def test_an_interrupted_run_is_resumed(tmp_path):
    path = tmp_path / "mutants.jsonl"
    path.write_text(json.dumps({"id": "a", "site": "s", "code": "b", "fault": "formula"}) + '\n{"id": "cut o')
    assert mutants.earlier(path) == {("s", "b"): {"id": "a", "site": "s", "code": "b", "fault": "formula"}}
    assert mutants.earlier(tmp_path / "absent") == {}


def test_what_is_chosen():
    assert {m.owner for m in mutants.choose(catalogue(), mutants.Settings(only="gelu."))} == {"gelu"}
    assert len(mutants.choose(catalogue(), mutants.Settings(limit=11))) == 11
    with pytest.raises(report.InputError, match="no mutant's id contains"):
        mutants.choose(catalogue(), mutants.Settings(only="nothing of that name"))


def test_totals_and_figure(tmp_path, capsys):
    rows = [
        ("formula", "", ""),
        ("formula", "AssertionError", ""),
        ("", "", "same"),
        ("", "", ""),
        ("raises", "TypeError", ""),
    ]
    found = [
        {
            "id": f"{i}",
            "site": "s",
            "class": "sign",
            "fault": f,
            "peer": p,
            "reason": r,
            "in": "float32" if f else "",
            "apart": 0.0,
            "hint": "",
        }
        for i, (f, p, r) in enumerate(rows)
    ]
    measured = mutants.totals(found, [])
    assert (measured["planted"], measured["equivalent"], measured["caught"], measured["not_explained"]) == (5, 1, 3, 1)
    assert (measured["rate"], measured["peer_rate"], measured["silent_rate"]) == (3 / 4, 2 / 4, 2 / 3)
    mutants.say(measured, found, True)
    assert "NOT EXPLAINED" in capsys.readouterr().out
    mutants.figure(tmp_path / "figure.png", found, True)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
