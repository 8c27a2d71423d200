"""Measure what two functions cost, compiled, side by side: a manual gradient and an automatic one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from fnbp.arrays.checks import check_size
from fnbp.rendering.tables import Tabular

__all__ = ["Cost"]

SAMPLE_SECONDS = 5e-3  # a timed sample repeats the call until it takes this long


@dataclass(frozen=True)
class Measured:
    """The costs of one compiled function.

    seconds          the median time of one call
    compile_seconds  the median time of tracing, lowering and compiling
    flops            floating point operations as XLA counts them, or None if the device does not report them
    temp_bytes       the temporary memory of the compiled program, or None
    """

    seconds: float
    compile_seconds: float
    flops: float | None
    temp_bytes: int | None


@dataclass(frozen=True)
class Cost(Tabular):
    """The manual and the automatic gradient, measured in one run, and their ratios (manual / automatic).

    time_ratio      the median of the pairwise ratios of interleaved samples
    time_quartiles  the quartiles of these ratios
    device          the name of the device
    """

    manual: Measured
    automatic: Measured
    time_ratio: float
    time_quartiles: tuple[float, float]
    device: str

    @property
    def memory_ratio(self) -> float | None:
        """The ratio of the temporary memories, or None if one is unknown."""
        return ratio(self.manual.temp_bytes, self.automatic.temp_bytes)

    @property
    def flops_ratio(self) -> float | None:
        """The ratio of the FLOPs, or None if one is unknown."""
        return ratio(self.manual.flops, self.automatic.flops)

    @property
    def compile_ratio(self) -> float | None:
        """The ratio of the compile times."""
        return ratio(self.manual.compile_seconds, self.automatic.compile_seconds)

    def to_dict(self) -> dict[str, Any]:
        """The costs and their ratios as a dict for JSON."""
        ratios = {name: getattr(self, name) for name in ("memory_ratio", "flops_ratio", "compile_ratio")}
        return asdict(self) | ratios

    def __rich__(self) -> Table:
        table = Table(title=Text(f"cost of one gradient on {self.device}"), title_justify="left")
        for name in ("", "manual", "automatic", "ratio"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        low, high = self.time_quartiles
        m, a = self.manual, self.automatic
        ms = [f"{1e3 * side.seconds:.3f} ms" for side in (m, a)]
        table.add_row("time", *ms, f"{self.time_ratio:.3f} ({low:.3f} to {high:.3f})")
        kib = [f"{side.temp_bytes / 1024:,.1f} KiB" if side.temp_bytes is not None else "-" for side in (m, a)]
        table.add_row("temporary memory", *kib, text(self.memory_ratio))
        flops = [f"{side.flops:,.0f}" if side.flops is not None else "-" for side in (m, a)]
        table.add_row("FLOPs", *flops, text(self.flops_ratio))
        compiling = [f"{side.compile_seconds:.3f} s" for side in (m, a)]
        table.add_row("compile time", *compiling, text(self.compile_ratio))
        return table


def ratio(manual: float | None, automatic: float | None) -> float | None:
    """manual / automatic; 1 if both are 0, None if one is unknown."""
    if manual is None or automatic is None:
        return None
    return manual / automatic if automatic else 1.0 if not manual else float("inf")


def text(value: float | None) -> str:
    """The ratio for the table, "-" if it is unknown."""
    return "-" if value is None else f"{value:.4f}"


def versus(manual: Callable, automatic: Callable, args: tuple, samples: int = 100, compiles: int = 3) -> Cost:
    """Measure the Cost of any two functions of the same arguments.

    Raises: ValueError if samples or compiles is below 1.
    """
    check_size("cost", "samples", samples)
    check_size("cost", "compiles", compiles)
    args = jax.device_put(args)
    compiled, seconds = zip(*(compile_timed((manual, automatic), args) for _ in range(compiles + 1)), strict=True)
    pair = compiled[-1]
    compile_seconds = [median(side) for side in zip(*seconds[1:], strict=True)]  # the first warms the compiler up
    samples_of_both = interleave(pair, args, samples)
    quotients = samples_of_both[:, 0] / samples_of_both[:, 1]
    low, middle, high = (float(q) for q in np.percentile(quotients, (25, 50, 75)))
    sides = [
        Measured(float(np.median(samples_of_both[:, i])), compile_seconds[i], flops_of(pair[i]), temp_bytes_of(pair[i]))
        for i in range(2)
    ]
    return Cost(sides[0], sides[1], middle, (low, high), device_name())


def compile_timed(functions: tuple[Callable, Callable], args: tuple) -> tuple[list[Any], list[float]]:
    """Compile both functions anew. Returns: them, and the seconds that each took."""
    compiled, seconds = [], []
    for function in functions:
        fresh = jax.jit(lambda *args, function=function: function(*args))
        start = time.perf_counter()
        compiled.append(fresh.lower(*args).compile())
        seconds.append(time.perf_counter() - start)
    return compiled, seconds


def interleave(pair: list[Any], args: tuple, samples: int) -> np.ndarray:
    """Time both functions in turns; which goes first alternates.

    Returns: (samples, 2), the seconds of one call of each.
    """

    def timed(function: Callable, calls: int) -> float:
        start, out = time.perf_counter(), None
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    once = min(timed(function, 3) for function in pair for _ in range(3))
    calls = max(1, round(SAMPLE_SECONDS / once))
    taken = np.empty((samples, 2))
    for i in range(samples):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            taken[i, side] = timed(pair[side], calls)
    return taken


def flops_of(compiled: Any) -> float | None:
    """The FLOPs of a compiled program as XLA counts them; None if the backend does not report them."""
    analysis = compiled.cost_analysis()
    return None if not analysis or "flops" not in analysis else float(analysis["flops"])


def temp_bytes_of(compiled: Any) -> int | None:
    """The temporary memory of a compiled program; None if the backend does not report it."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def device_name() -> str:
    """The name of the default device: "cpu", "NVIDIA H100 80GB HBM3"."""
    return jax.devices()[0].device_kind
