"""The experiments: what they print and save, and what they say to mistakes."""

import ast
import dataclasses
import functools
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
import tyro

import fnbp
from experiments import (
    architectures,
    digits,
    false_alarms,
    generation,
    gradient_cost,
    images,
    influence,
    kfac,
    localisation,
    long_runs,
    nielsen,
    norms,
    private,
    rows,
    scaling,
    worked_example,
)
from experiments.charlm import __main__ as charlm
from experiments.shared import commands, data, markdown, report, results, shown
from experiments.statistics_cost import __main__ as statistics_cost
from experiments.statistics_cost import nets as statistics_nets
from experiments.statistics_cost import peers as statistics_peers

ROOT = Path(__file__).parents[1]


def test_every_experiment_says_what_it_claims_and_how_long_it_takes():
    found = commands.commands()
    assert {"digits", "mutants", "charlm"} <= {command.name for command in found}
    for command in found:
        assert command.claim.endswith(".") and len(command.claim) > 40, command.name
        assert command.minutes is not None and command.minutes > 0, f"{command.name} needs MINUTES"


def test_the_list_of_experiments(tmp_path):
    done = command("experiments")
    assert done.returncode == 0, done.stderr
    for one in commands.commands():
        assert one.name in done.stdout and one.claim.split()[0] in done.stdout
    done = command("experiments", "--publish", str(tmp_path))
    assert done.returncode == 2 and "does not exist: run a command with --out" in done.stderr.replace("\n", " ")


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = markdown.README.read_text()
    assert markdown.rendered(text) == text, "run python -m experiments --write"


def test_published_runs_name_commands_that_can_be_given():
    names = {command.name: command.path for command in commands.commands()}
    paths = sorted(results.RESULTS.glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        for run, record in results.read(path.stem).items():
            words = shlex.split(record["command"])[2:]
            name = words[0].removeprefix("experiments.")
            assert name == path.stem, run
            module = f"experiments.{name}" + (".__main__" if names[name].stem == "__main__" else "")
            tyro.cli(importlib.import_module(module).Settings, args=words[1:])


def test_published_runs_name_no_folder_of_a_machine():
    paths = sorted(results.RESULTS.glob("*.json"))
    for path in paths:
        for run, record in json.loads(path.read_text()).items():
            texts = [text for text in strings_in(record) if text.startswith(("/", "~")) or ":\\" in text]
            assert not texts, f"{path.name}, {run}: {texts}"


def strings_in(node):
    """Every text in a tree of JSON."""
    if isinstance(node, dict):
        node = list(node.values())
    return (
        [node]
        if isinstance(node, str)
        else [t for part in node for t in strings_in(part)]
        if isinstance(node, list)
        else []
    )


def test_a_record_that_does_not_follow_the_schema_is_refused():
    record = json.loads((results.RESULTS / "digits.json").read_text())["default"]
    results.check("a", record)
    for change, words in (
        ({"date": "today"}, "expected a date"),
        ({"command": "python -m experiments.nothing"}, "is not a command"),
        ({"figures": []}, "figures must be of type"),
        ({"more": 1}, "expected the entries"),
    ):
        with pytest.raises(report.InputError, match=words):
            results.check("a", record | change)


def test_a_run_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "published")
    settings = digits.Settings(epochs=3, out=tmp_path)
    assert report.command_of(settings) == "python -m experiments.digits --epochs 3"
    report.save(tmp_path, settings, {"test_accuracy": 0.5, "losses": list(range(1000)), "at": {"a": np.float32(2)}})
    path = results.publish(tmp_path, "short", "a note")
    assert results.read("digits").keys() == {"short"} and path.name == "digits.json"
    record = results.read("digits")["short"]
    assert record["figures"] == {"test_accuracy": 0.5, "at": {"a": 2.0}} and record["note"] == "a note"
    assert record["settings"]["epochs"] == 3 and not set(report.PLACES) & set(record["settings"])
    results.publish(tmp_path, "default")
    assert set(results.read("digits")) == {"short", "default"}


def test_a_row_without_its_figure_is_told():
    row = shown.Row("accuracy", "digits/default", ("{nothing:.2%}",))
    with pytest.raises(report.InputError, match="no figure for the row 'accuracy'"):
        markdown.cells_of(row)
    with pytest.raises(report.InputError, match="has no run 'other'"):
        markdown.cells_of(row._replace(run="digits/other"))


