"""What a gradient costs: the numbers are sane and add up. Nothing here asserts a speed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.measurement
from fnbp.measurement import Cost, Measured, interleave, ratio, versus

NET, LOSS = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(3)), fnbp.softmax_cross_entropy()


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((13, 7)).astype(np.float32), rng.integers(0, 3, 13)
    shapes, state = jax.eval_shape(NET.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    return fnbp.cost(NET, LOSS, params, state, x, y, samples=3, compiles=1)


def test_cost_is_positive_and_its_ratios_are_of_its_numbers(found):
    for side in (found.manual, found.automatic):
        assert side.seconds > 0 and side.compile_seconds > 0 and side.flops > 0 and side.temp_bytes >= 0
    low, high = found.time_quartiles
    assert 0 < low <= found.time_ratio <= high
    assert found.flops_ratio == found.manual.flops / found.automatic.flops
    assert found.compile_ratio == found.manual.compile_seconds / found.automatic.compile_seconds
    assert found.memory_ratio == ratio(found.manual.temp_bytes, found.automatic.temp_bytes)
    assert found.device == jax.devices()[0].device_kind


def test_cost_survives_json(found):
    back = json.loads(json.dumps(found.to_dict()))
    assert back["manual"] == {
        "seconds": found.manual.seconds,
        "compile_seconds": found.manual.compile_seconds,
        "flops": found.manual.flops,
        "temp_bytes": found.manual.temp_bytes,
    }
    assert back["time_ratio"] == found.time_ratio and tuple(back["time_quartiles"]) == found.time_quartiles
    for name in ("memory_ratio", "flops_ratio", "compile_ratio"):
        assert back[name] == getattr(found, name)


def test_the_table_has_a_row_for_each_cost():
    cost = Cost(Measured(0.002, 0.5, 3000.0, 20480), Measured(0.004, 0.25, 4000.0, 10240), 0.5, (0.4, 0.6), "abacus")
    lines = str(cost).splitlines()
    assert lines[0].strip() == "cost of one gradient on abacus"
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line] == [
        ["time", "2.000 ms", "4.000 ms", "0.500 (0.400 to 0.600)"],
        ["temporary memory", "20.0 KiB", "10.0 KiB", "2.0000"],
        ["FLOPs", "3,000", "4,000", "0.7500"],
        ["compile time", "0.500 s", "0.250 s", "2.0000"],
    ]


def test_what_the_device_does_not_tell_is_left_blank():
    side = Measured(0.002, 0.5, None, None)
    cost = Cost(side, side, 1.0, (1.0, 1.0), "abacus")
    assert cost.memory_ratio is cost.flops_ratio is None
    assert json.loads(json.dumps(cost.to_dict()))["flops_ratio"] is None
    blank = [line for line in str(cost).splitlines() if "FLOPs" in line or "memory" in line]
    assert [[cell.strip() for cell in line.split("│")[2:-1]] for line in blank] == [["-", "-", "-"]] * 2


def test_ratio_of_nothing_to_nothing_is_one():
    assert (ratio(3, 2), ratio(0, 2), ratio(0, 0), ratio(1, 0)) == (1.5, 0, 1, float("inf"))
    assert ratio(None, 1) is ratio(1, None) is None


def test_versus_measures_the_first_function_against_the_second():
    a = jnp.asarray(np.random.default_rng(0).standard_normal((31, 31)), jnp.float32)
    cost = versus(lambda a: a @ a, lambda a: jnp.sin(a @ a) @ a @ a, (a,), samples=2, compiles=1)
    assert cost.manual.flops < cost.automatic.flops / 2
    assert cost.flops_ratio < 0.5


def test_manual_is_the_layers_own_backward_and_automatic_is_not():
    idle = fnbp.dense(31)
    idle = idle._replace(backward=lambda params, res, dy: (jax.tree.map(jnp.zeros_like, params), res[0]))
    params, state, x = {"W": jnp.ones((31, 31)), "b": jnp.ones(31)}, {}, jnp.ones((7, 31))
    cost = fnbp.cost(idle, fnbp.mean_squared_error(), params, state, x, x, samples=1, compiles=1)
    assert cost.manual.flops and cost.automatic.flops
    assert cost.manual.flops < 0.7 * cost.automatic.flops


def test_the_time_ratio_is_the_median_of_pairwise_ratios(monkeypatch):
    taken = np.array([[2.0, 1.0], [3.0, 6.0], [8.0, 2.0], [3.0, 3.0], [9.0, 3.0]])  # ratios 2, 1/2, 4, 1, 3
    monkeypatch.setattr(fnbp.measurement, "interleave", lambda pair, args, samples: taken)
    cost = versus(lambda a: a, lambda a: -a, (jnp.ones(3),), samples=5, compiles=1)
    assert (cost.time_ratio, cost.time_quartiles) == (2.0, (1.0, 3.0))
    assert (cost.manual.seconds, cost.automatic.seconds) == (3.0, 3.0)


def test_the_first_compilation_warms_up_and_does_not_count(monkeypatch):
    compile_timed, seconds = fnbp.measurement.compile_timed, iter([[90, 90], [2, 30], [4, 10], [3, 20]])

    def timed(functions, args):
        return compile_timed(functions, args)[0], next(seconds)

    monkeypatch.setattr(fnbp.measurement, "compile_timed", timed)
    cost = versus(lambda a: a, lambda a: -a, (jnp.ones(3),), samples=1, compiles=3)
    assert (cost.manual.compile_seconds, cost.automatic.compile_seconds) == (3, 20)


def test_samples_take_turns_and_each_goes_first_every_other_time(monkeypatch):
    monkeypatch.setattr(fnbp.measurement, "SAMPLE_SECONDS", 0)
    called = []
    pair = [lambda x, name=name: called.append(name) for name in "ab"]
    assert interleave(pair, (0,), 5).shape == (5, 2)
    assert "".join(called[-10:]) == "abbaabbaab"


def test_a_sample_holds_as_many_calls_as_its_seconds_need(monkeypatch):
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(fnbp.measurement.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(fnbp.measurement, "SAMPLE_SECONDS", 4)
    called = []
    taken = interleave([lambda x: called.append("a"), lambda x: called.append("b")], (0,), 3)
    # by this clock a reading takes 1 s, so one call in a timed row of three takes 1/3 s, and 4 s hold 12 calls
    assert len(called) == 18 + 3 * 2 * 12
    assert (taken == 1 / 12).all()


@pytest.mark.parametrize("name", ["samples", "compiles"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(0, ValueError, "must be at least 1, got 0"), (2.5, TypeError, "must be a whole number, got 2.5")],
)
def test_cost_refuses_sizes(name, value, error, words):
    with pytest.raises(error, match=f"cost: {name} {words}"):
        fnbp.cost(NET, LOSS, (), (), jnp.ones((2, 3)), jnp.ones(2, int), **{name: value})


def test_cost_refuses_what_the_gradient_refuses():
    with pytest.raises(ValueError, match="serial: params must have 3 entries"):
        fnbp.cost(NET, LOSS, (), (), jnp.ones((2, 3)), jnp.ones(2, int), samples=1, compiles=1)
