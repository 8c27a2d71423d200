"""Backpropagation: the formulas of the guide, the automatic gradient, contractions, trace, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import fnbp
from tests.cases import normal, relative

CE, BCE, MSE = fnbp.softmax_cross_entropy(), fnbp.binary_cross_entropy(), fnbp.mean_squared_error()
M, N_IN, HIDDEN, K = 13, 7, 5, 3
DOCUMENT = fnbp.serial(fnbp.dense(HIDDEN), fnbp.sigmoid(), fnbp.dense(K), fnbp.sigmoid())
DEEP = fnbp.serial(
    fnbp.dense(11),
    fnbp.gelu(),
    fnbp.skip(fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.skip(fnbp.dense(5)), fnbp.dense(11))),
    fnbp.dense(K),
)
TRACED = fnbp.serial(
    fnbp.dense(HIDDEN),
    fnbp.sigmoid(),
    fnbp.skip(fnbp.serial(fnbp.dense(2), fnbp.tanh(), fnbp.dense(HIDDEN))),
    fnbp.dense(K),
)
POSITIONS = (2, 3)


def drawn(net, shape=(M, N_IN), dtype=float, seed=0):
    rng = np.random.default_rng(seed)
    x = normal(rng, shape, dtype)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype) / 2, shapes), state, x


def labels(shape=(M,), k=K):
    return jnp.asarray(np.random.default_rng(8).integers(0, k, shape), jnp.int32)


def targets(shape=(M, K)):
    return np.random.default_rng(9).uniform(0.1, 0.9, shape)


def is_factor(node):
    return isinstance(node, fnbp.Factor)


def picked(grads, i):
    """Entry i of every tuple of contractions in the grads of a serial of dicts."""
    return [{name: leaf[i] for name, leaf in layer.items()} for layer in grads]


def own_rows(net, loss, params, state, x, y):
    """Each example's gradient of its own loss, by vmap of jax.grad."""

    def own(params, x, y):
        return loss.forward(net.forward(params, state, x[None], fnbp.Context())[0], y[None])[0][0]

    return jax.jit(jax.vmap(jax.grad(own), (None, 0, 0)))(params, x, y)


def squares(rows):
    return sum((np.asarray(row).reshape(len(row), -1) ** 2).sum(1) for row in jax.tree.leaves(rows))


@pytest.mark.parametrize("one_hot", [False, True], ids=["labels", "one_hot"])
def test_the_documents_network_has_the_documents_gradients(x64, one_hot):
    params, state, x = drawn(DOCUMENT)
    y = labels()
    (W1, b1), (W2, b2) = ((np.asarray(p["W"]), np.asarray(p["b"])) for p in (params[0], params[2]))
    X, Y = np.asarray(x), np.eye(K)[np.asarray(y)]

    a1 = expit(X @ W1.T + b1)
    a2 = expit(a1 @ W2.T + b2)
    y_hat = np.exp(a2) / np.exp(a2).sum(1, keepdims=True)
    J = -(Y * np.log(y_hat)).sum() / M
    da2 = (y_hat - Y) / M
    dz2 = da2 * a2 * (1 - a2)
    da1 = dz2 @ W2
    dz1 = da1 * a1 * (1 - a1)
    grads = ({"W": dz1.T @ X, "b": dz1.sum(0)}, {}, {"W": dz2.T @ a1, "b": dz2.sum(0)}, {})

    out = jax.jit(fnbp.backprop(DOCUMENT, CE))(params, state, x, jnp.asarray(Y) if one_hot else y)
    assert relative((out.value, out.prediction, out.grads, out.dx), (J, a2, grads, dz1 @ W1)) <= 1e-12


