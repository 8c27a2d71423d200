"""Where mistakes can be planted: backwards, the helpers that they call, totals of factors, what forwards save.

A helper that only the backwards of its own file call is spoilt where it stands. One that stands in another file, or
that forwards call too, is spoilt only for the backwards: the forward keeps the right one, so that the pair is wrong.
"""

import ast
import importlib
import inspect
import types
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import fnbp
from experiments.mutants.operators import NO_ARRAYS, Scope

PACKAGE = Path(inspect.getfile(fnbp)).parent
BACKWARDS = ("backward", "dloss")
TOTALS = ("total", "totals")  # of a factor, and of each turn of a factor in a loop


class Site(NamedTuple):
    """A place that can be wrong: the backward, the total or the saved tuple of owner, a top-level function or class."""

    file: str  # below fnbp, "layers/dense.py"
    owner: str
    name: str  # "gelu.backward_tanh"
    kind: str  # "backward", "total", "saved"
    statement: int  # of the module
    node: Any  # FunctionDef, Lambda, or the Return of a forward
    function: Any  # the function around it, for what is in scope
    shared: bool = False  # a helper that forwards may call too: there it stays right


class Module(NamedTuple):
    """A source file of the library."""

    file: str
    tree: ast.Module  # without docstrings
    live: types.ModuleType
    functions: tuple[str, ...]


ROOMS = ("layer.py", "factor.py", "layers", "losses", "combinators", "arrays")  # files and packages
REFUSALS = ("check", "is_")  # such functions refuse what they are given or find it good; they compute nothing


@cache
def files() -> tuple[str, ...]:
    """The files of the library that hold backwards, or what backwards call: every file of ROOMS, wherever it moves."""
    found = (path for room in ROOMS for path in ([PACKAGE / room] if room.endswith(".py") else packaged(room)))
    return tuple(path.relative_to(PACKAGE).as_posix() for path in found)


def packaged(room: str) -> list[Path]:
    """The files of a package of the library."""
    return sorted(path for path in (PACKAGE / room).rglob("*.py") if path.name != "__init__.py")


def live(file: str) -> types.ModuleType:
    """A file as it is imported."""
    return importlib.import_module("fnbp." + file.removesuffix(".py").replace("/", "."))


