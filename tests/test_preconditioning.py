"""K-FAC, FOOF and EKFAC: factors that equal blocks of the GGN, and updates written out in NumPy."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from fnbp import statistics
from fnbp.losses.weights import counting_some
from tests.cases import relative
from tests.test_statistics import ggn_by_hand

CROSS, SQUARES, KEY = fnbp.softmax_cross_entropy(), fnbp.half_squared_error(), jax.random.key(5)
is_pair = lambda node: isinstance(node, fnbp.KroneckerPair)  # noqa: E731


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def kron_of(pair):
    """The curvature of a parameter, in the order of its own numbers."""
    A, G = (np.diag(pair.A) if pair.diagonal else np.asarray(pair.A)), np.asarray(pair.G)
    return np.kron(A, G) if pair.turned else np.kron(G, A)


def blocks_and_pairs(net, loss, x, y, reduce="expand"):
    """For each parameter its block of the GGN, by jax.jacobian and jax.hessian, and its pair of all roots."""
    params, state = net.init(KEY, x)
    G, _ = ggn_by_hand(net, loss, params, state, x, y)
    of = statistics.fisher(net, loss, fnbp.kronecker(reduce), samples=None)
    pairs = jax.tree.leaves(jax.jit(of)(params, state, x, y), is_leaf=is_pair)
    at = 0
    for p, pair in zip(jax.tree.leaves(params), pairs, strict=True):
        yield np.asarray(G[at : at + p.size, at : at + p.size]), pair
        at += p.size


def dense(*widths):
    return fnbp.serial(*(fnbp.dense(n, b=None) for n in widths))


# --- where K-FAC is exact: Dangel et al. 2025, arXiv:2507.05127 ---


@pytest.mark.parametrize("loss", [SQUARES, fnbp.mean_squared_error()], ids=["half", "mean"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["", "shared"])
def test_of_a_deep_linear_net_under_squares_kfac_is_the_ggn(x64, loss, positions):
    x, y = normal(0, 6, *positions, 5), normal(1, 6, *positions, 2)
    for due, pair in blocks_and_pairs(dense(4, 3, 2), loss, x, y):
        np.testing.assert_allclose(kron_of(pair), due, rtol=0, atol=1e-10 * abs(due).max())


@pytest.mark.parametrize("positions", [(), (3,)], ids=["", "pooled"])
def test_of_a_deep_linear_net_behind_whose_last_layer_positions_are_averaged_reduce_is_the_ggn(x64, positions):
    net = fnbp.serial(*dense(4, 3, 2).parts, fnbp.global_avg_pool()) if positions else dense(4, 3, 2)
    x, y = normal(0, 6, *positions, 5), normal(1, 6, 2)
    for due, pair in blocks_and_pairs(net, fnbp.mean_squared_error(), x, y, "reduce"):
        np.testing.assert_allclose(kron_of(pair), due, rtol=0, atol=1e-10 * abs(due).max())
    if positions:  # the other one is not
        due, pair = next(blocks_and_pairs(net, fnbp.mean_squared_error(), x, y, "expand"))
        assert abs(kron_of(pair) - due).max() > 1e-2 * abs(due).max()


OF_ONE = {
    "squares": (SQUARES, lambda n: normal(1, 1, n)),
    "labels": (CROSS, lambda n: jnp.array([n - 1])),
    "logits": (fnbp.binary_cross_entropy(from_logits=True), lambda n: jnp.full((1, n), 0.3)),
}


@pytest.mark.parametrize("case", OF_ONE)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_of_one_example_kfac_is_the_ggn(x64, case, activation):
    loss, target = OF_ONE[case]
    act = fnbp.activation(activation)
    net = fnbp.serial(fnbp.dense(4), act, fnbp.layer_norm(), fnbp.dense(3), act, fnbp.dense(2))
    for reduce in ("expand", "reduce"):
        for due, pair in blocks_and_pairs(net, loss, normal(0, 1, 5), target(2), reduce):
            np.testing.assert_allclose(kron_of(pair), due, rtol=0, atol=1e-10 * abs(due).max() + 1e-14)


@pytest.mark.parametrize(
    "layer, make",
    [
        (fnbp.conv_transpose(4, (1,), b=None), lambda: normal(0, 1, 1, 4)),
        (fnbp.conv(4, (1,), b=None), lambda: normal(0, 1, 1, 4)),
        (fnbp.embedding(4, 4), lambda: jnp.array([[2]])),
        (fnbp.serial(fnbp.embedding(4, 4), fnbp.positions(4)), lambda: jnp.array([[2]])),
    ],
    ids=["conv_transpose", "conv", "embedding", "positions"],
)
def test_a_pair_knows_which_side_of_a_square_parameter_is_which(x64, layer, make):
    net = fnbp.serial(layer, fnbp.reshape(4), fnbp.tanh(), fnbp.dense(3, b=None))
    for due, pair in blocks_and_pairs(net, CROSS, make(), jnp.array([1])):
        np.testing.assert_allclose(kron_of(pair), due, rtol=0, atol=1e-10 * abs(due).max())


def test_examples_that_do_not_count_add_nothing_to_G(x64):
    net, x, y = fnbp.models.mlp(6, 3), normal(0, 6, 5), jnp.array([0, 1, 2, 0, 1, 2])
    params, state = net.init(KEY, x)
    counts = jnp.array([True, True, True, True, False, False])
    of = lambda loss: statistics.fisher(net, loss, fnbp.kronecker(), samples=None)  # noqa: E731
    found = of(counting_some(CROSS))(params, state, x, (y, counts))
    due = of(CROSS)(params, state, x[:4], y[:4])
    take = lambda tree: [pair.G for pair in jax.tree.leaves(tree, is_leaf=is_pair)]  # noqa: E731
    assert relative(take(found), take(due)) <= 1e-12
    own = fnbp.loss_from_jax(lambda p, t: jnp.sum((p - t) ** 4, -1))
    assert counting_some(own).roots is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of kfac-jax
def test_pairs_of_dense_layers_are_those_of_kfac_jax(monkeypatch):
    kfac_jax = pytest.importorskip("kfac_jax")
    matcher = pytest.importorskip("kfac_jax._src.tag_graph_matcher")

    def evaluated(eqn, values):  # kfac-jax 0.0.8 takes get_bind_params for a pair, which it is no longer
        made = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return made if isinstance(made, list) else [made]

    monkeypatch.setattr(matcher, "eval_jaxpr_eqn", evaluated)
    net, x, y = fnbp.serial(fnbp.dense(6, b=None), fnbp.tanh(), fnbp.dense(3, b=None)), normal(0, 8, 5), normal(1, 8, 3)
    params, state = net.init(KEY, x)

    def theirs(weights, batch):
        one, two = weights
        prediction = jnp.tanh(batch[0] @ one) @ two
        kfac_jax.register_squared_error_loss(prediction, batch[1], weight=0.5)
        return jnp.mean(jnp.sum((prediction - batch[1]) ** 2, -1)) / 2

    weights = [params[0]["W"].T, params[2]["W"].T]
    curvature = kfac_jax.BlockDiagonalCurvature(theirs, default_estimation_mode="fisher_exact")
    kept = curvature.init(KEY, (weights, (x, y)), None, None)
    kept = curvature.update_curvature_matrix_estimate(kept, 0.0, 1.0, 0.0, len(x), KEY, (weights, (x, y)))
    pairs = statistics.fisher(net, SQUARES, fnbp.kronecker(), samples=None)(params, state, x, y)
    for block, (A, G) in zip(kept.blocks_states, jax.tree.leaves(pairs, is_leaf=is_pair), strict=True):
        for factor, due in zip((A, G), block.factors, strict=True):
            assert relative(factor, due.value) <= 1e-5


# --- updates, written out ---


def text(net, m=4):
    return net, lambda key: (jax.random.randint(key, (m, 5), 0, 7), jax.random.randint(key, (m, 5), 0, 3)), CROSS


def pictures(net, shape, m=4):
    def of(key):
        return jax.random.normal(key, (m, *shape), float), jax.random.randint(key, (m,), 0, 3)

    return net, of, CROSS


NETS = {
    "mlp": lambda: pictures(fnbp.models.mlp(4, 3), (5,)),
    "conv": lambda: pictures(fnbp.serial(fnbp.conv(3, (2, 2)), fnbp.tanh(), fnbp.flatten(), fnbp.dense(3)), (3, 4, 2)),
    "conv_transpose": lambda: pictures(
        fnbp.serial(fnbp.conv_transpose(4, (1,)), fnbp.tanh(), fnbp.flatten(), fnbp.dense(3)), (2, 4)
    ),
    "embedding": lambda: text(fnbp.serial(fnbp.embedding(7, 7), fnbp.positions(6), fnbp.tanh(), fnbp.dense(3))),
    "tied, repeated": lambda: pictures(
        fnbp.serial(
            fnbp.dense(4),
            fnbp.repeat(fnbp.tie(fnbp.serial(fnbp.dense(4), fnbp.tanh(), fnbp.dense(4)), (0, "W"), (2, "W")), 2),
            fnbp.layer_norm(),
            fnbp.remat(fnbp.cast(fnbp.dense(3), "float64")),
        ),
        (5,),
    ),
    "lstm": lambda: pictures(fnbp.models.lstm_classifier(4, 3), (3, 2)),
    "gpt": lambda: text(fnbp.models.gpt(7, 6, 2, 2, 4)),
}
SLOW = ("conv", "conv_transpose", "tied, repeated", "lstm", "gpt")
DAMPING, INTERVAL, DECAY, RATE = 0.03, 2, 0.9, 0.7


def layers_of(pair, *arrays):
    """The pair and the arrays of each layer of a repeat, by themselves."""
    if pair.A.ndim == (1 if pair.diagonal else 2):
        return [(pair, *arrays)]
    own = [jax.tree.map(lambda a, i=i: a[i], (pair, *arrays)) for i in range(len(pair.A))]
    return [one for each in own for one in layers_of(*each)]


def diagonal_or_matrix(pair):
    return (np.diag(pair.A) if pair.diagonal else np.asarray(pair.A)), np.asarray(pair.G)


def solved(pair, A, G, g):
    """(G x A)^-1 g, in the order of the parameter's own numbers."""
    return np.linalg.solve(np.kron(A, G) if pair.turned else np.kron(G, A), g.reshape(-1)).reshape(g.shape)


