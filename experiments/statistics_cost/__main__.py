"""What statistics of single gradients cost beside one gradient, beside vmap(jax.grad), and beside other libraries.

Each statistic of fnbp is timed against one plain gradient of the same net, in turns in one run; then against the same
quantity by jax.vmap of jax.grad, which must agree; then other libraries compute it, where they are installed (extra:
peers). Times are those of compiled functions on random data in float32. A ratio is the median of pairwise ratios.
Exit code 1 if two ways to one quantity disagree. A bound is printed beside its ratio, but a noisy machine fails no run.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from experiments.shared import report
from experiments.shared.report import console
from experiments.shared.timing import distance, in_turns, ratios_of, side_of
from experiments.statistics_cost import peers
from experiments.statistics_cost.nets import NETS, Case, case_of
from experiments.statistics_cost.ours import STATISTICS, VMAP, plain
from fnbp.measurement import ratio

MINUTES = 9  # on two CPU cores

PLAIN = "one gradient"
AGREE = 1e-3  # the most that two ways may differ in float32, relative to the largest number of an array


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    samples: int = 16
    """Pairs of timings of a statistic and one gradient."""
    samples_of_others: int = 3
    """Pairs of timings of a statistic and the same quantity by other means."""
    net: str = ""
    """Only nets whose name contains this: mlp, lenet, lstm, gpt."""
    only: str = ""
    """Only statistics whose name contains this: norms, clipped, ..."""
    samples_of_peers: int = 10
    """Pairs of timings of a statistic and another library."""
    ours: bool = True
    """Time the statistics against one gradient."""
    others: bool = True
    """Time them against other means in JAX: vmap of jax.grad, jax.jvp."""
    peers: bool = True
    """Time them against other libraries, those that are installed (extra: peers)."""
    seed: int = 0
    """The seed of parameters and data."""
    resume: bool = False
    """Keep the ratios in rows.jsonl and go on from there."""
    out: Path = Path("results/statistics_cost")
    """The folder for rows.jsonl, figure.png and result.json."""


def main(settings: Settings) -> int:
    """Run the benchmark. Returns: 1 if two ways to one quantity disagree."""
    began = time.perf_counter()
    nets, names = chosen(NETS, settings.net, "--net"), chosen((*STATISTICS, "gradient"), settings.only, "--only")
    rows = []
    with lines(settings) as (known, write):
        for name in nets:
            case = case_of(NETS[name], settings.seed)
            for title, some in (
                ("statistics", rows_of(name, case, names, settings, known)),
                ("other libraries", rows_of_peers(name, case, names, settings, known)),
            ):
                table = heads(f"{name}, {title}")
                for row in some:
                    write(row)
                    rows.append(row)
                    table.add_row(*cells(row))
                if table.rows:
                    console.print(table)
    if ours := [row for row in rows if row["against"] == PLAIN and "time" in row]:
        figure(settings.out / "figure.png", ours)
    apart = max((row.get("apart") or 0.0 for row in rows), default=0.0)
    asked = [row for row in rows if row.get("most") is not None]
    measured: dict[str, Any] = {name: {} for name in nets}
    for row in rows:
        at = measured[row["net"]].setdefault(row["statistic"], {})
        at[row["against"]] = {key: row[key] for key in row if key not in ("net", "statistic", "against")}
    console.print(report.figures([
        ("bounds on time kept", f"{sum(row['time'] <= row['most'] for row in asked)} of {len(asked)}"),
        ("two ways to one quantity, farthest apart", f"{apart:.1e}"),
    ]), highlight=False)  # fmt: skip
    report.save(settings.out, settings, measured | {"apart": apart, "wall_seconds": time.perf_counter() - began})
    return int(apart > AGREE)


def chosen(table: Iterable[str], part: str, option: str) -> list[str]:
    """The names that contain part. InputError if there is none."""
    found = [name for name in table if part in name]
    if not found:
        raise report.InputError(f"{option} {part}: there are {', '.join(table)}")
    return found


class lines:  # noqa: N801 (a context manager)
    """The rows of an earlier run, if it is to be resumed, and the function that writes one down."""

    def __init__(self, settings: Settings):
        path = settings.out / "rows.jsonl"
        found = (
            [json.loads(line) for line in path.read_text().splitlines()] if settings.resume and path.exists() else []
        )
        self.known = {(row["net"], row["statistic"], row["against"]): row for row in found}
        self.file = path.open("w")

    def __enter__(self) -> tuple[dict, Callable[[dict], None]]:
        return self.known, self.write

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def rows_of(name: str, case: Case, names: list[str], settings: Settings, known: dict) -> Iterator[dict[str, Any]]:
    """What each statistic costs on one net: a row against one gradient, then one against each other means."""
    baseline = None
    for of in (one for one in names if one in STATISTICS):
        statistic, ours = STATISTICS[of], None
        for against in (*((PLAIN,) if settings.ours else ()), *(statistic.others if settings.others else ())):
            if (row := known.get((name, of, against))) is None:
                try:
                    ours = ours or compiled(statistic.make(case), case)
                except ValueError as error:  # a statistic that is not defined for a layer of this net
                    console.print(f"{name}, {of}: {error}", highlight=False)
                    yield {"net": name, "statistic": of, "against": against, "missing": "refused"}
                    continue
                if against == PLAIN:
                    baseline = baseline or compiled(plain(case), case)
                    row = measured_row(ours, baseline, case, settings.samples, None)
                    row |= {"most": statistic.most.get(name), "most_memory": statistic.memory.get(name)}
                else:
                    theirs = compiled(statistic.others[against](case), case)
                    row = measured_row(ours, theirs, case, settings.samples_of_others, statistic.checked)
                row = {"net": name, "statistic": of, "against": against} | row
            yield row


def rows_of_peers(name: str, case: Case, names: list[str], settings: Settings, known: dict) -> Iterator[dict[str, Any]]:
    """What each statistic costs on one net beside other libraries: a row for each of them."""
    if not settings.peers or name not in peers.NETS:
        return
    wanted = [(of, peer) for of, some in peers.PEERS.items() if of in names for peer in some]
    wanted = [(of, peer) for of, peer in wanted if not (peer == VMAP and settings.others and of in STATISTICS)]
    yield from (known[name, *key] for key in wanted if (name, *key) in known)
    missing = [key for key in wanted if (name, *key) not in known]
    yield from peers.measured(name, case, missing, settings.samples_of_peers)


def compiled(function: Callable, case: Case) -> Any:
    """A function, compiled for the arrays of a case."""
    return jax.jit(function).lower(*case.args).compile()


def measured_row(ours: Any, theirs: Any, case: Case, samples: int, checked: Callable | None) -> dict[str, Any]:
    """The ratios of two compiled functions: of time, with its quartiles, and of memory, without and with outputs."""
    found = ratios_of(in_turns((side_of(ours, case.args), side_of(theirs, case.args)), samples))
    (temp, whole), (their_temp, their_whole) = memory_of(ours), memory_of(theirs)
    apart = distance(*(checked(side(*case.args)) for side in (ours, theirs))) if checked is not None else None
    return found | {
        "memory": ratio(temp, their_temp),
        "memory_with_outputs": ratio(whole, their_whole),
        "apart": apart,
    }


def memory_of(function: Any) -> tuple[int, int]:
    """The temporary bytes of a compiled program, and these with its outputs."""
    found = function.memory_analysis()
    return found.temp_size_in_bytes, found.temp_size_in_bytes + found.output_size_in_bytes


def heads(title: str) -> Table:
    """An empty table."""
    table = Table(title=f"{title}, on {jax.devices()[0].device_kind}", title_justify="left")
    for head in ("statistic", "against", "ms", "theirs", "ratio (quartiles)", "asked", "memory", "asked", "apart"):
        table.add_column(head, justify="left" if head in ("statistic", "against") else "right", no_wrap=True)
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text. ! marks a ratio above what was asked."""
    names = [row["statistic"], row["against"]]
    if "missing" in row:
        return [*names, "", "", row["missing"]]
    low, high = row["time_quartiles"]
    memory, apart = row.get("memory"), row.get("apart")

    def asked(value: float | None, most: float | None) -> str:
        return "" if most is None or value is None else f"{most:.2f}{' !' if value > most else ''}"

    return [
        *names,
        f"{row['ms']:.2f}",
        f"{row['their_ms']:.2f}",
        f"{row['time']:.3f} ({low:.3f}-{high:.3f})",
        asked(row["time"], row.get("most")),
        "" if memory is None else f"{memory:.3f}",
        asked(memory, row.get("most_memory")),
        "" if apart is None else f"{apart:.0e}",
    ]


def figure(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the ratios to one gradient with their quartiles, and what was asked."""
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(8, 0.22 * len(rows) + 1.2))
        at = np.arange(len(rows))[::-1]
        for place, row in zip(at, rows, strict=True):
            axes.plot(row["time_quartiles"], (place, place), color=report.MANUAL, lw=4, alpha=0.4)
            axes.plot(row["time"], place, "o", ms=4, color=report.MANUAL)
            if row["most"] is not None:
                axes.plot(row["most"], place, "|", ms=9, color=report.ACCENT)
        axes.axvline(1, color=report.INK, lw=1, ls=":")
        axes.set(yticks=at, yticklabels=[f"{row['net']}, {row['statistic']}" for row in rows], xscale="log")
        axes.set(xlabel="time over that of one gradient: median and quartiles; |: what was asked")
        axes.set_title(f"Statistics of single gradients on {jax.devices()[0].device_kind}")
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
