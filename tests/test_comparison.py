"""compare: right nets pass, and a planted mistake is found where it is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.comparison

rng = np.random.default_rng(0)
X = rng.standard_normal((13, 7)).astype(np.float32)
NET = fnbp.serial(
    fnbp.dense(11),
    fnbp.tanh(),
    fnbp.skip(fnbp.serial(fnbp.dense(5), fnbp.silu(), fnbp.dense(11))),
    fnbp.softplus(),
    fnbp.dense(11),
    fnbp.sigmoid(),
    fnbp.dense(3),
)
PATHS = [path for path, _ in fnbp.leaves(NET)]
SHAPES, STATE = jax.eval_shape(NET.init, jax.random.key(0), X)
PARAMS = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, SHAPES)
LOSSES = {
    "labels": (fnbp.softmax_cross_entropy(), rng.integers(0, 3, 13)),
    "soft_labels": (fnbp.softmax_cross_entropy(), rng.dirichlet(np.ones(3), 13)),
    "bce_from_logits": (fnbp.binary_cross_entropy(from_logits=True), rng.uniform(0, 1, (13, 3))),
    "mse": (fnbp.mean_squared_error(), rng.standard_normal((13, 3))),
    "half": (fnbp.half_squared_error(), rng.standard_normal((13, 3))),
}


def compare(net=NET, **options):
    """fnbp.compare of a net of NET's params, at the same point each time."""
    return fnbp.compare(net, X, params=PARAMS, state=STATE, **options)


def wrong(path, backward, net=NET):
    """net with the backward of the layer at path replaced: backward is given it, params, res, dy."""

    def at(here, layer):
        if here != path:
            return layer
        return layer._replace(backward=lambda params, res, dy: backward(layer.backward, params, res, dy))

    return fnbp.map_layers(at, net)


def negative(right, params, res, dy):
    factors, dx = right(params, res, dy)
    return factors, -dx


def dropped_term(right, params, res, dy):
    (x,) = res
    return {}, dy * jax.nn.sigmoid(x)  # silu without x (1 - s)


def transposed(right, params, res, dy):
    factors, dx = right(params, res, dy)
    return factors | {"W": fnbp.Outer(res[0], dy)}, dx


def no_bias(right, params, res, dy):
    factors, dx = right(params, res, dy)
    return factors | {"b": factors["b"].scaled(0)}, dx


def divided(right, params, res, dy):
    factors, dx = right(params, res, dy)
    return factors | {"W": factors["W"].scaled(1 / len(dy))}, dx


def not_a_number(right, params, res, dy):
    factors, dx = right(params, res, dy)
    return factors, dx.at[3, 2].set(jnp.nan)


FAULTS = {
    "a_sign": ("serial[5].sigmoid", "x", negative),
    "a_sign_in_a_skip": ("serial[2].skip[0].serial[2].dense(11)", "x", negative),
    "a_transposed_gradient": ("serial[4].dense(11)", "W", transposed),
    "a_dropped_term": ("serial[2].skip[0].serial[1].silu", "x", dropped_term),
    "no_bias_gradient": ("serial[2].skip[0].serial[0].dense(5)", "b", no_bias),
    "one_over_m": ("serial[6].dense(3)", "W", divided),
    "nan": ("serial[3].softplus", "x", not_a_number),
}


@functools.cache
def report_of(fault):
    path, _, backward = FAULTS[fault]
    return compare(wrong(path, backward))


def by_place(report):
    return {(row.path, row.leaf): row for row in report.rows}


def test_a_right_net_is_ok_in_every_row():
    report = compare()
    assert report.ok and report.worst <= 1e-12
    assert report.first_fault is None and report.faults == ()
    leaves = ("W", "b", "x")
    due = [(path, leaf) for path in PATHS for leaf in (leaves if "dense" in path.split(".")[-1] else ("x",))]
    assert [(row.path, row.leaf) for row in report.rows] == [*due, ("serial", "x")]
    rows = by_place(report)
    assert rows["serial[0].dense(11)", "W"].shape == (11, 7)
    assert rows["serial[6].dense(3)", "x"].shape == (13, 11)
    assert rows["serial", "x"].shape == X.shape
    report.raise_if_bad()


