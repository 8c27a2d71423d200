"""Layers and losses know the call that made them: by it they are equal, hashed, pickled, copied and printed."""

import copy
import pickle
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from fnbp.construction import made_of
from tests.cases import CASES
from tests.test_house import LAYERS, constructors
from tests.test_models import MODELS

NETS = {case.id: case.layer for case in CASES} | {name: net for name, (net, *_) in MODELS.items()}
LOSSES = [fnbp.softmax_cross_entropy(), fnbp.softmax_cross_entropy(weights=[1.0, 2.0]), fnbp.binary_cross_entropy()]


@fnbp.constructor
def doubled(n: int = 1, *, f=None) -> fnbp.Layer:
    return fnbp.serial(*[fnbp.tanh()] * n, name="doubled")


@pytest.mark.parametrize("name", NETS)
def test_a_layer_knows_the_call_that_made_it(name):
    net = NETS[name]
    assert made_of(net) is not None
    assert "<" not in repr(net), f"{net!r} names an object that cannot be written"
    assert copy.copy(net) is net and copy.deepcopy(net) is net
    assert net == net._replace(name=net.name)
    other = net._replace(backward=lambda *args: None)
    assert net != other and other == other and hash(net) != hash(other)


@pytest.mark.parametrize("name", NETS)
def test_a_layer_comes_back_from_its_pickle(name):
    net = NETS[name]
    try:
        kept = pickle.dumps(net)
    except (AttributeError, pickle.PicklingError) as error:  # a function that its user wrote among the arguments
        assert "lambda" in repr(net) or "local object" in str(error)
        assert callable_inside(net), f"{net!r} does not pickle, and no argument of it is a function"
        return
    back = pickle.loads(kept)
    assert back == net and hash(back) == hash(net) and repr(back) == repr(net) and back is not net


def callable_inside(net):
    given = made_of(net).given.arguments.values() if made_of(net) else [print]
    flat = [one for value in given for one in (value if isinstance(value, tuple) else (value,))]
    return any(callable_inside(one) if isinstance(one, fnbp.Layer) else callable(one) for one in flat)


def test_every_constructor_is_recorded():
    for name, make in constructors().items():
        if name in LAYERS or "Loss" in str(make.__annotations__["return"]):
            assert hasattr(make, "__wrapped__") or name == "scan", f"decorate {name} with @constructor"


def test_layers_of_different_calls_differ():
    by_call = {repr(net): net for net in NETS.values()}
    for (one, a), (other, b) in combinations(by_call.items(), 2):
        assert a != b, f"{one} and {other}"
    assert len(set(by_call.values())) == len(by_call)


@pytest.mark.parametrize(
    "one, other, alike",
    [
        (fnbp.dense(5), fnbp.dense(n_out=5), True),
        (fnbp.dense(5), fnbp.dense(5, "glorot_uniform"), True),
        (fnbp.dense(5), fnbp.dense(5, b=None), False),
        (fnbp.dense(5, optax.constant_schedule), fnbp.dense(5, optax.constant_schedule), True),
        (fnbp.dense(5, lambda *a: 0), fnbp.dense(5, lambda *a: 0), False),
        (fnbp.leaky_relu(1), fnbp.leaky_relu(1.0), False),
        (fnbp.serial(fnbp.dense(5)), fnbp.serial(fnbp.dense(5)), True),
        (fnbp.serial(fnbp.dense(5)), fnbp.serial(fnbp.dense(7)), False),
        (fnbp.serial(fnbp.dense(5)), fnbp.stacked(fnbp.rnn_cell(5)), False),
        (fnbp.cast(fnbp.dense(5), jnp.bfloat16), fnbp.cast(fnbp.dense(5), jnp.dtype("bfloat16")), True),
        (fnbp.cast(fnbp.dense(5), jnp.bfloat16), fnbp.cast(fnbp.dense(5), jnp.float16), False),
        (fnbp.activation("relu"), fnbp.relu(), True),
        (fnbp.softmax_cross_entropy(weights=np.ones(3)), fnbp.softmax_cross_entropy(weights=np.ones(3)), True),
        (fnbp.softmax_cross_entropy(weights=np.ones(3)), fnbp.softmax_cross_entropy(weights=np.ones(4)), False),
        (fnbp.mean_squared_error(), fnbp.half_squared_error(), False),
        (fnbp.loss_from_jax(optax.l2_loss), fnbp.loss_from_jax(optax.l2_loss), True),
        (fnbp.dense(5), "dense(5)", False),
    ],
)
def test_equal_calls_are_equal(one, other, alike):
    assert (one == other) is alike and (one != other) is not alike
    assert not alike or hash(one) == hash(other)


