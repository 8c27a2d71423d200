"""Masks: what stands where a position does not count reaches nothing, or the layer refuses the mask by its name."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import CASES, draw, finish, normal, relative

M, T, LENGTHS = 4, 7, np.array([7, 3, 7, 3])
MASK = jnp.asarray(np.arange(T) < LENGTHS[:, None])
REFUSED = {  # positions are mixed in windows, or the shape holds none
    "conv:strided", "conv:same", "conv:groups", "conv:valid", "conv_transpose", "conv_transpose:same",
    "conv_transpose:groups", "conv_transpose:pairs", "max_pool", "max_pool:overlapping", "avg_pool",
    "avg_pool:overlapping", "avg_pool:counting", "reshape", "flatten", "residual:strided",
}  # fmt: skip
FLAT = {"repeat:twice"}  # cases of x (m, n) alone
PADDING = [*(pytest.param(value, marks=pytest.mark.slow) for value in (50.0, np.inf)), np.nan]


def positioned(case):
    """The case's first shape with positions, as (M, T, ...)."""
    shape = next(shape for shape in case.shapes if len(shape) >= (2 if case.tokens else 3))
    return (M, T, *shape[2:]) if case.id != "conv:valid" else (M, 11, *shape[2:])


WITH_POSITIONS = [pytest.param(case, id=case.id) for case in CASES if case.id not in FLAT]
ALONE = [
    param
    for param in WITH_POSITIONS
    if param.id not in REFUSED and not param.values[0].mixes and param.values[0].context.key is None
]


def test_only_cases_without_positions_are_left_out():
    assert {case.id for case in CASES if all(len(shape) < 3 for shape in case.shapes) and not case.tokens} == FLAT


def both_ways(case, params, state, x, dy, ctx):
    """y, gradients, dx, squared norms of each example."""
    y, _, res = case.layer.forward(params, state, x, ctx)
    factors, dx = case.layer.backward(params, res, dy)
    is_factor = lambda node: isinstance(node, fnbp.Factor)  # noqa: E731
    squares = jax.tree.map(lambda f: f.sq_norms(), factors, is_leaf=is_factor)
    return y, jax.tree.map(finish, factors, is_leaf=is_factor), dx, squares


def padded(x, value):
    counts = MASK.reshape(M, T, *[1] * (x.ndim - 2))
    return jnp.where(counts, x, jnp.asarray(value, x.dtype) if np.isfinite(value) or x.dtype != jnp.int32 else 50)


def cut(a, i):
    """Example i of a, or examples i, its positions that count."""
    rows = np.atleast_1d(i)
    return a[rows, : LENGTHS[rows[0]]] if a.ndim > 1 and a.shape[1] == T else a[rows]


def where_nothing_counts(a):
    return jnp.where(MASK.reshape(M, T, *[1] * (a.ndim - 2)), 0, a) if a.ndim > 1 and a.shape[1] == T else 0 * a


@pytest.mark.parametrize("value", PADDING)
@pytest.mark.parametrize("case", ALONE)
def test_an_example_in_a_padded_batch_is_the_example_alone(x64, case, value):
    params, state, x, dy = draw(case, positioned(case))
    run = jax.jit(lambda *args: both_ways(case, *args[:-1], replace(case.context, mask=args[-1])))
    y, grads, dx, squares = run(params, state, padded(x, value), padded(dy, value) if dy.shape[1] == T else dy, MASK)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((y, grads, dx, squares)))
    assert not any(where_nothing_counts(a).any() for a in jax.tree.leaves((y, dx)))
    added = jax.tree.map(jnp.zeros_like, grads)
    for i in ([0, 2], [1, 3]):  # of one length each
        own = run(params, state, cut(x, i), cut(dy, i), None)
        assert relative(cut(y, i), own[0]) <= 1e-12
        assert case.tokens or relative(cut(dx, i), own[2]) <= 1e-12
        assert relative(jax.tree.map(lambda a, i=i: a[np.array(i)], squares), own[3]) <= 1e-11
        added = jax.tree.map(jnp.add, added, own[1])
    assert relative(grads, added) <= 1e-12


