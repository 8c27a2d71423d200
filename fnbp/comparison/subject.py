"""The subject of a comparison: one function with two backwards, by itself, at one place."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.comparison.numerics import is_floating
from fnbp.contraction import contracted, total
from fnbp.layer import Context, Layer, map_layers, rebuilt
from fnbp.losses.loss import Loss, losses_of


@dataclass(frozen=True)
class Subject:
    """A function of args, its manual backward, and the function that jax.vjp is to differentiate beside it.

    forward, reference  (args, fixed) -> y; the same function, except for a custom_vjp and its plain twin
    manual              (args, fixed, dy) -> a tree as args
    args, fixed, dy     the given point; fixed is not differentiated; a dy of None is drawn
    names               of args; "" for params, whose leaves bear only their own names
    take                (args, fixed, f) -> args, fixed with f applied to every array that has a batch axis; or None
    layer               the Layer, which can be given other sizes, or None
    """

    path: str
    forward: Callable[[tuple, Any], Any]
    reference: Callable[[tuple, Any], Any]
    manual: Callable[[tuple, Any, Any], Any]
    args: tuple
    fixed: Any
    dy: Any
    names: tuple[str, ...]
    take: Callable[[tuple, Any, Callable], tuple] | None = None
    layer: Layer | None = None
    conforms: tuple[str, ...] = field(default=())  # args whose cotangents may be wider than they are

    @property
    def kind(self) -> Any:
        """A key that is equal for two layers of the same code with the same options; a function equals only itself."""
        if self.layer is None:
            return id(self)
        ranks = tuple(jnp.ndim(leaf) for leaf in jax.tree.leaves(self.args))
        return self.layer.name, fingerprint(self.layer.forward), fingerprint(self.layer.backward), ranks

    def automatic(self, args: tuple, fixed: Any, dy: Any) -> tuple:
        """The cotangents of args by jax.vjp."""
        _, pull = jax.vjp(lambda *args: self.reference(args, fixed), *args)
        return pull(dy)


def fingerprint(f: Any, depth: int = 8) -> Any:
    """The code of a function with all that it closes over: two functions of equal fingerprint do the same."""
    if not inspect.isfunction(f):
        return f if isinstance(f, (int, float, str, bool, type(None))) else id(f)
    if not depth:
        return id(f)
    cells = [cell.cell_contents for cell in f.__closure__ or ()]
    return f.__code__, tuple(fingerprint(cell, depth - 1) for cell in cells), f.__defaults__ and id(f.__defaults__)


def differentiated(layer: Layer) -> Layer:
    """Give layer the backward of jax.vjp, at the params and the residuals that it is given, right or wrong."""

    def forward(params, state, x, ctx):
        y, new_state, _ = layer.forward(params, state, x, ctx)
        return y, new_state, (state, x, ctx)

    def backward(params, res, dy):
        state, x, ctx = res
        _, pull = jax.vjp(lambda params, x: layer.forward(params, state, x, ctx)[0], params, x)
        return pull(dy)

    return Layer(layer.init, forward, backward, layer.name, traits=layer.traits)


def subject_of_layer(path: str, layer: Layer, args: tuple, fixed: tuple, dy: Any = None) -> Subject:
    """Make a subject of a layer. The parts of a combinator are differentiated by jax.vjp, so that they are right."""
    parts = tuple(differentiated(part) for part in layer.parts)
    alone = rebuilt(layer, parts) if layer.rebuild else layer
    finished = map_layers(contracted(total), alone)

    def forward(args, fixed):
        return layer.forward(args[0], fixed[0], args[1], fixed[1])[0]

    def manual(args, fixed, dy):
        _, _, res = finished.forward(args[0], fixed[0], args[1], fixed[1])
        return finished.backward(args[0], res, dy)

    def take(args, fixed, f):
        params, x = args
        state, ctx = fixed
        mask = None if ctx.mask is None else jax.tree.map(f, ctx.mask)
        return (params, jax.tree.map(f, x)), (state, Context(ctx.key, mask, ctx.train))

    return Subject(path, forward, forward, manual, args, fixed, dy, ("", "x"), take, layer, conforms=("",))


def subject_of_loss(loss: Loss, prediction: Any, y: Any, mask: Any) -> Subject:
    """Make a subject of a loss: the sum of the examples' losses."""

    def forward(args, fixed):
        return jnp.sum(losses_of(loss, args[0], *fixed)[0])

    def manual(args, fixed, dy):
        _, res = losses_of(loss, args[0], *fixed)
        return (jax.tree.map(lambda d: (dy * d).astype(d.dtype), loss.backward(res)),)

    def take(args, fixed, f):
        return jax.tree.map(f, args), jax.tree.map(f, fixed)

    return Subject(loss.name, forward, forward, manual, (prediction,), (y, mask), None, ("prediction",), take)


