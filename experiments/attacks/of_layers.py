"""Attacks by factors, parameters, state, sizes, contexts, Python state and transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import fnbp
from experiments.attacks.attack import POSITIVE, SEQUENCE, Attack, X, function, layer, square
from fnbp.comparison.report import Report

# --- factors: the total is right, what is made of one example is not ---


def dense_with(factors: Callable[[Any, Any], dict[str, Any]]) -> fnbp.Layer:
    """A dense layer whose factors are those of (x, dy)."""
    dense = fnbp.dense(5)

    def forward(params, x):
        return x @ params["W"].T + params["b"], (x,)

    def backward(params, res, dy):
        (x,) = res
        return factors(x, dy), dy @ params["W"]

    return fnbp.stateless(lambda key, x: dense.init(key, x)[0], forward, backward, "mine")


def mean_bias(x: Any, dy: Any) -> Any:
    """The bias gets the mean of dy for each example: its total is right."""
    return {"W": fnbp.Outer(dy, x), "b": fnbp.Sum(jnp.broadcast_to(dy.mean(0), dy.shape))}


def rolled_bias(x: Any, dy: Any) -> Any:
    """The bias gets the dy of another example."""
    return {"W": fnbp.Outer(dy, x), "b": fnbp.Sum(jnp.roll(dy, 1, 0))}


def reversed_outer(x: Any, dy: Any) -> Any:
    """The weight gets its examples in another order."""
    return {"W": fnbp.Outer(dy[::-1], x[::-1]), "b": fnbp.Sum(dy)}


@fnbp.register_factor
@dataclass(frozen=True)
class Halved(fnbp.Sum):
    """A Sum whose squared norms are half of what they are."""

    def sq_norms(self):
        return super().sq_norms() / 2

    def scaled(self, c: Any):
        return Halved(super().scaled(c).d)


@fnbp.register_factor
@dataclass(frozen=True)
class Unscaled(fnbp.Sum):
    """A Sum that scales by the mean of the weights."""

    def scaled(self, c: Any):
        return Unscaled(self.d * jnp.mean(c))


FACTORS = (
    layer("factors", "the bias gets the mean of dz for each example", lambda: dense_with(mean_bias), X),
    layer("factors", "examples of the bias in another order", lambda: dense_with(rolled_bias), X),
    layer("factors", "examples of the weight in another order", lambda: dense_with(reversed_outer), X),
    layer(
        "factors",
        "sq_norms of a factor of one's own is half",
        lambda: dense_with(lambda x, dy: {"W": fnbp.Outer(dy, x), "b": Halved(dy)}),
        X,
    ),
    layer(
        "factors",
        "a factor of one's own scales all examples alike",
        lambda: dense_with(lambda x, dy: {"W": fnbp.Outer(dy, x), "b": Unscaled(dy)}),
        X,
    ),
    layer(
        "factors", "right", lambda: dense_with(lambda x, dy: {"W": fnbp.Outer(dy, x), "b": fnbp.Sum(dy)}), X, right=True
    ),
)


# --- values of parameters and state ---


def scale_layer(change: Callable[[Any], Any]) -> fnbp.Layer:
    """y = gamma x, whose dx uses a changed gamma."""

    def init(key, x):
        return {"gamma": jnp.ones(x.shape[-1])}

    def forward(params, x):
        return params["gamma"] * x, (x,)

    def backward(params, res, dy):
        (x,) = res
        return {"gamma": fnbp.Product(dy, x)}, dy * change(params["gamma"])

    return fnbp.stateless(init, forward, backward, "scale")


def shifted_by_state(change: Callable[[Any], Any]) -> fnbp.Layer:
    """y = x s with s in the state."""

    def init(key, x):
        return {}, {"s": 1.5 * jnp.ones(x.shape[-1])}

    def forward(params, state, x, ctx):
        return x * state["s"], state, (state["s"],)

    def backward(params, res, dy):
        return {}, dy * change(res[0])

    return fnbp.Layer(init, forward, backward, "by_state", traits=fnbp.Traits(mask=lambda name, x, mask: mask))


def pair(x: Any, w: Any) -> Any:
    """y = x w"""
    return x * w


PARAMETERS = (
    layer("params", "abs(gamma)", lambda: scale_layer(jnp.abs), X),
    layer("params", "gamma no larger than 10", lambda: scale_layer(lambda g: jnp.minimum(g, 10)), X),
    layer("params", "1 where gamma is 0", lambda: scale_layer(lambda g: jnp.where(g == 0, 1, g)), X),
    layer(
        "params", "wrong if all of gamma is 1", lambda: scale_layer(lambda g: jnp.where(jnp.all(g == 1), 2 * g, g)), X
    ),
    layer("params", "gamma no smaller than 1e-2", lambda: scale_layer(lambda g: jnp.where(abs(g) < 1e-2, 1e-2, g)), X),
    layer("state", "abs(s)", lambda: shifted_by_state(jnp.abs), X),
    layer("state", "s no larger than 10", lambda: shifted_by_state(lambda s: jnp.minimum(s, 10)), X),
    layer("state", "1 where s is 0", lambda: shifted_by_state(lambda s: jnp.where(s == 0, 1, s)), X),
    function("arguments", "abs(w)", pair, lambda a, dy: (dy * abs(a[1]), dy * a[0]), X, POSITIVE),
    function("arguments", "w no larger than 20", pair, lambda a, dy: (dy * jnp.minimum(a[1], 20), dy * a[0]), X, X + 1),
    function(
        "arguments",
        "wrong where x is 0 and w is not",
        pair,
        lambda a, dy: (dy * a[1], dy * jnp.where(jnp.all(a[0] == 0), 1, a[0])),
        X,
        X + 1,
    ),
    layer("params", "right", lambda: scale_layer(lambda g: g), X, right=True),
    layer("state", "right", lambda: shifted_by_state(lambda s: s), X, right=True),
)


# --- sizes ---


def sum_rows(x: Any) -> Any:
    """y = sum of x^2 over each row"""
    return jnp.sum(x**2, 1)


def wrong_at(bad: Callable[[int], bool]) -> Any:
    """The backward of a row's sum of squares, doubled where the number of rows is bad."""
    return lambda args, dy: (2 * args[0] * dy[:, None] * (2 if bad(len(args[0])) else 1),)