@pytest.mark.parametrize("case", [param for param in WITH_POSITIONS if param.id in REFUSED])
def test_a_layer_that_cannot_leave_positions_out_refuses_by_name(case):
    shape = (M, 2, 5) if case.id == "reshape" else positioned(case)
    params, state, x, _ = draw(case, shape, jnp.float32)
    mask = jnp.ones(shape[:2], bool)
    name = case.id.partition(":")[0]
    with pytest.raises(TypeError, match=rf"^({name}|conv).*mask"):
        case.layer.forward(params, state, x, replace(case.context, mask=mask))
    with pytest.raises(TypeError, match=rf"^({name}|conv).*mask"):
        fnbp.ragged(case.layer).forward((params,), (state,), (x, jnp.full(M, 2)), case.context)


@pytest.mark.parametrize("case", [param for param in WITH_POSITIONS if param.values[0].context.key is not None])
def test_layers_that_draw_draw_the_same_under_a_mask(case):
    params, state, x, _ = draw(case, positioned(case), jnp.float32)
    plain = case.layer.forward(params, state, x, case.context)[0]
    masked = case.layer.forward(params, state, padded(x, np.nan), replace(case.context, mask=MASK))[0]
    assert relative(masked, padded(plain, 0)) <= 1e-6


@pytest.mark.parametrize("value", PADDING)
def test_batch_norm_takes_its_statistics_over_what_counts(x64, value):
    layer, rng = fnbp.batch_norm(), np.random.default_rng(0)
    x, dy = normal(rng, (M, T, 5), float), normal(rng, (M, T, 5), float)
    params = {"gamma": normal(rng, (5,), float), "beta": normal(rng, (5,), float)}
    _, state = layer.init(jax.random.key(0), x)
    train = fnbp.Context(train=True)
    y, new, res = layer.forward(params, state, padded(x, value), replace(train, mask=MASK))
    factors, dx = layer.backward(params, res, padded(dy, value))
    own_y, own_new, own_res = layer.forward(params, state, x[MASK], train)
    own_factors, own_dx = layer.backward(params, own_res, dy[MASK])
    totals = [{name: factor.total() for name, factor in f.items()} for f in (factors, own_factors)]
    assert relative((y[MASK], new, dx[MASK], totals[0]), (own_y, own_new, own_dx, totals[1])) <= 1e-12


@pytest.mark.parametrize(
    "make", [fnbp.global_avg_pool, fnbp.last, lambda: fnbp.scan(fnbp.gru_cell(3)), fnbp.layer_norm]
)
def test_an_example_of_which_nothing_counts_is_zero_and_has_no_gradient(make):
    layer, x = make(), jnp.full((3, 5, 2), jnp.nan).at[1:].set(1.0)
    params, state = layer.init(jax.random.key(0), x)
    mask = jnp.ones((3, 5), bool).at[0].set(False)
    y, _, res = layer.forward(params, state, x, fnbp.Context(mask=mask))
    _, dx = layer.backward(params, res, jnp.ones_like(y))
    assert not y[0].any() and not dx[0].any() and bool(jnp.isfinite(dx).all())


def test_the_mean_over_positions_is_over_those_that_count():
    layer = fnbp.ragged(fnbp.global_avg_pool())
    x = jnp.array([[[1.0], [50.0]]])
    params, state = layer.init(jax.random.key(0), (x, jnp.array([1])))
    assert layer.forward(params, state, (x, jnp.array([1])), fnbp.Context())[0] == 1


CE, MSE = fnbp.softmax_cross_entropy(), fnbp.mean_squared_error()
TAGGER = fnbp.ragged(fnbp.serial(fnbp.scan(fnbp.gru_cell(5)), fnbp.dense(3)))


