"""The run-time checker of the import hook: functions that state shapes, which are the leaf forwards and backwards."""

import inspect

from beartype import beartype


def checked(function):
    """function, checked on each call where an annotation of it states a shape."""
    stated = inspect.isfunction(function) and any("jaxtyping" in repr(a) for a in function.__annotations__.values())
    return beartype(function) if stated else function