def subject_of_function(f: Callable, args: tuple, reference: Callable | None, vjp: Callable | None) -> Subject:
    """Make a subject of a function with its vjp written by hand, or of a custom_vjp beside a plain reference."""

    def forward(args, fixed):
        return f(*args)

    def manual(args, fixed, dy):
        if vjp is not None:
            return vjp(args, dy)
        return jax.vjp(f, *args)[1](dy)

    def plain(args, fixed):
        return (reference or f)(*args)

    name = getattr(f, "__name__", type(f).__name__)
    return Subject(name, forward, plain, manual, args, (), None, names_of(f, len(args)))


def names_of(f: Callable, n: int) -> tuple[str, ...]:
    """The names of the first n positional arguments of f."""
    try:
        found = [p.name for p in inspect.signature(f).parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    except (TypeError, ValueError):
        found = []
    return tuple(found[:n]) + tuple(f"args[{i}]" for i in range(len(found), n))


class Mismatch(NamedTuple):
    """A cotangent whose tree, shape or dtype is not that of its argument; both in words.

    transposed   its shape is that of the argument, reversed
    """

    leaf: str
    shape: tuple[int, ...]
    got: str
    expected: str
    transposed: bool = False


def leaf_names(subject: Subject) -> list[tuple[str, str]]:
    """The names (argument, leaf) of every leaf of args, in the order of jax.tree.leaves."""
    found = []
    for name, arg in zip(subject.names, subject.args, strict=True):
        for where, _ in jax.tree_util.tree_leaves_with_path(arg):
            inside = jax.tree_util.keystr(where, simple=True, separator=".")
            found.append((name, ".".join(part for part in (name, inside) if part)))
    return found


def flatten(subject: Subject, args: tuple, cotangents: Any) -> tuple[dict[str, Any], list[Mismatch]]:
    """The cotangents of the floating leaves of args, by name, and those that do not match their argument."""
    arrays: dict[str, Any] = {}
    wrong: list[Mismatch] = []
    if not isinstance(cotangents, (tuple, list)) or len(cotangents) != len(args):
        got = type(cotangents).__name__ if not hasattr(cotangents, "shape") else "an array"
        got = f"a tuple of {len(cotangents)}" if isinstance(cotangents, (tuple, list)) else got
        return {}, [Mismatch(", ".join(n or "params" for n in subject.names), (), got, f"a tuple of {len(args)}")]
    for name, arg, cotangent in zip(subject.names, args, cotangents, strict=True):
        entries, tree = jax.tree_util.tree_flatten_with_path(arg)
        try:
            flat = tree.flatten_up_to(cotangent) if cotangent is not None else [None] * len(entries)
        except ValueError:
            wrong.append(Mismatch(name or "params", (), tree_text(jax.tree.structure(cotangent)), tree_text(tree)))
            continue
        for (where, a), d in zip(entries, flat, strict=True):
            leaf = ".".join(part for part in (name, jax.tree_util.keystr(where, simple=True, separator=".")) if part)
            if not is_floating(a):
                continue
            d = jnp.zeros_like(a) if d is None else d
            problem = mismatch(leaf, a, d, wider=name in subject.conforms)
            if problem:
                wrong.append(problem)
            else:
                arrays[leaf] = d
    return arrays, wrong


def tree_text(tree: Any) -> str:
    """A tree as Python writes it: {'W': *, 'b': *}."""
    return str(tree).removeprefix("PyTreeDef(").removesuffix(")")


def mismatch(leaf: str, a: Any, d: Any, wider: bool) -> Mismatch | None:
    """What is wrong with the shape or dtype of d, a cotangent of a; None if nothing is.

    wider: a floating dtype of more bits is accepted.
    """
    expected = f"{a.dtype}{list(a.shape)}"
    if not hasattr(d, "dtype") or not hasattr(d, "shape"):
        return Mismatch(leaf, a.shape, type(d).__name__, expected)
    if d.shape != a.shape:
        return Mismatch(leaf, a.shape, f"{d.dtype}{list(d.shape)}", expected, d.shape == a.shape[::-1])
    if d.dtype != a.dtype and not (wider and is_floating(d) and d.dtype.itemsize > a.dtype.itemsize):
        return Mismatch(leaf, a.shape, f"{d.dtype}{list(d.shape)}", expected)
    return None
