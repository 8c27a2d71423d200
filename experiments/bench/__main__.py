"""A hand-written backward against jax.grad, Flax NNX, Equinox and PyTorch: every layer, model and training step.

All sides are compiled, warmed up and timed in turns in one run. A ratio is fnbp / other, the median of pairwise ratios
with its quartiles: below 1 fnbp is faster. jax.grad differentiates fnbp's own forward, plain JAX the formula as one
writes it. Memory is the temporary memory of
the compiled programs. The share of the peak is that of the fastest product of two matrices of 2048 x 2048 in the same
run, and counts products and convolutions only. XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= switches XLA's YNNPACK
off.
"""

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from experiments.bench import in_jax, in_torch
from experiments.bench.cases import GROUPS, Case
from experiments.bench.counting import products_of
from experiments.bench.turns import Torch, in_rotation, quotients
from experiments.shared import report
from experiments.shared.report import console
from experiments.shared.timing import distance, side_of
from fnbp.measurement import flops_of, ratio, temp_bytes_of

MINUTES = 25  # on two CPU cores
OURS, JAX, TORCH = "fnbp", "jax.grad", "PyTorch"
PEERS = (in_jax.PLAIN, in_jax.NNX, in_jax.EQUINOX, TORCH)
COLOURS = dict(zip((JAX, *PEERS), (report.MANUAL, "#7a7a7a", report.AUTOMATIC, report.INK, report.ACCENT), strict=True))
APART = 2e-3  # the largest distance of both gradients in float32, relative to the largest number of an array


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    quick: bool = False
    """Take a few cases and samples."""
    only: str = ""
    """Take only cases whose name contains this, or one of several: "LSTM|GRU"."""
    peers: bool = True
    """Also time Flax NNX, Equinox and PyTorch, where they are installed."""
    compiled: bool = False
    """Time PyTorch by torch.compile."""
    resume: bool = False
    """Keep the cases in rows.jsonl and go on from there."""
    seconds: float = 6.0
    """For the samples of one case."""
    out: Path = Path("results/bench")
    """The folder for figure.png and result.json."""


def main(settings: Settings) -> int:
    """Run the benchmark."""
    began = time.perf_counter()
    chosen = list(cases_of(settings))
    with_torch = settings.peers and importlib.util.find_spec("torch") is not None
    if settings.peers and not with_torch:
        console.print("PyTorch is not installed (extra: peers)")
    peak = peak_flops()
    rows: dict[str, dict[str, Any]] = {}
    log = settings.out / "rows.jsonl"
    known = dict(map(json.loads, log.read_text().splitlines())) if settings.resume and log.is_file() else {}
    with (
        closing(Torch(settings.compiled)) if with_torch else nullcontext() as torch,
        log.open("a" if settings.resume else "w") as file,
    ):
        for group, case in chosen:
            if case.name in known:
                rows[case.name] = known[case.name]
                continue
            rows[case.name] = {"group": group} | (row := measured(case, settings, torch, peak)) | {"said": said(row)}
            print(json.dumps((case.name, rows[case.name])), file=file, flush=True)
            console.print(line_of(case.name, rows[case.name]), highlight=False)
    console.print(table(rows, peak))
    figure(settings.out / "figure.png", rows)
    report.save(settings.out, settings, {
        "peak_gflops": peak / 1e9,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "wall_seconds": time.perf_counter() - began,
        **rows,
    })  # fmt: skip
    wrong = [name for name, row in rows.items() if row["apart"] > APART]
    if wrong:
        console.print(f"[bold red]both gradients differ:[/] {', '.join(wrong)}")
    return int(bool(wrong))


def cases_of(settings: Settings) -> Iterator[tuple[str, Case]]:
    """The cases that are asked for. Raises: InputError if there is none."""
    asked = settings.only.split("|")
    known = [(group, case) for group, cases in GROUPS.items() for case in cases]
    found = [one for one in known if any(part in one[1].name for part in asked)]
    if not found:
        raise report.InputError(f"--only {settings.only}: no case has that in its name")
    return (one for one in found if one[1].quick or not settings.quick)


