"""How many steps K-FAC takes to the training loss that Adam reaches on a deep autoencoder of MNIST.

The net is 784-1000-500-250-30-250-500-1000-784, of the widths of Hinton & Salakhutdinov 2006, with tanh and a linear
code, under binary cross-entropy, the mean over pixels. K-FAC, Adam, and SGD with momentum get equally many trials:
pairs of a learning rate and, for K-FAC, a damping. All see the same batches from the same start. A run that was
interrupted goes on with the trials that are missing.
"""

import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.table import Table

import fnbp
from experiments.shared import data, report
from experiments.shared.report import console

MINUTES = 10  # on two CPU cores

COLOURS = {"K-FAC": report.MANUAL, "Adam": report.AUTOMATIC, "SGD": report.INK}


@dataclass(frozen=True)
class Settings:
    """Settings of the race."""

    widths: tuple[int, ...] = (1000, 500, 250, 30)
    """The widths of the encoder; the decoder has them backwards."""
    examples: int = 10_000
    """So many of the training images."""
    batch_size: int = 1_000
    """The examples of one step."""
    steps: int = 200
    """The steps of every trial."""
    rates: tuple[float, ...] = (0.03, 0.1)
    """The learning rates of K-FAC, with a momentum of 0.9."""
    dampings: tuple[float, ...] = (1e-4, 1e-3)
    """The dampings of K-FAC, each tried with each of its learning rates."""
    adam: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """The learning rates of Adam."""
    sgd: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """The learning rates of SGD, with a momentum of 0.9."""
    clip: float = 1e-4
    """The clip of K-FAC, in units of the mean over pixels."""
    interval: int = 3
    """The steps between two estimates of the factors."""
    seed: int = 0
    """The seed of the parameters and of the batches."""
    data: str = "mnist"
    """The images: mnist, fashion, or digits, which need no download."""
    data_folder: Path | None = None
    """The folder of the data; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the data if they are missing."""
    out: Path = Path("results/kfac")
    """The folder for trials.jsonl, figure.png and result.json."""


class Trial(NamedTuple):
    """An optimizer with its numbers."""

    kind: str
    rate: float
    damping: float | None = None

    @property
    def title(self) -> str:
        """Its name in a table."""
        return f"{self.kind}, {self.rate:g}" + ("" if self.damping is None else f", damping {self.damping:g}")


