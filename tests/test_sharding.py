"""Gradients, per-example quantities, trainings and collectives on many devices, against one device."""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fnbp
import fnbp.sharding as sharding
from tests.cases import relative

ROOT = Path(__file__).parents[1]
LOSS = fnbp.softmax_cross_entropy()
NETS = {
    "mlp": lambda: fnbp.models.mlp(64, 32, 16),
    "lenet": lambda: fnbp.models.lenet(8),
    "lstm": lambda: fnbp.models.lstm_classifier(8, 8),
    "gpt": lambda: fnbp.models.gpt(16, 8, 2, 4, 16),
}
SCHEMES = ("data", "fully", "tensor")
MODEL = {1: 1, 2: 2, 4: 2, 8: 4}  # tensor-parallel: so many of the devices share a matrix
QUICK = {("mlp", 4), ("gpt", 4), ("mlp", 1)}


@pytest.fixture(autouse=True)
def all_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)


def subject(name, examples):
    rng = np.random.default_rng(0)
    shape = {"mlp": (24,), "lenet": (28, 28, 1), "lstm": (5, 16), "gpt": (8,)}[name]
    if name == "gpt":
        x = jnp.asarray(rng.integers(0, 16, (examples, *shape)))
        y = jnp.roll(x, -1, 1)
    else:
        x, y = jnp.asarray(rng.standard_normal((examples, *shape))), jnp.asarray(rng.integers(0, 8, examples))
    net = NETS[name]()
    return net, *net.init(jax.random.key(0), x), x, y


