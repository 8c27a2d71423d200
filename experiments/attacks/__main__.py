"""compare sees through wrong backwards that were written to get past it, and accuses none of the right ones beside.

Each belongs to a class: what must be tried, or compared, to see the mistake. The exit code is 1 if a wrong one passes,
or a right one is accused.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from experiments.attacks.catalogue import ATTACKS, Attack
from experiments.shared import report

MINUTES = 4  # on two CPU cores


@dataclass
class Settings:
    """Settings of the table."""

    only: str = ""
    """Run only the classes whose name contains this."""
    out: Path = Path("results/attacks")
    """The folder for result.json."""


@dataclass(frozen=True)
class Outcome:
    """What compare said of one backward."""

    of: str
    title: str
    right: bool
    ok: bool
    kind: str
    probe: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        """True for a wrong one that is caught, and a right one that is not accused."""
        return self.ok == self.right


def judge(attack: Attack) -> Outcome:
    """Ask compare."""
    began = time.perf_counter()
    said = attack.run()
    fault = said.first_fault
    kind, probe = (fault.kind, fault.probe) if fault else ("ok", "")
    return Outcome(attack.of, attack.title, attack.right, said.ok, kind, probe, time.perf_counter() - began)


def main(settings: Settings) -> int:
    """Run all. Returns: 0 if every wrong one is caught, and no right one is accused."""
    chosen = [attack for attack in ATTACKS if settings.only in attack.of]
    if not chosen:
        raise report.InputError(f"--only: there is no class with {settings.only!r} in its name")
    table = Table("class", "backward", "said", "at", "s", title="written to get past compare", title_justify="left")
    found = []
    for attack in chosen:
        one = judge(attack)
        found.append(one)
        style = "" if one.as_expected else "bold red"
        table.add_row(one.of, one.title, one.kind, one.probe, f"{one.seconds:.1f}", style=style)
    report.console.print(table)
    wrong, right = ([one for one in found if one.right is side] for side in (False, True))
    measured = {
        "wrong": len(wrong),
        "caught": sum(not one.ok for one in wrong),
        "right": len(right),
        "accused": sum(not one.ok for one in right),
        "classes": len({one.of for one in wrong}),
    }
    report.console.print(report.figures([(name.replace("_", " "), str(value)) for name, value in measured.items()]))
    report.save(settings.out, settings, measured | {"outcomes": [vars(one) for one in found]})
    return int(not all(one.as_expected for one in found))


if __name__ == "__main__":
    report.run(Settings, main)
