"""How time and memory of a gradient grow with batch, width, depth and length: slopes on logarithmic axes.

A slope of 1 is proportional growth, 2 is that of the square. Each slope is a line of least squares through the larger
half of the sizes. Beside fnbp stands jax.grad of the same forward, and for attention jax.grad of the formula of all
positions at once, up to the length that it can hold.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

import fnbp
from experiments.bench.cases import labelled, normal, of_layer, of_model
from experiments.bench.in_jax import attention_by_hand
from experiments.bench.turns import in_rotation
from experiments.shared import report
from experiments.shared.report import console
from experiments.shared.timing import side_of
from fnbp.measurement import temp_bytes_of

MINUTES = 6  # on two CPU cores
OURS, JAX, PLAIN = "fnbp", "jax.grad", "plain JAX"
LONGEST = 2048  # positions of which plain attention holds all pairs


class Series(NamedTuple):
    """Something that grows: what its size is called, the sizes, and size -> the sides and their arguments."""

    what: str
    sizes: tuple[int, ...]
    make: Callable[[int], dict[str, tuple[Any, tuple]]]


def both(sides: tuple[Any, Any, tuple]) -> dict[str, tuple[Any, tuple]]:
    """The manual and the automatic side."""
    return {OURS: (sides[0], sides[2]), JAX: (sides[1], sides[2])}


def mlp(batch: int, width: int, hidden: int = 2) -> dict[str, tuple[Any, tuple]]:
    """A net of fully connected layers."""
    return both(of_model(fnbp.models.mlp(*[width] * hidden, 10), labelled(10, batch, 784)))


def deep(blocks: int) -> dict[str, tuple[Any, tuple]]:
    """Transformer blocks in one compiled loop."""
    block = fnbp.transformer_block(64, 4)
    return both(of_layer(fnbp.repeat(block, blocks), normal(4, 64, 64)))


def attention(length: int) -> dict[str, tuple[Any, tuple]]:
    """Causal attention of 4 heads of 32."""
    sides = both(of_layer(fnbp.attention(4, causal=True), normal(1, length, 128)))
    return sides | ({PLAIN: attention_by_hand(4, 1, length, 128)} if length <= LONGEST else {})


def recurrent(length: int) -> dict[str, tuple[Any, tuple]]:
    """An LSTM of 128 units."""
    return both(of_layer(fnbp.scan(fnbp.lstm_cell(128)), normal(16, length, 64)))


SERIES = {
    "MLP 784-512-512-10": Series("batch", (64, 128, 256, 512, 1024, 2048), lambda n: mlp(n, 512)),
    "MLP of two hidden layers, batch 256": Series("width", (128, 256, 512, 1024, 2048), lambda n: mlp(256, n)),
    "transformer blocks": Series("depth", (2, 4, 8, 16, 32), deep),
    "attention": Series("length", (256, 512, 1024, 2048, 4096, 8192), attention),
    "LSTM": Series("length", (32, 64, 128, 256, 512, 1024), recurrent),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    seconds: float = 4.0
    """For the samples of one size."""
    most: int = 0
    """Leave out sizes above this; 0: none."""
    out: Path = Path("results/growth")
    """The folder for figure.png and result.json."""


def main(settings: Settings) -> int:
    """Measure every series."""
    began = time.perf_counter()
    found = {name: grown(series, settings) for name, series in SERIES.items()}
    table = Table(title="slopes on logarithmic axes", title_justify="left")
    for head in ("", "size", "side", "time", "memory"):
        table.add_column(head, justify="right" if head in ("time", "memory") else "left")
    slopes: dict[str, dict[str, dict[str, float]]] = {}
    for name, sides in found.items():
        for side, points in sides.items():
            slopes.setdefault(name, {})[side] = both_slopes(points)
            of = slopes[name][side]
            table.add_row(name, SERIES[name].what, side, f"{of['time']:.2f}", f"{of['memory']:.2f}")
    console.print(table)
    figure(settings.out / "figure.png", found)
    report.save(settings.out, settings, {
        "slopes": slopes,
        **{name: {side: {key: [p[i] for p in points] for i, key in enumerate(("size", "ms", "megabytes"))}
                  for side, points in sides.items()} for name, sides in found.items()},
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0


def grown(series: Series, settings: Settings) -> dict[str, list[tuple[int, float, float]]]:
    """Of each side: size, milliseconds and megabytes."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for size in series.sizes:
        if settings.most and size > settings.most:
            continue
        sides, bytes_of = {}, {}
        for name, (function, args) in series.make(size).items():
            placed = jax.device_put(args)
            program = jax.jit(lambda *args, function=function: function(*args)).lower(*placed).compile()
            sides[name], bytes_of[name] = side_of(program, placed, wake=True), temp_bytes_of(program) or 0
        for name, seconds in in_rotation(sides, settings.seconds, 3, 50, rest=False).items():
            found.setdefault(name, []).append((size, 1e3 * float(np.median(seconds)), bytes_of[name] / 1e6))
    return found


def both_slopes(points: list[tuple[int, float, float]]) -> dict[str, float]:
    """The slopes of time and memory through the larger half of the sizes, at least two."""
    last = np.asarray(points[-max(2, len(points) // 2) :])
    sizes = np.log(last[:, 0])
    return {
        what: float(np.polyfit(sizes, np.log(np.maximum(last[:, i], 1e-9)), 1)[0])
        for i, what in ((1, "time"), (2, "memory"))
    }


def figure(path: Path, found: dict[str, dict[str, list[tuple[int, float, float]]]]) -> None:
    """Draw time above, memory below."""
    colours = {OURS: report.MANUAL, JAX: report.AUTOMATIC, PLAIN: report.INK}
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(2, len(found), figsize=(3 * len(found), 5.2), squeeze=False)
        for column, (name, sides) in enumerate(found.items()):
            for side, points in sides.items():
                sizes, *values = np.asarray(points).T
                for row, value in enumerate(values):
                    axes[row, column].loglog(sizes, value, "o-", color=colours[side], label=side, ms=4)
            axes[0, column].set_title(name.split(",")[0], fontsize=9)
            axes[1, column].set_xlabel(SERIES[name].what)
            for row in (0, 1):
                axes[row, column].set_xticks(SERIES[name].sizes, [f"{n}" for n in SERIES[name].sizes], fontsize=7)
                axes[row, column].minorticks_off()
        axes[0, 0].set_ylabel("ms")
        axes[1, 0].set_ylabel("temporary memory, MB")
        lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
        fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