def laid_out(scheme, devices, explicit, net, params, state, x, y):
    model = MODEL[devices] if scheme == "tensor" else 1
    mesh = sharding.mesh(devices // model, model, explicit)
    placed = sharding.place(net, params, mesh, fully=scheme == "fully")
    return placed, jax.device_put(state, NamedSharding(mesh, P())), *sharding.split(mesh, x, y)


def lies_as(tree, like):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    return all(a.sharding.is_equivalent_to(b.sharding, b.ndim) for a, b in pairs)


def agrees(name, devices, scheme, explicit, examples):
    """The gradient, where it lies, and the per-example norms: as on one device."""
    net, params, state, x, y = subject(name, examples)
    here = laid_out(scheme, devices, explicit, net, params, state, x, y)
    kept = sharding.sharded(net, here[0])
    for make in (fnbp.value_and_grad, fnbp.per_example_norms):
        found, due = jax.jit(make(kept, LOSS))(*here), jax.jit(make(net, LOSS))(params, state, x, y)
        assert relative(found, due) <= 1e-12, (name, devices, scheme, explicit)
        if make is fnbp.value_and_grad:
            assert lies_as(found[1], here[0])
        elif devices > 1 and scheme != "tensor":
            assert not found.sharding.is_fully_replicated


def quick_or_slow(*values):
    return pytest.param(*values, marks=[] if values[:2] in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name, devices", [quick_or_slow(name, n) for name in NETS for n in (1, 2, 4)])
def test_gradients_and_norms_are_those_of_one_device(x64, name, devices, scheme, explicit):
    agrees(name, devices, scheme, explicit, 8)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", NETS)
def test_one_example_a_device(x64, name, explicit):
    """Where jax#35181 fails, under jax.grad: here the batch axis is never dropped."""
    agrees(name, 4, "data", explicit, 4)


def run_apart(code, devices=8):
    """A script in a process of its own, with so many devices and all of XLA's passes; the JSON of its last line."""
    start = f"import jax\njax.config.update('jax_num_cpu_devices', {devices})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_gradients_and_norms_on_eight_devices(name):
    run_apart(f"""
jax.config.update("jax_enable_x64", True)
from tests import test_sharding as t
t.sharding.SMALL = 1
for scheme in t.SCHEMES:
    for explicit in (False, True):
        t.agrees({name!r}, 8, scheme, explicit, 8)
print(0)
""")


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
def test_a_trace_and_predictions(x64, name, scheme, explicit):
    net, *given = subject(name, 8)
    placed = laid_out(scheme, 4, explicit, net, *given)
    found, due = (jax.jit(fnbp.trace(net, LOSS))(*one) for one in (placed, given))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        assert relative(a, b) <= 1e-12
    due = fnbp.predict(net, *given[:3])
    for size in (3, 8):
        np.testing.assert_allclose(fnbp.predict(net, *placed[:3], batch_size=size), due, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
def test_outside_jit_it_is_the_same_or_told(x64, name, explicit):
    net, *given = subject(name, 8)
    placed = laid_out("tensor", 4, explicit, net, *given)
    calls = {
        "value_and_grad": lambda *args: fnbp.value_and_grad(net, LOSS)(*args),
        "per_example_norms": lambda *args: fnbp.per_example_norms(net, LOSS)(*args),
        "apply": lambda params, state, x, y: fnbp.apply(net, params, state, x),
        "trace": lambda *args: fnbp.trace(net, LOSS)(*args),
    }
    for f in calls.values():
        if explicit:
            with pytest.raises(TypeError, match=r"over the Explicit axis 'model'; compute with them under jax\.jit"):
                f(*placed)
        else:
            for a, b in zip(jax.tree.leaves(f(*placed)), jax.tree.leaves(f(*given)), strict=True):
                assert relative(a, b) <= 1e-12


def test_what_takes_no_parameters_split_over_explicit_axes_says_so():
    net, params, state, x, y = subject("gpt", 8)
    for scheme in ("fully", "tensor"):
        params_there, state_there, x_there, _ = laid_out(scheme, 4, True, net, params, state, x, y)
        with pytest.raises(ValueError, match=r"generate: params are split over the Explicit axes \['(data|model)'\]"):
            fnbp.models.generate(net, params_there, state_there, x_there[:, :4], 3, jax.random.key(0))
        with pytest.raises(ValueError, match=r"to_jax: params are split over the Explicit axes"):
            jax.jit(fnbp.to_jax(net))(params_there, x_there)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "prompt"])
def test_the_same_tokens_are_written(scheme, explicit):
    if explicit and scheme in ("fully", "tensor"):
        return  # refused
    net, *given = subject("gpt", 8)
    params, state, x, _ = laid_out("data" if scheme == "prompt" else scheme, 4, explicit, net, *given)
    if scheme == "prompt":
        params, state = given[:2]
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 5}):
        found, due = (
            fnbp.models.generate(net, p, s, tokens[:, :4], 3, jax.random.key(0), **options)
            for p, s, tokens in ((params, state, x), given[:3])
        )
        assert np.array_equal(found, due)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
def test_every_contraction(x64, name, scheme, explicit):
    net, params, state, x, y = subject(name, 8)
    contract = (fnbp.total, fnbp.keep, fnbp.sq_norms, fnbp.per_example, lambda factor: factor.sq_norms() ** 2)

    def run(net):
        def of(params, state, x, y):
            grads = fnbp.backprop(net, LOSS, contract=contract)(params, state, x, y).grads
            is_tuple = lambda node: isinstance(node, tuple) and len(node) == 5 and isinstance(node[1], fnbp.Factor)  # noqa: E731
            opened = lambda t: (t[0], t[1].scaled(0.5).total(), *t[2:])  # noqa: E731
            return jax.tree.map(opened, grads, is_leaf=is_tuple)

        return jax.jit(of)

    here = laid_out(scheme, 4, explicit, net, params, state, x, y)
    found, due = run(sharding.sharded(net, here[0]))(*here), run(net)(params, state, x, y)
    assert relative(found, due) <= 1e-12


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_explicit_axes_backprop_sees_by_itself_where_parameters_lie(x64, scheme):
    net, params, state, x, y = subject("gpt", 8)
    here = laid_out(scheme, 4, True, net, params, state, x, y)
    (_, _), grads = jax.jit(fnbp.value_and_grad(net, LOSS))(*here)
    assert lies_as(grads, here[0])
    assert relative(grads, jax.jit(fnbp.value_and_grad(net, LOSS))(params, state, x, y)[1]) <= 1e-12


