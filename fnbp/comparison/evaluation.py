"""Both backwards of a unit at a point: compiled where that can be done, in the arithmetic that is asked for."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.numerics import arithmetic, compiled, first_line, is_float0, on_device
from fnbp.comparison.probes import Probe
from fnbp.comparison.subject import Mismatch, Unit, flatten


class FailedError(Exception):
    """The manual backward raised."""


class Point(NamedTuple):
    """What a unit gave at a probe, as NumPy arrays: outputs of forward and reference, cotangents by leaf."""

    y: list[np.ndarray]
    due: list[np.ndarray]
    manual: dict[str, np.ndarray]
    automatic: dict[str, np.ndarray]
    wrong: tuple[Mismatch, ...]


class Plain(NamedTuple):
    """What a unit gave step by step."""

    y: list[np.ndarray]
    manual: dict[str, np.ndarray]


class Inputs:
    """A probe as arrays for a compiled function, and what makes them another function's: tree, shapes, dtypes."""

    def __init__(self, probe: Probe, dtype: Any):
        self.flat, self.tree = jax.tree.flatten(probe.of(dtype))
        self.arrays = [a for a in self.flat if not is_float0(a)]
        shapes = tuple((np.shape(a), getattr(a, "dtype", type(a))) for a in self.flat)
        self.key = str(dtype), self.tree, shapes

    def whole(self, arrays: list) -> Any:
        """args, fixed, dy of these arrays, with the cotangents of integers between them."""
        moving = iter(arrays)
        return jax.tree.unflatten(self.tree, [a if is_float0(a) else next(moving) for a in self.flat])


@jax.tree_util.register_static
@dataclass(frozen=True)
class Note:
    """What a compiled function says beside its arrays."""

    wrong: tuple[Mismatch, ...] = ()
    failed: str = ""


class Runner:
    """Evaluates a unit. eager: it cannot be compiled, so it runs step by step."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.eager = False
        self.compiled: dict[Any, Callable] = {}
        self.known: dict[Any, Point] = {}

    def at(self, probe: Probe, dtype: Any = None) -> Point:
        """Both sides at a probe, in dtype or, for None, as given. Raises: FailedError where the backward does."""
        known = id(probe), dtype
        if known not in self.known:
            self.known[known] = self.evaluate(probe, dtype)
        return self.known[known]

    def evaluate(self, probe: Probe, dtype: Any) -> Point:
        with arithmetic(dtype):
            inputs = Inputs(probe, dtype)
            if not self.eager:
                try:
                    if inputs.key not in self.compiled:
                        self.compiled[inputs.key] = self.lower(inputs)()
                    return self.point(*self.compiled[inputs.key](inputs.arrays))
                except Exception:  # it cannot be traced, or it fails anyway: step by step will tell
                    pass
            found = self.point(*self.run(*on_device(inputs.whole(inputs.arrays))))
            self.eager = True
            return found

    def plain(self, probe: Probe) -> Plain:
        """Forward and manual backward step by step, as their author wrote them. Raises: FailedError."""
        args, fixed, dy = on_device((probe.args, probe.fixed, probe.dy))
        y = self.unit.forward(args, fixed)
        try:
            manual, _ = flatten(self.unit, args, self.unit.manual(args, fixed, dy))
        except Exception as error:
            raise FailedError(f"{type(error).__name__}: {first_line(error)}") from error
        return Plain([np.asarray(a) for a in jax.tree.leaves(y)], {name: np.asarray(a) for name, a in manual.items()})

    def lower(self, inputs: "Inputs") -> Callable:
        """run, traced for inputs of that shape; call what is returned to compile it."""
        return compiled(lambda arrays: self.run(*inputs.whole(arrays))).lower(inputs.arrays).compile

    def prepare(self, probes: list[Probe], dtypes: tuple) -> dict[Any, Callable]:
        """What is still to be compiled for these probes, by key."""
        due: dict[Any, Callable] = {}
        for dtype in dtypes:
            with arithmetic(dtype):
                for inputs in (Inputs(probe, dtype) for probe in probes):
                    if inputs.key not in due:
                        with suppress(Exception):  # evaluate will meet it again, and say so
                            due[inputs.key] = self.lower(inputs)
        return due

    def run(self, args: tuple, fixed: Any, dy: Any) -> tuple:
        """y, the reference's y, both sides, and a Note."""
        unit = self.unit
        due, pull = jax.vjp(lambda *args: unit.reference(args, fixed), *args)
        automatic, _ = flatten(unit, args, pull(dy))
        y = unit.forward(args, fixed) if unit.forward is not unit.reference else due
        manual: dict[str, Any] = {}
        try:
            manual, wrong = flatten(unit, args, unit.manual(args, fixed, dy))
            note = Note(wrong=tuple(wrong))
        except Exception as error:
            note = Note(failed=f"{type(error).__name__}: {first_line(error)}")
        return jax.tree.leaves(y), jax.tree.leaves(due), manual, automatic, note

    def point(self, y: list, due: list, manual: dict, automatic: dict, note: Note) -> Point:
        if note.failed:
            raise FailedError(note.failed)
        numbers = [{name: np.asarray(a) for name, a in side.items()} for side in (manual, automatic)]
        return Point([np.asarray(a) for a in y], [np.asarray(a) for a in due], numbers[0], numbers[1], note.wrong)


def compile_together(runners: list[Runner], probes: list[list[Probe]], dtypes: tuple) -> None:
    """Trace one after the other, compile side by side: XLA leaves Python's lock."""
    jobs = [
        (r, key, job)
        for r, points in zip(runners, probes, strict=True)
        for key, job in r.prepare(points, dtypes).items()
    ]

    def work(one):
        runner, key, job = one
        with suppress(Exception):
            runner.compiled[key] = job()

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, jobs))