def grown(n: int) -> tuple:
    """Arguments of n rows."""
    return (np.resize(X, (n, 11)),)


def sized_layer(axis: int, bad: Callable[[int], bool]) -> fnbp.Layer:
    """y = x^2, doubled where that axis has a bad size."""

    def backward(params, res, dy):
        (x,) = res
        return {}, 2 * x * dy * (2 if bad(x.shape[axis]) else 1)

    return fnbp.stateless(lambda key, x: {}, lambda params, x: (x**2, (x,)), backward, "square")


def scale_layer_at(bad: Callable[[int], bool]) -> fnbp.Layer:
    """y = gamma x, doubled backwards where the number of features is bad."""
    right = scale_layer(lambda g: g)

    def backward(params, res, dy):
        factors, dx = right.backward(params, res, dy)
        return factors, dx * (2 if bad(dx.shape[-1]) else 1)

    return fnbp.replace_functions(right, backward=backward)


SIZES = (
    function("sizes", "even batches", sum_rows, wrong_at(lambda n: n % 2 == 0), X, sizes=grown),
    function("sizes", "a batch of 2", sum_rows, wrong_at(lambda n: n == 2), X, sizes=grown),
    function("sizes", "more than 64 examples", sum_rows, wrong_at(lambda n: n > 64), X, sizes=grown),
    layer("sizes", "an even batch of a layer", lambda: sized_layer(0, lambda n: n % 2 == 0), X),
    layer("sizes", "more than 64 examples of a layer", lambda: sized_layer(0, lambda n: n > 64), X),
    layer("sizes", "more than 128 examples of a layer", lambda: sized_layer(0, lambda n: n > 128), X),
    layer("sizes", "more than 128 positions of a layer", lambda: sized_layer(1, lambda n: n > 128), SEQUENCE),
    layer("sizes", "an even number of features", lambda: scale_layer_at(lambda n: n % 2 == 0), X),
    layer("sizes", "more than 128 features", lambda: scale_layer_at(lambda n: n > 128), X),
    layer("sizes", "2 positions of a layer", lambda: sized_layer(1, lambda n: n == 2), SEQUENCE),
    function("sizes", "right", sum_rows, wrong_at(lambda n: False), X, sizes=grown, right=True),
)