def by_kfac(pair, g):
    A, G = diagonal_or_matrix(pair)
    pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
    A, G = A + pi * np.sqrt(DAMPING) * np.eye(len(A)), G + np.sqrt(DAMPING) / pi * np.eye(len(G))
    return solved(pair, A, G, g)


def by_foof(pair, g):
    A, G = diagonal_or_matrix(pair)
    A, G = A + DAMPING * np.eye(len(A)), np.eye(len(G))
    return solved(pair, A, G, g)


def basis_of(pair, bases):
    """The eigenvectors, which are those of the pair, whichever there are of an eigenvalue that comes several times."""
    for M, U in zip(pair, bases, strict=True):
        if M.ndim == 2:
            D = U.T @ M @ U
            assert abs(D - np.diag(np.diag(D))).max() <= 1e-12 * abs(M).max() + 1e-300
            assert abs(U.T @ U - np.eye(len(U))).max() <= 1e-12
    A, G = np.eye(len(pair.A)) if pair.diagonal else bases.A, bases.G
    return np.kron(A, G) if pair.turned else np.kron(G, A)


def averaged(found):
    """Moving averages of what was found, each begun at 0 and corrected."""
    weights = np.array([(1 - DECAY) * DECAY ** (len(found) - 1 - i) for i in range(len(found))])
    mean = lambda *each: sum(w * np.asarray(a) for w, a in zip(weights, each, strict=True)) / weights.sum()  # noqa: E731
    return jax.tree.map(mean, *found)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NETS])
