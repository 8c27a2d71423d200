"""Assertions for tests: a wrong backward fails the test, with the report as the message."""

from collections.abc import Callable
from typing import Any

from fnbp.comparison import Report, compare
from fnbp.layer import Layer

__all__ = ["assert_gradients_match"]


def assert_gradients_match(subject: Layer | Callable, *args: Any, **options: Any) -> Report:
    """Assert that fnbp.compare finds the manual backward right. The arguments are those of compare.

    Returns: the report. Raises: AssertionError, with the report, if the backward is wrong; what compare raises.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    report = compare(subject, *args, **options)
    report.raise_if_bad()
    return report
