"""Checkpoints and batches from an iterator cost little, memory stays flat, and a second fit begins at once.

The recipe of experiments.charlm, on blocks that an iterator cuts from the text, with a checkpoint every 250 steps, in
turns with the same training on arrays without checkpoints. Then a small net makes 10,000 steps in a fit, and 100 fits.
"""

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import track

import fnbp
from experiments.charlm.__main__ import Settings as Recipe
from experiments.charlm.__main__ import network
from experiments.shared import data, report
from experiments.shared.report import console

MINUTES = 5  # on two CPU cores

EVERY = 250  # steps between checkpoints
TOLERATED = 8 << 20  # bytes of growth that an allocator may keep


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    steps: int = 500
    """The steps of each turn of the recipe."""
    turns: int = 5
    """How many turns each side has."""
    long: int = 10_000
    """The steps of the long fit of the small net."""
    fits: int = 100
    """How many fits of the small net."""
    data_folder: Path | None = None
    """The folder of tinyshakespeare.txt; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the text if it is missing."""
    out: Path = Path("results/long_runs")
    """The folder for result.json."""


def main(settings: Settings) -> int:
    """Measure. Returns: 1 if the real training takes more than 1.10 of the plain one, or memory grows, else 0."""
    ratios = recipe(settings)
    ratio = float(np.median(ratios))
    console.print(
        f"checkpoints and an iterator: {ratio:.3f} of the time without ({', '.join(f'{r:.3f}' for r in ratios)})"
    )
    found = small(settings)
    console.print(
        f"memory after {settings.long // 5:,} steps and after {settings.long:,}: {found['steps_growth']:+.1f} MiB"
    )
    console.print(f"memory after {settings.fits // 5} fits and after {settings.fits}: {found['fits_growth']:+.1f} MiB")
    console.print(f"arrays that one fit after the other leaves: {found['arrays_growth']:+d}")
    console.print(f"the first step of a second fit: after {found['second_fit']:.3f} s (median)")
    report.save(settings.out, settings, {"ratio": ratio, "ratios": sorted(ratios), **found})
    flat = max(found["steps_growth"], found["fits_growth"]) * 2**20 <= TOLERATED and found["arrays_growth"] == 0
    return 0 if ratio <= 1.10 and flat else 1


def recipe(settings: Settings) -> list[float]:
    """The time of the real training over that of the plain one, turn by turn."""
    recipe = Recipe()
    letters, text = data.shakespeare(settings.data_folder, settings.download)
    net, loss = network(recipe, len(letters)), fnbp.softmax_cross_entropy()
    text, rng = np.asarray(text), np.random.default_rng(0)
    places = rng.integers(0, len(text) - recipe.block - 1, (4096, 1)) + np.arange(recipe.block)
    x, y = text[places], text[places + 1]
    params, state = jax.jit(net.init)(jax.random.key(0), x[:1])
    adamw, key = optax.adamw(1e-3), jax.random.key(1)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            at = rng.integers(0, len(text) - recipe.block - 1, (recipe.batch_size, 1)) + np.arange(recipe.block)
            yield text[at], text[at + 1]

    def seconds(batches: Any, **options: Any) -> float:
        began: list[tuple[float, int]] = []  # behind the first call, which may compile

        def at(step: int, _: float) -> None:
            began.append((time.perf_counter(), step))

        fnbp.fit(
            net, loss, params, state, batches, optimizer=adamw, key=key, steps=settings.steps, progress=False,
            callback=at, **options,
        )  # fmt: skip
        first, step = began[0]
        return (time.perf_counter() - first) / (settings.steps - step)

    def plain() -> float:
        return seconds(fnbp.Batches(x, y, recipe.batch_size))

    def real() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(fnbp.Stream(blocks()), checkpoint=fnbp.Checkpoints(folder, steps=EVERY))

    ratios = []
    for turn in track(range(settings.turns + 1), "turns", console=console, transient=True):
        pair = (plain, real) if turn % 2 else (real, plain)
        taken = {side: side() for side in pair}
        if turn:  # the first warms up
            ratios.append(taken[real] / taken[plain])
    return ratios


def small(settings: Settings) -> dict[str, Any]:
    """How memory grows in one long fit and over many, and how soon a second fit begins."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((512, 64), np.float32), rng.integers(0, 10, 512)
    net, loss, adam = fnbp.models.mlp(32, 10), fnbp.softmax_cross_entropy(), optax.adam(1e-3)
    params, state = net.init(jax.random.key(0), x)
    pairs = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 512, 32)]
    held = {"steps": [], "fits": []}
    waited, arrays = [], []

    def fit(steps: int, callback: Any = None) -> None:
        fnbp.fit(
            net, loss, params, state, fnbp.Stream(pairs), optimizer=adam, key=jax.random.key(1), steps=steps,
            progress=False, callback=callback, validation=(x[:64], y[:64]),
        )  # fmt: skip

    fit(settings.long, lambda step, _: held["steps"].append((step, resident())))
    for _ in track(range(settings.fits), "fits", console=console, transient=True):
        began, first = time.perf_counter(), []
        fit(64, lambda step, _, first=first: first.append(time.perf_counter()))
        waited.append(first[0] - began)
        gc.collect()
        held["fits"].append((len(held["fits"]), resident()))
        arrays.append(len(jax.live_arrays()))
    return {
        "steps_growth": growth(held["steps"], settings.long // 5),
        "fits_growth": growth(held["fits"], settings.fits // 5),
        "arrays_growth": arrays[-1] - arrays[settings.fits // 5],
        "second_fit": float(np.median(waited)),
    }


def growth(held: list[tuple[int, int]], first: int) -> float:
    """MiB from the first reading at or behind first to the last."""
    before = next(size for step, size in held if step >= first)
    return (held[-1][1] - before) / 2**20


def resident() -> int:
    """The bytes of memory that this process holds; where that is not told, the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    report.run(Settings, main)