def test_updates_are_those_written_out(x64, name):
    net, draw, loss = NETS[name]()
    batches = [draw(jax.random.key(i)) for i in range(4)]
    params, state = net.init(KEY, batches[0][0])
    leaf, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, [a + 0.3 * normal(i, *a.shape) for i, a in enumerate(leaf)])
    options = {"damping": DAMPING, "interval": INTERVAL, "decay": DECAY, "momentum": 0, "clip": None}
    makers = {"kfac": statistics.kfac, "foof": statistics.foof, "ekfac": statistics.ekfac}
    optimizers = {n: make(net, loss, *batches[0], RATE, **options) for n, make in makers.items()}

    @jax.jit
    def run(params):
        def step(states, each):
            x, y, key = each
            batch = state, x, y, fnbp.Context(key, train=True)
            of = {"pair": fnbp.kronecker(), "rows": fnbp.per_example}
            seen = statistics.fisher(net, loss, of)(params, *batch)
            seen["inputs"] = fnbp.backprop(net, loss, fnbp.kronecker())(params, *batch).grads  # foof samples nothing
            seen["g"] = fnbp.value_and_grad(net, loss)(params, *batch)[1]
            made = {n: o.update(seen["g"], states[n], params, batch=batch) for n, o in optimizers.items()}
            seen["bases"] = made["ekfac"][1][0].bases
            return {n: new for n, (_, new) in made.items()}, (seen, {n: updates for n, (updates, _) in made.items()})

        states = {n: o.init(params) for n, o in optimizers.items()}
        each = (*(jnp.stack(a) for a in zip(*batches, strict=True)), jax.random.split(KEY, 4))
        return jax.lax.scan(step, states, each)[1]

    seen, updates = run(params)
    for i in range(len(leaf)):
        own = [jax.tree.leaves(seen[what], is_leaf=is_pair)[i] for what in ("pair", "g", "rows", "bases", "inputs")]
        each = [jax.tree.map(lambda a, t=t: np.asarray(a[t]), own) for t in range(4)]
        for t in range(4):
            estimates = [each[u][0] for u in range(0, t + 1, INTERVAL)]
            g, since = each[t][1], each[t - t % INTERVAL : t + 1]
            pair, inputs = averaged(estimates), averaged([each[u][4] for u in range(0, t + 1, INTERVAL)])
            front = pair.A.ndim - (1 if pair.diagonal else 2)
            rows = [np.moveaxis(one[2], 0, front) for one in since]
            due = {n: [] for n in optimizers}
            for own, bases, g_own, own_inputs, *own_rows in layers_of(pair, each[t][3], g, inputs, *rows):
                U = basis_of(own, bases)
                squares = averaged([np.mean((r.reshape(len(r), -1) @ U) ** 2, 0) for r in own_rows])
                due["kfac"].append(by_kfac(own, g_own))
                due["foof"].append(by_foof(own_inputs, g_own))
                due["ekfac"].append((U @ ((U.T @ g_own.reshape(-1)) / (squares + DAMPING))).reshape(g_own.shape))
            for n in optimizers:
                found = np.asarray(jax.tree.leaves(updates[n])[i][t])
                assert relative(found, -RATE * np.stack(due[n]).reshape(found.shape)) <= 1e-9, (n, i, t)


