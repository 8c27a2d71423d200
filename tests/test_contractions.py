"""Every contraction of every layer, against the gradients of single examples, each by jax.grad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.contractions
from tests.cases import relative
from tests.test_layers import draw, each_manual, sum_of_squares

KEY = jax.random.key(11)


def flat(rows):
    return rows.reshape(rows.shape[0], -1)


# name -> (of a direction and of the kept factors of another batch, a contraction; of the rows, the direction and the
# rows of the other batch, what is due)
DUE = {
    "total": (lambda v, kept: fnbp.total, lambda g, v, h: g.mean(0)),
    "per_example": (lambda v, kept: fnbp.per_example, lambda g, v, h: g),
    "sq_norms": (lambda v, kept: fnbp.sq_norms, lambda g, v, h: (flat(g) ** 2).sum(1)),
    "second_moment": (lambda v, kept: fnbp.second_moment, lambda g, v, h: (g**2).sum(0)),
    "dot": (lambda v, kept: fnbp.dot(v), lambda g, v, h: flat(g) @ v.reshape(-1)),
    "gram": (lambda v, kept: fnbp.gram, lambda g, v, h: flat(g) @ flat(g).T),
    "cross_gram": (lambda v, kept: fnbp.cross_gram(kept), lambda g, v, h: flat(g) @ flat(h).T),
}


@pytest.mark.parametrize("few", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["at once", "in parts"])
@each_manual
def test_of_every_layer(x64, monkeypatch, case, shape, few):
    if few:
        monkeypatch.setattr(fnbp.contractions, "CHUNK", 1)
    params, state, x, target = draw(case, shape)
    if case.mixes or not jax.tree.leaves(params):
        return
    loss = sum_of_squares()
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(KEY, p.size), p.shape, p.dtype), params)
    other = jax.tree.map(lambda a: a[::-1] + a.dtype.type(1) if jnp.issubdtype(a.dtype, jnp.floating) else a[::-1], x)

    def losses(params, x):
        return loss.forward(case.layer.forward(params, state, x, case.context)[0], target)[0]

    @jax.jit
    def found_and_due(params, direction):
        kept = fnbp.backprop(case.layer, loss, fnbp.keep)(params, state, other, target, case.context).grads
        contract = {name: make(direction, kept) for name, (make, _) in DUE.items()}
        found = fnbp.backprop(case.layer, loss, contract)(params, state, x, target, case.context).grads
        rows, others = (jax.jacrev(losses)(params, given) for given in (x, other))
        return found, {name: jax.tree.map(due, rows, direction, others) for name, (_, due) in DUE.items()}

    found, due = found_and_due(params, direction)
    for name in DUE:
        assert relative(found[name], due[name]) <= 1e-11, name


# --- kronecker ---


def kept_of(net, x, y):
    params, state = net.init(jax.random.key(0), x)
    return fnbp.backprop(net, fnbp.half_squared_error(), fnbp.keep)(params, state, x, y).grads


def test_of_one_example_at_one_position_kronecker_is_the_outer_product_of_its_gradient(x64):
    net = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(3))
    x, y = jax.random.normal(KEY, (1, 7), float), jax.random.normal(KEY, (1, 3), float)
    params, state = net.init(KEY, x)
    for reduce in ("expand", "reduce"):
        contract = {"pair": fnbp.kronecker(reduce), "g": fnbp.per_example}
        grads = fnbp.backprop(net, fnbp.half_squared_error(), contract)(params, state, x, y).grads
        pairs = jax.tree.structure(params).flatten_up_to(grads["pair"])
        for (A, G), g in zip(pairs, jax.tree.leaves(grads["g"]), strict=True):
            g = g[0].reshape(-1)
            np.testing.assert_allclose(jnp.kron(G, A), jnp.outer(g, g), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduce", ["expand", "reduce"])
def test_kronecker_of_a_convolution_sees_windows_as_positions(x64, reduce):
    net, x = fnbp.conv(4, (3, 2), stride=2, padding=1), jax.random.normal(KEY, (5, 7, 6, 3), float)
    y = jax.random.normal(KEY, net.forward(*net.init(KEY, x), x, fnbp.Context())[0].shape, float)
    kept = kept_of(net, x, y)
    windows = jax.lax.conv_general_dilated_patches(
        x, (3, 2), (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # the channel first
    windows = windows.reshape(5, -1, 3, 6).swapaxes(2, 3).reshape(5, -1, 18)
    d = kept["W"].d.reshape(5, windows.shape[1], 4)
    if reduce == "reduce":
        windows, d = windows.mean(1, keepdims=True), d.sum(1, keepdims=True)
    A, G = fnbp.kronecker(reduce)(kept["W"])
    flat_windows, flat_d = windows.reshape(-1, 18), d.reshape(-1, 4)
    np.testing.assert_allclose(A, flat_windows.T @ flat_windows / len(flat_windows), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(G, flat_d.T @ flat_d / 5, rtol=1e-12, atol=1e-14)
    A, _ = fnbp.kronecker(reduce)(kept["b"])
    np.testing.assert_allclose(A, [[1.0]])


def test_kronecker_of_a_transposed_convolution_has_what_came_in_as_A(x64):
    net, x = fnbp.conv_transpose(4, (2,), stride=2), jax.random.normal(KEY, (5, 3, 7), float)
    y = jax.random.normal(KEY, (5, 6, 4), float)  # windows of 2 that do not meet: a dense layer from 7 to 2 x 4
    kept = kept_of(net, x, y)
    A, G = fnbp.kronecker()(kept["W"])
    d, x = kept["W"].d.reshape(15, 8), x.reshape(15, 7)
    np.testing.assert_allclose(A, x.T @ x / 15, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(G, d.T @ d / 5, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduce", ["expand", "reduce"])
def test_kronecker_of_an_embedding_has_the_diagonal(x64, reduce):
    tokens, d = jnp.array([[3, 1, 3], [0, 9, -1]]), jax.random.normal(KEY, (2, 3, 4), float)
    A, G = fnbp.kronecker(reduce)(fnbp.factors.Lookup(d, tokens, 5))
    hot = jax.nn.one_hot(tokens, 5)
    due = fnbp.kronecker(reduce)(fnbp.Outer(d * hot.sum(-1, keepdims=True), hot))
    np.testing.assert_allclose(A, jnp.diagonal(due[0]), rtol=1e-12)
    np.testing.assert_allclose(G, due[1], rtol=1e-12)


def test_kronecker_refuses_what_is_no_matrix_and_too_large():
    with pytest.raises(ValueError, match="kronecker: a parameter of 10000 numbers that is no matrix"):
        fnbp.kronecker()(fnbp.factors.PerExample(jnp.ones((2, 100, 100))))
    with pytest.raises(ValueError, match="reduce must be 'expand' or 'reduce', got 'mean'"):
        fnbp.kronecker("mean")


# --- project ---


def test_project_forms_no_gradient_and_is_the_same_where_it_is_formed(x64):
    d, x = jax.random.normal(KEY, (5, 3, 7), float), jax.random.normal(KEY, (5, 3, 11), float)
    project = fnbp.project(KEY, 4, 2)
    factor = fnbp.Outer(d, x)
    np.testing.assert_allclose(project(factor), project(fnbp.factors.PerExample(factor.per_example())), rtol=1e-12)
    assert project(factor).shape == (5, 8)


def test_projections_have_the_inner_products_of_gradients_in_the_mean(x64):
    factor = fnbp.Outer(jax.random.normal(KEY, (3, 2, 5), float), jax.random.normal(KEY, (3, 2, 4), float))
    due = fnbp.gram(factor)

    @jax.vmap
    def products(key):
        z = fnbp.project(key, 6, 6)(factor)
        return z @ z.T

    found = products(jax.random.split(KEY, 4000))
    error = found.std(0) / np.sqrt(4000)
    assert (abs(found.mean(0) - due) <= 5 * error).all()


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: fnbp.project(3, 2, 2), TypeError, "project: expected a random key"),
        (lambda: fnbp.project(KEY, 0, 2), ValueError, "k_out must be at least 1, got 0"),
        (lambda: fnbp.project(KEY, 2, 1.5), TypeError, "k_in must be a whole number"),
    ],
)
def test_what_project_refuses(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- what is given ---


@pytest.mark.parametrize(
    "direction, words",
    [
        (lambda params: params[0], "dot: expected a tree of params"),
        (lambda params: jax.tree.map(lambda p: p[..., :1], params), r"dot: a parameter of shape \(5, 7\) is given"),
    ],
)
def test_a_direction_of_another_tree_is_refused(direction, words):
    net, x = fnbp.serial(fnbp.dense(5), fnbp.dense(3)), jnp.ones((2, 7))
    params, state = net.init(KEY, x)
    with pytest.raises(ValueError, match=words):
        fnbp.backprop(net, fnbp.mean_squared_error(), fnbp.dot(direction(params)))(params, state, x, jnp.ones((2, 3)))


def test_names_give_trees_and_a_tuple_gives_tuples():
    net, x, y = fnbp.serial(fnbp.dense(5), fnbp.dense(3)), jnp.ones((2, 7)), jnp.ones((2, 3))
    params, state = net.init(KEY, x)
    run = lambda contract: fnbp.backprop(net, fnbp.mean_squared_error(), contract)(params, state, x, y).grads  # noqa: E731
    found = run({"gradient": fnbp.total, "squares": fnbp.sq_norms})
    due = run((fnbp.total, fnbp.sq_norms))
    assert jax.tree.structure(found["gradient"]) == jax.tree.structure(params)
    for a, b, pair in zip(
        *map(jax.tree.leaves, found.values()), jax.tree.structure(params).flatten_up_to(due), strict=True
    ):
        assert np.array_equal(a, pair[0]) and np.array_equal(b, pair[1])


def test_kronecker_of_a_table_that_looks_up_and_scores_stands_for_both(x64):
    tokens, d = jnp.array([[3, 1, 3], [0, 2, 2]]), jax.random.normal(KEY, (2, 3, 4), float)
    scored, x = jax.random.normal(jax.random.key(1), (2, 3, 5), float), jax.random.normal(KEY, (2, 3, 4), float)
    one, other = fnbp.factors.Lookup(d, tokens, 5), fnbp.Outer(scored, x)
    first, second = fnbp.kronecker()(one), fnbp.kronecker()(other)
    sum_of_both = jnp.kron(jnp.diag(first.A), first.G) + jnp.kron(second.G, second.A)
    for pair, rows in ((fnbp.kronecker()(one + other), "A"), (fnbp.kronecker()(other + one), "G")):
        sides = (pair.A, pair.G) if rows == "A" else (pair.G, pair.A)
        np.testing.assert_allclose(jnp.trace(jnp.kron(*sides)), jnp.trace(sum_of_both), rtol=1e-12)
        assert pair.turned == (rows == "A") and not pair.diagonal
    twice = fnbp.kronecker()(one + one)  # exact if one is a multiple of the other
    assert twice.diagonal
    np.testing.assert_allclose(jnp.kron(twice.A, twice.G), 2 * jnp.kron(first.A, first.G), rtol=1e-12)


def test_kronecker_of_tied_weights_sees_through_a_cast(x64):
    bare = fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(3))
    cast = fnbp.serial(fnbp.cast(fnbp.dense(3), "float64"), fnbp.tanh(), fnbp.cast(fnbp.dense(3), "float64"))
    nets = fnbp.tie(bare, (0, "W"), (2, "W")), fnbp.tie(cast, (0, 0, "W"), (2, 0, "W"))
    x, y = jax.random.normal(KEY, (6, 3), float), jax.random.normal(jax.random.key(1), (6, 3), float)
    pairs = []
    for net in nets:
        params, state = net.init(KEY, x)
        params = jax.tree.map(lambda p: jnp.arange(p.size, dtype=float).reshape(p.shape) / p.size, params)
        pairs.append(fnbp.backprop(net, fnbp.half_squared_error(), fnbp.kronecker())(params, state, x, y).grads)
    for one, other in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_total_beside_others_has_the_dtype_of_its_parameter():
    net, x = fnbp.serial(fnbp.dense(3), fnbp.dense(2)), jnp.ones((4, 5))
    params, state = net.init(KEY, x)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    contract = {"gradient": fnbp.total, "squares": fnbp.sq_norms}
    found = fnbp.backprop(net, fnbp.half_squared_error(), contract)(params, state, x, jnp.ones((4, 2))).grads
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(found["gradient"]))


def test_weights_that_share_an_error_but_no_positions(x64):
    over = lambda x: jnp.mean(x, 1, keepdims=True)  # noqa: E731

    def init(key, x):
        return {"W": jnp.ones((2, 3)), "V": jnp.ones((2, 3))}

    def forward(params, x):
        return x @ params["W"].T + over(x) @ params["V"].T, (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"W": fnbp.Outer(dy, x), "V": fnbp.Outer(dy, over(x))}, dy @ params["W"] + over(dy @ params["V"])

    net = fnbp.stateless(init, forward, backward, "both")
    x, y, loss = jax.random.normal(KEY, (4, 5, 3)), jnp.ones((4, 5, 2)), fnbp.half_squared_error()
    params, state = net.init(KEY, x)
    found = fnbp.backprop(net, loss)(params, state, x, y).grads
    due = jax.grad(lambda p: loss.forward(net.forward(p, state, x, fnbp.Context())[0], y)[0].mean())(params)
    assert relative(found, due) <= 1e-12


@pytest.mark.parametrize("T", [7, 9])
@pytest.mark.parametrize("cell", [fnbp.lstm_cell(3), fnbp.gru_cell(3)], ids=lambda cell: cell.name)
def test_pairs_of_a_cell_in_a_loop_are_those_of_its_matrix_whatever_wraps_it(x64, cell, T):
    """A cast cell, and a scan within a scan, in chunks or turn by turn, have the sides of W, not one dense side."""
    rng = np.random.default_rng(0)
    plain = cell._replace(traits=dataclasses.replace(cell.traits, whole=None))
    x = jnp.asarray(rng.standard_normal((2, 5, T, 4)))

    def pairs(net, x, y):
        params, state = net.init(jax.random.key(0), x)
        grads = fnbp.backprop(net, fnbp.half_squared_error(), fnbp.kronecker("expand"))(params, state, x, y).grads
        return jax.tree.leaves(grads)

    y = jnp.asarray(rng.standard_normal((2, 5, T, 3)))
    due = pairs(fnbp.scan(plain), x[:, 0], y[:, 0])
    assert {a.shape for a in due} >= {(4, 4), (3, 3)}
    assert relative(pairs(fnbp.scan(fnbp.cast(cell, "float64")), x[:, 0], y[:, 0]), due) <= 1e-12
    assert relative(pairs(fnbp.scan(fnbp.scan(cell)), x, y), pairs(fnbp.scan(fnbp.scan(plain)), x, y)) <= 1e-12