@pytest.mark.parametrize("m", [1, M])
def test_the_documents_worked_example_has_its_gradients(x64, m):
    net = fnbp.serial(fnbp.dense(3), fnbp.sigmoid(), fnbp.dense(1), fnbp.sigmoid())
    params, state, x = drawn(net, (m, 2))
    y = jnp.asarray(np.random.default_rng(1).integers(0, 2, (m, 1)))
    p1, p2 = (jax.tree.map(np.asarray, p) for p in (params[0], params[2]))

    J, d_w2, d_b2, d_W1, d_b1 = 0.0, 0.0, 0.0, 0.0, 0.0
    for x_i, y_i in zip(np.asarray(x), np.asarray(y), strict=True):
        a1 = expit(p1["W"] @ x_i + p1["b"])
        y_hat = expit(p2["W"] @ a1 + p2["b"])
        J += -(y_i * np.log(y_hat) + (1 - y_i) * np.log(1 - y_hat)).item() / m
        dz2 = y_hat - y_i
        dz1 = (p2["W"].T @ dz2) * a1 * (1 - a1)  # not da1: it holds the slope
        d_w2 = d_w2 + np.outer(dz2, a1) / m
        d_b2 = d_b2 + dz2 / m
        d_W1 = d_W1 + np.outer(dz1, x_i) / m
        d_b1 = d_b1 + dz1 / m

    (value, _), grads = jax.jit(fnbp.value_and_grad(net, BCE))(params, state, x, y)
    expected = ({"W": d_W1, "b": d_b1}, {}, {"W": d_w2, "b": d_b2}, {})
    assert relative((value, grads), (J, expected)) <= 1e-12


NETS = {
    "document": (DOCUMENT, CE, (M, N_IN), labels),
    "deep_under_mse": (DEEP, MSE, (M, N_IN), targets),
    "deep_at_positions": (DEEP, CE, (M, *POSITIONS, N_IN), lambda: labels((M, *POSITIONS))),
    "one_layer": (fnbp.dense(K), fnbp.half_squared_error(), (M, N_IN), targets),
    "logits": (fnbp.serial(fnbp.dense(K)), fnbp.binary_cross_entropy(True), (M, N_IN), targets),
    "one_example": (fnbp.serial(fnbp.dense(K), fnbp.log_softmax()), CE, (1, N_IN), lambda: labels((1,))),
}
each_net = pytest.mark.parametrize(("net", "loss", "shape", "target"), NETS.values(), ids=NETS)


@each_net
def test_value_and_grad_is_the_automatic_one(x64, net, loss, shape, target):
    params, state, x = drawn(net, shape)
    y = target()
    manual, automatic = fnbp.value_and_grad(net, loss), fnbp.automatic_value_and_grad(net, loss)
    found, expected = jax.jit(lambda *args: (manual(*args), automatic(*args)))(params, state, x, y)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative(found, expected) <= 1e-12


def test_eager_is_jitted(x64):
    net = fnbp.serial(fnbp.dense(K), fnbp.sigmoid())
    params, state, x = drawn(net)
    manual, automatic = fnbp.value_and_grad(net, MSE), fnbp.automatic_value_and_grad(net, MSE)
    eager = manual(params, state, x, targets()), automatic(params, state, x, targets())
    jitted = jax.jit(lambda *args: (manual(*args), automatic(*args)))(params, state, x, targets())
    assert relative(eager, jitted) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-11)])
def test_500_steps_of_descent_have_the_same_losses(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params, state, x = drawn(DOCUMENT, dtype=dtype)
        y = labels()

        def losses(gradient):
            def step(carry, _):
                params, x = carry
                (value, _), grads = gradient(params, state, x, y)
                return (jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), x), value

            run = jax.jit(lambda params, x: jax.lax.scan(step, (params, x), length=500)[1])
            return np.asarray(run(params, x), np.float64)

        manual = losses(fnbp.value_and_grad(DOCUMENT, CE))
        automatic = losses(fnbp.automatic_value_and_grad(DOCUMENT, CE))
    assert manual[-1] < 0.8 * manual[0]
    np.testing.assert_allclose(manual, automatic, rtol=tolerance)