def problem(dtype=float, m=20):
    net, x, y = fnbp.models.mlp(6, 3), normal(0, m, 5).astype(dtype), jax.random.randint(KEY, (m,), 0, 3)
    return net, *net.init(KEY, x), x, y


@pytest.mark.parametrize("make", [statistics.kfac, statistics.foof, statistics.ekfac])
def test_a_step_of_ones_own_does_not_change_the_form_of_the_state(make):
    net, params, state, x, y = problem()
    form = jax.eval_shape(lambda: (x, y))  # the shapes of data are enough
    optimizer = make(net, CROSS, *form, optax.constant_schedule(0.1))
    kept, batch = optimizer.init(params), (state, x, y, fnbp.Context(KEY, train=True))
    grads = fnbp.value_and_grad(net, CROSS)(params, *batch)[1]
    traces = []

    @jax.jit
    def step(grads, kept, params):
        traces.append(1)
        return optimizer.update(grads, kept, params, batch=batch)

    for _ in range(3):
        updates, new = step(grads, kept, params)
        describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
        assert describe(new) == describe(kept) and describe(updates) == describe(params)
        kept = new
    assert len(traces) == 1


def test_an_update_is_scaled_down_to_the_clip(x64):
    net, params, state, x, y = problem()
    batch = state, x, y, fnbp.Context(KEY, train=True)
    grads = fnbp.value_and_grad(net, CROSS)(params, *batch)[1]

    def product(clip):
        optimizer = statistics.kfac(net, CROSS, x, y, 0.5, clip=clip, momentum=0)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, batch=batch)
        return -0.5 * sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (updates, grads)), strict=True))

    whole = product(None)  # rate^2 <V, dW>
    np.testing.assert_allclose(product(float(whole) / 7), whole / np.sqrt(7), rtol=1e-10)
    np.testing.assert_allclose(product(float(whole) * 7), whole, rtol=1e-10)