@pytest.mark.slow
def test_digits_saves_its_figures_and_exits_with_0(tmp_path, capsys):
    settings = digits.Settings(epochs=6, out=tmp_path)
    assert digits.main(settings) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["epochs"] == 6
    assert result["measured"]["max_relative_error_float64"] <= 1e-12
    assert result["measured"]["max_relative_loss_difference_float32"] <= 1e-5
    assert result["measured"]["max_relative_loss_difference_float64"] <= 1e-11
    assert result["measured"]["test_accuracy"] >= 0.9
    assert {"jax", "python"} <= set(result["versions"]) and result["device"]["platform"] == "cpu"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    for expected in ("z1 = W1 x + b1", "serial[0].dense(100)", "softmax_cross_entropy", "test accuracy", "FLOPs"):
        assert expected in printed


@pytest.mark.slow
def test_digits_exits_with_1_where_a_backward_is_wrong(tmp_path, monkeypatch, capsys):
    right = digits.network_of_the_guide

    def wrong(path, layer):
        if layer.name != "dense(100)":
            return layer
        return layer._replace(backward=lambda p, res, dz: (layer.backward(p, res, -dz)[0], dz @ p["W"]))

    monkeypatch.setattr(digits, "network_of_the_guide", lambda *args: fnbp.map_layers(wrong, right(*args)))
    assert digits.main(digits.Settings(epochs=1, out=tmp_path)) == 1
    assert "first fault: serial[0].dense(100) -> dW: formula" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["measured"]["gradients_agree"] is False


def test_kfac_races_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    settings = kfac.Settings(
        widths=(12, 4), examples=200, batch_size=50, steps=8, rates=(0.1,), dampings=(1e-3,), adam=(1e-3,), sgd=(0.1,),
        clip=1e-3, data="digits", out=tmp_path,
    )  # fmt: skip
    code = kfac.main(settings)
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert code == (0 if measured["ok"] else 1) and measured["trials"] == 3
    assert all(len(losses) == 8 and losses[-1] < losses[0] for losses in measured["losses"].values())
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text("\n".join(lines[:2]) + "\n")
    seen, train = [], kfac.train
    monkeypatch.setattr(kfac, "train", lambda trial, *rest: seen.append(trial.kind) or train(trial, *rest))
    assert kfac.main(settings) == code and seen == ["SGD"]
    assert json.loads((tmp_path / "result.json").read_text())["measured"]["losses"] == measured["losses"]
    with pytest.raises(report.InputError, match="equally many trials"):
        kfac.main(dataclasses.replace(settings, sgd=(0.1, 0.3)))


@pytest.mark.parametrize(
    "losses, due", [([3.0, 2.0, 1.0, 0.0], 3), ([3.0, 2.0, 3.0, 2.0], None), ([3.0, float("nan")], None), ([1.0], None)]
)
def test_steps_to_a_target_are_those_of_the_mean_over_an_epoch(losses, due):
    assert kfac.steps_to(1.5, losses, 2) == due


def test_digits_hold_out_a_fixed_fifth():
    loaded = data.digits()
    assert (len(loaded.train_x), len(loaded.test_x)) == (1438, 359)
    together = np.concatenate([loaded.train_x, loaded.test_x])
    assert len(np.unique(together, axis=0)) == len(together)
    assert (
        hashlib.sha256(loaded.test_y.tobytes()).hexdigest()
        == hashlib.sha256(data.digits().test_y.tobytes()).hexdigest()
    )


