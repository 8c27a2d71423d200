"""fit's batches: the partial one, augmentation, what is recorded of each step and measured of each epoch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from fnbp.losses.weights import counting_some
from tests.cases import relative

RNG = np.random.default_rng(11)
M, BATCH, KEY = 17, 5, jax.random.key(4)
X, Y = RNG.standard_normal((M, 3)).astype(np.float32), RNG.integers(0, 4, M)
TEXT = RNG.integers(0, 7, (M, 6))
NET, CE = fnbp.models.mlp(6, 4), fnbp.softmax_cross_entropy()
LOSSES = {
    "labels": (fnbp.softmax_cross_entropy(), (M, 4), RNG.integers(0, 4, M)),
    "positions": (fnbp.softmax_cross_entropy(ignore_index=-1), (M, 6, 4), RNG.integers(-1, 4, (M, 6))),
    "tokens": (fnbp.softmax_cross_entropy(ignore_index=-1, reduce="tokens"), (M, 6, 4), RNG.integers(-1, 4, (M, 6))),
    "squares": (fnbp.mean_squared_error(), (M, 3), RNG.standard_normal((M, 3))),
    "tokens of squares": (fnbp.mean_squared_error(reduce="tokens"), (M, 3), RNG.standard_normal((M, 3))),
    "from_jax": (fnbp.loss_from_jax(optax.l2_loss), (M, 3), RNG.standard_normal((M, 3))),
}


def fit(net=NET, loss=CE, x=X, y=Y, **options):
    params, state = net.init(KEY, jnp.asarray(x))
    given = {"optimizer": optax.adam(0.02), "key": KEY, "batch_size": BATCH, "progress": False}
    if "epochs" not in options:
        given["steps"] = 8
    given |= options
    data = fnbp.Batches(x, y, given.pop("batch_size"), given.pop("drop_last", False), given.pop("augment", None))
    if "metrics" in given:
        x, y = given["validation"]
        given["validation"] = fnbp.Validation(x, y, given.pop("metrics"))
    return fnbp.fit(net, loss, params, state, data, **given)


# --- the partial batch ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_examples_that_do_not_count_change_neither_loss_nor_gradient(x64, name, masked):
    loss, shape, y = LOSSES[name]
    p, y, r = jnp.asarray(RNG.standard_normal(shape)), jnp.asarray(y), 11
    mask = jnp.asarray(RNG.random(shape[:2]) > 0.3) if masked else None
    if masked and (not loss.takes_mask or len(shape) < 3):
        return
    counts = jnp.arange(M) < r
    given = () if mask is None else (mask,)
    few = () if mask is None else (mask[:r],)
    losses, res = counting_some(loss).forward(p, (y, counts), *given)
    due, due_res = loss.forward(p[:r], y[:r], *few)
    np.testing.assert_allclose(losses.mean(), due.mean(), rtol=1e-13)
    dp, due_dp = counting_some(loss).backward(res) / M, loss.backward(due_res) / r
    np.testing.assert_allclose(dp[:r], due_dp, rtol=1e-12, atol=1e-16)
    assert not np.any(dp[r:])


@pytest.mark.parametrize("reduce", ["examples", "tokens"])
def test_targets_of_positions_are_checked_where_they_count(reduce):
    p, y = RNG.standard_normal((M, 6, 4)), RNG.integers(0, 4, (M, 6))
    y[-1, 2] = 9
    loss, counts = fnbp.softmax_cross_entropy(reduce=reduce), np.arange(M) < M - 1
    if reduce == "tokens":
        counting_some(loss).forward(jnp.asarray(p), (jnp.asarray(y), jnp.asarray(counts)))
    with pytest.raises(ValueError, match=r"label 9 at index \[16, 2\] is outside 0\.\.3"):
        counting_some(loss).forward(jnp.asarray(p), (jnp.asarray(y), jnp.ones(M, bool)))


@pytest.mark.parametrize("loss", [CE, fnbp.softmax_cross_entropy(reduce="tokens")], ids=["examples", "tokens"])
def test_the_last_batch_is_the_mean_over_the_examples_that_are_left(loss):
    """The loop by hand, over batches of 5, 5, 5 and 2."""
    params, state = NET.init(KEY, X)
    optimizer = optax.adam(0.02)
    opt_state, gradient, losses = optimizer.init(params), jax.jit(fnbp.value_and_grad(NET, loss)), []
    key_order, _ = jax.random.split(KEY)
    for epoch in range(3):
        order = np.asarray(fnbp.training.loop.permutation(key_order, epoch, M))
        for rows in np.split(order, [5, 10, 15]):
            (J, state), grads = gradient(params, state, X[rows], Y[rows])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params, losses = optax.apply_updates(params, updates), [*losses, float(J)]
    found = fit(loss=loss, epochs=3)
    assert found.step == len(losses) == 12
    np.testing.assert_allclose(found.history.loss, losses, rtol=1e-5)
    assert relative(found.params, params) <= 1e-5


def test_the_last_batch_is_left_out_on_request():
    assert (fit(epochs=3, drop_last=True).step, fit(epochs=3).step) == (9, 12)
    whole = {"batch_size": 17, "epochs": 2}
    assert np.array_equal(fit(**whole).history.loss, fit(**whole, drop_last=True).history.loss)


def test_every_example_is_seen_once_an_epoch():
    """Of one-hot inputs to a net without bias, the squared error tells by the first step's gradient which were seen."""
    x, y = np.eye(M, dtype=np.float32), np.ones((M, 1), np.float32)
    net = fnbp.dense(1, W="zeros", b=None)
    found = fit(net, fnbp.mean_squared_error(), x, y, optimizer=optax.sgd(1e-3), epochs=1)
    moved = np.asarray(found.params["W"])[0]
    assert (moved > 0).all()
    np.testing.assert_allclose(np.sort(moved)[:15], 2e-3 / 5, rtol=1e-3)  # three batches of 5
    np.testing.assert_allclose(np.sort(moved)[15:], 2e-3 / 2, rtol=1e-3)  # and one of 2


