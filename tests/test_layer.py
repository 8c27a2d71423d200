"""A layer as a value: paths, maps, lifting, contexts, and where an error says it happened."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.cases import normal, relative

NET = fnbp.serial(
    fnbp.dense(5),
    fnbp.sigmoid(),
    fnbp.skip(fnbp.serial(fnbp.dense(13), fnbp.tanh(), fnbp.dense(5))),
    fnbp.dense(17),
)
PATHS = [
    "serial[0].dense(5)",
    "serial[1].sigmoid",
    "serial[2].skip[0].serial[0].dense(13)",
    "serial[2].skip[0].serial[1].tanh",
    "serial[2].skip[0].serial[2].dense(5)",
    "serial[3].dense(17)",
]


def drawn(net=NET, shape=(7, 11)):
    rng = np.random.default_rng(3)
    x = normal(rng, shape, float)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype), shapes), state, x


def visit(net):
    seen = []

    def f(path, layer):
        seen.append((path, layer))
        return layer

    return fnbp.map_layers(f, net), seen


def test_map_layers_calls_each_leaf_once_with_its_path_first_to_last():
    _, seen = visit(NET)
    assert [path for path, _ in seen] == PATHS
    assert [layer.name for _, layer in seen] == ["dense(5)", "sigmoid", "dense(13)", "tanh", "dense(5)", "dense(17)"]


def test_the_path_of_a_lone_layer_is_its_name():
    assert [path for path, _ in visit(fnbp.dense(5))[1]] == ["dense(5)"]


def test_the_identity_map_leaves_names_and_behaviour_unchanged():
    params, state, x = drawn()
    same, _ = visit(NET)
    assert [part.name for part in same.parts] == [part.name for part in NET.parts]
    assert same.name == NET.name
    dy = normal(np.random.default_rng(4), (7, 17), float)
    outs = []
    for net in (NET, same):
        y, new_state, res = net.forward(params, state, x, fnbp.Context())
        outs.append((y, new_state, res, net.backward(params, res, dy)))
    assert jax.tree.structure(outs[0]) == jax.tree.structure(outs[1])
    assert relative(*outs) == 0
    assert jax.eval_shape(same.init, jax.random.key(0), x) == jax.eval_shape(NET.init, jax.random.key(0), x)


def test_a_map_replaces_the_leaf_at_its_path_and_no_other():
    params, state, x = drawn()
    inner = PATHS[3]

    def silence(path, layer):
        if path != inner:
            return layer
        return layer._replace(backward=lambda params, res, dy: ({}, 0 * dy))

    mapped = fnbp.map_layers(silence, NET)
    y, _, res = mapped.forward(params, state, x, fnbp.Context())
    dy = normal(np.random.default_rng(4), y.shape, float)
    factors, _ = mapped.backward(params, res, dy)
    untouched, _ = NET.backward(params, res, dy)
    assert not np.asarray(factors[2][0][0]["W"].total()).any()
    for pick in (lambda f: f[3]["W"], lambda f: f[2][0][2]["W"]):
        assert relative(pick(factors).total(), pick(untouched).total()) == 0
    assert np.asarray(factors[0]["W"].total()).any()


def test_leaves_yields_path_layer_and_the_entries_of_each_tree():
    params, state, _ = drawn()
    found = list(fnbp.leaves(NET, params, state))
    assert [path for path, *_ in found] == PATHS
    assert [layer.name for _, layer, _, _ in found] == [layer.name for _, layer in visit(NET)[1]]
    assert [entry.get("W", jnp.zeros(())).shape for _, _, entry, _ in found] == [
        (5, 11),
        (),
        (13, 5),
        (),
        (5, 13),
        (17, 5),
    ]
    assert found[2][2] is params[2][0][0]
    assert found[2][3] is state[2][0][0]


def test_leaves_of_a_lone_layer_and_of_no_trees():
    layer = fnbp.dense(3)
    params = {"W": jnp.ones((3, 2)), "b": jnp.ones(3)}
    assert list(fnbp.leaves(layer, params)) == [("dense(3)", layer, params)]
    assert [len(found) for found in fnbp.leaves(NET)] == [2] * len(PATHS)


def test_stateless_lifts_functions_that_mention_neither_state_nor_context():
    seen = []

    def init(key, x):
        seen.append(key)
        return {"scale": jnp.full((), 3, x.dtype)}

    def forward(params, x):
        return params["scale"] * x, (x,)

    def backward(params, res, dy):
        return {"scale": jnp.sum(dy * res[0])}, dy * params["scale"]

    layer = fnbp.stateless(init, forward, backward, "times")
    x = normal(np.random.default_rng(0), (7, 11), float)
    key = jax.random.key(5)
    params, state = layer.init(key, x)
    assert seen == [key]
    assert (layer.name, layer.parts, layer.rebuild, state) == ("times", (), None, {})
    mine = {"anything": 1}
    y, after, res = layer.forward(params, mine, x, fnbp.Context(train=True))
    assert after is mine
    assert relative(y, 3 * np.asarray(x)) == 0
    assert layer.backward is backward and res[0] is x
    with pytest.raises(TypeError, match=r"times: expected a random key, e.g. jax.random.key\(0\); got int 7"):
        layer.init(7, x)


def test_a_uint32_key_is_a_key_too_and_other_arrays_are_none():
    layer = fnbp.dense(3)
    layer.init(jax.random.PRNGKey(0), jnp.ones((2, 5)))
    for key, words in ((jnp.zeros(2), "float32 of shape"), (jnp.zeros((2, 2), jnp.uint32), "uint32 of shape")):
        with pytest.raises(TypeError, match=f"expected a random key.*got {words}"):
            layer.init(key, jnp.ones((2, 5)))


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "uint32"])
def test_split_gives_each_part_a_key_of_its_own(key):
    parent = fnbp.Context(key, mask=jnp.ones(3), train=True)
    parts = parent.split(5)
    data = {tuple(np.asarray(jax.random.key_data(c.key)).tolist()) for c in (*parts, parent)}
    assert len(parts) == 5 and len(data) == 6
    assert all(c.mask is parent.mask and c.train is True for c in parts)
    again = parent.split(5)
    assert all(
        (jax.random.key_data(a.key) == jax.random.key_data(b.key)).all() for a, b in zip(parts, again, strict=True)
    )
    assert parent.split(0) == ()


def test_split_without_a_key_hands_the_context_on():
    context = fnbp.Context(mask=jnp.ones(3), train=True)
    parts = context.split(3)
    assert len(parts) == 3 and all(part is context for part in parts)


def test_context_is_a_frozen_pytree_and_train_is_static():
    context = fnbp.Context(jax.random.key(0), jnp.ones(3))
    assert len(jax.tree.leaves(context)) == 2
    assert jax.tree.leaves(fnbp.Context()) == []
    assert jax.tree.structure(context) != jax.tree.structure(dataclasses.replace(context, train=True))
    traced = []

    @jax.jit
    def run(ctx):
        traced.append(ctx.train)
        return ctx.mask * (2 if ctx.train else 3)

    for mask, train, due in ((1, False, 3), (5, False, 15), (7, True, 14), (2, False, 6)):
        assert run(fnbp.Context(mask=jnp.float32(mask), train=train)) == due
    assert traced == [False, True]
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.train = True


def failing(where):
    def fail(*_):
        raise RuntimeError("torn")

    parts = {"init": lambda key, x: {}, "forward": lambda params, x: (x, ()), "backward": lambda p, res, dy: ({}, dy)}
    return fnbp.stateless(**(parts | {where: fail}), name="torn")


@pytest.mark.parametrize("where", ["init", "forward", "backward"])
def test_an_error_in_a_deep_layer_carries_notes_naming_the_place(where):
    net = fnbp.serial(fnbp.dense(5), fnbp.skip(fnbp.serial(fnbp.tanh(), failing(where))), fnbp.dense(3))
    sound = fnbp.serial(fnbp.dense(5), fnbp.skip(fnbp.serial(fnbp.tanh(), fnbp.identity())), fnbp.dense(3))
    params, state, x = drawn(sound)
    with pytest.raises(RuntimeError, match="torn") as caught:
        if where == "init":
            net.init(jax.random.key(0), x)
        y, _, res = net.forward(params, state, x, fnbp.Context())
        net.backward(params, res, y)
    assert caught.value.__notes__ == ["in serial[1].torn", "in skip[0].serial", "in serial[1].skip"]


def doubling(**functions):
    """2 x as a Layer, but for the functions given."""
    sound = {
        "init": lambda key, x: ({}, {}),
        "forward": lambda params, state, x, ctx: (2 * x, state, ()),
        "backward": lambda params, res, dy: ({}, 2 * dy),
    }
    return fnbp.Layer(**(sound | functions), name="double")


def test_a_forward_that_returns_y_alone_is_named():
    x, y = normal(np.random.default_rng(0), (7, 3), float), jnp.arange(7) % 3
    short = doubling(forward=lambda params, state, x, ctx: 2 * x)
    message = r"double: forward must return \(y, state, res\), got float\d+ of shape \(7, 3\)"
    for run in (
        lambda: fnbp.serial(fnbp.identity(), short).init(jax.random.key(0), x),
        lambda: fnbp.value_and_grad(short, fnbp.softmax_cross_entropy())({}, {}, x, y),
        lambda: fnbp.compare(short, x),
    ):
        with pytest.raises(TypeError, match=message):
            run()
    pair = fnbp.stateless(lambda key, x: {}, lambda params, x: 2 * x, lambda params, res, dy: ({}, 2 * dy), "pair")
    with pytest.raises(TypeError, match=r"pair: forward must return \(y, res\), got float"):
        pair.forward({}, {}, x, fnbp.Context())


def test_a_backward_that_returns_too_much_or_too_little_is_named():
    x, y = normal(np.random.default_rng(0), (7, 3), float), jnp.arange(7) % 3
    for backward, came in (
        (lambda params, res, dy: 2 * dy, r"float\d+ of shape \(7, 3\)"),
        (lambda params, res, dy: ({}, 2 * dy, None), "3 values"),
    ):
        net = fnbp.serial(fnbp.tanh(), doubling(backward=backward))
        message = rf"serial\[1\]\.double: backward must return \(factors, dx\), got {came}"
        with pytest.raises(TypeError, match=message):
            fnbp.value_and_grad(net, fnbp.softmax_cross_entropy())(({}, {}), ({}, {}), x, y)
        fault = fnbp.compare(net, x).first_fault
        assert fault.kind == "raises" and "backward must return (factors, dx)" in fault.hint
