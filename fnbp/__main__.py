"""The command line: python -m fnbp compare MODULE:ATTRIBUTE, and python -m fnbp docs."""

import difflib
import importlib
import json
import sys
import traceback
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from fnbp.comparison import compare
from fnbp.layer import Layer
from fnbp.rendering import pages


class InputError(Exception):
    """A mistake in the command, reported as one sentence without a traceback."""


@dataclass
class Compare:
    """Compare a manual backward with jax.vjp. The exit code is 0 if it is right, 1 if it is wrong, 2 if the command is.

    Each input is an array that is drawn: 7x11 is a float32 Gaussian of that shape, 7x11:bfloat16 is one of bfloat16,
    and 7x5:int32:50 holds integers from 0 to 49.
    """

    subject: tyro.conf.Positional[str]
    """MODULE:ATTRIBUTE of a Layer, a function that returns one, a jax.custom_vjp, or a function to go with --vjp."""
    inputs: tuple[str, ...] = field(default=("7x11",))
    """The shape of the x of a Layer, or of each argument of a function."""
    reference: str | None = None
    """MODULE:ATTRIBUTE of the plain function that a jax.custom_vjp is compared with; by default its own."""
    vjp: str | None = None
    """MODULE:ATTRIBUTE of the backward: (args, cotangent) -> cotangents of args."""
    level: Literal["quick", "full", "deep"] = "full"
    """How many probes are tried: a few in seconds, all, or all with more draws and in pairs."""
    cost: bool = False
    """Also measure time and memory of both sides."""
    seed: int = 0
    """The seed of inputs, parameters and cotangents."""
    json: Path | None = None
    """The file to write the report to, as JSON."""
    plot: Path | None = None
    """The file to draw the figure in: PNG or PDF."""


@dataclass
class Docs:
    """Open the API pages in a browser, or write them to a folder. Exit code 2 if pdoc is not installed."""

    out: Path | None = None
    """The folder to write them to, instead of opening them."""


def find(place: str) -> Any:
    """The object at MODULE:ATTRIBUTE. Raises: InputError if there is none, with the nearest names."""
    module_name, colon, attribute = place.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"{place!r} is not MODULE:ATTRIBUTE, for example mypackage.layers:my_layer")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"no module named {error.name!r} can be imported from {Path.cwd()}") from error
    except Exception as error:
        raise InputError(f"importing {module_name} raises {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            names = [n for n in dir(found) if not n.startswith("_")]
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"{module_name} has no attribute {attribute!r}{hint}")
        found = getattr(found, name)
    return found


def draw(spec: str, rng: np.random.Generator) -> jax.Array:
    """Draw an array of a shape in words. Raises: InputError if the words are not a shape."""
    shape_text, _, rest = spec.partition(":")
    dtype_text, _, below = rest.partition(":")
    try:
        shape = tuple(int(n) for n in shape_text.split("x") if n)
        dtype = jnp.dtype(dtype_text or "float32")
        limit = int(below) if below else 2
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{spec!r} is not an input; expected for example 7x11, 7x11:bfloat16 or 7x5:int32:50"
        ) from error
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, limit, shape), dtype)
    return jnp.asarray(np.asarray(rng.standard_normal(shape), np.float32), dtype)


def layer_of(place: str, found: Any) -> Layer:
    """The Layer that was found, or that a function without arguments returns. Raises: InputError if there is none."""
    if callable(found) and not isinstance(found, Layer):
        try:
            found = found()
        except TypeError as error:
            raise InputError(
                f"{place} is a function: give --reference or --vjp to compare it, or name one that returns a Layer "
                f"when called without arguments ({error})"
            ) from error
    if not isinstance(found, Layer):
        raise InputError(f"{place} has type {type(found).__name__}; expected a Layer or a function")
    return found


def write_docs(settings: Docs, console: Console) -> int:
    """Write the API pages, and open them unless a folder is given; the exit code."""
    try:
        page = pages.build(settings.out)
    except ImportError as error:
        raise InputError(f"the pages need pdoc ({error}); install it: pip install 'fnbp[docs]'") from error
    except OSError as error:
        raise InputError(f"the pages cannot be written: {error}") from error
    console.print(f"saved {page}", highlight=False, soft_wrap=True)
    if settings.out is None:
        webbrowser.open(page.as_uri())
    return 0


def run(settings: Compare, console: Console) -> int:
    """Compare as the command says. Returns: the exit code."""
    rng = np.random.default_rng(settings.seed)
    found = find(settings.subject)
    inputs = [draw(spec, rng) for spec in settings.inputs]
    options: dict[str, Any] = {"key": jax.random.key(settings.seed), "level": settings.level, "cost": settings.cost}
    with_rule = isinstance(found, (jax.custom_vjp, jax.custom_jvp))
    if settings.reference or settings.vjp:
        options |= {name: find(p) for name, p in (("reference", settings.reference), ("vjp", settings.vjp)) if p}
    elif not with_rule:
        found = layer_of(settings.subject, found)
    try:
        report = compare(found, *inputs, **options)
    except (TypeError, ValueError) as error:
        raise InputError("; ".join([str(error), *getattr(error, "__notes__", [])])) from error
    console.print(report)
    try:
        if settings.json:
            settings.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        if settings.plot:
            report.plot(settings.plot)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the report cannot be written: {error}") from error
    return 0 if report.ok else 1


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run it. Returns: the exit code."""
    settings = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "docs": Docs}, prog="python -m fnbp", description=__doc__, args=arguments
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        return write_docs(settings, console) if isinstance(settings, Docs) else run(settings, console)
    except InputError as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), highlight=False)
    except Exception:  # the subject's own code failed: its backward is neither right nor wrong
        traceback.print_exc()
    return 2


if __name__ == "__main__":
    sys.exit(main())
