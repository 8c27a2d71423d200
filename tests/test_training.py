"""fit: the same steps as a loop by hand, every way to stop, resuming, and what is refused."""

import functools
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import fnbp
import fnbp.training.drive
import fnbp.training.evaluation
import fnbp.training.fit
import fnbp.training.loop
import fnbp.training.progress
from tests.cases import relative

LOSS = fnbp.softmax_cross_entropy()
M, BATCH, BATCHES = 37, 5, 7
KEY = jax.random.key(11)
rng = np.random.default_rng(0)
X = rng.standard_normal((M, 3)).astype(np.float32)
Y = rng.integers(0, 2, M) + (X[:, 0] > 0)
VALID = rng.standard_normal((13, 3)).astype(np.float32), rng.integers(0, 3, 13)


@pytest.fixture(scope="module", autouse=True)
def compiled_before(tmp_path_factory):
    """The same loop again, as most tests run it, comes out of a cache: a loop takes a second to compile."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch):
    """Calls of 1, 2, 4, 8 ... steps, however slow the machine."""
    monkeypatch.setattr(fnbp.training.drive, "CALL_SECONDS", 1e9)


def noisy():
    """Adds noise in training, and counts its calls there."""

    def forward(params, state, x, ctx):
        if not ctx.train:
            return x, state, ()
        return x + 0.1 * jax.random.normal(ctx.key, x.shape, x.dtype), {"n": state["n"] + 1}, ()

    return fnbp.Layer(lambda key, x: ({}, {"n": 0}), forward, lambda params, res, dy: ({}, dy), "noisy")


NET = fnbp.serial(fnbp.dense(5), fnbp.tanh(), noisy(), fnbp.dense(3))
PARAMS = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2,
    jax.eval_shape(NET.init, jax.random.key(0), X)[0],
)
STATE = ({}, {}, {"n": 0}, {})


def fit(net=NET, loss=LOSS, params=PARAMS, state=STATE, x=X, y=Y, **options):
    given = {"optimizer": optax.adam(0.02), "key": KEY, "batch_size": BATCH, "progress": False}
    given |= options
    data = fnbp.Batches(x, y, given.pop("batch_size"), drop_last=True)  # M examples are BATCHES batches
    return fnbp.fit(net, loss, params, state, data, **given)


@functools.cache
def plain(steps):
    """An uninterrupted run."""
    return fit(steps=steps)


def same(one, other):
    """Bit by bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all((np.asarray(a) == b).all() for a, b in pairs)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def broken_at(step):
    """A descent whose update of that step, counted from 0, is infinite; its counter starts where that is the 100th."""
    schedule = optax.scale_by_schedule(lambda count: jnp.where(count == 100, jnp.inf, 1.0))
    optimizer = optax.chain(optax.sgd(0.1), schedule)
    state: Any = optimizer.init(PARAMS)
    descent, counter = state
    return {"optimizer": optimizer, "opt_state": (descent, counter._replace(count=jnp.int32(100 - step)))}


def test_fit_is_the_loop_by_hand():
    steps = 3 * BATCHES
    optimizer = optax.adam(0.02)
    gradient = fnbp.value_and_grad(NET, LOSS)

    @jax.jit
    def step(params, state, opt_state, x, y, key):
        (value, state), grads = gradient(params, state, x, y, fnbp.Context(key, train=True))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    key_order, key_layers = jax.random.split(KEY)
    params, state, opt_state, losses = PARAMS, STATE, optimizer.init(PARAMS), []
    for i in range(steps):
        epoch, batch = divmod(i, BATCHES)
        order = np.asarray(fnbp.training.loop.permutation(key_order, epoch, M))
        assert sorted(order) == list(range(M))
        rows = order[BATCH * batch : BATCH * (batch + 1)]
        key = jax.random.fold_in(key_layers, i)
        params, state, opt_state, value = step(params, state, opt_state, X[rows], Y[rows], key)
        losses.append(value)

    found = plain(steps)
    assert relative(found.params, params) <= 1e-6
    assert relative(found.opt_state, opt_state) <= 1e-6
    assert relative(found.history.loss, np.asarray(losses)) <= 1e-6
    assert int(found.state[2]["n"]) == found.step == steps
    assert found.history.loss.shape == (steps,) and found.history.seconds > 0
    assert (found.stopped, found.best) == ("steps", None)
    assert found.message == f"all 21 steps done, the last loss is {losses[-1]:.6g}"
    assert found.history.validation_step.shape == found.history.validation_loss.shape == (0,)