@pytest.mark.parametrize("make", [statistics.kfac, statistics.foof, statistics.ekfac])
def test_fit_learns_also_from_a_last_batch_that_is_filled_up(make):
    net, params, state, x, y = problem()
    optimizer = make(net, CROSS, x, y, 0.1, damping=1e-2, interval=3)
    done = fnbp.fit(
        net, CROSS, params, state, x, y, optimizer=optimizer, key=KEY, batch_size=8, steps=40, progress=False
    )
    assert done.stopped == "steps" and done.history.loss[-5:].mean() < 0.5 * done.history.loss[:5].mean()


@pytest.mark.parametrize("make", [statistics.kfac, statistics.foof, statistics.ekfac])
def test_a_net_in_bfloat16(make):
    net, params, state, x, y = problem(jnp.bfloat16)
    mixed = fnbp.serial(fnbp.cast(fnbp.dense(6), "bfloat16"), fnbp.tanh(), fnbp.dense(3))
    for one, x in ((net, x), (mixed, x.astype("float32"))):  # noqa: B020
        net, (params, state) = one, one.init(KEY, x)
        optimizer = make(net, CROSS, x, y, 0.1, damping=1e-2)
        batch = state, x, y, fnbp.Context(KEY, train=True)
        grads = fnbp.value_and_grad(net, CROSS)(params, *batch)[1]
        updates, kept = jax.jit(lambda g, p, o=optimizer, b=batch: o.update(g, o.init(p), p, batch=b))(grads, params)
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((updates, kept)))
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(kept[0].averages))


def test_what_is_not_finite_is_told():
    net, params, state, x, y = problem()
    optimizer = statistics.kfac(net, CROSS, x, y, 0.1)
    ctx = fnbp.Context(KEY, train=True)
    calm = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(lambda x, kept: optimizer.update(calm, kept, params, batch=(state, x, y, ctx)))
    _, kept = step(x.at[3].set(jnp.inf), optimizer.init(params))
    later, _ = step(x, kept)  # one step behind, no estimate
    assert all(jnp.isnan(a).all() for a in jax.tree.leaves((later[0]["W"], later[2]["W"])))
    done = fnbp.fit(
        net, CROSS, params, state, x, y, optimizer=statistics.kfac(net, CROSS, x, y, 1e30, clip=None, interval=2),
        key=KEY, batch_size=20, steps=20, progress=False,
    )  # fmt: skip
    assert done.stopped == "non-finite" and all(jnp.isfinite(a).all() for a in jax.tree.leaves(done.params))


