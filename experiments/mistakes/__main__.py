"""compare finds each of fifty-four known mistakes of hand-written backwards, and accuses no right backward.

Each mistake stands in a small function of the kind in which people make it, beside the right backward, which must not
be accused. At a kink or a tie, a slope between those of the two sides is a convention and no fault. Beside compare runs
jax.test_util.check_vjp at its defaults, in float32, on five draws of the arguments; its differences see through
stop_gradient and straddle kinks, so there it fails on right backwards too. The exit code is 1 if compare misses a
fault, takes a convention for a fault, or accuses a right backward.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.test_util import check_vjp
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import fnbp
from experiments.mistakes.catalogue import CATALOGUE, Mistake
from experiments.shared import report
from experiments.shared.report import console

MINUTES = 2  # on two CPU cores

DRAWS, MOST = 5, 4  # check_vjp has found a mistake if it fails on four draws of five


@dataclass(frozen=True)
class Settings:
    """Settings of the table."""

    only: tuple[int, ...] = ()
    """The numbers of the mistakes to run; by default all."""
    peer: bool = True
    """Run jax.test_util.check_vjp beside compare."""
    seed: int = 0
    """The seed of the arguments."""
    out: Path = Path("results/mistakes")
    """The folder for result.json."""


@dataclass(frozen=True)
class Outcome:
    """What was said of one mistake, and of the right backward of the same function.

    caught, accused   by compare: the mistake is a fault, the right backward is
    peer_*            on how many draws check_vjp fails; None if it was not run
    """

    number: int
    title: str
    expected: str
    verdict: str
    leaf: str
    hint: str
    caught: bool
    accused: bool
    as_expected: bool
    peer_caught: int | None
    peer_accused: int | None


def main(settings: Settings) -> int:
    """Run all mistakes. Returns: 0 if every verdict of compare is the expected one, else 1."""
    began = time.perf_counter()
    jax.config.update("jax_num_cpu_devices", 4)
    chosen = choose(settings.only)
    right = {}
    found = []
    for mistake in track(chosen, "comparing", console=console, transient=True):
        case = mistake.f, mistake.draw
        if case not in right:
            right[case] = judge_right(mistake, settings)
        found.append(judge(mistake, settings, *right[case]))
    table(found, settings.peer)
    measured = summary(found, list(right.values()), settings.peer)
    ok = all(one.as_expected and not one.accused for one in found)
    report.save(settings.out, settings, {
        "ok": ok,
        **measured,
        "mistakes": [vars(one) for one in found],
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0 if ok else 1


def choose(numbers: Sequence[int]) -> list[Mistake]:
    """The mistakes of these numbers. Raises: InputError if a number does not exist."""
    known = {mistake.number for mistake in CATALOGUE}
    if not set(numbers) <= known:
        unknown = ", ".join(map(str, sorted(set(numbers) - known)))
        raise report.InputError(f"--only: there is no mistake {unknown}; they are {min(known)} to {max(known)}")
    chosen = [mistake for mistake in CATALOGUE if not numbers or mistake.number in numbers]
    if jax.device_count() == 1 and any(mistake.devices for mistake in chosen):
        raise report.InputError("mistake 52 needs several devices: set JAX_PLATFORMS=cpu, or leave it out with --only")
    return chosen


# --- the two judges ---


def judge_right(mistake: Mistake, settings: Settings) -> tuple[bool, int | None]:
    """Whether compare accuses the right backward, and on how many draws check_vjp does."""
    said = fnbp.compare(mistake.f, *mistake.args(settings.seed), vjp=mistake.right)
    if not said.ok:
        console.print(f"{mistake.f.__name__}: its right backward is accused", style="bold red")
        console.print(said)
    return not said.ok, peer_failures(mistake, mistake.right, settings) if settings.peer else None


def judge(mistake: Mistake, settings: Settings, accused: bool, peer_accused: int | None) -> Outcome:
    """Ask compare and check_vjp about a mistake."""
    said = fnbp.compare(mistake.f, *mistake.args(settings.seed), vjp=mistake.wrong)
    row = said.first_fault or next(iter(said.conventions), None)
    kind, leaf, hint = (row.kind, row.leaf, row.hint) if row else ("ok", "", "")
    return Outcome(
        mistake.number,
        mistake.title,
        mistake.expected,
        kind,
        leaf,
        hint,
        caught=not said.ok,
        accused=accused,
        as_expected=kind == mistake.expected or (mistake.expected == "fault" and not said.ok),
        peer_caught=peer_failures(mistake, mistake.wrong, settings) if settings.peer else None,
        peer_accused=peer_accused,
    )


def peer_failures(mistake: Mistake, backward: Callable, settings: Settings) -> int:
    """The number of draws of the arguments on which check_vjp fails."""
    f = jax.jit(mistake.f)
    pull = backward if mistake.expected == "random" else jax.jit(backward)
    return sum(not passes_check_vjp(f, pull, mistake.args(settings.seed + i)) for i in range(DRAWS))


def passes_check_vjp(f: Callable, backward: Callable, args: tuple) -> bool:
    """True if check_vjp at its defaults accepts a backward; it takes only floating arguments."""
    flowing = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def whole(floats: Sequence[Any]) -> tuple:
        return tuple(floats[flowing.index(i)] if i in flowing else a for i, a in enumerate(args))

    def f_vjp(*floats):
        return f(*whole(floats)), lambda dy: tuple(backward(whole(floats), dy)[i] for i in flowing)

    try:
        check_vjp(lambda *floats: f(*whole(floats)), f_vjp, tuple(args[i] for i in flowing))
    except AssertionError:
        return False
    return True


# --- what is shown ---


def table(found: Sequence[Outcome], peer: bool) -> None:
    """Print each mistake, with the number of draws on which check_vjp fails for it and for the right backward."""
    shown = Table(title="what compare says of each mistake", title_justify="left")
    for name in ("", "mistake", "verdict", "leaf", "hint"):
        shown.add_column(name, justify="left" if name else "right", no_wrap=name in ("", "verdict", "leaf"))
    if peer:
        shown.add_column("check_vjp:\nwrong, right", justify="right", no_wrap=True)
    for one in found:
        verdict = "explained: convention" if one.verdict == "convention" else one.verdict
        style = "" if one.as_expected else "bold red"
        count = [f"{one.peer_caught}/{DRAWS}, {one.peer_accused}/{DRAWS}"] if peer else []
        cells = (str(one.number), one.title, verdict, one.leaf, one.hint)
        shown.add_row(*map(escape, cells), *count, style=style)
    console.print(shown)


def summary(found: Sequence[Outcome], right: Sequence[tuple[bool, int | None]], peer: bool) -> dict[str, Any]:
    """Print the counts and return them."""
    faults = [one for one in found if one.expected != "convention"]
    kinks = [one for one in found if one.expected == "convention"]
    counts = {
        "numbers": len({one.number for one in found}),
        "faults": len(faults),
        "caught": sum(one.caught for one in faults),
        "with_hint": sum(bool(one.hint) for one in faults if one.caught),
        "conventions": len(kinks),
        "conventions_recognised": sum(one.as_expected for one in kinks),
        "right_backwards": len(right),
        "false_alarms": sum(accused for accused, _ in right),
    }
    lines = [
        ("compare", f"caught {counts['caught']} of {counts['faults']} faults, {counts['with_hint']} with a hint"),
        ("", f"recognised {counts['conventions_recognised']} of {counts['conventions']} conventions"),
        ("", f"accused {counts['false_alarms']} of {counts['right_backwards']} right backwards"),
    ]
    if peer:
        counts |= {
            "peer_caught": sum((one.peer_caught or 0) >= MOST for one in faults),
            "peer_draws": DRAWS * len(right),
            "peer_false_alarms": sum(n or 0 for _, n in right),
            "peer_always_accused": sum(n == DRAWS for _, n in right),
        }
        lines += [
            ("check_vjp", f"caught {counts['peer_caught']} of {counts['faults']} faults on {MOST} of {DRAWS} draws"),
            ("", f"failed on {counts['peer_false_alarms']} of {counts['peer_draws']} draws of right backwards"),
            (
                "",
                f"on every draw of {counts['peer_always_accused']} functions",
            ),
        ]
    console.print(report.figures(lines), highlight=False)
    return counts


if __name__ == "__main__":
    report.run(Settings, main)