def test_each_epoch_has_an_order_of_its_own():
    orders = [tuple(np.asarray(fnbp.training.loop.permutation(KEY, epoch, M))) for epoch in range(5)]
    assert len(set(orders)) == 5


def test_fit_in_float64():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMS)
        found = fit(params=wide, x=X.astype(np.float64), steps=9)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float64)}
    assert found.history.loss.dtype == np.float64 and np.isfinite(found.history.loss).all()
    assert found.stopped == "steps" and len(found.history.loss) == 9


def test_fit_reduces_the_loss():
    losses = fit(steps=150).history.loss
    assert losses[-BATCHES:].mean() < 0.8 * losses[:BATCHES].mean()


def test_epochs_are_steps():
    found = fit(epochs=3)
    assert found.step == 3 * BATCHES and same(found.params, plain(3 * BATCHES).params)


def test_another_key_is_another_run():
    assert not same(fit(steps=21, key=jax.random.key(12)).params, plain(21).params)


def test_the_threshold_stops_at_the_first_loss_at_most_it():
    losses = plain(21).history.loss
    threshold = float(np.sort(losses)[3])
    first = int(np.argmax(losses <= threshold))
    assert first > 2, "some steps come before"
    found = fit(steps=1000, threshold=threshold)
    assert (found.stopped, found.step) == ("threshold", first + 1)
    assert same(found.history.loss, losses[: first + 1])
    assert same(found.params, fit(steps=first + 1).params)
    shown = f"{losses[first]:.6g}, at most the threshold {threshold:.6g}"
    assert found.message == f"the loss of step {first + 1} is {shown}"


def test_a_threshold_that_is_not_reached_does_not_stop():
    found = fit(steps=21, threshold=float(plain(21).history.loss.min()) - 1e-3)
    assert found.stopped == "steps" and same(found.params, plain(21).params)


def scripted(monkeypatch, values):
    """Validation losses by script."""
    values = iter(values)
    monkeypatch.setattr(fnbp.training.prepare, "validation_of", lambda *args: lambda *_: {"loss": next(values)})


def test_patience_stops_after_so_many_validations_without_a_new_least(monkeypatch):
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])  # an equal loss is no new least one
    found = fit(epochs=50, validation=VALID, patience=2)
    assert (found.stopped, found.step) == ("patience", 4 * BATCHES)
    assert found.history.validation_loss.tolist() == [3, 2, 2.5, 2]
    assert found.history.validation_step.tolist() == [7, 14, 21, 28]
    assert (found.best.step, found.best.loss) == (2 * BATCHES, 2)
    assert same(found.best.params, plain(2 * BATCHES).params) and int(found.best.state[2]["n"]) == 2 * BATCHES
    assert same(found.params, plain(4 * BATCHES).params)
    assert found.message == "no new least validation loss in 2 validations, at step 28"


def test_patience_starts_anew_with_each_new_least(monkeypatch):
    scripted(monkeypatch, [5.0, 6.0, 4.0, 4.5, 3.0, 3.5, 2.5])
    found = fit(steps=45, validation=VALID, patience=2)
    assert (found.stopped, found.step, found.best.step) == ("steps", 45, 45)
    assert found.history.validation_step.tolist() == [7, 14, 21, 28, 35, 42, 45]


def test_the_epoch_that_reaches_the_threshold_is_measured_too_and_the_threshold_is_why_it_stopped(monkeypatch):
    scripted(monkeypatch, [float("nan")])
    found = fit(steps=9, batch_size=M, optimizer=optax.sgd(0.0), validation=VALID, patience=1, threshold=100.0)
    assert (found.stopped, found.step) == ("threshold", 1)
    assert found.history.validation_step.tolist() == [1]