def measured(case: Case, settings: Settings, torch: Torch | None, peak: float) -> dict[str, Any]:
    """What a case costs by each side."""
    manual, automatic, args = case.sides()
    args = jax.device_put(args)
    programs = {OURS: compiled(manual, args), JAX: compiled(automatic, args)}
    apart = distance(*(program(*args) for program, _ in programs.values()))
    sides = {name: side_of(program, args, wake=True) for name, (program, _) in programs.items()}
    memory = {name: temp_bytes_of(program) for name, (program, _) in programs.items()}
    for peer, make in in_jax.PEERS.get(case.name, {}).items() if settings.peers else ():
        if in_jax.installed(peer):
            function, given = make()
            given = jax.device_put(given)
            program, _ = compiled(function, given)
            sides[peer], memory[peer] = side_of(program, given, wake=True), temp_bytes_of(program)
    with_torch = torch is not None and case.name in in_torch.PEERS
    if torch is not None and with_torch:
        sides[TORCH] = torch.side(case.name)
    budget = settings.seconds / (4 if settings.quick else 1)
    seconds = in_rotation(sides, budget, least=3 if settings.quick else 5, most=200, rest=with_torch)
    products, ours = products_of(manual, *args), float(np.median(seconds[OURS]))
    return {
        "ms": 1e3 * ours,
        "samples": len(seconds[OURS]),
        "of_peak": products / ours / peak,
        "gflop": products / 1e9,
        "flops_ratio": ratio(flops_of(programs[OURS][0]), flops_of(programs[JAX][0])),
        "megabytes": (memory[OURS] or 0) / 1e6,
        "compile_seconds": [taken for _, taken in programs.values()],
        "apart": apart,
        "time": {name: quotients(seconds[OURS], each) for name, each in seconds.items() if name != OURS},
        "memory": {name: shares(memory[OURS], each) for name, each in memory.items() if name != OURS},
    }


def compiled(function: Any, args: tuple) -> tuple[Any, float]:
    """A function compiled for these arguments, and the seconds that took."""
    began = time.perf_counter()
    program = jax.jit(lambda *args: function(*args)).lower(*args).compile()
    return program, time.perf_counter() - began


def shares(ours: int | None, theirs: int | None) -> float | None:
    """ours / theirs; None if one is unknown, or below 1 MB, where it says nothing."""
    return ratio(ours, theirs) if ours and theirs and max(ours, theirs) >= 1e6 else None


def peak_flops() -> float:
    """Floating point operations a second, of the fastest of some products of matrices of 2048 x 2048."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    side = side_of(product, (a, a))
    return 2 * 2048**3 / min(side(1) for _ in range(8))


def text(quartiles: list[float] | None) -> str:
    """A ratio with its quartiles."""
    return "" if quartiles is None else f"{quartiles[1]:.2f} ({quartiles[0]:.2f}-{quartiles[2]:.2f})"


def said(row: dict[str, Any]) -> dict[str, str]:
    """What the tables say of a case; "" of a peer that has none of it."""
    times = {peer: text(row["time"].get(peer)) for peer in (JAX, *PEERS)}
    share = f"{row['of_peak']:.0%}" if row["gflop"] else ""
    return times | {"peak": share, "memory": of(row), "ms": f"{row['ms']:.1f}", "MB": f"{row['megabytes']:.1f}"}


def line_of(name: str, row: dict[str, Any]) -> str:
    """A case as soon as it is measured."""
    others = "".join(f", of {peer}'s {row['said'][peer]}" for peer in PEERS if row["said"][peer])
    return f"{name}: {row['ms']:.2f} ms, of jax.grad's time {row['said'][JAX]}, memory {of(row)}{others}"


def of(row: dict[str, Any]) -> str:
    """The memory of fnbp, of that of jax.grad."""
    share = row["memory"][JAX]
    return "-" if share is None else f"{share:.2f}"


def table(rows: dict[str, dict[str, Any]], peak: float) -> Table:
    """The whole."""
    title = f"fnbp / other on {jax.devices()[0].device_kind}; peak {peak / 1e9:,.0f} GFLOP/s"
    made = Table(title=title, title_justify="left")
    heads = (
        "",
        "ms",
        "of peak",
        "MB",
        "memory / jax.grad",
        "time / jax.grad",
        in_jax.PLAIN,
        in_jax.NNX,
        in_jax.EQUINOX,
        TORCH,
    )
    for head in heads:
        made.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for name, row in rows.items():
        cells = ("ms", "peak", "MB", "memory", JAX, *PEERS)
        made.add_row(name, *(row["said"][cell] for cell in cells))
    return made


def figure(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Draw the time ratios with their quartiles."""
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.6))
        for place, row in enumerate(reversed(rows.values())):
            for i, (peer, colour) in enumerate(COLOURS.items()):
                if quartiles := row["time"].get(peer):
                    at = place + 0.28 - 0.14 * i
                    axes.plot(quartiles[::2], (at, at), color=colour, lw=3, alpha=0.4, solid_capstyle="butt")
                    axes.plot(quartiles[1], at, "o", color=colour, ms=4, label=peer)
        axes.axvline(1, color=report.INK, lw=1, ls=":")
        axes.set(xscale="log", yticks=range(len(rows)), yticklabels=list(rows)[::-1], ylim=(-0.7, len(rows) - 0.3))
        axes.set_xlabel("time, fnbp / other: median and quartiles; left of the line fnbp is faster")
        axes.set_title(f"Forward and backward on {jax.devices()[0].device_kind}")
        known = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(known.values(), known.keys(), loc="lower left")
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
