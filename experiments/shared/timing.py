"""Time two functions in turns, in one process or in two."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

SAMPLE_SECONDS = 2e-2  # a sample repeats the call until it takes this long
REST = 3e-2  # seconds before a sample, until threads that wait in a busy loop sleep

Side = Callable[[int], float]  # how many calls -> the seconds of one


def side_of(function: Callable, args: tuple, wake: bool = False) -> Side:
    """A compiled function of JAX, to be timed here. wake: after one call that is not timed."""

    def seconds(calls: int) -> float:
        if wake:
            jax.block_until_ready(function(*args))
        began, out = time.perf_counter(), None
        for _ in range(calls):
            out = jax.block_until_ready(function(*args))
        del out
        return (time.perf_counter() - began) / calls

    return seconds


def in_turns(sides: tuple[Side, Side], samples: int, rest: bool = False) -> np.ndarray:
    """Time both sides in turns; which goes first alternates. Both have as many calls a sample as fit its seconds.

    rest: before each sample.

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
            if rest:
                time.sleep(REST)
            taken[i, k] = sides[k](calls[k])
    return taken


def ratios_of(seconds: np.ndarray) -> dict[str, Any]:
    """The median of the pairwise ratios with its quartiles, and the median milliseconds of both sides."""
    low, middle, high = (float(q) for q in np.percentile(seconds[:, 0] / seconds[:, 1], (25, 50, 75)))
    ms, their_ms = (1e3 * float(np.median(seconds[:, i])) for i in (0, 1))
    return {"time": middle, "time_quartiles": [low, high], "ms": ms, "their_ms": their_ms}


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, relative to the largest of an array; infinite if a number is not finite."""

    def of(a: Any, b: Any) -> float:
        a, b = (np.asarray(side, float) for side in (a, b))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        scale = np.max(np.abs(b), initial=0)
        return float(np.max(np.abs(a - b), initial=0) / (scale or 1))

    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    return max(of(a, b) for a, b in zip(ours, theirs, strict=True))
