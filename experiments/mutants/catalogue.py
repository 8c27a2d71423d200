"""Mistakes planted in the hand-written backwards: every backward of the library, every mistake of it.

A backward is a function backward* or dloss* inside a constructor (or a lambda that is passed for one), a helper that
backwards call, the total of a Factor, or the tuple that a forward saves. A mutant is the library's own source with one
expression of it replaced.
"""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from experiments.mutants.operators import changes, parsed
from experiments.mutants.sites import Module, Site, files, read, scope_at, sites
from experiments.mutants.spoiling import COTANGENTS, RESULTS, SAVED, TREES

SHORT = 16  # characters: what is so short may stand twice in a line
PASSIVE = ("annotation", "returns", "decorator_list", "targets", "target", "func")


class Mutant(NamedTuple):
    """One mistake: the statement of the module that holds it, as it then reads."""

    id: str
    file: str
    owner: str
    site: str
    kind: str
    statement: int
    code: str
    shared: bool = False  # a helper that is spoilt only for backwards


# --- mistakes ---


def catalogue() -> list[Mutant]:
    """Every mutant of the library, each code once, in the order of the sources."""
    found: dict[tuple, Mutant] = {}
    taken: dict[str, int] = {}
    for module in map(read, files()):
        for site in sites(module):
            top = module.tree.body[site.statement]
            found.setdefault((site.file, site.statement, ast.unparse(top)), None)  # type: ignore[arg-type]
            for kind, what, code in mistakes(site, top, module):
                if (site.file, site.statement, code) in found:
                    continue
                name = f"{site.file}:{site.name}:{kind}: {what}"
                taken[name] = taken.get(name, 0) + 1
                name += f" #{taken[name]}" if taken[name] > 1 else ""
                mutant = Mutant(name, site.file, site.owner, site.name, kind, site.statement, code, site.shared)
                found[site.file, site.statement, code] = mutant
    return [mutant for mutant in found.values() if mutant is not None]


def mistakes(site: Site, top: ast.stmt, module: Module) -> Iterator[tuple[str, str, str]]:
    """Class, words and code of every mistake at a site."""
    of = {"saved": saved, "backward": backward, "total": backward}[site.kind]
    yield from of(site, top, module)


def backward(site: Site, top: ast.stmt, module: Module) -> Iterator[tuple[str, str, str]]:
    """Change each expression of a backward, then each of its results, then its cotangent."""
    for place in list(expressions(site.node)):
        parent, field, index, node, _ = place
        scope = scope_at(site, top, module, node.lineno)
        for kind, new in changes(node, parent, scope):
            words = words_of(place, new)
            with replaced(parent, field, index, new):
                yield kind, words, ast.unparse(top)
        if isinstance(parent, ast.If) and field == "test":
            with replaced(parent, field, index, ast.UnaryOp(ast.Not(), node)):
                yield "branch", f"not {ast.unparse(node)}", ast.unparse(top)
    for label, parent, field, index, node, tree in results(site.node) if returns_array(site) else ():
        for kind, words, text in spoilt(label, scope_at(site, top, module, node.lineno).arrays, tree):
            with replaced(parent, field, index, applied(text, node)):
                yield kind, f"{label}: {words}", ast.unparse(top)
    yield from cotangents(site, top)


def returns_array(site: Site) -> bool:
    """False for a helper that is said to return a number, and for a shared one that is not said to return an array."""
    stated = getattr(site.node, "returns", None)
    said = "" if stated is None else ast.unparse(stated)
    return "Array" in said if site.shared else said not in ("int", "float", "bool", "str")


def spoilt(label: str, arrays: tuple[str, ...], tree: bool) -> Iterator[tuple[str, str, str]]:
    """Class, words and expression of what a result can be made to be."""
    if tree:
        yield from (("factors", words, text) for words, text in TREES)
        return
    yield from ((kind, words, text) for kind, entries in RESULTS.items() for words, text in entries)
    if label in ("dx", "result"):
        for name in arrays:
            yield "stray term", f"a stray 1e-4 {name}", f"c + 1e-4 * {name}"
            yield "name", f"{name} in its place", name


def cotangents(site: Site, top: ast.stmt) -> Iterator[tuple[str, str, str]]:
    """The cotangent spoilt before the formula sees it."""
    if not isinstance(site.node, ast.FunctionDef) or len(site.node.args.args) < 2 or site.name.count(".") != 1:
        return
    name, body = site.node.args.args[-1].arg, site.node.body
    if not site.node.name.startswith("backward"):
        return
    for words, text in COTANGENTS:
        value = applied(text, ast.Name(name, ast.Load()))
        body.insert(0, ast.Assign([ast.Name(name, ast.Store())], value, lineno=site.node.lineno))
        try:
            code = ast.unparse(top)
        finally:
            del body[0]
        yield "cotangent", f"{name} {words}", code