def test_batch_norm_sees_real_examples_only():
    net = fnbp.serial(fnbp.dense(3), fnbp.batch_norm(), fnbp.dense(4))
    found = fit(net, epochs=2)
    assert np.isfinite(found.history.loss).all() and found.step == 8
    assert float(jnp.abs(found.state[1]["mean"]).max()) < 10


def test_ragged_sequences_in_a_partial_batch():
    net = fnbp.ragged(fnbp.serial(fnbp.scan(fnbp.rnn_cell(5)), fnbp.dense(4)))
    lengths = RNG.integers(0, 7, M)
    x, y = (RNG.standard_normal((M, 6, 3)).astype(np.float32), lengths), RNG.integers(0, 4, (M, 6))
    params, state = net.init(KEY, jax.tree.map(jnp.asarray, x))
    options = {"optimizer": optax.sgd(0.1), "key": KEY, "batch_size": BATCH, "epochs": 2, "progress": False}
    for loss in (fnbp.softmax_cross_entropy(), fnbp.softmax_cross_entropy(reduce="tokens")):
        found = fnbp.fit(net, loss, params, state, x, y, **options)
        assert np.isfinite(found.history.loss).all() and found.step == 8


# --- augmentation ---


def shifted(key, batch):
    x, y = batch
    return x + jax.random.normal(key, x.shape), y


def test_augmentation_is_drawn_for_each_step():
    net = fnbp.serial(fnbp.dense(4, W="zeros"))

    def seen(net, loss):
        right = fnbp.value_and_grad(net, loss)

        def run(params, state, x, y, ctx):
            (J, state), grads = right(params, state, x, y, ctx)
            return (J, state, x[0, 0]), grads

        return run

    found = fit(net, batch_size=M, steps=4, augment=shifted, gradient=seen, record={"x": lambda step: step.more})
    first = found.history.recorded["x"]
    assert len(set(first.tolist())) == 4
    again = fit(net, batch_size=M, steps=4, augment=shifted, gradient=seen, record={"x": lambda step: step.more})
    assert np.array_equal(first, again.history.recorded["x"])
    plain = fit(net, batch_size=M, steps=4, gradient=seen, record={"x": lambda step: step.more})
    assert set(plain.history.recorded["x"].tolist()) <= set(X[:, 0].tolist())


def test_augmentation_draws_apart_from_the_layers():
    """The keys of the layers are folded from the step's key by their place: none is that of augment."""
    seen = []

    def kept(key, batch):
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data))), jax.random.key_data(key))
        return batch

    def noisy(i):
        def forward(params, state, x, ctx):
            if ctx.key is not None:
                jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data))), jax.random.key_data(ctx.key))
            return x, state, ()

        return fnbp.Layer(lambda key, x: ({}, {}), forward, lambda params, res, dy: ({}, dy), f"noisy{i}")

    fit(fnbp.serial(*map(noisy, range(4)), fnbp.dense(4)), batch_size=M, steps=3, augment=kept)
    jax.effects_barrier()
    assert len(seen) >= 15 and len(set(seen)) == 15


def test_augmentation_may_make_what_the_net_takes():
    """uint8 images and labels become floating point images and soft labels, on the device."""
    pixels = RNG.integers(0, 256, (M, 3)).astype(np.uint8)
    net = fnbp.dense(4)
    params, state = net.init(KEY, jnp.zeros((1, 3)))

    def augment(key, batch):
        x, y = batch
        return x.astype(jnp.float32) / 255, 0.9 * jax.nn.one_hot(y, 4) + 0.025

    options = {"optimizer": optax.sgd(0.1), "key": KEY, "steps": 5, "progress": False}
    data = fnbp.Batches(pixels, Y, BATCH, augment=augment)
    found = fnbp.fit(net, CE, params, state, data, **options)
    assert np.isfinite(found.history.loss).all()


