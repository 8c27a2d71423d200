"""The progress bar of fit, and the signals that end it without losing what was reached."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STOPS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stop:
    """Whether a signal has asked for the end: reason is "", "interrupt" or "terminated".

    closing  what was reached is being handed out, and no further signal may come in between
    """

    reason, closing = "", False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM set the reason, so that a compiled call ends and its result is kept; a second one raises.

    Only in the main thread, and only for signals that nobody else handles.
    """
    stop = Stop()

    def handler(signum, frame):
        if stop.reason and not stop.closing:
            raise KeyboardInterrupt
        stop.reason = stop.reason or STOPS[signum]

    ours = threading.current_thread() is threading.main_thread()
    handled = [number for number in STOPS if ours and signal.getsignal(number) is DEFAULTS[number]]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        stop.closing = True
        for number in handled:
            signal.signal(number, DEFAULTS[number])


@contextmanager
def bar(start: int, last: int, shown: bool) -> Iterator[Callable]:
    """A progress bar with the loss and steps/s: show(step, loss, validations)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as progress:
        task = progress.add_task("training", total=last - start, rate="")
        began = time.perf_counter()

        def show(step, loss, validations):
            rate = f"{(step - start) / (time.perf_counter() - began):,.0f} steps/s"
            measured = f" validation {validations[-1][1]['loss']:.4f}" if validations else ""
            progress.update(task, completed=step - start, description=f"loss {loss:.4f}{measured}", rate=rate)

        yield show
