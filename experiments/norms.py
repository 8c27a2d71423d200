"""Single gradients while a transformer learns: their norms, and a noise scale that its norm layers alone foretell.

A small gpt learns Shakespeare letter by letter. Each step records quantiles of the gradient norms of single examples,
and trace and square of fnbp.statistics.noise_scale for each layer. The noise scale is the ratio of both, each averaged
over steps first, of all layers and of the layer norms alone. At the end trace and square are held against their
definition: gradients of small and of large batches. The exit code is 1 if the two ways disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import NullFormatter
from rich.table import Table

import fnbp
from experiments.charlm.__main__ import blocks, crops, split
from experiments.shared import data, report
from experiments.shared.report import console

MINUTES = 3  # on two CPU cores

LOSS = fnbp.softmax_cross_entropy()
QUANTILES = {"least": 0.0, "tenth": 0.1, "median": 0.5, "ninth": 0.9, "largest": 1.0}
FAR = 4.0  # standard errors by which the two ways may differ


@dataclass(frozen=True)
class Settings:
    """A small gpt on tinyshakespeare."""

    layers: int = 2
    """The transformer blocks."""
    heads: int = 2
    """The heads of attention in each block."""
    width: int = 48
    """The features of each position."""
    block: int = 32
    """Letters of context."""
    batch_size: int = 32
    """The blocks of text in one step."""
    steps: int = 2_000
    """The steps of the training."""
    learning_rate: float = 2e-3
    """The learning rate of Adam, reached after a twentieth of the steps."""
    horizon: int = 100
    """Steps over which trace and square are averaged, with weights that fall exponentially, before they are divided."""
    small: int = 4
    """The examples of a small batch, where the estimate is held against its definition."""
    draws: int = 300
    """How many small batches, and as many large ones of batch_size, are drawn there."""
    seed: int = 0
    """The seed of the parameters and of the batches."""
    data_folder: Path | None = None
    """The folder of tinyshakespeare.txt; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the text if it is missing."""
    out: Path = Path("results/norms")
    """The folder for figure.png and result.json."""


def main(settings: Settings) -> int:
    """Run the experiment. Returns: 0 if the estimate agrees with its definition, else 1."""
    if not 1 <= settings.small < settings.batch_size:
        raise report.InputError(f"--small must be from 1 to below {settings.batch_size}, got {settings.small}")
    letters, text = data.shakespeare(settings.data_folder, settings.download)
    train, _ = split(text, "tenth")
    x, y = (part.astype(np.int32) for part in blocks(train, settings.block))
    if len(x) < settings.batch_size:
        raise report.InputError(f"--batch-size must be at most {len(x)}, got {settings.batch_size}")
    net = fnbp.models.gpt(len(letters), settings.block, settings.layers, settings.heads, settings.width)
    params, state = jax.jit(net.init)(jax.random.key(settings.seed), x[:1])
    paths = [path for path, _, own in fnbp.leaves(net, params) if jax.tree.leaves(own)]
    fitted = fnbp.fit(
        net, LOSS, params, state, fnbp.Batches(x, y, settings.batch_size, drop_last=True),
        optimizer=optax.adam(optax.linear_schedule(0, settings.learning_rate, max(1, settings.steps // 20))),
        key=jax.random.key(settings.seed + 1), steps=settings.steps, gradient=measured, record=record_of(paths),
    )  # fmt: skip
    seen = Seen(fitted.history.loss, fitted.history.recorded, paths, settings.horizon)
    checked = against_definition(net, fitted.params, fitted.state, jnp.asarray(train.astype(np.int32)), settings)
    found = {**seen.compared(), "definition": checked, "loss": float(np.mean(seen.loss[-settings.horizon :]))}
    show(seen, found, fitted.message)
    figure(settings.out / "figure.png", seen, found)
    report.save(settings.out, settings, {"parameters": report.count(params), **found})
    return 0 if max(abs(checked["trace_apart"]), abs(checked["square_apart"])) <= FAR else 1


def measured(net: fnbp.Layer, loss: fnbp.Loss) -> Callable[..., Any]:
    """A gradient for fit that hands out the noise scale and the norm of each example's gradient."""
    noise_of, norms_of = fnbp.statistics.noise_scale(net, loss), fnbp.per_example_norms(net, loss)

    def gradient(params, state, x, y, ctx):
        (value, state_after, noise), grads = noise_of(params, state, x, y, ctx)
        return (value, state_after, (noise, norms_of(params, state, x, y, ctx))), grads

    return gradient


def record_of(paths: list[str]) -> dict[str, Callable[[fnbp.Step], jax.Array]]:
    """What of each step is kept."""
    quantiles = {
        f"norm {name}": lambda step, share=share: jnp.quantile(step.more[1], share) for name, share in QUANTILES.items()
    }
    return quantiles | {
        f"{what} {path}": lambda step, path=path, i=i: step.more[0].by_layer[path][i]
        for path in paths
        for i, what in enumerate(("trace", "square"))
    }


