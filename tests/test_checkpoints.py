"""Checkpoints: a run that was killed, stopped or broken goes on as if it had not been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
import fnbp.training.fit

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(2)
M, BATCH, KEY = 23, 5, jax.random.key(6)  # 5 batches an epoch, the last one of 3
X, Y = RNG.standard_normal((M, 3)).astype(np.float32), RNG.integers(0, 4, M)
NET = fnbp.serial(fnbp.dense(7), fnbp.batch_norm(), fnbp.tanh(), fnbp.dropout(0.1), fnbp.dense(4))
LOSS, ADAM = fnbp.softmax_cross_entropy(), optax.adam(0.02)


def fit(directory=None, net=NET, seed=0, **options):
    params, state = net.init(jax.random.key(seed), X)
    given = {"optimizer": ADAM, "key": KEY, "batch_size": BATCH, "progress": False, "record": fnbp.gradient_norm}
    given |= {"validation": fnbp.Validation(X, Y, fnbp.accuracy()), "checkpoint": directory} | options
    if "epochs" not in options:
        given = {"steps": 30} | given
    data = fnbp.Batches(given.pop("x", X), given.pop("y", Y), given.pop("batch_size"), given.pop("drop_last", False))
    return fnbp.fit(net, LOSS, params, state, data, **given)


def same(one, other, but=("seconds",)):
    """Bit by bit, in everything but the time."""
    for name in ("params", "state", "opt_state", "best"):
        a, b = (jax.tree.leaves(getattr(run, name)) for run in (one, other))
        assert len(a) == len(b) and all(np.array_equal(u, v) for u, v in zip(a, b, strict=True)), name
    assert (one.step, one.waited, one.least) == (other.step, other.waited, other.least)
    for name in set(one.history._fields) - set(but):
        a, b = (jax.tree.leaves(getattr(run.history, name)) for run in (one, other))
        assert len(a) == len(b) and all(np.array_equal(u, v) for u, v in zip(a, b, strict=True)), name


def steps_in(directory):
    return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdigit())


@pytest.mark.parametrize("first", [1, 10, 13, 20])
def test_a_run_in_two_pieces_is_the_run_in_one(tmp_path, first):
    whole = fit(steps=30)
    before = fit(tmp_path, steps=first)
    assert before.step == first and steps_in(tmp_path) == [first]
    after = fit(tmp_path, steps=30, seed=1)  # other weights to begin with: those of the checkpoint count
    if first % 5:  # the end of the first piece was measured too
        after = after._replace(best=whole.best)
        rows = [i for i, step in enumerate(after.history.validation_step) if step != first]
        metrics = {"accuracy": after.history.metrics["accuracy"][rows]}
        loss, steps = after.history.validation_loss[rows], after.history.validation_step[rows]
        history = after.history._replace(validation_loss=loss, validation_step=steps, metrics=metrics)
        after = after._replace(history=history)
    same(after, whole)
    assert after.history.seconds > before.history.seconds


def test_a_run_that_is_done_is_handed_back(tmp_path):
    done = fit(tmp_path, steps=10)
    again = fit(tmp_path, steps=10)
    same(again, done)
    assert (again.stopped, again.message) == ("steps", "all 10 steps were done before")
    assert fit(tmp_path, steps=7).step == 10


def test_patience_that_ran_out_stays_so(tmp_path):
    still = {"optimizer": optax.sgd(0.0), "patience": 1, "epochs": 9}
    done = fit(tmp_path, **still)
    assert done.stopped == "patience"
    again = fit(tmp_path, **still)
    assert (again.stopped, again.step) == ("patience", done.step)


def test_checkpoints_are_written_at_every_so_many_steps_and_the_newest_are_kept(tmp_path):
    fit(fnbp.Checkpoints(tmp_path, steps=7, keep=3), steps=30)
    assert steps_in(tmp_path) == [21, 28, 30]


def test_checkpoints_are_written_by_the_clock(tmp_path):
    seen = []
    fit(
        fnbp.Checkpoints(tmp_path, minutes=1e-9, keep=100),
        steps=10,
        on_epoch=lambda so_far: seen.append(so_far.step),
    )
    assert len(steps_in(tmp_path)) > 2


def test_an_older_checkpoint_is_used_when_it_is_asked_for(tmp_path):
    fit(fnbp.Checkpoints(tmp_path, steps=10, keep=5), steps=30)
    found = fit(fnbp.Checkpoints(tmp_path, at=10, keep=5), steps=20)
    assert found.step == 20 and steps_in(tmp_path) == [10, 20]
    same(found, fit(steps=20))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(tmp_path, number):
    found = fit(tmp_path, steps=10_000_000, callback=lambda step, loss: os.kill(os.getpid(), number))
    assert found.stopped in ("interrupt", "terminated") and steps_in(tmp_path)[-1] == found.step
    same(fit(tmp_path, steps=found.step), found)


def test_an_exception_leaves_a_checkpoint(tmp_path):
    def fail(so_far):
        if so_far.step == 15:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit(tmp_path, on_epoch=fail)
    assert steps_in(tmp_path) == [15]
    same(fit(tmp_path), fit())


def test_an_exception_of_a_validation_leaves_it_owed(tmp_path, monkeypatch):
    right, calls = fnbp.training.prepare.validation_of, []

    def breaking(*args):
        measure = right(*args)

        def measured(*where):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("enough")
            return measure(*where)

        return measured

    monkeypatch.setattr(fnbp.training.prepare, "validation_of", breaking)
    with pytest.raises(RuntimeError, match="enough"):
        fit(tmp_path)
    assert steps_in(tmp_path) == [15]
    monkeypatch.undo()
    same(fit(tmp_path), fit())


def test_a_loss_below_the_threshold_stays_so(tmp_path):
    done = fit(tmp_path, threshold=1e3)
    again = fit(tmp_path, threshold=1e3)
    assert (again.stopped, again.step, again.message) == ("threshold", done.step, done.message)


def test_other_metrics_and_other_numbers_between_calls_lose_nothing(tmp_path):
    fit(tmp_path, steps=10)
    other = {"validation": fnbp.Validation(X, Y, [fnbp.top_k(2), fnbp.confusion(4)]), "record": fnbp.update_norm}
    found = fit(tmp_path, steps=20, **other).history
    assert np.isnan(found.metrics["top_2"]).tolist() == [True, True, False, False]
    assert np.isnan(found.metrics["accuracy"]).tolist() == [False, False, True, True]
    assert found.metrics["confusion"].shape == (4, 4, 4)
    assert np.isnan(found.recorded["update_norm"]).tolist() == [True] * 10 + [False] * 10
    assert np.isnan(found.recorded["gradient_norm"]).tolist() == [False] * 10 + [True] * 10
    plain = fit(tmp_path, steps=30, validation=None, record=None)
    assert plain.step == 30 and len(plain.history.recorded["update_norm"]) == 30


def test_a_run_that_was_not_finite_says_so_again(tmp_path):
    schedule = optax.scale_by_schedule(lambda count: jnp.where(count == 12, jnp.inf, 1.0))
    broken = {"optimizer": optax.chain(optax.sgd(0.1), schedule)}
    done, again = (fit(tmp_path, **broken) for _ in range(2))
    assert (done.stopped, again.stopped, done.step, again.step) == ("non-finite", "non-finite", 12, 12)
    np.testing.assert_array_equal(again.history.loss[:12], done.history.loss[:12])


def test_the_best_by_validation_is_in_it(tmp_path):
    rising = {"optimizer": optax.sgd(0.5)}
    done = fit(tmp_path, steps=30, **rising)
    again = fit(tmp_path, steps=30, **rising)
    assert again.best.step == done.best.step and again.best.loss == done.best.loss
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again.best.params, done.best.params)), strict=True)
    )


@pytest.mark.parametrize(
    "other, told",
    [
        ({"net": fnbp.serial(fnbp.dense(4))}, r"net is .*dense\(7\).* there, serial\(dense\(4\)\) here"),
        ({"batch_size": 4}, "batch_size is 5 there, 4 here"),
        ({"optimizer": optax.sgd(0.1, momentum=0.9)}, "optimizer is .*Adam.* there"),
        ({"drop_last": True}, "drop_last is False there, True here"),
        ({"key": jax.random.key(7)}, "key is "),
        ({"x": X[:20], "y": Y[:20]}, r"data is \['float32\[23, 3\]'"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, other, told):
    fit(tmp_path, steps=5)
    with pytest.raises(ValueError, match=f"the checkpoint of step 5 in .* is of another run: .*{told}"):
        fit(tmp_path, steps=10, **other)
    assert steps_in(tmp_path) == [5]


def test_the_parameter_that_differs_is_named():
    from fnbp.training.checkpoints import differences

    here, there = (
        {"net": "<Layer a>", "parameters": {"a.W": shape, "a.b": "f"}} for shape in ("float32[3]", "float32[5]")
    )
    assert differences(there, here) == ["a.W is float32[5] there, float32[3] here"]
    assert differences({"net": "<Layer a>"}, here) == ["a.W is missing there, float32[3] here"]
    assert differences({**there, "net": "b"}, here) == ["net is b there, <Layer a> here"]


def test_a_truncated_checkpoint_is_told_and_the_older_one_can_be_used(tmp_path):
    fit(fnbp.Checkpoints(tmp_path, steps=10), steps=20)
    for path in (tmp_path / "20").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"step 20 .* cannot be read: .*Checkpoints\(directory, at=10\) goes on"):
        fit(tmp_path, steps=30)
    assert steps_in(tmp_path) == [10, 20]
    same(fit(fnbp.Checkpoints(tmp_path, at=10), steps=30), fit(steps=30))


def test_a_directory_without_the_step_says_which_there_are(tmp_path):
    fit(tmp_path, steps=5)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 9; .*there are \[5\]"):
        fit(fnbp.Checkpoints(tmp_path, at=9), steps=10)


@pytest.mark.parametrize(
    "checkpoint, options, error, text",
    [
        (3, {}, TypeError, "Checkpoints: directory must be a path, got int 3"),
        ("d", {"start": 3}, ValueError, "goes on from the newest one by itself"),
        ("d", {"opt_state": ()}, ValueError, "goes on from the newest one by itself"),
        (lambda: fnbp.Checkpoints("d", steps=0), {}, ValueError, "Checkpoints: steps must be at least 1"),
        (lambda: fnbp.Checkpoints("d", minutes=0), {}, ValueError, "Checkpoints: minutes must be"),
        (lambda: fnbp.Checkpoints("d", keep=1.5), {}, TypeError, "Checkpoints: keep must be a whole number"),
        (lambda: fnbp.Checkpoints(3), {}, TypeError, "Checkpoints: directory must be a path, got int 3"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, checkpoint, options, error, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        fit(checkpoint() if callable(checkpoint) else checkpoint, **options)


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"the directory of checkpoints .*file is a file"):
        fit(tmp_path / "file")


def test_a_checkpoint_of_other_devices_goes_on(tmp_path):
    """Written by one device, read where the parameters lie on four."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    fit(tmp_path, steps=10)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    params, state = jax.device_put(NET.init(KEY, X), NamedSharding(mesh, PartitionSpec()))
    options = {"optimizer": ADAM, "key": KEY, "batch_size": BATCH, "progress": False, "record": fnbp.gradient_norm}
    options["validation"] = fnbp.Validation(X, Y, fnbp.accuracy())
    found = fnbp.fit(NET, LOSS, params, state, X, Y, steps=30, checkpoint=tmp_path, **options)
    np.testing.assert_allclose(found.history.loss, fit(steps=30).history.loss, rtol=1e-4)
    assert len(jax.tree.leaves(found.params)[0].devices()) == 4


