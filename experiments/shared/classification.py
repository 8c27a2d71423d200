"""What the experiments on labelled examples share: training by the manual backward, and by jax.grad on request."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.data import Data
from experiments.shared.report import console

STEPS = 200  # over which the losses of the two trainings are compared
BOUND = 1e-4  # of their relative difference


@dataclass(frozen=True)
class Training:
    """Settings of a training."""

    epochs: int = 5
    """Passes over the training data."""
    batch_size: int = 64
    """The examples of one step."""
    learning_rate: float = 2e-3
    """The largest learning rate of Adam; it rises to this, then falls along half a cosine to 0."""
    warmup: float = 0.1
    """The share of the steps in which it rises."""
    seed: int = 0
    """The seed of the parameters and of the order of the batches."""
    side_by_side: bool = False
    """Also train by jax.grad over the same batches; compare losses and the cost of a gradient."""
    data: Literal["mnist", "fashion"] = "mnist"
    """The digits of MNIST, or the clothes of Fashion-MNIST."""
    data_folder: Path | None = None
    """The folder of the data; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the data if they are missing."""


@dataclass(frozen=True)
class Run:
    """One training."""

    fitted: fnbp.Fit
    accuracies: np.ndarray


def classify(net: fnbp.Layer, loaded: Data, settings: Training, out: Path) -> int:
    """Train, measure, draw and save. Returns: 1 if the two trainings part or end in numbers that are not finite."""
    began = time.perf_counter()
    if not 0 <= settings.warmup < 1:
        raise report.InputError(f"--warmup must be at least 0 and below 1, got {settings.warmup}")
    loss = fnbp.softmax_cross_entropy()
    key_init, key_fit = jax.random.split(jax.random.key(settings.seed))
    params, state = jax.jit(net.init)(key_init, loaded.train_x[:1])
    console.print(fnbp.tabulate(net, loaded.train_x[:1], params, state))

    console.print("training by the manual backward" + (", then by jax.grad" if settings.side_by_side else ""))
    runs = {"manual": train(net, loss, params, state, loaded, settings, key_fit, fnbp.value_and_grad)}
    measured: dict[str, Any] = {}
    if settings.side_by_side:
        automatic = train(net, loss, params, state, loaded, settings, key_fit, fnbp.automatic_value_and_grad)
        runs["automatic"] = automatic
        batch = loaded.train_x[: settings.batch_size], loaded.train_y[: settings.batch_size]
        price = fnbp.cost(net, loss, params, state, *batch, training(key_fit), samples=30)
        console.print(price)
        measured = {"apart": apart(runs["manual"], automatic), "cost": price.to_dict()}

    console.print(by_epoch(runs))
    done = runs["manual"]
    rows = [
        ("test accuracy", f"{done.accuracies[-1]:.2%} of {len(loaded.test_y):,}" if len(done.accuracies) else "none"),
        ("training", f"{done.fitted.message}; {done.fitted.history.seconds:.0f} s with compilation"),
    ]
    if settings.side_by_side:
        rows.append(("losses", f"manual and automatic within {measured['apart']:.1e} (relative), {STEPS} steps"))
    console.print(report.figures(rows), highlight=False)
    figure(out / "figure.png", net.name, runs)
    report.save(out, settings, measured | {
        "test_accuracy": [float(a) for a in done.accuracies],
        "parameters": report.count(params),
        "stopped": done.fitted.stopped,
        "training_seconds": {name: run.fitted.history.seconds for name, run in runs.items()},
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 1 if not measured.get("apart", 0) <= BOUND or done.fitted.stopped == "non-finite" else 0


def training(key: jax.Array) -> fnbp.Context:
    """The Context of a forward in training."""
    return fnbp.Context(key, train=True)


def train(
    net: fnbp.Layer,
    loss: fnbp.Loss,
    params: Any,
    state: Any,
    loaded: Data,
    settings: Training,
    key: jax.Array,
    gradient: Callable,
) -> Run:
    """Train by Adam, and measure the accuracy on the test part after each epoch."""
    steps = settings.epochs * (len(loaded.train_y) // settings.batch_size)
    up = int(settings.warmup * steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, up, max(steps, 1))

    fitted = fnbp.fit(
        net,
        loss,
        params,
        state,
        fnbp.Batches(loaded.train_x, loaded.train_y, settings.batch_size, drop_last=True),
        optimizer=optax.adam(rate),
        key=key,
        epochs=settings.epochs,
        gradient=gradient,
        validation=fnbp.Validation(loaded.test_x, loaded.test_y, fnbp.accuracy()),
    )
    return Run(fitted, fitted.history.metrics["accuracy"])


def apart(one: Run, other: Run) -> float:
    """The largest relative difference of the losses of the first STEPS steps."""
    a, b = (run.fitted.history.loss[:STEPS] for run in (one, other))
    n = min(len(a), len(b))
    return float(np.max(abs(a[:n] - b[:n]) / abs(b[:n])))


def by_epoch(runs: dict[str, Run]) -> Table:
    """A table of the test accuracy after each epoch and of the seconds of the whole training."""
    table = Table(title="test accuracy", title_justify="left")
    epochs = max(len(run.accuracies) for run in runs.values())
    for name in ("", *(f"epoch {i + 1}" for i in range(epochs)), "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for name, run in runs.items():
        cells = [f"{accuracy:.2%}" for accuracy in run.accuracies]
        cells += [""] * (epochs - len(cells))
        table.add_row(name, *cells, f"{run.fitted.history.seconds:.0f}")
    return table


def figure(path: Path, title: str, runs: dict[str, Run]) -> None:
    """Draw the loss, smoothed, and the test error after each epoch."""
    colours = {"manual": report.MANUAL, "automatic": report.AUTOMATIC}
    with plt.rc_context(report.STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
        for name, run in runs.items():
            style = {"color": colours[name], "label": name, "ls": "-" if name == "manual" else "--"}
            loss = run.fitted.history.loss
            window = max(1, len(loss) // 100)
            smooth = np.convolve(loss, np.ones(window) / window, "valid")
            left.plot(np.arange(len(smooth)) + window, smooth, **style)
            right.plot(np.arange(1, len(run.accuracies) + 1), 100 * (1 - run.accuracies), marker="o", **style)
        left.set(title=f"{title}: training loss", xlabel="step", ylabel="mean of 1 % of the steps", yscale="log")
        right.set(title="test error", xlabel="epoch", ylabel="%")
        right.set_ylim(bottom=0)
        right.xaxis.get_major_locator().set_params(integer=True)
        if len(runs) > 1:
            right.legend()
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)