# --- the context of a layer ---


def reacting(backward_factor: Callable[[Any], Any]) -> fnbp.Layer:
    """y = x at inference and 3 x in training, and 0 where a mask hides a position."""

    def forward(params, state, x, ctx):
        c = 3.0 if ctx.train else 1.0
        c = c if ctx.mask is None else c * ctx.mask[..., None]
        return x * c, state, (c, fnbp.Context(train=ctx.train, mask=ctx.mask).train, ctx.mask)

    def backward(params, res, dy):
        c, train, mask = res
        return {}, dy * backward_factor((c, train, mask))

    return fnbp.Layer(
        lambda key, x: ({}, {}), forward, backward, "reacting", traits=fnbp.Traits(mask=lambda name, x, mask: mask)
    )


CONTEXTS = (
    layer(
        "context", "wrong in training", lambda: reacting(lambda r: 1.0 if r[2] is None else r[2][..., None]), SEQUENCE
    ),
    layer("context", "wrong under a mask", lambda: reacting(lambda r: 3.0 if r[1] else 1.0), SEQUENCE),
    layer("context", "wrong at inference", lambda: reacting(lambda r: 3.0), SEQUENCE, ctx=fnbp.Context(train=True)),
    layer("context", "right", lambda: reacting(lambda r: r[0]), SEQUENCE, right=True),
)


# --- Python state ---


def remembers() -> tuple[Callable, Callable]:
    """A function that keeps its last argument, and a backward that uses what was kept."""
    kept: list[Any] = []

    def f(x):
        kept[:] = [x]
        return x**2

    return f, lambda args, dy: (2 * kept[0] * dy,)


def remembers_shape() -> tuple[Callable, Callable]:
    """A backward that keeps the first cotangent it was told."""
    kept: dict[str, Any] = {}

    def backward(args, dy):
        first = kept.setdefault("dy", dy)
        return (2 * args[0] * first,)

    return square, backward


def compare_pair(both: tuple[Callable, Callable]) -> Report:
    """compare of a function with its backward."""
    f, backward = both
    return fnbp.compare(f, X, vjp=backward)


def stashing_layer() -> fnbp.Layer:
    """A layer that keeps what its last forward saved."""
    kept: list[Any] = []

    def forward(params, x):
        kept[:] = [x]
        return x**2, (x,)

    return fnbp.stateless(lambda key, x: {}, forward, lambda params, res, dy: ({}, 2 * kept[0] * dy), "stash")


def with_default(factor: float) -> fnbp.Layer:
    """x^2, whose backward has a keyword default: the same code as its sister's."""

    def backward(params, res, dy, *, c=factor):
        return {}, c * res[0] * dy

    return fnbp.stateless(lambda key, x: {}, lambda params, x: (x**2, (x,)), backward, "square")


STATE = (
    Attack("state of Python", "a stash of the last forward", lambda: compare_pair(remembers())),
    Attack("state of Python", "the first cotangent is kept", lambda: compare_pair(remembers_shape())),
    layer("state of Python", "a layer's stash of the last forward", stashing_layer, X),
    layer(
        "state of Python",
        "the second of two layers of equal code has a wrong default",
        lambda: fnbp.serial(with_default(2.0), with_default(3.0)),
        X,
    ),
)


# --- transforms ---


def rows_of_seven(args: Any, dy: Any) -> Any:
    """Right, but only for as many rows as there are."""
    return (2 * args[0] * dy.reshape(7, 11),)


def eager_only(args: Any, dy: Any) -> Any:
    """A backward that looks at values."""
    return (2 * args[0] * dy * (1.0 if float(dy[0, 0]) > -1e9 else 2.0),)


TRANSFORMS = (
    layer(
        "transforms",
        "a batch of 7 taken for granted",
        lambda: fnbp.stateless(
            lambda key, x: {},
            lambda params, x: (x**2, (x,)),
            lambda p, res, dy: ({}, 2 * res[0].reshape(7, 11) * dy),
            "seven",
        ),
        X,
    ),
    function("transforms", "needs its values", square, eager_only, X),
    function(
        "transforms",
        "wrong under vmap: examples are counted",
        square,
        lambda a, dy: (2 * a[0] * dy * jax.lax.psum(1, ()) * (2 if isinstance(dy, Tracer) else 1),),
        X,
    ),
)