SCRIPT = """
import pathlib, sys, time, jax, numpy as np, optax, fnbp
rng = np.random.default_rng(0)
x, y = rng.standard_normal((301, 5)).astype(np.float32), rng.integers(0, 3, 301)
net = fnbp.serial(fnbp.dense(11), fnbp.tanh(), fnbp.dropout(0.2), fnbp.dense(3))
params, state = net.init(jax.random.key(0), x)

def slowly(so_far):
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(0.1)

done = fnbp.fit(
    net, fnbp.softmax_cross_entropy(), params, state, x, y, optimizer=optax.adam(1e-3), key=jax.random.key(1),
    batch_size=10, epochs=200, validation=(x, y), progress=False, on_epoch=slowly,
    checkpoint=fnbp.Checkpoints(sys.argv[1], steps=97),
)
np.savez(sys.argv[3], *jax.tree.leaves((done.params, done.opt_state)), loss=done.history.loss, step=done.step)
"""


def run_until_killed(tmp_path, name, seconds=None):
    """Run the script; True if it was killed, so many seconds after its first epoch."""
    begun = tmp_path / f"{name} has begun"
    begun.unlink(missing_ok=True)
    folder, result = tmp_path / name, tmp_path / f"{name}.npz"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(begun), str(result)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while seconds is not None and started.poll() is None and not begun.exists():
        time.sleep(0.01)
    try:
        _, said = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        started.kill()
        started.communicate()
        return True
    assert started.returncode == 0, said.decode()
    return False


