"""Nielsen's network of chapter 1 learns MNIST as his book says: 784-30-10, quadratic cost, eta 3, 30 epochs.

His own figures, at the best epoch, are 95.42 % with 30 hidden units and 96.59 % with 100. The whole run is compiled.
With --peer, the same loop also runs in PyTorch eager, from the same weights over the same batches, and both are timed.

Runs with different seeds vary, as he says: if weights have variance 1, an output unit may saturate and never learn its
digit. With 100 hidden units most runs lose one digit or more. --init chapter3 is his own remedy.

Source: Nielsen, Neural Networks and Deep Learning, chapter 1.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.table import Table

import fnbp
from experiments.shared import data, report
from experiments.shared.report import console
from fnbp.training.loop import permutation

MINUTES = 2  # on two CPU cores

HIS_BEST = {30: 0.9542, 100: 0.9659}
TRAINING = 50_000  # he trains on the first 50,000 and keeps 10,000 for validation


@dataclass(frozen=True)
class Settings:
    """Nielsen's settings are the defaults."""

    hidden: int = 30
    """The width of the hidden layer; he also tries 100."""
    init: Literal["chapter1", "chapter3"] = "chapter1"
    """Weights of variance 1, as in his chapter 1, or 1 / n_in, his remedy of chapter 3."""
    eta: float = 3.0
    """The learning rate of plain gradient descent."""
    batch_size: int = 10
    """The examples of one step."""
    epochs: int = 30
    """Passes over the training data."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """The seeds, one run for each."""
    peer: bool = False
    """Also run the loop of the first seed in PyTorch eager (extra: peers) and compare wall times."""
    data_folder: Path | None = None
    """The folder of MNIST; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download MNIST if it is missing."""
    out: Path = Path("results/nielsen")
    """The folder for figure.png and result.json."""


def network(hidden: int, init: str = "chapter1") -> fnbp.Layer:
    """Two sigmoid layers. All biases from a normal distribution of variance 1; weights too, or of variance 1 / n_in."""
    W = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
    W = {"chapter1": "normal", "chapter3": W}[init]
    return fnbp.serial(fnbp.dense(hidden, W, "normal"), fnbp.sigmoid(), fnbp.dense(10, W, "normal"), fnbp.sigmoid())


def train(
    net: fnbp.Layer, loaded: data.Data, settings: Settings, seed: int
) -> tuple[np.ndarray, fnbp.Fit, float, tuple]:
    """Train once. Returns: test accuracies by epoch, the Fit, wall seconds with compilation, the first weights."""
    key_init, key_fit = jax.random.split(jax.random.key(seed))
    params, state = net.init(key_init, loaded.train_x[:1])
    began = time.perf_counter()
    measure, accuracies = report.accuracy(net), []
    test = jax.device_put((loaded.test_x, loaded.test_y))
    fitted = fnbp.fit(
        net,
        fnbp.half_squared_error(),
        params,
        state,
        loaded.train_x[:TRAINING],
        np.eye(10, dtype=np.float32)[loaded.train_y[:TRAINING]],
        optimizer=optax.sgd(settings.eta),
        key=key_fit,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        on_epoch=lambda so_far: accuracies.append(measure(so_far.params, so_far.state, *test)),
    )
    return np.asarray(accuracies), fitted, time.perf_counter() - began, params


def batch_order(seed: int, epochs: int) -> list[np.ndarray]:
    """The permutations of the examples that fit draws for a seed."""
    key_order = jax.random.split(jax.random.split(jax.random.key(seed))[1])[0]
    return [np.asarray(permutation(key_order, epoch, TRAINING)) for epoch in range(epochs)]


def train_in_torch(params: Any, loaded: data.Data, settings: Settings) -> tuple[np.ndarray, float]:
    """Train in PyTorch eager from the same weights on the same batches. Returns: test accuracies, wall seconds."""
    import torch

    first, second = torch.nn.Linear(784, settings.hidden), torch.nn.Linear(settings.hidden, 10)
    for linear, p in ((first, params[0]), (second, params[2])):
        linear.load_state_dict({"weight": torch.tensor(np.asarray(p["W"])), "bias": torch.tensor(np.asarray(p["b"]))})
    model = torch.nn.Sequential(first, torch.nn.Sigmoid(), second, torch.nn.Sigmoid())
    x, test_x, test_y = (torch.tensor(a) for a in (loaded.train_x[:TRAINING], loaded.test_x, loaded.test_y))
    y = torch.nn.functional.one_hot(torch.tensor(loaded.train_y[:TRAINING]).long(), 10).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.eta)
    orders = [torch.tensor(order) for order in batch_order(settings.seeds[0], settings.epochs)]
    accuracies = []
    began = time.perf_counter()
    for order in orders:
        for rows in order.split(settings.batch_size):
            loss = ((model(x[rows]) - y[rows]) ** 2).sum() / (2 * len(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append((model(test_x).argmax(-1) == test_y).float().mean().item())
    return np.asarray(accuracies), time.perf_counter() - began


def main(settings: Settings) -> int:
    """Run the experiment."""
    began = time.perf_counter()
    if not settings.seeds:
        raise report.InputError("--seeds needs at least one seed")
    if settings.peer:
        require_torch()
    loaded = data.load("mnist", settings.data_folder, settings.download)
    net = network(settings.hidden, settings.init)
    params, state = net.init(jax.random.key(0), loaded.train_x[:1])
    console.print(fnbp.tabulate(net, loaded.train_x[:1], params, state))
    runs = {seed: train(net, loaded, settings, seed) for seed in settings.seeds}
    first = runs[settings.seeds[0]]
    peer = train_in_torch(first[3], loaded, settings) if settings.peer else None

    table = Table(title="test accuracy", title_justify="left")
    for name in ("", "best epoch", "last epoch", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for seed, (accuracies, _, seconds, _) in runs.items():
        best = int(accuracies.argmax())
        row = f"{accuracies[best]:.2%} (epoch {best + 1})", f"{accuracies[-1]:.2%}", f"{seconds:.1f}"
        table.add_row(f"fnbp, seed {seed}", *row)
    if peer is not None:
        best = int(peer[0].argmax())
        table.add_row(
            "PyTorch eager", f"{peer[0][best]:.2%} (epoch {best + 1})", f"{peer[0][-1]:.2%}", f"{peer[1]:.1f}"
        )
    if settings.hidden in HIS_BEST:
        table.add_row("Nielsen", f"{HIS_BEST[settings.hidden]:.2%}")
    console.print(table)
    if peer is not None:
        console.print(f"wall time, compilation included: PyTorch eager takes {peer[1] / first[2]:.1f} times as long")

    figure(
        settings.out / "figure.png",
        {seed: run[0] for seed, run in runs.items()},
        None if peer is None else peer[0],
        settings,
    )
    report.save(settings.out, settings, {
        "seeds": list(runs),
        "test_accuracy": [float(run[0].max()) for run in runs.values()],
        "test_accuracy_last_epoch": [float(run[0][-1]) for run in runs.values()],
        "training_seconds": [run[2] for run in runs.values()],
        "torch_seconds": None if peer is None else peer[1],
        "torch_test_accuracy": None if peer is None else float(peer[0].max()),
        "torch_over_fnbp": None if peer is None else peer[1] / first[2],
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0


def require_torch() -> None:
    """Raise InputError if PyTorch is not installed, before anything is trained."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise report.InputError("--peer needs PyTorch: pip install 'fnbp[peers]'") from error


def figure(path: Path, accuracies: dict[int, np.ndarray], peer: np.ndarray | None, settings: Settings) -> None:
    """Draw the test accuracy after each epoch, and his best as a line."""
    epochs = np.arange(1, settings.epochs + 1)
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(7, 4.2))
        for i, (seed, accuracy) in enumerate(accuracies.items()):
            alpha = 1 - 0.7 * i / len(accuracies)
            axes.plot(epochs, 100 * accuracy, color=report.MANUAL, alpha=alpha, label=f"fnbp, seed {seed}")
        if peer is not None:
            axes.plot(
                epochs, 100 * peer, color=report.AUTOMATIC, ls="--", label=f"PyTorch eager, seed {settings.seeds[0]}"
            )
        if settings.hidden in HIS_BEST:
            axes.axhline(100 * HIS_BEST[settings.hidden], color=report.INK, ls=":", lw=1, label="Nielsen's best")
        axes.set(title=f"MNIST, 784-{settings.hidden}-10", xlabel="epoch", ylabel="test accuracy, %")
        axes.legend(loc="lower right")
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