class Seen:
    """What a training recorded, and the noise scale of any of its layers."""

    def __init__(self, loss: np.ndarray, recorded: dict[str, np.ndarray], paths: list[str], horizon: int):
        self.loss, self.recorded, self.paths, self.horizon = loss, recorded, paths, horizon
        self.norms = [path for path in paths if path.endswith("norm")]
        self.steps = np.arange(1, len(loss) + 1)
        self.counted = self.steps > min(horizon, len(loss) // 2)  # before, the averages are of few steps

    def scale(self, paths: list[str]) -> np.ndarray:
        """The noise scale at each step of these layers together; NaN where the averaged square is not above 0."""
        trace, square = (
            smoothed(np.sum([self.recorded[f"{what} {path}"] for path in paths], 0), self.horizon)
            for what in ("trace", "square")
        )
        return np.where(square > 0, trace / np.where(square > 0, square, 1), np.nan)

    def compared(self) -> dict[str, Any]:
        """How the noise scale of norm layers and that of all layers go together, and what a single step shows."""
        every, norms = self.scale(self.paths), self.scale(self.norms)
        kept = self.counted & np.isfinite(every) & np.isfinite(norms)
        a, b = norms[kept], every[kept]
        squares = np.sum([self.recorded[f"square {path}"] for path in self.paths], 0)
        ends = {name: [float(v[kept][i]) for i in (0, -1)] for name, v in (("all", every), ("norms", norms))}
        by_layer = {path: float(self.scale([path])[-1]) for path in self.paths}
        middle, top = (smoothed(self.recorded[f"norm {name}"], self.horizon) for name in ("median", "largest"))
        return {
            "scale": ends,
            "correlation": float(np.corrcoef(a, b)[0, 1]),
            "correlation_of_logs": float(np.corrcoef(np.log(a), np.log(b))[0, 1]),
            "slope": float(a @ b / (a @ a)),
            "off": float(np.sqrt(np.mean((b / (a * (a @ b) / (a @ a)) - 1) ** 2))),
            "steps_compared": int(kept.sum()),
            "negative_squares": float(np.mean(squares <= 0)),
            "norm_median": [float(middle[self.counted][0]), float(middle[-1])],
            "largest_over_median": [float((top / middle)[self.counted][0]), float((top / middle)[-1])],
            "by_layer": {short(path): scale for path, scale in by_layer.items()},
        }


def smoothed(values: np.ndarray, horizon: int) -> np.ndarray:
    """The mean of a value and those before it, with weights that fall by 1 - 1 / horizon a step."""
    total, weight, means = 0.0, 0.0, []
    for value in np.asarray(values, float):
        total, weight = total * (1 - 1 / horizon) + value, weight * (1 - 1 / horizon) + 1
        means.append(total / weight)
    return np.array(means)


def short(path: str) -> str:
    """The end of a path, with the branch of the block that it stands in."""
    branch = {"[0].skip": "attention branch, ", "[1].skip": "mlp branch, "}
    within = next((name for part, name in branch.items() if part in path), "")
    return within + path[path.rindex("[") :]


def against_definition(
    net: fnbp.Layer, params: Any, state: Any, text: jax.Array, settings: Settings
) -> dict[str, float | int]:
    """trace and square at these parameters, by single gradients and by gradients of small and large batches.

    square = (B |G_B|^2 - b |G_b|^2) / (B - b)      trace = (|G_b|^2 - |G_B|^2) / (1 / b - 1 / B)

    McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. All batches are drawn apart from each other.
    """
    big, small = settings.batch_size, settings.small
    noise_of, gradient_of = fnbp.statistics.noise_scale(net, LOSS), fnbp.value_and_grad(net, LOSS)

    def one(key):
        keys = jax.random.split(key, 3)
        (_, _, noise), _ = noise_of(params, state, *crops(text, keys[0], big, settings.block))
        norms = (
            optax.tree.norm(gradient_of(params, state, *crops(text, k, size, settings.block))[1]) ** 2
            for k, size in zip(keys[1:], (big, small), strict=True)
        )
        whole, part = norms
        square, trace = (big * whole - small * part) / (big - small), (part - whole) / (1 / small - 1 / big)
        return jnp.stack([noise.trace, noise.square, trace, square])

    keys = jax.random.split(jax.random.key(settings.seed + 2), settings.draws)
    drawn = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys), float)
    mean, error = drawn.mean(0), drawn.std(0, ddof=1) / np.sqrt(len(drawn))
    found: dict[str, float | int] = {"draws": settings.draws, "small": small, "large": big}
    for i, name in enumerate(("trace", "square")):
        found |= {name: mean[i], f"{name}_error": error[i]}
        found |= {f"{name}_defined": mean[i + 2], f"{name}_defined_error": error[i + 2]}
        found[f"{name}_apart"] = (mean[i] - mean[i + 2]) / np.hypot(error[i], error[i + 2])
    return {name: value if isinstance(value, int) else float(value) for name, value in found.items()}


