"""Every model of fnbp.models trains alike by the manual backward and by jax.grad, and what a gradient costs.

Both sides start from the same parameters and see the same batches and keys; they take 200 steps of descent with
momentum, in float32, and fewer in float64. Training can be chaotic: the slightest rounding grows, and it grows faster
if the steps are larger. So jax.grad is also compared with itself, from weights that are off by one rounding; each model
has a learning rate by which it learns and which stays clear of chaos. Then nets of growing depth are compiled: repeat
compiles its layer once, serial compiles every one. The data are random, so nothing is downloaded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.report import console

MINUTES = 8  # on two CPU cores

BOUND = 1e-4  # of the losses' relative difference in float32
BOUND_64 = 1e-6  # in float64, over STEPS_64 steps
STEPS_64 = 50
DEPTHS = (4, 12, 24, 48)
SERIAL = (4, 48)
LOSS = fnbp.softmax_cross_entropy()


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    steps: int = 200
    """The steps of each training in float32."""
    learning_rate: float | None = None
    """For every model; None: each its own."""
    only: str = ""
    """Only models whose name contains this."""
    samples: int = 20
    """Pairs of timings of a gradient."""
    depth: bool = True
    """Measure compile times over depth."""
    out: Path = Path("results/architectures")
    """The folder for figure.png and result.json."""


class Model(NamedTuple):
    """A model, the function that draws its batches, and its learning rate."""

    net: fnbp.Layer
    draw: Callable[[np.random.Generator], tuple[Any, Any]]
    learning_rate: float


def images(batch: int, *size: int, noise: float = 0.5, block: int = 4) -> Callable:
    """Noise over a pattern of blocks, one for each of 10 classes; a third of the labels are drawn, so that no loss goes
    to 0."""
    height, width, channels = size
    coarse = np.random.default_rng(0).standard_normal((10, height // block, width // block, channels))
    patterns = coarse.repeat(block, 1).repeat(block, 2)

    def draw(rng):
        y = rng.integers(0, 10, batch)
        x = np.asarray((noise * rng.standard_normal((batch, *size)) + patterns[y]) / 3, np.float32)
        return x, np.where(rng.random(batch) < 1 / 3, rng.integers(0, 10, batch), y)

    return draw


def shaped(draw: Callable, *shape: int) -> Callable:
    """Draw the same examples in another shape."""

    def drawn(rng):
        x, y = draw(rng)
        return x.reshape(-1, *shape), y

    return drawn


def ragged(draw: Callable) -> Callable:
    """Draw the same sequences, cut at random lengths."""

    def drawn(rng):
        x, y = draw(rng)
        return (x, rng.integers(1, x.shape[1] + 1, len(x))), y

    return drawn


def text(batch: int, block: int, vocabulary: int) -> Callable:
    """Draw tokens that count up, with noise."""

    def draw(rng):
        x = (rng.integers(0, vocabulary, (batch, 1)) + np.arange(block + 1)) % vocabulary
        x = np.where(rng.random(x.shape) < 0.1, rng.integers(0, vocabulary, x.shape), x)
        return x[:, :-1], x[:, 1:]

    return draw


DIGITS = images(64, 28, 28, 1)
ROWS = shaped(DIGITS, 28, 28)
MODELS = {
    "mlp 784-500-300-10": Model(fnbp.models.mlp(500, 300, 10), shaped(DIGITS, 784), 0.005),
    "lenet": Model(fnbp.models.lenet(), DIGITS, 0.0003),
    "resnet(14)": Model(fnbp.models.resnet(14), images(64, 32, 32, 3), 0.0001),
    "lstm_classifier(128)": Model(fnbp.models.lstm_classifier(128, 10), ROWS, 0.02),
    "gru_classifier(128), ragged": Model(fnbp.ragged(fnbp.models.gru_classifier(128, 10)), ragged(ROWS), 0.02),
    "gpt, 4 of width 128, dropout": Model(fnbp.models.gpt(65, 64, 4, 4, 128, rate=0.1), text(12, 64, 65), 0.02),
}


def main(settings: Settings) -> int:
    """Run the comparison. Returns: 1 if losses part, else 0."""
    began = time.perf_counter()
    chosen = {name: model for name, model in MODELS.items() if settings.only in name}
    if not chosen:
        raise report.InputError(f"--only {settings.only}: there are {', '.join(MODELS)}")
    table = Table(title=f"manual over automatic; losses apart after {settings.steps} steps", title_justify="left")
    for column in (
        "model",
        "parameters",
        "apart",
        "itself",
        "float64",
        "time (quartiles)",
        "memory",
        "compile",
    ):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    measured: dict[str, Any] = {}
    for name, model in chosen.items():
        if settings.learning_rate is not None:
            model = model._replace(learning_rate=settings.learning_rate)
        with console.status(name):
            one = measured[name] = against(model, settings)
        low, high = one["time_quartiles"]
        table.add_row(
            name,
            f"{one['parameters']:,}",
            f"{one['apart']:.1e}",
            f"{one['itself']:.1e}",
            f"{one['apart_64']:.1e}",
            f"{one['time']:.2f} ({low:.2f}-{high:.2f})",
            f"{one['memory']:.3f}" if one["memory"] else "-",
            f"{one['compile']:.2f}",
        )
    console.print(table)
    depths = over_depth() if settings.depth else {}
    for kind, seconds in depths.items():
        told = ", ".join(f"{n}: {t:.2f} s" for n, t in seconds.items())
        console.print(f"compile time of the gradient, {kind}(transformer_block(128, 4), n): {told}", highlight=False)
    if depths:
        ratio = depths["repeat"][DEPTHS[-1]] / depths["repeat"][DEPTHS[0]]
        console.print(f"repeat, n = {DEPTHS[-1]} over n = {DEPTHS[0]}: {ratio:.2f}", highlight=False)
        measured["compile_seconds"], measured["compile_ratio"] = depths, ratio
    figure(settings.out / "figure.png", {name: measured[name]["losses"] for name in chosen})
    report.save(settings.out, settings, measured | {"wall_seconds": time.perf_counter() - began})
    return 0 if all(equal(measured[name]) for name in chosen) else 1


def equal(one: dict[str, Any]) -> bool:
    """True if the losses of both trainings are equal, in float32 and in float64."""
    return one["apart"] <= BOUND and one["apart_64"] <= BOUND_64


def against(model: Model, settings: Settings) -> dict[str, Any]:
    """Train one model both ways, and measure the cost of both gradients."""
    net, draw, _ = model
    key = jax.random.key(0)
    x, y = draw(np.random.default_rng(1))
    params, state = jax.jit(net.init)(key, x)
    by = [gradient(net, LOSS) for gradient in (fnbp.value_and_grad, fnbp.automatic_value_and_grad)]
    manual, automatic = (trained(gradient, params, state, model, settings.steps) for gradient in by)
    itself = trained(by[1], off_by_a_rounding(params), state, model, settings.steps)
    with jax.enable_x64(True):
        wide = on_floats(lambda a: np.asarray(a, np.float64), (params, state))
        steps = min(STEPS_64, settings.steps)
        exact = [trained(gradient, wide[0], wide[1], model, steps, np.float64) for gradient in by]
    price = fnbp.cost(net, LOSS, params, state, x, y, fnbp.Context(key, train=True), samples=settings.samples)
    return {
        "parameters": report.count(params),
        "apart": apart(manual, automatic),
        "itself": apart(itself, automatic),
        "apart_64": apart(*exact),
        "losses": manual,
        "time": price.time_ratio,
        "time_quartiles": price.time_quartiles,
        "memory": price.memory_ratio,
        "compile": price.compile_ratio,
    }


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest relative difference of two rows of losses."""
    return float(np.max(abs(one - other) / abs(other)))


