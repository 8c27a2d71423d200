"""Statistics of opened losses are those of the same net of fnbp; what is seen of a loss; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fnbp
from fnbp import statistics

SOME = (fnbp.total, fnbp.sq_norms, fnbp.per_example, fnbp.second_moment)
NET = fnbp.serial(fnbp.dense(7), fnbp.tanh(), fnbp.dense(3))
CE = fnbp.softmax_cross_entropy()


def of_one(params, x, y):
    """The loss of one example of NET, written out."""
    (first, _, last) = params
    h = jnp.tanh(x @ first["W"].T + first["b"])
    z = h @ last["W"].T + last["b"]
    return jax.nn.logsumexp(z) - z[y]


def drawn(m=12):
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (m, 5), float), jax.random.randint(keys[1], (m,), 0, 3)
    params, state = NET.init(keys[2], x)
    return params, state, x, y


def apart(found, due):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True)
    return max(np.max(np.abs(a - b)) / np.max(np.abs(b), initial=1e-30) for a, b in pairs)


@pytest.mark.parametrize("options", [{"passes": 1}, {"passes": 2}, {}], ids=str)
def test_clipped(x64, options):
    params, state, x, y = drawn()
    (J, aux), found = jax.jit(statistics.clipped(fnbp.opened(of_one), 0.3, **options))(params, x, y)
    (due_J, _), due = statistics.clipped(NET, CE, 0.3, **options)(params, state, x, y)
    assert aux == () and apart((J, found), (due_J, due)) <= 1e-12
    assert apart(due, fnbp.value_and_grad(NET, CE)(params, state, x, y)[1]) > 1e-3


def test_clipped_with_noise_and_examples_that_do_not_count(x64):
    params, _, x, y = drawn()
    run = statistics.clipped(fnbp.opened(of_one), 0.3, noise=1.0, size=6.0)
    counts = jnp.arange(12) % 2 == 0
    _, one = run(params, x, y, key=jax.random.key(1), counts=counts)
    _, two = run(params, x.at[1].set(9.0), y, key=jax.random.key(1), counts=counts)
    _, three = run(params, x, y, key=jax.random.key(2), counts=counts)
    assert apart(one, two) == 0 < apart(one, three)
    with pytest.raises(ValueError, match="noise needs a key"):
        run(params, x, y, counts=counts)


def test_moments_and_noise_scale(x64):
    params, state, x, y = drawn()
    run = fnbp.opened(of_one)
    for maker in (statistics.moments, statistics.noise_scale):
        found, due = maker(run)(params, x, y), maker(NET, CE)(params, state, x, y)
        assert apart(found[1], due[1]) <= 1e-12
    assert apart(found[0][2].scale, due[0][2].scale) <= 1e-12


def test_influence(x64):
    params, state, x, y = drawn()
    found = statistics.influence(fnbp.opened(of_one), chunk=5)(params, (x, y), (x[:2], y[:2]))
    due = statistics.influence(NET, CE, chunk=5)(params, state, (x, y), (x[:2], y[:2]))
    assert apart(found, due) <= 1e-12
    with pytest.raises(TypeError, match=r"influence: of an opened loss batch and query must be tuples"):
        statistics.influence(fnbp.opened(of_one))(params, x, y)


@pytest.mark.parametrize("name", ["ggn_diagonal", "fisher", "kfac", "ekfac", "foof"])
def test_what_needs_more_than_a_number_says_so(name):
    with pytest.raises(TypeError, match=rf"{name}: an opened loss gives one number .* give a net and a Loss"):
        getattr(statistics, name)(fnbp.opened(of_one))


def test_no_other_loss_beside():
    with pytest.raises(TypeError, match=r"noise_scale: an opened loss takes no other loss beside it"):
        statistics.noise_scale(fnbp.opened(of_one), CE)


# --- what is seen ---


def test_trace_has_the_deltas_of_the_net(x64):
    params, state, x, y = drawn()
    found, due = fnbp.opened(of_one).trace(params, x, y), fnbp.trace(NET, CE)(params, state, x, y)
    deltas = {label.split()[0]: d for label, d in found.deltas.items()}
    outputs = {label.split()[0]: y for label, y in found.outputs.items()}
    for i, path in ((0, "serial[0].dense(7)"), (2, "serial[2].dense(3)")):
        assert apart(deltas[f"{i}.W"], due.deltas[path]) <= 1e-12
        assert apart(outputs[f"{i}.b"], due.outputs[path]) <= 1e-12
    assert apart(found.grads, due.grads) <= 1e-12 and apart(found.value, due.value) <= 1e-12
    assert "test_opening_statistics.py:" in next(iter(found.deltas))
    assert statistics.layer_table(found).layers.keys() == found.deltas.keys()


def test_trace_of_a_loop_has_its_turns():
    def loss(params, xs):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ params["u"] + x), None), params["h"], xs)
        return h.sum()

    params = {"u": jnp.ones((3, 3)), "h": jnp.ones(3), "unused": jnp.ones(2)}
    run = fnbp.opened(loss)
    shapes = [d.shape for d in run.trace(params, jnp.ones((5, 7, 3))).deltas.values()]
    assert sorted(shapes) == [(5, 3), (5, 7, 3)]
    uses = run.uses(params, jnp.ones((5, 7, 3)))
    assert {row.parameter: row.shape for row in uses.rows} == {"h": (3,), "u": (7, 3)}
    assert uses.factors["unused"] == "Nothing" and "never used: its gradient is 0" in str(uses)
    assert uses.factors["u"] == "LaidOut(Outer)"


def test_uses_names_rule_place_and_size():
    params, _, x, y = drawn()
    rows = fnbp.opened(of_one).uses(params, x, y).rows
    assert [(row.parameter, row.rule) for row in rows] == [
        ("0.W", "outer products"),
        ("0.b", "a sum"),
        ("2.W", "outer products"),
        ("2.b", "a sum"),
    ]
    assert rows[0].bytes == 4 * 12 * (7 + 5) and rows[0].shape == (7,)
    assert rows[0].line.endswith(f"test_opening_statistics.py:{of_one.__code__.co_firstlineno + 3}")


def test_a_second_call_compiles_nothing():
    params, _, x, y = drawn()
    run = jax.jit(fnbp.opened(of_one, fnbp.sq_norms))
    run(params, x, y)
    run(params, 2 * x, y)
    assert run._cache_size() == 1


# --- in other surroundings ---


def of_turns(params, x, y):
    """Turns with a weight that is derived, a penalty, and a convolution."""
    first, _, last = params
    w = first["W"] / jnp.linalg.norm(first["W"])
    h, _ = jax.lax.scan(lambda h, b: (jnp.tanh(w @ x * h + b), None), jnp.ones(7), jnp.stack([first["b"]] * 3))
    rows = jax.lax.conv_general_dilated(h[None, None], last["W"][:, None], (1,), "SAME")
    return rows[0, y].sum() + jnp.sum(last["b"] ** 2)


@pytest.mark.parametrize(
    "contract", [fnbp.total, fnbp.sq_norms, fnbp.per_example, fnbp.second_moment], ids=lambda c: c.name
)
@pytest.mark.parametrize("loss", [of_one, of_turns])
@pytest.mark.parametrize("axis", ["Auto", "Explicit"])
def test_split_over_devices(x64, axis, loss, contract):
    params, _, x, y = drawn()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, axis),))
    run = fnbp.opened(loss, contract)
    due = run(params, x, y)
    with jax.set_mesh(mesh):
        x, y = jax.device_put((x, y), jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
        assert apart(jax.jit(run)(params, x, y), due) <= 1e-12


def test_within_shard_map(x64):
    params, _, x, y = drawn()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(params, x, y):
        losses, grads = fnbp.opened(of_one, {"total": fnbp.total, "squares": fnbp.sq_norms})(params, x, y)
        return losses, jax.tree.map(lambda g: g / 4, grads["total"]), grads["squares"]

    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))
    out = (PartitionSpec("data"), PartitionSpec(), PartitionSpec("data"))
    found = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out))(params, x, y)
    losses, due = fnbp.opened(of_one, {"total": fnbp.total, "squares": fnbp.sq_norms})(params, x, y)
    assert apart(found, (losses, due["total"], due["squares"])) <= 1e-12


def test_over_several_params_at_once(x64):
    params, _, x, y = drawn()
    run = fnbp.opened(of_one, fnbp.sq_norms)
    two = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    found = jax.vmap(run, (0, None, None))(two, x, y)
    assert apart(jax.tree.map(lambda a: a[1], found), run(jax.tree.map(lambda p: 2 * p, params), x, y)) <= 1e-12


# --- from_jax ---


def test_from_jax_of_a_function_has_factors():
    def apply(params, x):
        return jnp.tanh(x @ params["w"])

    net = fnbp.serial(fnbp.from_jax(apply, lambda key, x: {"w": jax.random.normal(key, (400, 300))}))
    x = jnp.ones((50, 400))
    params, state = net.init(jax.random.key(0), x)
    squares = fnbp.backprop(net, fnbp.half_squared_error(), fnbp.sq_norms)
    made = jax.jit(squares).lower(params, state, x, jnp.zeros((50, 300))).compile()
    assert made.memory_analysis().temp_size_in_bytes < 50 * 400 * 300 * 4 / 4  # no gradient for each example


# --- bad input ---


def mistakes():
    params, x, y = {"w": jnp.ones(3)}, jnp.ones((5, 3)), jnp.ones(5)
    loss = lambda params, x, y: jnp.sum(params["w"] * x) * y  # noqa: E731

    def noise(params, x, key):
        return jnp.sum(params["w"] * x * jax.random.normal(key, 3))

    return {
        "no function": (lambda: fnbp.opened(NET), TypeError, "opened: loss must be a function"),
        "not one number": (
            lambda: fnbp.opened(lambda params, x: params["w"] * x)(params, x),
            TypeError,
            r"must be a real number of shape \(\), got .*a loss of a whole batch loses its mean",
        ),
        "aux without has_aux": (
            lambda: fnbp.opened(lambda params, x: (jnp.sum(params["w"] * x), x))(params, x),
            TypeError,
            "with aux: has_aux=True",
        ),
        "has_aux without aux": (
            lambda: fnbp.opened(loss, has_aux=True)(params, x, y),
            TypeError,
            r"must return \(loss, aux\)",
        ),
        "examples": (
            lambda: fnbp.opened(loss)(params, x, y[:4]),
            ValueError,
            "equally many examples as first axis: x has 5, y has 4",
        ),
        "no example axis": (
            lambda: fnbp.opened(loss)(params, x, 2.0),
            TypeError,
            r"y must be an array with the examples as first axis, got .*shared=\(2,\)",
        ),
        "no batch": (lambda: fnbp.opened(loss)(params), ValueError, "no argument has an example axis"),
        "no example": (lambda: fnbp.opened(loss)(params, x[:0], y[:0]), ValueError, "there are 0 examples"),
        "shared": (lambda: fnbp.opened(loss, shared=(3,))(params, x, y), ValueError, "argument 3 is shared"),
        "shared, 0": (
            lambda: fnbp.opened(loss, shared=0),
            ValueError,
            "numbers of arguments behind params, 1 the first",
        ),
        "mask": (lambda: fnbp.opened(loss, mask=[True])(params, x, y), ValueError, "mask must be a tree of params"),
        "a model": (
            lambda: fnbp.opened(lambda params, x: x.sum())({"f": jnp.tanh}, x),
            TypeError,
            r"params\['f'\] must be an array.*eqx.partition",
        ),
        "one key": (
            lambda: fnbp.opened(noise)(params, x, jax.random.key(0)),
            TypeError,
            "key must be an array with the examples as first axis",
        ),
        "check under jit": (
            lambda: jax.jit(fnbp.opened(loss, check=True))(params, x, y),
            TypeError,
            "call it once without jit",
        ),
        "one example for a variance": (
            lambda: statistics.moments(fnbp.opened(loss))(params, x[:1], y[:1]),
            ValueError,
            "a batch of 1 has no variance",
        ),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_named(name):
    call, kind, message = mistakes()[name]
    with pytest.raises(kind, match=message):
        call()


def test_check_finds_a_wrong_rule(monkeypatch):
    from fnbp.opening import meetings

    params, _, x, y = drawn()
    fnbp.opened(of_one, check=True)(params, x, y)
    right = meetings.RULES["add"]

    def wrong(step, i, makers):
        use = right(step, i, makers)
        return meetings.Use(use.of, use.rule, use.needs, lambda d: use.make(d).scaled(2))

    monkeypatch.setitem(meetings.RULES, "add", wrong)
    with pytest.raises(ValueError, match=r"0\.b has another gradient than by vmap\(jax.grad\)"):
        fnbp.opened(of_one, check=True)(params, x, y)