def test_with_auto_axes_and_the_plain_net_the_numbers_are_the_same(x64):
    net, params, state, x, y = subject("mlp", 8)
    here = laid_out("fully", 4, False, net, params, state, x, y)
    run = jax.jit(fnbp.value_and_grad(net, LOSS))
    assert relative(run(*here), run(params, state, x, y)) <= 1e-12


# --- collectives ---


def collectives(name, devices, scheme, explicit, model=None):
    """How many of each kind the compiled gradient has; one within a loop counts once."""
    net, params, state, x, y = subject(name, 8)
    if model is not None:
        MODEL[devices] = model
    here = laid_out(scheme, devices, explicit, net, params, state, x, y)
    run = jax.jit(fnbp.value_and_grad(sharding.sharded(net, here[0]), LOSS))
    text = run.lower(*here).compile().as_text()
    kinds = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return dict(collections.Counter(re.findall(kinds, text)))


COUNT = """
from tests import test_sharding as t
t.sharding.SMALL = 1
import json
print(json.dumps([[t.collectives(name, {devices}, {scheme!r}, explicit, {model}) for name in {names}]
                  for explicit in (False, True)]))
"""


def counted(names, devices, scheme, model=None):
    auto, explicit = run_apart(COUNT.format(names=names, devices=devices, scheme=scheme, model=model))
    assert auto == explicit, "the same collectives on both kinds of axes"
    return auto


@pytest.mark.slow
def test_data_parallel_all_gradients_are_added_in_one_all_reduce():
    """One for all leaves and the loss; gpt has one more, in its loop over depth, for a whole block.

    As every count here, that of the compiler of jax 0.10.2, with which the slow tests run; that of jax 0.12 gathers
    once more in the lstm, over one kind of axes.
    """
    assert counted(["mlp", "lenet", "lstm", "gpt"], 8, "data") == [{"all-reduce": n} for n in (1, 1, 1, 2)]


@pytest.mark.slow
def test_fully_sharded_each_parameter_is_gathered_once_and_gradients_are_added_in_one_all_reduce():
    """mlp gathers 6 leaves once: the compiler keeps them for the backward. In gpt the loop over depth gathers 15 leaves
    of a block forward and the 8 that its backward reads again (6 matrices, 2 gains); outside of it are E, P and the
    last norm, 4. The CPU compiler makes no reduce-scatter of an all-reduce and a slice; those for GPU and TPU do."""
    assert counted(["mlp", "gpt"], 8, "fully") == [
        {"all-gather": 6, "all-reduce": 1},
        {"all-gather": 27, "all-reduce": 2},
    ]


@pytest.mark.slow
def test_tensor_parallel_each_pair_of_matrices_takes_one_all_reduce_forward_and_one_backward():
    """mlp: forward 1 for its pair, 3 in the loss over split scores (largest, sum, label), backward 1 for the scores; dx
    is not used. gpt: forward 1 for the embedding, 2 in a block (attention, mlp); 3 in the loss; backward 1 for the
    scores, 2 in a block."""
    assert counted(["mlp", "gpt"], 2, "tensor", 2) == [{"all-reduce": 1 + 3 + 1}, {"all-reduce": 1 + 2 + 3 + 1 + 2}]


@pytest.mark.slow
def test_tensor_and_data_parallel_gradients_are_added_beside():
    """As both of the above: one more for mlp, two more for gpt."""
    assert counted(["mlp", "gpt"], 4, "tensor", 2) == [{"all-reduce": 5 + 1}, {"all-reduce": 9 + 2}]


# --- places ---


