"""to_jax and from_jax: a manual backward inside JAX, an automatic one inside a net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import normal, relative

NET = fnbp.serial(
    fnbp.dense(11), fnbp.tanh(), fnbp.skip(fnbp.serial(fnbp.dense(5), fnbp.sigmoid(), fnbp.dense(11))), fnbp.dense(3)
)
M, N_IN = 13, 7
MSE = fnbp.mean_squared_error()


def drawn(net=NET, shape=(M, N_IN), seed=0):
    rng = np.random.default_rng(seed)
    x = normal(rng, shape, float)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype) / 2, shapes), state, x


def weights(shape):
    return normal(np.random.default_rng(5), shape, float)


def scalar(apply, shape=(M, 3)):
    """A function of (params, x) with a random cotangent at the output of apply."""
    return lambda params, x: jnp.sum(weights(shape) * jnp.sin(apply(params, x)))


def forward_of(net, state=None, ctx=None):
    def apply(params, x):
        empty = jax.eval_shape(net.init, jax.random.key(0), x)[1] if state is None else state
        return net.forward(params, empty, x, fnbp.Context() if ctx is None else ctx)[0]

    return apply


def halved(layer):
    """layer with a wrong backward: half of every gradient."""

    def backward(params, res, dy):
        factors, dx = layer.backward(params, res, dy)
        return {name: factor.scaled(0.5) for name, factor in factors.items()}, dx

    return layer._replace(backward=backward)


def scaling():
    """y = x scale, a state; twice that in training."""

    def forward(params, state, x, ctx):
        c = state["scale"] * (2 if ctx.train else 1)
        return c * x, state, (c,)

    return fnbp.Layer(
        lambda key, x: ({}, {"scale": jnp.ones(())}), forward, lambda params, res, dy: ({}, res[0] * dy), "scaling"
    )


def test_to_jax_inside_grad_and_jit_is_the_automatic_gradient(x64):
    params, _, x = drawn()
    manual, automatic = (jax.value_and_grad(scalar(f), (0, 1)) for f in (fnbp.to_jax(NET), forward_of(NET)))
    found, expected = jax.jit(lambda *args: (manual(*args), automatic(*args)))(params, x)
    assert relative(found, expected) <= 1e-12


def test_to_jax_needs_no_jit(x64):
    params, _, x = drawn(fnbp.dense(3))
    manual = jax.grad(lambda params, x: jnp.sum(weights((M, 3)) * fnbp.to_jax(fnbp.dense(3))(params, x)), (0, 1))
    dz, (dparams, dx) = np.asarray(weights((M, 3))), manual(params, x)
    assert relative((dparams, dx), ({"W": dz.T @ x, "b": dz.sum(0)}, dz @ params["W"])) <= 1e-12


def test_to_jax_inside_vmap_is_the_automatic_gradient(x64):
    members = [drawn(seed=seed) for seed in range(3)]
    params, x = jax.tree.map(lambda *a: jnp.stack(a), *[(params, x) for params, _, x in members])
    manual, automatic = (jax.vmap(jax.grad(scalar(f), (0, 1))) for f in (fnbp.to_jax(NET), forward_of(NET)))
    found, expected = jax.jit(lambda *args: (manual(*args), automatic(*args)))(params, x)
    assert relative(found, expected) <= 1e-12


def test_to_jax_as_one_piece_of_a_larger_model(x64):
    params, _, x = drawn()
    rest = weights((3, 2))
    model = lambda apply: lambda params, rest, x: jnp.sum(weights((M, 2)) * (apply(params, jnp.cos(x)) @ rest))  # noqa: E731
    manual, automatic = (jax.grad(model(f), (0, 1, 2)) for f in (fnbp.to_jax(NET), forward_of(NET)))
    found, expected = jax.jit(lambda *args: (manual(*args), automatic(*args)))(params, rest, x)
    assert relative(found, expected) <= 1e-12


def test_to_jax_uses_the_manual_backward(x64):
    params, _, x = drawn()
    wrong = fnbp.map_layers(lambda path, layer: halved(layer) if path == "serial[3].dense(3)" else layer, NET)
    right, found = jax.jit(lambda *args: [jax.grad(scalar(fnbp.to_jax(net)))(*args) for net in (NET, wrong)])(params, x)
    expected = (*right[:3], jax.tree.map(lambda leaf: leaf / 2, right[3]))
    assert relative(found, expected) <= 1e-12


def test_to_jax_of_a_layer_with_state_needs_it(x64):
    net = fnbp.serial(fnbp.dense(3), scaling())
    params, _, x = drawn(net)
    with pytest.raises(ValueError, match=r"to_jax: serial has state; give it as to_jax\(layer, state=...\)"):
        fnbp.to_jax(net)(params, x)
    state, train = ({}, {"scale": jnp.float64(7)}), fnbp.Context(train=True)
    apply, automatic = fnbp.to_jax(net, state, train), forward_of(net, state, train)
    assert relative(apply(params, x), 14 * (np.asarray(x) @ np.asarray(params[0]["W"]).T + params[0]["b"])) <= 1e-12
    found, expected = jax.jit(lambda *args: [jax.grad(scalar(f))(*args) for f in (apply, automatic)])(params, x)
    assert relative(found, expected) <= 1e-12


def test_to_jax_raises_what_the_layer_raises():
    params, _, x = drawn()
    with pytest.raises(ValueError, match=r"dense\(11\): params\['W'\] has shape"):
        fnbp.to_jax(NET)(params, x[:, :5])


def test_to_jax_refuses_a_backward_that_returns_another_shape():
    def transposed(params, res, dy):
        return {"W": fnbp.Outer(res[0], dy), "b": fnbp.Sum(dy)}, dy @ params["W"]

    params, _, x = drawn(fnbp.dense(3))
    apply = fnbp.to_jax(fnbp.dense(3)._replace(backward=transposed))
    with pytest.raises(ValueError, match=r"params\['W'\] has shape \(3, 7\), its gradient \(7, 3\)"):
        jax.eval_shape(jax.grad(scalar(apply)), params, x)


def value_and_grads(net, params, state, x, y):
    return jax.jit(fnbp.value_and_grad(net, MSE))(params, state, x, y)


def test_from_jax_of_one_layer_is_swapped_into_a_net(x64):
    params, state, x = drawn()
    swapped = fnbp.map_layers(lambda path, layer: fnbp.from_jax(layer) if "skip" in path else layer, NET)
    assert [path for path, _ in fnbp.leaves(swapped)][2] == "serial[2].skip[0].serial[0].from_jax(dense(5))"
    y = weights((M, 3))
    assert relative(value_and_grads(swapped, params, state, x, y), value_and_grads(NET, params, state, x, y)) <= 1e-12


def test_from_jax_ignores_the_manual_backward(x64):
    params, state, x = drawn(fnbp.dense(3))
    y = weights((M, 3))
    wrong = halved(fnbp.dense(3))
    right = value_and_grads(fnbp.dense(3), params, state, x, y)
    assert relative(value_and_grads(wrong, params, state, x, y), right) > 0.1
    assert relative(value_and_grads(fnbp.from_jax(wrong), params, state, x, y), right) <= 1e-12


def test_from_jax_of_a_function_with_init(x64):
    def init(key, x):
        return {"c": jnp.full(x.shape[-1], 2.0, x.dtype)}

    def power(params, x):
        return jnp.sin(params["c"] * x) ** 2

    net = fnbp.serial(fnbp.dense(5), fnbp.from_jax(power, init), fnbp.from_jax(power, init, "mine"))
    assert [path for path, _ in fnbp.leaves(net)][1:] == ["serial[1].from_jax(power)", "serial[2].mine"]
    params, state, x = drawn(net)
    assert params[1]["c"].shape == params[2]["c"].shape == (5,)
    assert net.parts[1].init(jax.random.key(0), x)[0]["c"].tolist() == [2.0] * N_IN
    y = weights((M, 5))

    def J(params):
        z = x @ params[0]["W"].T + params[0]["b"]
        return jnp.mean((power(params[2], power(params[1], z)) - y) ** 2)

    (value, _), grads = value_and_grads(net, params, state, x, y)
    assert relative((value, grads), jax.jit(jax.value_and_grad(J))(params)) <= 1e-12


def test_from_jax_of_a_function_without_parameters(x64):
    def sin(params, x):
        return jnp.sin(x)

    layer = fnbp.from_jax(sin)
    assert layer.name == "from_jax(sin)" and layer.parts == () and layer.rebuild is None
    with pytest.raises(TypeError, match=r"from_jax\(sin\): expected a random key"):
        layer.init(0, jnp.ones((2, 3)))
    layer = fnbp.from_jax(lambda params, x: jnp.sin(x))
    x, dy = weights((7, 3)), normal(np.random.default_rng(6), (7, 3), float)
    assert layer.init(jax.random.key(0), x) == ({}, {})
    y, state, res = layer.forward({}, {}, x, fnbp.Context())
    assert state == {} and relative(y, np.sin(x)) <= 1e-12
    grads, dx = layer.backward({}, res, dy)
    assert grads == {} and relative(dx, np.cos(x) * dy) <= 1e-12


def test_from_jax_keeps_state_and_context():
    layer = fnbp.from_jax(scaling())
    x = weights((7, 3))

    def counted(params, state, x, ctx):
        return x, {"n": state["n"] + 1}, ()

    y, state, res = layer.forward({}, {"scale": jnp.float32(3)}, x, fnbp.Context(train=True))
    assert relative(y, 6 * x) <= 1e-6 and state["scale"] == 3
    assert relative(layer.backward({}, res, x)[1], 6 * x) <= 1e-6
    counter = fnbp.Layer(lambda key, x: ({}, {"n": 0}), counted, lambda params, res, dy: ({}, dy), "counter")
    assert fnbp.from_jax(counter).forward({}, {"n": 4}, x, fnbp.Context())[1] == {"n": 5}


@pytest.mark.parametrize("neither", [3, None, "dense"])
def test_from_jax_refuses_what_is_neither_layer_nor_function(neither):
    words = rf"from_jax: expected a Layer or a function apply\(params, x\), got {type(neither).__name__} {neither!r}"
    with pytest.raises(TypeError, match=words):
        fnbp.from_jax(neither)


def test_a_function_has_no_manual_backward_to_hand_on():
    layer = fnbp.from_jax(lambda params, x: x, name="mine")
    x = weights((7, 3))
    _, _, res = layer.forward({}, {}, x, fnbp.Context())
    assert relative(layer.backward({}, res, 2 * x)[1], 2 * x) == 0


def test_from_jax_of_tokens_has_no_dx_as_an_embedding_has_none():
    tokens = jnp.array([[0, 4, 4], [2, 1, 0]])
    pair = fnbp.parallel(fnbp.embedding(5, 3), fnbp.from_jax(fnbp.embedding(5, 3)))
    for net in (pair, fnbp.cast(fnbp.from_jax(fnbp.embedding(5, 3)), "bfloat16")):
        params, state = net.init(jax.random.key(0), tokens)
        y, _, res = net.forward(params, state, tokens, fnbp.Context())
        factors, dx = net.backward(params, res, jnp.ones_like(y))
        assert dx is None and len(factors) == len(net.parts)