# --- what is recorded and measured ---


def test_norms_and_the_learning_rate_are_recorded_step_by_step():
    rate = optax.linear_schedule(0.1, 0.0, 8)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    record = [fnbp.gradient_norm, fnbp.update_norm, fnbp.learning_rate]
    found = fit(batch_size=M, optimizer=optimizer, record=record).history.recorded
    np.testing.assert_allclose(found["learning_rate"], [rate(i) for i in range(8)], rtol=1e-6)
    np.testing.assert_allclose(found["update_norm"], found["learning_rate"] * found["gradient_norm"], rtol=1e-5)
    params, state = NET.init(KEY, X)
    _, grads = fnbp.value_and_grad(NET, CE)(params, state, X, Y)
    np.testing.assert_allclose(found["gradient_norm"][0], optax.tree.norm(grads), rtol=1e-5)


def test_recording_changes_no_bit_of_the_training():
    plain, seen = fit(), fit(record=fnbp.gradient_norm)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain[:3]), jax.tree.leaves(seen[:3]), strict=True))


def test_metrics_are_measured_with_each_validation():
    found = fit(epochs=3, validation=(X, Y), metrics=[fnbp.accuracy(), fnbp.confusion(4)])
    due = fnbp.evaluate(NET, CE, found.params, found.state, X, Y, metrics=[fnbp.accuracy(), fnbp.confusion(4)])
    history = found.history
    assert history.metrics["accuracy"].shape == (3,) and history.metrics["confusion"].shape == (3, 4, 4)
    assert history.metrics["accuracy"][-1] == pytest.approx(due["accuracy"])
    np.testing.assert_array_equal(history.metrics["confusion"][-1], due["confusion"])
    assert list(history.validations()) == ["step", "loss", "accuracy"]


def test_a_history_is_json():
    history = fit(epochs=2, validation=(X, Y), metrics=fnbp.accuracy(), record=fnbp.gradient_norm).history
    back = json.loads(json.dumps(history.to_dict()))
    np.testing.assert_array_equal(back["loss"], history.loss)
    assert back["metrics"]["accuracy"] == history.metrics["accuracy"].tolist()
    assert len(back["recorded"]["gradient_norm"]) == len(history.steps()["gradient_norm"]) == 8
    broken = history._replace(loss=np.array([1.0, np.nan]))
    assert json.loads(json.dumps(broken.to_dict()))["loss"] == [1.0, None]


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"augment": 3}, TypeError, "fit: augment must be a function"),
        ({"augment": lambda key, batch: batch[0]}, TypeError, r"augment must return \(x, y\)"),
        ({"augment": lambda key, batch: (batch[0][:2], batch[1])}, ValueError, "as many examples as it is given, 17"),
        ({"augment": lambda key, batch: (batch[0].astype(int), batch[1])}, TypeError, r"dense\(6\)"),
        ({"drop_last": 1}, TypeError, "fit: drop_last must be a bool"),
        ({"metrics": 3, "validation": (X, Y)}, TypeError, "fit: a metric must be a Metric"),
        ({"record": 3}, TypeError, "record takes functions of a Step"),
        ({"record": {"loss": fnbp.gradient_norm}}, ValueError, "none of them loss"),
        ({"record": [fnbp.gradient_norm] * 2}, ValueError, "must have different names"),
        ({"record": lambda step: step.grads[0]["W"]}, ValueError, "record <lambda> must return a real number"),
        ({"record": fnbp.learning_rate}, ValueError, "holds 0 learning rates, expected 1"),
    ],
)
def test_what_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        fit(**options)


@pytest.mark.parametrize(
    "data, options, error, text",
    [
        ((X,), {"batch_size": 5}, TypeError, r"y is missing; give x and y, or Batches\(x, y, size\)"),
        (([(X, Y)],), {"batch_size": 5}, TypeError, "y is missing; .* got x a list of 1"),
        ((fnbp.Batches,), {}, TypeError, r"x is the class Batches; call it: Batches\(x, y, size\)"),
        ((X, Y), {}, TypeError, "batch_size is missing; give it beside x and y, or give Batches"),
        ((fnbp.Batches(X, Y, 5), Y), {}, ValueError, "Batches holds y and the batch size"),
        ((fnbp.Batches(X, Y, 5),), {"batch_size": 5}, ValueError, "Batches holds y and the batch size"),
        ((fnbp.Batches(X, Y, 0),), {}, ValueError, "fit: batch_size must be at least 1"),
        ((X, Y), {"batch_size": 5, "validation": X}, TypeError, r"validation must be a pair \(x, y\), or Validation"),
    ],
)
def test_data_that_are_given_wrongly(data, options, error, text):
    params, state = NET.init(KEY, X)
    with pytest.raises(error, match=text):
        fnbp.fit(NET, CE, params, state, *data, optimizer=optax.adam(0.1), key=KEY, steps=1, **options)
