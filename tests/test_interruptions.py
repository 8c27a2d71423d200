"""Nothing that fit has computed is lost: signals and exceptions, at any moment, end in a Fit or bear one."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
import fnbp.training.drive
import fnbp.training.fit
import fnbp.training.progress
import fnbp.training.reached

SGD = optax.sgd(0.01)
LOSS = fnbp.mean_squared_error()


def task(seed=0):
    """A net of its own, so that it is compiled anew, and data."""
    net = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(3))
    rng = np.random.default_rng(seed)
    x, y = (
        jnp.asarray(rng.standard_normal((24, 4)), jnp.float32),
        jnp.asarray(rng.standard_normal((24, 3)), jnp.float32),
    )
    params, state = net.init(jax.random.key(seed), x)
    return net, LOSS, params, state, x, y


def fit(*args, **options):
    given = {"optimizer": SGD, "key": jax.random.key(0), "batch_size": 4, "steps": 2_000_000, "progress": False}
    return fnbp.fit(*args, **given | options)


def whole(found, start=0):
    """It is alive, finite, and says how far it came."""
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((found.params, found.opt_state)))
    assert found.step == start + len(found.history.loss)
    return found


def uninterrupted(args, steps, **options):
    """The same training in one piece."""
    return fit(*args, steps=steps, **options) if steps else None


def ended(args, **options):
    """What fit returned, or what its exception bears."""
    try:
        return fit(*args, **options)
    except BaseException as error:
        assert any("what was reached, until step" in note for note in error.__notes__)
        return error.fit


def kill_after(monkeypatch, seconds, number):
    """Send a signal from another thread, as the world does: so long after fit's handlers stand, and before they go."""

    def send():
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    @contextmanager
    def stoppable():
        sender = threading.Thread(target=send)
        with fnbp.training.progress.stoppable() as stop:
            sender.start()
            try:
                yield stop
            finally:
                sender.join()

    monkeypatch.setattr(fnbp.training.fit, "stoppable", stoppable)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminated")])
def test_a_signal_before_the_first_step_ends_in_a_fit(number, word):
    def at_once(path, layer):
        return layer._replace(forward=lambda *args: (os.kill(os.getpid(), number), layer.forward(*args))[1])

    net, *rest = task()
    first = fnbp.map_layers(lambda path, layer: at_once(path, layer) if path.endswith("[0].dense(5)") else layer, net)
    signals = []

    def once_only(*args):  # the forward is traced more than once; the signal comes the first time
        if not signals:
            signals.append(os.kill(os.getpid(), number))
        return net.forward(*args)

    found = whole(fit(first._replace(forward=once_only, rebuild=None, parts=()), *rest))
    assert found.stopped == word and found.step == 0
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminated")])
def test_a_signal_between_calls_ends_in_a_fit_that_can_be_resumed(number, word):
    args = task()
    sent = []

    def callback(step, loss):
        if step > 10 and not sent:
            sent.append(os.kill(os.getpid(), number))

    found = whole(fit(*args, callback=callback))
    assert (
        found.stopped == word
        and found.message
        == {"interrupt": "interrupted", "terminated": "terminated"}[word] + f" after step {found.step}"
    )
    resumed = fit(*args[:2], found.params, found.state, *args[4:], resume=found, steps=7)
    straight = uninterrupted(args, found.step + 7)
    assert all(
        (a == b).all() for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(straight.params), strict=True)
    )


def test_a_second_ctrl_c_raises_and_bears_what_was_reached():
    def callback(step, loss):
        if step > 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(*task(), callback=callback)
    assert whole(caught.value.fit).step > 10 and caught.value.fit.stopped == "error"


@pytest.mark.parametrize("where", ["callback", "on_epoch", "validation", "iteration"])
def test_an_exception_bears_what_was_reached(where, monkeypatch):
    args = task()
    x, y = args[4:]
    options = {}

    def fail(*_, kind=StopIteration if where == "iteration" else RuntimeError):
        if len(calls) >= 5:
            raise kind("enough")
        calls.append(1)

    calls = []
    if where == "callback":
        options = {"callback": fail}
    elif where == "validation":
        monkeypatch.setattr(fnbp.training.prepare, "validation_of", lambda *_: lambda *_: fail() or {"loss": 1.0})
        options = {"validation": (x, y)}
    else:
        options = {"on_epoch": fail}
    with pytest.raises((RuntimeError, StopIteration), match="enough") as caught:
        fit(*args, **options)
    found = whole(caught.value.fit)
    assert found.step > 0 and found.stopped == "error" and "after step" in found.message
    straight = uninterrupted(args, found.step)
    assert all(
        (a == b).all() for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(straight.params), strict=True)
    )
    assert (found.history.loss == straight.history.loss).all()


