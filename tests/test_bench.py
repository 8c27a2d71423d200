"""The benchmarks: what they count, what they time beside each other, and what they say."""

import json

import jax
import jax.numpy as jnp
import pytest

import fnbp
from experiments import growth
from experiments.bench import __main__ as bench
from experiments.bench import cases, in_jax, in_torch
from experiments.bench.counting import products_of
from experiments.bench.turns import in_rotation, quotients
from experiments.shared import report, tables_of_speed
from tests.cases import relative

NAMES = [case.name for group in cases.GROUPS.values() for case in group]


def test_products_are_counted_in_loops_too():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert products_of(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    turn = lambda h, w: (h @ w, ())  # noqa: E731
    assert products_of(lambda h, w: jax.lax.scan(turn, h, w), a, jnp.ones((11, 5, 5))) == 11 * 2 * 3 * 5 * 5
    both = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ b, lambda: 2 * (x @ b))  # noqa: E731
    assert products_of(jax.jit(both), a) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    "layer", [fnbp.conv(7, 3), fnbp.conv(7, (2, 3), stride=2, padding="VALID"), fnbp.conv(7, 3, dilation=2)]
)
def test_of_a_convolution_only_what_meets_data_counts(layer):
    x = jnp.ones((2, 5, 11, 3))
    params, state = layer.init(jax.random.key(0), x)
    ones = jax.tree.map(jnp.ones_like, params) | {"b": jnp.zeros(7)}
    met = layer.forward(ones, state, x, fnbp.Context())[0]  # of ones: how many pairs each number is made of
    assert products_of(lambda x: layer.forward(params, state, x, fnbp.Context())[0], x) == 2 * int(met.sum())


def test_every_peer_and_every_row_is_of_a_case():
    assert set(in_jax.PEERS) | set(in_torch.PEERS) <= set(NAMES)
    assert [*tables_of_speed.LAYERS, *tables_of_speed.WHOLE] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention, 6 heads, causal, (12, 256, 384)", "LSTM 256, (32, 128, 128)"])
def test_the_formulas_in_plain_jax_cost_the_same_products(name):
    manual, _, args = next(case for case in cases.LAYERS if case.name == name).sides()
    plain, given = in_jax.PEERS[name][in_jax.PLAIN]()
    assert 0.9 <= products_of(manual, *args) / products_of(plain, *given) <= 1.4  # p is formed twice


def test_sides_take_turns_and_ratios_are_pairwise():
    order = []

    def side(name, seconds):
        return lambda calls: order.append(name) or seconds

    taken = in_rotation({"a": side("a", 1.0), "b": side("b", 4.0)}, 5.0, least=4, most=4, rest=False)
    assert order[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert quotients(taken["a"], taken["b"]) == [0.25] * 3
    assert len(in_rotation({"slow": side("slow", 9.0)}, 1.0, least=5, most=3, rest=False)["slow"]) == 3


@pytest.fixture
def small(monkeypatch):
    """One small case in place of all."""

    def use(name, sides):
        monkeypatch.setattr(bench, "GROUPS", {"layers": (cases.Case(name, sides, True),)})

    return use


def test_bench_times_both_sides(small, tmp_path, capsys):
    small("gelu, (4096, 512)", lambda: cases.of_layer(fnbp.dense(3), cases.normal(5, 7)))
    assert bench.main(bench.Settings(peers=False, seconds=0.0, out=tmp_path)) == 0
    row = json.loads((tmp_path / "result.json").read_text())["measured"]["gelu, (4096, 512)"]
    assert row["time"]["jax.grad"][1] > 0 and row["gflop"] == 3 * 2 * 5 * 7 * 3 / 1e9 and row["apart"] <= 1e-6
    assert row["said"]["PyTorch"] == "" and row["said"]["jax.grad"] in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_bench_ends_with_1_where_both_gradients_differ(small, tmp_path, capsys):
    wrong = fnbp.replace_functions(fnbp.gelu(), backward=lambda params, res, dy: ({}, 1.01 * dy))
    small("gelu", lambda: cases.of_layer(wrong, cases.normal(5, 7)))
    assert bench.main(bench.Settings(peers=False, seconds=0.0, out=tmp_path)) == 1
    assert "both gradients differ: gelu" in capsys.readouterr().out
    with pytest.raises(report.InputError, match="no case has that in its name"):
        bench.main(bench.Settings(only="nothing", out=tmp_path))


def test_both_sides_of_a_head_and_of_a_step_agree():
    for manual, automatic, args in (
        cases.head(11, 7, 5),
        cases.of_step(fnbp.models.gpt(11, 7, 1, 2, 8), cases.letters(11, 2, 7), cases.LINEAR),
    ):
        assert relative(jax.jit(manual)(*args), jax.jit(automatic)(*args)) <= 1e-4


def test_growth_prints_slopes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "SERIES", {"LSTM": growth.Series("length", (16, 32), growth.recurrent)})
    assert growth.main(growth.Settings(seconds=0.0, out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["LSTM"]["fnbp"]["size"] == [16, 32] and set(measured["slopes"]["LSTM"]) == {"fnbp", "jax.grad"}
    assert "slopes on logarithmic axes" in capsys.readouterr().out
    assert growth.both_slopes([(1, 1.0, 9.0), (10, 3.0, 5.0), (20, 12.0, 10.0)]) == pytest.approx(
        {"time": 2, "memory": 1}
    )
