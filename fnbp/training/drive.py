"""The outer loop of training: it calls the compiled loop until a stopping condition holds."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.processes import agreed, in_all
from fnbp.training.checkpoints import Nothing
from fnbp.training.loop import CAPACITY, Carry, copy, last_finite
from fnbp.training.progress import Stop, bar
from fnbp.training.reached import Fit, Reached
from fnbp.training.supply import Resident, Streamed

CALL_SECONDS = 0.2  # how long one call of the compiled loop is meant to take, and Ctrl-C to wait


class Rule(NamedTuple):
    """When to stop, in numbers."""

    start: int
    last: int
    batches: int
    threshold: float
    patience: int | None


class Watch(NamedTuple):
    """Who looks on: between compiled calls, and after each epoch."""

    evaluate: Callable | None
    on_epoch: Callable | None
    callback: Callable | None
    progress: bool
    owed: bool  # a validation before the first step

    @property
    def epochs(self) -> bool:
        return self.evaluate is not None or self.on_epoch is not None


def drive(
    supply: Resident | Streamed,
    at: tuple[Carry, jax.Array],
    rule: Rule,
    watch: Watch,
    reached: Reached,
    stop: Stop,
    saver: Nothing,
) -> Fit:
    """Call the compiled loop until a stopping condition holds, and keep what it brings."""
    step, pace, final = rule.start, 1, reached.last_loss
    stopped = validate(watch, rule, reached) if watch.owed else ""
    stopped, measure = stopped or over(rule, reached), functools.partial(end_of_epoch, watch, rule, reached)
    with bar(rule.start, rule.last, watch.progress) as show:
        while not stopped and not agree(stop, at):
            limit = min(step + pace, saver.next(step, rule.last))
            if watch.epochs:
                limit = min(limit, (step // rule.batches + 1) * rule.batches)
            call = in_all(functools.partial(supply.call, step, limit, stop), at)
            if call is None:
                agree(stop, at)
                break
            run, data, limit = call
            kept, called = copy(at), time.perf_counter()
            reached.hold(kept[0])
            carry, order, got, is_finite = run(*at, data, np.int32(limit), jnp.asarray(rule.threshold, float))
            at, done = (carry, order), int(carry.step)
            logs = {name: np.asarray(values)[: done - step].copy() for name, values in got.items()}
            final, step, asked = float(logs["loss"][-1]), done, limit - step
            if not (is_finite and np.isfinite(final)):
                at, stopped = last_finite(run, kept, data, done), "non-finite"
            reached.advance(at[0], int(at[0].step), logs)
            if not stopped:
                stopped = "threshold" if final <= rule.threshold else ""
                if step % rule.batches == 0 or step == rule.last:
                    ended = in_all(measure, at)  # the epoch that stops is measured too
                    stopped = stopped or agreed(ended, at)
            show(step, final, reached.validations)
            if watch.callback is not None:
                in_all(functools.partial(watch.callback, step, final), at)
            stopped = stopped or ("steps" if step == rule.last else "")
            if agreed("due" if saver.is_due(reached.step) else "", at):
                saver.offer(reached.fit("", ""))
            slow = agreed("slow" if time.perf_counter() - called >= CALL_SECONDS else "", at)
            if asked == pace and not slow:
                pace = min(2 * pace, CAPACITY)
    fault = supply.fault(reached.step) if stopped == "non-finite" else ""
    return reached.fit(stopped, explain(stopped, step, reached.step, final, rule, fault))


def agree(stop: Stop, at: tuple[Carry, jax.Array]) -> str:
    """Why a signal asks to stop, in this process or another, or ""."""
    stop.reason = agreed(stop.reason, at)
    return stop.reason


def over(rule: Rule, reached: Reached) -> str:
    """Why a run that goes on from a checkpoint is over already, or ""."""
    if rule.start >= rule.last:
        return "steps"
    if reached.last_loss <= rule.threshold:
        return "threshold"
    waited = rule.patience is not None and reached.waited >= rule.patience
    return "patience" if waited and np.isfinite(reached.last_loss) else ""


def end_of_epoch(watch: Watch, rule: Rule, reached: Reached) -> str:
    """Measure and show what an epoch has brought; why to stop here: "patience", "asked", or ""."""
    stopped = validate(watch, rule, reached)  # before on_epoch, which sees it, and whose exception would lose it
    if watch.on_epoch is None:
        return stopped
    so_far = reached.fit("", "")
    params, state, opt_state = copy(so_far[:3])  # the next step overwrites those that are at hand
    asked = watch.on_epoch(so_far._replace(params=params, state=state, opt_state=opt_state))
    return stopped or ("asked" if isinstance(asked, (bool, np.bool_, jax.Array)) and bool(asked) else "")


def validate(watch: Watch, rule: Rule, reached: Reached) -> str:
    """Measure what was reached; "patience" if that has run out, else ""."""
    if watch.evaluate is None:
        return ""
    (params, state, _), step, _ = reached.now
    whole = step % rule.batches == 0
    reached.measure(watch.evaluate(params, state), whole)
    return "patience" if whole and rule.patience is not None and reached.waited >= rule.patience else ""


def explain(stopped: str, step: int, ended: int, final: float, rule: Rule, fault: str) -> str:
    """Why training stopped, in a sentence. fault: what does not fit in the batch that is not finite."""
    broken, cause = (ended + 1, "its update is not") if np.isfinite(final) else (step, f"its loss is {final:.6g}")
    return {
        "": "",
        "steps": f"all {step - rule.start} steps done, the last loss is {final:.6g}"
        if step > rule.start
        else f"all {step} steps were done before",
        "threshold": f"the loss of step {step} is {final:.6g}, at most the threshold {rule.threshold:.6g}",
        "asked": f"on_epoch asked for the end, at step {step}",
        "patience": f"no new least validation loss in {rule.patience} validations, at step {step}",
        "non-finite": f"step {broken} is not finite, {cause}; these parameters are of step {ended}"
        + (fault and f"; {fault}"),
    }[stopped]
