"""Loops: sequences of several lengths, a first state that is given, depth."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import relative

rng = np.random.default_rng(0)
LENGTHS = (3, 1, 5, 4, 2)
MASK = np.arange(5) < np.array(LENGTHS)[:, None]
CELLS = (fnbp.rnn_cell(7), fnbp.lstm_cell(7), fnbp.gru_cell(7))
cells = pytest.mark.parametrize("cell", CELLS, ids=[cell.name for cell in CELLS])


def drawn(net, x):
    params, state = net.init(jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) / 3, p.dtype), params), state


def first(cell, m):
    h = jnp.asarray(rng.standard_normal((m, 7)))
    return (h, 2 * h) if cell.name.startswith("lstm") else h


def total(factors):
    is_factor = lambda node: isinstance(node, fnbp.Factor)  # noqa: E731
    return jax.tree.map(lambda f: f.total() if is_factor(f) else f, factors, is_leaf=is_factor)


@cells
@pytest.mark.parametrize("reverse", [False, True])
def test_ragged_sequences_are_as_each_alone(x64, cell, reverse):
    net, x = fnbp.scan(cell, reverse), jnp.asarray(rng.standard_normal((5, 5, 3)))
    h, dh, dy = first(cell, 5), first(cell, 5), jnp.asarray(rng.standard_normal((5, 5, 7)))
    params, state = drawn(net, x)

    def run(h, x, dh, dy, mask):
        (h_T, y), _, res = net.forward(params, state, (h, x), fnbp.Context(mask=mask))
        factors, (dh_0, dx) = net.backward(params, res, (dh, dy))
        return h_T, y, dh_0, dx, total(factors)

    h_T, y, dh_0, dx, grads = run(h, x, dh, dy, jnp.asarray(MASK))
    summed = None
    for i, n in enumerate(LENGTHS):
        one = lambda tree, i=i: jax.tree.map(lambda a: a[i : i + 1], tree)  # noqa: E731
        alone = run(one(h), one(x)[:, :n], one(dh), one(dy)[:, :n], None)
        assert relative((one(h_T), y[i : i + 1, :n], one(dh_0), dx[i : i + 1, :n]), alone[:4]) <= 1e-13
        assert not y[i, n:].any() and not dx[i, n:].any()
        summed = alone[4] if summed is None else jax.tree.map(jnp.add, summed, alone[4])
    assert relative(grads, summed) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_a_ragged_batch_trains_as_each_sequence_alone(x64, reverse):
    read = fnbp.serial(fnbp.scan(fnbp.lstm_cell(7), reverse), fnbp.last(), fnbp.dense(2))
    net, loss = fnbp.ragged(read), fnbp.half_squared_error()
    x, y = (jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 5, 3), (5, 2)))
    lengths = jnp.array(LENGTHS)
    params, state = drawn(net, (x, lengths))
    contract = (fnbp.total, fnbp.sq_norms)
    grads, squares = jax.tree.transpose(
        jax.tree.structure(params), None, fnbp.backprop(net, loss, contract)(params, state, (x, lengths), y).grads
    )
    dx = fnbp.backprop(net, loss)(params, state, (x, lengths), y).dx
    assert dx[1] is None
    alone = [
        fnbp.backprop(read, loss)(params[0], state[0], x[i : i + 1, :n], y[i : i + 1]) for i, n in enumerate(LENGTHS)
    ]
    mean = jax.tree.map(lambda *each: sum(each) / 5, *(one.grads for one in alone))
    norms = jax.tree.map(lambda *each: jnp.stack([jnp.sum(g**2) for g in each]), *(one.grads for one in alone))
    assert relative(grads, (mean,)) <= 1e-12
    assert relative(squares, (norms,)) <= 1e-12
    for i, n in enumerate(LENGTHS):
        assert relative(dx[0][i, :n], alone[i].dx[0] / 5) <= 1e-12
        assert not dx[0][i, n:].any()


def test_last_is_the_last_that_counts_whatever_stands_behind():
    x = jnp.asarray(rng.standard_normal((4, 5, 3)), jnp.float32).at[1, 3].set(jnp.nan)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], bool)
    y, _, res = fnbp.last().forward({}, {}, x, fnbp.Context(mask=mask))
    np.testing.assert_array_equal(y, [x[0, 4], x[1, 2], np.zeros(3), x[3, 3]])
    dy = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    due = np.zeros((4, 5, 3), np.float32)
    due[0, 4], due[1, 2], due[3, 3] = dy[0], dy[1], dy[3]
    np.testing.assert_array_equal(fnbp.last().backward({}, res, dy)[1], due)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compare_takes_a_ragged_net_for_no_fault(dtype):
    x = jnp.asarray(rng.standard_normal((5, 7, 3)), dtype)
    lengths = jnp.array([3, 7, 1, 0, 5])
    net = fnbp.ragged(fnbp.serial(fnbp.scan(fnbp.rnn_cell(2)), fnbp.last()))
    report = fnbp.compare(net, (x, lengths), transforms=())
    assert report.ok, report


@cells
def test_the_gradient_of_the_first_state_is_autodiffs(x64, cell):
    net, x = fnbp.scan(cell), jnp.asarray(rng.standard_normal((5, 3, 11)))
    h, dh, dy = first(cell, 5), first(cell, 5), jnp.asarray(rng.standard_normal((5, 3, 7)))
    params, state = drawn(net, x)
    _, _, res = net.forward(params, state, (h, x), fnbp.Context())
    factors, d = net.backward(params, res, (dh, dy))
    f = lambda params, hx: net.forward(params, state, hx, fnbp.Context())[0]  # noqa: E731
    assert relative((total(factors), d), jax.vjp(f, params, (h, x))[1]((dh, dy))) <= 1e-13


@cells
def test_none_stands_for_zeros_and_has_no_cotangent(x64, cell):
    net, x = fnbp.scan(cell), jnp.asarray(rng.standard_normal((5, 3, 11)))
    params, state = drawn(net, x)
    y = net.forward(params, state, x, fnbp.Context())[0]
    (h_T, same), _, res = net.forward(params, state, (None, x), fnbp.Context())
    last = h_T[0] if isinstance(h_T, tuple) else h_T
    assert (same == y).all() and (last == y[:, -1]).all()
    assert net.backward(params, res, (h_T, y))[1][0] is None


@cells
def test_a_cell_alone_is_one_turn(x64, cell):
    x = jnp.asarray(rng.standard_normal((5, 1, 11)))
    net = fnbp.scan(cell)
    params, state = drawn(net, x)
    y = net.forward(params, state, x, fnbp.Context())[0]
    (_, alone), _, _ = cell.forward(params, state, (None, x[:, 0]), fnbp.Context())
    assert relative(y[:, 0], alone) <= 1e-15


def test_factors_of_any_kind_go_through_time(x64):
    def backward(params, res, dy):
        factors, dx = fnbp.rnn_cell(7).backward(params, res, dy)
        return {name: fnbp.factors.PerExample(factor.per_example()) for name, factor in factors.items()}, dx

    cell = fnbp.replace_functions(fnbp.rnn_cell(7), backward=backward)  # no axis for time: summed turn by turn
    net, x = fnbp.scan(cell), jnp.asarray(rng.standard_normal((5, 4, 3)))
    params, state = drawn(net, x)
    loss, t = fnbp.half_squared_error(), jnp.asarray(rng.standard_normal((5, 4, 7)))
    f = lambda params: loss.forward(net.forward(params, state, x, fnbp.Context())[0], t)[0]  # noqa: E731
    rows = jax.jacrev(f)(params)["W"]
    got = fnbp.backprop(net, loss, (fnbp.per_example, fnbp.sq_norms, fnbp.total))(params, state, x, t).grads["W"]
    assert relative(got, (rows, (rows**2).sum((1, 2)), rows.mean(0))) <= 1e-12


def test_repeat_is_serial_with_the_same_weights(x64):
    layer = fnbp.skip(fnbp.serial(fnbp.layer_norm(), fnbp.dense(11), fnbp.dropout(0.3)))
    deep, x = fnbp.repeat(layer, 3), jnp.asarray(rng.standard_normal((5, 11)))
    params, state = drawn(deep, x)
    ctx = fnbp.Context(jax.random.key(1), train=True)
    chain = fnbp.serial(layer, layer, layer)
    each = tuple(jax.tree.map(lambda a, i=i: a[i], params[0]) for i in range(3))
    states = tuple(jax.tree.map(lambda a, i=i: a[i], state[0]) for i in range(3))
    dy = jnp.asarray(rng.standard_normal((5, 11)))
    y, _, res = deep.forward(params, state, x, ctx)
    due, _, res_due = chain.forward(each, states, x, ctx)
    assert relative(y, due) <= 1e-14
    factors, dx = deep.backward(params, res, dy)
    factors_due, dx_due = chain.backward(each, res_due, dy)
    assert relative(dx, dx_due) <= 1e-13
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(total, factors_due))
    assert relative(total(factors)[0], stacked) <= 1e-13


def test_trace_sees_every_turn(x64):
    net, x = fnbp.repeat(fnbp.serial(fnbp.dense(11), fnbp.tanh()), 3), jnp.asarray(rng.standard_normal((5, 11)))
    params, state = drawn(net, x)
    seen = fnbp.trace(net, fnbp.half_squared_error())(params, state, x, x)
    outputs = seen.outputs["repeat(3)[0].serial[1].tanh"]
    assert outputs.shape == (3, 5, 11) and relative(outputs[-1], seen.prediction) == 0


def test_depth_of_any_contraction_of_ones_own_comes_first():
    net, x = fnbp.repeat(fnbp.dense(11), 3), jnp.asarray(rng.standard_normal((5, 11)), jnp.float32)
    params, state = drawn(net, x)
    largest = lambda factor: jnp.max(abs(factor.d), range(1, factor.d.ndim))  # noqa: E731
    got = fnbp.backprop(net, fnbp.half_squared_error(), largest)(params, state, x, x).grads[0]["W"]
    assert got.shape == (3, 5)


SEQUENCE = jnp.zeros((5, 3, 11))
REFUSED = [
    (lambda: fnbp.repeat(fnbp.dense(3), 0), ValueError, r"repeat\(0\): n must be at least 1, got 0"),
    (lambda: fnbp.repeat(fnbp.relu, 2), TypeError, r"repeat\(2\): the layer must be a Layer, .* call it: relu\(\)"),
    (
        lambda: fnbp.repeat(fnbp.dense(3), 2).init(jax.random.key(0), SEQUENCE),
        ValueError,
        r"repeat\(2\): dense\(3\) maps float32\[5, 3, 11\] to float32\[5, 3, 3\]; both must be the same",
    ),
    (
        lambda: fnbp.repeat(fnbp.dense(11), 2).forward(
            *fnbp.repeat(fnbp.dense(11), 3).init(jax.random.key(0), SEQUENCE), SEQUENCE, fnbp.Context()
        ),
        ValueError,
        r"repeat\(2\): params must have a first axis of 2, got \[\(3,\)\]; do they belong to a different net\?",
    ),
    (lambda: fnbp.scan(fnbp.lstm_cell), TypeError, r"scan: the cell must be a Layer, .* call it: lstm_cell\(\.\.\.\)"),
    (
        lambda: fnbp.scan(CELLS[0]).init(jax.random.key(0), SEQUENCE[:, :0]),
        ValueError,
        r"scan\(rnn_cell\(7\)\): x must be \(m, T, ...\) with T at least 1, got shape \(5, 0, 11\)",
    ),
    (
        lambda: run(fnbp.scan(CELLS[0]), SEQUENCE, fnbp.Context(mask=jnp.ones((5, 4), bool))),
        ValueError,
        r"scan\(rnn_cell\(7\)\): the mask must have shape \(5, 3\), got \(5, 4\)",
    ),
    (
        lambda: run(fnbp.scan(CELLS[0]), SEQUENCE, fnbp.Context(mask=jnp.ones((5, 3)))),
        TypeError,
        r"scan\(rnn_cell\(7\)\): the mask must be of bool, True where .* got float32 of shape \(5, 3\); .*mask == 0",
    ),
    (lambda: CELLS[0].init(jax.random.key(0), SEQUENCE), TypeError, r"a cell takes a pair \(h, x\).*fnbp.scan\(rnn"),
    (
        lambda: run(CELLS[1], (jnp.zeros((5, 7)), SEQUENCE[:, 0])),
        ValueError,
        r"lstm_cell\(7\): h must be a tuple \(h, s\), both arrays of shape \(5, 7\), or None",
    ),
    (
        lambda: run(CELLS[2], (jnp.zeros((5, 3)), SEQUENCE[:, 0])),
        ValueError,
        r"h must be one array of shape \(5, 7\), or None for zeros; got",
    ),
    (lambda: run(fnbp.scan(CELLS[2]), (1, 2, SEQUENCE)), ValueError, r"expected x, or \(h_0, x\); got a tuple of 3"),
    (lambda: fnbp.gru_cell(0), ValueError, r"gru_cell\(0\): n must be at least 1, got 0"),
]


def test_what_stands_at_a_position_that_does_not_count_is_not_read():
    net, mask = fnbp.scan(CELLS[1]), jnp.array([[True, True, False]] * 5)
    ctx, x = fnbp.Context(mask=mask), jax.random.normal(jax.random.key(1), SEQUENCE.shape)
    params, state = net.init(jax.random.key(0), x)
    run = jax.jit(fnbp.backprop(net, fnbp.half_squared_error()))
    ours, due = (run(params, state, x, jnp.zeros((5, 3, 7)), ctx) for x in (x.at[:, 2].set(jnp.nan), x))
    chex.assert_trees_all_equal(ours, due)


def run_ragged(x, lengths):
    return run(fnbp.ragged(fnbp.last()), (x, lengths))


REFUSED += [
    (
        lambda: run_ragged(SEQUENCE, jnp.array([3, 1, 4, 2, 0])),
        ValueError,
        r"ragged: length 4 of example 2 is outside 0..3, the positions of x",
    ),
    (lambda: run_ragged(SEQUENCE, jnp.array([3, 1, -1, 2, 0])), ValueError, r"length -1 of example 2 is outside 0..3"),
    (lambda: run_ragged(SEQUENCE, jnp.ones(5)), TypeError, r"ragged: lengths must be integers, got float32 of shape"),
    (lambda: run_ragged(SEQUENCE, jnp.ones(4, int)), ValueError, r"needs lengths of shape \(5,\), got \(4,\)"),
    (
        lambda: run(fnbp.ragged(fnbp.last()), SEQUENCE),
        ValueError,
        r"ragged: expected a pair \(x, lengths\), got float32 of",
    ),
    (lambda: fnbp.ragged(fnbp.last), TypeError, r"ragged"),
    (
        lambda: run(fnbp.last(), SEQUENCE, fnbp.Context(mask=jnp.ones((5, 4), bool))),
        ValueError,
        r"last: the mask must have shape \(5, 3\), got \(5, 4\)",
    ),
    (lambda: run(fnbp.last(), SEQUENCE, fnbp.Context(mask=[[True]])), TypeError, r"last: the mask .* got a list of 1"),
    (lambda: run(fnbp.last(), SEQUENCE[:, :0]), ValueError, r"last: x must be \(m, T, ...\) with T at least 1"),
]


def run(net, x, ctx=fnbp.Context()):
    params, state = net.init(jax.random.key(0), x)
    return net.forward(params, state, x, ctx)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_it_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- in chunks ---

WHOLE = (fnbp.lstm_cell(7), fnbp.gru_cell(7))
whole = pytest.mark.parametrize("cell", WHOLE, ids=[cell.name for cell in WHOLE])


def turn_by_turn(cell):
    return cell._replace(traits=replace(cell.traits, whole=None))


def passes(net, *args):
    """y, h_T, factors as totals and as rows, dx, dh_0."""
    params, state, h, x, dh, dy = args

    def run(params, h, x, dh, dy):
        (h_T, y), _, res = net.forward(params, state, (h, x), fnbp.Context())
        factors, (dh_0, dx) = net.backward(params, res, (dh, dy))
        is_factor = lambda node: isinstance(node, fnbp.Factor)  # noqa: E731
        rows = jax.tree.map(lambda f: f.per_example(), factors, is_leaf=is_factor)
        halved = jax.tree.map(lambda f: f.scaled(0.5).total(), factors, is_leaf=is_factor)
        return h_T, y, total(factors), rows, halved, dh_0, dx

    return jax.jit(run)(params, h, x, dh, dy)


@whole
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [8, 9, 16, 29])
def test_chunks_are_the_turns(x64, cell, reverse, T):
    x, dy = (jnp.asarray(rng.standard_normal((3, T, n))) for n in (5, 7))
    args = *drawn(fnbp.scan(cell), x), first(cell, 3), x, first(cell, 3), dy
    found, due = (passes(fnbp.scan(one, reverse), *args) for one in (cell, turn_by_turn(cell)))
    assert relative(found, due) <= 1e-13


@whole
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nearly_closed_gates_keep_their_digits_in_chunks(x64, cell, dtype):
    x, dy = (jnp.asarray(rng.standard_normal((3, 16, n)), dtype) for n in (5, 7))
    params, state = drawn(fnbp.scan(cell), x)
    closed = jnp.where(jnp.arange(params["b"].size) < 14, -18.0 if dtype == "float32" else -9.0, 0)
    params = jax.tree.map(lambda p: p.astype(dtype), params | {"b": params["b"] + closed})
    args = params, state, jax.tree.map(lambda h: h.astype(dtype), first(cell, 3)), x
    args = *args, jax.tree.map(jnp.ones_like, args[2]), dy
    exact = jax.tree.map(lambda a: a.astype(float), args)
    due, bound = passes(fnbp.scan(cell), *exact), 64 * float(jnp.finfo(dtype).eps)
    for found, right in zip(*map(jax.tree.leaves, (passes(fnbp.scan(cell), *args), due)), strict=True):
        assert np.abs(np.asarray(found, float) - right).max() <= bound * np.abs(right).max()


@pytest.mark.parametrize("T", [7, 16])
@whole
def test_what_wider_parameters_make_of_x_is_as_wide_in_chunks(cell, T):
    x, h = jnp.ones((2, T, 5), jnp.bfloat16), first(cell, 2)
    params, state = fnbp.scan(cell).init(jax.random.key(0), x.astype(jnp.float32))
    h = jax.tree.map(lambda a: a.astype(jnp.float32), h)
    (h_T, y), _, res = fnbp.scan(cell).forward(params, state, (h, x), fnbp.Context())
    _, (_, dx) = fnbp.scan(cell).backward(params, res, (h_T, y))
    assert y.dtype == dx.dtype == jnp.float32


@whole
def test_a_cell_with_another_backward_is_run_turn_by_turn(x64, cell):
    x, dy = (jnp.asarray(rng.standard_normal((3, 16, n))) for n in (5, 7))
    args = *drawn(fnbp.scan(cell), x), first(cell, 3), x, first(cell, 3), dy
    still = fnbp.replace_functions(cell, backward=lambda *args: jax.tree.map(jnp.zeros_like, cell.backward(*args)))
    assert not passes(fnbp.scan(still), *args)[-1].any()
    assert passes(fnbp.scan(cell), *args)[-1].any()


@whole
def test_chunks_refuse_what_a_turn_refuses(cell):
    net, x = fnbp.scan(cell), jnp.zeros((3, 16, 5))
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="h must be"):
        net.forward(params, state, (jnp.zeros((3, 6)), x), fnbp.Context())
    with pytest.raises(ValueError, match="params"):
        net.forward(params | {"W": jnp.zeros((7, 5))}, state, x, fnbp.Context())


@whole
def test_what_is_not_used_of_chunks_takes_no_memory(cell):
    """The totals alone need no error of the whole sequence, and less than half of what jax.grad holds."""
    net, x, dy = fnbp.scan(cell), jnp.zeros((4, 128, 5)), jnp.zeros((4, 128, 7))
    params, state = net.init(jax.random.key(0), x)

    def manual(finish, params, x, dy):
        y, _, res = net.forward(params, state, x, fnbp.Context())
        factors, dx = net.backward(params, res, dy)
        return y, jax.tree.map(finish, factors, is_leaf=lambda node: isinstance(node, fnbp.Factor)), dx

    def automatic(params, x, dy):
        y, pull = jax.vjp(lambda params, x: fnbp.apply(fnbp.scan(turn_by_turn(cell)), params, state, x), params, x)
        return y, pull(dy)

    def held(f):
        return jax.jit(f).lower(params, x, dy).compile().memory_analysis().temp_size_in_bytes

    totals, rows = (held(partial(manual, f)) for f in (lambda f: f.total(), lambda f: (f.total(), f.per_example())))
    assert totals <= 0.5 * held(automatic) and totals < rows
