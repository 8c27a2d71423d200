"""Per-example quantities are right or refused: layers that mix, factors that do not fit, foreign layers, any weight."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import CASES, draw, normal, relative, sum_of_squares

LOSS, MSE, TRAIN = sum_of_squares(), fnbp.mean_squared_error(), fnbp.Context(train=True)
PER_EXAMPLE = (fnbp.sq_norms, fnbp.per_example, fnbp.keep, lambda factor: factor, fnbp.with_path(lambda path, f: f))


def drawn(net, shape, seed=0):
    rng = np.random.default_rng(seed)
    x = normal(rng, shape, float)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    state = net.init(jax.random.key(0), x)[1] if jax.tree.leaves(state) else state
    return jax.tree.map(lambda a: normal(rng, a.shape, a.dtype), shapes), state, x


def rows_by_grad(net, loss, params, state, x, y, ctx=fnbp.Context()):
    """The gradient of each example's own loss, by jax."""

    def own(params, x, y):
        prediction = net.forward(params, state, x[None], ctx)[0]
        return loss.forward(prediction, y[None])[0][0]

    return jax.vmap(jax.grad(own), (None, 0, 0))(params, x, y)


# --- layers that mix the examples ---

MIXING = [case for case in CASES if case.mixes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_layer_mixes_as_it_says(x64, case):
    """Another last example changes what the first one gets, in exactly the layers that say so."""
    params, state, x, _ = draw(case, case.shapes[0])
    changed = x.at[-1].set(0) if case.tokens else x.at[-1].add(3.0)
    y, other = (case.layer.forward(params, state, a, case.context)[0][0] for a in (x, changed))
    says = (
        any(leaf.traits.mixes in ("training", "always") for _, leaf in fnbp.leaves(case.layer)) and case.context.train
    )
    assert says == case.mixes == bool(relative(other, y) > 1e-9)


@pytest.mark.parametrize("wrap", ["itself", "freeze", "remat", "skip", "repeat", "from_jax", "cast"])
def test_what_lies_below_a_layer_that_mixes_has_no_gradient_of_its_own(x64, wrap):
    """Parameters or not: a layer of ones own that mixes, without any."""

    def forward(params, state, x, ctx):
        return x - jnp.mean(x, 0), state, ()

    def backward(params, res, dy):
        return {}, dy - jnp.mean(dy, 0)

    traits = fnbp.Traits(mixes="always")
    mixes = fnbp.Layer(lambda key, x: ({}, {}), forward, backward, "centre", traits=traits)
    wrapped = {
        "itself": lambda layer: layer,
        "freeze": fnbp.freeze,
        "remat": fnbp.remat,
        "skip": fnbp.skip,
        "repeat": lambda layer: fnbp.repeat(layer, 2),
        "from_jax": fnbp.from_jax,
        "cast": lambda layer: fnbp.cast(layer, jnp.float32),
    }[wrap](mixes)
    net = fnbp.serial(fnbp.dense(3), wrapped, fnbp.dense(2))
    params, state, x = drawn(net, (5, 4))
    for contract in PER_EXAMPLE:
        with pytest.raises(TypeError, match=r"serial\[1\].*centre.*: it mixes the examples of a batch"):
            fnbp.backprop(net, MSE, contract)(params, state, x, jnp.zeros((5, 2)))
    assert fnbp.compare(net, x, params=params, state=state, loss=MSE, y=jnp.zeros((5, 2))).ok


def test_batch_norm_mixes_in_training_alone(x64):
    net = fnbp.serial(fnbp.dense(3), fnbp.batch_norm(), fnbp.dense(2))
    params, state, x = drawn(net, (5, 4))
    state = net.forward(params, state, x, TRAIN)[1]
    norms = fnbp.per_example_norms(net, MSE)
    with pytest.raises(TypeError, match=r"serial\[1\].batch_norm: it mixes the examples"):
        norms(params, state, x, jnp.zeros((5, 2)), TRAIN)
    rows = rows_by_grad(net, MSE, params, state, x, jnp.zeros((5, 2)))
    due = jnp.sqrt(sum(jnp.sum(row.reshape(5, -1) ** 2, 1) for row in jax.tree.leaves(rows)))
    assert relative(norms(params, state, x, jnp.zeros((5, 2))), due) <= 1e-12


def test_a_frozen_batch_norm_stands_still_and_mixes_nothing(x64):
    norm = fnbp.batch_norm()
    trained = norm.forward(
        *norm.init(jax.random.key(0), jnp.ones((5, 3))), normal(np.random.default_rng(1), (5, 3), float), TRAIN
    )[1]
    net = fnbp.serial(
        fnbp.dense(3), fnbp.freeze(fnbp.serial(norm, fnbp.repeat(fnbp.skip(fnbp.dense(3)), 2))), fnbp.dense(2)
    )
    params, state, x = drawn(net, (5, 4))
    frozen = state[1] | {"state": (trained, *state[1]["state"][1:])}
    state = (state[0], frozen, state[2])
    y, after, _ = net.forward(params, state, x, TRAIN)
    assert relative(after, state) == 0 and relative(y, net.forward(params, state, x, fnbp.Context())[0]) == 0
    rows = rows_by_grad(net, MSE, params, state, x, jnp.zeros((5, 2)), TRAIN)
    found = fnbp.backprop(net, MSE, fnbp.per_example)(params, state, x, jnp.zeros((5, 2)), TRAIN).grads
    assert relative(found, rows) <= 1e-12


# --- factors that do not fit ---


def table(backward_of):
    """y = x g^T for g (2, 2), and a backward that makes a factor of dy and x."""

    def forward(params, x):
        return x @ params["g"].T, (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"g": backward_of(dy, x)}, dy @ params["g"]

    return fnbp.stateless(lambda key, x: {"g": jnp.ones((2, 2))}, forward, backward, "table")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Crossed(fnbp.Outer):
    """An Outer whose examples stand in the second axis of per_example."""

    def per_example(self):
        return jnp.swapaxes(super().per_example(), 0, 1)


@dataclass(frozen=True)
class Unregistered(fnbp.Sum):
    """A factor that JAX does not know."""


FACTORS = [
    (
        lambda dy, x: fnbp.Sum((dy * x).reshape(5, 2, 1) * jnp.ones(2)),
        r"table: params\['g'\] has shape \(2, 2\), its gradient \(2,\)",
    ),
    (lambda dy, x: fnbp.Outer(dy[:3], x[:3]), r"per_example of its Outer \(3, 2, 2\): expected \(5, 2, 2\)"),
    (lambda dy, x: Crossed(dy, x), r"per_example of its Crossed \(2, 5, 2\): expected \(5, 2, 2\): is the example"),
    (lambda dy, x: fnbp.factors.PerExample(dy), r"table: params\['g'\] has shape \(2, 2\), its gradient \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize("contract", PER_EXAMPLE, ids=["sq_norms", "per_example", "keep", "own", "with_path"])
@pytest.mark.parametrize(("make", "message"), FACTORS)
def test_a_factor_that_does_not_fit_is_refused_by_every_contraction(contract, make, message):
    x = jnp.ones((5, 2))
    for net, params in ((table(make), {"g": jnp.ones((2, 2))}), (fnbp.serial(table(make)), ({"g": jnp.ones((2, 2))},))):
        with pytest.raises(ValueError, match=message):
            fnbp.backprop(net, MSE, contract)(
                params, jax.tree.map(lambda a: a, net.init(jax.random.key(0), x)[1]), x, x
            )


def test_a_factor_that_jax_does_not_know_is_told_how():
    net = fnbp.serial(fnbp.bias()._replace(backward=lambda params, res, dy: ({"b": Unregistered(dy)}, dy)))
    x = jnp.ones((5, 2))
    with pytest.raises(TypeError, match=r"register Unregistered with @fnbp.register_factor"):
        fnbp.per_example_norms(net, MSE)(*net.init(jax.random.key(0), x), x, x)


def test_a_factor_without_d_or_methods_says_what_it_lacks():
    class Nameless(fnbp.Sum):
        d = None  # type: ignore[assignment]

        def __init__(self):
            pass

    with pytest.raises(TypeError, match=r"Nameless: a Factor needs a field d, the error, \(m, ...\), or a property"):
        assert Nameless().examples

    class Half(fnbp.Factor):
        def total(self):
            return jnp.zeros(())

    with pytest.raises(TypeError, match=r"abstract methods? .*per_example.*scaled"):
        Half()  # type: ignore[abstract]


# --- any weight: PerExample ---


def scaled():
    """y = c x, a scalar c."""

    def forward(params, x):
        return params["c"] * x, (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"c": fnbp.factors.PerExample(jnp.sum(dy * x, range(1, x.ndim)))}, params["c"] * dy

    return fnbp.stateless(lambda key, x: {"c": jnp.ones((), x.dtype)}, forward, backward, "scaled", mask="elementwise")


def splines(n_out, k=3):
    """y_o = sum_ik C_oik x_i^k, a weight of rank 3."""

    def powers(x):
        return x[..., None] ** jnp.arange(k, dtype=x.dtype)

    def init(key, x):
        return {"C": jax.random.normal(key, (n_out, x.shape[-1], k), x.dtype)}

    def forward(params, x):
        return jnp.einsum("mik,oik->mo", powers(x), params["C"]), (x,)

    def backward(params, res, dy):
        (x,) = res
        slope = jnp.arange(1, k, dtype=x.dtype) * powers(x)[..., :-1]
        dx = jnp.einsum("mo,oik,mik->mi", dy, params["C"][..., 1:], slope)
        return {"C": fnbp.factors.PerExample(jnp.einsum("mo,mik->moik", dy, powers(x)))}, dx

    return fnbp.stateless(init, forward, backward, f"splines({n_out})")


@pytest.mark.parametrize(
    "net",
    [
        fnbp.serial(scaled(), splines(3), scaled()),
        fnbp.repeat(fnbp.serial(splines(4), scaled()), 2),
        fnbp.cast(fnbp.serial(fnbp.dense(3), scaled()), jnp.float64),
    ],
    ids=["serial", "repeat", "cast"],
)
def test_per_example_is_a_factor_for_weights_of_any_rank(x64, net):
    params, state, x = drawn(net, (5, 4))
    y = net.forward(params, state, x, fnbp.Context())[0] + 1
    rows = rows_by_grad(net, MSE, params, state, x, y)
    found = jax.jit(fnbp.backprop(net, MSE, (fnbp.per_example, fnbp.sq_norms, fnbp.total)))(params, state, x, y).grads

    def pick(i):
        is_triple = lambda node: isinstance(node, tuple) and len(node) == 3 and hasattr(node[0], "dtype")  # noqa: E731
        return jax.tree.map(lambda leaf: leaf[i], found, is_leaf=is_triple)

    assert relative(pick(0), rows) <= 1e-12
    assert relative(pick(1), jax.tree.map(lambda r: jnp.sum(r.reshape(5, -1) ** 2, 1), rows)) <= 1e-12
    assert relative(pick(2), jax.tree.map(lambda r: r.mean(0), rows)) <= 1e-12
    assert fnbp.compare(net, x, params=params, state=state).ok


def test_per_example_scales_each_example():
    factor = fnbp.factors.PerExample(jnp.arange(6.0).reshape(2, 3))
    assert factor.scaled(jnp.array([2.0, 0.0])).total().tolist() == [0.0, 2.0, 4.0]


# --- foreign layers ---

FOREIGN = [pytest.param(case, id=case.id) for case in CASES if not case.mixes and case.id != "from_jax"]


@pytest.mark.parametrize("case", FOREIGN)
def test_from_jax_keeps_the_per_example_tools(x64, case):
    params, state, x, y = draw(case, case.shapes[0])
    foreign = fnbp.from_jax(case.layer)
    contract = (fnbp.per_example, fnbp.sq_norms, fnbp.total)
    if not jax.tree.leaves(params):
        return
    if case.context.train:
        with pytest.raises(TypeError, match="draws for a batch as a whole"):
            fnbp.backprop(foreign, LOSS, contract)(params, state, x, y, case.context)
        return
    ours, theirs = (
        jax.jit(fnbp.backprop(net, LOSS, contract))(params, state, x, y, case.context) for net in (case.layer, foreign)
    )
    assert relative(theirs, ours) <= 1e-12


def test_a_foreign_layer_under_a_mask_and_scaled_is_right(x64):
    cell = fnbp.scan(fnbp.gru_cell(3))
    x = normal(np.random.default_rng(0), (4, 5, 2), float)
    params, state = cell.init(jax.random.key(0), x)
    ctx = fnbp.Context(mask=jnp.arange(5) < jnp.array([[5], [2], [3], [1]]))
    y = jnp.ones((4, 5, 3))

    def clipped(net):
        kept = fnbp.backprop(net, MSE, fnbp.keep)(params, state, x, y, ctx).grads
        scale = jnp.array([0.5, 0.0, 1.0, 2.0])
        return [f.scaled(scale).total() for f in jax.tree.leaves(kept, is_leaf=lambda f: isinstance(f, fnbp.Factor))]

    assert relative(clipped(fnbp.from_jax(cell)), clipped(cell)) <= 1e-12


@pytest.mark.parametrize("wrap", ["repeat", "scan", "tie", "cast"])
def test_a_foreign_layer_within_loops_and_ties(x64, wrap):
    foreign = {
        "repeat": lambda f: fnbp.repeat(f(fnbp.dense(4)), 3),
        "scan": lambda f: fnbp.scan(f(fnbp.gru_cell(4))),
        "tie": lambda f: fnbp.tie(
            fnbp.serial(f(fnbp.dense(4, b=None)), fnbp.tanh(), fnbp.dense(4, b=None)), (0, "W"), (2, "W")
        ),
        "cast": lambda f: fnbp.cast(f(fnbp.dense(3)), jnp.float64),
    }[wrap]
    own, theirs = foreign(lambda layer: layer), foreign(fnbp.from_jax)
    params, state, x = drawn(own, (5, 3, 4) if wrap == "scan" else (5, 4))
    y = own.forward(params, state, x, fnbp.Context())[0] + 1
    contract = (fnbp.per_example, fnbp.sq_norms, fnbp.total)
    ours, automatic = (jax.jit(fnbp.backprop(net, MSE, contract))(params, state, x, y) for net in (own, theirs))
    assert relative(automatic, ours) <= 1e-11


def test_from_jax_of_a_function_that_mixes_must_say_so():
    def centre(params, x):
        return x - params["c"] * jnp.mean(x, 0)

    x = jnp.ones((5, 2))
    for mixes, refused in (("never", False), ("always", True)):
        net = fnbp.serial(fnbp.from_jax(centre, lambda key, x: {"c": jnp.ones(())}, mixes=mixes))
        run = lambda net=net: fnbp.per_example_norms(net, MSE)(*net.init(jax.random.key(0), x), x, x + 1)  # noqa: E731
        if refused:
            with pytest.raises(TypeError, match=r"centre.*: it mixes the examples"):
                run()
        else:
            run()
    with pytest.raises(ValueError, match=r"from_jax\(centre\): unknown mixes 'sometimes'"):
        fnbp.from_jax(centre, mixes="sometimes")


def test_a_contraction_may_see_the_path(x64):
    net = fnbp.serial(fnbp.dense(3), fnbp.repeat(fnbp.skip(fnbp.dense(3)), 2))
    params, state, x = drawn(net, (5, 4))
    seen = []

    def contract(path, factor):
        seen.append(path)
        return factor.total() * (2 if "repeat" in path else 1)

    grads = fnbp.backprop(net, MSE, fnbp.with_path(contract))(params, state, x, jnp.zeros((5, 3))).grads
    plain = fnbp.backprop(net, MSE)(params, state, x, jnp.zeros((5, 3))).grads
    assert set(seen) == {f"serial[0].dense(3).{leaf}" for leaf in "Wb"} | {
        f"serial[1].repeat(2)[0].skip[0].dense(3).{leaf}" for leaf in "Wb"
    }
    scale = ({"W": 5, "b": 5}, (({"W": 10, "b": 10},),))
    assert relative(grads, jax.tree.map(lambda g, c: c * g, plain, scale)) <= 1e-12
    with pytest.raises(TypeError, match="with_path: contract must be a function"):
        fnbp.with_path("total")


# --- drawing ---


def test_a_training_step_without_a_key_on_a_net_that_draws_says_so():
    net = fnbp.serial(fnbp.dense(3), fnbp.skip(fnbp.dropout(0.5)))
    params, state, x = drawn(net, (5, 4))
    step = fnbp.value_and_grad(net, MSE)
    with pytest.warns(
        UserWarning, match=r"value_and_grad: serial\[1\].skip\[0\].dropout\(0.5\) draws only in training"
    ):
        step(params, state, x, jnp.zeros((5, 3)))
    step(params, state, x, jnp.zeros((5, 3)), fnbp.Context(jax.random.key(0), train=True))
    fnbp.value_and_grad(fnbp.serial(fnbp.dense(3), fnbp.dropout(0.0)), MSE)(
        (params[0], {}), ({}, {}), x, jnp.zeros((5, 3))
    )
    fnbp.per_example_norms(net, MSE)(params, state, x, jnp.zeros((5, 3)))
    net.forward(params, state, x, fnbp.Context())


# --- a carry through serial ---


@pytest.mark.parametrize("layers", [1, 2])
def test_serial_carries_what_scan_carries(x64, layers):
    scans = [fnbp.scan(cell) for cell in (fnbp.lstm_cell(3), fnbp.gru_cell(2))[:layers]]
    net = fnbp.serial(fnbp.dense(4), *scans, fnbp.dense(2))
    params, state, x = drawn(net, (5, 6, 3))
    y = net.forward(params, state, x, fnbp.Context())[0]
    halves, h = [], None
    for part in (x[:, :2], x[:, 2:]):
        (h, half), _, _ = net.forward(params, state, (h, part), fnbp.Context())
        halves.append(half)
    assert relative(jnp.concatenate(halves, 1), y) <= 1e-12
    assert len(jax.tree.leaves(h)) == layers + 1

    def run(params, h, x):
        return net.forward(params, state, (h, x), fnbp.Context())[0]

    out, pull = jax.vjp(run, params, h, x)
    d = jax.tree.map(lambda a: normal(np.random.default_rng(2), a.shape, float), out)
    _, _, res = net.forward(params, state, (h, x), fnbp.Context())
    factors, (dh, dx) = net.backward(params, res, d)
    totals = jax.tree.map(lambda f: f.total(), factors, is_leaf=lambda f: isinstance(f, fnbp.Factor))
    assert relative((totals, dh, dx), pull(d)) <= 1e-12
    assert (
        relative(jax.tree.leaves(net.init(jax.random.key(0), (h, x))), jax.tree.leaves(net.init(jax.random.key(0), x)))
        == 0
    )


def test_a_carry_of_another_form_is_refused():
    net = fnbp.serial(fnbp.scan(fnbp.gru_cell(3)), fnbp.scan(fnbp.gru_cell(3)))
    x = jnp.ones((2, 4, 3))
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="serial: h must be a tuple with one carry for each of 2 scans, got float32"):
        net.forward(params, state, (jnp.zeros((2, 3)), x), fnbp.Context())


def test_a_pair_for_attention_is_not_taken_for_a_carry():
    net = fnbp.serial(fnbp.attention(1), fnbp.scan(fnbp.gru_cell(3)))
    x, memory = jnp.ones((2, 4, 3)), jnp.ones((2, 5, 3))
    params, state = net.init(jax.random.key(0), (x, memory))
    assert net.forward(params, state, (x, memory), fnbp.Context())[0].shape == (2, 4, 3)


# --- state through to_jax ---


def test_to_jax_with_state_hands_on_the_state_and_takes_a_context(x64):
    net = fnbp.serial(fnbp.dense(3, b=None), fnbp.batch_norm(), fnbp.dropout(0.5))
    params, state, x = drawn(net, (5, 4))
    apply = fnbp.to_jax(net, with_state=True)
    ctx = fnbp.Context(jax.random.key(1), train=True)

    def loss(params, apply):
        y, new = apply(params, state, x, ctx)
        return jnp.sum(y**3), new

    plain = lambda params, state, x, ctx: net.forward(params, state, x, ctx)[:2]  # noqa: E731
    ours, theirs = (jax.jit(jax.grad(lambda p, f=f: loss(p, f), has_aux=True))(params) for f in (apply, plain))
    assert relative(ours, theirs) <= 1e-12
    assert int(ours[1][1]["count"]) == 1
    with pytest.raises(ValueError, match="to_jax: with with_state=True the state is an argument"):
        fnbp.to_jax(net, state, with_state=True)


# --- digits ---


@pytest.mark.parametrize("make", [fnbp.layer_norm, lambda: fnbp.group_norm(1), fnbp.batch_norm])
@pytest.mark.parametrize("value", [1000.1, -3e5, 1e-3])
def test_a_constant_row_is_exactly_0_behind_a_norm(make, value):
    layer = make()
    x = jnp.full((768, 3, 1), value) if layer.name == "batch_norm" else jnp.full((3, 768), value)
    params, state = layer.init(jax.random.key(0), x)
    y, state, res = layer.forward(params, state, x, TRAIN)
    assert not y.any()
    assert jnp.isfinite(layer.backward(params, res, jnp.ones_like(y))[1]).all()


def test_norms_of_a_small_spread_on_a_large_mean_keep_their_digits(x64):
    rng = np.random.default_rng(0)
    x = np.float32(4096 + rng.integers(-8, 9, (5, 768)) * 2.0**-9)
    for layer in (fnbp.layer_norm(), fnbp.group_norm(1)):
        params, state = layer.init(jax.random.key(0), jnp.asarray(x))
        single = layer.forward(params, state, jnp.asarray(x), fnbp.Context())[0]
        due = (x - x.mean(1, keepdims=True, dtype=float)) / np.sqrt(x.var(1, keepdims=True, dtype=float) + 1e-5)
        np.testing.assert_allclose(single, due, atol=2e-6)


def test_a_window_of_minus_infinity_passes_its_gradient_to_x():
    layer = fnbp.max_pool(2, padding=1)
    x = jnp.full((1, 2, 2, 1), -jnp.inf)
    _, _, res = layer.forward({}, {}, x, fnbp.Context())
    assert layer.backward({}, res, jnp.ones((1, 2, 2, 1)))[1].ravel().tolist() == [1.0] * 4


@pytest.mark.parametrize("layer", [fnbp.gelu(), fnbp.gelu(approximate=True), fnbp.silu()], ids=lambda layer: layer.name)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_an_activation_are_formed_in_float32(x64, layer, dtype):
    x = jnp.asarray(np.linspace(-5, 5, 1001), dtype)
    ours = layer.forward({}, {}, x, fnbp.Context())
    exact = layer.forward({}, {}, x.astype(float), fnbp.Context())
    slope = [layer.backward({}, run[2], jnp.ones_like(run[0]))[1] for run in (ours, exact)]
    for narrow, wide in ((ours[0], exact[0]), slope):
        error = np.abs(np.asarray(narrow, float) - wide)
        assert np.all(error <= 0.51 * float(jnp.finfo(dtype).eps) * np.abs(wide) + float(jnp.finfo(dtype).tiny))


def test_integers_that_the_dtype_does_not_hold_are_refused():
    net = fnbp.serial(fnbp.dense(3))
    params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
    y = np.array([0, 2**32 + 1])
    for make in (fnbp.value_and_grad, fnbp.automatic_value_and_grad):
        with pytest.raises(ValueError, match=r"y holds 4294967297 at index \[1\], which int32 does not hold"):
            make(net, fnbp.softmax_cross_entropy())(params, state, jnp.ones((2, 4)), y)


def test_under_jit_a_token_out_of_range_is_nan_in_loss_and_gradient():
    net = fnbp.serial(fnbp.embedding(5, 3), fnbp.last())
    params, state = net.init(jax.random.key(0), jnp.zeros((2, 4), int))
    run = jax.jit(fnbp.value_and_grad(net, MSE))
    (value, _), grads = run(params, state, jnp.zeros((2, 4), int).at[1, 3].set(7), jnp.zeros((2, 3)))
    assert np.isnan(value) and np.isnan(grads[0]["E"]).any()


def test_the_traits_of_a_layer_made_of_others_are_theirs():
    noisy = fnbp.scan(fnbp.rnn_cell(3))._replace(traits=replace(fnbp.scan(fnbp.rnn_cell(3)).traits, draws=True))
    for wrap in (fnbp.freeze, fnbp.from_jax):
        assert wrap(noisy).traits.draws
    assert fnbp.freeze(fnbp.batch_norm()).traits.mixes == "never" != fnbp.from_jax(fnbp.batch_norm()).traits.mixes