def test_dx_and_prediction_and_state_of_a_pass(x64):
    params, state, x = drawn(DEEP)
    y = targets()

    def counted():
        def forward(params, state, x, ctx):
            return x, {"n": state["n"] + 1}, ()

        return fnbp.Layer(lambda key, x: ({}, {"n": 0}), forward, lambda params, res, dy: ({}, dy), "counter")

    net = fnbp.serial(DEEP, counted())
    J = lambda x: jnp.mean(jnp.mean((DEEP.forward(params, state, x, fnbp.Context())[0] - y) ** 2, 1))  # noqa: E731
    (value, dx) = jax.jit(jax.value_and_grad(J))(x)
    run = jax.jit(fnbp.backprop(net, MSE))
    out = run((params, {}), (state, {"n": 4}), x, y)
    assert out.state[1] == {"n": 5}
    assert relative((out.value, out.dx), (value, dx)) <= 1e-12
    assert relative(jnp.mean((out.prediction - y) ** 2), value) <= 1e-12
    (value, after), grads = jax.jit(fnbp.value_and_grad(net, MSE))((params, {}), (state, {"n": 4}), x, y)
    assert after[1] == {"n": 5} and relative((value, grads), (out.value, out.grads)) <= 1e-12


def test_the_context_reaches_the_layers_of_every_function():
    def forward(params, state, x, ctx):
        return (2 * x if ctx.train else x), state, (ctx.train,)

    net = fnbp.serial(
        fnbp.dense(K),
        fnbp.Layer(lambda key, x: ({}, {}), forward, lambda p, res, dy: ({}, 2 * dy if res[0] else dy), "twice"),
    )
    params, state, x = drawn(net)
    makers = (fnbp.backprop, fnbp.value_and_grad, fnbp.automatic_value_and_grad, fnbp.trace, fnbp.per_example_norms)
    contexts = ((), (fnbp.Context(),), (fnbp.Context(train=True),))
    run = jax.jit(lambda *args: [[make(net, MSE)(*args, *context) for context in contexts] for make in makers])
    *passes, (plain, also, doubled) = run(params, state, x, targets())
    for quiet, silent, train in passes:
        values = [jax.tree.leaves(out)[0] for out in (quiet, silent, train)]
        assert values[0] == values[1] == jax.tree.leaves(passes[0][0])[0]
        assert values[2] == jax.tree.leaves(passes[0][2])[0] != values[0]
    assert (plain == also).all() and (plain != doubled).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("positions", [(), POSITIONS], ids=["one", "shared"])
def test_per_example_norms_are_those_of_vmap_of_grad(dtype, tolerance, positions):
    with jax.enable_x64(dtype == "float64"):
        params, state, x = drawn(TRACED, (M, *positions, N_IN), dtype)
        y = labels((M, *positions))
        norms = jax.jit(fnbp.per_example_norms(TRACED, CE))(params, state, x, y)
        rows = own_rows(TRACED, CE, params, state, x, y)
    assert norms.shape == (M,)
    assert relative(norms, np.sqrt(squares(rows))) <= tolerance


def test_a_tuple_of_contractions_gives_tuples(x64):
    net = fnbp.serial(fnbp.dense(HIDDEN), fnbp.tanh(), fnbp.dense(K))
    params, state, x = drawn(net)
    y = labels()
    contract = (fnbp.total, (fnbp.sq_norms, fnbp.per_example), fnbp.keep)
    grads = jax.jit(fnbp.backprop(net, CE, contract))(params, state, x, y).grads
    rows = own_rows(net, CE, params, state, x, y)
    means = jax.tree.map(lambda row: row.mean(0), rows)
    assert relative(picked(grads, 0), list(means)) <= 1e-12
    nested = picked(grads, 1)
    squared = [{name: squares(row) for name, row in layer.items()} for layer in rows]
    assert relative(picked(nested, 0), squared) <= 1e-12
    assert relative(picked(nested, 1), list(rows)) <= 1e-12
    assert [type(leaf).__name__ for layer in picked(grads, 2) for leaf in layer.values()] == ["Outer", "Sum"] * 2


