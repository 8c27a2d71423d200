"""What can go wrong in one expression of a backward: for a node of its syntax tree, the expressions to put there."""

import ast
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

SWAPPED_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.Mult),
    ast.Mult: (ast.Add, ast.Div),
    ast.Div: (ast.Mult, ast.Sub),
    ast.Pow: (ast.Mult, ast.Add),
    ast.MatMult: (ast.Mult,),
}
SWAPPED_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Gt: (ast.GtE, ast.Lt, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt, ast.LtE),
    ast.Lt: (ast.LtE, ast.Gt, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt, ast.GtE),
    ast.Eq: (ast.NotEq, ast.GtE, ast.LtE),
    ast.NotEq: (ast.Eq, ast.Gt, ast.Lt),
}
SWAPPED_FUNCTIONS = {
    "exp": ("jnp.expm1", "jnp.exp2"),
    "expm1": ("jnp.exp",),
    "sigmoid": ("jnp.tanh", "jax.nn.softplus"),
    "tanh": ("jax.nn.sigmoid", "jnp.arctan"),
    "softplus": ("jax.nn.relu", "jax.nn.sigmoid"),
    "erfc": ("jax.scipy.special.erf", "jax.nn.sigmoid"),
    "erf": ("jax.scipy.special.erfc", "jnp.tanh"),
    "softmax": ("jax.nn.log_softmax", "jax.nn.sigmoid"),
    "log_softmax": ("jax.nn.softmax",),
    "log": ("jnp.log1p", "jnp.log2"),
    "log1p": ("jnp.log",),
    "sqrt": ("jnp.square", "jnp.cbrt"),
    "rsqrt": ("jnp.sqrt", "jnp.reciprocal"),
    "square": ("jnp.abs", "jnp.sqrt"),
    "sum": ("jnp.mean", "jnp.max"),
    "mean": ("jnp.sum", "jnp.max"),
    "var": ("jnp.std", "jnp.mean"),
    "std": ("jnp.var",),
    "max": ("jnp.min", "jnp.sum"),
    "maximum": ("jnp.minimum", "jnp.add"),
    "minimum": ("jnp.maximum", "jnp.add"),
    "sin": ("jnp.cos",),
    "cos": ("jnp.sin",),
    "abs": ("jnp.square",),
    "sign": ("jnp.abs",),
    "zeros_like": ("jnp.ones_like",),
    "ones_like": ("jnp.zeros_like",),
    "argmax": ("jnp.argmin",),
    "cumsum": ("jnp.cumprod",),
}
SWAPPED_METHODS = {
    "add": ("set", "multiply"),
    "set": ("add",),
    "multiply": ("add",),
    "sum": ("mean", "max"),
    "mean": ("sum",),
}
SAME_SHAPE = {  # f(a, ...) has the shape of a, so a can stand in its place
    *("exp", "expm1", "sigmoid", "tanh", "softplus", "erf", "erfc", "softmax", "log_softmax", "log", "log1p", "sqrt"),
    *("rsqrt", "square", "abs", "sign", "clip", "wide", "reversed", "flip", "stop_gradient", "cos", "sin", "roll"),
    *("nan_to_num", "conj", "where"),
}
OF_SECOND = {"share", "kept"}  # f(which, a) has the shape of a
REDUCTIONS = {"sum", "mean", "max", "min", "var", "std", "softmax", "log_softmax", "prod", "cumsum", "logsumexp"}
TERMS = (ast.Add, ast.Sub)
NO_ARRAYS = {"self", "params", "res", "state", "ctx", "key", "name", "factors", "parts"}


class Scope(NamedTuple):
    """What an expression can name: arrays to be taken for one another, numbers of the constructor, helpers."""

    arrays: tuple[str, ...]
    numbers: tuple[str, ...]
    helpers: tuple[str, ...]


class Change(NamedTuple):
    """A mistake: of which class, and what stands in place of the node."""

    kind: str
    new: ast.expr