def main(settings: Settings) -> int:
    """Run all trials. Returns: 0 if K-FAC needs at most half of Adam's steps, else 1."""
    began = time.perf_counter()
    x = data.load(settings.data, settings.data_folder, settings.download).train_x[: settings.examples]
    if len(x) < settings.batch_size or settings.steps < len(x) // settings.batch_size:
        raise report.InputError(f"{len(x)} images make no epoch of {settings.steps} batches of {settings.batch_size}")
    trials = trials_of(settings)
    known = earlier(settings)
    for trial in trials:
        if trial.title not in known:
            known[trial.title] = train(trial, settings, x)
            keep(settings, trial, known[trial.title])
    epoch = len(x) // settings.batch_size
    best = {kind: fastest(kind, trials, known, epoch) for kind in COLOURS}
    target = smooth(known[best["Adam"].title]["losses"], epoch)[-1]
    reached = {kind: steps_to(target, known[trial.title]["losses"], epoch) for kind, trial in best.items()}
    ratio = None if reached["K-FAC"] is None else reached["K-FAC"] / settings.steps
    ok = ratio is not None and ratio <= 0.5
    console.print(table(trials, known, epoch, target))
    said = "never" if ratio is None else f"after {ratio:.2f} of Adam's {settings.steps} steps"
    console.print(f"K-FAC reaches the loss of the best Adam, {target:.4f}, {said}", highlight=False)
    figure(settings.out / "figure.png", best, known, epoch, target)
    report.save(settings.out, settings, {
        "ok": ok,
        "steps_over_adam": ratio,
        "target": target,
        "best": {kind: trial.title for kind, trial in best.items()},
        "steps": reached,
        "final": {kind: float(smooth(known[trial.title]["losses"], epoch)[-1]) for kind, trial in best.items()},
        "step_over_adam_time": mean_step(known, best["K-FAC"]) / mean_step(known, best["Adam"]),
        "time_over_adam": None if ratio is None else time_of(known, best["K-FAC"], reached["K-FAC"])
        / time_of(known, best["Adam"], settings.steps),
        "diverged": sum(diverged(known[trial.title]["losses"]) for trial in trials),
        "trials": len(trials),
        "losses": {trial.title: known[trial.title]["losses"] for trial in trials},
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0 if ok else 1


# --- the trials ---


def trials_of(settings: Settings) -> list[Trial]:
    """Every trial. InputError if the optimizers do not get equally many."""
    made = [Trial("K-FAC", *numbers) for numbers in product(settings.rates, settings.dampings)]
    made += [Trial("Adam", rate) for rate in settings.adam] + [Trial("SGD", rate) for rate in settings.sgd]
    counts = {kind: sum(trial.kind == kind for trial in made) for kind in COLOURS}
    if len(set(counts.values())) > 1 or not made:
        raise report.InputError(f"each optimizer must get equally many trials, got {counts}")
    return made


def autoencoder(widths: tuple[int, ...], pixels: int) -> fnbp.Layer:
    """The net, whose outputs are logits of pixels."""
    *hidden, code = widths
    layers = [layer for n in hidden for layer in (fnbp.dense(n), fnbp.tanh())] + [fnbp.dense(code)]
    layers += [layer for n in reversed(hidden) for layer in (fnbp.dense(n), fnbp.tanh())] + [fnbp.dense(pixels)]
    return fnbp.serial(*layers)


def optimizer_of(trial: Trial, settings: Settings, net: fnbp.Layer, loss: fnbp.Loss, x: np.ndarray) -> Any:
    """The optimizer of a trial."""
    if trial.kind == "Adam":
        return optax.adam(trial.rate)
    if trial.kind == "SGD":
        return optax.sgd(trial.rate, 0.9)
    assert trial.damping is not None
    return fnbp.statistics.kfac(
        net, loss, x, x, trial.rate, trial.damping, settings.interval, clip=settings.clip, momentum=0.9
    )


def train(trial: Trial, settings: Settings, x: np.ndarray) -> dict[str, list[float]]:
    """The loss of each step and the seconds that it took, without those of compilation."""
    net, loss = autoencoder(settings.widths, x.shape[1]), fnbp.binary_cross_entropy(from_logits=True)
    params, state = net.init(jax.random.key(settings.seed), x[:1])
    optimizer = optax.with_extra_args_support(optimizer_of(trial, settings, net, loss, x[:1]))

    def step(params, opt_state, x, key):
        batch = state, x, x, fnbp.Context(key, train=True)
        (J, _), grads = fnbp.value_and_grad(net, loss)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, J

    opt_state, key = optimizer.init(params), jax.random.key(settings.seed + 1)
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, x[: settings.batch_size], key).compile()
    losses, seconds = [], []
    for i, rows in enumerate(batches(settings, len(x))):
        batch, now = jnp.asarray(x[rows]), jax.random.fold_in(key, i)
        began = time.perf_counter()
        params, opt_state, J = run(params, opt_state, batch, now)
        losses.append(float(J))
        seconds.append(time.perf_counter() - began)
        if not np.isfinite(losses[-1]):
            break
    console.print(f"{trial.title}: {len(losses)} steps, {losses[0]:.4f} -> {losses[-1]:.4f}", highlight=False)
    return {"losses": losses, "seconds": seconds}


def batches(settings: Settings, examples: int) -> list[np.ndarray]:
    """The rows of each step: every epoch in an order of its own."""
    rng, size = np.random.default_rng(settings.seed), settings.batch_size
    each = examples // size
    epochs = (rng.permutation(examples)[: each * size].reshape(each, size) for _ in range(-(-settings.steps // each)))
    return [rows for epoch in epochs for rows in epoch][: settings.steps]


def stem(settings: Settings) -> dict[str, Any]:
    """What a trial depends on beside its own numbers."""
    apart = ("rates", "dampings", "adam", "sgd", "data_folder", "download", "out")
    return {name: value for name, value in report.plain(asdict(settings)).items() if name not in apart}


def earlier(settings: Settings) -> dict[str, Any]:
    """The trials of an earlier run with the same settings, by their titles."""
    path = settings.out / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["title"]: line["found"] for line in lines if line["settings"] == stem(settings)}


def keep(settings: Settings, trial: Trial, found: dict[str, Any]) -> None:
    """Write a trial down."""
    with (settings.out / "trials.jsonl").open("a") as file:
        file.write(json.dumps({"title": trial.title, "settings": stem(settings), "found": found}) + "\n")


# --- what they tell ---


def diverged(losses: list[float]) -> bool:
    """True if the loss was not finite, or ends above its first value."""
    return not np.isfinite(losses[-1]) or losses[-1] > losses[0]


def smooth(losses: list[float], epoch: int) -> np.ndarray:
    """The mean over the epoch that ends at each step, from the first whole one on."""
    return np.convolve(losses, np.ones(epoch) / epoch, "valid")


def fastest(kind: str, trials: list[Trial], known: dict[str, Any], epoch: int) -> Trial:
    """The trial of an optimizer with the least loss at its end."""

    def end(trial: Trial) -> float:
        losses = known[trial.title]["losses"]
        return float("inf") if diverged(losses) else float(smooth(losses, epoch)[-1])

    return min((trial for trial in trials if trial.kind == kind), key=end)


def steps_to(target: float, losses: list[float], epoch: int) -> int | None:
    """The first step at the end of an epoch whose mean loss is at most the target."""
    if len(losses) < epoch:
        return None
    there = np.flatnonzero(smooth(losses, epoch) <= target)
    return int(there[0]) + epoch if len(there) else None


def mean_step(known: dict[str, Any], trial: Trial) -> float:
    """The mean seconds of a step without the first; a mean, as not every step of K-FAC is alike."""
    return float(np.mean(known[trial.title]["seconds"][1:]))


def time_of(known: dict[str, Any], trial: Trial, steps: int | None) -> float:
    """The seconds of so many steps."""
    return float(np.sum(known[trial.title]["seconds"][:steps]))


def table(trials: list[Trial], known: dict[str, Any], epoch: int, target: float) -> Table:
    """Every trial: its last loss, when it reached the target, and the time of a step."""
    made = Table(title="loss of the last epoch, mean over pixels", title_justify="left")
    for name in ("optimizer, learning rate", "loss", "steps to the best of Adam", "ms a step"):
        made.add_column(name, justify="left" if name[0] == "o" else "right", no_wrap=True)
    for trial in trials:
        losses = known[trial.title]["losses"]
        end = "diverged" if diverged(losses) else f"{smooth(losses, epoch)[-1]:.4f}"
        made.add_row(
            trial.title, end, str(steps_to(target, losses, epoch) or "-"), f"{1e3 * mean_step(known, trial):.0f}"
        )
    return made


def figure(path: Path, best: dict[str, Trial], known: dict[str, Any], epoch: int, target: float) -> None:
    """Draw the loss of the best trial of each optimizer, against the step and against the seconds."""
    with plt.rc_context(report.STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for kind, trial in best.items():
            losses = smooth(known[trial.title]["losses"], epoch)
            seconds = np.cumsum(known[trial.title]["seconds"])[epoch - 1 :]
            left.plot(np.arange(epoch, epoch + len(losses)), losses, color=COLOURS[kind], label=trial.title)
            right.plot(seconds, losses, color=COLOURS[kind])
        for axes in (left, right):
            axes.axhline(target, color=report.INK, lw=1, ls=":")
            axes.set_yscale("log")
        left.set(title="Loss of the epoch, mean over pixels", xlabel="step")
        right.set(title="The same against time", xlabel="seconds, without compilation")
        left.legend()
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