def test_refusals_bear_no_fit():
    with pytest.raises(ValueError, match="batch_size 99 is more than") as caught:
        fit(*task(), batch_size=99)
    assert not hasattr(caught.value, "fit")


def at_random(monkeypatch, seed):
    """A signal or an exception at a random moment, from the first to well into the loop."""
    rng = np.random.default_rng(seed)
    kind, after = (
        rng.choice(["int", "term", "callback"]),
        float(rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0, 3.0)])),
    )
    args, options = task(seed), {"validation": None}
    if rng.random() < 0.5:
        options["validation"] = args[4:]
    began = time.perf_counter()

    def callback(step, loss):
        if kind == "callback" and time.perf_counter() - began > after:
            raise RuntimeError("enough")

    if kind != "callback":
        kill_after(monkeypatch, after, signal.SIGTERM if kind == "term" else signal.SIGINT)
        options["steps"] = int(rng.choice([1, 30, 2_000_000]))  # a signal after the last step counts too
    return kind, args, options | {"callback": callback}


RANDOM = [pytest.param(seed, marks=[] if seed < 5 else [pytest.mark.slow]) for seed in range(40)]


@pytest.mark.parametrize("seed", RANDOM)
def test_an_end_at_a_random_moment_loses_nothing(monkeypatch, seed):
    kind, args, options = at_random(monkeypatch, seed)
    found = whole(ended(args, **options))
    monkeypatch.undo()
    assert found.stopped == {"int": "interrupt", "term": "terminated", "callback": "error"}[kind]
    if found.step and found.step < 3000:
        straight = uninterrupted(args, found.step)
        assert all(
            (a == b).all() for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(straight.params), strict=True)
        )


def pressing(times=1, at=1, number=signal.SIGINT):
    """A callback that sends the signal so many times at its call of that number."""
    calls = []

    def callback(*_):
        calls.append(1)
        for _ in range(times if len(calls) == at else 0):
            signal.raise_signal(number)

    return callback


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [{"steps": 1}, {"epochs": 1, "steps": None}, {"threshold": 1e9}], ids=str)
def test_a_signal_with_the_last_step_is_not_swallowed(number, options, monkeypatch):
    monkeypatch.setattr(fnbp.training.drive, "CALL_SECONDS", 1e9)  # calls of 1, 2, 4 steps, however slow the machine
    found = whole(fit(*task(), callback=pressing(number=number, at=options.get("epochs", 0) * 3 or 1), **options))
    assert found.stopped == {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}[number]
    assert f"after step {found.step}; besides, " in found.message


def test_a_signal_after_the_last_step_is_not_swallowed_either(monkeypatch):
    drive = fnbp.training.fit.drive

    def pressed(*args):
        found = drive(*args)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(fnbp.training.fit, "drive", pressed)
    found = whole(fit(*task(), steps=3))
    assert (found.stopped, found.step) == ("interrupt", 3) and "all 3 steps done" in found.message


@pytest.mark.parametrize("options", [{"steps": 5}, {"callback": pressing(times=2, at=3)}], ids=["done", "pressed"])
def test_a_further_ctrl_c_tears_nothing_that_is_handed_out(monkeypatch, options):
    make = fnbp.training.reached.Reached.fit

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        found = make(*args)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(fnbp.training.reached.Reached, "fit", pressed)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(*task(), **options)
    assert whole(caught.value.fit).step == 5 or "callback" in options
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("where", ["on_epoch", "validation", "callback"])
def test_what_an_exception_bears_goes_on_as_if_it_had_not_been(monkeypatch, where):
    args = task()
    held_out, real, calls = args[4:], fnbp.training.prepare.validation_of, []
    straight = fit(*args, steps=24, validation=held_out)

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("enough")

    def breaking(*given):
        measure = real(*given)
        return lambda params, state: fail() or measure(params, state)

    if where == "validation":
        monkeypatch.setattr(fnbp.training.prepare, "validation_of", breaking)
    with pytest.raises(RuntimeError, match="enough") as caught:
        fit(*args, validation=held_out, **({} if where == "validation" else {where: fail}))
    first = whole(caught.value.fit)
    resumed = fit(
        *args[:2], first.params, first.state, *held_out, resume=first, steps=24 - first.step, validation=held_out
    )
    for part in ("validation_step", "validation_loss"):
        both = np.concatenate([getattr(one.history, part) for one in (first, resumed)])
        assert both.tolist() == getattr(straight.history, part).tolist()
    assert (resumed.best.step, resumed.waited, resumed.least) == (straight.best.step, straight.waited, straight.least)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (resumed[:3], straight[:3])), strict=True))