def test_without_patience_validation_stops_nothing(monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    found = fit(epochs=3, validation=VALID)
    assert (found.stopped, found.best.step) == ("steps", BATCHES)


def test_validation_is_the_mean_loss_out_of_training():
    found = fit(epochs=2, validation=VALID)
    x, y = VALID
    for params, measured in ((found.best.params, found.best.loss), (found.params, found.history.validation_loss[-1])):
        prediction = NET.forward(params, STATE, jnp.asarray(x), fnbp.Context())[0]
        np.testing.assert_allclose(measured, np.mean(LOSS.forward(prediction, jnp.asarray(y))[0]), rtol=1e-6)
    assert found.best.loss == min(found.history.validation_loss)
    assert isinstance(found.best.loss, float)


@pytest.mark.parametrize("examples", [3, 11, 22, 25])
def test_validation_in_batches_is_the_mean_of_the_whole(monkeypatch, examples):
    monkeypatch.setattr(fnbp.training.evaluation, "BATCH", 11)
    loss = fnbp.mean_squared_error()
    x, y = X[:examples], X[:examples, :2]
    net = fnbp.stateless(lambda key, x: {}, lambda params, x: (x[:, 1:], ()), lambda p, res, dy: ({}, dy), "cut")
    measured = fnbp.training.evaluation.validation_of(net, loss, {}, x, y)({}, {})["loss"]
    np.testing.assert_allclose(measured, np.mean((x[:, 1:] - y) ** 2), rtol=1e-6)


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_that_is_not_finite_hands_back_the_last_finite_params(step):
    found = fit(steps=1000, **broken_at(step))
    before = fit(steps=step, **broken_at(step)) if step else None
    assert (found.stopped, found.step) == ("non-finite", step)
    assert all_finite((found.params, found.state, found.opt_state))
    assert same(found.params, before.params if before else PARAMS)
    assert int(found.state[2]["n"]) == step
    losses = found.history.loss
    if step:  # the loss of the next step tells
        assert len(losses) == step + 2 and np.isfinite(losses[:-1]).all() and np.isnan(losses[-1])
    else:  # the first call is of one step: the params tell
        assert len(losses) == 1 and np.isfinite(losses).all()
    cause = "its loss is nan" if step else "its update is not"
    assert found.message == f"step {len(losses)} is not finite, {cause}; these parameters are of step {step}"


def test_an_infinite_loss_stops_before_the_step_that_had_it():
    net, loss = fnbp.serial(fnbp.dense(1)), fnbp.mean_squared_error()
    params, state = ({"W": np.ones((1, 3), np.float32), "b": np.zeros(1, np.float32)},), ({},)
    order = np.asarray(fnbp.training.loop.permutation(jax.random.split(KEY)[0], 0, M))
    y = X[:, :1].copy()
    y[order[5 * BATCH]] = 1e30  # its square overflows, its gradient does not
    found = fit(net, loss, params=params, state=state, y=y, steps=28, optimizer=optax.sgd(1e-3))
    assert (found.stopped, found.step) == ("non-finite", 5)
    assert found.message == "step 6 is not finite, its loss is inf; these parameters are of step 5"
    assert np.isfinite(found.history.loss[:5]).all() and found.history.loss[5:].tolist() == [np.inf]


def test_params_that_end_non_finite_on_the_last_step_are_caught():
    found = fit(steps=12, **broken_at(11))
    assert (found.stopped, found.step) == ("non-finite", 11)
    assert all_finite(found.params) and np.isfinite(found.history.loss).all() and len(found.history.loss) == 12
    assert found.message == "step 12 is not finite, its update is not; these parameters are of step 11"
    again = fit(steps=9, params=found.params, state=found.state, opt_state=optax.sgd(0.1).init(PARAMS), start=11,
                optimizer=optax.sgd(0.1))  # fmt: skip
    assert again.stopped == "steps"


def test_a_state_that_overflows_while_the_loss_is_finite_is_caught_where_it_does():
    def forward(params, state, x, ctx):
        return x, {"n": state["n"] * 10}, ()

    growing = fnbp.Layer(NET.init, forward, lambda params, res, dy: ({}, dy), "growing")
    net = fnbp.serial(fnbp.dense(3), growing)
    params, state = (
        ({"W": np.eye(3, dtype=np.float32), "b": np.zeros(3, np.float32)}, {}),
        ({}, {"n": np.float32(1e30)}),
    )
    found = fit(net, params=params, state=state, steps=31)
    assert (found.stopped, found.step) == ("non-finite", 8)
    np.testing.assert_allclose(found.state[1]["n"], 1e38, rtol=1e-5)


def press_at(step, times=1):
    left = [times]

    def callback(reached, loss):
        while reached >= step and left[0]:
            left[0] -= 1
            signal.raise_signal(signal.SIGINT)

    return callback


def test_ctrl_c_hands_back_what_was_reached_and_restores_the_handler():
    found = fit(steps=100_000, callback=press_at(3))
    assert found.stopped == "interrupt" and 3 <= found.step < 100_000
    assert len(found.history.loss) == found.step == int(found.state[2]["n"])
    assert found.message == f"interrupted after step {found.step}"
    assert same(found.params, fit(steps=found.step).params)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_raises_and_the_handler_is_restored():
    with pytest.raises(KeyboardInterrupt):
        fit(steps=1000, callback=press_at(1, times=2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_left_alone():
    heard = []
    mine = lambda signum, frame: heard.append(signum)  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    found = fit(steps=3, callback=press_at(1))
    assert found.stopped == "steps" and heard and set(heard) == {signal.SIGINT}
    assert signal.getsignal(signal.SIGINT) is mine


def test_fit_runs_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(steps=21)))
    thread.start()
    thread.join()
    assert same(found[0].params, plain(21).params)


@pytest.mark.parametrize("middle", [10, 2 * BATCHES], ids=["within_an_epoch", "between_epochs"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(middle):
    first = plain(middle)
    second = fit(params=first.params, state=first.state, opt_state=first.opt_state, start=first.step, steps=28 - middle)
    whole = plain(28)
    assert second.step == 28
    assert same((second.params, second.state, second.opt_state), (whole.params, whole.state, whole.opt_state))
    assert same(np.concatenate([first.history.loss, second.history.loss]), whole.history.loss)
    assert second.message.startswith(f"all {28 - middle} steps done")


def test_the_state_of_another_optimizer_or_net_is_refused():
    other = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"another optimizer or net: expected \(TraceState, EmptyState\), got \(ScaleByAdam"
    ):
        fit(optimizer=optax.sgd(0.1, momentum=0.9), opt_state=other, steps=1)
    wider = optax.adam(1e-3).init(jax.tree.map(lambda a: jnp.concatenate([a, a], -1), PARAMS))
    with pytest.raises(ValueError, match=r"belongs to other params: an entry must have shape \(.*\), got \("):
        fit(optimizer=optax.adam(1e-3), opt_state=wider, steps=1)


def test_a_resumed_run_counts_epochs_and_validations_from_its_start():
    first = plain(10)
    found = fit(params=first.params, state=first.state, opt_state=first.opt_state, start=10, epochs=1, validation=VALID)
    assert found.step == 10 + BATCHES and len(found.history.loss) == BATCHES
    assert found.history.validation_step.tolist() == [14, 17]


def captured(monkeypatch):
    """The compiled loops that fit makes; (first step, limit) of each call, which must consume what it is given."""
    make, loops, calls = fnbp.training.prepare.compiled_loop, [], []

    def capture(*args):
        loop = make(*args)
        loops.append(loop)

        def run(carry, order, data, limit, threshold):
            calls.append((int(carry.step), int(limit)))
            out = loop(carry, order, data, limit, threshold)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((carry, order)))
            return out

        return run

    monkeypatch.setattr(fnbp.training.prepare, "compiled_loop", capture)
    return loops, calls


def test_the_loop_is_compiled_once(monkeypatch):
    loops, calls = captured(monkeypatch)
    traced = []

    def counted(net, loss):
        gradient = fnbp.value_and_grad(net, loss)

        def run(*args):
            traced.append(len(calls))
            return gradient(*args)

        return run

    found = fit(steps=100, validation=VALID, threshold=-1.0, gradient=counted, **broken_at(60))
    assert found.stopped == "non-finite" and len(calls) > 10
    assert len(loops) == 1 and set(traced) == {1}  # all of it was traced in the first call


def test_a_call_runs_no_more_steps_than_there_is_room_for_losses(monkeypatch):
    monkeypatch.setattr(fnbp.training.prepare, "CAPACITY", 4)
    monkeypatch.setattr(fnbp.training.drive, "CAPACITY", 4)
    _, calls = captured(monkeypatch)
    found = fit(steps=21)
    assert calls == [(0, 1), (1, 3), (3, 7), (7, 11), (11, 15), (15, 19), (19, 21)]
    assert same(found.params, plain(21).params) and same(found.history.loss, plain(21).history.loss)


def test_a_slow_call_is_not_made_longer(monkeypatch):
    monkeypatch.setattr(fnbp.training.drive, "CALL_SECONDS", 0)
    _, calls = captured(monkeypatch)
    fit(steps=4)
    assert calls == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_the_callback_hears_the_step_and_its_loss_between_calls():
    heard = []
    losses = fit(steps=21, callback=lambda step, loss: heard.append((step, loss))).history.loss
    assert heard == [(step, losses[step - 1]) for step in (1, 3, 7, 15, 21)]


def test_on_epoch_sees_the_fit_so_far_after_each_epoch():
    seen = []
    last = fit(steps=17, on_epoch=seen.append, validation=VALID)
    assert [found.step for found in seen] == [7, 14, 17]
    for found in seen[:2]:
        assert same(found[:3], plain(found.step)[:3]), "it is of that step still when training is over"
        assert found.history.validation_step.tolist() == [7, 14][: found.step // 7]
        assert same(found.history.loss, last.history.loss[: found.step])
        again = fit(params=found.params, state=found.state, resume=found, steps=17 - found.step)
        assert same(again[:3], last[:3])


def test_on_epoch_may_ask_for_the_end():
    found = fit(steps=100, on_epoch=lambda so_far: np.bool_(so_far.step >= 14))
    assert (found.stopped, found.step, found.message) == ("asked", 14, "on_epoch asked for the end, at step 14")
    assert same(found[:3], plain(14)[:3])


def test_manual_and_automatic_gradients_train_alike():
    automatic = fit(steps=21, gradient=fnbp.automatic_value_and_grad)
    np.testing.assert_allclose(automatic.history.loss, plain(21).history.loss, rtol=1e-5)


def test_the_gradient_is_the_one_given():
    def still(net, loss):
        right = fnbp.value_and_grad(net, loss)
        return lambda *args: (lambda out: (out[0], jax.tree.map(jnp.zeros_like, out[1])))(right(*args))

    assert same(fit(steps=3, gradient=still).params, PARAMS)


def test_what_the_user_gave_is_not_donated_away():
    given = jax.tree.map(jnp.asarray, (PARAMS, STATE, optax.adam(0.02).init(PARAMS), X, Y))
    params, state, opt_state, x, y = given
    found = fit(params=params, state=state, opt_state=opt_state, x=x, y=y, steps=21, validation=VALID)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((given, KEY)))
    assert same(params, PARAMS)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((found.params, found.opt_state, found.best.params)))
    assert same(found.params, plain(21).params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.contrib.schedule_free_adamw(0.05, b1=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2, momentum=0.9, nesterov=True)),
    ],
    ids=["schedule_free", "clipped_momentum"],
)
def test_any_optax_transformation_works(optimizer):
    found = fit(steps=60, batch_size=M, optimizer=optimizer)
    assert found.stopped == "steps" and found.history.loss[-1] < 0.9 * found.history.loss[0]


