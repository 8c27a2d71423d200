"""Many devices: a batch that is split over the mesh that jax.make_mesh makes, and within shard_map, is one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fnbp
from tests.cases import CASES, draw, eager_vjp, relative, sum_of_squares

QUICK = {"dense", "conv", "embedding", "layer_norm", "batch_norm", "scan", "attention", "repeat", "tie", "from_jax"}
EACH = [pytest.param(case, id=case.id, marks=[] if case.id in QUICK else [pytest.mark.slow]) for case in CASES]
LOSS = sum_of_squares()


@functools.cache
def mesh():
    return jax.make_mesh((4,), ("example",))  # Explicit axes, by default


def split(*trees):
    return jax.device_put(trees, NamedSharding(mesh(), P("example")))


def everywhere(*trees):
    return jax.device_put(trees, NamedSharding(mesh(), P()))


def drawn(case):
    return draw(case, (8, *case.shapes[0][1:]))


def test_make_mesh_gives_explicit_axes():
    assert mesh().axis_types == (jax.sharding.AxisType.Explicit,)


@pytest.mark.parametrize("case", EACH)
def test_a_batch_over_explicit_axes_is_one_batch(x64, case):
    params, state, x, dy = drawn(case)

    def run(params, state, x, dy):
        y, new_state, _ = case.layer.forward(params, state, x, case.context)
        grads, dx = eager_vjp(case, params, state, x, dy)
        out = fnbp.backprop(case.layer, LOSS)(params, state, x, dy, case.context)
        norms = None
        if not case.mixes and jax.tree.leaves(params):
            norms = fnbp.per_example_norms(case.layer, LOSS)(params, state, x, dy, case.context)
        return y, new_state, grads, dx, out.value, out.grads, norms

    alone = jax.jit(run)(params, state, x, dy)
    sharded = jax.jit(run)(*everywhere(params, state), *split(x, dy))
    assert relative(sharded, alone) <= 1e-12
    for grads in (sharded[2], sharded[5]):
        assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(grads))
    if not case.tokens:
        assert jax.typeof(sharded[3]).sharding.spec[0] == "example"


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("case", [param for param in EACH if param.id in QUICK and not param.values[0].mixes])
def test_contractions_of_a_batch_that_is_split_are_those_of_one(x64, case, kind):
    params, state, x, dy = drawn(case)
    if not jax.tree.leaves(params):
        return
    key = jax.random.key(3)
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(key, p.size), p.shape, p.dtype), params)
    contract = {
        "both": (fnbp.total, fnbp.sq_norms),
        "rows": fnbp.per_example,
        "squares": fnbp.second_moment,
        "products": fnbp.gram,
        "along": fnbp.dot(direction),
        "curvature": fnbp.kronecker(),
        "few": fnbp.project(key, 2, 3),
    }
    run = jax.jit(lambda *given: fnbp.backprop(case.layer, LOSS, contract)(*given, case.context).grads)
    alone = run(params, state, x, dy)
    if kind == "Explicit":
        found = run(*everywhere(params, state), *split(x, dy))
    else:
        auto = jax.make_mesh((4,), ("example",), axis_types=(jax.sharding.AxisType.Auto,))
        place = lambda tree, *spec: jax.device_put(tree, NamedSharding(auto, P(*spec)))  # noqa: E731
        found = run(place(params), place(state), place(x, "example"), place(dy, "example"))
    for name in contract:
        assert relative(found[name], alone[name]) <= 1e-12, name


@pytest.mark.parametrize(
    "case", [param for param in EACH if param.values[0].context.key is None and "dropout" not in str(param.id)]
)
def test_a_batch_within_shard_map_is_one_batch(x64, case):
    params, state, x, dy = drawn(case)

    def local(params, state, x, dy):
        (value, _), grads = fnbp.value_and_grad(case.layer, LOSS)(params, state, x, dy, case.context)
        (_, _), automatic = fnbp.automatic_value_and_grad(case.layer, LOSS)(params, state, x, dy, case.context)
        norms = jnp.zeros(len(x))
        if jax.tree.leaves(params):
            norms = fnbp.per_example_norms(case.layer, LOSS)(params, state, x, dy, case.context)
        return jax.lax.pmean(value, "example"), grads, automatic, norms

    over = P("example")
    specs = {"in_specs": (P(), P(), over, over), "out_specs": (P(), P(), P(), over)}
    run = jax.jit(jax.shard_map(local, mesh=mesh(), **specs))  # check_vma is on by default
    args = (*everywhere(params, state), *split(x, dy))
    if case.mixes:
        with pytest.raises(
            ValueError, match="batch_norm: within shard_map it would see the examples of one device only"
        ):
            run(*args)
        return
    value, grads, automatic, norms = run(*args)
    (one, _), whole = jax.jit(fnbp.value_and_grad(case.layer, LOSS))(params, state, x, dy, case.context)
    # as with jax.grad, the gradient of the devices' means added up: 4 times that of the mean
    assert relative(value, one) <= 1e-12 and relative(jax.tree.map(lambda g: g / 4, grads), whole) <= 1e-12
    assert relative(grads, automatic) <= 1e-12
    if jax.tree.leaves(params):
        assert (
            relative(norms, jax.jit(fnbp.per_example_norms(case.layer, LOSS))(params, state, x, dy, case.context))
            <= 1e-12
        )


@pytest.mark.parametrize("loss", ["labels", "distributions", "ignored", "binary", "squared", "from_jax"])
def test_losses_over_explicit_axes(x64, loss):
    rng = np.random.default_rng(0)
    a, labels = jnp.asarray(rng.standard_normal((8, 3, 5))), jnp.asarray(rng.integers(0, 5, (8, 3)))
    shares = jnp.asarray(rng.dirichlet(np.ones(5), (8, 3)))
    make, y = {
        "labels": (fnbp.softmax_cross_entropy(), labels),
        "distributions": (fnbp.softmax_cross_entropy(label_smoothing=0.1), shares),
        "ignored": (fnbp.softmax_cross_entropy(ignore_index=2, reduce="tokens"), labels),
        "binary": (fnbp.binary_cross_entropy(from_logits=True), shares),
        "squared": (fnbp.mean_squared_error(), shares),
        "from_jax": (fnbp.loss_from_jax(lambda p, t: (p - t) ** 4), shares),
    }[loss]
    run = jax.jit(fnbp.backprop(fnbp.serial(fnbp.dense(5)), make))
    params, state = fnbp.serial(fnbp.dense(5)).init(jax.random.key(0), a)
    alone, sharded = run(params, state, a, y), run(*everywhere(params, state), *split(a, y))
    assert relative(sharded, alone) <= 1e-12


def test_gpt_over_explicit_axes_with_and_without_a_mesh_in_context():
    net = fnbp.models.gpt(11, 8, 2, 2, 4)
    text = jax.random.randint(jax.random.key(0), (8, 8), 0, 11)
    params, state = net.init(jax.random.key(1), text)
    run = jax.jit(fnbp.value_and_grad(net, fnbp.softmax_cross_entropy()))
    alone = run(params, state, text, text)
    args = (*everywhere(params, state), *split(text, text))
    assert relative(run(*args), alone) <= 1e-5
    with jax.set_mesh(mesh()):
        assert relative(run(*args), alone) <= 1e-5


def test_to_jax_within_shard_map_has_the_cotangents_of_plain_jax(x64):
    layer = fnbp.scan(fnbp.gru_cell(3))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 2)))
    params, state = layer.init(jax.random.key(0), x)

    def plain(params, x):
        return layer.forward(params, state, x, fnbp.Context())[0]

    def gradient(apply):
        def local(params, x):
            return jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), (0, 1))(params, x)

        specs = {"in_specs": (P(), P("example")), "out_specs": (P(), P("example"))}
        return jax.jit(jax.shard_map(local, mesh=mesh(), **specs))(*everywhere(params), *split(x))

    assert relative(gradient(fnbp.to_jax(layer)), gradient(plain)) <= 1e-12


def test_a_batch_over_explicit_axes_trains_outside_jit_too():
    net = fnbp.serial(fnbp.dense(3))
    x = jnp.ones((8, 5))
    params, state = net.init(jax.random.key(0), x)
    y = jnp.arange(8) % 3
    run = fnbp.value_and_grad(net, fnbp.softmax_cross_entropy())
    assert relative(run(*everywhere(params, state), *split(x, y)), run(params, state, x, y)) <= 1e-6


@pytest.mark.parametrize("batch_size", [8, 6])
def test_fit_trains_on_data_that_are_split_over_explicit_axes(batch_size):
    import optax

    net = fnbp.serial(fnbp.dense(4), fnbp.tanh(), fnbp.dense(3))
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((24, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, 24))
    params, state = net.init(jax.random.key(0), x)
    options = {"optimizer": optax.adam(0.01), "key": jax.random.key(1), "batch_size": batch_size, "epochs": 2}

    def run(params, state, x, y):
        loss = fnbp.softmax_cross_entropy()
        return fnbp.fit(net, loss, params, state, x, y, **options, progress=False, validation=(x, y))

    alone, sharded = run(params, state, x, y), run(*everywhere(params, state), *split(x, y))
    assert relative(sharded.params, alone.params) <= 1e-5
    assert relative(sharded.history.validation_loss, alone.history.validation_loss) <= 1e-5


@pytest.mark.parametrize("keys", [60, 70])
def test_memory_that_all_devices_share_within_shard_map(x64, keys):
    rng, layer = np.random.default_rng(0), fnbp.attention(2)
    x, memory, dy = (jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 66, 4), (1, keys, 4), (4, 66, 4)))
    params, state = layer.init(jax.random.key(0), (x[:1], memory))

    def dx(x, memory, dy):
        _, _, res = layer.forward(params, state, (x, memory), fnbp.Context())
        return layer.backward(params, res, dy)[1][0]

    auto = jax.make_mesh((4,), ("example",), axis_types=(jax.sharding.AxisType.Auto,))
    over = P("example")
    found = jax.jit(jax.shard_map(dx, mesh=auto, in_specs=(over, P(), over), out_specs=over))(x, memory, dy)
    assert relative(found, dx(x, jnp.repeat(memory, 4, 0), dy)) <= 1e-12