def test_worked_example_agrees_four_ways(tmp_path, capsys):
    assert worked_example.main(worked_example.Settings(out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["max_relative_error_float64"] <= 1e-12
    assert measured["max_relative_error_finite_differences"] <= 1e-6
    assert measured["loss_after"] < measured["loss_before"]
    printed = capsys.readouterr().out
    for expected in ("-[y log y_hat", "dJ/da1 sigma'(z1)", "Errata", "-0.97880 for m = 1, -0.48940 each for m = 2"):
        assert expected in printed


def test_worked_example_by_hand_follows_a_pocket_calculator():
    w = {"W1": np.array([[1.0, 0], [0, 1], [1, 1]]), "b1": np.zeros(3), "w2": np.ones((1, 3)), "b2": np.zeros(1)}
    lines = {name: value for name, _, value in worked_example.by_hand(w, np.zeros(2), 1.0)}
    np.testing.assert_allclose(lines["y_hat"], 1 / (1 + np.exp(-1.5)))
    np.testing.assert_allclose(lines["dJ/dz1"], (lines["y_hat"] - 1) * 0.25 * np.ones(3))
    np.testing.assert_allclose(lines["dJ/dw2"], (lines["y_hat"] - 1) * 0.5 * np.ones((1, 3)))


@pytest.mark.slow
def test_nielsens_loop_is_the_same_in_pytorch(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(nielsen, "TRAINING", 500)
    rng = np.random.default_rng(0)
    x, y = rng.random((700, 784), np.float32), rng.integers(0, 10, 700).astype(np.int32)
    loaded = data.Data(x[:500], y[:500], x[500:], y[500:])
    settings = nielsen.Settings(hidden=7, epochs=2, seeds=(5,))
    accuracies, fitted, _, params = nielsen.train(nielsen.network(7), loaded, settings, 5)
    assert fitted.step == 100 and len(accuracies) == 2
    in_torch, _ = nielsen.train_in_torch(params, loaded, settings)
    np.testing.assert_allclose(accuracies, in_torch, atol=1e-6)


def test_nielsens_initializers_have_their_variance():
    for init, variance in (("chapter1", 1.0), ("chapter3", 1 / 784)):
        W = nielsen.network(100, init).init(jax.random.key(0), np.zeros((1, 784), np.float32))[0][0]["W"]
        np.testing.assert_allclose(W.var(), variance, rtol=0.02)


@pytest.mark.slow
def test_gradient_cost_prints_its_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradient_cost, "NETS", (((11, 7, 5), 3, "relu"),))
    monkeypatch.setattr(gradient_cost, "NORMS_NET", ((11, 7, 5), 3, "sigmoid"))
    assert gradient_cost.main(gradient_cost.Settings(samples=3, out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["norms_max_relative_difference"] <= 1e-6
    assert measured["trace_flops_ratio"] == measured["trace_memory_ratio"] == 1
    assert "plain JAX" in capsys.readouterr().out


@pytest.fixture
def small_nets(monkeypatch):
    """One small net in place of those that statistics are timed on."""
    small = statistics_nets.Net(fnbp.models.mlp(7, 10), statistics_nets.labelled(11), 3)
    monkeypatch.setattr(statistics_cost, "NETS", {"mlp": small})


def test_statistics_cost_times_what_agrees_and_goes_on_where_it_was(small_nets, tmp_path, capsys):
    settings = statistics_cost.Settings(samples=2, samples_of_others=2, only="gram", out=tmp_path)
    assert statistics_cost.main(settings) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["apart"] <= 1e-5 and measured["mlp"]["gram"]["one gradient"]["time"] > 0
    before = (tmp_path / "rows.jsonl").read_text()
    assert statistics_cost.main(dataclasses.replace(settings, resume=True)) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before and len(before.splitlines()) == 2
    assert "vmap(jax.grad)" in capsys.readouterr().out
    with pytest.raises(report.InputError, match="--only nothing: there are norms beside"):
        statistics_cost.main(statistics_cost.Settings(only="nothing", out=tmp_path))


def test_statistics_cost_ends_with_1_where_two_ways_disagree(small_nets, tmp_path, monkeypatch):
    statistic = statistics_cost.STATISTICS["norms alone"]
    wrong = statistic._replace(make=lambda case: lambda *args: 1.01 * statistic.make(case)(*args))
    monkeypatch.setitem(statistics_cost.STATISTICS, "norms alone", wrong)
    settings = statistics_cost.Settings(samples_of_others=1, ours=False, peers=False, only="norms alone", out=tmp_path)
    assert statistics_cost.main(settings) == 1


def test_statistics_cost_says_which_library_is_missing(small_nets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(statistics_peers, "installed", lambda peer: False)
    settings = statistics_cost.Settings(ours=False, others=False, only="gradient", out=tmp_path)
    assert statistics_cost.main(settings) == 0
    assert "not installed" in capsys.readouterr().out


def test_statistics_cost_goes_on_where_a_statistic_is_refused(small_nets, tmp_path, monkeypatch, capsys):
    def refuse(case):
        raise ValueError("too large a G")

    statistic = statistics_cost.STATISTICS["gram"]._replace(make=refuse)
    monkeypatch.setitem(statistics_cost.STATISTICS, "gram", statistic)
    settings = statistics_cost.Settings(samples=1, others=False, only="gram", out=tmp_path)
    assert statistics_cost.main(settings) == 0
    printed = capsys.readouterr().out
    assert "mlp, gram: too large a G" in printed and "refused" in printed


def fake(source, folder, seed):
    """The source with the sums of four small IDX files of its names, which now lie in its folder."""
    rng = np.random.default_rng(seed)
    sums = {}
    (folder / source.folder).mkdir()
    for name in source.sha256:
        shape = (3, 28, 28) if "images" in name else (3,)
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        raw = header + rng.integers(0, 10, shape, np.uint8).tobytes()
        (folder / source.folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        sums[name] = hashlib.sha256(raw).hexdigest()
    return source._replace(sha256=sums)


@pytest.fixture
def fake_mnist(tmp_path, monkeypatch):
    """A folder with sets of three images, under the names of the large ones."""
    sources = {name: fake(source, tmp_path, seed) for seed, (name, source) in enumerate(data.SOURCES.items())}
    monkeypatch.setattr(data, "SOURCES", sources)
    monkeypatch.delenv("FNBP_DATA", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2, 3])  # both dtypes, as a net and as a function
def test_false_alarms_of_one_net(which, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # arrays of NumPy are constants under jit
    assert false_alarms.one_call(0, which, 2)["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_localisation_blames_the_layer_and_the_leaf_that_are_wrong(seed):
    found = localisation.one_trial(seed)
    assert found["caught"] and found["layer"] and found["leaf"] and not found["others"], found


def test_mnist_is_found_by_argument_variable_and_cache(fake_mnist, monkeypatch, tmp_path):
    loaded = data.load("mnist", fake_mnist)
    assert loaded.train_x.shape == (3, 784) and loaded.train_x.dtype == np.float32 and loaded.train_x.max() <= 1
    assert loaded.test_y.dtype == np.int32
    assert data.load("mnist", fake_mnist / "mnist").train_x.shape == (3, 784)
    monkeypatch.setenv("FNBP_DATA", str(fake_mnist))
    assert (data.load("mnist").train_x == loaded.train_x).all()
    monkeypatch.delenv("FNBP_DATA")
    cache = tmp_path / "cache"
    cache.mkdir()
    (fake_mnist / "mnist").rename(cache / "moved")
    (cache / "moved").rename(cache / "mnist")
    cache.rename(tmp_path / "fnbp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (data.load("mnist").train_x == loaded.train_x).all()


@pytest.mark.parametrize("side_by_side", [False, True])
def test_images_trains_and_writes_down_what_it_measured(fake_mnist, tmp_path, capsys, side_by_side):
    settings = images.Settings(
        epochs=2, batch_size=3, side_by_side=side_by_side, data_folder=fake_mnist, out=tmp_path, width=2, model="lenet"
    )
    assert images.main(settings) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert len(measured["test_accuracy"]) == 2 and measured["parameters"] == 61_706
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert measured.get("apart", 0) <= 1e-4 and ("automatic" in measured["training_seconds"]) == side_by_side
    assert "lenet[3].conv(16, (5, 5))" in capsys.readouterr().out


def test_images_refuses_what_it_cannot_train(fake_mnist, tmp_path):
    with pytest.raises(report.InputError, match=r"--limit must be from one batch, 64, to 3"):
        images.main(images.Settings(data_folder=fake_mnist, out=tmp_path))
    with pytest.raises(report.InputError, match=r"--warmup must be at least 0 and below 1, got 1.5"):
        images.main(images.Settings(warmup=1.5, batch_size=3, data_folder=fake_mnist, out=tmp_path))
    with pytest.raises(report.InputError, match=r"depth must be 6 n \+ 2"):
        images.main(images.Settings(model="resnet", depth=9, batch_size=3, data_folder=fake_mnist, out=tmp_path))


def test_rows_refuses_sizes(fake_mnist, tmp_path):
    with pytest.raises(report.InputError, match=r"lstm_classifier: layers must be at least 1, got 0"):
        rows.main(rows.Settings(layers=0, batch_size=3, data_folder=fake_mnist, out=tmp_path))


def test_private_draws_each_image_by_itself():
    draw = jax.jit(jax.vmap(lambda key: private.drawn(key, 50, 0.2, private.room(10, 0.2))))
    rows, many = draw(jax.random.split(jax.random.key(0), 4000))
    counts = np.arange(rows.shape[1]) < np.asarray(many)[:, None]
    taken = np.zeros((4000, 50))
    np.add.at(taken, (np.arange(4000)[:, None], rows), counts)
    assert taken.max() == 1 and (taken.sum(1) == many).all()
    together = np.cov(taken.T)  # independent, each with probability 0.2
    assert abs(taken.mean(0) - 0.2).max() <= 5 * np.sqrt(0.16 / 4000)
    assert abs(together - 0.16 * np.eye(50)).max() <= 5.5 * 0.16 / np.sqrt(4000) * np.sqrt(2)


def test_private_trains_with_each_epsilon_and_goes_on(fake_mnist, tmp_path, monkeypatch, capsys):
    spent = {0.5: 2.0, 3.0: 1.0}
    monkeypatch.setattr(private, "accounting", lambda: None)
    monkeypatch.setattr(private, "least_noise", lambda epsilon, *rest: spent[epsilon])
    monkeypatch.setattr(private, "spent", lambda noise, *rest: (3 / noise, 4 / noise))
    settings = private.Settings(
        epsilons=(0.5,), control=False, steps=3, batch_size=1.0, held_out="training", data_folder=fake_mnist,
        out=tmp_path,
    )  # fmt: skip
    assert private.main(settings) == 0
    first = json.loads((tmp_path / "trainings.jsonl").read_text())
    with (tmp_path / "trainings.jsonl").open("a") as lines:
        lines.write('{"target": 3.0, "cut')
    trained = []
    monkeypatch.setattr(private, "train", lambda one, *rest, f=private.train: trained.append(one) or f(one, *rest))
    assert private.main(dataclasses.replace(settings, epsilons=(0.5, 3.0), control=True, resume=True)) == 0
    assert trained == [3.0, None]
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["0.5"] == {key: value for key, value in first.items() if key != "of"}
    assert measured["3"]["epsilon"] == 3.0 and measured["control"]["noise"] == 0 and measured["images"] == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "none" in capsys.readouterr().out
    done = private.main(dataclasses.replace(settings, epsilons=(3.0,), held_out="test"))
    right = json.loads((tmp_path / "result.json").read_text())["measured"]["3"]["accuracy"]
    assert done == (right < 0.95)


def test_private_says_what_it_needs(fake_mnist, tmp_path, monkeypatch):
    settings = private.Settings(data_folder=fake_mnist, out=tmp_path, batch_size=2.0)
    for change, words in (
        ({"epsilons": (0.0,)}, "--epsilons must be above 0"),
        ({"steps": 0}, "--steps must be above 0, got 0"),
        ({"batch_size": 3.0}, "--batch-size must be below 3"),
    ):
        with monkeypatch.context() as there, pytest.raises(report.InputError, match=words):
            there.setattr(private, "accounting", lambda: None)
            private.main(dataclasses.replace(settings, **change))
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(
        report.InputError, match=r"dp-accounting, which is not installed: pip install 'fnbp\[private\]'"
    ):
        private.main(settings)


def test_private_takes_the_least_noise_of_the_accountant():
    pytest.importorskip("dp_accounting")
    noise = private.least_noise(3.0, 1e-5, 0.05, 20)
    epsilon, coarser = private.spent(noise, 1e-5, 0.05, 20)
    assert 2.99 <= epsilon <= 3 < coarser < 4
    assert private.spent(noise * 0.99, 1e-5, 0.05, 20)[0] > 3


@pytest.mark.slow
def test_rows_trains_both_kinds(fake_mnist, tmp_path):
    for model in ("lstm", "gru"):
        settings = rows.Settings(
            epochs=1, batch_size=3, model=model, units=3, layers=2, rate=0.1, data_folder=fake_mnist, out=tmp_path
        )
        assert rows.main(settings) == 0
        assert len(json.loads((tmp_path / "result.json").read_text())["measured"]["test_accuracy"]) == 1


@pytest.fixture
def fake_text(tmp_path, monkeypatch):
    """A text of 1,000 letters whose sum is the one that is due."""
    raw = ("to be, or not to be: that is the question.\n" * 24)[:1000].encode()
    (tmp_path / data.TEXT).write_bytes(raw)
    monkeypatch.setattr(data, "TEXT_SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.delenv("FNBP_DATA", raising=False)
    return tmp_path


@pytest.mark.slow
def test_long_runs_are_measured(fake_text, tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "Recipe", functools.partial(long_runs.Recipe, layers=1, heads=2, width=8, block=8))
    settings = long_runs.Settings(steps=20, turns=1, long=300, fits=10, data_folder=fake_text, out=tmp_path)
    long_runs.main(settings)
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["ratio"] > 0 and measured["arrays_growth"] == 0


def test_scaling_counts_what_a_transformer_computes(tmp_path):
    sizes = {"layers": 3, "heads": 2, "width": 256, "vocabulary": 1009, "length": 64}
    assert scaling.main(scaling.Settings(**sizes, out=tmp_path)) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    matrices = measured["parameters"] - 64 * 256  # Chowdhery et al. 2022, arXiv:2204.02311, appendix B
    due = 6 * 64 * matrices + 12 * 3 * 256 * 64**2
    assert 1 <= measured["flops"] / due <= 1.05
    alone, eight, many = measured["add_ms"][:3]
    assert alone == 0 < eight < many


@pytest.mark.slow
def test_norms_hold_the_noise_scale_against_its_definition(fake_text, tmp_path, capsys):
    settings = norms.Settings(
        layers=1, heads=1, width=8, block=8, batch_size=6, steps=24, horizon=8, small=2, draws=40,
        data_folder=fake_text, out=tmp_path,
    )  # fmt: skip
    assert norms.main(settings) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert -1 <= measured["correlation"] <= 1 and measured["steps_compared"] <= 16 and len(measured["by_layer"]) == 8
    checked = measured["definition"]
    assert checked["draws"] == 40 and checked["trace_error"] < checked["trace_defined_error"]
    assert "noise scale, norm layers" in capsys.readouterr().out and (tmp_path / "figure.png").stat().st_size > 10_000
    for change, words in (({"small": 6}, "--small must be from 1 to below 6"), ({"batch_size": 999}, "--batch-size")):
        with pytest.raises(report.InputError, match=words):
            norms.main(dataclasses.replace(settings, **change))


def test_averages_over_steps_are_those_of_their_weights():
    values = np.array([3.0, -1.0, 4.0])
    weights = 0.75 ** np.arange(3)
    due = [np.average(values[: n + 1], weights=weights[: n + 1][::-1]) for n in range(3)]
    np.testing.assert_allclose(norms.smoothed(values, 4), due)
    recorded = {"trace a": values, "square a": np.array([1.0, -5.0, 30.0])}
    scale = norms.Seen(np.zeros(3), recorded, ["a"], 4).scale(["a"])
    assert scale[0] == 3 and np.isnan(scale[1]) and scale[2] > 0


@pytest.mark.slow
def test_charlm_learns_in_turns_and_writes(fake_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(charlm, "TURN", 4)
    peer = importlib.util.find_spec("torch") is not None
    settings = charlm.Settings(
        layers=2, heads=2, width=8, block=8, batch_size=3, steps=10, evaluate_every=4, letters=20, side_by_side=True,
        peer=peer, data_folder=fake_text, out=tmp_path / "out",
    )  # fmt: skip
    settings.out.mkdir()
    assert charlm.main(settings) == 0
    measured = json.loads((settings.out / "result.json").read_text())["measured"]
    assert [step for step, _ in measured["validation"]["fnbp"]] == [4, 8, 10]
    assert len((settings.out / "sample.txt").read_text()) > 10 and "validation loss, fnbp" in capsys.readouterr().out
    assert measured["against"]["jax.grad"]["apart"] <= 1e-5
    if peer:
        assert measured["against"]["PyTorch eager"]["apart"] <= 1e-4
        ends = [losses[-1][1] for losses in measured["validation"].values()]
        assert max(ends) - min(ends) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, 40])
def test_generation_writes_the_same_letters_both_ways(fake_text, tmp_path, monkeypatch, capsys, block):
    monkeypatch.setattr(generation, "LEAST", 0)  # so short a text shows nothing of the time
    settings = generation.Settings(
        letters=20, prompt="to be", block=block, top_k=3, train_steps=2, samples=2, data_folder=fake_text, out=tmp_path
    )
    assert generation.main(settings) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["scores_apart_float64"] <= 1e-12
    assert measured["drawn"]["same"] and measured["highest_score"]["same"] and "to be" in capsys.readouterr().out
    for change, words in (
        ({"prompt": "Z"}, "--prompt must be"),
        ({"block": 4}, "more than"),
        ({"top_k": 99}, "--top-k"),
    ):
        with pytest.raises(report.InputError, match=words):
            generation.main(dataclasses.replace(settings, **change))


def test_settings_can_be_picked_without_the_last_tenth():
    text = np.arange(1_003)
    for held_out, start in (("tenth", 902), ("ninth", 802)):
        train, held = charlm.split(text, held_out)
        np.testing.assert_array_equal(np.concatenate([train, held]), text[: start + len(held)])
        assert (len(train), len(held)) == (start, 101 if held_out == "tenth" else 100)


def test_a_missing_or_other_text_is_told(fake_text, tmp_path):
    letters, text = data.shakespeare(fake_text)
    assert "".join(letters[i] for i in text[:6]) == "to be," and text.dtype == np.uint8
    (fake_text / data.TEXT).write_text("other")
    with pytest.raises(report.InputError, match=r"tinyshakespeare.txt is corrupt"):
        data.shakespeare(fake_text)
    with pytest.raises(report.InputError, match=r"tinyshakespeare is not there: no .*--download"):
        data.shakespeare(tmp_path / "nowhere")


@pytest.fixture
def blots(monkeypatch):
    """Ten random pictures with noise, in the place of MNIST."""
    rng = np.random.default_rng(0)
    kinds, y = rng.random((10, 784), np.float32), np.tile(np.arange(10, dtype=np.int32), 20)
    x = kinds[y] + 0.2 * rng.standard_normal((200, 784)).astype(np.float32)
    loaded = data.Data(x, y, x[::2], (y[::2] + (np.arange(100) == 7).astype(np.int32)) % 10)
    monkeypatch.setattr(data, "load", lambda *args: loaded)
    return loaded


TINY = influence.Settings(examples=120, wrong=6, held_out=40, epochs=2, batch_size=20, seeds=(3,), queries=1)


def test_wrong_labels_are_planted_and_counted(blots):
    digits = influence.planted(blots, TINY, 3)
    right = influence.planted(blots, dataclasses.replace(TINY, wrong=0), 3)
    assert set(np.flatnonzero(digits.y != right.y)) == set(digits.wrong) and len(set(digits.wrong)) == 6
    assert (digits.held_out[1] == right.held_out[1]).all()
    score = np.zeros(120)
    score[digits.wrong[:4]] = 2
    score[np.setdiff1d(np.arange(120), digits.wrong)[:8]] = 1
    assert influence.found(score, digits.wrong) == 4
    assert influence.extremes(np.array([3.0, -5, 0, 9]), 2) == [3, 0, 1, 2]
    assert influence.rank_correlation(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert influence.rank_correlation(np.arange(5.0), -np.exp(np.arange(5.0))) == pytest.approx(-1)


def test_scores_are_sums_over_checkpoints(blots):
    digits = influence.planted(blots, TINY, 3)._replace(
        held_out=(blots.train_x[:20].reshape(-1, 28, 28, 1), blots.train_y[:20])
    )
    net, loss = fnbp.serial(fnbp.flatten(), fnbp.dense(10)), influence.LOSS
    params, state = net.init(jax.random.key(0), digits.x)
    both = jax.tree.map(lambda a: np.stack([a, a + 0.1]), params)
    found = influence.scores(net, both, state, digits)
    due = dict.fromkeys(found, 0)
    for i in range(2):
        at = jax.tree.map(lambda a, i=i: a[i], both)
        of = lambda one, other, at=at: np.asarray(  # noqa: E731
            fnbp.statistics.influence(net, loss)(at, state, one, other)
        )
        due["self-influence"] += np.diagonal(of((digits.x, digits.y), (digits.x, digits.y)))
        on_others = of((digits.x, digits.y), digits.held_out)
        due["harm to all"] += -on_others.mean(1)
        due["harm to one class"] += on_others.reshape(-1, 2, 10).mean(1)
        due["loss"] += np.asarray(loss.forward(fnbp.apply(net, at, state, digits.x), digits.y)[0])
    due["harm to one class"] = -due["harm to one class"].min(1)
    for name, each in due.items():
        np.testing.assert_allclose(found[name], each, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_influence_goes_on_where_it_was(blots, tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(TINY, out=tmp_path)
    code = influence.main(settings)
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert code == (measured["least"]["self-influence"] < 5.4) and len(measured["rank_correlation"]) == 1
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG" and "wrong labels" in capsys.readouterr().out
    monkeypatch.setattr(influence, "scores", lambda *args: pytest.fail("it was measured already"))
    assert [row["seed"] for row in influence.search(blots, settings)] == [3]
    with pytest.raises(report.InputError, match="--wrong must be from 1 to half"):
        influence.main(dataclasses.replace(settings, wrong=99))


def test_architectures_holds_trainings_against_each_other(tmp_path, monkeypatch, capsys):
    draw = architectures.shaped(architectures.images(5, 8, 12, 1), 96)
    small = architectures.Model(fnbp.models.mlp(7, 10), draw, 0.1)
    monkeypatch.setattr(architectures, "MODELS", {"small": small})
    settings = architectures.Settings(steps=20, samples=2, depth=False, out=tmp_path)
    assert architectures.main(settings) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]["small"]
    assert measured["apart"] <= 1e-5 and measured["apart_64"] <= 1e-13 and 0 < measured["itself"] < 1e-4
    assert len(measured["losses"]) == 20 and "small" in capsys.readouterr().out
    with pytest.raises(report.InputError, match="--only large: there are small"):
        architectures.main(architectures.Settings(only="large", out=tmp_path))


def test_missing_mnist_says_where_it_looked_and_where_to_get_it(tmp_path):
    with pytest.raises(report.InputError) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "mnist") in message and data.MNIST.url in message
    assert "train-images-idx3-ubyte.gz" in message and "--download" in message and "FNBP_DATA" in message


def test_corrupt_mnist_is_refused(fake_mnist):
    path = fake_mnist / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(report.InputError, match=r"t10k-labels-idx1-ubyte.gz is corrupt: the SHA-256"):
        data.load("mnist", fake_mnist)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(report.InputError, match=r"t10k-labels-idx1-ubyte.gz cannot be unpacked"):
        data.load("mnist", fake_mnist)
    whole = gzip.compress(b"cut short" * 99)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(report.InputError, match=r"t10k-labels-idx1-ubyte.gz cannot be unpacked"):
        data.load("mnist", fake_mnist)


def test_a_bomb_is_refused_before_it_is_unpacked(fake_mnist, monkeypatch):
    path = fake_mnist / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(5000)))
    monkeypatch.setattr(data, "LARGEST", 1000)
    read = []
    monkeypatch.setattr(
        data, "check_length", lambda *args, check=data.check_length: (read.append(args[1]), check(*args))
    )
    with pytest.raises(report.InputError, match=r"is corrupt: it holds more than 0 MiB"):
        data.read_idx(fake_mnist, "t10k-labels-idx1-ubyte", data.SOURCES["mnist"])
    assert read == [1001]


def test_a_corrupt_stream_is_refused(fake_mnist):
    path = fake_mnist / "mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = bytearray(gzip.compress(bytes(range(256)) * 40))
    whole[10:40] = b"\xff" * 30
    path.write_bytes(whole)
    with pytest.raises(report.InputError, match=r"t10k-labels-idx1-ubyte.gz cannot be unpacked"):
        data.read_idx(fake_mnist, "t10k-labels-idx1-ubyte", data.SOURCES["mnist"])


def test_downloads_end(tmp_path, monkeypatch):
    asked = []

    def urlopen(source, timeout):
        asked.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    with pytest.raises(report.InputError, match="cannot be fetched: timed out"):
        data.fetch_file("http://nowhere", tmp_path / "file")
    assert asked == [data.SECONDS]


def test_fashion_mnist_is_not_mnist(fake_mnist):
    assert (data.load("fashion", fake_mnist).train_x != data.load("mnist", fake_mnist).train_x).any()
    with pytest.raises(report.InputError, match=r"is of MNIST, not of Fashion-MNIST: that belongs in .*fashion-mnist"):
        data.load("fashion", fake_mnist / "mnist")


def test_mnist_is_downloaded_when_asked_and_only_then(fake_mnist, tmp_path):
    target = tmp_path / "fetched"
    source = data.SOURCES["mnist"]
    data.fetch(target, source._replace(url=(fake_mnist / "mnist").as_uri() + "/"))
    assert data.load("mnist", target).train_x.shape == (3, 784)
    with pytest.raises(report.InputError, match="cannot be fetched"):
        data.fetch(tmp_path / "nowhere", source._replace(url=(fake_mnist / "absent").as_uri() + "/"))


def command(*words, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "FNBP_DATA"} | environment
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def test_an_unwritable_out_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("experiments.digits", "--out", str(tmp_path / "file" / "results"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr and "serial" not in done.stdout


def test_missing_mnist_on_the_command_line_is_a_sentence(tmp_path):
    done = command("experiments.digits", "--data", "mnist", "--out", str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "error: MNIST is not there" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_data_set_is_refused(tmp_path):
    done = command("experiments.digits", "--data", "letters", "--out", str(tmp_path))
    assert done.returncode == 2 and "letters" in done.stdout + done.stderr


def test_worked_example_refuses_a_label_between_0_and_1(tmp_path):
    with pytest.raises(report.InputError, match="--y must be 0 or 1"):
        worked_example.main(worked_example.Settings(y=0.5, out=tmp_path))


@pytest.mark.parametrize("command", commands.commands(), ids=lambda command: command.name)
def test_every_setting_says_what_it_is(command):
    """In the help: a string under each field of Settings, its own or one that it inherits."""
    module = importlib.import_module(
        f"experiments.{command.name}" + (".__main__" if command.path.stem == "__main__" else "")
    )
    for kind in module.Settings.__mro__[:-1]:
        tree = ast.parse(inspect.cleandoc(inspect.getsource(kind)))
        fields = tree.body[0].body
        for field, after in zip(fields, [*fields[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert said, f"{command.name}: {ast.unparse(field.target)} has no docstring under it"
