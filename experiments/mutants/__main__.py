"""compare catches the mistakes that a machine plants in every hand-written backward of fnbp.

Each mutant is the source of the library with one expression of a backward, of a factor's total, or of what a forward
saves replaced: operators, signs, constants, axes, names, casts, rows. compare sees it at its defaults, in float32, then
in bfloat16, float16 and float64. Beside it runs jax.test_util.check_grads at its defaults, in float32, on the same
arguments, but not where it calls the library itself wrong. A mutant that computes the same is listed with the reason;
the exit code is 1 if one survives without a reason. The minutes are those of --limit 1200; all take twelve times as
long.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.mutants import catalogue as mutations
from experiments.mutants import trials as mutations_trials
from experiments.mutants.catalogue import Mutant
from experiments.mutants.equivalent import reason_of
from experiments.shared import report
from experiments.shared.report import console

MINUTES = 40  # on two CPU cores

RENEWED = 40  # mutants after which a process is replaced: compiled programs pile up in it
LOUD = ("raises", "structure")  # no checker is needed to see these


@dataclass(frozen=True)
class Settings:
    """Settings of the study."""

    only: str = ""
    """Run only the mutants whose id contains this, or one of several: "dense|losses"."""
    limit: int = 0
    """The number of mutants to run, spread over the catalogue; 0 means all."""
    peer: bool = True
    """Also ask jax.test_util.check_grads."""
    jobs: int = os.cpu_count() or 1
    """The number of processes."""
    resume: bool = False
    """Keep the mutants in mutants.jsonl and go on from there."""
    originals: bool = True
    """First run the same checkers on the library itself."""
    list: bool = False
    """Only print the ids."""
    out: Path = Path("results/mutants")
    """The folder for mutants.jsonl, figure.png and result.json."""


def main(settings: Settings) -> int:
    """Plant the mutants, check them, and count."""
    began = time.perf_counter()
    catalogue = mutations.catalogue()
    chosen = choose(catalogue, settings)
    for mutant in chosen if settings.list else ():
        console.print(mutant.id, markup=False, highlight=False, soft_wrap=True)
    if settings.list:
        return 0
    for owner in dict.fromkeys(mutant.owner for mutant in chosen):
        mutations_trials.trials(owner)  # raises if there are none
    known = earlier(settings.out / "mutants.jsonl") if settings.resume else {}
    with pool(settings.jobs) as workers:
        originals = unspoilt(workers) if settings.originals else []
        wrong = [one for one in originals if one["fault"]]
        for one in wrong:
            console.print(f"[bold red]the library itself is wrong:[/] {one['name']} in {one['dtype']}: {one['fault']}")
        found = check(workers, chosen, known, settings)
    for one in found:
        one["reason"] = reason_of(one["id"]) if not one["fault"] else ""
    console.print(table("site", "site", found, settings.peer))
    console.print(table("class", "class of mistake", found, settings.peer))
    measured = totals(found, originals)
    measured |= {"catalogue": len(catalogue), "wall_seconds": time.perf_counter() - began}
    say(measured, found, settings.peer)
    figure(settings.out / "figure.png", found, settings.peer)
    report.save(settings.out, settings, measured)
    bad = ("not_explained", "caught_against_reason", "errors")
    return 1 if wrong or any(measured[name] for name in bad) else 0


def choose(catalogue: list[Mutant], settings: Settings) -> list[Mutant]:
    """The mutants that were asked for."""
    wanted = settings.only.split("|")
    chosen = [mutant for mutant in catalogue if any(part in mutant.id for part in wanted)]
    if not chosen:
        raise report.InputError(f"--only {settings.only}: no mutant's id contains that; --list prints them all")
    if settings.limit and settings.limit < len(chosen):
        chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, settings.limit).round()]
    return chosen


def earlier(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings of an interrupted run, by site and code."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:  # cut off while it was written
            continue
        found[one["site"], one["code"]] = one
    return found


# --- running ---


@contextmanager
def pool(jobs: int) -> Iterator[Any]:
    """Fresh processes that share what they compile, each replaced from time to time."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as compiled,
        spawn.Pool(jobs, report.share_compiled, (compiled,), maxtasksperchild=RENEWED) as workers,
    ):
        yield workers