def changes(node: ast.expr, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Every mistake that this node can be given."""
    yield from signs(node, parent)
    for kind, of in TABLE.items():
        if isinstance(node, kind):
            yield from of(node, parent, scope)


def parsed(text: str) -> ast.expr:
    """The tree of an expression."""
    return ast.parse(text, mode="eval").body


def number(value: float) -> ast.expr:
    """The tree of a number."""
    return parsed(repr(value))


def negative(node: ast.expr) -> ast.expr:
    """The tree of minus a node."""
    return ast.UnaryOp(ast.USub(), node)


def is_number(node: ast.AST) -> bool:
    """True for 2 and -2, not for True."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def called(node: ast.AST) -> str:
    """The last name of the function of a call, "sum" of jnp.sum; "" if the node is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def is_method(node: ast.Call) -> bool:
    """True for x.sum(), False for jnp.sum(x)."""
    return isinstance(node.func, ast.Attribute) and ast.unparse(node.func).split(".")[0] not in (
        "jnp",
        "jax",
        "np",
        "math",
    )


def signs(node: ast.expr, parent: ast.AST) -> Iterator[Change]:
    """The sign of a term, and of an argument."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not is_number(node):
            yield Change("sign", node.operand)
        return
    term = isinstance(parent, ast.BinOp) and isinstance(parent.op, TERMS)
    argument = called(parent) in SAME_SHAPE | {"sum"} and isinstance(parent, ast.Call) and parent.args[:1] == [node]
    if (term or argument) and not isinstance(node, (ast.Starred, ast.Compare, ast.Constant)):
        yield Change("sign", negative(node))


def arithmetic(node: ast.BinOp, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Another operator; one side of it dropped; the sides swapped."""
    a, b = node.left, node.right
    for op in SWAPPED_OPERATORS.get(type(node.op), ()):
        yield Change("operator", ast.BinOp(a, op(), b))
    if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.Pow)):
        yield Change("operator", ast.BinOp(b, node.op, a))
    yield Change("dropped", a)
    if isinstance(node.op, ast.Sub):
        yield Change("dropped", negative(b))
    elif isinstance(node.op, ast.Div):
        yield Change("dropped", ast.BinOp(number(1), ast.Div(), b))
    elif not isinstance(node.op, ast.Pow):
        yield Change("dropped", b)


def sign_dropped(node: ast.UnaryOp, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """A negative number, such as an axis: the next ones, and 0."""
    if is_number(node) and isinstance(node.operand, ast.Constant):
        value: Any = node.operand.value
        kind = "axis" if called(parent) in REDUCTIONS or isinstance(parent, ast.keyword) else "constant"
        for other in dict.fromkeys((0, -value - 1, value)):
            yield Change(kind, number(other))
    elif isinstance(node.op, (ast.Not, ast.Invert)):
        yield Change("branch", node.operand)


def constants(node: ast.Constant, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Another number; one a little off; the other truth; other subscripts of an einsum."""
    value: object = node.value
    if isinstance(value, bool):
        yield Change("axis", ast.Constant(not value))
    elif isinstance(value, str) and called(parent) == "einsum":
        yield from (Change("transpose", ast.Constant(other)) for other in subscripts(value))
    elif isinstance(value, (int, float)) and not isinstance(parent, ast.UnaryOp):
        kind = "axis" if called(parent) in REDUCTIONS else "constant"
        whole = (value + 1, value - 1) if isinstance(value, int) else (value * 2, -value)
        for other in whole:
            yield Change(kind, number(other))
        in_formula = isinstance(parent, ast.BinOp) or called(parent) in ("sqrt", "exp", "log", "where")
        if in_formula and value:
            yield Change(kind, number(round(value * 1.001, 12)))
            yield Change(kind, number(round(value * (1 + 1e-6), 14)))
        elif in_formula:
            yield Change(kind, number(1e-4))


def subscripts(text: str) -> list[str]:
    """Subscripts of an einsum with a mistake in them."""
    left, _, right = text.partition("->")
    letters = right.replace("...", "")
    found = [
        f"{','.join(reversed(left.split(',')))}->{right}",
        f"{left}->{right.replace(letters, letters[::-1])}",
        text.replace("...", ""),
    ]
    for a, b in combinations(sorted(set(left) - set(".,")), 2):
        found.append(f"{left.translate(str.maketrans(a + b, b + a))}->{right}")
    for letter in letters:
        found.append(f"{left}->{right.replace(letter, '')}")
    return [other for other in dict.fromkeys(found) if other != text]


def comparisons(node: ast.Compare, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Another comparison."""
    for op in SWAPPED_COMPARISONS.get(type(node.ops[0]), ()):
        yield Change("comparison", ast.Compare(node.left, [op(), *node.ops[1:]], node.comparators))


def calls(node: ast.Call, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Another function; only its argument; its arguments swapped or dropped."""
    name, method = called(node), is_method(node)
    if method:
        for other in SWAPPED_METHODS.get(name, ()):
            func = ast.Attribute(node.func.value, other, ast.Load())  # type: ignore[attr-defined]
            yield Change("function", ast.Call(func, node.args, node.keywords))
        if name in ("astype", "clip"):
            yield Change("precision" if name == "astype" else "dropped", node.func.value)  # type: ignore[attr-defined]
    else:
        for other in SWAPPED_FUNCTIONS.get(name, ()):
            kind = "reduction" if name in REDUCTIONS and name not in ("softmax", "log_softmax") else "function"
            yield Change(kind, ast.Call(parsed(other), node.args, node.keywords))
    yield from arguments(node, name, method, scope)


def arguments(node: ast.Call, name: str, method: bool, scope: Scope) -> Iterator[Change]:
    """Mistakes in what a function is given."""
    args, keywords = node.args, node.keywords
    if args and not method and not isinstance(args[0], ast.Starred):
        if name == "wide":
            yield Change("precision", args[0])
        elif (name in SAME_SHAPE and name != "where") or (name in scope.helpers and len(args) == 1):
            yield Change("dropped", args[0])
        elif name in OF_SECOND:
            yield Change("dropped", args[1])
    if name == "where" and len(args) == 3:
        yield Change("branch", ast.Call(node.func, [args[0], args[2], args[1]], keywords))
        yield Change("branch", args[1])
        yield Change("branch", args[2])
    if name == "range":
        below = ast.BinOp(args[-1], ast.Sub(), number(1))
        yield Change("index", ast.Call(node.func, [*args[:-1], below], keywords))
        if len(args) == 1:
            yield Change("index", ast.Call(node.func, [number(1), *args], keywords))
    if name in REDUCTIONS and len(args) > 1:
        yield Change("axis", ast.Call(node.func, args[:1], keywords))
    if name == "einsum" and len(args) == 3:
        yield Change("name", ast.Call(node.func, [args[0], args[2], args[1]], keywords))
    for i, _ in enumerate(keywords):
        yield Change("axis", ast.Call(node.func, args, keywords[:i] + keywords[i + 1 :]))


def attributes(node: ast.Attribute, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """A transpose dropped; of a factor, the other half."""
    if node.attr in ("T", "mT"):
        yield Change("transpose", node.value)
    if isinstance(node.value, ast.Name) and node.value.id == "self" and not isinstance(parent, ast.Attribute):
        for other in {"d", "x"} - {node.attr} if node.attr in ("d", "x") else ():
            yield Change("name", ast.Attribute(node.value, other, ast.Load()))
        yield Change("transpose", parsed(f"self.{node.attr}.T"))


def indices(node: ast.Subscript, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """A transpose too many; the neighbour's entry; a slice off by one."""
    value, index = node.value, node.slice
    if isinstance(index, ast.Constant) and isinstance(index.value, str):
        yield Change("transpose", ast.Attribute(node, "T", ast.Load()))
    if isinstance(index, ast.Name):
        yield Change("index", ast.Subscript(value, number(0), ast.Load()))
        yield Change("index", ast.Subscript(value, ast.BinOp(index, ast.Sub(), number(1)), ast.Load()))
        yield Change("index", ast.Subscript(value, parsed(f"-1 - {index.id}"), ast.Load()))
    if isinstance(index, ast.Slice):
        yield Change("index", value)


def names(node: ast.Name, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Another array in scope; a number of the constructor that is off, or left out."""
    if node.id in scope.arrays:
        for other in scope.arrays:
            if other != node.id:
                yield Change("name", ast.Name(other, ast.Load()))
    if node.id in scope.numbers:
        yield Change("constant", number(1))
        yield Change("constant", ast.BinOp(number(1.001), ast.Mult(), node))
        yield Change("sign", negative(node))


def dicts(node: ast.Dict, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Two entries swapped; one left out; one under another name."""
    keys, values = node.keys, node.values
    for i, j in combinations(range(len(values)), 2):
        order = list(values)
        order[i], order[j] = order[j], order[i]
        yield Change("entry", ast.Dict(keys, order))
        same = list(values)
        same[j] = values[i]
        yield Change("entry", ast.Dict(keys, same))
    for i in range(len(values)):
        yield Change("entry", ast.Dict(keys[:i] + keys[i + 1 :], values[:i] + values[i + 1 :]))


def tuples(node: ast.Tuple, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """Two entries swapped."""
    if isinstance(parent, ast.Subscript):
        return
    for i, j in combinations(range(len(node.elts)), 2):
        order = list(node.elts)
        order[i], order[j] = order[j], order[i]
        yield Change("entry", ast.Tuple(order, ast.Load()))


def choices(node: ast.IfExp, parent: ast.AST, scope: Scope) -> Iterator[Change]:
    """The other branch; always one of them."""
    yield Change("branch", ast.IfExp(node.test, node.orelse, node.body))
    yield Change("branch", node.body)
    yield Change("branch", node.orelse)


TABLE = {
    ast.BinOp: arithmetic,
    ast.UnaryOp: sign_dropped,
    ast.Constant: constants,
    ast.Compare: comparisons,
    ast.Call: calls,
    ast.Attribute: attributes,
    ast.Subscript: indices,
    ast.Name: names,
    ast.Dict: dicts,
    ast.Tuple: tuples,
    ast.IfExp: choices,
}