@pytest.mark.parametrize(("loss", "y"), LOSSES.values(), ids=LOSSES)
def test_a_right_net_is_ok_under_every_loss(loss, y):
    net, params = fnbp.serial(NET.parts[0], NET.parts[1], NET.parts[6]), (PARAMS[0], {}, PARAMS[6])
    report = fnbp.compare(net, X, params=params, state=({}, {}, {}), loss=loss, y=y)
    assert report.ok and report.worst <= 1e-12
    last = report.rows[-1]
    assert (last.path, last.leaf, last.shape) == (loss.name, "prediction", (13, 3))


def test_a_right_net_is_ok_under_binary_cross_entropy_of_its_sigmoid():
    net = fnbp.serial(fnbp.dense(3), fnbp.sigmoid(), fnbp.dense(1), fnbp.sigmoid())
    report = fnbp.compare(net, X[:, :2], loss=fnbp.binary_cross_entropy(), y=rng.integers(0, 2, (13, 1)))
    assert report.ok and report.worst <= 1e-12


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_mistake_is_found_at_its_layer_and_leaf(name):
    (path, leaf, _), report = FAULTS[name], report_of(name)
    fault = report.first_fault
    assert not report.ok and report.worst > 0.01
    assert [(row.path, row.leaf, row.verdict) for row in report.faults] == [(path, leaf, "WRONG")]
    assert fault.path == path and fault.leaf == leaf
    assert fault.manual != fault.automatic  # NaN too
    below = PATHS[: PATHS.index(path)]
    for place, row in by_place(report).items():
        if place[0] in below or place[0] == "serial":
            assert row.verdict == ("inherits" if leaf == "x" else "ok"), place
        elif place != (path, leaf):
            assert row.verdict == "ok", place


def test_the_first_fault_shows_where_the_layer_is_worst_and_both_values():
    def one_off(right, params, res, dy):
        factors, dx = right(params, res, dy)
        return factors, dx.at[3, 2].add(1000.0).at[5, 1].add(1.0)

    path = "serial[5].sigmoid"
    fault = compare(wrong(path, one_off)).first_fault
    assert fault.index == (3, 2)
    np.testing.assert_allclose(fault.manual - fault.automatic, 1000.0, rtol=1e-12)
    zero = report_of("no_bias_gradient").first_fault
    assert zero.manual == 0 != zero.automatic and zero.error == 1


def test_two_mistakes_are_listed_from_output_to_input():
    low, high = "serial[1].tanh", "serial[5].sigmoid"
    report = compare(wrong(low, negative, wrong(high, negative)))
    assert [row.path for row in report.faults] == [high, low]
    assert report.first_fault.path == high
    middle = by_place(report)["serial[4].dense(11)", "W"]
    assert middle.verdict == "inherits" and middle.error <= 1e-12 < middle.inherited


def test_an_error_is_relative_to_the_gradient():
    def off(right, params, res, dy):
        factors, dx = right(params, res, dy)
        return factors | {"W": factors["W"].scaled(1 + 1e-6)}, dx

    fault = compare(wrong("serial[6].dense(3)", off)).first_fault
    np.testing.assert_allclose((fault.error, fault.inherited), 1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "inherited", "verdict"),
    [(0.0, 0.0, "ok"), (1e-10, 1e-10, "ok"), (0.0, 1e-9, "inherits"), (1e-9, 0.0, "WRONG"), (np.inf, 7.0, "WRONG")],
)
def test_a_verdict_is_of_the_layer_alone_first_and_worst_is_of_both(error, inherited, verdict):
    row = fnbp.comparison.Row("tanh", "x", (7, 3), error, inherited, (0, 0), 1.0, 1.0)
    report = fnbp.Report((row,))
    assert row.verdict == verdict and row.ok == (verdict != "WRONG")
    assert report.ok == (verdict == "ok") and report.worst == max(error, inherited)
    assert report.first_fault is (row if verdict == "WRONG" else None)


def test_a_gradient_of_another_shape_is_wrong():
    report = compare(wrong("serial[6].dense(3)", transposed))
    fault = report.first_fault
    assert (fault.path, fault.leaf, fault.shape, fault.index) == ("serial[6].dense(3)", "W", (3, 11), ())
    assert fault.error == report.worst == float("inf")
    assert "inf" in str(report)


