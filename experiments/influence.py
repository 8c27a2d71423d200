"""Influence shows which training digits a mistake comes from, and self-influence finds wrong labels that were planted.

A LeNet-5 learns from a part of MNIST in which some labels are wrong, once for each seed. Four scores of each training
digit are summed over the checkpoints at the ends of the epochs. How many of the wrong labels are among the digits with
the largest score, twice as many as there are wrong ones? Then, of the first seed, it shows test digits that the net
mistakes, and the training digits that help and harm them most, by exact gradients and by random projections. The exit
code is 1 if self-influence finds less than nine tenths for any seed.
"""

import json
import time
from dataclasses import asdict, dataclass
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

MINUTES = 12  # on two CPU cores

CHUNK = 250  # examples at once
DUE = 0.9  # of the wrong labels, among twice as many digits
LOSS = fnbp.softmax_cross_entropy()


@dataclass(frozen=True)
class Settings:
    """Settings of the search."""

    examples: int = 5000
    """Training digits."""
    wrong: int = 50
    """So many of them get a wrong label."""
    held_out: int = 500
    """Digits with right labels, with which gradients are to agree."""
    epochs: int = 10
    """Passes over the training digits; a checkpoint after each."""
    batch_size: int = 50
    """The examples of one step."""
    learning_rate: float = 1e-3
    """The learning rate of Adam."""
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    """For each: the digits, the wrong labels, the parameters and the batches. The choices were made on 0 and 1."""
    queries: int = 5
    """Mistaken test digits that are shown."""
    projection: int = 8
    """Random projections have this number squared of numbers for each parameter."""
    data_folder: Path | None = None
    """The folder of the data; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the data if they are missing."""
    out: Path = Path("results/influence")
    """The folder for figure.png, result.json and found.jsonl, by which a run that was stopped goes on."""


class Digits(NamedTuple):
    """Training digits, of which some labels are wrong, and others with right labels."""

    x: np.ndarray
    y: np.ndarray
    wrong: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]


def planted(loaded: data.Data, settings: Settings, seed: int) -> Digits:
    """Digits drawn by seed; each wrong label is one of the nine others."""
    rng = np.random.default_rng(seed)
    n = settings.examples
    chosen = rng.permutation(len(loaded.train_y))[: n + settings.held_out]
    x, y = loaded.train_x[chosen].reshape(-1, 28, 28, 1), loaded.train_y[chosen].copy()
    wrong = rng.permutation(n)[: settings.wrong]
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return Digits(x[:n], y[:n], wrong, (x[n:], y[n:]))


def train(net: fnbp.Layer, digits: Digits, settings: Settings, seed: int) -> tuple[Any, Any]:
    """The checkpoints after each epoch, stacked along a first axis, and the state."""
    key_init, key_fit = jax.random.split(jax.random.key(seed))
    params, state = jax.jit(net.init)(key_init, digits.x[:1])
    checkpoints: list[Any] = []

    def keep(reached: fnbp.Fit) -> None:
        checkpoints.append(jax.tree.map(np.asarray, reached.params))

    options = {"batch_size": settings.batch_size, "epochs": settings.epochs, "progress": False, "on_epoch": keep}
    fnbp.fit(net, LOSS, params, state, digits.x, digits.y, optimizer=optax.adam(settings.learning_rate), key=key_fit,
             **options)  # fmt: skip
    return jax.tree.map(lambda *a: np.stack(a), *checkpoints), state


