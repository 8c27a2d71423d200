"""Checkpoints of fit by orbax: what a run has reached, on disk, so that it goes on where it was killed."""

import functools
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_positive, check_size, describe
from fnbp.construction import arrays_in
from fnbp.naming import named
from fnbp.training.reached import Best, Fit, History, Resumed

__all__ = ["Checkpoints"]

VERSION = 2  # of what is written


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often fit writes what it has reached. It needs the extra fnbp[train].

        fit(..., checkpoint="runs/a")      fit(..., checkpoint=Checkpoints("runs/a", steps=250))

    directory  of the checkpoints; fit makes it
    steps      write after every so many steps
    minutes    write when so many minutes have passed since the last time; by default 5 if steps is not given
    keep       how many checkpoints stay, the newest
    at         go on from the checkpoint of this step, not from the newest; newer ones are deleted

    Whatever happens, the end of a fit is written too. Writing goes on beside the training, and is atomic: a checkpoint
    that was not finished is not seen.
    """

    directory: str | Path
    steps: int | None = None
    minutes: float | None = None
    keep: int = 2
    at: int | None = None

    def __post_init__(self):
        if not isinstance(self.directory, (str, Path)) or not str(self.directory):
            raise TypeError(f"Checkpoints: directory must be a path, got {describe(self.directory)}")
        if self.steps is not None:
            check_size("Checkpoints", "steps", self.steps)
        if self.minutes is not None:
            check_positive("Checkpoints", "minutes", self.minutes)
        check_size("Checkpoints", "keep", self.keep)
        if self.at is not None:
            check_size("Checkpoints", "at", self.at)

    @property
    def seconds(self) -> float:
        """How long until the next one is written, however few steps were made."""
        minutes = (5.0 if self.steps is None else np.inf) if self.minutes is None else self.minutes
        return 60 * minutes


class Nothing:
    """Of a fit without checkpoints; position: the step -> where its batch is."""

    position: Callable[[int], Any] = staticmethod(lambda step: None)

    def load(self, run: dict[str, Any], params: Any, state: Any, opt_state: Any) -> Resumed | None:
        """Nothing was written."""
        return None

    def next(self, step: int, last: int) -> int:
        """The step to stop at, at most last."""
        return last

    def offer(self, fit: Fit) -> None:
        """Write nothing."""

    def is_due(self, step: int) -> bool:
        """Never."""
        return False

    def finish(self, fit: Fit) -> None:
        """Write nothing."""


class Saver(Nothing):
    """Writes checkpoints of one run, and reads them."""

    def __init__(self, settings: Checkpoints):
        self.settings = settings
        self.run: dict[str, Any] = {}
        self.written, self.since = 0, time.monotonic()

    def load(self, run: dict[str, Any], params: Any, state: Any, opt_state: Any) -> Resumed | None:
        """What was reached, or None in a new directory; params, state and opt_state tell form and place.

        Raises: ValueError if the checkpoint is of another run, cannot be read, or is not there.
        """
        self.run = run
        step = self.chosen()
        if step is None:
            return None
        meta = self.read(step, meta=None)["meta"]
        if meta.get("version") != VERSION:
            raise ValueError(f"{self.of(step)} was written by another version of fnbp")
        told = differences(meta["run"], run)
        if told:
            raise ValueError(f"{self.of(step)} is of another run: {'; '.join(told)}")
        best = {"params": params, "state": state} if meta["best"] else {}
        history = empty(meta["history"])
        like = {"params": params, "state": state, "opt_state": opt_state, "best": best}
        tree = self.read(step, tree={**like, "history": without_empty(history)})["tree"]
        for newer in [one for one in self.manager.all_steps() if one > step]:
            self.manager.delete(newer)
        self.written = step
        held = {**history, **tree["history"], "seconds": meta["seconds"]}
        for name in ("metrics", "recorded"):
            held[name] = {**history[name], **tree["history"].get(name, {})}
        kept = Best(tree["best"]["params"], tree["best"]["state"], *meta["best"]) if meta["best"] else None
        least = np.inf if meta["least"] is None else meta["least"]
        place = (kept, meta["waited"], least, tree["params"], tree["state"], History(**held), meta["position"])
        return Resumed(tree["opt_state"], step, *place)

    @functools.cached_property
    def manager(self) -> Any:
        """orbax's manager of the directory, made when it is needed: a request that is refused leaves no trace."""
        return opened(self.settings)

    def close(self) -> None:
        """Wait for what is being written."""
        if "manager" in vars(self):
            self.manager.close()

    def chosen(self) -> int | None:
        """The step to go on from; None if nothing was written."""
        at = self.settings.at
        if at is not None and at not in self.manager.all_steps():
            raise ValueError(f"fit: {self.settings.directory} has no checkpoint of step {at}{self.others(at)}")
        return self.manager.latest_step() if at is None else at

    def read(self, step: int, **wanted: Any) -> Any:
        """Parts of a checkpoint. ValueError if it cannot be read."""
        import orbax.checkpoint as ocp

        args = {}
        for name, like in wanted.items():
            form = jax.tree.map(lambda a: ocp.utils.to_shape_dtype_struct(a) if is_placed(a) else np.asarray(a), like)
            args[name] = ocp.args.JsonRestore() if like is None else ocp.args.StandardRestore(form)
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{self.of(step)} cannot be read: {first}{self.others(step)}") from error

    def of(self, step: int) -> str:
        """A checkpoint, in an error."""
        return f"fit: the checkpoint of step {step} in {self.settings.directory}"

    def others(self, step: int) -> str:
        """Which other checkpoints there are, and how to use them."""
        rest = sorted(one for one in self.manager.all_steps() if one != step)
        return f"; Checkpoints(directory, at={rest[-1]}) goes on from another one; there are {rest}" if rest else ""

    def next(self, step: int, last: int) -> int:
        """The next step that is to be written, at most last."""
        every = self.settings.steps
        return last if every is None else min(last, (step // every + 1) * every)

    def is_due(self, step: int) -> bool:
        """True if it is time to write."""
        every, waited = self.settings.steps, time.monotonic() - self.since
        return step > self.written and (waited >= self.settings.seconds or (every is not None and step % every == 0))

    def offer(self, fit: Fit) -> None:
        """Write a Fit that is not written yet, beside what goes on. RuntimeError if that, or the last one, failed."""
        import orbax.checkpoint as ocp

        if fit.step <= self.written:
            return
        history = fit.history._asdict()
        seconds, _ = history.pop("seconds"), history.pop("start")  # a run with checkpoints starts at 0
        best = {} if fit.best is None else {"params": fit.best.params, "state": fit.best.state}
        tree = {"params": fit.params, "state": fit.state, "opt_state": fit.opt_state, "best": best}
        tree["history"] = without_empty(history)
        meta = {
            "version": VERSION,
            "run": self.run,
            "position": self.position(fit.step),
            "best": None if fit.best is None else [fit.best.step, fit.best.loss],
            "waited": fit.waited,
            "least": float(fit.least) if np.isfinite(fit.least) else None,
            "seconds": seconds,
            "history": jax.tree.map(lambda a: [list(a.shape), str(a.dtype)], history),
        }
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        with self.writing(fit.step):
            self.manager.save(fit.step, args=args, force=True)
        self.written, self.since = fit.step, time.monotonic()

    def finish(self, fit: Fit) -> None:
        """Write the end of a run, and wait until it is written."""
        self.offer(fit)
        with self.writing(fit.step):
            self.manager.wait_until_finished()

    def rescue(self, error: BaseException) -> None:
        """Write what an exception bears, if it can be written."""
        reached = getattr(error, "fit", None)
        if not isinstance(reached, Fit) or not self.run:
            return
        try:
            self.offer(reached)
            self.manager.wait_until_finished()
        except Exception:  # it may be this that failed
            error.add_note("fit: what was reached is not in a checkpoint")

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """RuntimeError, with what is left, if writing fails."""
        try:
            yield
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(
                f"{self.of(step)} could not be written: {first}; whole ones: {sorted(self.manager.all_steps())}"
            ) from error


@contextmanager
def saving(checkpoint: Any) -> Iterator[Nothing]:
    """Checkpoints as fit is told; at the end whatever is still being written is finished."""
    if checkpoint is None:
        yield Nothing()
        return
    settings = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    saver = Saver(settings)
    try:
        yield saver
    except BaseException as error:
        saver.rescue(error)
        raise
    finally:
        saver.close()


def opened(settings: Checkpoints) -> Any:
    """orbax's manager of the directory. ImportError, ValueError or OSError if there can be none."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("fit: checkpoints need orbax: pip install 'fnbp[train]'") from error
    place = str(settings.directory)
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"fit: the directory of checkpoints {path} is a file")
        path.mkdir(parents=True, exist_ok=True)
        place = str(path)
    options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(place, options=options)


def is_placed(a: Any) -> bool:
    """True for an array that its user put on devices, where it is to come back, and for random keys."""
    return isinstance(a, jax.Array) and (a.committed or jnp.issubdtype(a.dtype, jax.dtypes.extended))


def empty(shapes: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a history, to be filled."""
    return {
        name: empty(one) if isinstance(one, dict) else np.zeros(tuple(one[0]), one[1]) for name, one in shapes.items()
    }


def without_empty(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays that hold something: orbax writes no others."""
    inside = {name: without_empty(one) if isinstance(one, dict) else one for name, one in arrays.items()}
    return {name: one for name, one in inside.items() if (one if isinstance(one, dict) else one.size)}


def run_of(net: Any, loss: Any, params: Any, opt_state: str, key: jax.Array, **settings: Any) -> dict[str, Any]:
    """What a run is made of, in words: what must be the same where it goes on."""
    shapes = {name: f"{a.dtype}{list(a.shape)}" for name, a in named(net, params).items()}
    told = {"net": plainly(net), "parameters": shapes, "loss": plainly(loss), "optimizer": opt_state}
    held = b"".join(f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays_in((net, loss)))
    told["checksum of the arrays in net and loss"] = zlib.crc32(held)
    return {**told, "key": np.asarray(jax.random.key_data(key)).tolist(), **settings}


def plainly(value: Any) -> str:
    """A net or a loss in words that are the same in another process: without addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What is not the same, in words; of parameters only the first, and none if the nets differ anyway."""
    names = [name for name in here if there.get(name) != here[name]]
    told = [f"{name} is {there.get(name)} there, {here[name]} here" for name in names if name != "parameters"]
    if "parameters" in names and "net" not in names:
        ours, theirs = here["parameters"], there.get("parameters", {})
        first = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        told.append(f"{first} is {theirs.get(first, 'missing')} there, {ours.get(first, 'missing')} here")
    return told


def check_alone(checkpoint: Any, resume: Any, opt_state: Any, start: Any) -> None:
    """ValueError if it is told twice where to go on."""
    if checkpoint is None:
        return
    if resume is not None or opt_state is not None or start:
        raise ValueError("fit: checkpoint goes on from the newest one by itself; give no resume, opt_state or start")
