"""compare on nets: right ones pass, and a planted mistake is found where it is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.testing
from fnbp.comparison.probes import PROBES

rng = np.random.default_rng(0)
X = rng.standard_normal((13, 7)).astype(np.float32)
NET = fnbp.serial(
    fnbp.dense(11),
    fnbp.tanh(),
    fnbp.skip(fnbp.serial(fnbp.dense(5), fnbp.silu(), fnbp.dense(11))),
    fnbp.softplus(),
    fnbp.dense(3),
)
PATHS = [path for path, _ in fnbp.leaves(NET)]
JOINTS = ["serial[2].skip[0].serial", "serial[2].skip", "serial"]
SHAPES, STATE = jax.eval_shape(NET.init, jax.random.key(0), X)
PARAMS = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, SHAPES)
SMALL = fnbp.serial(fnbp.dense(11), fnbp.softplus(), fnbp.dense(3))
QUICK = {"probes": ("given", "nearby"), "transforms": ()}
LOSSES = {
    "labels": (fnbp.softmax_cross_entropy(), rng.integers(0, 3, 13)),
    "soft_labels": (fnbp.softmax_cross_entropy(), rng.dirichlet(np.ones(3), 13)),
    "bce": (fnbp.binary_cross_entropy(), rng.integers(0, 2, (13, 3))),
    "bce_from_logits": (fnbp.binary_cross_entropy(from_logits=True), rng.uniform(0, 1, (13, 3))),
    "mse": (fnbp.mean_squared_error(), rng.standard_normal((13, 3))),
    "half": (fnbp.half_squared_error(), rng.standard_normal((13, 3))),
}


def compare(net=NET, **options):
    """fnbp.compare of a net of NET's params, at the same point each time."""
    return fnbp.compare(net, X, params=PARAMS, state=STATE, **(QUICK | options))


def wrong(path, backward, net=NET):
    """net with the backward of the layer at path replaced: backward is given it, params, res, dy."""

    def at(here, layer):
        if here != path:
            return layer
        return layer._replace(backward=lambda params, res, dy: backward(layer.backward, params, res, dy))

    return fnbp.map_layers(at, net)


def on_dx(change):
    """A wrong backward: change made to the right dx."""

    def backward(right, params, res, dy):
        factors, dx = right(params, res, dy)
        return factors, change(dx)

    return backward


def on_factor(name, change):
    """A wrong backward: change made to the right factor of one parameter."""

    def backward(right, params, res, dy):
        factors, dx = right(params, res, dy)
        return factors | {name: change(factors[name])}, dx

    return backward


negative = on_dx(lambda dx: -dx)


def slope_left_out(right, params, res, dy):
    (x,) = res
    return {}, dy * jax.nn.sigmoid(x)  # silu without x (1 - s)


FAULTS = {  # where, which leaf, the mistake, the hint
    "a_sign": ("serial[3].softplus", "x", negative, "the sign is flipped"),
    "a_sign_in_a_skip": ("serial[2].skip[0].serial[2].dense(11)", "x", negative, "the sign is flipped"),
    "a_dropped_term": ("serial[2].skip[0].serial[1].silu", "x", slope_left_out, ""),
    "no_bias_gradient": (
        "serial[2].skip[0].serial[0].dense(5)",
        "b",
        on_factor("b", lambda f: f.scaled(0)),
        "it is all zero: the gradient is dropped",
    ),
    "one_over_m": (
        "serial[4].dense(3)",
        "W",
        on_factor("W", lambda f: f.scaled(1 / len(f.d))),
        "divided by 13, the batch size: a mean instead of a sum",
    ),
    "bfloat16_inside": (
        "serial[3].softplus",
        "x",
        on_dx(lambda dx: dx.astype(jnp.bfloat16).astype(dx.dtype)),
        "the rounding of bfloat16",
    ),
    "float32_inside": (
        "serial[1].tanh",
        "x",
        on_dx(lambda dx: dx.astype(jnp.float32).astype(dx.dtype)),
        "the rounding of float32",
    ),
}


@functools.cache
def report_of(fault):
    path, _, backward, _ = FAULTS[fault]
    return compare(wrong(path, backward))


