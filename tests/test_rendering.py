"""tabulate: a net as a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp

X = jax.ShapeDtypeStruct((7, 5), jnp.float32)


def held(table):
    return {row.path: dict(row.parameters) for row in table.rows if row.leaf}


def test_a_chain_is_a_row_a_layer():
    net = fnbp.serial(fnbp.dense(11), fnbp.tanh(), fnbp.dense(3))
    table = fnbp.tabulate(net, X)
    leaves = [row for row in table.rows if row.leaf]
    assert [row.output for row in leaves] == [(7, 11), (7, 11), (7, 3)]
    assert held(table)["serial[0].dense(11)"] == {"W": (11, 5), "b": (11,)}
    assert [row.count for row in leaves] == [66, 0, 36] and table.total == 102
    lines = str(table).splitlines()
    assert lines[0] == "serial: 102 parameters"
    line = next(line for line in lines if "serial[0].dense(11)" in line)
    assert "7x11" in line and "W 11x5  b 11" in line and " 66 " in line
    assert "note" not in str(table)


def test_parameters_that_are_given_and_those_that_a_net_begins_with():
    net, x = fnbp.serial(fnbp.dense(3), fnbp.batch_norm()), np.ones((7, 5))
    params, state = net.init(jax.random.key(0), x)
    assert fnbp.tabulate(net, x, params, state) == fnbp.tabulate(net, X)
    assert fnbp.tabulate(net, x, ctx=fnbp.Context(jax.random.key(0), train=True)).total == 24


def test_nets_in_nets_are_indented():
    net = fnbp.serial(fnbp.dense(5), fnbp.skip(fnbp.serial(fnbp.dense(5), fnbp.tanh(), name="inner")))
    table = fnbp.tabulate(net, X)
    assert [row.depth for row in table.rows] == [0, 1, 1, 2, 3, 3]
    assert [row.leaf for row in table.rows] == [False, True, False, False, True, True]
    lines = [line.split("│")[1].rstrip() for line in str(table).splitlines() if "│" in line]
    assert lines == [
        " serial",
        "   [0].dense(5)",
        "   [1].skip",
        "     [0].inner",
        "       [0].dense(5)",
        "       [1].tanh",
    ]


def test_turns_are_the_first_axis_of_what_repeat_holds():
    table = fnbp.tabulate(fnbp.repeat(fnbp.serial(fnbp.dense(5), fnbp.tanh()), 3), X)
    row = next(row for row in table.rows if row.name == "dense(5)")
    assert (row.output, row.parameters["W"], row.count, table.total) == ((7, 5), (3, 5, 5), 90, 90)


def test_a_tied_parameter_is_counted_once():
    net = fnbp.tie(fnbp.serial(fnbp.embedding(13, 3), fnbp.dense(13, b=None)), (0, "E"), (1, "W"))
    table = fnbp.tabulate(net, jax.ShapeDtypeStruct((7, 5), jnp.int32))
    assert list(held(table).values()) == [{"E": (13, 3)}, {}] and table.total == 39
    assert [row.output for row in table.rows if row.leaf] == [(7, 5, 3), (7, 5, 13)]


def test_pairs_loops_and_frozen_weights():
    x, lengths = jax.ShapeDtypeStruct((7, 5, 3), jnp.float32), jax.ShapeDtypeStruct((7,), jnp.int32)
    net = fnbp.ragged(fnbp.serial(fnbp.scan(fnbp.lstm_cell(11)), fnbp.last(), fnbp.freeze(fnbp.dense(2))))
    outputs = [row.output for row in fnbp.tabulate(net, (x, lengths)).rows if row.leaf]
    assert outputs == [(7, 5, 11), (7, 11), (7, 2)]
    assert held(fnbp.tabulate(fnbp.freeze(fnbp.dense(2)), x)) == {"freeze(dense(2))": {}}
    deep = fnbp.scan(fnbp.repeat(fnbp.rnn_cell(3), 2))
    table = fnbp.tabulate(deep, (jax.ShapeDtypeStruct((7, 3), jnp.float32), x))
    assert table.rows[0].parameters == {"0.U": (2, 3, 3), "0.W": (2, 3, 3), "0.b": (2, 3), "0.c": (2, 3)}
    assert table.rows[0].output == ((7, 3), (7, 5, 3)) and "(7x3, 7x5x3)" in str(table)


def test_notes_stand_in_a_column_of_their_own():
    net = fnbp.serial(fnbp.dense(3), fnbp.tanh())
    assert "z = W x + b" in str(fnbp.tabulate(net, X, notes={"serial[0].dense(3)": "z = W x + b"}))
    with pytest.raises(ValueError, match=r"unknown path .*did you mean 'serial\[1\].tanh'"):
        fnbp.tabulate(net, X, notes={"serial[0].tanh": "a"})
    with pytest.raises(TypeError, match="tabulate: notes must be a dict"):
        fnbp.tabulate(net, X, notes="a")


def test_bad_input_raises_before_any_compute():
    net = fnbp.serial(fnbp.dense(3), fnbp.tanh())
    with pytest.raises(TypeError, match="tabulate: net must be a Layer"):
        fnbp.tabulate(fnbp.tanh, X)
    for x in (None, (), "x", 3):
        with pytest.raises(TypeError, match="tabulate: x must be an array"):
            fnbp.tabulate(net, x)
    with pytest.raises(TypeError, match="tabulate: ctx must be a Context"):
        fnbp.tabulate(net, X, ctx=True)
    with pytest.raises(ValueError, match=r"serial\[0\].dense\(3\)"):
        fnbp.tabulate(net, X, params=({}, {}))
    with pytest.raises(ValueError, match="params must have 2 entries"):
        fnbp.tabulate(net, X, params=({},))


@pytest.mark.parametrize("name", ["d[/x]", "block[encoder]", "[bold]", "a\\[b]", ":smile:"])
def test_a_name_is_printed_as_it_is(name):
    net = fnbp.serial(fnbp.dense(3), fnbp.skip(fnbp.replace_functions(fnbp.tanh(), name=name)), name=name)
    assert str(fnbp.tabulate(net, X)).count(name) == 3