def progress() -> Progress:
    """A bar with a count and the time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def unspoilt(workers: Any) -> list[dict[str, Any]]:
    """Run the checkers on the library itself, on every trial."""
    tasks = mutations_trials.original_tasks()
    with progress() as bar:
        return list(
            bar.track(workers.imap_unordered(mutations_trials.original, tasks), len(tasks), description="originals")
        )


def check(workers: Any, chosen: list[Mutant], known: dict, settings: Settings) -> list[dict[str, Any]]:
    """Check every mutant and write each down as it comes. Returns: the findings in the order of the catalogue."""
    keys = {(mutant.site, mutant.code): mutant for mutant in chosen}
    found = {key: known[key] | {"id": mutant.id, "class": mutant.kind} for key, mutant in keys.items() if key in known}
    due = [(mutant, settings.peer) for key, mutant in keys.items() if key not in known]
    with (settings.out / "mutants.jsonl").open("w") as file, progress() as bar:
        task = bar.add_task("mutants", total=len(chosen), completed=len(found))
        for one in found.values():
            file.write(json.dumps(one) + "\n")
        for one in workers.imap_unordered(mutations_trials.judged_task, due):
            found[one["site"], one["code"]] = one
            file.write(json.dumps(one) + "\n")
            file.flush()
            survivors = sum(not other["fault"] for other in found.values())
            bar.update(task, advance=1, description=f"mutants ({survivors} survive)")
    return [found[key] for key in keys]


# --- counting ---


def totals(found: list[dict[str, Any]], originals: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and rates over all mutants."""
    wrong = [one for one in found if not one["reason"]]
    silent = [one for one in wrong if one["fault"] not in LOUD]
    tried = [one for one in originals if one["dtype"] == "float32"]
    return {
        "planted": len(found),
        "equivalent": len(found) - len(wrong),
        "wrong": len(wrong),
        "caught": sum(caught(one) for one in wrong),
        "rate": rate(map(caught, wrong)),
        "caught_in_float32": sum(one["in"] == "float32" for one in wrong),
        "caught_in_narrow_only": sum(one["in"] not in ("float32", "") for one in wrong),
        "silent": len(silent),
        "silent_rate": rate(map(caught, silent)),
        "peer_caught": sum(bool(one["peer"]) for one in wrong),
        "peer_rate": rate(bool(one["peer"]) for one in wrong),
        "peer_silent_rate": rate(bool(one["peer"]) for one in silent),
        "peer_caught_equivalent": sum(bool(one["peer"]) for one in found if one["reason"]),
        "not_explained": sum(not one["fault"] for one in wrong),
        "caught_against_reason": sum(caught(one) and bool(reason_of(one["id"])) for one in found),
        "errors": sum(one["fault"] == "ERROR" for one in found),
        "originals": len(originals),
        "originals_wrong": sum(bool(one["fault"]) for one in originals),
        "originals_in_float32": len(tried),
        "originals_wrong_by_peer": sum(bool(one["peer"]) for one in tried),
        "faults": dict(Counter(one["fault"] for one in found if caught(one)).most_common()),
        "by_site": {name: counts(group) for name, group in grouped("site", found).items()},
        "by_class": {name: counts(group) for name, group in grouped("class", found).items()},
        "survivors": [{k: one[k] for k in ("id", "reason", "apart", "peer")} for one in found if not one["fault"]],
    }


def caught(one: dict[str, Any]) -> bool:
    """True if compare calls the mutant wrong."""
    return one["fault"] not in ("", "ERROR")