def by_place(report):
    return {(row.path, row.leaf): row for row in report.rows}


def test_a_right_net_is_ok_in_every_row_and_every_check():
    report = compare(probes=tuple(PROBES), transforms=("jit", "vmap", "sharded"))
    assert report.ok and report.worst <= 1e-12
    assert report.first_fault is None and report.faults == report.conventions == report.notes == ()
    assert report.checks == {"jit": "ok", "vmap": "ok", "sharded": "ok", "differences": "ok", "examples": "ok"}
    leaves = ("W", "b", "x")
    due = {(path, leaf) for path in PATHS for leaf in (leaves if "dense" in path.split(".")[-1] else ("x",))}
    assert set(by_place(report)) == due | {(path, "x") for path in JOINTS}
    assert [row.path for row in report.rows][-1] == "serial"
    rows = by_place(report)
    assert rows["serial[0].dense(11)", "W"].shape == (11, 7)
    assert rows["serial[4].dense(3)", "x"].shape == (13, 11)
    assert all(row.kind == "ok" and row.z <= 64 and row.error <= row.limit for row in report.rows)
    assert all(row.rho is not None and row.rho < 4 for row in report.rows)
    report.raise_if_bad()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_right_layer_is_ok_in_narrow_dtypes(dtype):
    report = fnbp.compare(
        fnbp.serial(fnbp.dense(5), fnbp.gelu(approximate=True), fnbp.softmax()), jnp.asarray(X, dtype)
    )
    assert report.ok and {row.dtype for row in report.rows} == {dtype}


@pytest.mark.parametrize(("loss", "y"), LOSSES.values(), ids=LOSSES)
def test_a_right_net_is_ok_under_every_loss(loss, y):
    net = fnbp.serial(fnbp.dense(3), fnbp.sigmoid())
    report = fnbp.compare(net, X, loss=loss, y=y, probes=("given", "another", "large", "one_example"), transforms=())
    assert report.ok and report.worst <= 1e-12
    last = report.rows[-1]
    assert (last.path, last.leaf, last.shape) == (loss.name, "prediction", (13, 3))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_mistake_is_found_at_its_layer_and_leaf(name):
    (path, leaf, _, hint), report = FAULTS[name], report_of(name)
    fault = report.first_fault
    assert not report.ok
    assert [(row.path, row.leaf, row.kind) for row in report.faults] == [(path, leaf, "formula")]
    assert fault.path == path and fault.leaf == leaf and hint in fault.hint and fault.z > 1e6
    assert fault.manual != fault.automatic
    below = [p for p in PATHS[: PATHS.index(path)] if not p.startswith("serial[2]") or path.startswith("serial[2]")]
    for place, row in by_place(report).items():
        if place[0] in below and leaf == "x":
            assert row.kind == "inherits" and row.whole > row.error, place
        elif (leaf != "x" and place != (path, leaf)) or place[0] in PATHS[PATHS.index(path) + 1 :]:
            assert row.kind == "ok", place


def test_the_first_fault_shows_where_the_layer_is_worst_and_both_values():
    change = on_dx(lambda dx: dx.at[3, 2].add(1000.0).at[5, 1].add(1.0))
    fault = fnbp.compare(wrong("serial[1].softplus", change, SMALL), X, **QUICK).first_fault
    assert fault.index == (3, 2)
    np.testing.assert_allclose(fault.manual - fault.automatic, 1000.0, rtol=1e-12)
    assert fault.hint == "it is wrong at 3, 5 of axis 0 only"
    zero = report_of("no_bias_gradient").first_fault
    assert zero.manual == 0 != zero.automatic and zero.error == 1


def test_two_mistakes_are_listed_from_output_to_input():
    low, high = "serial[1].tanh", "serial[3].softplus"
    report = compare(wrong(low, negative, wrong(high, negative)))
    assert [row.path for row in report.faults] == [high, low]
    assert report.first_fault.path == high
    middle = by_place(report)["serial[2].skip[0].serial[0].dense(5)", "W"]
    assert middle.kind == "inherits"
    assert middle.error <= 1e-12 < (middle.whole or 0)


