"""layer_table: the numbers of a trace against NumPy, under jit and in fit, in narrow dtypes, printed, and refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from fnbp.statistics import layer_table
from tests.test_statistics import LOSS, NETS, subject

measured = jax.jit(layer_table)
each = pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lenet", "lstm")), *list(NETS)[3:]]
)


def two_traces(name):
    """Traces of a net, and of the same with other parameters."""
    net, params, state, x, y = subject(name)
    run = jax.jit(fnbp.trace(net, LOSS))
    return run(params, state, x, y), run(jax.tree.map(lambda a: a + 0.1 * jnp.cos(a), params), state, x, y)


def close(found, due):
    np.testing.assert_allclose(np.asarray(found), due, rtol=1e-10, atol=1e-12)


def turns(a, path):
    """An array of NumPy with the turns of a repeat as first axis, and whether there are such."""
    inside = "repeat" in path
    return (np.asarray(a) if inside else np.asarray(a)[None]), inside


def by_hand(y, delta, path, bounds):
    """The numbers of one layer, turn by turn and example by example."""
    (y, inside), (delta, _) = turns(y, path), turns(delta, path)
    rows = []
    for one, d in zip(y, delta, strict=True):
        norms = [[np.linalg.norm(example.ravel()) for example in a] for a in (one, d)]
        units = one.reshape(-1, one.shape[-1])
        dead = np.mean([all(number == 0 for number in column) for column in units.T])
        near = np.mean([min(abs(v - b) for b in bounds) <= 0.01 for v in one.ravel()]) if bounds else np.nan
        rows.append([*(np.sqrt(np.mean(np.square(n))) for n in norms), np.mean(one == 0), dead, near])
    rows = np.array(rows).T
    return rows if inside else rows[:, 0]


def degrees(a, b):
    a, b = (np.concatenate([np.ravel(part) for part in parts]) for parts in (a, b))
    return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


@each
def test_each_number_is_that_of_numpy(x64, name):
    one, two = two_traces(name)
    found = jax.jit(functools.partial(layer_table, near=0.01))(one, two)
    assert list(found.layers) == list(one.outputs)
    grads = [dict(pairs) for pairs in (of_layers(name, one.grads), of_layers(name, two.grads))]
    for path, seen in found.layers.items():
        bounds = {"sigmoid": (0, 1), "tanh": (-1, 1)}.get(path.rsplit(".", 1)[-1])
        due = by_hand(one.outputs[path], one.deltas[path], path, bounds)
        for value, number in zip(seen[:4], due[:4], strict=True):
            close(value, number)
        assert (seen.saturated is None) == (bounds is None)
        if bounds:
            close(seen.saturated, due[4])
        (a, inside), (b, _) = (turns(trace.deltas[path], path) for trace in (one, two))
        angles = [degrees([p], [q]) for p, q in zip(a, b, strict=True)]
        close(seen.delta_angle, angles if inside else angles[0])
        own, others = (jax.tree.leaves(tree[path]) for tree in grads)
        assert (seen.gradient_angle is None) == (not own)
        if own:
            own, others = (leaves if inside else [a[None] for a in leaves] for leaves in (own, others))
            angles = [degrees([p[i] for p in own], [q[i] for q in others]) for i in range(len(a))]
            close(seen.gradient_angle, angles if inside else angles[0])


def of_layers(name, tree):
    return ((path, own) for path, _, own in fnbp.layer.leaves(NETS[name][0](), tree))


def test_steps_of_time(x64):
    one, _ = two_traces("lstm")
    path = "lstm_classifier[0].stacked[0].scan(lstm_cell(6))"
    steps = jax.jit(functools.partial(layer_table, by_step=True))
    found = steps(one)
    for value, tree in ((found[path].output, one.outputs), (found[path].delta, one.deltas)):
        close(value, np.sqrt(np.mean(np.sum(np.asarray(tree[path]) ** 2, 2), 0)))
    assert found["lstm_classifier[1].last"].output.shape == () and "0 to " in str(found)
    one, _ = two_traces("gpt")
    path = next(path for path in one.outputs if path.endswith("gelu"))
    close(
        steps(one)[path].delta,
        np.sqrt(np.mean(np.sum(np.asarray(one.deltas[path]) ** 2, 3), 1)),
    )


def test_dead_units_and_saturated_ones_are_counted():
    net = fnbp.serial(fnbp.dense(5), fnbp.relu(), fnbp.dense(3), fnbp.tanh(), fnbp.softmax())
    x, loss = jax.random.normal(jax.random.key(0), (7, 4)), fnbp.half_squared_error()
    params, state = net.init(jax.random.key(1), x)
    first = {**params[0], "b": params[0]["b"].at[jnp.array([1, 3])].set(-100)}
    third = {**params[2], "b": jnp.array([100.0, -100.0, 0.0])}
    params = (first, {}, {**third, "W": params[2]["W"] * 1e-3}, {}, {})
    trace = jax.jit(fnbp.trace(net, loss))(params, state, x, jnp.zeros((7, 3)))
    found = measured(trace)
    assert found["serial[1].relu"].dead == pytest.approx(0.4) and found["serial[0].dense(5)"].dead == 0
    assert found["serial[3].tanh"].saturated == pytest.approx(2 / 3)
    assert found["serial[4].softmax"].saturated == 0
    wide = layer_table(trace, near=0.3)["serial[4].softmax"]
    assert wide.saturated == pytest.approx(2 / 3)  # of 0.66, 0.09 and 0.24


def test_small_deltas_keep_their_norm_and_their_angle():
    one, _ = two_traces("mlp")
    small = one._replace(deltas=jax.tree.map(lambda a: a * 1e-30, one.deltas))
    before = measured(one, one)
    for path, seen in measured(small, one).layers.items():
        np.testing.assert_allclose(seen.delta, before[path].delta * 1e-30, rtol=1e-5)
        assert 0 <= seen.delta_angle <= 1e-4
    for path, seen in measured(one._replace(deltas=jax.tree.map(jnp.zeros_like, one.deltas)), one).layers.items():
        assert seen.delta == 0 and jnp.isnan(seen.delta_angle), path


def test_feedback_alignment_turns_the_deltas_below_the_layer():
    net, *rest = subject("mlp")

    def turned(path, layer):
        if not path.endswith("[4].dense(5)"):
            return layer
        return fnbp.replace_functions(layer, backward=lambda p, res, dz: (layer.backward(p, res, dz)[0], dz @ -p["W"]))

    one, two = (jax.jit(fnbp.trace(each, LOSS))(*rest) for each in (net, fnbp.map_layers(turned, net)))
    found = measured(two, one)
    above = found["mlp[4].dense(5)"]  # of two programs, which XLA may round each in its own way
    assert 0 <= above.gradient_angle <= 1e-5 and 0 <= above.delta_angle <= 1e-5
    for path in ("mlp[0].dense(7)", "mlp[1].relu", "mlp[3].relu"):
        assert found[path].delta_angle == pytest.approx(180)
    assert found["mlp[0].dense(7)"].gradient_angle == pytest.approx(180) and "180.00" in str(found)


def test_bfloat16_is_measured_in_float32():
    net, params, state, x, y = subject("mlp")
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    trace = jax.jit(fnbp.trace(net, LOSS))(params, state, x, y)
    found = measured(trace, trace)
    for path, seen in found.layers.items():
        assert {a.dtype for a in jax.tree.leaves(seen)} == {jnp.dtype("float32")}, path
        wide = np.asarray(trace.outputs[path].astype(jnp.float32))
        np.testing.assert_allclose(seen.output, np.sqrt(np.mean(np.sum(wide**2, 1))), rtol=1e-6)


def test_a_training_records_it_step_by_step():
    net, params, state, x, y = subject("mlp", 20)

    def tables(net, loss):
        run = fnbp.trace(net, loss)

        def gradient(params, state, x, y, ctx):
            seen = run(params, state, x, y, ctx)
            return (seen.value, seen.state, layer_table(seen)), seen.grads

        return gradient

    done = fnbp.fit(
        net, LOSS, params, state, x, y, optimizer=optax.sgd(0.3), key=jax.random.key(3), batch_size=5, steps=6,
        gradient=tables, record={"dead": lambda step: step.more["mlp[1].relu"].dead}, progress=False,
    )  # fmt: skip
    assert done.history.recorded["dead"].shape == (6,)
    run = fnbp.trace(net, LOSS)
    stacked = jax.lax.map(lambda i: layer_table(run(params, state, jnp.asarray(x) + i, y)), jnp.arange(3.0))
    assert stacked["mlp[1].relu"].dead.shape == (3,)
    with pytest.raises(ValueError, match=r"mlp\[0\].dense\(7\) has numbers of shape \(3,\), those of several steps"):
        str(stacked)
    assert "mlp[1].relu" in str(jax.tree.map(lambda a: a[1], stacked))


def test_it_prints_turn_by_turn():
    one, two = two_traces("tied, repeated")
    lines = str(measured(one, two)).splitlines()
    at = next(i for i, line in enumerate(lines) if "[1].tanh" in line)
    assert [re.split("│", line)[2].strip() for line in lines[at : at + 3]] == ["0", "1", "2"]
    assert "gradient angle" in lines[2] and "dead" not in lines[2]
    assert not any("repeat" in line and "%" in line for line in lines)


def test_loops_in_loops_frozen_layers_and_several_outputs(x64):
    inner = fnbp.serial(fnbp.dense(4), fnbp.sigmoid())
    net = fnbp.serial(fnbp.repeat(fnbp.repeat(inner, 2), 3), fnbp.remat(fnbp.dense(4)), fnbp.skip(fnbp.tanh()))
    x = jax.random.normal(jax.random.key(0), (5, 4), float)
    params, state = net.init(jax.random.key(1), x)
    for one, held in ((net, (params, state)), (fnbp.freeze(net), ({}, {"params": params, "state": state}))):
        trace = jax.jit(fnbp.trace(one, LOSS))(*held, x, jnp.zeros(5, int))
        found = measured(trace, trace)
        for path, seen in found.layers.items():
            if "repeat" in path:
                assert seen.zero.shape == seen.delta_angle.shape == (3, 2)
                due = np.sqrt(np.mean(np.sum(np.asarray(trace.outputs[path]) ** 2, -1), -1))
                np.testing.assert_allclose(seen.output, due, rtol=1e-12)
        assert str(found)


def test_what_is_refused():
    one, _ = two_traces("mlp")
    other, _ = two_traces("lstm")
    fewer = one._replace(outputs=jax.tree.map(lambda a: a[:3], one.outputs))
    many = jax.tree.map(lambda a: jnp.stack([a, a]), one)
    for given, options, error, words in (
        ((3,), {}, TypeError, "layer_table: trace must be a Trace, got int 3"),
        ((one.deltas,), {}, TypeError, "layer_table: trace must be a Trace, got a OrderedDict"),
        ((one, {}), {}, TypeError, "layer_table: other must be a Trace"),
        ((one, other), {}, ValueError, r"of different nets: .*'mlp\[0\].dense\(7\)'.* and .*lstm_classifier"),
        ((one, fewer), {}, ValueError, r"mlp\[0\].dense\(7\) has outputs of shape \[\(5, 7\)\] in one trace"),
        ((one,), {"near": 0.5}, ValueError, "near must be above 0 and below 0.5, got 0.5"),
        ((one,), {"by_step": 1}, TypeError, "by_step must be a bool"),
        ((many,), {}, ValueError, "as its loss, expected one number"),
    ):
        with pytest.raises(error, match=words):
            layer_table(*given, **options)