@pytest.mark.slow
def test_20_kills_at_random_moments_change_no_bit(tmp_path):
    assert not run_until_killed(tmp_path, "whole")
    moments = random.Random(3)
    kills = [run_until_killed(tmp_path, "killed", moments.uniform(0, 1.5)) for _ in range(20)]
    assert sum(kills) >= 15 and not run_until_killed(tmp_path, "killed")
    whole, resumed = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "killed"))
    assert set(whole.files) == set(resumed.files)
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)


FULL = """
import resource, sys, jax, numpy as np, optax, fnbp
x, y = np.ones((40, 900), np.float32), np.zeros(40, int)
net = fnbp.dense(300)
params, state = net.init(jax.random.key(0), x)
given = dict(optimizer=optax.adam(1e-3), key=jax.random.key(1), batch_size=10, progress=False)
loss = fnbp.softmax_cross_entropy()
run = lambda steps: fnbp.fit(net, loss, params, state, x, y, steps=steps, checkpoint=sys.argv[1], **given)
run(3)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    run(6)
except RuntimeError as error:
    print(error, error.fit.step)
"""


def test_a_disk_that_is_full_is_told_and_older_checkpoints_stay(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "d")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "could not be written" in done.stdout and "whole ones: [3]" in done.stdout, done.stdout + done.stderr
    assert steps_in(tmp_path / "d") == [3]