def test_a_contraction_of_ones_own_sees_each_examples_own_loss(x64):
    net = fnbp.serial(fnbp.dense(HIDDEN), fnbp.tanh(), fnbp.dense(K))
    params, state, x = drawn(net)
    y = labels()
    rows = own_rows(net, CE, params, state, x, y)
    seen = []

    def summed(factor):
        seen.append(type(factor).__name__)
        return factor.total()

    grads = jax.jit(fnbp.backprop(net, CE, summed))(params, state, x, y).grads
    assert sorted(seen) == ["Outer", "Outer", "Sum", "Sum"]
    assert relative(grads, jax.tree.map(lambda row: row.sum(0), rows)) <= 1e-12
    grads = jax.jit(fnbp.backprop(net, CE, lambda f: f.per_example().max(0)))(params, state, x, y).grads
    assert relative(grads, jax.tree.map(lambda row: row.max(0), rows)) <= 1e-12


def test_keep_returns_the_factors_of_each_examples_own_loss(x64):
    net = fnbp.serial(fnbp.dense(HIDDEN), fnbp.tanh(), fnbp.dense(K))
    params, state, x = drawn(net)
    y = labels()
    out = jax.jit(fnbp.backprop(net, CE, fnbp.keep))(params, state, x, y)
    a = np.asarray(out.prediction)
    delta = np.exp(a) / np.exp(a).sum(1, keepdims=True) - np.eye(K)[np.asarray(y)]
    last, first = out.grads[2], out.grads[0]
    assert isinstance(last["W"], fnbp.Outer) and isinstance(last["b"], fnbp.Sum)
    assert relative((last["W"].d, last["b"].d, first["W"].x), (delta, delta, x)) <= 1e-12
    assert jax.tree.structure(out.grads, is_leaf=is_factor) == jax.tree.structure(params)


def test_a_finished_gradient_allows_total_alone_and_the_error_names_the_path():
    layer = fnbp.dense(HIDDEN)

    def fused(params, res, dy):
        factors, dx = layer.backward(params, res, dy)
        return {name: factor.total() for name, factor in factors.items()}, dx

    net = fnbp.serial(fnbp.dense(HIDDEN), fnbp.skip(layer._replace(backward=fused)))
    params, state, x = drawn(net)
    args = params, state, x, targets((M, HIDDEN))
    path = r"serial\[1\].skip\[0\].dense\(5\)"
    words = f"{path}: its backward returns a finished gradient, so only total is defined"
    for contract, name in ((fnbp.sq_norms, "sq_norms"), ((fnbp.total, fnbp.keep), "keep"), (lambda f: f, "<lambda>")):
        with pytest.raises(TypeError, match=f"{words}, not {name}"):
            fnbp.backprop(net, MSE, contract)(*args)
    with pytest.raises(TypeError, match=words) as caught:
        fnbp.per_example_norms(net, MSE)(*args)
    assert caught.value.__notes__ == ["in skip[0].dense(5)", "in serial[1].skip"]
    assert fnbp.backprop(net, MSE, (fnbp.total,))(*args).grads[1][0]["W"][0].shape == (HIDDEN, HIDDEN)


def test_trace_has_every_layers_output_and_the_gradient_there(x64):
    params, state, x = drawn(TRACED)
    y = labels()
    paths = [path for path, _ in fnbp.leaves(TRACED)]
    out = jax.jit(fnbp.trace(TRACED, CE))(params, state, x, y)
    assert list(out.outputs) == list(out.deltas) == paths

    def J(probes):
        seen = {}

        def probed(path, layer):
            def forward(params, state, x, ctx):
                z, state, res = layer.forward(params, state, x, ctx)
                seen[path] = z
                return z + probes[path], state, res

            return layer._replace(forward=forward)

        prediction = fnbp.map_layers(probed, TRACED).forward(params, state, x, fnbp.Context())[0]
        return jnp.mean(CE.forward(prediction, y)[0]), seen

    zeros = {path: jnp.zeros_like(z) for path, z in out.outputs.items()}
    deltas, outputs = jax.jit(jax.grad(J, has_aux=True))(zeros)
    assert relative(dict(out.outputs), outputs) <= 1e-12
    assert relative(dict(out.deltas), deltas) <= 1e-12


def test_trace_has_all_that_a_pass_has(x64):
    params, state, x = drawn(TRACED)
    out = jax.jit(fnbp.trace(TRACED, CE))(params, state, x, labels())
    whole = jax.jit(fnbp.backprop(TRACED, CE))(params, state, x, labels())
    assert out._fields[: len(whole._fields)] == whole._fields
    assert jax.tree.structure(out[:5]) == jax.tree.structure(tuple(whole))
    assert relative(out[:5], tuple(whole)) <= 1e-12