MEMORY = """
import json, optax, fnbp
from tests import test_sharding as t
net = fnbp.models.gpt(256, 64, 4, 4, 128)
x = jax.numpy.zeros((8, 64), int)
params, state = net.init(jax.random.key(0), x)
placed = fnbp.sharding.place(net, params, fnbp.sharding.mesh(), fully=True)
x, y = fnbp.sharding.split(fnbp.sharding.mesh(), x, x)
done = fnbp.fit(net, t.LOSS, placed, state, x, y, optimizer=optax.adamw(1e-3), key=jax.random.key(1), batch_size=8,
                steps=2, progress=False)
share = []
for tree in ((params, placed), (optax.adamw(1e-3).init(params), optax.adamw(1e-3).init(placed)),
             (params, done.params), (optax.adamw(1e-3).init(params), done.opt_state)):
    whole = sum(a.nbytes for a in jax.tree.leaves(tree[0]))
    each = {d: 0 for d in jax.devices()}
    for a in jax.tree.leaves(tree[1]):
        for shard in a.addressable_shards:
            each[shard.device] += shard.data.nbytes
    share.append(max(each.values()) / whole)
print(json.dumps(share))
"""


def test_fully_sharded_on_eight_a_device_holds_an_eighth_of_parameters_and_optimizer_state_before_and_after_fit():
    shares = run_apart(MEMORY)
    assert max(shares) <= 1.05 / 8, shares


def specs(net, x, mesh, **options):
    params, _ = jax.eval_shape(net.init, jax.random.key(0), x)
    found = sharding.places(net, params, mesh, **options)
    return {name: tuple(place.spec) for name, place in fnbp.named(net, found).items()}


def test_tensor_parallel_is_column_then_row():
    mesh = sharding.mesh(2, 2)
    found = specs(fnbp.models.gpt(16, 8, 2, 4, 16), jnp.zeros((4, 8), int), mesh)
    ends = {name.split("transformer_block(16, 4)")[-1]: spec for name, spec in found.items()}
    attention = "[0].skip[0].serial[1].attention(4)"
    mlp = "[1].skip[0].serial[1].gelu_mlp(64, 16)"
    assert ends[f"{attention}.Q"] == ends[f"{attention}.V"] == (None, "model", None)
    assert ends[f"{attention}.O"] == (None, None, "model") and ends[f"{attention}.b_O"] == (None, None)
    assert ends[f"{attention}.b_V"] == (None, "model")
    assert ends[f"{mlp}[0].dense(64).W"] == (None, "model", None)
    assert ends[f"{mlp}[0].dense(64).b"] == (None, "model")
    assert ends[f"{mlp}[2].dense(16).W"] == (None, None, "model") and ends[f"{mlp}[2].dense(16).b"] == (None, None)
    assert found["tie[0].gpt[0].embedding(16, 16).E"] == ("model", None)
    assert set(found["tie[0].gpt[1].positions(8).P"]) == {None}


def test_both_matrices_of_a_gate_are_columns():
    found = specs(fnbp.swiglu(6, 4), jnp.zeros((4, 8)), sharding.mesh(2, 2))
    assert list(found.values()) == [("model", None), ("model", None), (None, "model")]


def test_what_cannot_be_split_stays_whole():
    mesh = sharding.mesh(2, 2)
    odd = specs(fnbp.serial(fnbp.dense(7), fnbp.tanh(), fnbp.dense(3)), jnp.zeros((4, 8)), mesh)
    assert all(set(spec) <= {None} for spec in odd.values())
    heads = specs(fnbp.attention(4, 1), jnp.zeros((4, 3, 8)), mesh)
    assert all(set(spec) <= {None} for spec in heads.values())
    between = specs(fnbp.serial(fnbp.dense(8), fnbp.layer_norm(), fnbp.dense(7)), jnp.zeros((4, 8)), mesh)
    assert all(set(spec) <= {None} for spec in between.values())


