"""The API pages: pdoc over the modules that say in `__all__` what they hand on, with formulas as they are written."""

import html
import importlib
import inspect
import pkgutil
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

SECTION = re.compile(r"([A-Z][a-z]+): +(\S.*)")
ALIGNED = re.compile(r"\S.*?\S? {2,}\S")  # a name, a gap, what it is: one line of a table in a docstring


def modules() -> Iterator[ModuleType]:
    """fnbp, and every module below it that has an `__all__`."""
    package = importlib.import_module("fnbp")
    yield package
    for found in pkgutil.walk_packages(package.__path__, "fnbp."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            if hasattr(module, "__all__"):
                yield module


def to_markdown(docstring: str) -> str:
    """A docstring as Markdown: formulas and tables stay preformatted, its sections become a list of definitions."""
    first, *rest = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join([prose(first), *map(block_to_markdown, rest)])


def block_to_markdown(block: str) -> str:
    """What stands between two empty lines of a docstring, below its first line."""
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return block
    if SECTION.match(lines[0]):
        return definitions(lines)
    if all(ALIGNED.match(line) or line.startswith(" ") for line in lines):
        return "\n".join("    " + line for line in lines)
    return prose(block)


def definitions(lines: Iterable[str]) -> str:
    """The sections of a docstring, "Shapes: ..." and the like, as a list of definitions."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if at := SECTION.match(line):
            found.append((at[1], [at[2]]))
        else:
            found[-1][1].append(line.strip())
    items = (f"<dt>{name}</dt>\n<dd>{inline(' '.join(words))}</dd>" for name, words in found)
    return "\n".join(("<dl>", *items, "</dl>"))


def inline(text: str) -> str:
    """Text as HTML, with what stands between backticks as code."""
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", html.escape(text, quote=False))


def prose(text: str) -> str:
    """Text as one paragraph of Markdown, in which only backticks mean anything."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts)


def index(found: Iterable[ModuleType]) -> str:
    """The front page: every public name, by module, with its first line."""
    lines = []
    for module in found:
        names = getattr(module, "__all__", ())
        if names and module.__name__ != "fnbp":
            page = module.__name__.replace(".", "/") + ".html"
            lines += ["", f"## [{module.__name__.removeprefix('fnbp.')}]({page})", ""]
            lines += [f"- [`{name}`]({page}#{name}) {first_line(getattr(module, name))}" for name in names]
    return "\n".join(lines)


def first_line(value: Any) -> str:
    """Of its docstring; nothing for a table or another value without one of its own."""
    doc = inspect.getdoc(value) if inspect.isfunction(value) or inspect.isclass(value) else None
    return prose(doc.splitlines()[0]) if doc else ""


def resolve(found: Iterable[ModuleType]) -> None:
    """Give the constructors of named tuples the types of their fields: pdoc cannot look up a name such as "Layer"."""
    for module in found:
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, tuple) and hasattr(value, "_fields"):
                value.__new__.__annotations__.update(get_type_hints(value))


def specifications(shown: dict[str, ModuleType]) -> Iterator[str]:
    """What pdoc is told to show: it does not look below a package that has an `__all__`, and shows all modules of one
    that has none."""
    parents = {name.rpartition(".")[0] for name in shown}
    yield "fnbp"
    for name in shown:
        if hasattr(shown.get(name.rpartition(".")[0]), "__all__"):
            yield name
    for found in pkgutil.walk_packages(shown["fnbp"].__path__, "fnbp."):
        if found.name not in shown and found.name not in parents:
            yield f"!{re.escape(found.name)}$"


def build(out: Path | None = None) -> Path:
    """Write the pages to a folder, a temporary one by default, and return the first. ImportError without pdoc."""
    import pdoc
    import pdoc.docstrings
    import pdoc.render

    shown = list(modules())
    resolve(shown)
    front = inspect.cleandoc(shown[0].__doc__ or "")

    def convert(docstring: str, *_: Any) -> str:
        text = to_markdown(docstring)
        return text + "\n" + index(shown) if inspect.cleandoc(docstring) == front else text

    pdoc.render.configure(docformat="markdown", footer_text="fnbp: backpropagation as a value")
    pdoc.docstrings.convert = convert  # for the pages and for their search index
    out = out or Path(tempfile.mkdtemp(prefix="fnbp_docs_"))
    pdoc.pdoc(*specifications({module.__name__: module for module in shown}), output_directory=out)
    return out / "fnbp.html"
