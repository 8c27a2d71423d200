"""Tables for a terminal, and the same in plain text for logs."""

from abc import ABC, abstractmethod
from io import StringIO

from rich.console import Console, RenderableType


class Tabular(ABC):
    """What has a __rich__ table: rich prints it in colour, str() gives it in plain text."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The table."""

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=120, no_color=True).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
