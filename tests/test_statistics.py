"""Clipping, moments, noise scale and influence, against the gradients of single examples by jax.grad."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from fnbp import statistics
from fnbp.statistics import clipping
from tests.cases import relative

LOSS, KEY = fnbp.softmax_cross_entropy(), jax.random.key(5)
CTX = fnbp.Context(KEY, train=True)
NETS = {
    "mlp": (lambda: fnbp.models.mlp(7, 6, 5), (11,)),
    "lenet": (lambda: fnbp.models.lenet(5), (28, 28, 1)),
    "lstm": (lambda: fnbp.models.lstm_classifier(6, 5), (7, 3)),
    "gpt": (lambda: fnbp.models.gpt(13, 8, 2, 2, 6), (8,)),
    "tied, repeated": (
        lambda: fnbp.serial(
            fnbp.dense(6),
            fnbp.repeat(fnbp.tie(fnbp.serial(fnbp.dense(6), fnbp.tanh(), fnbp.dense(6)), (0, "W"), (2, "W")), 3),
            fnbp.layer_norm(),
            fnbp.dense(5),
        ),
        (11,),
    ),
}
QUICK = ("mlp", "tied, repeated", "ragged")  # the others are slow


def marked(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


each = pytest.mark.parametrize("name", marked(NETS))


ATTRIBUTED = NETS | {
    "cast": (lambda: fnbp.serial(fnbp.cast(fnbp.models.mlp(7, 6), jnp.float64), fnbp.tanh(), fnbp.dense(5)), (11,)),
    "ragged": (lambda: fnbp.ragged(fnbp.models.lstm_classifier(6, 5)), (7, 3)),
}
each_attributed = pytest.mark.parametrize("name", marked(ATTRIBUTED))


def subject(name, m=5, seed=0):
    make, shape = ATTRIBUTED[name]
    net, key = make(), jax.random.key(seed)
    if name == "gpt":
        x = jax.random.randint(key, (m, *shape), 0, 13)
        y = jnp.roll(x, -1, 1)
    else:
        x, y = jax.random.normal(key, (m, *shape), float), jax.random.randint(key, (m,), 0, 5)
    if name == "ragged":
        x = x, 1 + jnp.arange(m) % 7
    params, state = net.init(KEY, x)
    leaf, tree = jax.tree.flatten(params)
    away = [a + 0.2 * jax.random.normal(jax.random.fold_in(KEY, i), a.shape, a.dtype) for i, a in enumerate(leaf)]
    return net, jax.tree.unflatten(tree, away), state, x, y


def rows_of(net, params, state, x, y):
    """The gradient of each example, by jax.grad."""

    def alone(x, y):
        one = jax.tree.map(lambda a: a[None], x)
        forward = lambda p: net.forward(p, state, one, fnbp.Context())[0]  # noqa: E731
        return jax.grad(lambda p: LOSS.forward(forward(p), y[None])[0].sum())(params)

    return jax.jit(jax.vmap(alone))(x, y)


def squares(tree):
    return sum(jnp.sum(a.reshape(a.shape[0], -1) ** 2, 1) for a in jax.tree.leaves(tree))


def clipped_by_hand(rows, scale):
    return jax.tree.map(lambda a: jnp.mean(a * scale.reshape(-1, *[1] * (a.ndim - 1)), 0), rows)


@pytest.mark.parametrize("passes", [1, 2])
@each
def test_clipped_gradients_are_those_of_single_examples(x64, name, passes):
    given = subject(name)
    net, *rest = given
    rows = rows_of(*given)
    limit = float(jnp.median(jnp.sqrt(squares(rows))))
    (J, _), found = jax.jit(statistics.clipped(net, LOSS, limit, passes=passes))(*rest)
    due = clipped_by_hand(rows, jnp.minimum(1, limit / jnp.sqrt(squares(rows))))
    assert relative(found, due) <= 1e-10
    assert jnp.allclose(J, fnbp.value_and_grad(net, LOSS)(*rest)[0][0])


@each
def test_clipped_layer_by_layer(x64, name):
    given = subject(name)
    net, *rest = given
    rows = rows_of(*given)
    _, found = jax.jit(statistics.clipped(net, LOSS, 0.1, per_layer=True))(*rest)
    for (path, _, own), (_, _, got) in zip(fnbp.layer.leaves(net, rows), fnbp.layer.leaves(net, found), strict=True):
        if jax.tree.leaves(own):
            due = clipped_by_hand(own, jnp.minimum(1, 0.1 / jnp.sqrt(squares(own))))
            assert relative(got, due) <= 1e-10, path


def test_layers_of_a_repeat_that_are_written_out_draw_what_they_draw_in_the_loop(x64):
    block = fnbp.serial(fnbp.dense(6), fnbp.dropout(0.5), fnbp.layer_norm())
    net = fnbp.serial(fnbp.dense(6), fnbp.repeat(fnbp.skip(fnbp.repeat(block, 2)), 3), fnbp.dense(5))
    x, y, ctx = jax.random.normal(KEY, (4, 6), float), jnp.arange(4), fnbp.Context(KEY, train=True)
    params, state = net.init(KEY, x)
    due = fnbp.value_and_grad(net, LOSS)(params, state, x, y, ctx)
    found = statistics.clipped(net, LOSS, 1e9, passes=1)(params, state, x, y, ctx)
    assert relative(found, due) <= 1e-12


def test_noise_has_the_deviation_that_was_asked_for():
    net, *rest = subject("mlp")
    key = jax.random.key(3)
    ctx = fnbp.Context(key, train=True)
    for per_layer, spread in ((False, 2 * 0.5 / 5), (True, 2 * 0.5 * np.sqrt(3) / 5)):
        run = functools.partial(statistics.clipped, net, LOSS, 0.5, per_layer=per_layer)
        of = run(noise=2.0)
        with_noise = jax.jit(jax.vmap(lambda key, of=of: of(*rest, fnbp.Context(key, train=True))[1]))
        without = run()(*rest, ctx)[1]
        noise = jax.tree.map(lambda a, b: a - b, with_noise(jax.random.split(key, 500)), without)
        found = np.concatenate([np.asarray(a).reshape(-1) for a in jax.tree.leaves(noise)])
        assert abs(found.std() / spread - 1) <= 5 / np.sqrt(2 * found.size)
        assert abs(found.mean()) <= 5 * spread / np.sqrt(found.size)


SEVERAL = pytest.mark.parametrize("passes", [1, 2, None], ids=["one pass", "two passes", "per layer"])


@SEVERAL
@pytest.mark.parametrize("name", marked(["mlp", "tied, repeated", "gpt"]))
def test_examples_that_do_not_count_add_nothing_and_the_sum_is_divided_by_the_expected_size(x64, name, passes):
    net, params, state, x, y = subject(name)
    counts, how = jnp.array([True, False, True, True, False]), {"passes": passes, "per_layer": passes is None}
    if name != "gpt":
        x = x.at[1].set(jnp.nan).at[4].set(jnp.inf)
    few = params, state, x[counts], y[counts]
    run = lambda size: jax.jit(statistics.clipped(net, LOSS, 0.2, size=size, **how))  # noqa: E731
    (due_J, _), due = run(None)(*few)
    (J, _), found = run(None)(params, state, x, y, fnbp.Context(), counts)
    assert relative(found, due) <= 1e-12 and abs(J / due_J - 1) <= 1e-12
    _, found = run(2.5)(params, state, x, y, fnbp.Context(), counts)
    assert relative(found, jax.tree.map(lambda g: 3 / 2.5 * g, due)) <= 1e-12
    (J, _), found = run(None)(params, state, x, y, fnbp.Context(), jnp.zeros(5, bool))
    assert J == 0 and not any(jnp.any(g != 0) for g in jax.tree.leaves(found))


@SEVERAL
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_example_that_is_not_finite_adds_nothing_and_shows_in_J(x64, bad, passes):
    net, params, state, x, y = subject("tied, repeated")
    run = jax.jit(statistics.clipped(net, LOSS, 0.2, size=1, noise=1e-20, passes=passes, per_layer=passes is None))
    ctx = fnbp.Context(KEY, train=True)
    _, due = run(params, state, x[1:], y[1:], ctx)
    (J, _), found = run(params, state, x.at[0].set(bad), y, ctx)
    assert not jnp.isfinite(J) and relative(found, due) <= 1e-12
    without = jax.jit(statistics.clipped(net, LOSS, 0.2, passes=passes, per_layer=passes is None))
    _, found = without(params, state, x.at[0].set(bad), y, ctx)
    assert all(jnp.isnan(g).any() for g in jax.tree.leaves(found)), "without noise it is not silent"


def test_a_norm_whose_square_is_not_finite_adds_nothing():
    net, loss = fnbp.serial(fnbp.dense(3)), fnbp.half_squared_error()
    x, y = jnp.array([[1e15, 0.0], [1.0, 2.0]]), jnp.array([[1e10, 0.0, 0.0], [1.0, 1.0, 1.0]])
    params, state = net.init(KEY, x)
    params = jax.tree.map(jnp.zeros_like, params)
    run, ctx = statistics.clipped(net, loss, 0.2, size=1, noise=1e-30), fnbp.Context(KEY, train=True)
    (J, _), found = run(params, state, x, y, ctx)
    _, due = run(params, state, x[1:], y[1:], ctx)
    assert jnp.isfinite(J) and relative(found, due) == 0
    _, found = statistics.clipped(net, loss, 0.2)(params, state, x, y)
    assert all(jnp.isnan(g).all() for g in jax.tree.leaves(found)), "without noise it is not silent"


@pytest.mark.parametrize("limit", [1e-4, 0.1])
def test_no_example_exceeds_the_limit_by_more_than_rounding(limit):
    net, params, state, x, y = subject("lenet")
    params = jax.tree.map(lambda p: p / 8, params)  # no example is so sure that it has no gradient
    of = jax.jit(statistics.clipped(net, LOSS, limit))
    for i in range(5):
        _, found = of(params, state, 3 * x[i : i + 1], y[i : i + 1])
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(found)))
        assert abs(norm / limit - 1) <= 1e-5


def test_noise_is_of_the_key_and_of_the_expected_size():
    net, *rest = subject("mlp")
    of = lambda size, key: statistics.clipped(net, LOSS, 0.5, noise=2.0, size=size)(  # noqa: E731
        *rest, fnbp.Context(jax.random.key(key), train=True), jnp.zeros(5, bool))[1]  # fmt: skip
    (one, again, other, wide) = (of(*given) for given in ((5, 1), (5, 1), (5, 2), (50, 1)))
    same = lambda a, b: relative(a, b) == 0  # noqa: E731
    assert same(one, again) and relative(one, other) > 0.1
    assert relative(jax.tree.map(lambda g: 10 * g, wide), one) <= 1e-6
    found = np.concatenate([np.asarray(g).reshape(-1) for g in jax.tree.leaves(one)])
    assert abs(found.std() / (2 * 0.5 / 5) - 1) <= 5 / np.sqrt(2 * found.size)


def test_noise_refuses_a_loss_whose_examples_share_the_batch():
    net, *rest = subject("gpt")
    loss, ctx = fnbp.softmax_cross_entropy(reduce="tokens"), fnbp.Context(KEY, train=True)
    statistics.clipped(net, loss, 1.0)(*rest)
    with pytest.raises(ValueError, match="each loss is a share of the whole batch"):
        statistics.clipped(net, loss, 1.0, noise=1.0)(*rest, ctx)
    with pytest.raises(ValueError, match="each loss is a share of the whole batch"):
        statistics.clipped(net, loss, 1.0)(*rest, ctx, jnp.ones(5, bool))
    private = functools.partial(statistics.clipped, limit=0.1, noise=1.0)
    options = {"optimizer": optax.sgd(0.1), "key": KEY, "batch_size": 3, "steps": 2, "progress": False}
    with pytest.raises(ValueError, match="each loss is a share of the whole batch"):  # the last batch is filled up
        fnbp.fit(net, loss, *rest, gradient=private, **options)


def test_fit_trains_by_clipped_gradients():
    net, params, state, x, y = subject("mlp", 20)
    options = {"optimizer": optax.sgd(0.3), "key": KEY, "batch_size": 6, "steps": 8, "progress": False}
    plain = fnbp.fit(net, LOSS, params, state, x, y, **options)
    wide = functools.partial(statistics.clipped, limit=1e6)
    same = fnbp.fit(net, LOSS, params, state, x, y, gradient=wide, **options)
    np.testing.assert_allclose(same.history.loss, plain.history.loss, rtol=1e-5)
    private = functools.partial(statistics.clipped, limit=0.1, noise=1.0)
    other = fnbp.fit(net, LOSS, params, state, x, y, gradient=private, **options)
    assert abs(other.history.loss / plain.history.loss - 1).max() > 1e-3


def test_factors_that_take_much_room_make_two_passes(monkeypatch):
    net, *rest = subject("mlp")
    text = lambda: str(jax.make_jaxpr(statistics.clipped(net, LOSS, 1.0))(*rest))  # noqa: E731
    one = text()
    monkeypatch.setattr(clipping, "ROOM", 0)
    assert text().count("dot_general") > 1.5 * one.count("dot_general")


@each
def test_moments(x64, name):
    given = subject(name)
    rows = rows_of(*given)
    _, found = jax.jit(statistics.moments(given[0], LOSS))(*given[1:])
    assert relative(found.mean, jax.tree.map(lambda a: a.mean(0), rows)) <= 1e-10
    assert relative(found.variance, jax.tree.map(lambda a: a.var(0, ddof=1), rows)) <= 1e-10


@each
def test_noise_scale(x64, name):
    given = subject(name)
    rows = rows_of(*given)
    (_, _, found), grads = jax.jit(statistics.noise_scale(given[0], LOSS))(*given[1:])
    trace = sum(jnp.sum(a.var(0, ddof=1)) for a in jax.tree.leaves(rows))
    whole = sum(jnp.sum(a.mean(0) ** 2) for a in jax.tree.leaves(rows))
    np.testing.assert_allclose(found.trace, trace, rtol=1e-10)
    np.testing.assert_allclose(found.square, whole - trace / 5, rtol=1e-9)
    np.testing.assert_allclose(found.scale, found.trace / found.square, rtol=1e-12)
    assert relative(grads, jax.tree.map(lambda a: a.mean(0), rows)) <= 1e-10
    np.testing.assert_allclose(sum(pair[0] for pair in found.by_layer.values()), trace, rtol=1e-10)


def test_the_noise_scale_of_norm_layers_alone(x64):
    given = subject("gpt")
    rows = rows_of(*given)
    (_, _, found), _ = jax.jit(statistics.noise_scale(given[0], LOSS, norms_only=True))(*given[1:])
    own = [own for path, _, own in fnbp.layer.leaves(given[0], rows) if "norm" in path.rsplit(".", 1)[-1]]
    np.testing.assert_allclose(found.trace, sum(jnp.sum(a.var(0, ddof=1)) for a in jax.tree.leaves(own)), rtol=1e-10)
    with pytest.raises(ValueError, match="noise_scale: mlp has no norm layer"):
        statistics.noise_scale(subject("mlp")[0], LOSS, norms_only=True)(*subject("mlp")[1:])


def test_a_norm_layer_of_ones_own_is_found():
    norm = fnbp.layer_norm()

    @fnbp.constructor
    def my_norm():
        return fnbp.layer_norm()._replace(name="mine(3)", made=None)

    x, y = jax.random.normal(KEY, (5, 4)), jnp.arange(5) % 3
    for own, found in (
        (my_norm(), True),
        (norm._replace(name="scale_norm(3)", made=None), True),
        (norm._replace(name="norm_of(3)", made=None), False),
        (fnbp.replace_functions(norm, backward=lambda p, res, dy: norm.backward(p, res, dy), name="other"), True),
    ):
        net = fnbp.serial(fnbp.dense(4), own, fnbp.dense(3))
        run, given = statistics.noise_scale(net, LOSS, norms_only=True), (*net.init(KEY, x), x, y)
        if found:
            (_, _, noise), _ = jax.jit(run)(*given)
            assert list(noise.by_layer) == [f"serial[1].{own.name}"]
        else:
            with pytest.raises(ValueError, match="serial has no norm layer"):
                run(*given)


def test_gradients_that_are_alike_have_no_noise():
    net, params, state, x, y = subject("mlp", 2)
    x, y = jnp.repeat(x[:1], 64, 0), jnp.repeat(y[:1], 64)
    (_, _, found), grads = jax.jit(statistics.noise_scale(net, LOSS))(params, state, x, y)
    assert 0 <= found.trace <= 1e-5 * found.square and all(pair[0] >= 0 for pair in found.by_layer.values())
    np.testing.assert_allclose(found.square, optax.tree.norm(grads) ** 2, rtol=1e-5)
    moments = jax.jit(statistics.moments(net, LOSS))(params, state, x, y)[1]
    assert not any(jnp.isnan(a).any() for a in jax.tree.leaves(moments))


def test_what_no_example_changes_has_no_signal():
    net = fnbp.serial(fnbp.embedding(7, 3), fnbp.dense(5))
    x, y = jnp.array([[1, 2], [2, 3], [3, 3]]), jnp.array([[0, 1], [2, 3], [4, 0]])
    params, state = net.init(KEY, x)
    ratio = jax.jit(statistics.moments(net, LOSS))(params, state, x, y)[1].signal_to_noise[0]["E"]
    assert (ratio[jnp.array([0, 4, 5, 6])] == 0).all() and (ratio[1:4] > 0).all()


def test_fit_records_the_noise_scale():
    net, params, state, x, y = subject("mlp", 20)
    options = {"optimizer": optax.sgd(0.3), "key": KEY, "batch_size": 5, "steps": 8, "progress": False}
    plain = fnbp.fit(net, LOSS, params, state, x, y, **options)
    record = {name: lambda step, name=name: getattr(step.more, name) for name in ("trace", "square")}
    done = fnbp.fit(net, LOSS, params, state, x, y, gradient=statistics.noise_scale, record=record, **options)
    np.testing.assert_allclose(done.history.loss, plain.history.loss, rtol=1e-5)
    assert (done.history.recorded["trace"] > 0).all() and done.history.recorded["square"].shape == (8,)


@pytest.mark.parametrize("chunk", [2, 5, 100])
@each_attributed
def test_influence(x64, name, chunk):
    net, params, state, x, y = subject(name)
    query = subject(name, 3, seed=1)[3:]
    rows, others = (rows_of(net, params, state, *data) for data in ((x, y), query))
    due = sum(
        a.reshape(5, -1) @ b.reshape(3, -1).T
        for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(others), strict=True)
    )
    found = jax.jit(statistics.influence(net, LOSS, chunk))(params, state, (x, y), query)
    assert found.shape == (5, 3) and relative(found, due) <= 1e-10


def test_influence_of_projections_is_near(x64):
    net, params, state, x, y = subject("mlp")
    query = subject("mlp", 3, seed=1)[3:]
    due = statistics.influence(net, LOSS)(params, state, (x, y), query)
    of = lambda key: statistics.influence(net, LOSS, projection=fnbp.project(key, 16, 16))  # noqa: E731
    found = jax.jit(jax.vmap(lambda key: of(key)(params, state, (x, y), query)))(jax.random.split(KEY, 400))
    assert (abs(found.mean(0) - due) <= 5 * found.std(0) / 20).all()


def test_influence_of_several_checkpoints(x64):
    net, params, state, x, y = subject("mlp")
    query, rates = subject("mlp", 3, seed=1)[3:], jnp.array([0.5, 2.0])
    other = jax.tree.map(lambda a: a + 1, params)
    of = statistics.influence(net, LOSS, 2)
    due = sum(rate * of(p, state, (x, y), query) for rate, p in zip(rates, (params, other), strict=True))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), params, other)
    alone = lambda given: given[0] * of(given[1], state, (x, y), query)  # noqa: E731
    found = jax.jit(lambda rates, params: jax.lax.map(alone, (rates, params)).sum(0))(rates, stacked)
    assert relative(found, due) <= 1e-12
    each = jax.jit(jax.vmap(lambda p: of(p, state, (x, y), query)))(stacked)
    assert relative(jnp.einsum("c,cnq->nq", rates, each), due) <= 1e-12


def test_influence_draws_for_each_chunk_anew():
    net = fnbp.serial(fnbp.dense(6), fnbp.dropout(0.5), fnbp.dense(5))
    x, y = jnp.ones((6, 3)), jnp.zeros(6, int)
    params, state = net.init(KEY, x)
    ctx = fnbp.Context(KEY, train=True)
    found = statistics.influence(net, LOSS, 1)(params, state, (x, y), (x[:1], y[:1]), ctx)[:, 0]
    assert len(set(np.asarray(found).tolist())) >= 5
    with pytest.raises(TypeError, match=r"serial\[1\]\.batch_norm: it mixes the examples"):
        net = fnbp.serial(fnbp.dense(4), fnbp.batch_norm(), fnbp.dense(5))
        statistics.influence(net, LOSS)(*net.init(KEY, x), (x, y), (x, y), ctx)


@pytest.mark.parametrize("scheme", ["data", "fully", "tensor"])
def test_influence_on_many_devices(x64, monkeypatch, scheme):
    monkeypatch.setattr(fnbp.sharding, "SMALL", 1)
    net = fnbp.models.mlp(8, 4)
    x, y = jax.random.normal(KEY, (7, 12), float), jnp.arange(7) % 4
    params, state = net.init(KEY, x)
    of = lambda *given: jax.jit(statistics.influence(net, LOSS, 4))(*given, (x, y), (x[:3], y[:3]))  # noqa: E731
    mesh = fnbp.sharding.mesh(2, 2) if scheme == "tensor" else fnbp.sharding.mesh(4)
    placed = fnbp.sharding.place(net, params, mesh, fully=scheme == "fully")
    assert relative(of(placed, state), of(params, state)) <= 1e-12


def influence_of(*changed, loss=LOSS, ctx=fnbp.Context(), **options):
    """For test_what_is_refused: influence with another training set, and other queries."""

    def make(net, params, state, x, y):
        train, query = (change(x, y) for change in (*changed, *[lambda x, y: (x, y)] * (2 - len(changed))))
        return statistics.influence(net, loss, **options)(params, state, train, query, ctx)

    return make


def of_query(change):
    return influence_of(lambda x, y: (x, y), change)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda net, *rest: statistics.clipped(net, LOSS, 0), ValueError, "limit must be above 0, got 0"),
        (lambda net, *rest: statistics.clipped(net, LOSS, -1.0), ValueError, "limit must be above 0"),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, noise=-1), ValueError, "noise must be a number from 0 on"),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, passes=3), ValueError, "passes must be 1 or 2"),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, per_layer=True, passes=2), ValueError, "1 per layer"),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, noise=1.0)(*rest), ValueError, "noise needs a key"),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, noise=np.inf), ValueError, "noise must be a number"),
        (
            lambda net, *rest: statistics.clipped(net, LOSS, np.inf, noise=1.0),
            ValueError,
            "limit must be a finite number",
        ),
        (lambda net, *rest: statistics.clipped(net, LOSS, 1, size=0), ValueError, "size must be above 0, got 0"),
        (
            lambda net, *rest: statistics.clipped(net, LOSS, 1)(*rest, CTX, jnp.ones(4, bool)),
            ValueError,
            r"counts must be of bool, one for each of 5 examples; got .*4",
        ),
        (
            lambda net, *rest: statistics.clipped(net, LOSS, 1)(*rest, CTX, jnp.ones(5)),
            ValueError,
            "counts must be of bool",
        ),
        (
            lambda net, *rest: statistics.clipped(net, LOSS, 1, noise=1.0)(*rest, CTX, jnp.ones(5, bool)),
            ValueError,
            "is itself private: with noise and counts give size",
        ),
        (lambda net, p, s, x, y: statistics.moments(net, LOSS)(p, s, x[:1], y[:1]), ValueError, "a batch of 1 has no"),
        (lambda net, p, s, x, y: statistics.noise_scale(net, LOSS)(p, s, x[:1], y[:1]), ValueError, "a batch of 1"),
        (lambda net, *rest: statistics.influence(net, LOSS, 0), ValueError, "chunk must be at least 1, got 0"),
        (influence_of(lambda x, y: (x[:0], y[:0])), ValueError, "there is no example in the training set"),
        (of_query(lambda x, y: (x[:0], y[:0])), ValueError, "there is no example in the queries"),
        (influence_of(lambda x, y: (x[:4], y), chunk=2), ValueError, r"training set must have .* got \[4, 5\]"),
        (of_query(lambda x, y: (x[:4], y)), ValueError, r"y of the queries must have equally many examples, got"),
        (influence_of(lambda x, y: x), TypeError, r"the training set must be a pair \(x, y\), got float"),
        (of_query(lambda x, y: (x.tolist(), y)), TypeError, "the queries must be a pair of arrays"),
        (influence_of(lambda x, y: (x[:, :3], y)), ValueError, r"x of shape \(5, 3\) needs"),
        (of_query(lambda x, y: (x[:, :3], y)), ValueError, r"x of shape \(5, 3\) needs"),
        (influence_of(lambda x, y: (x, y + 9), chunk=2), ValueError, "label .* is outside 0..4"),
        (influence_of(lambda x, y: (x * jnp.nan, y), chunk=2), ValueError, "the training set, x has 55 non-finite"),
        (influence_of(projection=fnbp.sq_norms), TypeError, "projection must be one by fnbp.project.*got sq_norms"),
        (influence_of(projection=16), TypeError, "projection must be one by fnbp.project.*got int 16"),
        (influence_of(ctx=fnbp.Context(mask=jnp.ones((5, 11), bool))), ValueError, "Context.mask is of one batch"),
        (influence_of(loss=fnbp.softmax_cross_entropy(reduce="tokens")), ValueError, "its share of a whole batch"),
        (influence_of(loss=fnbp.softmax_cross_entropy), TypeError, "influence: loss must be a Loss"),
        (
            lambda net, p, s, x, y: statistics.influence(fnbp.softmax(), LOSS)({}, s, (x, y), (x, y)),
            ValueError,
            "influence: softmax has no parameters",
        ),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(*subject("mlp"))


@pytest.mark.parametrize("make", [lambda n: statistics.clipped(n, LOSS, 1.0), lambda n: statistics.moments(n, LOSS)])
def test_a_layer_that_mixes_the_examples_is_named(make):
    net, x, y = fnbp.serial(fnbp.dense(4), fnbp.batch_norm(), fnbp.dense(5)), jnp.ones((3, 2)), jnp.arange(3)
    params, state = net.init(KEY, x)
    with pytest.raises(TypeError, match=r"serial\[1\]\.batch_norm: it mixes the examples"):
        make(net)(params, state, x, y, fnbp.Context(KEY, train=True))


# --- curvature ---

LOSSES = {
    "labels": (fnbp.softmax_cross_entropy(), lambda key, p: jax.random.randint(key, p.shape[:-1], 0, p.shape[-1])),
    "weighted, smoothed": (
        fnbp.softmax_cross_entropy(weights=[0.5, 2.0, 1.0, 3.0], label_smoothing=0.1),
        lambda key, p: jax.random.randint(key, p.shape[:-1], 0, p.shape[-1]),
    ),
    "distributions": (
        fnbp.softmax_cross_entropy(),
        lambda key, p: jax.nn.softmax(jax.random.normal(key, p.shape, p.dtype)),
    ),
    "tokens": (
        fnbp.softmax_cross_entropy(reduce="tokens", ignore_index=0),
        lambda key, p: jax.random.randint(key, p.shape[:-1], 0, p.shape[-1]),
    ),
    "mean squares": (fnbp.mean_squared_error(), lambda key, p: jax.random.normal(key, p.shape, p.dtype)),
    "half squares": (fnbp.half_squared_error(), lambda key, p: jax.random.normal(key, p.shape, p.dtype)),
    "logits": (
        fnbp.binary_cross_entropy(from_logits=True, pos_weight=2.0),
        lambda key, p: jax.random.uniform(key, p.shape, p.dtype),
    ),
    "probabilities": (fnbp.binary_cross_entropy(), lambda key, p: jax.random.uniform(key, p.shape, p.dtype)),
}
SMALL = {
    "mlp": (lambda: fnbp.models.mlp(3, 4), (5,)),
    "positions": (lambda: fnbp.serial(fnbp.scan(fnbp.gru_cell(3)), fnbp.dense(4)), (3, 2)),
    "conv": (lambda: fnbp.serial(fnbp.conv(4, (2, 2)), fnbp.tanh(), fnbp.global_avg_pool()), (3, 3, 2)),
}


def ggn_by_hand(net, loss, params, state, x, y):
    """sum_i J_i^T H_i J_i / m, with H_i by jax.hessian."""
    flat, back = jax.flatten_util.ravel_pytree(params)
    forward = lambda v: net.forward(back(v), state, x, fnbp.Context())[0]  # noqa: E731
    J = jax.jacobian(forward)(flat)
    total = lambda p: loss.forward(p, y)[0].sum() / len(x)  # noqa: E731
    n = J.size // flat.size
    H = jax.hessian(total)(forward(flat)).reshape(n, n)
    J = J.reshape(n, flat.size)
    return J.T @ H @ J, back


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "conv", pytest.param("positions", marks=pytest.mark.slow)])
def test_the_diagonal_of_the_ggn(x64, name, case):
    make, shape = SMALL[name]
    loss, target = LOSSES[case]
    net = fnbp.serial(make(), fnbp.sigmoid()) if case == "probabilities" else make()
    x = jax.random.normal(KEY, (3, *shape), float)
    params, state = net.init(KEY, x)
    y = target(jax.random.key(2), net.forward(params, state, x, fnbp.Context())[0])
    G, back = ggn_by_hand(net, loss, params, state, x, y)
    for chunk in (1, 5):
        found = jax.jit(statistics.ggn_diagonal(net, loss, chunk=chunk))(params, state, x, y)
        assert relative(found, back(jnp.diagonal(G))) <= 1e-10
    of = lambda key: statistics.ggn_diagonal(net, loss, samples=2)(params, state, x, y, fnbp.Context(key))  # noqa: E731
    draws = jax.jit(jax.vmap(of))(jax.random.split(KEY, 600))
    for a, due in zip(jax.tree.leaves(draws), jax.tree.leaves(back(jnp.diagonal(G))), strict=True):
        assert (abs(a.mean(0) - due) <= 5.5 * a.std(0) / np.sqrt(600) + 1e-12).all()


def test_kronecker_factors_of_a_linear_net_under_squares_are_exact(x64):
    net, x = fnbp.serial(fnbp.dense(4, b=None), fnbp.dense(3, b=None)), jax.random.normal(KEY, (6, 5), float)
    loss = fnbp.half_squared_error()
    params, state = net.init(KEY, x)
    y = jnp.zeros((6, 3))
    G, _ = ggn_by_hand(net, loss, params, state, x, y)
    run = jax.jit(jax.vmap(lambda key: statistics.fisher(net, loss, fnbp.kronecker())(
        params, state, x, y, fnbp.Context(key))))  # fmt: skip
    found = jax.tree.structure(params).flatten_up_to(run(jax.random.split(KEY, 3000)))
    (A, one), (B, two) = found
    np.testing.assert_allclose(jnp.kron(one.mean(0), A[0]), G[:20, :20], atol=0.1 * abs(G).max())
    np.testing.assert_allclose(jnp.kron(two.mean(0), B[0]), G[20:, 20:], atol=0.1 * abs(G).max())


def test_what_curvature_refuses():
    net, *rest = subject("mlp")
    own = fnbp.loss_from_jax(lambda p, t: jnp.sum((p - t) ** 4, -1))
    with pytest.raises(ValueError, match=r"ggn_diagonal: .* does not say the roots of its Hessian"):
        statistics.ggn_diagonal(net, own)
    with pytest.raises(ValueError, match="fisher: signs are drawn, so it needs a key"):
        statistics.fisher(net, LOSS)(*rest)
    for contract in (fnbp.keep, (fnbp.gram, fnbp.keep), {"kept": fnbp.keep}):
        with pytest.raises(TypeError, match="fisher: keep gives factors, which have no mean over samples"):
            statistics.fisher(net, LOSS, contract)