def scores(net: fnbp.Layer, checkpoints: Any, state: Any, digits: Digits) -> dict[str, np.ndarray]:
    """Of each training digit; the more suspect, the larger. Each is a sum over checkpoints.

    self-influence           |g_i|^2
    harm to all              -mean over the held-out digits j of <g_i, h_j>
    harm to one class        the largest over classes c of -mean over the held-out digits j of class c of <g_i, h_j>
    loss                     for comparison: the loss, without any gradient
    """
    alike = jax.nn.one_hot(digits.held_out[1], 10)
    by_class = jnp.concatenate([alike / jnp.maximum(alike.sum(0), 1), jnp.full((len(alike), 1), 1 / len(alike))], 1)
    influence = fnbp.statistics.influence(net, LOSS, CHUNK)

    @jax.jit
    def of(checkpoints: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        def at(params: Any) -> tuple[jax.Array, ...]:
            losses = LOSS.forward(net.forward(params, state, x, fnbp.Context())[0], y)[0]
            norms = fnbp.per_example_norms(net, LOSS)(params, state, x, y)
            return norms**2, influence(params, state, (x, y), digits.held_out) @ by_class, losses

        return jax.tree.map(lambda a: a.sum(0), jax.lax.map(at, checkpoints))

    parts = [of(checkpoints, digits.x[i : i + CHUNK], digits.y[i : i + CHUNK]) for i in range(0, len(digits.y), CHUNK)]
    own, agreement, losses = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {
        "self-influence": own,
        "harm to all": -agreement[:, -1],
        "harm to one class": -agreement[:, :-1].min(1),
        "loss": losses,
    }


def found(score: np.ndarray, wrong: np.ndarray) -> int:
    """How many of the wrong labels are among the digits with the largest score, twice as many as there are wrong."""
    return int(np.isin(np.argsort(-score, kind="stable")[: 2 * len(wrong)], wrong).sum())


def search(loaded: data.Data, settings: Settings) -> list[dict[str, Any]]:
    """For each seed, how many wrong labels each score finds; what found.jsonl has of the same settings stays."""
    path = settings.out / "found.jsonl"
    same = {name: value for name, value in report.plain(asdict(settings)).items() if name in SAME}
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = {row["seed"]: row for row in done if row["settings"] == same}
    net = fnbp.models.lenet()
    for seed in settings.seeds:
        if seed not in rows:
            digits = planted(loaded, settings, seed)
            checkpoints, state = train(net, digits, settings, seed)
            last = jax.tree.map(lambda a: a[-1], checkpoints)
            correct = report.accuracy(net)(last, state, loaded.test_x.reshape(-1, 28, 28, 1), loaded.test_y)
            of = {name: found(score, digits.wrong) for name, score in scores(net, checkpoints, state, digits).items()}
            rows[seed] = {"seed": seed, "settings": same, "accuracy": float(correct), "found": of}
            with path.open("a") as lines:
                lines.write(json.dumps(rows[seed]) + "\n")
        console.print(f"seed {seed}: {rows[seed]['found']}", highlight=False)
    return [rows[seed] for seed in settings.seeds]


SAME = ("examples", "wrong", "held_out", "epochs", "batch_size", "learning_rate")


class Shown(NamedTuple):
    """The influences of all training digits on mistaken test digits: exact, and projected."""

    digits: Digits
    x: np.ndarray
    y: np.ndarray
    said: np.ndarray
    exact: np.ndarray
    projected: np.ndarray


def mistakes(loaded: data.Data, settings: Settings) -> Shown:
    """Influences on the first test digits that the net of the first seed mistakes, at its last checkpoint."""
    seed = settings.seeds[0]
    net, digits = fnbp.models.lenet(), planted(loaded, settings, seed)
    checkpoints, state = train(net, digits, settings, seed)
    params = jax.tree.map(lambda a: a[-1], checkpoints)
    test = loaded.test_x.reshape(-1, 28, 28, 1)
    said = fnbp.predict(net, params, state, test).argmax(-1)
    at = np.flatnonzero(said != loaded.test_y)[: settings.queries]
    if not len(at):
        raise report.InputError("the net mistakes no test digit: there is nothing to show; train it less")
    train_set, query = (digits.x, digits.y), (test[at], loaded.test_y[at])
    size = settings.projection
    ways = (None, fnbp.project(jax.random.key(seed), size, size))
    exact, projected = (
        np.asarray(jax.jit(fnbp.statistics.influence(net, LOSS, CHUNK, way))(params, state, train_set, query))
        for way in ways
    )
    return Shown(digits, *query, said[at], exact, projected)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of Spearman: the correlation of the ranks."""
    one, other = (np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b))
    return float(np.corrcoef(one, other)[0, 1])


def main(settings: Settings) -> int:
    """Run the experiment. Returns: 0 if self-influence finds nine tenths of the wrong labels, for every seed."""
    began = time.perf_counter()
    if not 1 <= settings.wrong <= settings.examples // 2:
        raise report.InputError(f"--wrong must be from 1 to half the digits, got {settings.wrong}")
    if not settings.seeds:
        raise report.InputError("--seeds: give at least one")
    loaded = data.load("mnist", settings.data_folder, settings.download)
    if settings.examples + settings.held_out > len(loaded.train_y):
        raise report.InputError(f"--examples and --held-out: there are {len(loaded.train_y):,} digits in all")
    rows = search(loaded, settings)
    names = list(rows[0]["found"])
    table = Table("seed", "test accuracy", *names, title=f"of {settings.wrong} wrong labels, among the "
                  f"{2 * settings.wrong} largest", title_justify="left")  # fmt: skip
    for row in rows:
        table.add_row(str(row["seed"]), f"{row['accuracy']:.2%}", *(str(row["found"][name]) for name in names))
    console.print(table)

    shown = mistakes(loaded, settings)
    columns = range(len(shown.y))
    ranks = [rank_correlation(shown.exact[:, j], shown.projected[:, j]) for j in columns]
    both = [len(set(extremes(shown.exact[:, j], 10)) & set(extremes(shown.projected[:, j], 10))) for j in columns]
    rows_shown = [
        ("rank correlation", f"{min(ranks):.3f} to {max(ranks):.3f}, of exact and projected influence"),
        ("of the 20 extremes", f"{min(both)} to {max(both)} are the same by both"),
    ]
    console.print(report.figures(rows_shown), highlight=False)
    figure(settings.out / "figure.png", shown, ranks)
    counts = {name: [row["found"][name] for row in rows] for name in names}
    report.save(settings.out, settings, {
        "found": counts,
        "least": {name: min(each) for name, each in counts.items()},
        "most": {name: max(each) for name, each in counts.items()},
        "test_accuracy": [row["accuracy"] for row in rows],
        "rank_correlation": ranks,
        "least_rank_correlation": min(ranks),
        "most_rank_correlation": max(ranks),
        "same_extremes": both,
        "fewest_same_extremes": min(both),
        "most_same_extremes": max(both),
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return int(min(counts["self-influence"]) < DUE * settings.wrong)


def extremes(values: np.ndarray, count: int) -> list[int]:
    """The examples that help most, then those that harm most."""
    order = np.argsort(-values, kind="stable")
    return [*order[:count], *order[: -count - 1 : -1]]


def figure(path: Path, shown: Shown, ranks: list[float], count: int = 4) -> None:
    """Draw each mistaken digit, and the training digits that help and harm it most, exactly and projected."""
    n = len(shown.y)
    style: dict[Any, Any] = {**report.STYLE, "figure.constrained_layout.use": False}
    with plt.rc_context(style):
        fig, axes = plt.subplots(2 * n, 2 * count + 1, figsize=(9.5, 2.25 * n + 0.7), squeeze=False)
        fig.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=1 - 0.8 / (2.25 * n + 0.7), hspace=0.45)
        for j in range(n):
            for half, values in enumerate((shown.exact[:, j], shown.projected[:, j])):
                row = axes[2 * j + half]
                for place in row:
                    place.axis("off")
                if half == 0:
                    draw(row[0], shown.x[j], f"{shown.said[j]} / {shown.y[j]}", report.INK)
                else:
                    row[0].text(0.5, 0.5, f"projected\nrank corr.\n{ranks[j]:.2f}", ha="center", va="center",
                                transform=row[0].transAxes, fontsize=9)  # fmt: skip
                for place, i in zip(row[1:], extremes(values, count), strict=True):
                    helps = values[i] > 0
                    planted = " wrong" if i in shown.digits.wrong else ""
                    colour = report.MANUAL if helps else report.ACCENT
                    draw(place, shown.digits.x[i], f"{shown.digits.y[i]}{planted}", colour)
        fig.suptitle("Says / is, then the training digits with their labels: four that help most, four that harm most",
                     x=0.02, ha="left", fontsize=11, fontweight="bold")  # fmt: skip
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


def draw(axes: Any, image: np.ndarray, title: str, colour: str) -> None:
    """Draw a digit."""
    axes.imshow(image[..., 0], cmap="gray_r")
    axes.set_title(title, loc="center", color=colour, fontsize=9, pad=2)


if __name__ == "__main__":
    report.run(Settings, main)