def tagging():
    rng = np.random.default_rng(0)
    x, y = normal(rng, (M, T, 2), float), jnp.asarray(rng.integers(0, 3, (M, T)))
    params, state = TAGGER.init(jax.random.key(0), (x, jnp.asarray(LENGTHS)))
    return params, state, x, y


@pytest.mark.parametrize("reduce", ["examples", "tokens"])
def test_a_loss_over_positions_averages_over_those_that_count(x64, reduce):
    params, state, x, y = tagging()
    loss = fnbp.softmax_cross_entropy(reduce=reduce)
    spoilt = jnp.where(MASK, y, 99)  # no class at all
    run = fnbp.backprop(TAGGER, loss, (fnbp.total, fnbp.sq_norms))
    done = run(params, state, (x, jnp.asarray(LENGTHS)), spoilt)
    values, grads = [], []
    for i in range(M):
        pair = (cut(x, i), jnp.asarray(LENGTHS[i : i + 1]))
        own = fnbp.value_and_grad(TAGGER, CE)(params, state, pair, cut(y, i))
        values.append(own[0][0])
        grads.append(own[1])
    weights = np.ones(M) if reduce == "examples" else LENGTHS * M / LENGTHS.sum()
    mean = jax.tree.map(lambda *g: sum(w * a for w, a in zip(weights, g, strict=True)) / M, *grads)
    norms = [
        [float(w**2 * jnp.sum(a**2)) for w, a in zip(weights, each, strict=True)]
        for each in zip(*map(jax.tree.leaves, grads), strict=True)
    ]
    leaves = jax.tree.leaves(done.grads)
    assert relative(done.value, np.mean(weights * np.asarray(values))) <= 1e-12
    assert relative(leaves[0::2], jax.tree.leaves(mean)) <= 1e-12
    assert relative(leaves[1::2], [np.asarray(n) for n in norms]) <= 1e-11
    (auto, _), automatic = fnbp.automatic_value_and_grad(TAGGER, loss)(params, state, (x, jnp.asarray(LENGTHS)), spoilt)
    assert relative((done.value, leaves[0::2]), (auto, jax.tree.leaves(automatic))) <= 1e-12


@pytest.mark.slow
def test_compare_holds_a_masked_net_and_its_loss():
    params, state, x, y = tagging()
    report = fnbp.compare(
        TAGGER, (x, jnp.asarray(LENGTHS)), params=params, state=state, loss=CE, y=jnp.where(MASK, y, 99)
    )
    assert report.ok, report


def test_a_loss_that_takes_no_mask_is_refused_where_positions_do_not_count():
    mine = fnbp.Loss(lambda p, t: (jnp.sum((p - t) ** 2, (1, 2)), (p, t)), lambda res: 2 * (res[0] - res[1]), "mine")
    params, state, x, _ = tagging()
    with pytest.raises(TypeError, match=r"mine: some positions of the prediction do not count .* takes no mask"):
        fnbp.value_and_grad(TAGGER, mine)(params, state, (x, jnp.asarray(LENGTHS)), jnp.zeros((M, T, 3)))


def test_the_mask_ends_where_the_positions_end():
    """Behind last, x is (m, n); with n == T a mask would fit it by chance."""
    net = fnbp.ragged(fnbp.serial(fnbp.scan(fnbp.gru_cell(T)), fnbp.last(), fnbp.dense(T), fnbp.softmax()))
    x = normal(np.random.default_rng(0), (M, T, 2), float)
    params, state = net.init(jax.random.key(0), (x, jnp.asarray(LENGTHS)))
    y = net.forward(params, state, (x, jnp.asarray(LENGTHS)), fnbp.Context())[0]
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-6)


def test_features_are_no_positions():
    for layer in (fnbp.dense(3), fnbp.softmax(), fnbp.layer_norm()):
        x = jnp.ones((M, T))
        params, state = layer.init(jax.random.key(0), x)
        with pytest.raises(
            ValueError, match=r"the mask of shape \(4, 7\) speaks of positions, x of shape \(4, 7\) has none"
        ):
            layer.forward(params, state, x, fnbp.Context(mask=MASK))