def test_a_leaf_of_small_gradients_is_judged_on_its_own_scale():
    small = fnbp.serial(fnbp.dense(5), fnbp.identity(), fnbp.dense(3))
    params = (
        {"W": np.ones((5, 7), "f"), "b": np.ones(5, "f")},
        {},
        {"W": np.full((3, 5), 1e-9, "f"), "b": np.ones(3, "f")},
    )
    change = on_factor("b", lambda f: f.scaled(1 + 1e-7))
    bad = wrong("serial[0].dense(5)", change, small)
    report = fnbp.compare(bad, X, params=params, state=({}, {}, {}), **QUICK)
    assert [(row.path, row.leaf) for row in report.faults] == [("serial[0].dense(5)", "b")]
    assert report.first_fault.hint == "it is 1 + 1.0e-07 times the right value"


def centred():
    """x less its mean over features, so that a bias before it has no gradient but rounding."""

    def forward(params, x):
        return x - x.mean(-1, keepdims=True), ()

    def backward(params, res, dy):
        return {}, dy - dy.mean(-1, keepdims=True)

    return fnbp.stateless(lambda key, x: {}, forward, backward, "centred")


def test_a_gradient_that_is_zero_but_for_rounding_is_no_fault():
    def forward(params, x):
        return x + params["c"], ()

    def backward(params, res, dy):
        return {"c": jnp.sum(dy)}, dy

    shift = fnbp.stateless(lambda key, x: {"c": jnp.ones((), x.dtype)}, forward, backward, "shift")
    report = fnbp.compare(fnbp.serial(shift, centred()), X)
    assert report.ok
    leaf = by_place(report)["serial[0].shift", "c"]
    assert leaf.whole is not None


def test_a_gradient_that_is_exactly_zero_must_be_zero():
    def forward(params, x):
        return x + 0 * params["c"], ()

    def init(key, x):
        return {"c": jnp.ones(5, x.dtype)[: x.shape[-1]]}

    for made, ok in ((lambda dy: 0 * dy.sum(0), True), (lambda dy: 1e-9 * dy.sum(0), False)):
        layer = fnbp.stateless(init, forward, lambda p, res, dy, made=made: ({"c": made(dy)}, dy), "nothing")
        report = fnbp.compare(layer, X[:, :5], **QUICK)
        assert report.ok == ok
        assert ok or [(row.leaf, row.kind) for row in report.faults] == [("c", "formula")]


