"""The network of fnbp/README.md learns handwritten digits by its own formulas, which agree with jax.grad.

It prints the network, its manual gradients beside the automatic ones leaf by leaf, how far the losses of the two
trainings part, the test accuracy, and what a gradient costs either way. The exit code is 1 if any gradient disagrees.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fnbp
from experiments.shared import data, report
from experiments.shared.report import console

MINUTES = 0.5  # on two CPU cores

STEPS = 500  # over which the losses of the two trainings are compared, in float32 and in float64
FORMULAS = {  # B1 of fnbp/README.md, by layer
    "serial[0]": "z1 = W1 x + b1",
    "serial[1]": "a1 = sigma(z1)",
    "serial[2]": "z2 = W2 a1 + b2",
    "serial[3]": "a2 = sigma(z2)",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the main experiment."""

    data: Literal["digits", "mnist", "fashion"] = "digits"
    """The digits of scikit-learn need no download; MNIST and Fashion-MNIST do."""
    hidden: int = 100
    """Width of the hidden layer."""
    activation: str = "sigmoid"
    """The activation of both layers, by name."""
    epochs: int = 60
    """Passes over the training data."""
    batch_size: int = 16
    """The examples of one step."""
    learning_rate: float = 0.01
    """The learning rate of Adam."""
    seed: int = 0
    """The seed of the parameters and of the order of the batches."""
    data_folder: Path | None = None
    """The folder of the data; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the data if they are missing."""
    out: Path = Path("results/digits")
    """The folder for figure.png and result.json."""


def network_of_the_guide(hidden: int, classes: int, activation: str = "sigmoid") -> fnbp.Layer:
    """The three-layer network of fnbp/README.md; its softmax is in the loss."""
    layers = (fnbp.dense(hidden), fnbp.activation(activation), fnbp.dense(classes), fnbp.activation(activation))
    return fnbp.serial(*layers)


