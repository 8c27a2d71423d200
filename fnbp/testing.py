"""For tests: a wrong backward fails them, with the report as the message."""

from collections.abc import Callable
from typing import Any

from fnbp.comparison import Report, compare
from fnbp.layer import Layer

__all__ = ["assert_gradients_match"]


def assert_gradients_match(subject: Layer | Callable, *args: Any, **options: Any) -> Report:
    """AssertionError, with the report, unless fnbp.compare finds the manual backward right. Arguments: as compare's.

    Returns: the report. Raises: AssertionError; what compare raises.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    report = compare(subject, *args, **options)
    report.raise_if_bad()
    return report