def rate(flags: Iterable[bool]) -> float:
    """The fraction that is true; NaN if there are none."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else float("nan")


def grouped(key: str, found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by a key, in their order; the forward's saved tuple beside its backward."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(one[key], []).append(one)
    return groups


def counts(group: list[dict[str, Any]]) -> dict[str, int]:
    """The numbers planted, caught, equivalent and missed, and the number of the wrong ones that the peer caught."""
    wrong = [one for one in group if not one["reason"]]
    hit = sum(caught(one) for one in wrong)
    peer = sum(bool(one["peer"]) for one in wrong)
    equivalent = len(group) - len(wrong)
    return {"planted": len(group), "caught": hit, "equivalent": equivalent, "missed": len(wrong) - hit, "peer": peer}


# --- printing ---


def table(key: str, title: str, found: list[dict[str, Any]], peer: bool) -> Table:
    """A table of the counts by site or by class."""
    made = Table(title=f"mutants by {title}", title_justify="left")
    columns = ("planted", "caught", "equivalent", "missed", *(("check_grads caught",) if peer else ()))
    made.add_column(title, no_wrap=True)
    for name in columns:
        made.add_column(name, justify="right")
    rows = {name: counts(group) for name, group in grouped(key, found).items()}
    rows["all"] = counts(found)
    for name, row in rows.items():
        cells = [str(row[column.removesuffix("_grads caught").replace("check", "peer")]) for column in columns]
        made.add_row(name, *cells, style="bold red" if row["missed"] else "bold" if name == "all" else "")
    return made


def say(measured: dict[str, Any], found: list[dict[str, Any]], peer: bool) -> None:
    """Print the survivors with their reasons, and the totals."""
    survivors = [one for one in found if not one["fault"]]
    for reason, group in grouped("reason", survivors).items():
        console.print(f"\n[cyan]equivalent:[/] {reason}" if reason else "\n[bold red]NOT EXPLAINED[/]", highlight=False)
        for one in group:
            console.print(f"  {one['id']}  ({one['apart']:.1e} apart)", markup=False, highlight=False, soft_wrap=True)
    for one in found:
        if caught(one) and reason_of(one["id"]):
            console.print(
                f"caught, although a reason says that it is no mistake: {one['id']}",
                style="red",
                markup=False,
                soft_wrap=True,
            )
        if one["fault"] == "ERROR":
            console.print(f"ERROR {one['id']}: {one['hint']}", style="bold red", markup=False, soft_wrap=True)
    wrong = measured["planted"] - measured["equivalent"]
    rows = [
        ("planted", f"{measured['planted']:,} mutants, {measured['equivalent']:,} of them equivalent"),
        ("fnbp.compare", f"catches {measured['caught']:,} of {wrong:,}: {measured['rate']:.2%}"),
        (
            "",
            f"{measured['caught_in_float32']:,} in float32, {measured['caught_in_narrow_only']:,} only in other dtypes",
        ),
        (
            "",
            f"{measured['silent_rate']:.2%} of the {measured['silent']:,} that neither raise nor change shape or dtype",
        ),
    ]
    if peer:
        rows += [
            ("check_grads", f"catches {measured['peer_caught']:,} of {wrong:,}: {measured['peer_rate']:.2%}"),
            ("", f"{measured['peer_silent_rate']:.2%} of those that neither raise nor change shape or dtype"),
        ]
    if measured["originals"]:
        n, m = measured["originals"], measured["originals_in_float32"]
        rows.append(("the library itself", f"compare: {measured['originals_wrong']} of {n} trials called wrong"))
        rows.append(("", f"check_grads: {measured['originals_wrong_by_peer']} of {m}") if peer else ("", ""))
    faults = ", ".join(f"{kind} {count:,}" for kind, count in measured["faults"].items())
    console.print()
    console.print(report.figures([*rows, ("faults by kind", faults)]), highlight=False)


def figure(path: Path, found: list[dict[str, Any]], peer: bool) -> None:
    """Draw the share of the wrong mutants of each class that the checkers catch."""
    rows = {name: counts(group) for name, group in grouped("class", found).items()}
    wrong = {name: row["planted"] - row["equivalent"] for name, row in rows.items()}
    names = sorted(
        (name for name in rows if wrong[name]), key=lambda name: (rows[name]["peer"] / wrong[name], wrong[name])
    )
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1.6))
        at = np.arange(len(names))
        sides = [("caught", "fnbp.compare", report.MANUAL, 0.2), ("peer", "jax check_grads", report.AUTOMATIC, -0.2)]
        for key, label, colour, shift in sides if peer else sides[:1]:
            shares = [100 * rows[name][key] / wrong[name] for name in names]
            axes.barh(at + shift, shares, 0.38, color=colour, label=label)
        axes.set(yticks=at, yticklabels=[f"{name} ({wrong[name]})" for name in names], xlim=(0, 100))
        axes.set_xlabel("caught, % of the mutants that are wrong (their number)")
        axes.set_title("Mistakes planted by machine in every backward")
        fig.legend(loc="outside lower right", ncols=2)
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