def show(seen: Seen, found: dict[str, Any], message: str) -> None:
    """Print what was found."""
    table = Table(title="noise scale of each layer at the end", title_justify="left")
    table.add_column("layer")
    table.add_column("noise scale", justify="right")
    for name, scale in found["by_layer"].items():
        table.add_row(name.replace("[", "\\["), f"{scale:.1f}")
    console.print(table)
    checked, ends = found["definition"], found["scale"]
    rows = [
        ("training", f"{message}; loss {found['loss']:.3f}"),
        ("gradient norm, median example", f"{found['norm_median'][0]:.2f}, at the end {found['norm_median'][1]:.2f}"),
        ("noise scale, all layers", f"{ends['all'][0]:.1f}, at the end {ends['all'][1]:.1f}"),
        ("noise scale, norm layers", f"{ends['norms'][0]:.1f}, at the end {ends['norms'][1]:.1f}"),
        ("correlation of the two", f"{found['correlation']:.3f}; of logarithms {found['correlation_of_logs']:.3f}"),
        ("all over norm layers", f"{found['slope']:.2f}, off by {found['off']:.1%} (root mean square)"),
        ("single steps with a square below 0", f"{found['negative_squares']:.1%}"),
    ]
    for name in ("trace", "square"):
        ours, due = (
            f"{checked[key]:.4g} +- {checked[f'{key}_error']:.2g}" for key in (name, f"{name}_defined")
        )  # fmt: skip
        rows.append((f"{name}, by single gradients / by definition", f"{ours} / {due}"))
    console.print(report.figures(rows), highlight=False)


def figure(path: Path, seen: Seen, found: dict[str, Any]) -> None:
    """Draw norms, the two noise scales, one against the other, and the noise scale of each layer."""
    with plt.rc_context(report.STYLE):
        fig, ((norms, scales), (both, layers)) = plt.subplots(2, 2, figsize=(12, 8))
        draw_norms(norms, seen)
        every, only = seen.scale(seen.paths), seen.scale(seen.norms)
        at = seen.counted
        scales.plot(seen.steps[at], every[at], color=report.MANUAL, label="all layers")
        scales.plot(seen.steps[at], only[at], color=report.AUTOMATIC, label="layer norms alone")
        scales.plot(
            seen.steps[at], only[at] * found["slope"], color=report.AUTOMATIC, ls=":", lw=1,
            label=f"layer norms, times {found['slope']:.2f}",
        )  # fmt: skip
        scales.set(title="Noise scale, in examples", xlabel="step", yscale="log")
        scales.legend()
        drawn = both.scatter(only[at], every[at], c=seen.steps[at], s=4, cmap="viridis")
        line = np.array([np.nanmin(only[at]), np.nanmax(only[at])])
        both.plot(line, line * found["slope"], color=report.INK, lw=1, ls=":")
        both.set(title=f"One against the other: correlation {found['correlation']:.3f}", xscale="log", yscale="log")
        both.set(xlabel="of layer norms alone", ylabel="of all layers")
        fig.colorbar(drawn, ax=both, label="step")
        for axis in (both.xaxis, both.yaxis, scales.yaxis):
            axis.set_minor_formatter(NullFormatter())
        for i, one in enumerate(seen.paths):
            width = 2.2 if one in seen.norms else 0.9
            layers.plot(seen.steps[at], seen.scale([one])[at], color=f"C{i}", lw=width, label=short(one))
        layers.set(title="Noise scale of each layer (thick: layer norms)", xlabel="step", yscale="log")
        layers.legend(fontsize=7, ncols=2)
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


def draw_norms(axes: Any, seen: Seen) -> None:
    """Draw quantiles of the gradient norms of single examples, averaged over steps as the noise scale is."""
    least, tenth, median, ninth, largest = (smoothed(seen.recorded[f"norm {q}"], seen.horizon) for q in QUANTILES)
    axes.fill_between(seen.steps, least, largest, color=report.MANUAL, alpha=0.12, label="least to largest")
    axes.fill_between(seen.steps, tenth, ninth, color=report.MANUAL, alpha=0.3, label="a tenth to nine tenths")
    axes.plot(seen.steps, median, color=report.MANUAL, label="median")
    axes.set(title="Gradient norms of single examples of a batch", xlabel="step", yscale="log")
    axes.legend()


if __name__ == "__main__":
    report.run(Settings, main)
