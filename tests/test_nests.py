"""Nested combinators: each contraction of their factors, compared with jax.grad of each example by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import relative, sum_of_squares

W, BLOCKS = (0, 0, "W"), tuple(fnbp.repeat(fnbp.dense(5), n) for n in (2, 2))
TURNED, DEEP = fnbp.scan(fnbp.rnn_cell(5)), fnbp.scan(fnbp.repeat(fnbp.rnn_cell(5), 2))
SCANS = {"scan of repeat": 1, "repeat of scan of repeat": 1, "tie of scans of repeats": 2}  # how many h_0 they take
NESTS = {
    "tie of repeats": (fnbp.tie(fnbp.serial(*BLOCKS), W, (1, 0, "W")), (5,)),
    "tie of scans": (fnbp.tie(fnbp.serial(TURNED, TURNED), (0, "U"), (1, "U")), (7, 5)),
    "tie of scans of repeats": (fnbp.tie(fnbp.serial(DEEP, DEEP), W, (1, 0, "W")), (3, 5)),
    "tie of casts of repeats": (
        fnbp.tie(fnbp.serial(*(fnbp.cast(block, "float64") for block in BLOCKS)), (0, *W), (1, *W)),
        (5,),
    ),
    "scan of repeat": (DEEP, (7, 5)),
    "repeat of scan of repeat": (fnbp.repeat(DEEP, 3), (7, 5)),
    "repeat of repeat": (fnbp.repeat(fnbp.repeat(fnbp.dense(5), 2), 3), (7, 5)),
    "cast of repeat": (fnbp.cast(fnbp.repeat(fnbp.dense(5), 2), "float64"), (5,)),
    "repeat of cast of repeat": (fnbp.repeat(fnbp.cast(fnbp.repeat(fnbp.dense(5), 2), "float64"), 3), (5,)),
    "remat of tie": (fnbp.remat(fnbp.tie(fnbp.serial(*[fnbp.dense(5)] * 2), (0, "W"), (1, "W"))), (5,)),
    "gpt in another dtype": (fnbp.cast(fnbp.models.gpt(5, 7, 2, 1, 4), "float64"), (7,)),
}


def squares() -> fnbp.Loss:
    """sum_of_squares of every array of a prediction."""
    each = sum_of_squares()

    def forward(p, t):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: each.forward(a, b)[0], p, t))), (p, t)

    def backward(res):
        return jax.tree.map(lambda a, b: each.backward((a, b)), *res)

    return fnbp.Loss(forward, backward, "squares")


def drawn(name, m, shape, rng):
    """x of m examples: numbers, tokens, or (h_0, x)."""
    if name.startswith("gpt"):
        return jnp.asarray(rng.integers(0, 5, (m, *shape)))
    x = jnp.asarray(rng.standard_normal((m, *shape)))
    starts = [jnp.asarray(rng.standard_normal((m, 5))) for _ in range(SCANS.get(name, 0))]
    if not starts:
        return x
    return (tuple(starts) if len(starts) > 1 else starts[0], x)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("gpt")) for name in NESTS]
)
@pytest.mark.parametrize("m", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_contractions_of_nests_are_those_of_each_example_by_itself(x64, name, m):
    net, shape = NESTS[name]
    rng, loss = np.random.default_rng(0), squares()
    x = drawn(name, m, shape, rng)
    params, state = net.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) / 3), params)
    y = net.forward(params, state, x, fnbp.Context())[0]
    y = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), y)

    def alone(*example):
        x, y = jax.tree.map(lambda a: a[None], example)
        return jax.grad(lambda p: loss.forward(net.forward(p, state, x, fnbp.Context())[0], y)[0].sum())(params)

    due = jax.vmap(alone)(x, y)
    norms = jnp.sqrt(sum(jnp.sum(rows**2, range(1, rows.ndim)) for rows in jax.tree.leaves(due)))
    got = [fnbp.backprop(net, loss, c)(params, state, x, y).grads for c in (fnbp.per_example, fnbp.keep, fnbp.total)]
    kept = jax.tree.map(lambda f: f.per_example(), got[1], is_leaf=lambda node: isinstance(node, fnbp.Factor))
    assert relative(fnbp.per_example_norms(net, loss)(params, state, x, y), norms) <= 1e-11
    assert relative(got[0], due) <= 1e-11 and relative(kept, due) <= 1e-11
    assert relative(got[2], jax.tree.map(lambda rows: rows.mean(0), due)) <= 1e-11
    direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)
    other = drawn(name, 2, shape, rng)
    aim = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal((2, *a.shape[1:]))), y)
    kept = fnbp.backprop(net, loss, fnbp.keep)(params, state, other, aim).grads
    contract = {
        "squares": fnbp.second_moment,
        "products": fnbp.gram,
        "along": fnbp.dot(direction),
        "across": fnbp.cross_gram(kept),
    }
    found = jax.jit(lambda *given: fnbp.backprop(net, loss, contract)(*given).grads)(params, state, x, y)
    flat = jax.tree.map(lambda rows: rows.reshape(m, -1), due)
    assert relative(found["squares"], jax.tree.map(lambda rows: (rows**2).sum(0), due)) <= 1e-11
    assert relative(found["products"], jax.tree.map(lambda rows: rows @ rows.T, flat)) <= 1e-11
    others = jax.tree.map(lambda rows: rows.reshape(2, -1), jax.vmap(alone)(other, aim))
    assert relative(found["across"], jax.tree.map(lambda r, h: r @ h.T, flat, others)) <= 1e-11
    assert relative(found["along"], jax.tree.map(lambda r, v: r @ v.reshape(-1), flat, direction)) <= 1e-11


@pytest.mark.parametrize("wrap", [fnbp.skip, fnbp.remat, lambda layer: layer], ids=["skip", "remat", "bare"])
def test_a_loop_over_depth_tells_what_its_layers_say_to_their_state(wrap):
    net, x = fnbp.repeat(wrap(fnbp.batch_norm()), 2), jnp.ones((5, 7))
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="batch_norm: no training step yet"):
        net.forward(params, state, x, fnbp.Context())
    _, state, _ = net.forward(params, state, x, fnbp.Context(train=True))
    assert jnp.isfinite(net.forward(params, state, x, fnbp.Context())[0]).all()