OTHERS = {
    "lbfgs": lambda: optax.lbfgs(),
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "several": lambda: optax.MultiSteps(optax.adam(0.1), 1).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(optax.polyak_sgd(), 3),
    "masked": lambda: optax.masked(optax.polyak_sgd(), lambda params: jax.tree.map(lambda a: True, params)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_not_disturbed_by_the_batch_that_fit_gives(name):
    net, params, state, x, y = problem()
    (J, _), grads = fnbp.value_and_grad(net, CROSS)(params, state, x, y)
    given = {"value": J, "grad": grads, "value_fn": lambda p: fnbp.value_and_grad(net, CROSS)(p, state, x, y)[0][0]}
    optimizer = optax.with_extra_args_support(OTHERS[name]())
    due, _ = jax.jit(lambda p: optimizer.update(grads, optimizer.init(p), p, **given))(params)
    options = {"optimizer": OTHERS[name](), "key": KEY, "batch_size": 20, "steps": 1, "progress": False}
    done = fnbp.fit(net, CROSS, params, state, x, y, **options)
    assert relative(done.params, optax.apply_updates(params, due)) <= 1e-4


def refused(make, **update):
    net, params, state, x, y = problem()
    optimizer = make(net, x, y)
    kept = optimizer.init(update.pop("start", params))
    ctx = update.pop("ctx", fnbp.Context(KEY, train=True))
    optimizer.update(update.pop("grads", params), kept, params, **({"batch": (state, x, y, ctx)} | update))


GROUPS, WIDE = fnbp.conv(8, (3, 3), groups=8), jnp.ones((1, 9, 9, 8))
OWN = fnbp.loss_from_jax(lambda p, t: jnp.sum((p - t) ** 4, -1))


@pytest.mark.parametrize("make", [statistics.kfac, statistics.foof, statistics.ekfac])
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"damping": -1e-3}, ValueError, "damping must be at least 0, got -0.001"),
        ({"damping": "much"}, TypeError, "damping must be a number"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"interval": 2.5}, TypeError, "interval must be a whole number, got 2.5"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, ValueError, r"decay must be in \[0, 1\)"),
        ({"momentum": 1}, ValueError, r"momentum must be in \[0, 1\), got 1"),
        ({"clip": 0}, ValueError, "clip must be above 0, got 0"),
        ({"learning_rate": "slow"}, TypeError, "learning_rate must be a number"),
        ({"reduce": "mean"}, ValueError, "reduce must be 'expand' or 'reduce', got 'mean'"),
    ],
)
def test_options_that_are_refused(make, options, error, words):
    net, _, _, x, y = problem()
    with pytest.raises(error, match=f"{make.__name__ if 'reduce' not in options else 'kronecker'}: {words}"):
        make(net, CROSS, x, y, **({"learning_rate": 0.1} | options))


@pytest.mark.parametrize(
    "make, update, error, words",
    [
        (lambda *a: statistics.kfac(a[0], CROSS, *a[1:], 0.1, samples=0), {}, ValueError, "samples must be at least 1"),
        (lambda *a: statistics.kfac(a[0], OWN, *a[1:], 0.1), {}, ValueError, "kfac: .* does not say the roots"),
        (lambda *a: statistics.kfac(a[0], CROSS, *a[1:], 0.1), {"ctx": fnbp.Context()}, ValueError, "kfac: signs are"),
        (lambda *a: statistics.ekfac(a[0], CROSS, *a[1:], 0.1), {"ctx": fnbp.Context()}, ValueError, "ekfac: signs"),
        (lambda *a: statistics.kfac(a[0], CROSS, *a[1:], 0.1), {"batch": None}, ValueError, r"batch=\(state, x"),
        (lambda *a: statistics.foof(a[0], CROSS, *a[1:], 0.1), {"batch": (1, 2)}, TypeError, "foof: batch must be"),
        (lambda *a: statistics.kfac(a[0], CROSS, *a[1:], 0.1), {"grads": 1.0}, ValueError, "belong to the same net"),
        (
            lambda *a: statistics.kfac(a[0], CROSS, *a[1:], 0.1),
            {"start": ({"W": jnp.ones((2, 3))},)},
            ValueError,
            "kfac: params do not belong to the net: expected",
        ),
        (
            lambda net, x, y: statistics.kfac(fnbp.serial(net, fnbp.batch_norm()), CROSS, x, y, 0.1),
            {"start": fnbp.serial(fnbp.models.mlp(6, 3), fnbp.batch_norm()).init(KEY, jnp.ones((2, 5)))[0]},
            TypeError,
            r"serial\[1\]\.batch_norm: it mixes the examples",
        ),
        (
            lambda *a: statistics.kfac(GROUPS, SQUARES, WIDE, WIDE, 0.1),
            {"start": GROUPS.init(KEY, WIDE)[0]},
            ValueError,
            "kronecker: a parameter of 72 numbers that is no matrix",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(make, update, error, words, monkeypatch):
    monkeypatch.setattr(fnbp.pairs, "MOST", 1 << 12)
    with pytest.raises(error, match=words):
        refused(make, **update)
