"""The subject of a comparison: one function with two backwards, by itself, at one place."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.code import computes_narrow, equations, has_narrow_constant, jaxpr_of, numbers_in, rules_in
from fnbp.comparison.numerics import arithmetic, in_dtype, is_complex, is_inexact
from fnbp.contraction import contracted
from fnbp.contractions import total
from fnbp.layer import Context, Layer, drawing, map_layers, rebuilt
from fnbp.losses.loss import Loss, losses_of


@dataclass(frozen=True)
class Subject:
    """A function of args, its manual backward, and the function that jax.vjp is to differentiate beside it.

    forward, reference  (args, fixed) -> y; the same function, except for a custom_vjp and its plain twin
    differentiate       (args, fixed) -> y, pull: the forward as it runs before a backward; pull(dy) -> a tree as args
    args, fixed, dy     the given point; fixed is not differentiated; a dy of None is drawn
    names               of args; "" for params, whose leaves bear only their own names
    take                (args, fixed, f) -> args, fixed with f applied to every array that has a batch axis; or None
    layer               the Layer, which can be given other sizes, or None
    conforms            args whose cotangents may be wider than they are
    sizes               n -> args of that size, for a function whose batch nobody else knows; or None
    domain              args -> True where the function is defined; or None
    """

    path: str
    forward: Callable[[tuple, Any], Any]
    reference: Callable[[tuple, Any], Any]
    differentiate: Callable[[tuple, Any], tuple[Any, Callable[[Any], Any]]]
    args: tuple
    fixed: Any
    dy: Any
    names: tuple[str, ...]
    take: Callable[[tuple, Any, Callable], tuple] | None = None
    layer: Layer | None = None
    conforms: tuple[str, ...] = field(default=())
    sizes: Callable[[int], tuple] | None = None
    domain: Callable[..., Any] | None = None

    @cached_property
    def kind(self) -> Any:
        """A key that is equal for two layers of the same code with the same options; a function equals only itself."""
        if self.layer is None:
            return id(self)
        ranks = tuple(jnp.ndim(leaf) for leaf in jax.tree.leaves(self.args))
        return self.layer.name, fingerprint(self.layer.forward), fingerprint(self.layer.backward), ranks

    def manual(self, args: tuple, fixed: Any, dy: Any) -> Any:
        """The cotangents of args by the backward that is under test."""
        y, pull = self.differentiate(args, fixed)
        return pull(as_output(dy, y))

    def automatic(self, args: tuple, fixed: Any, dy: Any) -> tuple:
        """The cotangents of args by jax.vjp."""
        y, pull = jax.vjp(lambda *args: self.reference(args, fixed), *args)
        return pull(as_output(dy, y))

    def shape_at(self, args: tuple, fixed: Any) -> Any:
        """Shape and dtype of what the reference returns there."""
        key = str(jax.tree.map(lambda a: (np.shape(a), str(getattr(a, "dtype", a))), (args, fixed)))
        if key not in self.shapes:
            self.shapes[key] = jax.eval_shape(self.reference, args, fixed)
        return self.shapes[key]

    @cached_property
    def shapes(self) -> dict[str, Any]:
        """What shape_at has found."""
        return {}

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """The numbers that stand in the code of the manual backward and of the reference."""
        y = self.shape_at(self.args, self.fixed)
        dy = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype if is_inexact(a) else jax.dtypes.float0), y)
        manual = jaxpr_of(partial(self.manual, dy=dy), self.args, self.fixed)
        return numbers_in(manual, jaxpr_of(self.reference, self.args, self.fixed))

    @cached_property
    def is_narrow(self) -> bool:
        """True if the code of the reference, given float64, computes numbers of fewer bits; or if nobody can tell."""
        with arithmetic(np.float64):
            return computes_narrow(jaxpr_of(self.reference, *in_dtype((self.args, self.fixed), np.float64)))

    @cached_property
    def has_narrow_constant(self) -> bool:
        """True if the code of the reference holds a constant that was rounded to float32."""
        with arithmetic(np.float64):
            return has_narrow_constant(jaxpr_of(self.reference, *in_dtype((self.args, self.fixed), np.float64)))

    @property
    def is_loss(self) -> bool:
        """True for a Loss, whose backward is that of the sum of the losses: it is given no cotangent."""
        return self.layer is None and self.names == ("prediction",) and isinstance(self.fixed, tuple)

    @cached_property
    def joins(self) -> bool:
        """True for a combinator of fnbp, which only joins what its parts do: they are tried in full, it is not."""
        layer = self.layer
        return layer is not None and bool(layer.parts) and getattr(layer.rebuild, "__module__", "").startswith("fnbp.")

    @cached_property
    def draws(self) -> bool:
        """True if the reference draws random numbers, in training at least: they differ from dtype to dtype."""
        if self.layer is not None and drawing(self.layer):
            return True
        names = {e.primitive.name for e in equations(jaxpr_of(self.reference, self.args, self.fixed))}
        return any(name.startswith(("random_", "threefry")) for name in names)

    @cached_property
    def rules(self) -> set[str]:
        """What the reference holds whose slope autodiff is told: "stop_gradient", and rules of its own."""
        return rules_in(jaxpr_of(self.reference, self.args, self.fixed))


def as_output(dy: Any, y: Any) -> Any:
    """A cotangent in the dtype of an output that is cast to half precision, whatever comes in."""

    def one(d, a):
        narrow = is_inexact(d) and is_inexact(a) and a.dtype.itemsize == 2 < d.dtype.itemsize
        return jnp.asarray(d, a.dtype) if narrow else d

    return jax.tree.map(one, dy, y)


PLAIN = (int, float, complex, str, bytes, bool, type(None), np.dtype, type)


def fingerprint(f: Any, depth: int = 8) -> Any:
    """All that a function does is told by: its code, what it closes over, its defaults, and the globals that it names.

    Two functions of equal fingerprint do the same. What has no known content is equal only to itself.
    """
    if isinstance(f, PLAIN):
        return type(f).__name__, f
    if not depth:
        return id(f)
    inside = partial(fingerprint, depth=depth - 1)
    if isinstance(f, (tuple, list)):
        return type(f).__name__, tuple(map(inside, f))
    if isinstance(f, dict):
        return "dict", tuple((key, inside(value)) for key, value in f.items())
    if isinstance(f, partial):
        return "partial", inside(f.func), inside(f.args), inside(f.keywords)
    if not inspect.isfunction(f):
        return id(f)
    cells = tuple(inside(cell.cell_contents) for cell in f.__closure__ or ())
    defaults = inside(f.__defaults__), inside(f.__kwdefaults__)
    known = {name: f.__globals__[name] for name in names_in(f.__code__) if name in f.__globals__}
    named = {name: value for name, value in known.items() if not inspect.ismodule(value)}
    return f.__code__, cells, defaults, tuple((n, v if isinstance(v, PLAIN) else id(v)) for n, v in named.items())


def names_in(code: Any) -> list[str]:
    """The names that a code looks up, those of the functions inside it too."""
    inner = [name for const in code.co_consts if inspect.iscode(const) for name in names_in(const)]
    return [*code.co_names, *inner]


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

    def differentiate(args, fixed):
        y, _, res = finished.forward(args[0], fixed[0], args[1], fixed[1])
        return y, lambda dy: finished.backward(args[0], res, dy)

    def take(args, fixed, f):
        params, x = args
        state, ctx = fixed
        mask = None if ctx.mask is None else jax.tree.map(f, ctx.mask)
        return (params, jax.tree.map(f, x)), (state, Context(ctx.key, mask, ctx.train))

    return Subject(path, forward, forward, differentiate, args, fixed, dy, ("", "x"), take, layer, conforms=("",))


def subject_of_loss(loss: Loss, prediction: Any, y: Any, mask: Any) -> Subject:
    """Make a subject of a loss: the sum of the examples' losses."""

    def forward(args, fixed):
        return jnp.sum(losses_of(loss, args[0], *fixed)[0])

    def differentiate(args, fixed):
        losses, res = losses_of(loss, args[0], *fixed)

        def pull(dy):
            return (jax.tree.map(lambda d: (dy * d).astype(d.dtype), loss.backward(res)),)

        return jnp.sum(losses), pull

    def take(args, fixed, f):
        return jax.tree.map(f, args), jax.tree.map(f, fixed)

    return Subject(loss.name, forward, forward, differentiate, (prediction,), (y, mask), None, ("prediction",), take)