@pytest.mark.parametrize("loss", LOSSES, ids=[repr(loss) for loss in LOSSES])
def test_a_loss_comes_back_from_its_pickle(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    "made, text",
    [
        (fnbp.serial(fnbp.dense(5), fnbp.sigmoid()), "serial(dense(5), sigmoid())"),
        (fnbp.models.mlp(12, 10, activation="tanh"), "mlp(12, 10, activation='tanh')"),
        (fnbp.models.lenet(pool=fnbp.avg_pool), "lenet(pool=avg_pool)"),
        (fnbp.conv(6, (5, 5), padding="VALID"), "conv(6, (5, 5), padding='VALID')"),
        (fnbp.cast(fnbp.dense(3), jnp.bfloat16), "cast(dense(3), 'bfloat16')"),
        (fnbp.softmax_cross_entropy(weights=jnp.ones(3)), "softmax_cross_entropy(weights=float32[3])"),
        (fnbp.relu()._replace(backward=print), "<Layer relu>"),
        (fnbp.Loss(print, print), "<Loss loss>"),
        (doubled(2), "doubled(n=2)"),
    ],
)
def test_a_layer_prints_as_its_call(made, text):
    assert repr(made) == text == str(made)


def test_a_map_that_changes_nothing_returns_the_net():
    net = fnbp.models.resnet(8)
    assert fnbp.map_layers(lambda path, layer: layer, net) is net
    anew = fnbp.map_layers(lambda path, layer: fnbp.relu() if layer.name == "relu" else layer, net)
    assert repr(anew).startswith("serial(conv(16,") and anew == fnbp.map_layers(lambda path, layer: layer, anew)
    changed = fnbp.map_layers(lambda path, layer: layer._replace(forward=print), net)
    assert changed != net


def test_a_net_is_a_static_argument_that_compiles_once():
    traced = []

    def run(net, x):
        traced.append(net)
        return fnbp.apply(net, *net.init(jax.random.key(0), x), x)

    compiled = jax.jit(run, static_argnums=0)
    for _ in range(3):
        compiled(fnbp.serial(fnbp.dense(5), fnbp.relu()), jnp.ones((2, 3)))
    assert len(traced) == 1
    compiled(fnbp.serial(fnbp.dense(7), fnbp.relu()), jnp.ones((2, 3)))
    assert len(traced) == 2


def test_an_argument_that_is_written_to_later_changes_nothing():
    for weights in (np.array([1.0, 1.0]), [1.0, 1.0]):
        loss = fnbp.softmax_cross_entropy(weights=weights)
        before = loss.forward(jnp.ones((1, 2)), jnp.zeros(1, int))[0]
        weights[0] = 9.0
        assert np.array_equal(loss.forward(jnp.ones((1, 2)), jnp.zeros(1, int))[0], before)
        assert loss == fnbp.softmax_cross_entropy(
            weights=type(weights)([1.0, 1.0]) if isinstance(weights, list) else np.ones(2)
        )
        assert loss != fnbp.softmax_cross_entropy(weights=weights) and pickle.loads(pickle.dumps(loss)) == loss


def test_a_constructor_of_ones_own_is_recorded():
    assert doubled(3) == doubled(n=3) != doubled(2)
    assert pickle.loads(pickle.dumps(doubled(3))) == doubled(3)


class Maker:
    def layer(self):
        return fnbp.dense(3)


@pytest.mark.parametrize("make", [Maker.layer, Maker().layer, classmethod(Maker.layer), 3, jnp.tanh])
def test_only_a_function_is_a_constructor(make):
    with pytest.raises(TypeError, match="constructor: expected a function, not a method, got"):
        fnbp.constructor(make)


def test_a_constructor_makes_a_layer():
    with pytest.raises(TypeError, match=r"nothing must return a Layer, a Loss or a Metric, got NoneType"):
        fnbp.constructor(nothing)()


def nothing():
    return None


def test_numbers_are_equal_as_they_are_written():
    assert fnbp.leaky_relu(0.0) != fnbp.leaky_relu(-0.0)
    assert doubled(f=float("nan")) == doubled(f=float("nan"))
    assert doubled(np.int64(2)) != doubled(2) and repr(doubled(np.int64(2))) == "doubled(n=2)"
    array = jnp.ones(3)
    net = doubled(f=array)
    array.delete()
    assert repr(net) == "doubled(f=float32[3])" and net == doubled(f=np.ones(3, np.float32))


def test_a_bound_method_is_equal_only_to_itself():
    maker = Maker()
    assert doubled(f=maker.layer) != doubled(f=maker.layer)
