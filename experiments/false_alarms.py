"""compare does not accuse right backwards: random nets and functions, and functions that lose digits."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import report

MINUTES = 20  # on two CPU cores


@dataclass
class Settings:
    """Settings of the random nets and of the comparisons."""

    calls: int = 1000
    """The number of comparisons."""
    nets: int = 40
    """The number of nets that take turns, with new values in each call: half as layers, half as functions."""
    seed: int = 0
    """The seed of the first comparison; the others follow it."""
    depth: int = 3
    """The largest number of layers of a net."""
    ill_conditioned: int = 100
    """The number of comparisons, beside those, of functions that lose one to five digits."""
    jobs: int = os.cpu_count() or 1
    """The number of processes that share the work."""
    out: Path = Path("results/false_alarms")
    """The folder for result.json and calls.jsonl."""


def lossy_call(seed: int) -> dict[str, Any]:
    """Compare one right function that is ill-conditioned. Returns: what compare said."""
    from experiments.shared.ill_conditioned import compare_lossy

    start = time.perf_counter()
    return said_of(compare_lossy(seed), seed, -1, "ill-conditioned function", "float32", start)


def said_of(found: Any, seed: int, which: int, way: str, dtype: str, start: float) -> dict[str, Any]:
    """A report in few words, for the table and for JSON."""
    return {
        "seed": seed,
        "net": which,
        "way": way,
        "dtype": dtype,
        "ok": found.ok,
        "leaves": len(found.rows),
        "z": max(row.z for row in found.rows),
        "rho": max((row.rho or 0.0 for row in found.rows), default=0.0),
        "rhos": [row.rho for row in found.rows if row.rho is not None],
        "narrowed": [note for note in found.notes if "judged in float32" in note],
        "seconds": time.perf_counter() - start,
        "faults": [[row.path, row.leaf, row.kind, row.hint] for row in found.faults],
    }


def one_call(seed: int, which: int, depth: int) -> dict[str, Any]:
    """Compare one right net. Returns: what compare said."""
    import jax
    import jax.numpy as jnp

    import fnbp
    from experiments.shared.random_nets import random_subject

    rng = np.random.default_rng([7, which])
    dtype = (jnp.float32, jnp.bfloat16)[which % 2]
    way = ("net", "function")[which // 2 % 2]
    drawn = random_subject(rng, np.random.default_rng(seed), int(rng.integers(1, depth + 1)), dtype)
    start = time.perf_counter()
    if way == "net":
        found = fnbp.compare(
            drawn.net, drawn.x, params=drawn.params, state=drawn.state, loss=drawn.loss, y=drawn.y,
            key=jax.random.key(seed),
        )  # fmt: skip
    else:
        plain = lambda params, x: drawn.net.forward(params, drawn.state, x, fnbp.Context())[0]  # noqa: E731
        found = fnbp.compare(fnbp.to_jax(drawn.net), drawn.params, drawn.x, reference=plain, key=jax.random.key(seed))
    return said_of(found, seed, which, way, dtype.__name__, start)


def main(settings: Settings) -> int:
    """Run all comparisons and print what they said. Returns: 1 if more than 1 in 1,000 accuse, else 0."""
    tasks = [(settings.seed + i, i % settings.nets, settings.depth) for i in range(settings.calls)]
    said: list[dict[str, Any]] = []
    lossy = [(settings.seed + i,) for i in range(settings.ill_conditioned)]
    calls = report.spread(one_call, tasks, settings.jobs, settings.out / "calls.jsonl", "comparing right nets")
    more = report.spread(lossy_call, lossy, settings.jobs, settings.out / "lossy.jsonl", "comparing lossy ones")
    for call in (*calls, *more):
        said.append(call)
        for fault in call["faults"]:
            report.console.print(f"[red]accused[/] seed {call['seed']} {call['dtype']}: {fault}")
    alarms = [call for call in said if not call["ok"]]
    z, rho = (np.array([call[name] for call in said]) for name in ("z", "rho"))
    counts = Counter((call["way"], call["dtype"]) for call in said)
    rows = [
        ("calls", f"{len(said)}: " + ", ".join(f"{n} {way}s in {dtype}" for (way, dtype), n in sorted(counts.items()))),
        ("leaves judged", f"{sum(call['leaves'] for call in said):,}"),
        ("accused", f"{len(alarms)} of {len(said)} calls"),
        ("z, worst of a call", f"median {np.median(z):.2f}, largest {z.max():.1f}; a fault is above 64"),
        ("said to compute in float32", f"{sum(bool(call['narrowed']) for call in said)} of {len(said)} calls"),
        ("rho, worst of a call", f"median {np.median(rho):.2f}, largest {rho.max():.1f}"),
        ("seconds a call", f"median {np.median([call['seconds'] for call in said]):.1f}"),
    ]
    report.console.print(report.figures(rows))
    measured = {
        "calls": len(said),
        "leaves": sum(call["leaves"] for call in said),
        "accused": len(alarms),
        "narrowed": sum(bool(call["narrowed"]) for call in said),
        "largest_z": z.max(),
        "largest_rho": rho.max(),
    }
    report.save(settings.out, settings, measured | {"alarms": alarms})
    return int(len(alarms) * 1000 > len(said))


if __name__ == "__main__":
    report.run(Settings, main)