def test_fully_sharded_takes_the_largest_axis_and_leaves_small_ones_whole(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 100)
    found = specs(fnbp.serial(fnbp.dense(12), fnbp.dense(18)), jnp.zeros((4, 16)), sharding.mesh(4), fully=True)
    assert list(found.values()) == [(None, "data"), (None,), (None, "data"), (None,)]


def test_patterns_come_first_and_leave_out_the_axis_of_depth():
    net = fnbp.models.gpt(16, 8, 2, 4, 16)
    found = specs(net, jnp.zeros((4, 8), int), sharding.mesh(4), patterns={"*.Q": P(None, "data"), "*.P": P("data")})
    assert [spec for name, spec in found.items() if name.endswith(".Q")] == [(None, None, "data")]
    assert found["tie[0].gpt[1].positions(8).P"] == ("data",)


def test_parameters_can_be_made_where_they_lie():
    net, x = fnbp.models.mlp(64, 32), jnp.zeros((4, 16))
    shapes, _ = jax.eval_shape(net.init, jax.random.key(0), x)
    there = sharding.places(net, shapes, sharding.mesh(4), fully=True)
    params = jax.jit(lambda key: net.init(key, x)[0], out_shardings=there)(jax.random.key(0))
    assert jax.tree.map(lambda a: a.sharding, params) == there


def test_a_net_whose_parameters_lie_on_one_device_is_itself():
    net, params, *_ = subject("mlp", 4)
    assert sharding.sharded(net, params) is net
    assert sharding.sharded(net, sharding.place(net, params, sharding.mesh(4))) is net
    split = sharding.place(net, params, sharding.mesh(4), fully=True)
    kept = sharding.sharded(net, split)
    assert kept == sharding.sharded(net, split) != net and sharding.sharded(kept, split) is kept


# --- fit ---


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
def test_fit_has_the_losses_of_one_device_and_compiles_once(x64, name, scheme, explicit):
    net, params, state, x, y = subject(name, 24)
    options = {"optimizer": optax.adamw(1e-2), "key": jax.random.key(3), "batch_size": 8, "steps": 20}

    def run(params, state, x, y):
        held_out = fnbp.Validation(x, y, fnbp.accuracy())
        return fnbp.fit(net, LOSS, params, state, x, y, validation=held_out, progress=False, **options)

    here = laid_out(scheme, 4, explicit, net, params, state, x, y)
    found, due = run(*here), run(params, state, x, y)
    assert relative(found.history.loss, due.history.loss) <= 1e-12
    assert relative(found.history.validation_loss, due.history.validation_loss) <= 1e-12
    assert lies_as(found.params, here[0]) and lies_as(found.opt_state[0].mu, here[0])
    assert relative(fnbp.predict(net, *found[:2], x), fnbp.predict(net, *due[:2], x)) <= 1e-11
    measured, alone = (fnbp.evaluate(net, LOSS, *done[:2], *xy) for done, xy in ((found, here[2:]), (due, (x, y))))
    assert relative(measured["loss"], alone["loss"]) <= 1e-12


def test_a_checkpoint_of_four_devices_goes_on_on_two(x64, tmp_path):
    net, params, state, x, y = subject("mlp", 24)
    options = {"optimizer": optax.adamw(1e-2), "key": jax.random.key(3), "batch_size": 8, "progress": False}

    def run(devices, steps):
        here = laid_out("fully", devices, False, net, params, state, x, y)
        return here[0], fnbp.fit(net, LOSS, *here, steps=steps, checkpoint=tmp_path, **options)

    run(4, 10)
    placed, found = run(2, 20)
    whole = fnbp.fit(net, LOSS, params, state, x, y, steps=20, **options)
    assert found.step == 20 and relative(found.history.loss, whole.history.loss) <= 1e-12
    assert lies_as(found.params, placed) and lies_as(found.opt_state[0].mu, placed)


# --- what is refused ---


