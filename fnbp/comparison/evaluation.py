"""Both backwards of a subject at a probe, in the arithmetic that is asked for, and compiled if possible."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.numerics import arithmetic, as_jax, compiled, first_line, is_float0
from fnbp.comparison.probes import Probe
from fnbp.comparison.subject import Mismatch, Subject, flatten


class FailedError(Exception):
    """The manual backward raised."""


class Sides(NamedTuple):
    """Both sides of a subject at a probe, as NumPy arrays.

    y, expected_y      the outputs of its forward and of its reference
    manual, automatic  cotangents by leaf
    wrong              manual cotangents whose tree, shape or dtype is wrong
    """

    y: list[np.ndarray]
    expected_y: list[np.ndarray]
    manual: dict[str, np.ndarray]
    automatic: dict[str, np.ndarray]
    wrong: tuple[Mismatch, ...]


class StepByStep(NamedTuple):
    """The outputs and the manual cotangents of a subject, run step by step, not compiled."""

    y: list[np.ndarray]
    manual: dict[str, np.ndarray]


class Inputs:
    """A probe as arrays for a compiled function; those of equal key (tree, shapes, dtypes) share one function."""

    def __init__(self, probe: Probe, dtype: Any):
        self.flat, self.tree = jax.tree.flatten(probe.of(dtype))
        self.arrays = [a for a in self.flat if not is_float0(a)]
        shapes = tuple((np.shape(a), getattr(a, "dtype", type(a))) for a in self.flat)
        self.key = str(dtype), self.tree, shapes

    def unflatten(self, arrays: list) -> Any:
        """args, fixed and dy made of these arrays, with the cotangents of integers put back."""
        moving = iter(arrays)
        return jax.tree.unflatten(self.tree, [a if is_float0(a) else next(moving) for a in self.flat])


@jax.tree_util.register_static
@dataclass(frozen=True)
class Aside:
    """What a compiled function returns beside its arrays: faults that show while it is traced."""

    wrong: tuple[Mismatch, ...] = ()
    failed: str = ""


class Evaluator:
    """Evaluates a subject.

    eager   the subject cannot be compiled, so it runs step by step
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.eager = False
        self.compiled: dict[Any, Callable] = {}
        self.known: dict[Any, Sides] = {}

    def at(self, probe: Probe, dtype: Any = None) -> Sides:
        """Both sides at a probe, in dtype or, for None, as given; kept for the next call.

        Raises: FailedError if the manual backward raises.
        """
        known = id(probe), dtype
        if known not in self.known:
            self.known[known] = self.evaluate(probe, dtype)
        return self.known[known]

    def evaluate(self, probe: Probe, dtype: Any) -> Sides:
        """Compute both sides at a probe, as `at` does, but keep nothing."""
        with arithmetic(dtype):
            inputs = Inputs(probe, dtype)
            if not self.eager:
                try:
                    if inputs.key not in self.compiled:
                        self.compiled[inputs.key] = self.lower(inputs)()
                    return self.sides_of(*self.compiled[inputs.key](inputs.arrays))
                except Exception:  # it cannot be traced, or it fails anyway; running it step by step tells which
                    pass
            found = self.sides_of(*self.run(*as_jax(inputs.unflatten(inputs.arrays))))
            self.eager = True
            return found

    def step_by_step(self, probe: Probe) -> StepByStep:
        """Run the forward and the manual backward step by step. Raises: FailedError if the manual backward raises."""
        args, fixed, dy = as_jax((probe.args, probe.fixed, probe.dy))
        y = self.subject.forward(args, fixed)
        try:
            manual, _ = flatten(self.subject, args, self.subject.manual(args, fixed, dy))
        except Exception as error:
            raise FailedError(f"{type(error).__name__}: {first_line(error)}") from error
        return StepByStep(
            [np.asarray(a) for a in jax.tree.leaves(y)], {name: np.asarray(a) for name, a in manual.items()}
        )

    def lower(self, inputs: "Inputs") -> Callable:
        """Trace `run` for inputs of that shape. Returns: a function that compiles it."""
        return compiled(lambda arrays: self.run(*inputs.unflatten(arrays))).lower(inputs.arrays).compile

    def prepare(self, probes: list[Probe], dtypes: tuple) -> dict[Any, Callable]:
        """What is still to be compiled for these probes, by key."""
        missing: dict[Any, Callable] = {}
        for dtype in dtypes:
            with arithmetic(dtype):
                for inputs in (Inputs(probe, dtype) for probe in probes):
                    if inputs.key not in missing:
                        with suppress(Exception):  # evaluate meets the error again, and reports it
                            missing[inputs.key] = self.lower(inputs)
        return missing

    def run(self, args: tuple, fixed: Any, dy: Any) -> tuple:
        """The forward, the reference and both backwards: the fields of Sides, and an Aside."""
        subject = self.subject
        expected_y, pull = jax.vjp(lambda *args: subject.reference(args, fixed), *args)
        automatic, _ = flatten(subject, args, pull(dy))
        y = subject.forward(args, fixed) if subject.forward is not subject.reference else expected_y
        manual: dict[str, Any] = {}
        try:
            manual, wrong = flatten(subject, args, subject.manual(args, fixed, dy))
            aside = Aside(wrong=tuple(wrong))
        except Exception as error:
            aside = Aside(failed=f"{type(error).__name__}: {first_line(error)}")
        return jax.tree.leaves(y), jax.tree.leaves(expected_y), manual, automatic, aside

    def sides_of(self, y: list, expected_y: list, manual: dict, automatic: dict, aside: Aside) -> Sides:
        """Sides of what `run` returned. Raises: FailedError if the manual backward raised."""
        if aside.failed:
            raise FailedError(aside.failed)
        numbers = [{name: np.asarray(a) for name, a in side.items()} for side in (manual, automatic)]
        return Sides(
            [np.asarray(a) for a in y], [np.asarray(a) for a in expected_y], numbers[0], numbers[1], aside.wrong
        )


def compile_together(evaluators: list[Evaluator], probes: list[list[Probe]], dtypes: tuple) -> None:
    """Trace what all evaluators need one after the other, and compile it in parallel: XLA releases Python's lock."""
    jobs = [
        (r, key, job)
        for r, points in zip(evaluators, probes, strict=True)
        for key, job in r.prepare(points, dtypes).items()
    ]

    def work(one):
        evaluator, key, job = one
        with suppress(Exception):
            evaluator.compiled[key] = job()

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, jobs))