def subject_of_scores(path: str, layer: Layer, loss: Loss, args: tuple, fixed: tuple) -> Subject:
    """Make a subject of a dense layer and a loss that forms its scores by itself, see linear_cross_entropy.

    fixed: state, ctx, y, mask. What jax.vjp differentiates beside it are the layer and the loss of formed scores.
    """
    assert layer.traits.scores is not None and loss.of_scores is not None
    joined, of_scores = map_layers(contracted(total), layer.traits.scores), loss.of_scores

    def forward(args, fixed):
        state, ctx, y, mask = fixed
        return jnp.sum(losses_of(of_scores, joined.forward(args[0], state, args[1], ctx)[0], y, mask)[0])

    def reference(args, fixed):
        state, ctx, y, mask = fixed
        return jnp.sum(losses_of(loss, layer.forward(args[0], state, args[1], ctx)[0], y, mask)[0])

    def differentiate(args, fixed):
        state, ctx, y, mask = fixed
        scores, _, res = joined.forward(args[0], state, args[1], ctx)
        losses, loss_res = losses_of(of_scores, scores, y, mask)

        def pull(dy):
            return joined.backward(args[0], res, jax.tree.map(lambda d: dy * d, of_scores.backward(loss_res)))

        return jnp.sum(losses), pull

    def take(args, fixed, f):
        state, ctx, *data = fixed
        mask = None if ctx.mask is None else jax.tree.map(f, ctx.mask)
        return (args[0], f(args[1])), (state, Context(ctx.key, mask, ctx.train), *jax.tree.map(f, data))

    name = f"{path}, {loss.name}"
    return Subject(name, forward, reference, differentiate, args, fixed, None, ("", "x"), take, conforms=("",))