def test_other_numbers_in_the_loss_are_another_run(tmp_path):
    def run(weights):
        params, state = NET.init(KEY, X)
        loss = fnbp.softmax_cross_entropy(weights=np.asarray(weights))
        options = {"optimizer": ADAM, "key": KEY, "batch_size": 5, "progress": False, "checkpoint": tmp_path}
        return fnbp.fit(NET, loss, params, state, X, Y, steps=5, **options)

    run([1.0, 2, 3, 4])
    assert run([1.0, 2, 3, 4]).step == 5
    with pytest.raises(ValueError, match=r"checksum of the arrays in net and loss is \d+ there, \d+ here"):
        run([1.0, 2, 3, 5])


def test_a_layer_without_a_constructor_is_the_same_in_another_process(tmp_path):
    def net():
        return fnbp.serial(fnbp.dense(4), fnbp.tanh()._replace(name="own"))

    fit(tmp_path, net=net(), steps=5)
    assert fit(tmp_path, net=net(), steps=7).step == 7


def test_a_request_that_is_refused_leaves_no_directory(tmp_path):
    with pytest.raises(ValueError, match="label"):
        fit(tmp_path / "new", y=Y + 9)
    assert not (tmp_path / "new").exists()


def test_a_metric_that_finishes_with_a_dict_is_several(tmp_path):
    def total(prediction, target, losses, mask):
        return jnp.sum(prediction.argmax(-1)), jnp.sum(losses)

    metric = fnbp.Metric(total, lambda sums, n, loss: {"mean": sums[0] / n, "both": {"J": sums[1] / n}}, "two")
    found = fit(tmp_path, steps=10, validation=fnbp.Validation(X, Y, metric)).history
    np.testing.assert_allclose(found.metrics["two.both.J"], found.validation_loss, rtol=1e-6)
    assert found.metrics["two.mean"].shape == (2,)
    assert len(fit(tmp_path, steps=15, validation=fnbp.Validation(X, Y, metric)).history.metrics["two.mean"]) == 3