def read(file: str) -> Module:
    """A file as its tree and as it is imported."""
    tree = ast.parse((PACKAGE / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    helpers = tuple(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return Module(file, tree, live(file), helpers)


# --- where backwards are ---


def sites(module: Module) -> list[Site]:
    """Every backward, total and saved tuple of a file, in its order."""
    found = []
    helpers, called = helpers_of_backwards(module), {name for file, name in callers() if file == module.file}
    for i, top in enumerate(module.tree.body):
        if isinstance(top, ast.ClassDef):
            for node in top.body:
                if isinstance(node, ast.FunctionDef) and node.name in TOTALS and not abstract(node):
                    found.append(Site(module.file, top.name, f"{top.name}.{node.name}", "total", i, node, node))
        if isinstance(top, ast.FunctionDef):
            if top.name in helpers:
                found.append(Site(module.file, top.name, top.name, "backward", i, top, top))
            elif top.name in called:
                found.append(Site(module.file, top.name, top.name, "backward", i, top, top, shared=True))
        owner = owner_of(top)
        for name, kind, node, function in inside(module, top) if owner else ():
            found.append(Site(module.file, owner, f"{owner}.{name}", kind, i, node, function))
    return found


def owner_of(top: ast.stmt) -> str:
    """The name of a constructor, or of a table of functions; "" of any other statement of a module."""
    if isinstance(top, ast.Assign) and isinstance(top.targets[0], ast.Name):
        return top.targets[0].id
    return top.name if isinstance(top, ast.FunctionDef) else ""


def inside(module: Module, top: ast.stmt) -> Iterator[tuple[str, str, Any, Any]]:
    """Name, kind, node, function of the backwards and saved tuples in one constructor, or in a table of functions."""
    for node in ast.walk(top):
        if isinstance(node, ast.FunctionDef) and node is not top:
            if node.name.startswith(BACKWARDS):
                yield node.name, "backward", node, node
            if node.name.startswith("forward"):
                for part in ast.walk(node):
                    value = part.value if isinstance(part, ast.Return) else None
                    if isinstance(value, ast.Tuple) and isinstance(value.elts[-1], (ast.Tuple, ast.Call)):
                        yield f"{node.name} saves", "saved", part, node
        if isinstance(node, ast.Call):
            for name, argument in bound(module, node):
                if name.startswith(BACKWARDS) and isinstance(argument, ast.Lambda):
                    yield name, "backward", argument, argument


def bound(module: Module, call: ast.Call) -> list[tuple[str, ast.expr]]:
    """The arguments of a call by the names of its parameters."""
    f = getattr(module.live, ast.unparse(call.func), None)
    if not callable(f):
        return []
    try:
        names = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return []
    named = [(word.arg or "", word.value) for word in call.keywords]
    placed = takewhile(lambda argument: not isinstance(argument, ast.Starred), call.args)
    return [*zip(names, placed, strict=False), *named]


def backwards_in(module: Module, call: ast.AST) -> list[ast.Name]:
    """The functions that a call is given by name as backwards."""
    arguments = bound(module, call) if isinstance(call, ast.Call) else ()
    return [node for name, node in arguments if name.startswith(BACKWARDS) and isinstance(node, ast.Name)]


def abstract(node: ast.FunctionDef) -> bool:
    """True for a method that subclasses must write."""
    return any("abstractmethod" in ast.unparse(decorator) for decorator in node.decorator_list)


def helpers_of_backwards(module: Module) -> set[str]:
    """Functions of the module that its backwards call, and nothing else does."""
    functions = {node.name: node for node in module.tree.body if isinstance(node, ast.FunctionDef)}
    handed_on = [argument for call in ast.walk(module.tree) for argument in backwards_in(module, call)]
    backwards = {id(part) for node in (*backwards_of(module), *handed_on) for part in ast.walk(node)}
    found: set[str] = set()
    for _ in functions:  # a helper may call helpers
        within = backwards | {id(part) for name in found for part in ast.walk(functions[name])}
        uses = [node for node in ast.walk(module.tree) if isinstance(node, ast.Name) and node.id in functions]
        called = {node.id for node in uses if id(node) in within}
        found = called - {node.id for node in uses if id(node) not in within}
    return found


def backwards_of(module: Module) -> list[Any]:
    """The backwards in a module's constructors and tables."""
    tops = [top for top in module.tree.body if owner_of(top)]
    return [node for top in tops for _, kind, node, _ in inside(module, top) if kind == "backward"]


def within_backwards(module: Module) -> list[ast.Name]:
    """Every name that is read in the backwards of a module, or in helpers that only they call."""
    helpers = helpers_of_backwards(module)
    alone = [top for top in module.tree.body if isinstance(top, ast.FunctionDef) and top.name in helpers]
    return [part for node in (*backwards_of(module), *alone) for part in ast.walk(node) if isinstance(part, ast.Name)]


@cache
def callers() -> dict[tuple[str, str], set[str]]:
    """File and name of each function of files() that backwards call; in which files."""
    held = set(files())
    found: dict[tuple[str, str], set[str]] = {}
    before = -1
    while before != len(found):  # a helper in another file calls helpers there
        before = len(found)
        for module in map(read, files()):
            alone = [node for node in module.tree.body if (module.file, getattr(node, "name", "")) in found]
            inside = [part for node in alone for part in ast.walk(node) if isinstance(part, ast.Name)]
            for name in (*within_backwards(module), *inside):
                f = getattr(module.live, name.id, None)
                refusal = name.id.startswith(REFUSALS)
                if inspect.isfunction(f) and f.__name__ == name.id and file_of(f) in held and not refusal:
                    found.setdefault((file_of(f), name.id), set()).add(module.file)
    return found


@cache
def chain(file: str, owner: str) -> tuple[tuple[str, str], ...]:
    """A function that backwards call, and those by which they reach it: file and name, it first."""
    found = [(file, owner)]
    for where, name in found:  # grows while it is walked
        real = getattr(live(where), name)
        for one in callers():
            (top,) = (node for node in read(one[0]).tree.body if getattr(node, "name", "") == one[1])
            mentions = (getattr(live(one[0]), part.id, None) for part in ast.walk(top) if isinstance(part, ast.Name))
            if one not in found and any(f is real for f in mentions):
                found.append(one)
    return tuple(found)


def file_of(f: Any) -> str:
    """The file of a function, below fnbp; "" of one that is not of the library."""
    package, _, rest = f.__module__.partition(".")
    return rest.replace(".", "/") + ".py" if package == "fnbp" else ""


def scope_at(site: Site, top: Any, module: Module, line: int) -> Scope:
    """What can be named at a line: arrays of the function, numbers of the constructor, functions of the module."""
    arguments = [a.arg for a in site.function.args.args if a.arg not in NO_ARRAYS]
    assigned = [
        part.id
        for node in ast.walk(site.function)
        if isinstance(node, ast.Assign) and node.lineno < line
        for part in ast.walk(node.targets[0])
        if isinstance(part, ast.Name) and part.id not in NO_ARRAYS
    ]
    numbers = []
    if isinstance(top, ast.FunctionDef):
        defaults = dict(zip([a.arg for a in top.args.args][::-1], top.args.defaults[::-1], strict=False))
        numbers = [
            name for name, d in defaults.items() if isinstance(d, ast.Constant) and type(d.value) in (int, float)
        ]
    return Scope(tuple(dict.fromkeys(arguments + assigned)), tuple(numbers), module.functions)
