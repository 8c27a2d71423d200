"""compare tells which backwards from papers, courses, docs and kernels are wrong, or less accurate than autodiff.

People wrote them by hand and published them; here they are rewritten as user code. A form that is found wanting stands
beside one that is clean. Each entry records the verdict that is expected in float32 and in bfloat16; the exit code is 1
if compare finds another.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from experiments.published import attention as published_attention
from experiments.published import layers as published_layers
from experiments.published import losses as published_losses
from experiments.published import norms as published_norms
from experiments.published import rules as published_rules
from experiments.published.entry import Entry
from experiments.shared import report
from experiments.shared.report import console
from fnbp.comparison.report import FAULTS, SEVERITY, Report, Row

MINUTES = 1.5  # on two CPU cores

ENTRIES: tuple[Entry, ...] = (
    *published_norms.ENTRIES,
    *published_losses.ENTRIES,
    *published_attention.ENTRIES,
    *published_layers.ENTRIES,
    *published_rules.ENTRIES,
)


@dataclass(frozen=True)
class Settings:
    """Settings of the survey."""

    only: str = ""
    """Run only the entries whose name contains this."""
    out: Path = Path("results/published")
    """The folder for result.json."""


class Finding(NamedTuple):
    """What compare found in one entry at arguments of one dtype."""

    dtype: str
    expected: str
    verdict: str
    z: float
    rho: float | None
    told: str
    seconds: float
    report: Report

    @property
    def as_expected(self) -> bool:
        return self.verdict == self.expected

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "as_expected": self.as_expected, "report": self.report.to_dict()}


def main(settings: Settings) -> int:
    """Run the survey."""
    began = time.perf_counter()
    chosen = [entry for entry in ENTRIES if settings.only in entry.name]
    if not chosen:
        raise report.InputError(
            f"--only {settings.only!r} is in no name; there are: {', '.join(e.name for e in ENTRIES)}"
        )
    found = {}
    for entry in track(chosen, "comparing", console=console, transient=True, disable=not console.is_terminal):
        found[entry.name] = [find(entry, dtype) for dtype in dtypes_of(entry)]
    console.print(table(chosen, found))
    every = [finding for findings in found.values() for finding in findings]
    surprises = [name for name, findings in found.items() if not all(finding.as_expected for finding in findings)]
    faulty = [entry for entry in chosen if any(finding.verdict in FAULTS for finding in found[entry.name])]
    wanting = [entry.name for entry in faulty if not entry.deliberate]
    counts = {
        "entries": len(chosen),
        "wanting": len(wanting),
        "on_purpose": len(faulty) - len(wanting),
        "conventions": sum(any(f.verdict == "convention" for f in each) for each in found.values()),
        "clean": sum(all(f.verdict == "ok" for f in each) for each in found.values()),
    }
    console.print(report.figures([
        ("entries", f"{len(chosen)}, compared {len(every)} times"),
        ("found wanting", f"{counts['wanting']}"),
        ("another rule, on purpose", f"{counts['on_purpose']}"),
        ("with a convention", f"{counts['conventions']}"),
        ("clean", f"{counts['clean']}"),
        ("not as recorded", ", ".join(surprises) or "none"),
    ]), highlight=False)  # fmt: skip
    report.save(settings.out, settings, counts | {
        "found_wanting": wanting,
        "another_rule_on_purpose": [entry.name for entry in faulty if entry.deliberate],
        "not_as_expected": surprises,
        "findings": [described(entry) | {"found": [f.to_dict() for f in found[entry.name]]} for entry in chosen],
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 1 if surprises else 0


def dtypes_of(entry: Entry) -> tuple[Any, ...]:
    """The dtypes of an entry: float32, and bfloat16 if it is to be run."""
    return (np.float32,) if entry.bfloat16 is None else (np.float32, jnp.bfloat16)


def find(entry: Entry, dtype: Any, **options: Any) -> Finding:
    """Ask compare about an entry."""
    began = time.perf_counter()
    told = entry.compare(dtype, **options)
    expected = entry.expected if dtype == np.float32 else entry.bfloat16 or "ok"
    gravest = min((*told.faults, *told.conventions), key=lambda row: SEVERITY[row.kind], default=None)
    rhos = [row.rho for row in told.rows if row.rho is not None]
    return Finding(
        jnp.dtype(dtype).name,
        expected,
        "ok" if gravest is None else gravest.kind,
        max(row.z for row in told.rows),
        max(rhos, default=None),
        "" if gravest is None else sentence(gravest),
        time.perf_counter() - began,
        told,
    )


def sentence(row: Row) -> str:
    """A sentence that says where the fault is and what compare takes it for."""
    values = f"{row.manual:.4g} for {row.automatic:.4g}" if row.manual == row.manual and row.index else ""
    said = row.hint or values or FAULTS.get(row.kind, "")
    return f"{'d' + row.leaf if row.leaf else 'all'}{f' on {row.probe!r}' if row.probe else ''}: {said}"


def described(entry: Entry) -> dict[str, Any]:
    """An entry for JSON."""
    names = ("name", "source", "way", "expected", "bfloat16", "right", "mended", "deliberate", "remark")
    return {name: getattr(entry, name) for name in names}


def table(chosen: list[Entry], found: dict[str, list[Finding]]) -> Table:
    """A table with one row for each entry: float32 above bfloat16."""
    top = Table(title="Published backwards: float32 above bfloat16", title_justify="left", show_lines=True)
    for name in ("form and source", "way in", "verdict", "z", "rho", "what was found"):
        numeric = name in ("z", "rho")
        fixed = numeric or name in ("way in", "verdict")
        top.add_column(name, justify="right" if numeric else "left", no_wrap=fixed)
    for entry in chosen:
        findings = found[entry.name]
        verdicts, zs, rhos = (Text("\n").join(cell(finding)[i] for finding in findings) for i in range(3))
        top.add_row(Text.assemble((entry.name, "bold"), "\n", (entry.source, "dim")), entry.way, verdicts, zs, rhos,
            words(entry, findings))  # fmt: skip
    return top


def cell(finding: Finding) -> tuple[Text, Text, Text]:
    """Verdict, z and rho of one dtype."""
    style = {"ok": "green", "convention": "cyan"}.get(finding.verdict, "bold red")
    name = finding.verdict.upper() if finding.verdict in FAULTS else finding.verdict
    due = "" if finding.as_expected else f", not {finding.expected}"
    z = f"{finding.z:.1f}" if finding.z < 1000 else f"{finding.z:.0e}"
    return Text(name + due, style), Text(z), Text("-" if finding.rho is None else f"{finding.rho:.2g}")


def words(entry: Entry, findings: list[Finding]) -> str:
    """The findings, only one of them if both dtypes agree, and our remark."""
    first, *others = findings
    found = [first.told] + [f"{f.dtype}: {f.told}" for f in others if f.told and f.verdict != first.verdict]
    purpose = "another rule, on purpose" if entry.deliberate else ""
    remarks = [text for text in (purpose, entry.remark, f"clean: {entry.mended}" if entry.mended else "") if text]
    return "\n".join(text for text in (*found, *(f"({text})" for text in remarks)) if text)


if __name__ == "__main__":
    report.run(Settings, main)