STRUCTURES = {
    "another_tree": (
        lambda right, p, res, dy: ({}, right(p, res, dy)[1]),
        "params",
        "got {}, expected {'W': *, 'b': *}",
    ),
    "a_flat_dx": (on_dx(jnp.ravel), "x", "got float32[143], expected float32[13, 11]"),
    "a_wrong_shape": (
        on_factor("W", lambda f: fnbp.Outer(f.x, f.d)),
        "W",
        "got float32[11, 3], expected float32[3, 11]; the shape is that of the transpose",
    ),
    "a_dtype": (on_dx(lambda dx: dx.astype(jnp.float16)), "x", "got float16[13, 11], expected float32[13, 11]"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_gradient_of_another_build_is_a_fault_of_structure(name):
    backward, leaf, hint = STRUCTURES[name]
    fault = fnbp.compare(wrong("serial[2].dense(3)", backward, SMALL), X, **QUICK).first_fault
    assert (fault.path, fault.leaf, fault.kind, fault.hint) == ("serial[2].dense(3)", leaf, "structure", hint)


def test_a_backward_that_raises_is_a_fault_and_the_others_are_still_judged():
    def raises(right, params, res, dy):
        raise RuntimeError("no such thing")

    report = fnbp.compare(wrong("serial[1].softplus", raises, SMALL), X, **QUICK)
    assert [(row.path, row.kind) for row in report.faults] == [("serial[1].softplus", "raises")]
    assert report.first_fault.hint == "the backward raises RuntimeError: no such thing"
    assert {row.path for row in report.rows} == {path for path, _ in fnbp.leaves(SMALL)} | {"serial"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_backward_that_raises_only_in_float64_is_a_fault(dtype):
    def narrow(right, params, res, dy):
        f, dx = right(params, res, dy)
        return f, jax.lax.add(dx, jnp.zeros(dx.shape, jnp.asarray(X, dtype).dtype))

    x = jnp.asarray(X, dtype)
    net = fnbp.serial(fnbp.tanh())
    report = fnbp.compare(wrong("serial[0].tanh", narrow, net), x, **QUICK)
    assert [(row.path, row.kind) for row in report.faults] == [("serial[0].tanh", "raises")]
    assert "same dtypes" in report.first_fault.hint


def test_a_gradient_that_is_not_a_number_is_named():
    fault = fnbp.compare(
        wrong("serial[1].softplus", on_dx(lambda dx: dx.at[3, 2].set(jnp.nan)), SMALL), X, **QUICK
    ).first_fault
    assert (fault.kind, fault.index, fault.hint) == ("nonfinite", (3, 2), "1 of 143 elements are not finite")


def test_a_backward_that_draws_is_random():
    noisy = np.random.default_rng(1)
    fault = fnbp.compare(
        wrong("serial[1].softplus", on_dx(lambda dx: dx * noisy.random()), SMALL), X, **QUICK
    ).first_fault
    assert fault.kind == "random" and "called twice on the same arguments" in fault.hint


def test_a_backward_that_cannot_be_traced_is_judged_and_blamed_for_it():
    def branches(right, params, res, dy):
        return right(params, res, dy) if float(dy[0, 0]) > -1e30 else None

    report = fnbp.compare(wrong("serial[1].softplus", branches, SMALL), X, **QUICK | {"transforms": ("jit", "vmap")})
    fault = report.first_fault
    assert fault.kind == "jit" and "under jit the backward raises" in fault.hint and fault.error <= 1e-12
    assert report.checks == {"jit": "WRONG", "vmap": "WRONG", "differences": "ok", "examples": "ok"}


def forgetful(layer):
    """skip, but dx = b(dy)."""
    right = fnbp.skip(layer)

    def backward(params, res, dy):
        factors, dx = layer.backward(params[0], res, dy)
        return (factors,), dx

    return right._replace(backward=backward, rebuild=lambda parts: forgetful(*parts))


def spoiling(layer):
    """skip, but it doubles the gradients of its part."""
    right = fnbp.skip(layer)

    def backward(params, res, dy):
        (factors,), dx = right.backward(params, res, dy)
        return (jax.tree.map(lambda leaf: 2 * leaf, factors),), dx

    return right._replace(backward=backward, rebuild=lambda parts: spoiling(*parts))


def test_a_wrong_combinator_is_blamed_and_its_parts_are_not():
    net = fnbp.serial(fnbp.dense(5), fnbp.tanh(), forgetful(fnbp.dense(5)), fnbp.sigmoid())
    report = fnbp.compare(net, X, **QUICK)
    assert [(row.path, row.leaf) for row in report.faults] == [("serial[2].skip", "x")]
    assert report.first_fault.hint == "dy is missing from it: the path around the layer is dropped"
    assert by_place(report)["serial[0].dense(5)", "W"].kind == "inherits"


def test_a_combinator_that_spoils_only_its_factors_is_blamed():
    report = fnbp.compare(fnbp.serial(spoiling(fnbp.dense(7))), X, **QUICK)
    assert {(row.path, row.leaf) for row in report.faults} == {("serial[0].skip", "0.W"), ("serial[0].skip", "0.b")}
    assert "it is 2 times the right value" in report.first_fault.hint


def mislaid(layer):
    """A combinator whose new state is what it saves, and the other way round."""

    def forward(params, state, x, ctx):
        y, s, res = layer.forward(params[0], state[0], x, ctx)
        return y, (res,), (s,)

    def backward(params, res, dy):
        factors, dx = layer.backward(params[0], res[0], dy)
        return (factors,), dx

    init = lambda key, x: tuple((tree,) for tree in layer.init(key, x))  # noqa: E731
    return fnbp.Layer(init, forward, backward, "mislaid", (layer,), lambda parts: mislaid(parts[0]))


def test_a_combinator_that_mislays_its_state_is_blamed():
    report = fnbp.compare(mislaid(fnbp.dense(3)), X, **QUICK)
    assert not report.ok and {row.path for row in report.faults} == {"mislaid"}


def test_a_combinator_whose_backward_was_replaced_is_refused():
    net = fnbp.serial(fnbp.dense(7), fnbp.skip(fnbp.dense(7))._replace(backward=lambda params, res, dy: None))
    with pytest.raises(
        ValueError, match="skip: its backward was replaced, and rebuilding it over other parts would lose"
    ):
        fnbp.compare(net, X)


def bent(slope, where):
    """y = x times where(params, state, ctx); its backward has another slope."""

    def forward(params, state, x, ctx):
        return x * where(params, state, ctx), state, ()

    def backward(params, res, dy):
        return {"c": 0 * params["c"]}, slope * dy

    return fnbp.Layer(lambda key, x: ({"c": jnp.ones(())}, {"s": jnp.ones(())}), forward, backward, "bent")


@pytest.mark.parametrize(
    ("backward", "hint"),
    [(lambda dy: jnp.clip(dy, -10, 10), "it is clipped at 10"), (lambda dy: jnp.where(abs(dy) < 1e-4, 0, dy), "")],
    ids=["clipped", "flushed"],
)
def test_what_a_backward_does_only_to_large_and_small_cotangents_is_seen(backward, hint):
    layer = fnbp.identity()._replace(backward=lambda params, res, dy: ({}, backward(dy)))
    fault = fnbp.compare(layer, X, transforms=()).first_fault
    assert fault.kind == "formula" and fault.probe in ("another", "nearby") and hint in fault.hint


def test_an_element_that_is_negative_at_every_draw_is_seen_too():
    relu = fnbp.relu()
    layer = relu._replace(backward=lambda p, res, dy: ({}, relu.backward(p, res, dy)[1].at[-1, -1].set(0)))
    x = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)
    assert x[-1, -1] < 0
    assert [(row.kind, row.leaf) for row in fnbp.compare(layer, x, transforms=()).faults] == [("formula", "x")]


@pytest.mark.parametrize("change", [lambda x: jnp.clip(x, -1000, 1000), lambda x: jnp.where(abs(x) < 1e-3, 0, x)])
def test_what_a_backward_does_only_to_large_and_small_inputs_is_seen(change):
    layer = fnbp.dense(3)
    forward = layer.forward

    def changed(params, state, x, ctx):
        y, state, (x,) = forward(params, state, x, ctx)
        return y, state, (change(x),)

    fault = fnbp.compare(layer._replace(forward=changed), X, transforms=()).first_fault
    assert (fault.leaf, fault.kind) == ("W", "formula")


def test_params_state_and_context_are_those_given():
    net = bent(6.0, lambda params, state, ctx: state["s"] * (2 if ctx.train else 1))
    six, three = {"s": np.float32(6)}, {"s": np.float32(3)}
    assert fnbp.compare(net, X, state=six, **QUICK).ok
    assert fnbp.compare(net, X, state=three, ctx=fnbp.Context(train=True), **QUICK).ok
    assert not fnbp.compare(net, X, state=three, **QUICK).ok
    scaled = bent(2.0, lambda params, state, ctx: jax.lax.stop_gradient(params["c"]))
    assert fnbp.compare(scaled, X, params={"c": np.float32(2)}, probes=("given",), transforms=()).ok
    assert not fnbp.compare(scaled, X, params={"c": np.float32(3)}, probes=("given",), transforms=()).ok


def test_drawn_params_are_away_from_their_initial_zeros():
    def forward(params, x):
        return x + params["b"] ** 2, ()

    def backward(params, res, dy):
        return {"b": 0 * params["b"]}, dy

    square = fnbp.stateless(lambda key, x: {"b": jnp.zeros(x.shape[-1], x.dtype)}, forward, backward, "square")
    report = fnbp.compare(square, X, probes=("given",), transforms=())
    assert [(row.path, row.leaf) for row in report.faults] == [("square", "b")]


def test_another_key_draws_another_cotangent_and_the_same_key_the_same():
    net = wrong("tanh", negative, fnbp.tanh())
    reports = [
        fnbp.compare(net, X, key=key, **QUICK) for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    ]
    first, again, other = (report.first_fault.automatic for report in reports)
    assert first == again != other


def test_float32_is_the_mode_afterwards_and_the_arguments_are_untouched():
    params = {"W": rng.standard_normal((3, 7)), "b": rng.standard_normal(3)}
    before = jax.tree.map(np.copy, params)
    assert fnbp.compare(fnbp.dense(3), X.astype(np.float64), params=params, state={}, **QUICK).ok
    assert jnp.zeros(3).dtype == jnp.float32 and not jax.config.jax_enable_x64
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_it_works_where_float64_is_switched_on(x64):
    report = fnbp.compare(fnbp.dense(3), jnp.asarray(X, float), **QUICK)
    assert report.ok and {row.dtype for row in report.rows} == {"float64"}


def test_integers_go_in_and_no_cotangent_comes_out():
    def forward(params, x):
        return params["E"][x], (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"E": jnp.zeros_like(params["E"]).at[x].add(dy)}, np.zeros(x.shape, jax.dtypes.float0)

    def set_not_add(params, res, dy):
        (x,) = res
        return {"E": jnp.zeros_like(params["E"]).at[x].set(dy)}, np.zeros(x.shape, jax.dtypes.float0)

    def table(backward):
        return fnbp.stateless(lambda key, x: {"E": jax.random.normal(key, (17, 5))}, forward, backward, "table")

    distinct = jnp.arange(11)
    assert fnbp.compare(fnbp.serial(table(backward), fnbp.tanh()), distinct).ok
    report = fnbp.compare(table(set_not_add), distinct)
    assert [(row.leaf, row.probe) for row in report.faults] == [("E", "ties")]  # only where a token comes again


def test_a_mask_is_cut_with_its_batch_and_tried_full():
    def forward(params, state, x, ctx):
        weights = jnp.where(ctx.mask, x, -jnp.inf)
        p = jax.nn.softmax(weights, -1)
        return jnp.where(ctx.mask, p, 0), state, (p, ctx.mask)

    def backward(params, res, dy):
        p, mask = res
        dy = jnp.where(mask, dy, 0)
        return {}, p * (dy - jnp.sum(p * dy, -1, keepdims=True))

    layer = fnbp.Layer(lambda key, x: ({}, {}), forward, backward, "masked_softmax")
    mask = rng.random(X.shape) < 0.7
    mask[:, 0] = True
    report = fnbp.compare(layer, X, ctx=fnbp.Context(mask=jnp.asarray(mask)))
    assert [(row.kind, row.probe) for row in report.faults] == [("nonfinite", "masked")]


def test_the_message_of_raise_if_bad_is_the_report():
    report = report_of("one_over_m")
    with pytest.raises(AssertionError) as caught:
        report.raise_if_bad()
    assert str(report) in str(caught.value)


def test_assert_gradients_match_passes_and_fails():
    assert fnbp.testing.assert_gradients_match(fnbp.tanh(), X, **QUICK).ok
    with pytest.raises(AssertionError, match="first fault: tanh -> dx: formula on 'given'"):
        fnbp.testing.assert_gradients_match(wrong("tanh", negative, fnbp.tanh()), X, **QUICK)


def test_the_report_survives_json():
    infinite = wrong("serial[1].softplus", on_dx(lambda dx: dx.at[0, 0].set(jnp.inf)), SMALL)
    for report in (report_of("one_over_m"), fnbp.compare(infinite, X, **QUICK)):
        text = json.dumps(report.to_dict(), allow_nan=False)
        back = json.loads(text)
        assert back["ok"] is False and len(back["rows"]) == len(report.rows)
        assert [(row["path"], row["leaf"]) for row in back["faults"]] == [(row.path, row.leaf) for row in report.faults]


BAD = {
    "no_y": ({"loss": fnbp.mean_squared_error()}, ValueError, "compare: give both loss and y, or neither"),
    "no_loss": ({"y": X}, ValueError, "compare: give both loss and y, or neither"),
    "no_such_loss": ({"loss": "mse", "y": X}, TypeError, "compare: loss must be a Loss, got str 'mse'"),
    "a_reference": (
        {"reference": jnp.tanh},
        TypeError,
        "domain= and name= go with a function",
    ),
    "a_probe": (
        {"probes": ("given", "zeroes")},
        ValueError,
        "unknown probe 'zeroes'; there are: given, another, nearby",
    ),
    "no_given": ({"probes": ("zeros",)}, ValueError, "the first probe must be 'given'"),
    "a_transform": ({"transforms": ("pmap",)}, ValueError, "unknown transform 'pmap'; there are: jit, vmap, sharded"),
    "a_key": ({"key": 3}, TypeError, "compare: expected a random key, e.g. jax.random.key"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        fnbp.compare(fnbp.dense(3), X, **options)


def test_what_is_no_net_or_no_array_is_refused():
    with pytest.raises(TypeError, match=r"compare: tanh makes a layer; call it: tanh\(\)"):
        fnbp.compare(fnbp.tanh, X)
    with pytest.raises(TypeError, match="compare: subject must be a Layer or a function, got int 3"):
        fnbp.compare(3, X)
    with pytest.raises(TypeError, match=r"compare: dense\(3\) is given a list of numbers; give an array"):
        fnbp.compare(fnbp.dense(3), [[1.0, 2.0]])
    with pytest.raises(TypeError, match="compare: a Layer is compared at one x, got 2 positional arguments"):
        fnbp.compare(fnbp.dense(3), X, X)


def test_non_finite_x_params_and_outputs_are_refused():
    x = X.copy()
    x[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"compare: x has 1 non-finite values, the first inf at index \(2, 1\)"):
        fnbp.compare(NET, x)
    params = {"W": np.full((3, 7), np.nan), "b": np.ones(3)}
    with pytest.raises(ValueError, match=r"compare: params has 21 non-finite values, the first nan at index \(0, 0\)"):
        fnbp.compare(fnbp.dense(3), X, params=params)
    root = fnbp.stateless(lambda key, x: {}, lambda p, x: (jnp.sqrt(x), ()), lambda p, r, dy: ({}, dy), "root")
    with pytest.raises(ValueError, match=r"compare: what root returns has .* non-finite values"):
        fnbp.compare(root, X)
    assert not jax.config.jax_enable_x64


def test_a_net_that_returns_no_floating_numbers_is_refused():
    rounded = fnbp.stateless(lambda key, x: {}, lambda p, x: (x.astype(int), ()), lambda p, r, dy: ({}, dy), "rounded")
    with pytest.raises(TypeError, match="compare: what rounded returns must be a floating point array, got int32"):
        fnbp.compare(rounded, X)


def serial_with(mistake):
    """serial(dense, dense, tanh), its backward written anew with a mistake."""

    def make(parts):
        def backward(params, res, dy):
            factors = []
            for i in reversed(range(len(parts))):
                layer, p = parts[0 if mistake == "layer" else i], params[i - 1 if mistake == "params" else i]
                f, dy = layer.backward(p, res[i], dy)
                factors.append(dy if mistake == "tree" else f)
            if mistake == "traced":
                dy = dy + 0 * float(dy.sum())
            if mistake == "one example" and len(dy) == 1:
                dy = 2 * dy
            return tuple(factors if mistake == "order" else reversed(factors)), dy

        return fnbp.serial(*parts)._replace(backward=backward, rebuild=make)

    return make((fnbp.dense(5), fnbp.dense(3), fnbp.tanh()))


@pytest.mark.parametrize(
    ("mistake", "kind"),
    [
        ("none", None),
        ("layer", "raises"),
        ("params", "raises"),
        ("tree", "structure"),
        ("order", "structure"),
        ("traced", "jit"),
        ("one example", "formula"),
    ],
)
def test_a_combinator_with_a_mistake_of_its_own_is_named(mistake, kind):
    report = fnbp.compare(serial_with(mistake), X)
    assert (report.first_fault and (report.first_fault.path, report.first_fault.kind)) == (kind and ("serial", kind))


def test_a_loss_that_takes_small_differences_for_none_is_caught():
    right = fnbp.mean_squared_error()

    def backward(res):
        dp = right.backward(res)
        return jnp.where(abs(dp) < 1e-3, 0, dp)

    report = fnbp.compare(fnbp.identity(), X, loss=right._replace(backward=backward), y=np.float32(X[::-1]))
    assert report.first_fault.path == "mean_squared_error"
