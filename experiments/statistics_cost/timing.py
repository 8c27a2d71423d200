"""Time two functions in turns, in one process or in two."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

SAMPLE_SECONDS = 2e-2  # a sample repeats the call until it takes this long

Side = Callable[[int], float]  # how many calls -> the seconds of one


def side_of(function: Callable, args: tuple) -> Side:
    """A compiled function of JAX, to be timed here."""

    def seconds(calls: int) -> float:
        began, out = time.perf_counter(), None
        for _ in range(calls):
            out = jax.block_until_ready(function(*args))
        del out
        return (time.perf_counter() - began) / calls

    return seconds


def in_turns(sides: tuple[Side, Side], samples: int) -> np.ndarray:
    """Time both sides in turns; which goes first alternates. Both have as many calls a sample as fit its seconds.

    Returns: (samples, 2), the seconds of one call of each.
    """
    calls = []
    for side in sides:
        once = side(1)  # this one warms up
        if once < SAMPLE_SECONDS:
            once = min(side(1) for _ in range(3))
        calls.append(max(1, round(SAMPLE_SECONDS / once)))
    taken = np.empty((samples, 2))
    for i in range(samples):
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            taken[i, k] = sides[k](calls[k])
    return taken


def ratios_of(seconds: np.ndarray) -> dict[str, Any]:
    """The median of the pairwise ratios with its quartiles, and the median milliseconds of both sides."""
    low, middle, high = (float(q) for q in np.percentile(seconds[:, 0] / seconds[:, 1], (25, 50, 75)))
    ms, their_ms = (1e3 * float(np.median(seconds[:, i])) for i in (0, 1))
    return {"time": middle, "time_quartiles": [low, high], "ms": ms, "their_ms": their_ms}
