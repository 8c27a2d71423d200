"""Every statistic on every kind of net: under vmap and scan, on data that are split over devices, in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnbp
from fnbp import statistics
from tests.cases import relative

LOSS, KEY = fnbp.softmax_cross_entropy(), jax.random.key(5)
CTX = fnbp.Context(KEY, train=True)


def ragged(key, m):
    lengths = jnp.asarray(np.resize([5, 2, 4, 1], m))
    return (jax.random.normal(key, (m, 5, 3), float), lengths), jax.random.randint(key, (m,), 0, 4)


def tokens(key, m):
    x = jax.random.randint(key, (m, 6), 0, 7)
    return x, jnp.roll(x, -1, 1)


def rows(key, m):
    return jax.random.normal(key, (m, 7), float), jax.random.randint(key, (m,), 0, 4)


def images(key, m):
    return jax.random.normal(key, (m, 6, 6, 2), float), jax.random.randint(key, (m,), 0, 4)


NETS = {
    "ragged": (lambda: fnbp.ragged(fnbp.models.gru_classifier(5, 4)), ragged),
    "gpt": (lambda: fnbp.models.gpt(7, 6, 2, 2, 8), tokens),
    "dropout in a loop": (
        lambda: fnbp.serial(
            fnbp.dense(6), fnbp.repeat(fnbp.serial(fnbp.dense(6), fnbp.dropout(0.5)), 3), fnbp.dense(4)
        ),
        rows,
    ),
    "frozen batch_norm": (
        lambda: fnbp.serial(fnbp.conv(3, 3), fnbp.freeze(fnbp.batch_norm()), fnbp.global_avg_pool(), fnbp.dense(4)),
        images,
    ),
}
STATISTICS = {
    "clipped": lambda net: statistics.clipped(net, LOSS, 0.3),
    "clipped, two passes": lambda net: statistics.clipped(net, LOSS, 0.3, passes=2),
    "clipped per layer": lambda net: statistics.clipped(net, LOSS, 0.3, per_layer=True),
    "moments": lambda net: statistics.moments(net, LOSS),
    "noise_scale": lambda net: statistics.noise_scale(net, LOSS),
    "ggn_diagonal": lambda net: statistics.ggn_diagonal(net, LOSS),
    "fisher": lambda net: statistics.fisher(net, LOSS, {"pairs": fnbp.kronecker(), "gram": fnbp.gram}),
}
QUICK = "dropout in a loop"
SLOWLY = [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in NETS]
each = pytest.mark.parametrize("name", SLOWLY)
every = pytest.mark.parametrize("statistic", STATISTICS)


def subject(name, m=8):
    make, draw = NETS[name]
    net, (x, y) = make(), draw(KEY, m)
    params, state = net.init(KEY, x)
    if name == "frozen batch_norm":
        state = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.int32 else a + 0.5, state)
    return net, params, state, x, y


@each
@every
def test_statistics_of_data_that_are_split_are_those_of_one_device(x64, name, statistic):
    net, params, state, x, y = subject(name)
    run = STATISTICS[statistic](net)
    alone = jax.jit(run)(params, state, x, y, CTX)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("example",), axis_types=(kind,))
        data = jax.device_put((x, y), NamedSharding(mesh, P("example")))
        held = jax.device_put((params, state), NamedSharding(mesh, P()))
        assert relative(jax.jit(run)(*held, *data, CTX), alone) <= 1e-11, kind


@pytest.mark.parametrize("name", [QUICK, pytest.param("ragged", marks=pytest.mark.slow)])
@every
def test_statistics_under_vmap_and_scan(x64, name, statistic):
    net, params, state, x, y = subject(name, 4)
    run = STATISTICS[statistic](net)
    other = jax.tree.map(lambda p: p + 0.1, params)
    alone = [jax.jit(run)(p, state, x, y, CTX) for p in (params, other)]
    due = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    both = jax.tree.map(lambda *a: jnp.stack(a), params, other)
    over = lambda p: run(p, state, x, y, CTX)  # noqa: E731
    assert relative(jax.jit(jax.vmap(over))(both), due) <= 1e-11
    found = jax.jit(lambda both: jax.lax.scan(lambda carry, p: (carry, over(p)), 0, both)[1])(both)
    assert relative(found, due) <= 1e-11


@each
@every
def test_statistics_in_bfloat16(name, statistic):
    net, params, state, x, y = subject(name, 4)
    low = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )
    params, state, x = low(params), low(state), low(x)
    found = jax.jit(STATISTICS[statistic](net))(params, state, x, y, CTX)
    if statistic == "moments":
        found = found[0], found[1][:2]  # a ratio to a variance of 0 is infinite
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(found) if jnp.issubdtype(a.dtype, jnp.floating))
    if statistic.startswith("clipped"):
        assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(found[1]))
