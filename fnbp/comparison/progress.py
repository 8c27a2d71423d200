"""A line at a terminal that says which layer is under test; nothing anywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being compared, on stderr, until the context ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("comparing") as status:
        yield lambda text: status.update(f"comparing: {text}".replace("[", "\\["))
