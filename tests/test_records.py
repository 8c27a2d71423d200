"""The record of a run: plain files that tell what was asked for, on what it ran, and what came of it."""

import json

import jax
import numpy as np
import optax
import pytest

import fnbp

RNG = np.random.default_rng(3)
X, Y = RNG.standard_normal((23, 3)).astype(np.float32), RNG.integers(0, 4, 23)
NET, LOSS = fnbp.models.mlp(5, 4), fnbp.softmax_cross_entropy()


def fit(keep, **options):
    params, state = NET.init(jax.random.key(0), X)
    given = {"optimizer": optax.adam(0.02), "key": jax.random.key(1), "batch_size": 5, "progress": False, "steps": 12}
    given |= {"validation": fnbp.Validation(X, Y, [fnbp.accuracy(), fnbp.confusion(4)]), "record": fnbp.gradient_norm}
    return fnbp.fit(NET, LOSS, params, state, X, Y, on_epoch=keep, **(given | options))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Writer:
    def __init__(self):
        self.got = []

    def add_scalar(self, name, value, step):
        self.got.append((name, value, step))


def test_the_record_holds_what_the_history_holds(tmp_path):
    writer = Writer()
    keep = fnbp.run_record(tmp_path / "a" / "b", {"rate": 0.02}, writer)
    done = fit(keep)
    keep(done)
    folder = tmp_path / "a" / "b"
    steps, validations = lines(folder / "steps.jsonl"), lines(folder / "validations.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 13))
    np.testing.assert_allclose([row["loss"] for row in steps], done.history.loss)
    np.testing.assert_allclose([row["gradient_norm"] for row in steps], done.history.recorded["gradient_norm"])
    assert [row["step"] for row in validations] == done.history.validation_step.tolist() == [5, 10, 12]
    assert set(validations[0]) == {"step", "loss", "accuracy"}
    run, result = (json.loads((folder / name).read_text()) for name in ("run.json", "result.json"))
    assert run["config"] == {"rate": 0.02} and run["versions"]["jax"] == jax.__version__
    assert run["devices"]["number"] == jax.device_count()
    assert (result["stopped"], result["step"], result["best"]["step"]) == ("steps", 12, done.best.step)
    assert (folder / "loss.png").stat().st_size > 1000
    assert ("train/loss", steps[3]["loss"], 4) in writer.got
    assert ("validation/accuracy", validations[1]["accuracy"], 10) in writer.got
    assert len(writer.got) == 2 * 12 + 2 * 3


def test_a_run_that_goes_on_goes_on_in_its_files(tmp_path):
    for steps in (6, 12):
        keep = fnbp.run_record(tmp_path / "record")
        keep(fit(keep, steps=steps, checkpoint=tmp_path / "checkpoints"))
        with (tmp_path / "record" / "steps.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # as a kill leaves it
    keep(fit(None, steps=13, checkpoint=tmp_path / "checkpoints"))
    assert [row["step"] for row in lines(tmp_path / "record" / "steps.jsonl")] == list(range(1, 14))


def test_a_resumed_fit_adds_what_is_new(tmp_path):
    keep = fnbp.run_record(tmp_path)
    first = fit(keep, steps=7)
    keep(first)
    keep(fit(keep, steps=5, resume=first))
    assert [row["step"] for row in lines(tmp_path / "steps.jsonl")] == list(range(1, 13))


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    schedule = optax.scale_by_schedule(lambda count: jax.numpy.where(count == 3, np.inf, 1.0))
    keep = fnbp.run_record(tmp_path)
    done = fit(keep, optimizer=optax.chain(optax.sgd(0.1), schedule))
    keep(done)
    rows = lines(tmp_path / "steps.jsonl")
    assert done.stopped == "non-finite" and [row["step"] for row in rows] == list(range(1, len(done.history.loss) + 1))


def test_another_run_in_the_same_directory_replaces_the_record(tmp_path):
    for rate in (0.5, 0.02):
        keep = fnbp.run_record(tmp_path)
        done = fit(keep, optimizer=optax.adam(rate))
        keep(done)
    rows = lines(tmp_path / "steps.jsonl")
    np.testing.assert_allclose([row["loss"] for row in rows], done.history.loss)
    validations = lines(tmp_path / "validations.jsonl")
    np.testing.assert_allclose([row["loss"] for row in validations], done.history.validation_loss)
    again = fit(None, optimizer=optax.adam(0.1))  # and so does another run of the same function
    keep(again)
    np.testing.assert_allclose([row["loss"] for row in lines(tmp_path / "steps.jsonl")], again.history.loss)


def test_a_checkpoint_further_back_goes_on_in_the_record(tmp_path):
    def run(x, at=None):
        writer = Writer()
        keep = fnbp.run_record(tmp_path / "record", writer=writer)
        params, state = NET.init(jax.random.key(0), X)
        given = {"optimizer": optax.adam(0.02), "key": jax.random.key(1), "progress": False, "steps": 12}
        given["checkpoint"] = fnbp.Checkpoints(tmp_path / "c", steps=4, keep=9, at=at)
        done = fnbp.fit(NET, LOSS, params, state, x, Y, batch_size=5, on_epoch=keep, **given)
        keep(done)
        return done, writer.got

    _, got = run(X)
    assert [step for _, _, step in got] == list(range(1, 13))
    done, got = run(2 * X, at=4)
    rows = lines(tmp_path / "record" / "steps.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    np.testing.assert_allclose([row["loss"] for row in rows], done.history.loss)
    assert [step for _, _, step in got] == list(range(5, 13))  # the writer is given what is new


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    keep = fnbp.run_record(tmp_path)
    first = fit(keep, steps=7)
    keep(first)
    there = []
    fit(lambda so_far: (keep(so_far), there.append((tmp_path / "result.json").exists()))[0], steps=5, resume=first)
    assert there == [False, False]


def test_lines_behind_what_was_reached_are_replaced(tmp_path):
    def blow(n):
        return optax.chain(
            optax.sgd(0.1), optax.scale_by_schedule(lambda count: jax.numpy.where(count == n, np.inf, 1))
        )

    keep = fnbp.run_record(tmp_path)
    first = fit(keep, optimizer=blow(3), validation=None)
    keep(first)
    assert first.stopped == "non-finite"
    keep(fit(keep, optimizer=blow(99), steps=4, resume=first._replace(opt_state=blow(99).init(first.params))))
    rows = lines(tmp_path / "steps.jsonl")
    assert [row["step"] for row in rows] == list(range(1, first.step + 5)) and all(row["loss"] for row in rows)


def test_the_config_is_that_of_the_call(tmp_path):
    config = {"rate": 0.02, "sizes": (3, 4)}
    keep = fnbp.run_record(tmp_path, config)
    config["rate"] = np.ones(2)
    keep(fit(keep))
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"rate": 0.02, "sizes": [3, 4]}
    fnbp.run_record(tmp_path, {"rate": 0.02, "sizes": [3, 4]})
    fnbp.run_record(tmp_path)
    with pytest.raises(ValueError, match=r"of another run: rate is 0\.02 there, 0\.5 here; give another"):
        fnbp.run_record(tmp_path, {"rate": 0.5, "sizes": [3, 4]})


@pytest.mark.parametrize("junk", ["xx\n", "\n", '{"step": 3}', "\x00\x00"])
def test_what_is_no_line_of_a_record_is_dropped(tmp_path, junk):
    fnbp.run_record(tmp_path)(fit(None))
    path = tmp_path / "steps.jsonl"
    path.write_text(path.read_text() + junk)
    fnbp.run_record(tmp_path)(fit(None, steps=14))
    assert [row["step"] for row in lines(path)] == list(range(1, 15))


def test_a_figure_without_anything_to_draw(tmp_path, recwarn):
    done = fit(None, optimizer=optax.sgd(1.0), validation=None, steps=1)
    empty = done._replace(history=done.history._replace(loss=np.asarray([np.nan], np.float32)))
    fnbp.run_record(tmp_path)(empty)
    assert (tmp_path / "loss.png").exists() and not recwarn.list


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda p: fnbp.run_record(p / "file"), NotADirectoryError, "file is a file"),
        (
            lambda p: fnbp.run_record(p, {"f": print}),
            TypeError,
            "config must be what JSON has: .*not JSON serial",
        ),
        (lambda p: fnbp.run_record(p, {"a": float("nan")}), TypeError, "config must be what JSON has: Out of range"),
        (lambda p: fnbp.run_record(p, [1, 2]), TypeError, "config must be a dict, got a list of 2"),
        (lambda p: fnbp.run_record(None), TypeError, "directory must be a path, got None"),
        (lambda p: fnbp.run_record(""), TypeError, "directory must be a path"),
        (lambda p: fnbp.run_record(p, writer=3), TypeError, r"writer needs a method add_scalar\(name, value, step\)"),
        (lambda p: fnbp.run_record(p)(3), TypeError, "run_record: expected a Fit, got int 3"),
    ],
)
def test_what_is_refused(tmp_path, make, error, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=words):
        make(tmp_path)
