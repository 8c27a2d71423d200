"""Nothing that fit has computed is lost: signals and exceptions, at any moment, end in a Fit or bear one."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp

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


def ended(args, trigger, **options):
    """What fit returned, or what its exception bears."""
    trigger()
    try:
        return fit(*args, **options)
    except BaseException as error:
        assert any("what was reached, until step" in note for note in error.__notes__)
        return error.fit


def kill_after(seconds, number):
    """Send a signal from another thread, as the world does."""

    def send():
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


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
        monkeypatch.setattr(fnbp.training, "evaluation", lambda *_: lambda params, state: fail() or 1.0)
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


def at_random(seed):
    """A signal or an exception at a random moment, from the first to well into the loop."""
    rng = np.random.default_rng(seed)
    kind, after = (
        rng.choice(["int", "term", "callback"]),
        float(rng.choice([rng.uniform(0.002, 0.3), rng.uniform(0.002, 3.0)])),
    )
    args, options = task(seed), {"validation": None}
    if rng.random() < 0.5:
        options["validation"] = args[4:]
    began = time.perf_counter()

    def callback(step, loss):
        if kind == "callback" and time.perf_counter() - began > after:
            raise RuntimeError("enough")

    def trigger():
        if kind != "callback":
            kill_after(after, signal.SIGTERM if kind == "term" else signal.SIGINT)

    return args, trigger, options | {"callback": callback}


RANDOM = [pytest.param(seed, marks=[] if seed < 5 else [pytest.mark.slow]) for seed in range(40)]


@pytest.mark.parametrize("seed", RANDOM)
def test_an_end_at_a_random_moment_loses_nothing(seed):
    args, trigger, options = at_random(seed)
    found = whole(ended(args, trigger, **options))
    assert found.stopped in ("interrupt", "terminated", "error")
    if found.step and found.step < 3000:
        straight = uninterrupted(args, found.step)
        assert all(
            (a == b).all() for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(straight.params), strict=True)
        )