def main(settings: Settings) -> int:
    """Run the experiment. Returns: 0 if every gradient agrees, else 1."""
    began = time.perf_counter()
    loaded = data.load(settings.data, settings.data_folder, settings.download)
    classes = int(loaded.train_y.max()) + 1
    net, loss = network_of_the_guide(settings.hidden, classes, settings.activation), fnbp.softmax_cross_entropy()
    key_init, key_fit = jax.random.split(jax.random.key(settings.seed))
    params, state = net.init(key_init, loaded.train_x[:1])
    notes = {path: FORMULAS[path.split(".")[0]] for path, _, _ in fnbp.leaves(net, params)}
    console.print(fnbp.tabulate(net, loaded.train_x[: settings.batch_size], params, state, notes=notes))
    console.print("y_hat = softmax(a2), J = mean cross-entropy of y_hat and y\n", highlight=False)

    batch = loaded.train_x[: settings.batch_size], loaded.train_y[: settings.batch_size]
    before = fnbp.compare(net, batch[0], params=params, loss=loss, y=batch[1])
    console.print(before)

    console.print("training by the manual backward, then by jax.grad over the same batches")
    manual, automatic = (train(net, loss, params, state, loaded, settings, key_fit, g) for g in GRADIENTS)
    apart = difference(manual.history.loss, automatic.history.loss)
    apart_float64 = trajectories(net, loss, params, state, loaded, settings, key_fit)
    after = fnbp.compare(net, batch[0], params=manual.params, loss=loss, y=batch[1], probes=("given",), transforms=())
    correct = report.accuracy(net)(manual.params, manual.state, loaded.test_x, loaded.test_y)
    measured_cost = fnbp.cost(net, loss, params, state, *batch)
    console.print(measured_cost)

    ok = before.ok and after.ok
    floor = math.log(1 + (classes - 1) / math.e)
    console.print(report.figures([
        ("test accuracy", f"{correct:.2%} of {len(loaded.test_y):,} held-out images"),
        ("training", f"{manual.message}; {manual.history.seconds:.1f} s with compilation"),
        ("loss floor", f"{floor:.4f} = ln(1 + {classes - 1}/e), as softmax sees outputs between 0 and 1"),
        ("gradients", f"{'agree' if ok else 'DISAGREE'} in float64 to {before.worst:.1e}, trained {after.worst:.1e}"),
        ("losses, float64", f"manual and automatic within {apart_float64.max():.1e} (relative), {STEPS} steps"),
        ("losses, float32", f"within {apart[:STEPS].max():.1e}, {STEPS} steps; {apart.max():.1e}, all {len(apart)}"),
    ]), highlight=False)  # fmt: skip
    figure(settings.out / "figure.png", net, manual, automatic, before, loaded, floor)
    report.save(settings.out, settings, {
        "test_accuracy": float(correct),
        "final_loss": float(manual.history.loss[-1]),
        "loss_floor": floor,
        "gradients_agree": ok,
        "max_relative_error_float64": before.worst,
        "max_relative_error_float64_trained": after.worst,
        "max_relative_loss_difference_float32": float(apart[:STEPS].max()),
        "max_relative_loss_difference_float32_all_steps": float(apart.max()),
        "max_relative_loss_difference_float64": float(apart_float64.max()),
        "training_seconds": manual.history.seconds,
        "cost": measured_cost.to_dict(),
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0 if ok else 1


GRADIENTS = (fnbp.value_and_grad, fnbp.automatic_value_and_grad)


def train(
    net: fnbp.Layer,
    loss: fnbp.Loss,
    params: Any,
    state: Any,
    loaded: data.Data,
    settings: Settings,
    key: jax.Array,
    gradient: Callable,
    **stop: Any,
) -> fnbp.Fit:
    """Train by Adam on the training part, over the same batches for every gradient."""
    x = loaded.train_x.astype(jnp.result_type(float))
    return fnbp.fit(
        net,
        loss,
        params,
        state,
        fnbp.Batches(x, loaded.train_y, settings.batch_size, drop_last=True),
        optimizer=optax.adam(settings.learning_rate),
        key=key,
        gradient=gradient,
        **(stop or {"epochs": settings.epochs}),
    )


def trajectories(
    net: fnbp.Layer, loss: fnbp.Loss, params: Any, state: Any, loaded: data.Data, settings: Settings, key: jax.Array
) -> np.ndarray:
    """The relative difference of the losses of STEPS steps in float64, manual against automatic."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        losses = [
            train(net, loss, wide, state, loaded, settings, key, g, steps=STEPS, progress=False).history.loss
            for g in GRADIENTS
        ]
    return difference(*losses)


def difference(manual: np.ndarray, automatic: np.ndarray) -> np.ndarray:
    """|manual - automatic| / automatic, step by step."""
    return abs(manual - automatic) / abs(automatic)


def figure(
    path: Path,
    net: fnbp.Layer,
    manual: fnbp.Fit,
    automatic: fnbp.Fit,
    compared: fnbp.Report,
    loaded: data.Data,
    floor: float,
) -> None:
    """Draw the losses and their difference, the error of every leaf, and the digits that are mistaken."""
    with plt.rc_context(report.STYLE):
        fig = plt.figure(figsize=(12, 7.5))
        left, right = fig.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
        over, under = left.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        draw_losses(over, under, manual.history.loss, automatic.history.loss, floor)
        top, bottom = right.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))[:, 0]
        draw_errors(top.subplots(), compared)
        draw_mistakes(bottom, net, manual, loaded)
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


def draw_losses(over: Any, under: Any, manual: np.ndarray, automatic: np.ndarray, floor: float) -> None:
    """Draw both losses over the steps and their floor, and below them their relative difference."""
    steps = np.arange(1, len(manual) + 1)
    over.plot(steps, automatic, color=report.AUTOMATIC, lw=3, alpha=0.6, label="jax.grad")
    over.plot(steps, manual, color=report.MANUAL, lw=0.8, label="manual backward")
    over.axhline(floor, color=report.INK, ls=":", lw=1)
    over.text(steps[-1], floor - 0.01, f"the loss's floor, {floor:.4f}", ha="right", va="top", color=report.INK)
    over.set(title="Loss of each step, the same batches", ylabel="J")
    over.set_ylim(bottom=floor - 0.08)
    over.legend(loc="upper right")
    apart = difference(manual, automatic)
    same = apart == 0
    under.semilogy(steps[~same], apart[~same], ".", ms=2, color=report.MANUAL)
    under.axhline(np.finfo(np.float32).eps, color=report.INK, ls=":", lw=1)
    under.text(0.99, 0.9, "dotted: float32 eps", transform=under.transAxes, ha="right", va="top", color=report.INK)
    under.set(title=f"Their relative difference: exactly 0 in {same.mean():.0%} of the steps", xlabel="step")
    under.set_ylim(1e-8, 1e-4)


def draw_errors(axes: Any, compared: fnbp.Report) -> None:
    """Draw the relative error of every leaf in float64, of the layer by itself and at the end of the whole pass."""
    rows = compared.rows
    least = 1e-18
    names = [f"{row.path.split('.')[-1]}  d{row.leaf}" for row in rows]
    at = np.arange(len(rows))[::-1]
    whole = [(max(row.whole, least), height) for row, height in zip(rows, at, strict=True) if row.whole is not None]
    axes.scatter(*zip(*whole, strict=True), color=report.MANUAL, label="whole pass", zorder=3)
    axes.scatter(
        [max(row.error, least) for row in rows], at, color=report.AUTOMATIC, s=14, label="layer alone", zorder=4
    )
    axes.axvline(np.finfo(np.float64).eps, color=report.INK, ls=":", lw=1)
    axes.set_xscale("log")
    axes.set(xlim=(least / 2, 1e-10), title="Manual against jax.grad, float64")
    axes.set_yticks(at, names, fontsize=8)
    axes.set_xlabel("relative error; at the left edge exactly 0; dotted: eps", loc="right")
    axes.grid(axis="y", alpha=0.2)
    axes.legend(loc="center right")


def draw_mistakes(fig: Any, net: fnbp.Layer, fitted: fnbp.Fit, loaded: data.Data, shown: int = 10) -> None:
    """Draw the held-out images that the network mistakes, with its answer and the label."""
    prediction = np.asarray(
        net.forward(fitted.params, fitted.state, jnp.asarray(loaded.test_x), fnbp.Context())[0]
    ).argmax(-1)
    wrong = np.flatnonzero(prediction != loaded.test_y)
    side = math.isqrt(loaded.test_x.shape[1])
    fig.suptitle(
        f"Mistaken: {len(wrong)} of {len(prediction):,} (says / is)", x=0.02, ha="left", fontweight="bold", fontsize=11
    )
    rows = 1 if len(wrong) <= shown // 2 else 2
    places = fig.subplots(rows, shown // 2).flat
    for axes, i in zip(places, [*wrong, *[None] * shown][: len(places)], strict=True):
        axes.axis("off")
        if i is not None:
            axes.imshow(loaded.test_x[i].reshape(side, side), cmap="gray_r")
            axes.set_title(f"{prediction[i]} / {loaded.test_y[i]}", loc="center", color=report.ACCENT, fontsize=10)


if __name__ == "__main__":
    report.run(Settings, main)
