"""Both backwards of a subject at a probe, in the arithmetic that is asked for, and compiled if possible."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from fnbp.comparison.code import equations
from fnbp.comparison.numerics import arithmetic, as_jax, first_line, is_float0, is_key, options
from fnbp.comparison.probe import Probe
from fnbp.comparison.subject import Mismatch, Subject, as_output, flatten

LOOPS = ("conv_general_dilated",)  # XLA writes them as loops in float64, ten times as slow if not optimised
OFTEN = 8  # runs, from which optimising these pays


class FailedError(Exception):
    """The manual backward raised."""


class EndlessError(Exception):
    """A subject did not end in time. What computes it may still run, in a thread that is left behind."""


class RefusedError(Exception):
    """A subject, or its backward, refuses a point near the one that is judged."""


class Sides(NamedTuple):
    """Both sides of a subject at a probe, as NumPy arrays.

    y, y_before        the outputs of its forward: by itself, and as it runs before the manual backward
    expected_y         the outputs of its reference
    manual, automatic  cotangents by leaf
    wrong              manual cotangents whose tree, shape or dtype is wrong
    """

    y: list[np.ndarray]
    y_before: list[np.ndarray]
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

    limit      the seconds that one call may take, or None
    compiled   by the key of its inputs: shared by subjects of the same code
    eager      the subject cannot be compiled, so it runs step by step
    calls      how often each side was called, by "manual" and "automatic"
    """

    def __init__(self, subject: Subject, limit: float | None = None, compiled: dict[Any, Callable] | None = None):
        self.subject = subject
        self.limit = limit
        self.eager = False
        self.compiled: dict[Any, Callable] = {} if compiled is None else compiled
        self.known: dict[Any, Sides] = {}
        self.calls = {"manual": 0, "automatic": 0}

    def count(self, manual: int = 0, automatic: int = 0) -> None:
        """Count calls of either side."""
        self.calls["manual"] += manual
        self.calls["automatic"] += automatic

    def at(self, probe: Probe, dtype: Any = None) -> Sides:
        """Both sides at a probe, in dtype or, for None, as given; kept for the next call.

        Raises: FailedError if the manual backward raises; EndlessError if one of them does not end in time.
        """
        known = id(probe), dtype
        if known not in self.known:
            self.known[known] = self.compute(probe, dtype)
        return self.known[known]

    def forget(self, probe: Probe) -> None:
        """Drop what `at` has kept of a probe: gradients of many probes would fill the memory."""
        self.known = {known: sides for known, sides in self.known.items() if known[0] != id(probe)}

    def evaluate(self, probe: Probe, dtype: Any) -> Sides:
        """Both sides at a point near a probe, as `at` gives them, but kept by nobody.

        Raises: RefusedError if one of them fails there, which is no fault: nobody asked for that point.
        """
        try:
            return self.compute(probe, dtype)
        except Exception as error:
            raise RefusedError(f"{type(error).__name__}: {first_line(error)}") from error

    def compute(self, probe: Probe, dtype: Any) -> Sides:
        """Compute both sides at a probe. Raises: as `at`; what the subject raises."""
        self.count(manual=1, automatic=1)
        with arithmetic(dtype):
            inputs = Inputs(probe, dtype)
            if not self.eager:
                try:
                    if inputs.key not in self.compiled:
                        self.compiled[inputs.key] = self.lower(inputs)()
                    return self.in_time(lambda: self.sides_of(*self.compiled[inputs.key](inputs.arrays)))
                except EndlessError:
                    raise
                except Exception:  # it cannot be traced, or it fails anyway; running it step by step tells which
                    pass
            found = self.in_time(lambda: self.sides_of(*self.run(*as_jax(inputs.unflatten(inputs.arrays)))))
            self.eager = True
            return found

    def in_time(self, call: Callable[[], Any]) -> Any:
        """What call() returns. Raises: EndlessError if it takes more than the limit; what call raises."""
        return call() if self.limit is None else within(self.limit, call)

    def step_by_step(self, probe: Probe) -> StepByStep:
        """Run the forward and the manual backward step by step. Raises: FailedError if the manual backward raises."""
        return self.interleaved([probe])[0]

    def interleaved(self, probes: list[Probe]) -> list[StepByStep]:
        """Step by step, the forwards of all probes first, then their manual backwards: none may remember another's.

        Raises: FailedError if a manual backward raises.
        """
        points = [as_jax((probe.args, probe.fixed, probe.dy)) for probe in probes]
        self.count(manual=len(points))
        try:
            before = [self.subject.differentiate(args, fixed) for args, fixed, _ in points]
            found = []
            for (y, pull), (args, _, dy) in zip(before, points, strict=True):
                manual, _ = flatten(self.subject, args, pull(dy))
                numbers = {name: np.asarray(a) for name, a in manual.items()}
                found.append(StepByStep([np.asarray(a) for a in numbers_of(y)], numbers))
            return found
        except Exception as error:
            raise FailedError(f"{type(error).__name__}: {first_line(error)}") from error

    def lower(self, inputs: "Inputs", often: bool = False) -> Callable:
        """Trace `run` for inputs of that shape. Returns: a function that compiles it, optimised if it pays."""
        traced = jax.jit(lambda arrays: self.run(*inputs.unflatten(arrays))).trace(inputs.arrays)
        pays = often and any(equation.primitive.name in LOOPS for equation in equations(traced.jaxpr))
        return partial(traced.lower().compile, compiler_options=None if pays else options())

    def prepare(self, probes: list[Probe], dtypes_of: Callable[[Probe], tuple]) -> Iterator[tuple[Any, Callable]]:
        """Trace what these probes still lack. Yields: the key, and a function that compiles it."""
        first: dict[Any, tuple[Any, Inputs]] = {}
        uses: Counter[Any] = Counter()
        for probe, dtype in [(point, dtype) for point in probes for dtype in dtypes_of(point)]:
            with arithmetic(dtype):
                inputs = Inputs(probe, dtype)
            first.setdefault(inputs.key, (dtype, inputs))
            uses[inputs.key] += 1
        for key, (dtype, inputs) in first.items():
            if key in self.compiled:
                continue
            with arithmetic(dtype):
                try:
                    job = self.lower(inputs, often=uses[key] > OFTEN)
                except Exception:  # evaluate meets the error again, and reports it
                    continue
            yield key, job

    def run(self, args: tuple, fixed: Any, dy: Any) -> tuple:
        """The forward, the reference and both backwards: the fields of Sides, and an Aside."""
        subject = self.subject
        expected_y, pull = jax.vjp(lambda *args: subject.reference(args, fixed), *args)
        dy = as_output(dy, expected_y)
        automatic, _ = flatten(subject, args, pull(dy))
        y = subject.forward(args, fixed) if subject.forward is not subject.reference else expected_y
        manual, y_before = {}, y
        try:
            y_before, manual_pull = subject.differentiate(args, fixed)
            manual, wrong = flatten(subject, args, manual_pull(dy))
            aside = Aside(wrong=tuple(wrong))
        except Exception as error:
            aside = Aside(failed=f"{type(error).__name__}: {first_line(error)}")
        return *map(numbers_of, (y, y_before, expected_y)), manual, automatic, aside

    def sides_of(self, y: list, y_before: list, expected_y: list, manual: dict, automatic: dict, aside: Aside) -> Sides:
        """Sides of what `run` returned. Raises: FailedError if the manual backward raised."""
        if aside.failed:
            raise FailedError(aside.failed)
        y, y_before, expected_y = ([np.asarray(a) for a in side] for side in (y, y_before, expected_y))
        manual, automatic = ({name: np.asarray(a) for name, a in side.items()} for side in (manual, automatic))
        return Sides(y, y_before, expected_y, manual, automatic, aside.wrong)


