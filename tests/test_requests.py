"""What fit is asked for: values are looked at, what cannot be is refused, nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp

CE, MSE = fnbp.softmax_cross_entropy(), fnbp.mean_squared_error()
ADAM, SGD, KEY = optax.adam(0.01), optax.sgd(0.1), jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((24, 4)).astype(np.float32), RNG.integers(0, 3, 24)
HELD_OUT = RNG.standard_normal((12, 4)).astype(np.float32), RNG.integers(0, 3, 12)


def net_of(traces=None):
    layer = fnbp.dense(3)

    def forward(*args):
        if traces is not None:
            traces.append(1)
        return layer.forward(*args)

    return fnbp.serial(layer._replace(forward=forward))


NET = net_of()


def fit(net=NET, x=X, y=Y, loss=CE, **options):
    given = {"optimizer": ADAM, "key": KEY, "batch_size": 6, "progress": False}
    if "epochs" not in options:
        given["steps"] = 8
    given |= options
    params, state = (given.pop(name, None) for name in ("params", "state"))
    if params is None:
        params, state = net.init(KEY, jnp.asarray(X) if not isinstance(x, (tuple, jax.Array)) else x)
    return fnbp.fit(net, loss, params, state, x, y, **given)


def same(a, b):
    return all(np.array_equal(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- compiled once ---


def test_a_second_fit_of_the_same_objects_compiles_nothing():
    traces = []
    net = net_of(traces)
    first = fit(net, validation=HELD_OUT, epochs=2)
    params, state = net.init(KEY, X)
    traces.clear()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for options in (
        {"epochs": 1},
        {"steps": 5},
        {"epochs": 1, "key": jax.random.key(3)},
        {"epochs": 1, "resume": first, "params": first.params, "state": first.state},
        {"epochs": 1, "x": X + 1},
    ):
        fit(net, **({"validation": HELD_OUT, "params": params, "state": state} | options))
    # what is left is a look at the shapes and values of data, two or three traces for each fit
    assert len(traces) <= 3 * 5 and not compiled


def test_what_cannot_be_hashed_is_compiled_anew():
    class Maker:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, net, loss):
            return fnbp.value_and_grad(net, loss)

    assert same(fit(gradient=Maker()).params, fit().params)


# --- going on ---


def test_a_resumed_fit_keeps_its_best_and_its_patience(monkeypatch):
    measured = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]

    def run(values, **options):
        values = iter(values)
        monkeypatch.setattr(fnbp.training.prepare, "validation_of", lambda *_: lambda *_: {"loss": next(values)})
        return fit(validation=HELD_OUT, patience=3, **options)

    straight = run(measured, epochs=6)
    first = run(measured[:3], epochs=3)
    assert (first.stopped, first.best.loss, first.waited) == ("steps", 1.0, 1)
    resumed = run(measured[3:], epochs=3, resume=first, params=first.params, state=first.state)
    assert (straight.stopped, straight.step) == (resumed.stopped, resumed.step) == ("patience", 20)
    assert resumed.best.loss == straight.best.loss == 1.0 and resumed.best.step == straight.best.step
    assert same(resumed.params, straight.params) and same(resumed.opt_state, straight.opt_state)


@pytest.mark.parametrize("middle", [1, 5])
def test_steps_are_counted_from_where_it_goes_on(middle):
    first = fit(steps=middle)
    resumed = fit(steps=8 - middle, resume=first, params=first.params, state=first.state)
    assert resumed.step == 8 and same(resumed.params, fit(steps=8).params)


# --- refused ---

IGNORING = fnbp.softmax_cross_entropy(ignore_index=-1)
MULTI = optax.MultiSteps(optax.sgd(0.1), 2)
REFUSED = [
    ({"threshold": float("nan")}, ValueError, "fit: threshold must be a number, got nan"),
    ({"threshold": "low"}, TypeError, "fit: threshold must be a number, got str 'low'"),
    ({"start": 1.5}, TypeError, "fit: start must be a whole number, got 1.5"),
    ({"start": True}, TypeError, "fit: start must be a whole number, got True"),
    ({"start": 2**31 - 5}, ValueError, r"fit: start \+ steps must be below 2\*\*31, got 2147483651"),
    ({"start": 2**40}, ValueError, r"fit: start \+ steps must be below 2\*\*31"),
    (
        {"validation": (X,)},
        TypeError,
        r"fit: validation must be a pair \(x, y\), or Validation\(x, y, metrics\), got a tuple of 1",
    ),
    (
        {"validation": X},
        TypeError,
        r"fit: validation must be a pair \(x, y\), or Validation\(x, y, metrics\), got float32",
    ),
    ({"x": X.tolist()}, TypeError, r"fit: training data: x must be an array.* got a list of 24.* jnp.asarray\(x\)"),
    ({"y": Y.tolist()}, TypeError, r"fit: training data: y must be an array.* jnp.asarray\(y\)"),
    ({"x": X.astype(object)}, TypeError, r"fit: training data: x must be an array"),
    ({"y": np.array(["a"] * 24)}, TypeError, r"fit: training data: y must be an array"),
    ({"x": None}, TypeError, r"fit: training data: x must be an array.* got NoneType"),
    ({"loss": IGNORING, "y": 0 * Y - 1}, ValueError, "training data: nothing counts in the loss softmax_cross_entropy"),
    ({"loss": IGNORING, "validation": (X, 0 * Y - 1)}, ValueError, "validation data: nothing counts in the loss"),
    ({"x": (x for x in X)}, TypeError, r"fit: training data: x must be an array.* got generator"),
    ({"validation": (X.tolist(), Y)}, TypeError, r"fit: validation data: x must be an array"),
    ({"y": np.where(Y == 1, 2**32 + 1, Y)}, ValueError, r"fit: training data: y holds 4294967297 at index"),
    ({"y": Y + 1}, ValueError, r"label 3 at index .* is outside 0..2"),
    ({"validation": (HELD_OUT[0], HELD_OUT[1] + 9)}, ValueError, r"label .* is outside 0..2"),
    ({"optimizer": MULTI}, TypeError, r"got MultiSteps.*; give its .gradient_transformation\(\)"),
    ({"optimizer": optax.adam}, TypeError, r"call it: adam\(\) with its learning rate, as optax.adam\(1e-3\)"),
    ({"callback": 3}, TypeError, "fit: callback must be a function, got int 3"),
    ({"on_epoch": "a"}, TypeError, "fit: on_epoch must be a function, got str 'a'"),
    ({"resume": 3}, TypeError, "fit: resume must be a Fit, what an earlier fit returned; got int"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_it_is_refused_before_the_first_step(monkeypatch, options, error, message):
    monkeypatch.setattr(fnbp.training.fit, "drive", lambda *args: pytest.fail("training began"))
    params, state = NET.init(KEY, X)
    with pytest.raises(error, match=message):
        fit(**({"params": params, "state": state} | options))


def test_resume_and_its_parts_are_not_given_together():
    first = fit()
    for twice in ({"start": 8}, {"opt_state": first.opt_state}):
        with pytest.raises(ValueError, match="fit: resume brings opt_state and start along"):
            fit(resume=first, params=first.params, state=first.state, **twice)


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap])
def test_fit_says_that_it_cannot_be_traced(wrap):
    params, state = NET.init(KEY, X)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    with pytest.raises(
        TypeError, match="fit: it is a Python loop, which cannot run under jit or vmap; for an ensemble"
    ):
        wrap(lambda params: fit(params=params, state=state).params)(stacked)


def test_uint8_images_are_told_how():
    params, state = NET.init(KEY, X)
    with pytest.raises(TypeError) as caught:
        fit(x=(X * 10).astype(np.uint8), params=params, state=state)
    assert "fit: x is uint8; give floating point numbers: x.astype('float32') / 255" in caught.value.__notes__


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert same(fit(steps=np.int64(8), batch_size=np.int32(6), start=np.int64(0)).params, fit().params)


# --- values that the layers look at ---

WORDS = fnbp.serial(fnbp.embedding(5, 4), fnbp.last(), fnbp.dense(3))
READER = fnbp.ragged(fnbp.serial(fnbp.embedding(5, 4), fnbp.scan(fnbp.rnn_cell(2)), fnbp.dense(3)))
TEXT = RNG.integers(0, 5, (24, 6))


def test_tokens_out_of_range_are_named_before_the_first_step():
    bad = TEXT.copy()
    bad[3, 2] = 7
    for options in ({"x": bad}, {"x": TEXT, "validation": (bad, Y)}):
        with pytest.raises(ValueError, match=r"embedding\(5, 4\): token 7 at index \[3, 2\] is outside 0..4"):
            fit(WORDS, **({"params": WORDS.init(KEY, jnp.asarray(TEXT))[0], "state": ({}, {}, {})} | options))


def test_lengths_out_of_range_are_named_and_padding_is_not_looked_at():
    lengths = RNG.integers(1, 7, 24)
    padded = np.where(np.arange(6) < lengths[:, None], TEXT, 99)
    tags = np.where(np.arange(6) < lengths[:, None], TEXT % 3, -1)
    params, state = READER.init(KEY, (jnp.asarray(TEXT), jnp.asarray(lengths)))
    done = fit(
        READER, (padded, lengths), tags, params=params, state=state, validation=((padded, lengths), tags), epochs=1
    )
    assert np.isfinite(done.history.loss).all() and np.isfinite(done.history.validation_loss).all()
    with pytest.raises(ValueError, match=r"ragged: length 9 of example 0 is outside 0..6"):
        fit(READER, (padded, np.where(np.arange(24) == 0, 9, lengths)), tags, params=params, state=state)


def test_validation_of_a_net_with_batch_norm_needs_no_statistics_before_the_first_step():
    net = fnbp.serial(fnbp.dense(5), fnbp.batch_norm(), fnbp.dense(3))
    assert np.isfinite(fit(net, validation=HELD_OUT, epochs=2).history.validation_loss).all()


def test_a_frozen_batch_norm_without_statistics_is_named_before_the_first_step():
    net = fnbp.serial(fnbp.dense(5), fnbp.freeze(fnbp.batch_norm()), fnbp.dense(3))
    with pytest.raises(ValueError, match="batch_norm: no training step yet"):
        fit(net)


# --- finite ---


def test_moments_that_overflow_stop_the_training():
    """Gradients of 1e25: their squares overflow, and Adam stands still without a word."""
    x, y = np.full((24, 4), 1e12, np.float32), np.full((24, 3), 1e13, np.float32)
    done = fit(x=x, y=y, loss=MSE, optimizer=ADAM, steps=50)
    assert done.stopped == "non-finite"
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((done.params, done.opt_state)))


def test_infinities_that_an_optimizer_begins_with_stop_nothing():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    begun = optimizer.init(NET.init(KEY, X)[0])
    assert not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(begun))
    assert fit(optimizer=optimizer).stopped == "steps"