def subject_of_function(
    name: str,
    f: Callable,
    args: tuple,
    reference: Callable | None,
    vjp: Callable | None,
    sizes: Callable[[int], tuple] | None = None,
    domain: Callable[..., Any] | None = None,
) -> Subject:
    """Make a subject of a function with its vjp written by hand, or of a custom_vjp beside a plain reference."""

    def forward(args, fixed):
        return f(*args)

    def by_hand(args, fixed):
        assert vjp is not None
        return f(*args), partial(vjp, args)

    def by_rule(args, fixed):
        return jax.vjp(f, *args)

    def plain(args, fixed):
        assert reference is not None
        return reference(*args)

    differentiate = by_rule if vjp is None else by_hand
    twin = plain if reference is not None else forward
    return Subject(
        name, forward, twin, differentiate, args, (), None, names_of(f, len(args)), sizes=sizes, domain=domain
    )


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
    """The cotangents of the leaves that are differentiated, by name, and those that do not match their argument.

    Of complex numbers: pairs of real ones, along a new last axis.
    """
    arrays: dict[str, Any] = {}
    wrong: list[Mismatch] = []
    if not isinstance(cotangents, (tuple, list)) or len(cotangents) != len(args):
        got = type(cotangents).__name__ if not hasattr(cotangents, "shape") else "an array"
        got = f"a tuple of {len(cotangents)}" if isinstance(cotangents, (tuple, list)) else got
        return {}, [Mismatch(", ".join(n or "params" for n in subject.names), (), got, f"a tuple of {len(args)}")]
    names = (leaf for _, leaf in leaf_names(subject))
    dtypes = dict(zip(names, (getattr(a, "dtype", None) for a in jax.tree.leaves(subject.args)), strict=True))
    for name, arg, cotangent in zip(subject.names, args, cotangents, strict=True):
        entries, tree = jax.tree_util.tree_flatten_with_path(arg)
        try:
            flat = tree.flatten_up_to(cotangent) if cotangent is not None else [None] * len(entries)
        except ValueError:
            wrong.append(Mismatch(name or "params", (), tree_text(jax.tree.structure(cotangent)), tree_text(tree)))
            continue
        for (where, a), d in zip(entries, flat, strict=True):
            leaf = ".".join(part for part in (name, jax.tree_util.keystr(where, simple=True, separator=".")) if part)
            if not is_inexact(a):
                continue
            d = jnp.zeros_like(a) if d is None else d
            problem = mismatch(leaf, a, d, wider=name in subject.conforms, given=dtypes[leaf])
            if problem:
                wrong.append(problem)
            else:
                arrays[leaf] = jnp.stack([d.real, d.imag], -1) if is_complex(d) else d
    return arrays, wrong


def tree_text(tree: Any) -> str:
    """A tree as Python writes it: {'W': *, 'b': *}."""
    return str(tree).removeprefix("PyTreeDef(").removesuffix(")")


def mismatch(leaf: str, a: Any, d: Any, wider: bool, given: Any) -> Mismatch | None:
    """What is wrong with the shape or dtype of d, a cotangent of a; None if nothing is.

    wider: a dtype of more bits is accepted. given: the dtype of the argument as it was given, which is accepted too:
    float64 was the choice of compare.
    """
    expected = f"{a.dtype}{list(a.shape)}"
    if not hasattr(d, "dtype") or not hasattr(d, "shape"):
        return Mismatch(leaf, a.shape, type(d).__name__, expected)
    if d.shape != a.shape:
        return Mismatch(leaf, a.shape, f"{d.dtype}{list(d.shape)}", expected, d.shape == a.shape[::-1])
    wide_enough = wider and is_inexact(d) and d.dtype.itemsize > a.dtype.itemsize
    if d.dtype not in (a.dtype, given) and not (wide_enough and is_complex(d) == is_complex(a)):
        return Mismatch(leaf, a.shape, f"{d.dtype}{list(d.shape)}", expected)
    return None