def test_trace_of_a_lone_layer():
    params, state, x = drawn(fnbp.dense(K))
    out = fnbp.trace(fnbp.dense(K), MSE)(params, state, x, targets())
    assert list(out.outputs) == list(out.deltas) == ["dense(3)"]
    assert set(out.grads) == {"W", "b"}


def test_a_trace_of_which_only_the_gradient_is_used_costs_what_the_gradient_costs():
    args = *drawn(TRACED), labels()
    compiled = [
        jax.jit(function).lower(*args).compile()
        for function in (
            fnbp.value_and_grad(TRACED, CE),
            lambda *args: (lambda out: ((out.value, out.state), out.grads))(fnbp.trace(TRACED, CE)(*args)),
        )
    ]
    flops = [c.cost_analysis()["flops"] for c in compiled]
    memory = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    assert flops[0] == flops[1] > 0
    assert memory[0] == memory[1]


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_gradients_have_the_dtype_of_params_and_the_value_at_least_float32(x64, dtype, value):
    params, state, x = drawn(DOCUMENT, dtype=dtype)
    out = jax.eval_shape(fnbp.backprop(DOCUMENT, CE), params, state, x, labels())
    assert out.value.dtype == value and out.value.shape == ()
    assert {leaf.dtype.name for leaf in jax.tree.leaves((out.grads, out.dx, out.prediction))} == {dtype}
    norms = jax.eval_shape(fnbp.per_example_norms(DOCUMENT, CE), params, state, x, labels())
    assert norms.dtype == value


def test_a_second_call_traces_nothing():
    params, state, x = drawn(DOCUMENT)
    for make in (fnbp.value_and_grad, fnbp.per_example_norms):
        run = jax.jit(make(DOCUMENT, CE))
        run(params, state, x, labels())
        run(jax.tree.map(jnp.negative, params), state, 2 * x, labels()[::-1])
        assert run._cache_size() == 1


def test_numpy_arrays_will_do():
    params, state, x = drawn(DOCUMENT)
    run = fnbp.value_and_grad(DOCUMENT, CE)
    plain = jax.tree.map(np.asarray, (params, state, x, labels()))
    assert relative(run(*plain), run(params, state, x, labels())) <= 1e-6


BAD = {
    "no_examples": ((0, N_IN), (0,), None, ValueError, "backprop: a batch of 0 examples has no mean loss"),
    "other_length": (
        (M, N_IN),
        (5,),
        None,
        ValueError,
        r"backprop: x and y must have equally many examples, got \[5, 13\]",
    ),
    "nan": (
        (M, N_IN),
        (M,),
        np.nan,
        ValueError,
        r"backprop: x has 2 non-finite values, the first nan at index \(4, 3\)",
    ),
    "inf": (
        (M, N_IN),
        (M,),
        -np.inf,
        ValueError,
        r"backprop: x has 2 non-finite values, the first -inf at index \(4, 3\)",
    ),
}
each_bad = pytest.mark.parametrize(("x_shape", "y_shape", "bad", "error", "words"), BAD.values(), ids=BAD)
each_maker = pytest.mark.parametrize(
    "make", [fnbp.value_and_grad, fnbp.per_example_norms, fnbp.automatic_value_and_grad]
)


@each_maker
@each_bad
def test_bad_data_are_refused(make, x_shape, y_shape, bad, error, words):
    params, state, _ = drawn(DOCUMENT)
    x = np.ones(x_shape, np.float32)
    if bad is not None:
        x[4, 3] = x[5, 0] = bad
    with pytest.raises(error, match=words):
        make(DOCUMENT, CE)(params, state, x, np.zeros(y_shape, int))


