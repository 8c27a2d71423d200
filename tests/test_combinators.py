"""serial and skip: shapes, keys, state, and what they refuse. Their gradients are in test_layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import normal, relative

X = normal(np.random.default_rng(0), (7, 11), float)
NONE = fnbp.Context()
NET = fnbp.serial(fnbp.dense(5), fnbp.sigmoid(), fnbp.skip(fnbp.serial(fnbp.dense(13), fnbp.dense(5))), fnbp.dense(3))


def drawn(net, x=X):
    rng = np.random.default_rng(1)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype), shapes), state


def shapes_of(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def counter():
    """Adds its state, a number, to x; counts its calls in it."""

    def forward(params, state, x, ctx):
        return x + state["n"], {"n": state["n"] + 1}, ()

    return fnbp.Layer(lambda key, x: ({}, {"n": 0}), forward, lambda params, res, dy: ({}, dy), "counter")


def noise():
    """Adds what its key draws."""

    def forward(params, state, x, ctx):
        return x + jax.random.normal(ctx.key, x.shape), state, ()

    return fnbp.Layer(lambda key, x: ({}, {}), forward, lambda params, res, dy: ({}, dy), "noise")


def test_init_follows_the_shapes_through_serial_and_skip():
    params, state = jax.eval_shape(NET.init, jax.random.key(0), X)
    assert shapes_of(params) == [(5, 11), (5,), (13, 5), (13,), (5, 13), (5,), (3, 5), (3,)]
    assert isinstance(params, tuple) and len(params) == len(state) == 4
    assert params[1] == state[1] == {} and state[2] == (({}, {}),)


def test_init_gives_each_layer_a_key_of_its_own():
    def keyed():
        return fnbp.stateless(
            lambda key, x: {"key": jax.random.key_data(key)},
            lambda params, x: (x, ()),
            lambda p, r, dy: (p, dy),
            "keyed",
        )

    net = fnbp.serial(keyed(), keyed(), fnbp.skip(keyed()), fnbp.serial(keyed(), keyed()))
    keys = [tuple(np.asarray(key).tolist()) for key in jax.tree.leaves(net.init(jax.random.key(0), X)[0])]
    assert len(set(keys)) == 5


def test_serial_runs_its_layers_in_order_and_back_in_reverse():
    called = []

    def spy(name):
        def forward(params, x):
            called.append(f"forward {name}")
            return x, (name,)

        def backward(params, res, dy):
            called.append(f"backward {res[0]}")
            return {"name": name}, dy

        return fnbp.stateless(lambda key, x: {}, forward, backward, name)

    net = fnbp.serial(spy("a"), spy("b"), spy("c"))
    _, _, res = net.forward(({}, {}, {}), ({}, {}, {}), X, NONE)
    factors, _ = net.backward(({}, {}, {}), res, X)
    assert called == ["forward a", "forward b", "forward c", "backward c", "backward b", "backward a"]
    assert [factor["name"] for factor in factors] == ["a", "b", "c"]


def test_state_is_threaded_to_its_own_layer():
    net = fnbp.serial(counter(), fnbp.skip(counter()), fnbp.serial(counter()))
    _, state = net.init(jax.random.key(0), X)
    assert state == ({"n": 0}, ({"n": 0},), ({"n": 0},))
    y, state, _ = net.forward(({}, ({},), ({},)), ({"n": 10}, ({"n": 20},), ({"n": 30},)), X, NONE)
    assert state == ({"n": 11}, ({"n": 21},), ({"n": 31},))
    assert relative(y, 2 * (np.asarray(X) + 10) + 20 + 30) <= 1e-6


def test_each_layer_draws_from_a_key_of_its_own():
    one, two = fnbp.serial(noise()), fnbp.serial(noise(), noise())
    zeros, context = jnp.zeros((7, 11)), fnbp.Context(jax.random.key(3))
    first = one.forward(({},), ({},), zeros, context)[0]
    both = two.forward(({}, {}), ({}, {}), zeros, context)[0]
    assert relative(both, 2 * first) > 0.1


def test_skip_adds_its_input_and_its_cotangent():
    net = fnbp.skip(fnbp.dense(11))
    params, state = drawn(net)
    (p,) = jax.tree.map(np.asarray, params)
    y, _, res = net.forward(params, state, X, NONE)
    assert relative(y, X + X @ p["W"].T + p["b"]) <= 1e-6
    dy = normal(np.random.default_rng(2), (7, 11), float)
    (factors,), dx = net.backward(params, res, dy)
    assert relative(dx, dy + dy @ p["W"]) <= 1e-6
    assert relative(factors["W"].total(), np.asarray(dy).T @ X) <= 1e-6


def test_an_empty_serial_is_the_identity():
    net = fnbp.serial()
    assert net.init(jax.random.key(0), X) == ((), ())
    y, state, res = net.forward((), (), X, fnbp.Context(jax.random.key(0)))
    assert y is X and state == res == ()
    dy = 2 * X
    factors, dx = net.backward((), res, dy)
    assert factors == () and dx is dy


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (lambda tree: tree[:3], "3"),
        (lambda tree: (*tree, {}), "5"),
        (lambda tree: dict(enumerate(tree)), "a dict"),
        (lambda tree: None, "a NoneType"),
    ],
    ids=["fewer", "more", "dict", "none"],
)
def test_serial_refuses_params_and_state_of_another_net(wrong, came):
    params, state = drawn(NET)
    words = f"must have 4 entries, one for each layer, got {came}; do they belong to a different net\\?"
    with pytest.raises(ValueError, match=f"serial: params {words}"):
        NET.forward(wrong(params), state, X, NONE)
    with pytest.raises(ValueError, match=f"serial: state {words}"):
        NET.forward(params, wrong(state), X, NONE)
    NET.forward(list(params), list(state), X, NONE)


def test_skip_refuses_params_and_state_of_another_net():
    net = fnbp.skip(fnbp.dense(11))
    params, state = drawn(net)
    with pytest.raises(ValueError, match="skip: params must have 1 entries, one for each layer, got a dict"):
        net.forward(params[0], state, X, NONE)
    with pytest.raises(ValueError, match="skip: state must have 1 entries, one for each layer, got 2"):
        net.forward(params, (*state, {}), X, NONE)


@pytest.mark.parametrize(
    ("params", "came"),
    [({"W": jnp.ones((5, 11))}, r"\['W'\]"), ({"W": 1, "b": 2, "c": 3}, r"\['W', 'b', 'c'\]")],
    ids=["missing", "extra"],
)
def test_a_layer_refuses_params_of_another(params, came):
    words = rf"dense\(5\): params must hold \['W', 'b'\], got {came}; do they belong to a different net\?"
    with pytest.raises(ValueError, match=words):
        fnbp.dense(5).forward(params, {}, X, NONE)


def test_a_layer_without_parameters_refuses_some():
    with pytest.raises(ValueError, match=r"tanh: params must hold \[\], got \['W'\]"):
        fnbp.tanh().forward({"W": 1}, {}, X, NONE)
    with pytest.raises(ValueError, match=r"tanh: params must hold \[\], got tuple"):
        fnbp.tanh().forward((), {}, X, NONE)


def test_parts_that_are_no_layers_are_refused_and_a_constructor_that_was_not_called_is_told_so():
    with pytest.raises(TypeError, match=r"serial: part 1 must be a Layer, got function sigmoid; call it: sigmoid\(\)$"):
        fnbp.serial(fnbp.dense(3), fnbp.sigmoid)
    with pytest.raises(TypeError, match=r"serial: part 0 must be a Layer, got an empty list$"):
        fnbp.serial([])
    with pytest.raises(TypeError, match=r"skip: the layer must be a Layer, got int 3$"):
        fnbp.skip(3)


@pytest.mark.parametrize("width", [5, 1], ids=["other", "broadcastable"])
def test_skip_refuses_a_layer_that_changes_the_shape(width):
    net = fnbp.skip(fnbp.dense(width))
    words = (
        rf"skip: dense\({width}\) maps float32\[7, 11\] to float32\[7, {width}\]; a sum with its input needs the same"
    )
    with pytest.raises(ValueError, match=words):
        net.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=words):
        net.forward(({"W": jnp.ones((width, 11)), "b": jnp.ones(width)},), ({},), X, NONE)


def test_skip_refuses_a_layer_that_changes_the_dtype():
    half = fnbp.stateless(lambda key, x: {}, lambda p, x: (x.astype("bfloat16"), ()), lambda p, r, dy: ({}, dy), "half")
    with pytest.raises(ValueError, match=r"skip: half maps float32\[7, 11\] to bfloat16\[7, 11\]"):
        fnbp.serial(fnbp.skip(half)).init(jax.random.key(0), X)


def test_sizes_that_do_not_meet_raise_with_layer_what_came_what_was_due_and_where():
    params, state = drawn(NET)
    with pytest.raises(
        ValueError, match=r"dense\(5\): params\['W'\] has shape \(5, 11\), x of shape \(7, 13\) needs \(5, 13\)"
    ) as caught:
        NET.forward(params, state, jnp.ones((7, 13)), NONE)
    assert caught.value.__notes__ == ["in serial[0].dense(5)"]
    deep = (*params[:2], ((params[2][0][0], params[2][0][0]),), params[3])
    with pytest.raises(
        ValueError, match=r"params\['W'\] has shape \(13, 5\), x of shape \(7, 13\) needs \(5, 13\)"
    ) as caught:
        NET.forward(deep, state, X, NONE)
    assert caught.value.__notes__ == ["in serial[1].dense(5)", "in skip[0].serial", "in serial[2].skip"]
    bias = ({"W": params[0]["W"], "b": jnp.ones(1)}, *params[1:])
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(1,\), x of shape \(7, 11\) needs \(5,\)"):
        NET.forward(bias, state, X, NONE)


def test_combinators_hold_their_parts_and_rebuild_themselves():
    parts = (fnbp.tanh(), fnbp.relu())
    for net, name, count in ((fnbp.serial(*parts), "serial", 2), (fnbp.skip(parts[0]), "skip", 1)):
        assert (net.name, net.parts) == (name, parts[:count])
        others = (fnbp.sigmoid(), fnbp.identity())[:count]
        again = net.rebuild(others)
        assert (again.name, again.parts) == (name, others)
