"""Each property of a layer, over every case of the registry and several shapes."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fnbp
from tests.cases import CASES, compiled, draw, eager_vjp, finish, manual_vjp, relative, sum_of_squares

SHAPED = [  # the first shape of each case in every run
    pytest.param(case, shape, id=f"{case.id}-{'x'.join(map(str, shape))}", marks=[pytest.mark.slow] if i else [])
    for case in CASES
    for i, shape in enumerate(case.shapes)
]
FIRST = [pytest.param(case, case.shapes[0], id=case.id) for case in CASES]
MANUAL = [param for param in FIRST if param.id != "from_jax"]
each_shape = pytest.mark.parametrize(("case", "shape"), SHAPED)
each = pytest.mark.parametrize(("case", "shape"), FIRST)
each_manual = pytest.mark.parametrize(("case", "shape"), MANUAL)


@each_shape
def test_backward_is_the_vjp_of_forward(x64, case, shape):
    params, state, x, dy = draw(case, shape)

    @jax.jit
    def automatic(params, x, dy):
        grads, dx = jax.vjp(lambda p, x: case.layer.forward(p, state, x, case.context)[0], params, x)[1](dy)
        return grads, None if case.tokens else dx

    assert relative(manual_vjp(case, params, state, x, dy), automatic(params, x, dy)) <= 1e-12


def on_floats(f, *trees):
    """f on the floating leaves; integers stay as they are."""
    return jax.tree.map(lambda a, *more: f(a, *more) if jnp.issubdtype(a.dtype, jnp.floating) else a, *trees)


@each
def test_backward_agrees_with_finite_differences(x64, case, shape):
    params, state, x, dy = draw(case, shape)
    at = jax.tree.map(np.asarray, (params, x))
    rng = np.random.default_rng(1)
    along = on_floats(lambda a: rng.standard_normal(a.shape), at)
    h = 1e-6
    ahead, behind = (on_floats(lambda a, d, s=s: a + s * h * d, at, along) for s in (1, -1))
    f = lambda at: np.sum(dy * compiled(case.id)[0](at[0], state, at[1]))  # noqa: E731
    slope = (f(ahead) - f(behind)) / (2 * h)
    grads = manual_vjp(case, params, state, x, dy)
    along = along if not case.tokens else (along[0], None)
    expected = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True))
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@each_shape
def test_forward_is_the_oracles(case, shape):
    params, state, x, _ = draw(case, shape, jnp.float32)
    y = compiled(case.id)[0](params, state, x)
    wide = on_floats(lambda a: np.asarray(a, np.float64), (params, x))
    assert relative(y, case.oracle(*wide)) <= 1e-6


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (extra: peers)")
@pytest.mark.parametrize(("case", "shape"), [param for param in SHAPED if param.values[0].torch is not None])
def test_forward_and_backward_are_pytorchs(x64, case, shape):
    import torch

    params, state, x, dy = draw(case, shape)
    leaf = lambda a: torch.tensor(np.asarray(a), requires_grad=a.dtype == jnp.float64)  # noqa: E731
    tensors = jax.tree.map(leaf, (params, x))
    y = case.torch(torch.nn.functional, *tensors)
    y.backward(torch.tensor(np.asarray(dy)))
    assert relative(compiled(case.id)[0](params, state, x), y.detach().numpy()) <= 1e-12
    grads = jax.tree.map(lambda t: t.grad.numpy() if t.requires_grad else None, tensors)
    assert relative(manual_vjp(case, params, state, x, dy), grads) <= 1e-12


@each
def test_jit_is_eager_and_traces_once(x64, case, shape):
    params, state, x, dy = draw(case, shape)
    traced = []

    def run(params, state, x, dy):
        traced.append(1)
        return case.layer.forward(params, state, x, case.context)[0], eager_vjp(case, params, state, x, dy)

    jitted = jax.jit(run)
    first = jitted(params, state, x, dy)
    jitted(params, state, x[::-1], dy)
    assert len(traced) == 1
    assert relative(first, run(params, state, x, dy)) <= 1e-13


@each
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float32, *(pytest.param(a, marks=pytest.mark.slow) for a in (jnp.float16, jnp.float64))]
)
def test_trees_shapes_and_dtypes(x64, case, shape, dtype):
    params, state, x, dy = draw(case, shape, dtype)
    y, new_state, _ = jax.eval_shape(case.layer.forward, params, state, x, case.context)
    grads, dx = jax.eval_shape(lambda *args: eager_vjp(case, *args), params, state, x, dy)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for gradient, parameter in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype == dtype
    assert y.dtype == dtype
    assert dx is None if case.tokens else (dx.shape, dx.dtype) == (x.shape, dtype)


@each
@pytest.mark.parametrize(
    ("dtype", "eps"),
    [
        (jnp.bfloat16, 2.0**-8),
        pytest.param(jnp.float16, 2.0**-11, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 2.0**-24, marks=pytest.mark.slow),
    ],
)
def test_low_precision_stays_near_float64(x64, case, shape, dtype, eps):
    low = draw(case, shape, dtype)
    high = on_floats(lambda a: a.astype(jnp.float64), low)
    exact = manual_vjp(case, *high)
    assert relative(manual_vjp(case, *low), exact) <= 8 * eps * max(1, conditioning(case, high, exact))


@pytest.mark.slow
@each
def test_what_wider_parameters_make_of_x_has_their_digits(case, shape):
    """Of float32 parameters and x in bfloat16: a y of float32 is not rounded to bfloat16 on its way."""
    params, state, x, _ = draw(case, shape, jnp.float32)
    forward = jax.jit(lambda params, x: case.layer.forward(params, state, x, case.context)[0])
    if case.tokens or not jax.tree.leaves(params):
        pytest.skip("x is not of floating point, or there are no parameters")
    low = x.astype(jnp.bfloat16)
    try:
        y = forward(params, low)
    except (TypeError, ValueError) as error:
        pytest.skip(f"refused: {error}")
    if y.dtype == jnp.float32:
        assert relative(y, forward(params, low.astype(jnp.float32))) <= 1e-5


def conditioning(case, args, exact, h=1e-7, draws=4):
    """By how much more than their own relative error the result moves when every argument is off by a part in 1/h."""
    rng = np.random.default_rng(2)
    nudged = lambda a: a * (1 + h * rng.choice([-1.0, 1.0], a.shape))  # noqa: E731
    return max(relative(manual_vjp(case, *on_floats(nudged, args)), exact) for _ in range(draws)) / h


@each
def test_strict_dtype_promotion(case, shape):
    with jax.numpy_dtype_promotion("strict"):
        args = draw(case, shape, jnp.bfloat16)
        jax.eval_shape(lambda *args: eager_vjp(case, *args), *args)


@each_manual
def test_per_example_contractions_are_the_jacobian_of_the_losses(x64, case, shape):
    params, state, x, target = draw(case, shape)
    loss = sum_of_squares()

    def losses(params):
        return loss.forward(case.layer.forward(params, state, x, case.context)[0], target)[0]

    contract = (fnbp.per_example, fnbp.sq_norms, fnbp.total)
    run = jax.jit(fnbp.backprop(case.layer, loss, contract))
    if case.mixes:
        with pytest.raises(TypeError, match=rf"{re.escape(case.layer.name)}.*: it mixes the examples of a batch"):
            run(params, state, x, target, case.context)
        return
    rows = jax.jit(jax.jacrev(losses))(params) if jax.tree.leaves(params) else params
    squares = jax.tree.map(lambda a: jnp.sum(a.reshape(len(x), -1) ** 2, -1), rows)
    grads = run(params, state, x, target, case.context).grads
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], grads, is_leaf=is_triple)  # noqa: E731
    assert relative(pick(0), rows) <= 1e-12
    assert relative(pick(1), squares) <= 1e-12
    assert relative(pick(2), jax.tree.map(lambda a: a.mean(0), rows)) <= 1e-12
    if jax.tree.leaves(params):
        norms = jax.jit(fnbp.per_example_norms(case.layer, loss))(params, state, x, target, case.context)
        assert relative(norms**2, sum(jax.tree.leaves(squares))) <= 1e-12


def is_triple(node):
    return isinstance(node, tuple) and len(node) == 3 and all(isinstance(a, jax.Array) for a in node)


def report_of(case, shape, dtype):
    params, state, x, _ = draw(case, shape, dtype)
    return fnbp.compare(case.layer, x, params=params, state=state, ctx=case.context)


@pytest.mark.slow
@each
def test_compare_is_clean(case, shape):
    report = report_of(case, shape, jnp.float32)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize(("case", "shape"), FIRST[::3])
def test_compare_is_clean_in_bfloat16(case, shape):
    report = report_of(case, shape, jnp.bfloat16)
    assert report.ok, report


@pytest.mark.slow
@each
def test_vmap_over_an_ensemble_and_scan_over_steps(case, shape):
    members = [draw(case, shape, jnp.float32, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *members)
    run = lambda *args: eager_vjp(case, *args)  # noqa: E731
    mapped = jax.jit(jax.vmap(run))(*stacked)
    _, scanned = jax.jit(lambda stacked: jax.lax.scan(lambda carry, args: (carry, run(*args)), 0, stacked))(stacked)
    alone = jax.tree.map(lambda *a: np.stack(a), *(manual_vjp(case, *member) for member in members))
    assert relative(mapped, alone) <= 1e-6
    assert relative(scanned, alone) <= 1e-6


@pytest.mark.slow
@each
def test_sharded_over_examples_is_single(case, shape):
    params, state, x, dy = draw(case, (8, *shape[1:]), jnp.float32)
    mesh = jax.make_mesh((4,), ("example",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("example",), ()))
    run = jax.jit(lambda *args: eager_vjp(case, *args))
    sharded = run(*jax.device_put((params, state), whole), *jax.device_put((x, dy), split))
    assert relative(sharded, run(params, state, x, dy)) <= 1e-6
    assert case.tokens or sharded[1].sharding.is_equivalent_to(split, x.ndim)


@pytest.mark.slow
@each
def test_init_needs_only_the_shape_of_x(case, shape):
    x = draw(case, shape, jnp.float32)[2]
    by_shape = case.layer.init(jax.random.key(0), jax.ShapeDtypeStruct(shape, x.dtype))
    assert relative(by_shape, case.layer.init(jax.random.key(0), x)) == 0


@each
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_init_draws_in_narrow_dtypes(case, shape, dtype):
    x = draw(case, shape, dtype)[2]
    params, _ = case.layer.init(jax.random.key(0), x)
    assert all(a.dtype == (dtype if not case.tokens else jnp.float32) for a in jax.tree.leaves(params))


@each
def test_init_wants_a_key(case, shape):
    with pytest.raises(TypeError, match=r"expected a random key, e.g. jax.random.key\(0\); got int 0"):
        case.layer.init(0, draw(case, shape, jnp.float32)[2])


def test_kinks_follow_the_stated_convention():
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    for layer, slope in ((fnbp.relu(), 0.0), (fnbp.leaky_relu(0.2), 1.0), (fnbp.elu(1.7), 1.7)):
        _, _, res = layer.forward({}, {}, zero, fnbp.Context())
        assert layer.backward({}, res, one)[1] == np.float32(slope), layer.name


@pytest.mark.parametrize("case", [param.values[0] for param in FIRST], ids=[param.id for param in FIRST])
def test_extreme_inputs_stay_finite(case):
    for size in () if case.tokens else (1e4, -1e4):
        params, state, x, dy = draw(case, case.shapes[0], jnp.float32)
        y = compiled(case.id)[0](params, state, x + size)
        grads = manual_vjp(case, params, state, x + size, dy)
        assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((y, grads))), size


def test_dense_initializers_have_their_fans():
    x = jnp.ones((2, 400))
    for name, variance in (
        ("glorot_uniform", 2 / 1000),
        ("he_normal", 2 / 400),
        ("lecun_normal", 1 / 400),
        ("normal", 1),
    ):
        W = fnbp.dense(600, W=name).init(jax.random.key(0), x)[0]["W"]
        np.testing.assert_allclose(W.var(), variance, rtol=0.02, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(fnbp.conv(7, (3, 5), W="he_normal"), 400), (fnbp.conv_transpose(7, (3, 5), W="he_normal"), 400)],
)
def test_convolutions_initialise_by_the_channels_that_an_output_sees(layer, fan_in):
    W = layer.init(jax.random.key(0), jnp.ones((2, 11, 13, fan_in)))[0]["W"]
    np.testing.assert_allclose(W.var(), 2 / (15 * fan_in), rtol=0.05)


def test_dense_takes_an_initializer_of_ones_own():
    layer = fnbp.dense(3, W=lambda key, shape, dtype: jnp.full(shape, 2, dtype), b="ones")
    params, _ = layer.init(jax.random.key(0), jnp.ones((5, 7)))
    assert (params["W"] == 2).all() and params["W"].shape == (3, 7) and (params["b"] == 1).all()


def test_activation_by_name():
    assert fnbp.activation("elu", alpha=0.5).name == "elu(0.5)"
    with pytest.raises(ValueError, match="unknown activation 'sigmod'; did you mean 'sigmoid'"):
        fnbp.activation("sigmod")
    with pytest.raises(
        ValueError, match=r"unknown initializer 'glorot'; did you mean 'glorot_.*'.* There are: .*he_normal"
    ):
        fnbp.dense(3, W="glorot")


@pytest.mark.parametrize(
    ("width", "error", "message"),
    [
        (0, ValueError, r"dense\(0\): n_out must be at least 1, got 0"),
        (-3, ValueError, r"dense\(-3\): n_out must be at least 1, got -3"),
        (2.5, TypeError, r"dense\(2.5\): n_out must be a whole number, got 2.5"),
        (True, TypeError, r"n_out must be a whole number, got True"),
    ],
)
def test_dense_refuses_widths(width, error, message):
    with pytest.raises(error, match=message):
        fnbp.dense(width)


def test_dense_refuses_integer_inputs():
    with pytest.raises(TypeError, match=r"dense\(3\): x must be a floating point array, got uint8 of shape \(5, 7\)"):
        fnbp.dense(3).init(jax.random.key(0), jnp.ones((5, 7), jnp.uint8))


def test_finish_is_total():
    d, x = jnp.ones((2, 3)), jnp.ones((2, 5))
    assert finish(fnbp.Outer(d, x)).shape == (3, 5)


def test_forwards_can_be_differentiated_at_their_joints(x64):
    joints = fnbp.elu(), fnbp.gelu(), fnbp.gelu(approximate=True), fnbp.softplus(), fnbp.relu(), fnbp.leaky_relu(0.2)
    for layer in joints:
        assert fnbp.compare(layer, jnp.zeros((7, 3))).ok, layer.name
    loss = fnbp.binary_cross_entropy(from_logits=True)
    assert fnbp.compare(fnbp.identity(), jnp.zeros((7, 3)), loss=loss, y=np.ones((7, 3))).ok


def test_gelu_of_a_large_float16_has_a_slope():
    layer = fnbp.gelu(approximate=True)
    for x, slope in ((300, 1), (-300, 0)):
        x = jnp.full((2, 3), x, jnp.float16)
        dx = layer.backward({}, layer.forward({}, {}, x, fnbp.Context())[2], jnp.ones_like(x))[1]
        assert (dx == slope).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_keeps_its_digits_where_it_is_small(x64, dtype):
    layer, x = fnbp.gelu(approximate=True), jnp.asarray([-5.0, -4.0, -3.0, -0.5, 2.0])
    narrow = layer.forward({}, {}, x.astype(dtype), fnbp.Context())[0]
    np.testing.assert_allclose(np.asarray(narrow, float), jax.nn.gelu(x), rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_log_softmax_keeps_the_digits_of_its_distribution(x64):
    layer, x = fnbp.log_softmax(), np.random.default_rng(0).standard_normal((3, 5_003))
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, np.random.default_rng(1).uniform(0.5, 1, x.shape)))
    dx = [
        layer.backward({}, layer.forward({}, {}, x.astype(dtype), fnbp.Context())[2], dy.astype(dtype))[1]
        for dtype in (jnp.bfloat16, jnp.float64)
    ]
    assert relative(*dx) < jnp.finfo(jnp.bfloat16).eps


def test_relative_tells_what_is_not_a_number():
    assert not relative({"a": np.array([1.0, np.nan]), "b": 1.0}, {"a": np.array([1.0, 2.0]), "b": 1.0}) <= 1


def test_init_takes_numpys_float64_without_a_word():
    params, _ = fnbp.serial(fnbp.dense(3)).init(jax.random.key(0), np.ones((5, 7)))
    assert params[0]["W"].dtype == jnp.float32


NUMBERS = {  # constructors with an option that is a number
    "leaky_relu": (lambda c: fnbp.leaky_relu(c(0.25)), (5, 3)),
    "elu": (lambda c: fnbp.elu(c(0.5)), (5, 3)),
    "layer_norm": (lambda c: fnbp.layer_norm(c(1e-3)), (5, 3)),
    "rms_norm": (lambda c: fnbp.rms_norm(c(1e-3)), (5, 3)),
    "group_norm": (lambda c: fnbp.group_norm(3, c(1e-3)), (5, 2, 3)),
    "batch_norm": (lambda c: fnbp.batch_norm(c(0.25), c(1e-3)), (5, 3)),
    "attention": (lambda c: fnbp.attention(2, rotary=c(1e4)), (5, 3, 4)),
    "sinusoids": (lambda c: fnbp.sinusoids(c(1e4)), (5, 3, 4)),
    "dropout": (lambda c: fnbp.dropout(c(0.25)), (5, 3)),
    "drop_path": (lambda c: fnbp.drop_path(c(0.25)), (5, 3)),
}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_numpy_as_an_option_widens_nothing(name, dtype, kind, x64):
    make, shape = NUMBERS[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    ctx = fnbp.Context(jax.random.key(1), train=True)
    dtypes = []
    for c in (kind, float):
        layer = make(c)
        params, state = layer.init(jax.random.key(0), x)
        y, state, res = layer.forward(params, state, x, ctx)
        factors, dx = layer.backward(params, res, jnp.ones_like(y))
        dtypes.append([a.dtype for a in jax.tree.leaves((y, state, res, factors, dx))])
    assert dtypes[0] == dtypes[1] and layer.name == make(kind).name