def test_a_backward_that_returns_another_tree_is_refused():
    with pytest.raises(
        ValueError, match=r"serial\[4\].dense\(11\): backward returns PyTreeDef.*, params are PyTreeDef"
    ):
        compare(wrong("serial[4].dense(11)", lambda right, params, res, dy: ({}, right(params, res, dy)[1])))


def forgetful_skip(layer):
    """skip, but dx = b(dy)."""
    right = fnbp.skip(layer)

    def backward(params, res, dy):
        factors, dx = layer.backward(params[0], res[0], dy)
        return (factors,), dx

    return right._replace(backward=backward, rebuild=lambda parts: forgetful_skip(*parts))


def test_a_wrong_combinator_is_blamed_on_the_net_as_a_whole():
    net = fnbp.serial(*NET.parts[:2], forgetful_skip(NET.parts[2].parts[0]), *NET.parts[3:])
    report = compare(net)
    assert not report.ok
    assert [(row.path, row.leaf) for row in report.faults] == [("serial", "x")]
    verdicts = {(row.path, row.leaf): row.verdict for row in report.rows}
    assert verdicts["serial[0].dense(11)", "W"] == "inherits"
    assert verdicts["serial[2].skip[0].serial[0].dense(5)", "W"] == "ok"
    assert verdicts["serial[4].dense(11)", "W"] == "ok"


def test_a_wrong_loss_is_blamed_on_the_loss():
    loss, y = LOSSES["mse"]
    halved = loss._replace(backward=lambda res: loss.backward(res) / 2, name="halved")
    report = compare(loss=halved, y=y)
    assert [(row.path, row.leaf) for row in report.faults] == [("halved", "prediction")]
    np.testing.assert_allclose(report.worst, 0.5, rtol=1e-12)
    assert {row.verdict for row in report.rows[:-1]} == {"ok"}


def test_the_layers_below_a_wrong_loss_are_told_the_right_delta():
    loss, y = LOSSES["mse"]
    torn = loss._replace(backward=lambda res: jnp.nan * loss.backward(res), name="torn")
    report = compare(loss=torn, y=y)
    assert [(row.path, row.error) for row in report.faults] == [("torn", float("inf"))]
    assert {row.verdict for row in report.rows[:-1]} == {"ok"}


def test_the_report_as_text_names_the_place_and_the_verdict():
    report = report_of("a_dropped_term")
    path = report.first_fault.path
    lines = str(report).splitlines()
    assert lines[0].strip() == "manual against automatic, float64: WRONG"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert len(cells) == len(report.rows)
    row = next(cell for cell in cells if cell[0] == path)
    fault = report.first_fault
    assert row == [path, "x", "13x5", f"{fault.error:.1e}", f"{fault.inherited:.1e}", "WRONG"]
    assert [cell[-1] for cell in cells].count("inherits") == 8 and cells[-1][:2] == ["serial", "x"]
    caption = " ".join(" ".join(lines[-3:]).split())
    index = list(fault.index)
    assert f"first fault: {path}, dx{index}: manual {fault.manual:+.6g}, automatic {fault.automatic:+.6g}" in caption
    with pytest.raises(AssertionError, match="manual and automatic gradients differ") as caught:
        report.raise_if_bad()
    assert str(report) in str(caught.value)


def test_the_report_of_a_right_net_says_ok_and_names_no_fault():
    text = str(fnbp.compare(fnbp.tanh(), X))
    assert text.splitlines()[0].strip() == "manual against automatic, float64: ok"
    assert "WRONG" not in text and "first fault" not in text


def test_the_report_survives_json():
    for report in (report_of("a_transposed_gradient"), fnbp.compare(fnbp.tanh(), X)):
        back = json.loads(json.dumps(report.to_dict()))
        assert back["ok"] is report.ok and back["worst"] == report.worst
        assert [(row["path"], row["leaf"], row["verdict"], row["error"]) for row in back["rows"]] == [
            (row.path, row.leaf, row.verdict, row.error) for row in report.rows
        ]