def saved(site: Site, top: ast.stmt, module: Module) -> Iterator[tuple[str, str, str]]:
    """What a forward saves: another array, its expression changed, the array spoilt."""
    whole = site.node.value
    res = whole.elts[-1]
    scope = scope_at(site, top, module, site.node.lineno)
    for place in [Place(whole, "elts", len(whole.elts) - 1, res, res), *expressions(res, res)]:
        for _, new in changes(place.node, place.parent, scope):
            words = words_of(place, new)
            with replaced(place.parent, place.field, place.item, new):
                yield "residual", words, ast.unparse(top)
    if not isinstance(res, ast.Tuple):
        return
    for i, node in enumerate(res.elts):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):  # a[:0] holds nothing to spoil
            continue
        texts = [*SAVED, *((f"{ast.unparse(whole.elts[0])} saved in its place", ast.unparse(whole.elts[0])),)]
        for words, text in texts:
            with replaced(res, "elts", i, applied(text, node)):
                yield "residual", f"{ast.unparse(node)}: {words}", ast.unparse(top)


def applied(text: str, node: ast.expr) -> ast.expr:
    """text as an expression of c, with node for c."""
    return ast.Call(parsed(f"lambda c: {text}"), [node], []) if re.search(r"\bc\b", text) else parsed(text)


# --- what can be changed ---


@contextmanager
def replaced(parent: Any, field: str, index: int | None, new: Any) -> Iterator[None]:
    """The tree with another node at that place, for a while."""
    holder, key = (parent.__dict__, field) if index is None else (getattr(parent, field), index)
    old = holder[key]
    holder[key] = new
    try:
        yield
    finally:
        holder[key] = old


class Place(NamedTuple):
    """An expression in its tree: a field of its parent, within the call or the statement around it."""

    parent: Any
    field: str
    item: int | None
    node: Any
    within: Any


def expressions(node: Any, within: Any = None) -> Iterator[Place]:
    """Every expression below node that computes: not annotations, texts and targets."""
    within = node if isinstance(node, ast.Call) else within
    for parent, field, index, child in children(node):
        if isinstance(child, ast.expr):
            yield Place(parent, field, index, child, within or child)
            yield from expressions(child, within or child)
        else:
            yield from expressions(child, within)


def children(node: Any) -> Iterator[tuple[Any, str, int | None, Any]]:
    """Parent, field, index and node of what stands directly below a node."""
    function = isinstance(node, (ast.FunctionDef, ast.Lambda))
    for field, value in ast.iter_fields(node):
        if field == "func" and isinstance(value, ast.Attribute) and not isinstance(value.value, ast.Name):
            yield value, "value", None, value.value  # what a method is called on
        if field in PASSIVE or (field == "args" and function):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            text = isinstance(child, ast.JoinedStr) or (
                isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            )
            if isinstance(child, (ast.expr, ast.stmt, ast.keyword, ast.Slice)) and not text:
                yield node, field, i, child


def words_of(place: Place, new: ast.expr) -> str:
    """What a change does; of a name, a number, or what is as short, also where."""
    node = place.node
    short = len(ast.unparse(node)) <= SHORT and place.within is not node
    where = f" in {ast.unparse(place.within)}" if short else ""
    return f"{ast.unparse(node)} -> {ast.unparse(new)}{where}"


def results(node: Any) -> Iterator[tuple[str, Any, str, Any, Any, bool]]:
    """Label, parent, field, index, node of every array that a backward returns; tree: it is a tree of factors."""
    if isinstance(node, ast.Lambda):
        yield from returned(node, "body", node.body)
        return
    for part in ast.walk(node):
        if isinstance(part, ast.Return) and part.value is not None:
            yield from returned(part, "value", part.value)


def returned(parent: Any, field: str, value: Any) -> Iterator[tuple[str, Any, str, Any, Any, bool]]:
    """The arrays in what is returned."""
    if not isinstance(value, ast.Tuple):
        yield "result", parent, field, None, value, False
        return
    *factors, _ = value.elts
    for i, entry in enumerate(factors):
        named = factors_in(entry)
        if named is None:
            yield "factors", value, "elts", i, entry, True
            continue
        for key, factor in named:
            if isinstance(factor, ast.Call):
                for j, argument in enumerate(factor.args):
                    yield f"{ast.unparse(factor.func)}[{j}] of {key!r}", factor, "args", j, argument, False
    yield from entries("dx", value, len(value.elts) - 1)


def factors_in(entry: ast.expr) -> list[tuple[str, ast.expr]] | None:
    """The factors by parameter, of {"W": Outer(...), ...} or due(params, W=Outer(...), ...); None of anything else."""
    if isinstance(entry, ast.Dict):
        return [(str(k.value), v) for k, v in zip(entry.keys, entry.values, strict=True) if isinstance(k, ast.Constant)]
    if isinstance(entry, ast.Call) and ast.unparse(entry.func) == "due":
        return [(keyword.arg, keyword.value) for keyword in entry.keywords if keyword.arg is not None]
    return None


def entries(label: str, parent: ast.Tuple, index: int) -> Iterator[tuple[str, Any, str, Any, Any, bool]]:
    """The array in one entry of a tuple, or the arrays where that is a tuple itself."""
    node = parent.elts[index]
    if not isinstance(node, ast.Tuple):
        yield label, parent, "elts", index, node, False
        return
    for i, entry in enumerate(node.elts):
        if not isinstance(entry, ast.Constant):
            yield from entries(f"{label}[{i}]", node, i)