def test_a_layer_of_ones_own_refuses_a_mask_until_it_says_what_it_means():
    def double(**options):
        return fnbp.stateless(
            lambda key, x: {}, lambda p, x: (2 * x, ()), lambda p, res, dy: ({}, 2 * dy), "double", **options
        )

    ctx, x = fnbp.Context(mask=MASK), jnp.ones((M, T, 2))
    with pytest.raises(TypeError, match=r"double: no meaning of a mask .* stateless\(..., mask=\"position\"\)"):
        double().forward({}, {}, x, ctx)
    assert double(mask="position").forward({}, {}, x, ctx)[0].sum() == 4 * LENGTHS.sum()
    with pytest.raises(ValueError, match="double: unknown rule for a mask 'positions'; did you mean 'position'"):
        double(mask="positions")
    raw = fnbp.Layer(lambda key, x: ({}, {}), lambda p, s, x, c: (x, s, ()), lambda p, res, dy: ({}, dy), "raw")
    with pytest.raises(TypeError, match="raw: no meaning of a mask"):
        fnbp.backprop(fnbp.serial(raw), MSE)(({},), ({},), x, x, ctx)


def test_tokens_of_padding_are_not_looked_up():
    net = fnbp.ragged(fnbp.embedding(5, 3))
    tokens = jnp.where(MASK, 2, -1)
    params, state = net.init(jax.random.key(0), (jnp.zeros_like(tokens), jnp.asarray(LENGTHS)))
    y = net.forward(params, state, (tokens, jnp.asarray(LENGTHS)), fnbp.Context())[0]
    assert bool(jnp.isfinite(y).all())
    with pytest.raises(ValueError, match=r"embedding\(5, 3\): token 9 at index \[1, 2\] is outside 0..4"):
        net.forward(params, state, (tokens.at[1, 2].set(9), jnp.asarray(LENGTHS)), fnbp.Context())


def test_a_mask_given_beside_ragged_counts_too():
    net = fnbp.ragged(fnbp.global_avg_pool())
    x = jnp.arange(6.0).reshape(1, 6, 1)
    mask = jnp.ones((1, 6), bool).at[0, 0].set(False)
    y = net.forward(({},), ({},), (x, jnp.array([3])), fnbp.Context(mask=mask))[0]
    assert y == 1.5


def test_under_jit_a_length_out_of_range_is_nan_for_its_example():
    net = fnbp.ragged(fnbp.last())
    run = jax.jit(lambda lengths: net.forward(({},), ({},), (jnp.ones((3, 2, 1)), lengths), fnbp.Context())[0])
    assert np.isnan(run(jnp.array([1, 3, -1]))).ravel().tolist() == [False, True, True]


@pytest.mark.parametrize("kind", ["memory", "queries"])
def test_nan_at_keys_that_no_query_sees_reaches_nothing(kind):
    layer, rng = fnbp.attention(1), np.random.default_rng(0)
    x, memory = normal(rng, (2, 3, 4), jnp.float32), normal(rng, (2, 5, 4), jnp.float32)
    hidden = jnp.ones((2, 5), bool).at[0, 3].set(False)
    mask = hidden if kind == "memory" else jnp.broadcast_to(hidden[:, None], (2, 3, 5))
    params, state = layer.init(jax.random.key(0), (x, memory))
    results = []
    for value in (7.0, jnp.nan, jnp.inf):
        z = jnp.where(hidden[..., None], memory, value)
        y, _, res = layer.forward(params, state, (x, z), fnbp.Context(mask=mask))
        factors, dx = layer.backward(params, res, jnp.ones_like(y))
        results.append((y, {name: f.total() for name, f in factors.items()}, dx))
    assert relative(results[1], results[0]) == relative(results[2], results[0]) == 0
