"""The fuzzer of losses draws what it says, tells faults from what is as it should be, and finds none."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import fnbp
from tests import fuzz_losses
from tests.fuzz import Outcome
from tests.fuzz_losses import FAULTS, SECOND, draw, drawn, examine
from tests.fuzz_losses_loops import STEPS
from tests.fuzz_losses_parts import Line, Program, Value
from tests.fuzz_losses_smaller import shrunk

KEPT = ("scan", "reverse=True", "cond", "switch", "while_loop", "fori_loop", "lax.map", "vmap", "jax.grad", "jax.jvp",
        "jax.jit", "checkpoint", "stop_gradient", "conv_general_dilated", "feature_group_count=2", "einsum", "jnp.take",
        ".add(", "kron", "concatenate", "lax.pad", "dynamic_slice", "softmax", "clip", "where", "scaled", "limited",
        "doubled", "halved", "jax.random.key", "bfloat16", "ints", "expm", "cumsum", "segment_sum", "sort")  # fmt: skip


def test_a_program_is_drawn_by_its_seed_and_index():
    assert drawn(3, 17).source() == drawn(3, 17).source() != drawn(3, 18).source()


def test_programs_are_drawn_of_everything():
    programs = [drawn(0, i) for i in range(300)]
    text = "".join(program.source() for program in programs)
    assert not [word for word in KEPT if word not in text]
    assert {tag for program in programs for tag in program.tags} == {f.__name__ for f, _ in STEPS}


def by_jax(fault=""):
    """What stands in for fnbp.opened: JAX, with a fault."""

    def opened(loss, contract):
        def of(params, *batch):
            if fault == "raw":
                return [][0]
            if fault in ("unnamed", "refused"):
                raise ValueError("opened: no rule for sin" + " of params['w1']" * (fault == "refused"))
            losses, grads = jax.vmap(jax.value_and_grad(loss), (None, *[0] * len(batch)))(params, *batch)
            if contract is not fnbp.per_example:
                grads = jax.tree.map(lambda g: SECOND[contract.name](g) * (2 if fault == "second" else 1), grads)
            return losses, jax.tree.map(lambda g: 2 * g if fault == "wrong" else g, grads)

        return of

    return opened


SMALL = Program([Line([], "a2 = jnp.sin(w1 * x3)")], ["jnp.sum(a2)"], {"w1": "arr(1, (2,))"}, {"x3": "arr(2, (3, 2))"})


@pytest.mark.parametrize(
    ("fault", "due"),
    [
        ("", "equal"),
        ("wrong", "wrong"),
        ("second", "wrong"),
        ("raw", "raw"),
        ("unnamed", "unnamed"),
        ("refused", "refused"),
    ],
)
def test_it_tells_planted_faults(fault, due, monkeypatch):
    monkeypatch.setattr(fnbp, "opened", by_jax(fault), raising=False)
    monkeypatch.setattr(fuzz_losses, "LIBRARY", Path(__file__).parent)
    outcome = examine(SMALL)
    assert outcome.kind == due, outcome


def test_what_jax_refuses_is_no_fault():
    assert examine(Program([Line([], "a2 = jnp.sin(nothing)")], ["a2"], SMALL.leaves, SMALL.arguments)).kind == "jax"


def test_a_program_is_shrunk_to_what_matters():
    lines = [Line([Value(f"a{i}", (2,))], f"a{i} = jnp.{f}({v})") for i, f, v in ((2, "sin", "w1"), (4, "exp", "a2"))]
    program = Program([*lines, Line([Value("a5", (2,))], "a5 = jnp.cos(x3)")], ["jnp.sum(a4)", "jnp.sum(a5)"],
                      {"w1": "arr(1, (2,))", "w6": "arr(6, ())"}, SMALL.arguments, "nested")  # fmt: skip
    at_fault = lambda one: {"a2 =", "jnp.exp"} <= set(re.findall(r"a2 =|jnp\.exp", one.source()))  # noqa: E731
    least = shrunk(program, Outcome("raw"), examine=lambda one: Outcome("raw" if at_fault(one) else "equal"))
    assert [line.text for line in least.lines] == ["a2 = arr(2, (2,))", "a4 = jnp.exp(a2)"]
    assert least.terms == ["jnp.sum(a4)"] and least.form == "dict"


def test_a_script_runs_alone():
    program = next(one for one in (drawn(0, i) for i in range(100)) if one.dtype == "float32")  # the others set x64
    exec(program.script(), space := {})
    assert space["loss"](space["params"], *jax.tree.map(lambda a: a[0], space["batch"])).shape == ()


def test_the_command_reports_faults_and_exits_1(monkeypatch, capsys, tmp_path):
    fault = {"index": 3, "kind": "raw", "stage": "per_example", "message": "IndexError: 3", "script": "loss = ..."}
    fault |= {"tags": ["scan"], "seconds": 0.1}
    monkeypatch.setattr(fuzz_losses, "results", lambda tasks, workers: [fault])
    assert fuzz_losses.main(["--cases", "1", "--out", str(tmp_path / "faults.txt")]) == 1
    assert "raw 1 times, as at index 3" in capsys.readouterr().out
    assert "loss = ..." in (tmp_path / "faults.txt").read_text()


def found(program):
    """None, or how a program ends at fault."""
    outcome = examine(program)
    return f"{outcome}\n{program.script()}" if outcome.kind in FAULTS else None


@pytest.mark.parametrize("index", range(12))
def test_it_finds_no_fault_in_small_losses(index):
    assert not (fault := found(draw(np.random.default_rng([1, index]), most=3))), fault


@pytest.mark.slow
@pytest.mark.parametrize("index", range(20))
def test_it_finds_no_fault(index):
    assert not (fault := found(drawn(0, index))), fault
