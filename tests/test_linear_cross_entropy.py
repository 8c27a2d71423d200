"""linear_cross_entropy: the same numbers as softmax_cross_entropy on a net that ends in dense, without its scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnbp
from fnbp.losses import linear
from tests.cases import relative

K, N, M, T = 11, 7, 8, 3
OPTIONS = [
    {},
    {"ignore_index": -1},
    {"label_smoothing": 0.1, "reduce": "tokens", "ignore_index": -1},
    {"z_loss": 0.3},
    {"z_loss": 0.01, "label_smoothing": 0.2, "reduce": "tokens"},
]


@pytest.fixture(params=[(2, 9), (3, 1), (100, 1)], ids=["five blocks", "four, filled up", "one"])
def blocks(request, monkeypatch):
    """Blocks of that many positions at least, or of that many scores: 24 positions in 5, 8 and 1 of them."""
    rows, scores = request.param
    monkeypatch.setattr(linear, "ROWS", rows)
    monkeypatch.setattr(linear, "BLOCK", scores * K)


def head(bias=True, dtype=None):
    return fnbp.serial(
        fnbp.embedding(K, N, dtype=dtype), fnbp.layer_norm(), fnbp.dense(K, b="normal" if bias else None)
    )


def tied():
    return fnbp.tie(head(False), (0, "E"), (2, "W"))


NETS = {
    "dense": head,
    "no bias": lambda: head(False),
    "tie": tied,
    "remat": lambda: fnbp.remat(head()),
    "cast": lambda: fnbp.serial(fnbp.embedding(K, N), fnbp.cast(fnbp.serial(fnbp.dense(5), fnbp.dense(K)), "float32")),
    "in another": lambda: fnbp.serial(fnbp.embedding(K, N), fnbp.serial(fnbp.relu(), tied_none())),
}


def tied_none():
    return fnbp.serial(fnbp.dense(N), fnbp.dense(K))


def drawn(net, ignored=True, m=M):
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, K, (m, T)), rng.integers(0, K, (m, T))
    y[2, 1] = -1 if ignored else 0
    params, state = net.init(jax.random.key(0), jnp.asarray(x))
    return params, state, jnp.asarray(x), jnp.asarray(y)


def both(options, net, contract=fnbp.total):
    losses = fnbp.linear_cross_entropy(**options), fnbp.softmax_cross_entropy(**options)
    return tuple(fnbp.backprop(net, loss, contract) for loss in losses)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_value_gradients_and_prediction_are_those_of_the_scores(x64, blocks, name, options):
    net = NETS[name]()
    data = drawn(net, "ignore_index" in options)
    found, due = (jax.jit(run)(*data) for run in both(options, net))
    bound = 1e-6 if name == "cast" else 1e-12
    assert relative(found, due) <= bound
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(due)]


def test_positions_that_a_mask_leaves_out_count_nowhere(x64, blocks):
    params, state, x, y = drawn(head(), False)
    mask = np.arange(T) < np.asarray([1, 2, 3, 3, 1, 0, 2, 3])[:, None]
    ctx = fnbp.Context(mask=jnp.asarray(mask))
    found, due = (run(params, state, x, y, ctx) for run in both({}, head()))
    assert relative(found, due) <= 1e-12
    junk = both({}, head())[0](params, state, x, jnp.where(ctx.mask, y, 99), ctx)
    assert relative(junk, due) <= 1e-12


def test_sequences_of_different_lengths(x64, blocks):
    net = fnbp.ragged(fnbp.serial(fnbp.embedding(K, N, dtype=float), fnbp.scan(fnbp.gru_cell(5)), fnbp.dense(K)))
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.integers(0, K, (M, T))) for _ in range(2))
    lengths = jnp.asarray([1, 2, 3, 3, 1, 1, 2, 3])
    params, state = net.init(jax.random.key(0), (x, lengths))
    for given in (lengths, lengths.at[1].set(T + 1)):  # the second only jit sees
        found, due = (jax.jit(run)(params, state, (x, given), y) for run in both({}, net))
        np.testing.assert_allclose(found.value, due.value, rtol=1e-12)
        for one, other in zip(*map(jax.tree.leaves, (found.grads, due.grads)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_without_positions_and_on_a_grid(x64, blocks):
    rng = np.random.default_rng(1)
    for places in ((), (2, 3)):
        x = jnp.asarray(rng.standard_normal((5, *places, N)))
        y = jnp.asarray(rng.integers(0, K, (5, *places)))
        net = fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(K))
        params, state = net.init(jax.random.key(1), x)
        found, due = (run(params, state, x, y) for run in both({}, net))
        assert relative(found, due) <= 1e-12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_low_precision_it_is_as_near_to_float64_as_the_scores_are(x64, dtype):
    net = head(dtype=dtype)
    params, state, x, y = drawn(net, False)
    due = both({}, net)[1](jax.tree.map(lambda p: p.astype(float), params), state, x, y).grads
    found, plain = (jax.jit(run)(params, state, x, y).grads for run in both({}, net))
    for one, other, right in zip(*map(jax.tree.leaves, (found, plain, due)), strict=True):
        assert one.dtype == other.dtype == dtype
        apart, allowed = (np.abs(np.asarray(a, float) - right).max() for a in (one, other))
        assert apart <= 1.5 * allowed + float(jnp.finfo(dtype).eps) * np.abs(right).max()


def test_confident_predictions_keep_their_digits():
    x, y = jnp.eye(3, N, dtype=jnp.float32), jnp.arange(3)
    net = fnbp.dense(3, b=None)
    params = {"W": 30.0 * jnp.eye(3, N, dtype=jnp.float32)}
    due = 2 * np.exp(-30.0)
    found = jax.jit(both({}, net)[0])(params, {}, x, y)
    assert abs(found.value / due - 1) <= 1e-6
    assert np.allclose(np.diag(found.grads["W"]), -due / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_scores(size):
    x = jnp.asarray([[size, -size, 0.0], [size, -size, 0.0], [-size, -size, -size]], jnp.float32)
    params, y = {"W": jnp.eye(3, dtype=jnp.float32)}, jnp.asarray([0, 1, 2])
    found = both({}, fnbp.dense(3, b=None))[0](params, {}, x, y)
    assert relative(found.value, np.asarray((2 * size + np.log(3)) / 3, np.float32)) <= 1e-6
    np.testing.assert_allclose(3 * found.dx, [[0, 0, 0], [1, -1, 0], [1 / 3, 1 / 3, -2 / 3]], atol=1e-6)


def test_a_label_that_only_jit_sees_makes_loss_and_gradient_nan():
    params, state, x, y = drawn(head(), False)
    for wrong in (K, -1):
        found = jax.jit(both({}, head())[0])(params, state, x, y.at[4, 1].set(wrong))
        assert np.isnan(found.value) and np.isnan(found.grads[2]["W"]).any()


def test_other_contractions_are_those_of_the_scores(x64):
    data = drawn(head(), False)
    for contract in (fnbp.sq_norms, (fnbp.total, fnbp.per_example)):
        found, due = (run(*data) for run in both({}, head(), contract))
        assert relative(found, due) <= 1e-12


def test_under_vmap_and_scan(x64):
    params, state, x, y = drawn(head(), False)
    run, plain = both({}, head())
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    found, due = (jax.vmap(f, (0, None, None, None))(many, state, x, y) for f in (run, plain))
    assert relative(found, due) <= 1e-12
    turn = lambda run: lambda carry, p: (carry, run(p, state, x, y).grads)  # noqa: E731
    found, due = (jax.lax.scan(turn(f), 0, many)[1] for f in (run, plain))
    assert relative(found, due) <= 1e-12


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_a_batch_that_is_split_over_devices(x64, blocks, kind):
    params, state, x, y = drawn(head(), False)
    mesh = jax.make_mesh((4,), ("example",), (kind,))
    split = jax.device_put((x, y), NamedSharding(mesh, P("example")))
    whole = jax.device_put((params, state), NamedSharding(mesh, P()))
    run, plain = both({}, head())
    found, due = jax.jit(run)(*whole, *split), plain(params, state, x, y)
    assert relative(found, due) <= 1e-12
    assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(found.grads))


def test_within_shard_map(x64, blocks):
    params, state, x, y = drawn(head(), False)
    mesh = jax.make_mesh((4,), ("example",))
    split = jax.device_put((x, y), NamedSharding(mesh, P("example")))
    whole = jax.device_put((params, state), NamedSharding(mesh, P()))
    run, plain = both({}, head())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("example"), P("example")), out_specs=P())
    def grads(params, state, x, y):
        return jax.tree.map(lambda g: g / 4, run(params, state, x, y).grads)

    assert relative(grads(*whole, *split), plain(params, state, x, y).grads) <= 1e-12


def test_parameters_that_are_split_over_devices(x64):
    params, state, x, y = drawn(head(), False)
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,))
    split = jax.device_put(params[1:2], NamedSharding(mesh, P()))
    split = (params[0], *split, jax.device_put(params[2], NamedSharding(mesh, P())))
    run, plain = both({}, head())
    assert relative(jax.jit(run)(split, state, x, y).grads, plain(params, state, x, y).grads) <= 1e-12


def test_fit_and_its_filled_up_last_batch_train_as_with_the_scores(x64):
    params, state, x, y = drawn(tied(), True, m=M + 3)
    options = {"ignore_index": -1, "label_smoothing": 0.1}
    fits = [
        fnbp.fit(
            tied(),
            make(**options),
            params,
            state,
            x,
            y,
            optimizer=optax.sgd(0.1),
            key=jax.random.key(1),
            batch_size=4,
            epochs=2,
            progress=False,
        )
        for make in (fnbp.linear_cross_entropy, fnbp.softmax_cross_entropy)
    ]
    assert relative(fits[0].params, fits[1].params) <= 1e-12
    assert relative(fits[0].history.loss, fits[1].history.loss) <= 1e-12


def test_compare_judges_the_last_layer_and_the_loss_as_one_too(monkeypatch):
    monkeypatch.setattr(linear, "ROWS", 5)
    monkeypatch.setattr(linear, "BLOCK", 1)
    net, loss = tied(), fnbp.linear_cross_entropy(z_loss=0.1, ignore_index=-1)
    _, _, x, y = drawn(net)
    report = fnbp.compare(net, x, y=y, loss=loss, level="quick")
    (path,) = {row.path for row in report.rows if "dense(11), linear_cross_entropy" in row.path}
    assert report.ok and {row.leaf for row in report.rows if row.path == path} >= {"W", "x"}


def test_compare_finds_a_wrong_block(monkeypatch):
    right = linear.of_block

    def wrong(*args):
        losses, da = right(*args)
        return losses, 1.01 * da

    monkeypatch.setattr(linear, "of_block", wrong)
    net = fnbp.dense(K)
    x = jax.random.normal(jax.random.key(0), (5, N))
    y = jnp.arange(5)
    report = fnbp.compare(net, x, y=y, loss=fnbp.linear_cross_entropy(), level="quick")
    assert {row.leaf for row in report.rows if not row.ok} == {"W", "b", "x"}
    assert all(row.path.endswith("dense(11), linear_cross_entropy") for row in report.rows if not row.ok)


def test_no_array_of_all_scores_is_held():
    k, positions, n = 16384, 2048, 4
    net, loss = fnbp.dense(k), fnbp.linear_cross_entropy()
    x, y = jnp.zeros((positions, n)), jnp.zeros(positions, int)
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)
    step = jax.jit(fnbp.value_and_grad(net, loss)).lower(params, state, x, y).compile()
    assert step.memory_analysis().temp_size_in_bytes < positions * k * 4 / 2


def test_a_step_lowers_for_accelerators():
    params, state, x, y = drawn(tied(), False)
    step = jax.jit(fnbp.value_and_grad(tied(), fnbp.linear_cross_entropy()))
    made = jax.export.export(step, platforms=("cuda", "rocm", "tpu"))(params, state, x, y)
    assert len(made.mlir_module()) > 0


REFUSED = [
    (lambda: fnbp.serial(fnbp.dense(K), fnbp.relu()), r"must end in fnbp\.dense, it ends in serial\[1\]\.relu"),
    (lambda: fnbp.serial(fnbp.skip(fnbp.dense(N)), name="net"), r"it ends in net\[0\]\.skip"),
    (
        lambda: fnbp.replace_functions(fnbp.dense(K), backward=lambda params, res, dz: ({}, dz)),
        r"does not call the functions of dense\(11\), which were replaced; softmax_cross_entropy takes any net",
    ),
]


@pytest.mark.parametrize(("net", "text"), REFUSED)
def test_a_net_without_a_dense_layer_at_its_end_is_refused(net, text):
    with pytest.raises(TypeError, match="linear_cross_entropy.*" + text):
        fnbp.backprop(net(), fnbp.linear_cross_entropy())


def test_distributions_are_refused():
    params, state, x, _ = drawn(head(), False)
    with pytest.raises(TypeError, match=r"y must be labels, got float32.*; softmax_cross_entropy takes distributions"):
        fnbp.backprop(head(), fnbp.linear_cross_entropy())(params, state, x, jnp.ones((M, T, K)) / K)


def test_what_it_refuses_bears_its_name():
    params, state, x, y = drawn(head(), False)
    for options in ({"z_loss": -0.1}, {"label_smoothing": 1.0}, {"reduce": "mean"}, {"ignore_index": 0.5}):
        with pytest.raises((ValueError, TypeError), match=rf"^linear_cross_entropy: .*{next(iter(options))}"):
            fnbp.linear_cross_entropy(**options)
    for target in (y.at[0, 0].set(K), y[:, 0], y.astype(float)):
        with pytest.raises((ValueError, TypeError), match=r"^linear_cross_entropy: (label|target)"):
            fnbp.backprop(head(), fnbp.linear_cross_entropy())(params, state, x, target)


def test_a_loss_whose_backward_was_replaced_uses_it():
    params, state, x, y = drawn(head(), False)
    loss = fnbp.linear_cross_entropy()
    planted = loss._replace(backward=lambda res: jax.tree.map(jnp.zeros_like, loss.backward(res)))
    grads = fnbp.backprop(head(), planted)(params, state, x, y).grads
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