@each_maker
@pytest.mark.parametrize(
    ("x", "y", "came"),
    [
        ([[1.0, 2.0]], np.zeros(1, int), "float 1.0"),
        (np.ones((1, N_IN)), [2], "int 2"),
        (np.ones((1, N_IN)), 2, "int 2"),
    ],
    ids=["list_of_x", "list_of_y", "number"],
)
def test_what_is_no_array_is_refused(make, x, y, came):
    params, state, _ = drawn(DOCUMENT)
    with pytest.raises(
        TypeError, match=f"backprop: x and y must be arrays with a first axis, the examples; got {came}"
    ):
        make(DOCUMENT, CE)(params, state, x, y)


@each_maker
def test_non_finite_targets_are_refused(make):
    params, state, x = drawn(DOCUMENT)
    y = targets()
    y[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"backprop: y has 1 non-finite values, the first nan at index \(4, 1\)"):
        make(DOCUMENT, MSE)(params, state, x, y)


@each_maker
def test_a_loss_that_returns_no_loss_an_example_is_refused(make):
    params, state, x = drawn(DOCUMENT)
    whole = MSE._replace(forward=lambda p, t: (jnp.mean(MSE.forward(p, t)[0]), (p, t)), name="whole")
    with pytest.raises(ValueError, match=r"whole: forward must return one loss an example, shape \(13,\), got \(\)"):
        jax.eval_shape(make(DOCUMENT, whole), params, state, x, targets())


@pytest.mark.parametrize("make", [fnbp.value_and_grad, fnbp.trace])
def test_a_backward_that_returns_another_shape_or_tree_is_refused(make):
    layer = fnbp.dense(K)

    def transposed(params, res, dy):
        factors, dx = layer.backward(params, res, dy)
        return factors | {"W": fnbp.Outer(res[0], dy)}, dx

    def short(params, res, dy):
        factors, dx = layer.backward(params, res, dy)
        return {"W": factors["W"]}, dx

    params, state, x = drawn(fnbp.serial(layer))
    for wrong, words in (
        (transposed, r"params\[0\]\['W'\] has shape \(3, 7\), its gradient \(7, 3\): is its backward wrong"),
        (short, "backward returns PyTreeDef.*, params are PyTreeDef"),
    ):
        net = fnbp.serial(layer._replace(backward=wrong))
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(make(net, MSE), params, state, x, targets())


def test_non_finite_values_are_found_in_bfloat16_too():
    params, state, _ = drawn(DOCUMENT, dtype=jnp.bfloat16)
    x = jnp.ones((M, N_IN), jnp.bfloat16).at[2, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"x has 1 non-finite values, the first nan at index \(2, 1\)"):
        fnbp.value_and_grad(DOCUMENT, CE)(params, state, x, labels())


def test_params_of_another_net_are_refused_and_the_place_is_named():
    params, state, x = drawn(DOCUMENT)
    run = fnbp.value_and_grad(DOCUMENT, CE)
    with pytest.raises(
        ValueError,
        match="serial: params must have 4 entries, one for each layer, got 3; do they belong to",
    ):
        run(params[:3], state, x, labels())
    with pytest.raises(ValueError, match=r"dense\(3\): params\['W'\] has shape \(5, 7\)") as caught:
        run((params[0], {}, params[0], {}), state, x, labels())
    assert caught.value.__notes__ == ["in serial[2].dense(3)"]


def test_targets_that_do_not_fit_the_loss_are_refused():
    params, state, x = drawn(DOCUMENT)
    with pytest.raises(ValueError, match="label 3 at index"):
        fnbp.value_and_grad(DOCUMENT, CE)(params, state, x, labels() + 1)
    with pytest.raises(ValueError, match=r"mean_squared_error: target has shape \(13,\), prediction \(13, 3\)"):
        fnbp.value_and_grad(DOCUMENT, MSE)(params, state, x, np.zeros(M))


@pytest.mark.parametrize("contract", ["total", None, (fnbp.total, 3)], ids=["name", "none", "in_a_tuple"])
def test_a_contraction_that_is_no_function_is_refused_at_once(contract):
    culprit = contract[1] if isinstance(contract, tuple) else contract
    with pytest.raises(
        TypeError,
        match=f"contract must be a Contraction, .*a tuple of these, or a dict of any of these; got .*{culprit!r}",
    ):
        fnbp.backprop(DOCUMENT, CE, contract)