def test_an_optimizer_is_told_value_gradient_and_value_function():
    def update(updates, state, params, *, value, grad, value_fn, **_):
        zeros = optax.tree.zeros_like(params)
        gap = jnp.abs(value_fn(params) - value) + jnp.abs(value_fn(zeros) - np.log(3))
        alike = optax.tree.norm(optax.tree.sub(grad, updates))
        return optax.tree.scale(-0.1, updates), (jnp.maximum(state[0], gap), jnp.maximum(state[1], alike), value)

    spy = optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), jnp.zeros(()), jnp.ones(())), update)
    found = fit(steps=5, optimizer=spy)
    gap, alike, value = found.opt_state
    assert gap <= 1e-6 and alike == 0 and value == found.history.loss[-1]


def test_reduce_on_plateau_follows_the_loss():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=100))
    found = fit(steps=21, optimizer=optimizer)
    assert found.opt_state[1].best_value == found.history.loss.min()


def test_layers_are_in_training_with_another_key_every_step():
    losses = fit(steps=13, batch_size=M, optimizer=optax.sgd(0.0)).history.loss
    gaps = np.diff(np.sort(losses))
    assert gaps.min() > 1e-6, "the same data and params, so only the noise differs"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"net": fnbp.tanh}, TypeError, r"fit: net must be a Layer, got function tanh; call it: tanh\(\)"),
        ({"loss": "mse"}, TypeError, "fit: loss must be a Loss, got str 'mse'"),
        ({"optimizer": optax.adam}, TypeError, r"fit: optimizer must be a GradientTransformation.*call it: adam\(\)"),
        ({"batch_size": 38}, ValueError, "fit: batch_size 38 is more than the 37 examples"),
        ({"batch_size": 0}, ValueError, "fit: batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "fit: batch_size must be a whole number, got 2.5"),
        ({"epochs": 3}, ValueError, "fit: give steps or epochs, one of the two"),
        ({"steps": None}, ValueError, "fit: give steps or epochs, one of the two"),
        ({"steps": 0}, ValueError, "fit: steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "fit: steps must be a whole number, got 2.5"),
        ({"steps": None, "epochs": 0}, ValueError, "fit: epochs must be at least 1, got 0"),
        ({"start": -1}, ValueError, "fit: start must be at least 0, got -1"),
        ({"patience": 3}, ValueError, r"fit: patience needs validation=\(x, y\)"),
        ({"patience": 0, "validation": VALID}, ValueError, "fit: patience must be at least 1, got 0"),
        ({"key": 0}, TypeError, r"fit: expected a random key, e.g. jax.random.key\(0\); got int 0"),
        ({"x": X[:36]}, ValueError, r"fit: training data need equally many.*, at least 1; got \[\(36,\), \(37,\)\]"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, r"training data need equally many examples, at least 1; got \[\(0,\)\]"),
        ({"y": 1}, ValueError, r"training data need equally many examples, at least 1; got \[\(\), \(37,\)\]"),
        ({"y": Y + 1}, ValueError, r"softmax_cross_entropy: label 3 at index \[\d+\] is outside 0..2"),
        ({"y": Y - 1}, ValueError, r"softmax_cross_entropy: label -1 at index"),
        ({"y": Y.astype(np.float32)}, TypeError, "softmax_cross_entropy: labels must be integers, got float32"),
        ({"y": Y[:, None]}, ValueError, r"target has shape \(37, 1\); prediction of shape \(37, 3\)"),
        ({"x": X[:, :2]}, ValueError, r"dense\(5\): params\['W'\] has shape \(5, 3\), x of shape \(37, 2\)"),
        ({"params": PARAMS[:3]}, ValueError, "serial: params must have 4 entries, one for each layer, got 3"),
        ({"validation": (VALID[0], VALID[1][:7])}, ValueError, r"validation data need equal.*\[\(7,\), \(13,\)\]"),
        ({"validation": (VALID[0][:, :2], VALID[1])}, ValueError, r"x of shape \(13, 2\) needs \(5, 2\)"),
        ({"validation": (VALID[0], VALID[1] + 1)}, ValueError, "label 3 at index"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_training(monkeypatch, options, error, words):
    monkeypatch.setattr(fnbp.training.fit, "drive", lambda *args: pytest.fail("training began"))
    with pytest.raises(error, match=words):
        fit(**({"steps": 3} | options))


@pytest.mark.parametrize("what", ["x", "y", "params", "validation x", "validation y"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_data_are_refused_before_training(monkeypatch, what, bad):
    monkeypatch.setattr(fnbp.training.fit, "drive", lambda *args: pytest.fail("training began"))
    given = {
        "x": X.copy(),
        "y": X.copy(),
        "params": np.ones((5, 3)),
        "validation x": X.copy(),
        "validation y": X.copy(),
    }
    given[what][4, 1] = bad
    name = {"x": "training data: x", "y": "training data: y"}.get(what, what.replace("validation", "validation data:"))
    words = rf"fit: {name} has 1 non-finite values, the first {bad} at index \(4, 1\)"
    params = ({"W": given["params"], "b": PARAMS[0]["b"]}, *PARAMS[1:])
    validation = given["validation x"], given["validation y"]
    with pytest.raises(ValueError, match=words):
        fit(
            loss=fnbp.mean_squared_error(),
            params=params,
            x=given["x"],
            y=given["y"],
            validation=validation,
            steps=3,
        )


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_told_step_and_loss_and_is_hidden_on_demand(monkeypatch, progress):
    told = []

    class Bar:
        def __init__(self, *columns, disable):
            told.append(disable)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def add_task(self, name, total, rate):
            told.append(total)

        def update(self, task, **fields):
            told.append((fields["completed"], fields["description"]))

    monkeypatch.setattr(fnbp.training.progress, "Progress", Bar)
    scripted(monkeypatch, [0.25, 0.125])
    losses = fit(steps=9, start=5, progress=progress, validation=VALID).history.loss
    assert told[:2] == [not progress, 9]
    assert told[2] == (1, f"loss {losses[0]:.4f}")
    assert told[-1] == (9, f"loss {losses[-1]:.4f} validation 0.1250")


@pytest.mark.parametrize("threshold", [float("inf"), 3e38, 100])
def test_a_threshold_that_any_loss_meets_stops_at_the_first_step(threshold):
    found = fit(steps=3, threshold=threshold)
    assert (found.stopped, found.step) == ("threshold", 1) and same(found.params, plain(1).params)


def test_a_validation_loss_of_nan_is_never_the_best(monkeypatch):
    scripted(monkeypatch, [float("nan"), 2.0, float("nan"), 1.0, float("inf")])
    found = fit(epochs=5, validation=VALID)
    assert (found.best.loss, found.best.step) == (1.0, 4 * BATCHES)
    scripted(monkeypatch, [float("nan"), float("inf")])
    found = fit(epochs=5, validation=VALID, patience=2)
    assert (found.stopped, found.step, found.best) == ("patience", 2 * BATCHES, None)


def test_a_threshold_met_at_the_end_of_an_epoch_is_validated_still():
    found = fit(epochs=1, threshold=float("inf"), validation=VALID, batch_size=M)
    assert found.stopped == "threshold" and len(found.history.validation_loss) == 1 and found.best is not None


def test_a_negative_start_is_refused():
    with pytest.raises(ValueError, match="start must be at least 0, got -3"):
        fit(steps=2, start=-3)


def test_the_last_steps_that_a_counter_of_32_bits_has_are_made():
    found = fit(steps=9, start=2**31 - 10)
    assert (found.stopped, found.step, len(found.history.loss)) == ("steps", 2**31 - 1, 9)


def resumed(first, **options):
    return fit(params=first.params, state=first.state, resume=first, **options)


@pytest.mark.parametrize("middle", [3, 7, 10, 14])
def test_a_resumed_run_is_the_uninterrupted_one_in_every_count(middle):
    whole = fit(steps=35, validation=VALID)
    first = fit(steps=middle, validation=VALID)
    second = resumed(first, steps=35 - middle, validation=VALID)
    assert same(second[:4], whole[:4]) and (second.waited, second.least) == (whole.waited, whole.least)
    assert same(np.concatenate([first.history.loss, second.history.loss]), whole.history.loss)
    # the end of the first run is measured too, within an epoch or not
    assert same(second.best, min(first.best, whole.best, key=lambda best: best.loss))
    assert middle % BATCHES or same(second.best, whole.best)


@pytest.mark.parametrize("middle", [10, 13, 14, 20, 21, 25])
def test_patience_runs_out_at_the_same_step_wherever_a_run_was_resumed(monkeypatch, middle):
    script = {7: 3.0, 14: 2.0, 21: 2.5, 28: 2.2, 35: 2.1}  # within an epoch: 1, the least of all

    def measured(*args):
        return lambda params, state: {"loss": script.get(int(state[2]["n"]), 1.0)}

    monkeypatch.setattr(fnbp.training.prepare, "validation_of", measured)
    whole = fit(epochs=50, validation=VALID, patience=2)
    assert (whole.stopped, whole.step, whole.waited, whole.least) == ("patience", 28, 2, 2.0)
    second = resumed(fit(steps=middle, validation=VALID, patience=2), epochs=50, validation=VALID, patience=2)
    assert (second.stopped, second.step, second.waited, second.least) == ("patience", 28, 2, 2.0)
    assert same(second[:3], whole[:3]) and second.best.step == (middle if middle % BATCHES else 14)


def test_a_run_whose_patience_ran_out_goes_on_for_an_epoch_at_a_time():
    given = {"epochs": 9, "validation": VALID, "patience": 1, "optimizer": optax.sgd(0.0)}
    first = fit(**given)
    assert (first.stopped, first.step) == ("patience", 2 * BATCHES)
    second = resumed(first, **given)
    assert (second.stopped, second.step, second.waited) == ("patience", 3 * BATCHES, 2)


def test_the_step_that_is_named_is_the_first_that_is_not_finite():
    """A step's gradient is about 1e20, its square no float32: Adam would stand still from there on, its loss finite."""
    net, loss = fnbp.serial(fnbp.dense(1)), fnbp.half_squared_error()
    params, state = ({"W": np.zeros((1, 3), np.float32), "b": np.zeros(1, np.float32)},), ({},)
    order = np.asarray(fnbp.training.loop.permutation(jax.random.split(KEY)[0], 0, M))
    y = X[:, :1].copy()
    y[order[4 * BATCH]] = 1e18
    given = {"params": params, "state": state, "x": X * 1e3, "y": y, "optimizer": optax.adam(1e-3)}
    found = fit(net, loss, steps=28, **given)
    assert (found.stopped, found.step) == ("non-finite", 4) and len(found.history.loss) == 7
    assert np.isfinite(found.history.loss).all() and all_finite((found.params, found.opt_state))
    assert found.message == "step 5 is not finite, its update is not; these parameters are of step 4"


def test_what_begins_non_finite_is_refused(monkeypatch):
    monkeypatch.setattr(fnbp.training.fit, "drive", lambda *args: pytest.fail("training began"))
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf) if a.ndim else a, optax.adam(0.02).init(PARAMS))
    with pytest.raises(ValueError, match=r"fit: opt_state has \d+ non-finite values, the first inf"):
        fit(steps=3, opt_state=broken)
    with pytest.raises(ValueError, match="fit: state has 1 non-finite values, the first nan"):
        fit(steps=3, state=({}, {}, {"n": jnp.float32(jnp.nan)}, {}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient": None}, "fit: gradient must be a function, got NoneType"),
        ({"params": ("a", *PARAMS[1:])}, "fit: params must be a tree of arrays, got a leaf str 'a'"),
        ({"validation": ((row for row in X), Y)}, "fit: validation data: x must be an array, or a tree of arrays"),
    ],
)
def test_what_is_no_function_and_no_array_is_refused(options, words):
    with pytest.raises(TypeError, match=words):
        fit(steps=3, **options)


@pytest.mark.parametrize("what", ["opt_state", "validation"])
def test_an_ensemble_by_another_argument_is_refused_too(what):
    given = {"opt_state": optax.adam(0.02).init(PARAMS), "validation": VALID}[what]
    with pytest.raises(TypeError, match="cannot run under jit or vmap"):
        jax.vmap(lambda a: fit(steps=3, **{what: a}).params)(jax.tree.map(lambda a: jnp.stack([a, a]), given))


def test_a_threshold_may_be_a_scalar_of_jax():
    assert fit(steps=3, threshold=jnp.float32(100)).stopped == "threshold"


def test_transformations_of_the_same_functions_and_another_type_are_not_confused():
    def update(updates, state, params=None, **told):
        return jax.tree.map(lambda a: -a if told else a, updates), state

    init = optax.identity().init
    told, untold = optax.GradientTransformationExtraArgs(init, update), optax.GradientTransformation(init, update)
    assert told == untold
    one, other = fit(steps=1, optimizer=told), fit(steps=1, optimizer=untold)
    assert not same(one.params, other.params)


def test_a_bound_method_is_not_taken_for_what_it_was():
    class Shift:
        by = 0.0

        def __call__(self, key, batch):
            return batch[0] + self.by, batch[1]

        def method(self, key, batch):
            return self(key, batch)

    shift, losses = Shift(), []
    for by in (0.0, 1.0):
        shift.by = by
        data = fnbp.Batches(X, Y, 5, augment=shift.method)
        params, state = NET.init(KEY, X)
        done = fnbp.fit(NET, LOSS, params, state, data, optimizer=optax.sgd(0.1), key=KEY, steps=1, progress=False)
        losses.append(done.history.loss[0])
    assert losses[0] != losses[1]