@pytest.mark.parametrize(
    "ask, error, text",
    [
        (lambda: sharding.mesh(8), ValueError, "data 8 x model 1 needs 8 devices, there are 4"),
        (lambda: sharding.mesh(model=3), ValueError, "model 3 does not divide the 4 devices that there are"),
        (lambda: sharding.mesh(model=8), ValueError, "model 8 does not divide the 4 devices"),
        (lambda: sharding.mesh(0), ValueError, "mesh: data must be at least 1"),
        (lambda: sharding.mesh(2.0), TypeError, "mesh: data must be a whole number"),
        (lambda: sharding.mesh(explicit=1), TypeError, "mesh: explicit must be a bool"),
        (lambda: sharding.split(sharding.mesh(), jnp.ones(6)), ValueError, "6 examples cannot be split over 4 devices"),
        (lambda: sharding.split(sharding.mesh(), 3), TypeError, "expected arrays with the examples as first axis"),
        (lambda: sharding.split(jax.make_mesh((4,), ("d",)), jnp.ones(4)), TypeError, "with the axes 'data' and"),
        (lambda: placed_by({"*.V": P("data")}), ValueError, r"places: no parameter matches '\*\.V'"),
        (lambda: placed_by({"*.W": P("rows")}), ValueError, "the mesh has no axis 'rows'"),
        (lambda: placed_by({"*.W": P(None, "data")}), ValueError, "5 cannot be split over 4 devices"),
        (lambda: placed_by({"*.W": P(None, None, "data")}), ValueError, "has more axes than dense.8..W"),
        (lambda: placed_by({"*.W": "data"}), TypeError, "the place of dense.8..W must be a P, got str"),
        (lambda: sharding.places(3, {}, sharding.mesh()), TypeError, "places: net must be a Layer"),
        (lambda: sharding.sharded(3, {}), TypeError, "sharded: net must be a Layer"),
    ],
)
def test_what_is_refused(ask, error, text):
    with pytest.raises(error, match=text):
        ask()


def placed_by(patterns):
    net = fnbp.dense(8)
    params, _ = net.init(jax.random.key(0), jnp.ones((4, 5)))
    return sharding.place(net, params, sharding.mesh(), patterns=patterns)


def test_split_holds_every_number():
    with pytest.raises(ValueError, match=r"split: an array holds 4294967297 at index \[3\], which int32 does not hold"):
        sharding.split(sharding.mesh(4), np.ones((8, 2), np.float32), np.array([0, 1, 2, 2**32 + 1, 0, 1, 2, 3]))


def test_arrays_on_different_devices_are_told():
    net, params, state, x, y = subject("mlp", 8)
    two, four = sharding.mesh(2), sharding.mesh(4)
    there = sharding.place(net, params, two)
    options = {"optimizer": optax.adam(0.1), "key": jax.random.key(0), "batch_size": 4, "steps": 2, "progress": False}
    with pytest.raises(ValueError, match=r"fit: params and the data were put on different devices, .* on one mesh"):
        fnbp.fit(net, LOSS, there, state, *sharding.split(four, x, y), **options)
    before = fnbp.fit(net, LOSS, there, state, *sharding.split(two, x, y), **options)
    with pytest.raises(ValueError, match="fit: params and opt_state were put on different devices"):
        moved = sharding.place(net, before.params, four)
        state = jax.device_put(before.state, NamedSharding(four, P()))
        fnbp.fit(net, LOSS, moved, state, *sharding.split(four, x, y), resume=before, **options | {"steps": 1})


def test_fit_refuses_batches_that_devices_do_not_divide():
    net, params, state, x, y = subject("mlp", 24)
    here = laid_out("data", 4, False, net, params, state, x, y)
    with pytest.raises(ValueError, match="fit: batch_size 6 cannot be split over 4 devices along 'data'"):
        fnbp.fit(net, LOSS, *here, optimizer=optax.sgd(0.1), key=jax.random.key(0), batch_size=6, steps=1)