def on_floats(f: Callable, tree: Any) -> Any:
    """Apply f to the floating leaves of a tree."""
    return jax.tree.map(lambda a: f(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def off_by_a_rounding(params: Any) -> Any:
    """Move half of the parameters, chosen at random, up by one rounding."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda a: a * (1 + np.float32(2**-23) * rng.integers(0, 2, a.shape).astype(np.float32)), params)


def trained(
    gradient: Callable, params: Any, state: Any, model: Model, steps: int, dtype: Any = np.float32
) -> np.ndarray:
    """The losses of that many steps, each on a batch of its own."""
    optimizer = optax.sgd(model.learning_rate, momentum=0.9)

    @jax.jit
    def step(params, state, opt_state, x, y, key):
        (loss, state), grads = gradient(params, state, x, y, fnbp.Context(key, train=True))
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state, loss

    rng, losses, opt_state = np.random.default_rng(1), [], optimizer.init(params)
    for i in range(steps):
        key = jax.random.fold_in(jax.random.key(1), i)
        batch = on_floats(lambda a: a.astype(dtype), model.draw(rng))
        params, state, opt_state, loss = step(params, state, opt_state, *batch, key)
        losses.append(float(loss))
    return np.asarray(losses)


def over_depth() -> dict[str, dict[int, float]]:
    """The seconds that it takes to compile the gradient of a decoder, by its depth: the least of three."""
    block, x = fnbp.transformer_block(128, 4), jnp.ones((2, 16, 128))
    nets = {
        "repeat": {n: fnbp.repeat(block, n) for n in DEPTHS},
        "serial": {n: fnbp.serial(*[block] * n) for n in SERIAL},
    }
    found: dict[str, dict[int, float]] = {kind: {} for kind in nets}
    for kind, n, net in [(kind, n, net) for kind, of in nets.items() for n, net in of.items()]:
        params, state = jax.eval_shape(net.init, jax.random.key(0), x)
        lowered = [
            jax.jit(fnbp.value_and_grad(net, fnbp.half_squared_error())).lower(params, state, x, x) for _ in range(3)
        ]
        found[kind][n] = min(timed(one.compile) for one in lowered)
    return found


def timed(f: Callable[[], Any]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def figure(path: Path, losses: dict[str, np.ndarray]) -> None:
    """Draw the losses of the manual trainings."""
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(7, 4.2))
        for name, loss in losses.items():
            axes.plot(np.arange(1, len(loss) + 1), loss / loss[0], lw=1, label=name)
        axes.set(title="Trained by their manual backwards", xlabel="step", ylabel="loss over its first", yscale="log")
        fig.legend(loc="outside lower center", ncols=2, fontsize=8)
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