def bent(slope, where):
    """y = x; in its backward a slope, where(params, state, ctx) tells how wrong."""

    def forward(params, state, x, ctx):
        return x * where(params, state, ctx), state, (where(params, state, ctx),)

    def backward(params, res, dy):
        return {"c": 0 * params["c"]}, slope * dy

    return fnbp.Layer(lambda key, x: ({"c": jnp.ones(())}, {"s": jnp.ones(())}), forward, backward, "bent")


def test_params_state_and_context_are_those_given():
    net = bent(
        6.0, lambda params, state, ctx: jax.lax.stop_gradient(params["c"]) * state["s"] * (2 if ctx.train else 1)
    )
    params, state, train = {"c": np.float32(3)}, {"s": np.float32(2)}, fnbp.Context(train=True)
    assert fnbp.compare(net, X, params=params, state=state).ok
    assert fnbp.compare(net, X, params={"c": np.float32(3)}, ctx=train).ok
    assert not fnbp.compare(net, X, params=params).ok
    assert not fnbp.compare(net, X, state=state).ok


def test_drawn_params_are_away_from_their_initial_zeros():
    def forward(params, x):
        return x + params["b"] ** 2, (x,)

    def backward(params, res, dy):
        return {"b": 0 * params["b"]}, dy

    square = fnbp.stateless(lambda key, x: {"b": jnp.zeros(x.shape[-1], x.dtype)}, forward, backward, "square")
    assert [(row.path, row.leaf) for row in fnbp.compare(square, X).faults] == [("square", "b")]


def test_another_key_draws_another_cotangent():
    net = wrong("tanh", negative, fnbp.tanh())
    reports = [fnbp.compare(net, X, key=jax.random.key(i)) for i in (0, 0, 1)]
    first, again, other = (report.first_fault.automatic for report in reports)
    assert first == again != other


def test_float32_is_the_mode_afterwards_and_float32_params_will_do():
    params = {"W": PARAMS[6]["W"], "b": PARAMS[6]["b"]}
    report = fnbp.compare(fnbp.dense(3), rng.standard_normal((13, 11)).astype(np.float32), params=params, state={})
    assert report.ok and report.worst <= 1e-12
    assert jnp.zeros(3).dtype == jnp.float32 and not jax.config.jax_enable_x64
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_a_loss_needs_y_and_y_a_loss():
    loss, y = LOSSES["mse"]
    for given in ({"loss": loss}, {"y": y}):
        with pytest.raises(ValueError, match="compare: a loss needs y, and y a loss"):
            fnbp.compare(NET, X, **given)


def test_what_is_no_net_or_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"compare: net must be a Layer, got function tanh; call it: tanh\(\)"):
        fnbp.compare(fnbp.tanh, X)
    with pytest.raises(TypeError, match="compare: loss must be a Loss, got str 'mse'"):
        fnbp.compare(NET, X, loss="mse", y=X)


def test_non_finite_x_and_params_are_refused():
    x = X.copy()
    x[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"compare: x has 1 non-finite values, the first inf at index \(2, 1\)"):
        fnbp.compare(NET, x)
    params = {"W": np.full((3, 7), np.nan), "b": np.ones(3)}
    with pytest.raises(ValueError, match=r"compare: params has 21 non-finite values, the first nan at index \(0, 0\)"):
        fnbp.compare(fnbp.dense(3), X, params=params)
    assert not jax.config.jax_enable_x64


def test_a_net_that_returns_no_floating_numbers_is_refused():
    rounded = fnbp.stateless(lambda key, x: {}, lambda p, x: (x.astype(int), ()), lambda p, r, dy: ({}, dy), "rounded")
    with pytest.raises(TypeError, match="compare: what rounded returns must be a floating point array, got int64"):
        fnbp.compare(rounded, X)


def test_a_combinator_that_spoils_its_factors_alone_is_blamed():
    def spoiling(layer):
        right = fnbp.skip(layer)

        def backward(params, res, dy):
            (factors,), dx = right.backward(params, res, dy)
            return (jax.tree.map(lambda leaf: 2 * leaf, factors),), dx

        return right._replace(backward=backward, rebuild=lambda parts: spoiling(*parts))

    report = fnbp.compare(fnbp.serial(spoiling(fnbp.dense(7))), X)
    assert not report.ok
    assert report.first_fault is not None
