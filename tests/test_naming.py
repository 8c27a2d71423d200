"""Parameters by name, by patterns of names, and moved between nets of other forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from tests.cases import CASES, draw
from tests.test_models import MODELS

KEY = jax.random.key(5)
NET = fnbp.models.gpt(13, 7, layers=3, heads=2, width=10)
TOKENS = jnp.zeros((2, 5), int)
PARAMS, STATE = NET.init(KEY, TOKENS)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_parameter_has_a_name_and_comes_back_by_it(case):
    params = draw(case, case.shapes[0], jnp.float32)[0]
    by_name = fnbp.named(case.layer, params)
    assert len(by_name) == len(jax.tree.leaves(params))
    same(fnbp.with_named(case.layer, jax.tree.map(jnp.zeros_like, params), by_name), params)


@pytest.mark.parametrize("name", MODELS)
def test_the_names_are_those_of_reports(name):
    net, x, _ = MODELS[name]
    params, _ = net.init(KEY, x)
    rows = {f"{row.path}.{leaf}" for row in fnbp.tabulate(net, x).rows for leaf in row.parameters}
    assert set(fnbp.named(net, params)) == rows


def test_names_read_well():
    names = list(fnbp.named(NET, PARAMS))
    assert names[0] == "tie[0].gpt[0].embedding(13, 10).E"


def test_one_parameter_is_replaced_by_name_and_the_others_stay():
    net = fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(2))
    params, _ = net.init(KEY, jnp.ones((1, 5)))
    bias = np.arange(2, dtype=np.float64)
    new = fnbp.with_named(net, params, {"serial[2].dense(2).b": bias})
    np.testing.assert_array_equal(new[2]["b"], bias)
    assert new[2]["b"].dtype == params[2]["b"].dtype
    same((new[0], new[2]["W"]), (params[0], params[2]["W"]))


def test_patterns_choose_parameters():
    mask = fnbp.matching(NET, "*layer_norm.*", "*.b_?")(PARAMS)
    chosen = {name for name, wanted in fnbp.named(NET, mask).items() if wanted}
    leaf = {name: name.rpartition(".")[2] for name in fnbp.named(NET, PARAMS)}
    due = {name for name in leaf if "layer_norm." in name or (leaf[name][0] == "b" and len(leaf[name]) == 3)}
    assert chosen == due and 0 < len(due) < len(leaf)


def test_brackets_stand_for_themselves():
    net = fnbp.serial(*[fnbp.dense(3)] * 12)
    params, _ = net.init(KEY, jnp.ones((1, 3)))
    mask = fnbp.named(net, fnbp.matching(net, "serial[1].*")(params))
    assert [name for name, wanted in mask.items() if wanted] == ["serial[1].dense(3).W", "serial[1].dense(3).b"]


def test_weight_decay_and_rates_by_name_in_optax():
    net = fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(2))
    params, _ = net.init(KEY, jnp.ones((1, 5)))
    params = jax.tree.map(jnp.ones_like, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    decay = optax.add_decayed_weights(0.5, mask=fnbp.matching(net, "*.W"))
    updates, _ = jax.jit(decay.update)(zero, decay.init(params), params)
    assert {n: float(u.max()) for n, u in fnbp.named(net, updates).items()} == {
        "serial[0].dense(3).W": 0.5, "serial[0].dense(3).b": 0, "serial[2].dense(2).W": 0.5, "serial[2].dense(2).b": 0
    }  # fmt: skip
    labels = fnbp.labelled(net, {"serial[0].*": "still", "*.b": "slow"}, otherwise="fast")
    by_group = optax.partition({"still": optax.set_to_zero(), "slow": optax.sgd(0.5), "fast": optax.sgd(2.0)}, labels)
    updates, _ = jax.jit(by_group.update)(jax.tree.map(jnp.ones_like, params), by_group.init(params), params)
    assert [float(u.max()) for u in fnbp.named(net, updates).values()] == [0, 0, -2.0, -0.5]


BLOCK = fnbp.serial(fnbp.dense(5), fnbp.layer_norm())
TWICE = fnbp.serial(BLOCK, BLOCK, BLOCK)
FORMS = {
    "cast": fnbp.cast(TWICE, "bfloat16"),
    "remat": fnbp.remat(TWICE),
    "repeat": fnbp.repeat(BLOCK, 3),
    "repeat of remat": fnbp.serial(fnbp.cast(fnbp.repeat(fnbp.remat(BLOCK), 3), "float32")),
    "flat": fnbp.serial(*BLOCK.parts * 3),
    "twice repeated": fnbp.repeat(fnbp.repeat(BLOCK, 1), 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_move_to_another_form_and_back(form):
    other, x = FORMS[form], jax.random.normal(KEY, (7, 5))
    params, state = TWICE.init(KEY, x)
    there = fnbp.moved(TWICE, params, other)
    assert jax.tree.map(jnp.shape, there) == jax.tree.map(jnp.shape, other.init(KEY, x)[0])
    same(fnbp.moved(other, there, TWICE), params)
    tolerance = 0.1 if form == "cast" else 1e-6
    here = fnbp.apply(TWICE, params, state, x)
    np.testing.assert_allclose(fnbp.apply(other, there, fnbp.moved(TWICE, state, other), x), here, atol=tolerance)


def test_state_moves_too():
    net = fnbp.serial(fnbp.dense(3), fnbp.batch_norm())
    _, state = net.init(KEY, jnp.ones((2, 5)))
    same(fnbp.moved(fnbp.remat(net), fnbp.moved(net, state, fnbp.remat(net)), net), state)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: fnbp.named(3, PARAMS), TypeError, "named: net must be a Layer"),
        (lambda: fnbp.named(NET, PARAMS[0]), ValueError, "params must have 1 entries, one for each layer, got 5"),
        (lambda: fnbp.with_named(NET, PARAMS, 3), TypeError, "values must be a dict of arrays by name, got int 3"),
        (lambda: fnbp.with_named(NET, PARAMS, {"gpt.E": 0}), ValueError, r"with_named: unknown parameter 'gpt\.E'"),
        (
            lambda: fnbp.with_named(NET, PARAMS, {"tie[0].gpt[0].embedding(13, 10).E": jnp.zeros((10, 13))}),
            ValueError,
            r"E must have shape \(13, 10\), got \(10, 13\)",
        ),
        (lambda: fnbp.matching(NET), ValueError, "give at least one pattern"),
        (lambda: fnbp.matching(NET, 3), TypeError, "a pattern must be a text"),
        (
            lambda: fnbp.matching(NET, "*.embeding(*).E")(PARAMS),
            ValueError,
            r"no parameter matches '\*\.embeding\(\*\)\.E'; the nearest is tie\[0\]\.gpt\[0\]\.embedding",
        ),
        (lambda: fnbp.matching(fnbp.tanh(), "*")({}), ValueError, "tanh has no parameters"),
        (lambda: fnbp.labelled(NET, "*.W", 0), TypeError, "labels must be a dict of labels by pattern"),
        (lambda: fnbp.labelled(3, {"*": 0}, 0), TypeError, "labelled: net must be a Layer"),
        (
            lambda: fnbp.moved(fnbp.dense(3), {}, fnbp.dense(5)),
            ValueError,
            r"layer 0 of dense\(3\) is dense\(3\), that of dense\(5\) is dense\(5\)",
        ),
        (
            lambda: fnbp.moved(fnbp.serial(fnbp.tanh()), ({},), fnbp.serial(fnbp.tanh(), fnbp.relu())),
            ValueError,
            "serial has 1 layers, serial has 2",
        ),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_mask_works_inside_a_group_of_a_partition():
    groups = fnbp.labelled(NET, {"*.embedding(*": "still"}, otherwise="moving")
    adamw = optax.adamw(0.1, weight_decay=0.5, mask=fnbp.matching(NET, "*.W"))
    optimizer = optax.partition({"still": optax.set_to_zero(), "moving": adamw}, groups)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    moved = {name for name, a in fnbp.named(NET, updates).items() if np.abs(a).max() > 0}
    assert moved and all(name.endswith(".W") for name in moved)


@pytest.mark.parametrize("dtype", [complex, np.complex64])
def test_a_number_of_another_kind_is_refused(dtype):
    net = fnbp.dense(2)
    params, _ = net.init(KEY, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"with_named: dense\(2\).b is float32, which does not hold complex"):
        fnbp.with_named(net, params, {"dense(2).b": np.zeros(2, dtype)})
    assert fnbp.with_named(net, params, {"dense(2).b": np.array([1, 2])})["b"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("labels, otherwise", [({"*.W": None}, "a"), ({"*.W": "a"}, None)])
def test_none_is_no_label(labels, otherwise):
    with pytest.raises(TypeError, match="labelled: a label must not be None"):
        fnbp.labelled(NET, labels, otherwise)
