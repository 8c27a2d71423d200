"""One layer in another setting: what it saves, in which dtype, and who trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from tests.cases import relative

rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((7, 11)), jnp.float32)
Y = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)
NET = fnbp.serial(fnbp.dense(13), fnbp.tanh(), fnbp.dense(5))
LOSS = fnbp.half_squared_error()


def shapes(tree):
    return [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]


def test_cast_keeps_weights_and_neighbours_wide():
    net = fnbp.cast(NET, jnp.bfloat16)
    params, state = net.init(jax.random.key(0), X)
    done = fnbp.backprop(net, LOSS)(params, state, X, Y)
    assert {a.dtype for a in jax.tree.leaves((params, done.prediction, done.grads, done.dx))} == {
        jnp.dtype(jnp.float32)
    }
    plain = fnbp.backprop(NET, LOSS)(params[0], state[0], X, Y)
    assert 1e-4 < relative(done.grads[0], plain.grads) < 2e-2
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params[0], X, Y))
    inside = fnbp.backprop(NET, LOSS)(low[0], state[0], low[1], low[2])
    assert relative(done.prediction, inside.prediction) == 0


def test_cast_computes_in_the_dtype_it_says():
    seen = []

    def forward(params, x):
        seen.append((x.dtype, params["w"].dtype))
        return x * params["w"], (x,)

    layer = fnbp.stateless(
        lambda key, x: {"w": jnp.ones((), x.dtype)},
        forward,
        lambda params, res, dy: ({"w": jnp.sum(dy * res[0])}, dy * params["w"]),
        "scale",
    )
    net = fnbp.cast(layer, "bfloat16")
    params, state = net.init(jax.random.key(0), X)
    fnbp.backprop(net, LOSS)(params, state, X, X)
    assert seen[-1] == (jnp.bfloat16, jnp.bfloat16)


def test_cast_gives_per_example_norms_and_traces():
    net = fnbp.cast(NET, jnp.bfloat16)
    params, state = net.init(jax.random.key(0), X)
    norms = fnbp.per_example_norms(net, LOSS)(params, state, X, Y)
    assert norms.dtype == jnp.float32
    assert relative(norms, fnbp.per_example_norms(NET, LOSS)(params[0], state[0], X, Y)) < 2e-2
    assert next(iter(fnbp.trace(net, LOSS)(params, state, X, Y).outputs)) == "cast(bfloat16)[0].serial[0].dense(13)"


def test_compare_takes_cast_for_no_fault():
    assert fnbp.compare(fnbp.cast(NET, jnp.bfloat16), X, transforms=()).ok
    assert fnbp.compare(fnbp.cast(fnbp.dense(5), jnp.float32), X.astype(jnp.bfloat16), transforms=()).ok


def test_remat_saves_its_input_alone_and_a_loop_of_it_needs_less_memory():
    block = fnbp.serial(*[fnbp.serial(fnbp.dense(64), fnbp.tanh()) for _ in range(4)])
    x = jnp.ones((512, 64))
    params, state = fnbp.remat(block).init(jax.random.key(0), x)
    saved = fnbp.remat(block).forward(params, state, x, fnbp.Context())[2]
    assert shapes(saved) == [((512, 64), jnp.float32)]

    def temporary(layer):
        net = fnbp.repeat(layer, 4)
        run = jax.jit(fnbp.value_and_grad(net, LOSS))
        lowered = run.lower(*jax.eval_shape(net.init, jax.random.key(0), x), x, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(fnbp.remat(block)) < 0.5 * temporary(block)


def test_remat_draws_the_same_mask_twice():
    net = fnbp.remat(fnbp.serial(fnbp.dense(13), fnbp.dropout(0.5)))
    params, state = net.init(jax.random.key(0), X)
    ctx = fnbp.Context(jax.random.key(1), train=True)
    once, again = (
        fnbp.backprop(n, LOSS)(p, s, X, jnp.zeros((7, 13)), ctx).grads
        for n, p, s in ((net, params, state), (net.parts[0], params[0], state[0]))
    )
    assert relative(once[0], again) == 0


def test_an_optimiser_does_not_see_what_is_frozen():
    body = fnbp.serial(fnbp.dense(13), fnbp.tanh())
    net = fnbp.serial(fnbp.freeze(body), fnbp.dense(5))
    params, state = net.init(jax.random.key(0), X)
    assert params[0] == {} and shapes(state[0]["params"]) == shapes(body.init(jax.random.key(0), X)[0])
    (_, after), grads = fnbp.value_and_grad(net, LOSS)(params, state, X, Y)
    optimizer = optax.adamw(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert relative(after[0]["params"], state[0]["params"]) == 0


def test_tied_parameters_take_one_step_together():
    net = fnbp.tie(fnbp.serial(fnbp.embedding(13, 3), fnbp.dense(13, b=None)), (0, "E"), (1, "W"))
    ids = jnp.asarray(rng.integers(0, 13, (5, 7)))
    params, state = net.init(jax.random.key(0), ids)
    assert list(params[0][0]) == ["E"] and params[0][1] == {}
    loss = fnbp.softmax_cross_entropy()
    grads = fnbp.value_and_grad(net, loss)(params, state, ids, ids)[1]
    assert relative(grads, fnbp.automatic_value_and_grad(net, loss)(params, state, ids, ids)[1]) < 1e-6
    kept = fnbp.backprop(net, loss, fnbp.keep)(params, state, ids, ids).grads[0][0]["E"]
    assert relative(kept.per_example().mean(0), grads[0][0]["E"]) < 1e-6


REFUSED = [
    (lambda: fnbp.cast(NET, jnp.int32), TypeError, r"cast: expected a floating point dtype, got int32"),
    (lambda: fnbp.cast(fnbp.relu, jnp.bfloat16), TypeError, r"cast: the layer must be a Layer.*call it: relu\(\)"),
    (lambda: fnbp.remat(3), TypeError, r"remat: the layer must be a Layer, got int 3"),
    (lambda: fnbp.freeze(3), TypeError, r"freeze: the layer must be a Layer, got int 3"),
    (lambda: fnbp.parallel(), ValueError, r"parallel\(sum\): expected at least one layer"),
    (
        lambda: fnbp.parallel(fnbp.relu(), join="add"),
        ValueError,
        r"unknown join 'add'.*There are: concat, product, sum",
    ),
    (
        lambda: fnbp.parallel(fnbp.dense(3), fnbp.dense(5)).init(jax.random.key(0), X),
        ValueError,
        r"parallel\(sum\): its layers return float32\[7, 3\], float32\[7, 5\], which have no sum",
    ),
    (
        lambda: fnbp.tie(NET, (0, "W"), (2, "W")).init(jax.random.key(0), X),
        ValueError,
        r"tie: \(0, 'W'\) has shape \(13, 11\), \(2, 'W'\) \(5, 13\); they must be alike",
    ),
    (
        lambda: fnbp.tie(NET, (0, "W"), (2, "E")).init(jax.random.key(0), X),
        ValueError,
        r"tie: \(2, 'E'\) leads nowhere in params: 'E' is not there",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_it_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