def numbers_of(y: Any) -> list[Any]:
    """The leaves of an output; of random keys, their numbers."""
    return [jax.random.key_data(a) if is_key(a) else a for a in jax.tree.leaves(y)]


def within(limit: float, call: Callable[[], Any]) -> Any:
    """What call() returns, computed in a thread with this thread's settings of JAX.

    Raises: EndlessError if it takes more than limit seconds; the thread is then left behind. What call raises.
    """
    settings = ("jax_enable_x64", "jax_default_device", "jax_default_matmul_precision")
    wide, device, precision = (getattr(jax.config, name) for name in settings)
    mesh = jax.sharding.get_mesh()
    done: list[tuple[bool, Any]] = []

    def work() -> None:
        with (
            jax.enable_x64(wide),
            jax.default_device(device),
            jax.default_matmul_precision(precision),
            nullcontext() if mesh.empty else jax.set_mesh(mesh),
        ):
            try:
                done.append((True, call()))
            except BaseException as error:  # it is raised again, where it was asked for
                done.append((False, error))

    thread = threading.Thread(target=work, daemon=True, name="fnbp.compare")
    thread.start()
    thread.join(limit)
    if not done:
        raise EndlessError(f"it did not end within {limit:g} s")
    right, value = done[0]
    if right:
        return value
    raise value


def compile_together(evaluators: list[Evaluator], probes: list[list[Probe]], dtypes_of: Callable) -> None:
    """Trace what all evaluators need one after the other, and compile it beside: XLA releases Python's lock."""

    def work(evaluator, key, job):
        with suppress(Exception):
            evaluator.compiled[key] = job()

    seen = set()
    with ThreadPoolExecutor() as pool:
        for evaluator, points in zip(evaluators, probes, strict=True):
            if id(evaluator.compiled) not in seen:  # of equal code, the first is enough
                for key, job in evaluator.prepare(points, dtypes_of):
                    pool.submit(work, evaluator, key, job)
            seen.add(id(evaluator.compiled))