@pytest.mark.parametrize("make", [fnbp.backprop, fnbp.value_and_grad, fnbp.per_example_norms, fnbp.trace])
def test_what_is_no_net_or_no_loss_is_refused_at_once(make):
    with pytest.raises(TypeError, match=r"net must be a Layer, got function sigmoid; call it: sigmoid\(\)"):
        make(fnbp.sigmoid, CE)
    with pytest.raises(TypeError, match="loss must be a Loss, got function mean_squared_error; call it: mean"):
        make(DOCUMENT, fnbp.mean_squared_error)


def test_a_net_without_parameters_has_no_norms():
    with pytest.raises(ValueError, match="per_example_norms: serial has no parameters"):
        jax.jit(fnbp.per_example_norms(fnbp.serial(fnbp.tanh()), CE))(({},), ({},), jnp.ones((M, K)), labels())


def test_x_may_be_a_constant_of_a_jitted_function():
    params, state, x = drawn(DOCUMENT)
    run = fnbp.value_and_grad(DOCUMENT, CE)
    constant = jax.jit(lambda params: run(params, state, x, labels()))(params)
    assert relative(constant, jax.jit(run)(params, state, x, labels())) <= 1e-6


def test_a_loss_that_is_not_one_number_an_example_is_refused():
    net, x = fnbp.serial(fnbp.dense(3)), jnp.ones((7, 5))
    params, state = net.init(jax.random.key(0), x)
    for reduce, shape in ((lambda a: a, r"\(7, 3\)"), (jnp.mean, r"\(\)")):
        loss = fnbp.Loss(lambda p, t, reduce=reduce: (reduce((p - t) ** 2), ()), lambda res: None, "mine")
        words = rf"mine: forward must return one loss an example, shape \(7,\), got {shape}"
        for make in (fnbp.value_and_grad, fnbp.automatic_value_and_grad):
            with pytest.raises(ValueError, match=words):
                make(net, loss)(params, state, x, jnp.zeros((7, 3)))


def test_gradients_take_the_dtype_of_params_where_x_is_wider():
    net, x, y = fnbp.serial(fnbp.dense(3)), jnp.linspace(0, 1, 35).reshape(7, 5), jnp.arange(7) % 3
    params, state = net.init(jax.random.key(0), x.astype(jnp.bfloat16))
    for make in (fnbp.value_and_grad, fnbp.automatic_value_and_grad):
        grads = make(net, fnbp.softmax_cross_entropy())(params, state, x, y)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_a_large_batch_of_float16_has_gradients_and_norms():
    m = 70_001
    net, x, y = fnbp.serial(fnbp.dense(2)), jnp.ones((m, 3), jnp.float16), jnp.zeros(m, int)
    params, state = net.init(jax.random.key(0), x)
    (_, _), grads = jax.jit(fnbp.value_and_grad(net, fnbp.softmax_cross_entropy()))(params, state, x, y)
    assert all(float(jnp.abs(leaf).max()) > 0.1 for leaf in jax.tree.leaves(grads))
    norms = jax.jit(fnbp.per_example_norms(net, fnbp.softmax_cross_entropy()))(params, state, x, y)
    assert bool(jnp.isfinite(norms).all())


def test_a_gradient_of_another_shape_than_its_parameter_is_refused():
    right = fnbp.dense(3)
    swapped = right._replace(
        backward=lambda p, res, dz: ({"W": fnbp.Outer(res[0], dz), "b": fnbp.Sum(dz)}, dz @ p["W"])
    )
    net, x = fnbp.serial(swapped), jnp.ones((7, 5))
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"params\[0\]\['W'\] has shape \(3, 5\), its gradient \(5, 3\)"):
        fnbp.value_and_grad(net, fnbp.softmax_cross_entropy())(params, state, x, jnp.arange(7) % 3)


def test_targets_that_are_not_finite_are_refused():
    net, x = fnbp.serial(fnbp.dense(3)), jnp.ones((7, 5))
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="backprop: y has 21 non-finite values, the first nan at index"):
        fnbp.value_and_grad(net, fnbp.mean_squared_error())(params, state, x, np.full((7, 3), np.nan))
