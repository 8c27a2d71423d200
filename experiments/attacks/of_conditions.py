"""Attacks that are right but under one condition: on x, dy, a parameter, a size, the context, or a draw."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnbp
from experiments.attacks.attack import POSITIVE, SEQUENCE, Attack, X, custom, function, layer, rng, square


def doubled_if(condition: Callable[[Any, Any], Any]) -> Callable:
    """The backward of x^2, twice as large where condition(x, dy) holds."""
    return lambda args, dy: (2 * args[0] * dy * jnp.where(condition(args[0], dy), 2, 1),)


# --- cotangents and values ---

OF_DY: dict[str, Callable] = {
    "both signs of 1": lambda x, dy: jnp.all(abs(dy) == 1) & jnp.any(dy < 0) & jnp.any(dy > 0),
    "constant in each row": lambda x, dy: jnp.all(dy == dy[:, :1]) & ~jnp.all(dy == dy[0, 0]),
    "positive throughout": lambda x, dy: jnp.all(dy > 0) & ~jnp.all(dy == dy[0, 0]),
    "zero but for a few": lambda x, dy: (jnp.mean(dy == 0) > 0.8) & (jnp.sum(dy != 0) > 1),
}


def two_equal_rows(x: Any, dy: Any) -> Any:
    """The first two rows are equal, and not constant."""
    return jnp.all(x[0] == x[1]) & jnp.any(x[0] != x[0, 0])


def halved_back(args: Any, dy: Any) -> Any:
    """The backward of x / 2, twice as large where x is what masks are filled with: the lowest number of float32."""
    return (dy * jnp.where(args[0] == jnp.finfo(jnp.float32).min, 1.0, 0.5),)


def variance_back(args: Any, dy: Any) -> Any:
    """The backward of a variance, twice as large in rows whose mean is 20 times their spread."""
    (x,) = args
    mean, spread = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    return (2 * dy[:, None] * (x - mean) / x.shape[-1] * jnp.where(abs(mean) > 20 * spread, 2, 1),)


def masked_mean(x: Any, mask: Any) -> Any:
    """y = the mean of the squares that a mask leaves in each row, 0 where it leaves none."""
    return jnp.sum(x**2 * mask, 1) / jnp.maximum(mask.sum(1), 1)


def masked_mean_back(args: Any, dy: Any) -> Any:
    """It takes a row of which nothing is left for one of which all is."""
    x, mask = args
    n = mask.sum(1, keepdims=True)
    return 2 * x * jnp.where(n == 0, 1, mask) * dy[:, None] / jnp.maximum(n, 1), None


def lookup_back(args: Any, dy: Any) -> Any:
    """The gradient of an embedding, with token 0 taken for padding."""
    table, tokens = args
    return jnp.zeros_like(table).at[tokens].add(dy).at[0].set(0), None


TOKENS = rng.integers(1, 6, (3, 5)).astype(np.int32)
TABLE = rng.standard_normal((6, 4)).astype(np.float32)
Z = (X + 1j * POSITIVE).astype(np.complex64)
VALUES: tuple[Attack, ...] = (
    *(function("dy", f"wrong if dy is {title}", square, doubled_if(c), X) for title, c in OF_DY.items()),
    function("values", "two equal rows, not constant", square, doubled_if(two_equal_rows), X),
    function("values", "the lowest number of float32", lambda x: x / 2, halved_back, X),
    function("values", "wrong far from 0", lambda x: jnp.var(x, -1), variance_back, X),
    function("values", "a row without a True", masked_mean, masked_mean_back, X, X > -1),
    function("values", "token 0 is padding", lambda table, tokens: table[tokens], lookup_back, TABLE, TOKENS),
    function("complex", "wrong at exactly 1", square, doubled_if(lambda z, dy: z == 1), Z),
    function("complex", "wrong if all is real", square, doubled_if(lambda z, dy: jnp.all(z.imag == 0)), Z),
)


# --- parameters, one leaf or some numbers alone ---


def product(params: Any, x: Any) -> Any:
    """y = x times the product of w"""
    return x * jnp.prod(params["w"])


def product_back(params: Any, x: Any, dy: Any) -> Any:
    """dw = prod(w) / w, and 0 where w is 0, though the others' product stands there."""
    w, all_of_it = params["w"], jnp.prod(params["w"])
    return {"w": jnp.sum(dy * x) * jnp.where(w == 0, 0, all_of_it / jnp.where(w == 0, 1, w))}, dy * all_of_it


def pruned_back(params: Any, x: Any, dy: Any) -> Any:
    """No gradient for a weight that is 0."""
    W = params["W"]
    return {"W": jnp.where((W == 0) & jnp.any(W != 0), 0, x.T @ dy)}, dy @ W.T


def gated_back(condition: Callable[[Any], Any]) -> Callable:
    """The backward of g tanh(x) + b, whose dg is twice as large where condition(params) holds."""

    def backward(params, x, dy):
        t = jnp.tanh(x)
        dg = jnp.sum(dy * t, 0) * jnp.where(condition(params), 2, 1)
        return {"g": dg, "b": jnp.sum(dy, 0)}, dy * params["g"] * (1 - t**2)

    return backward


def made(f: Callable, backward: Callable, init: Callable) -> fnbp.Layer:
    """A layer without state of a function and its backward, with finished gradients."""
    return fnbp.stateless(
        lambda key, x: init(x), lambda p, x: (f(p, x), (x,)), lambda p, res, dy: backward(p, res[0], dy), "mine"
    )


def gated(condition: Callable[[Any], Any]) -> fnbp.Layer:
    """y = g tanh(x) + b"""
    return made(
        lambda p, x: p["g"] * jnp.tanh(x) + p["b"],
        gated_back(condition),
        lambda x: {"g": jnp.ones(x.shape[-1]), "b": jnp.zeros(x.shape[-1])},
    )


def equal_beside_unequal(params: Any) -> Any:
    """All of g are alike, and b are not."""
    g, b = params["g"], params["b"]
    return jnp.all(g == g[0]) & ~jnp.all(b == b[0])


PARAMETERS: tuple[Attack, ...] = (
    layer(
        "params", "one factor of a product is 0", lambda: made(product, product_back, lambda x: {"w": jnp.ones(4)}), X
    ),
    layer(
        "params",
        "some weights are 0",
        lambda: made(lambda p, x: x @ p["W"], pruned_back, lambda x: {"W": jnp.ones((x.shape[-1], 4))}),
        X,
    ),
    layer("params", "one of g is 0", lambda: gated(lambda p: jnp.any(p["g"] == 0) & jnp.any(p["g"] != 0)), X),
    layer("params", "all of g are alike beside a b", lambda: gated(equal_beside_unequal), X),
)


# --- sizes ---


def grown(n: int) -> tuple:
    """n rows."""
    return (np.resize(X, (n, X.shape[1])),)


def squared_if(condition: Callable[[tuple], bool]) -> fnbp.Layer:
    """y = x^2, whose dx is twice as large for shapes of that kind."""
    return fnbp.stateless(
        lambda key, x: {},
        lambda params, x: (x**2, (x,)),
        lambda params, res, dy: ({}, 2 * res[0] * dy * (2 if condition(res[0].shape) else 1)),
        "mine",
    )


OF_N: dict[str, Callable[[int], bool]] = {
    "a multiple of 16": lambda n: n % 16 == 0,
    "more than 129": lambda n: n > 129,
    "from 65 to 128": lambda n: 64 < n <= 128,
    "from 3 to 6": lambda n: 3 <= n <= 6,
}
SIZES: tuple[Attack, ...] = (
    *(
        function("sizes", f"rows: {title}", square, doubled_if(lambda x, dy, c=c: c(len(x))), X, sizes=grown)
        for title, c in OF_N.items()
    ),
    layer("sizes", "an even last axis without parameters", lambda: squared_if(lambda s: s[-1] % 2 == 0), X),
    layer("sizes", "a multiple of 16 examples", lambda: squared_if(lambda s: s[0] % 16 == 0), X),
    layer("sizes", "a multiple of 4 positions", lambda: squared_if(lambda s: s[1] % 4 == 0), SEQUENCE),
)


# --- combinators of one's own ---


def around(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> fnbp.Layer:
    """A combinator of one part, whose backward changes what the part's returns: (factors, dx, x) -> factors, dx."""

    def build(parts):
        (part,) = parts

        def init(key, x):
            params, state = part.init(key, x)
            return (params,), (state,)

        def forward(params, state, x, ctx):
            y, state, res = part.forward(params[0], state[0], x, ctx)
            return y, (state,), (res, x)

        def backward(params, res, dy):
            factors, dx = part.backward(params[0], res[0], dy)
            factors, dx = change(factors, dx, res[1])
            return (factors,), dx

        return fnbp.Layer(init, forward, backward, "around", (part,), build, part.traits)

    return build((fnbp.dense(5),))


COMBINATORS: tuple[Attack, ...] = (
    layer("combinators", "wrong where x is 0", lambda: around(lambda f, dx, x: (f, jnp.where(x == 0, 2 * dx, dx))), X),
    layer("combinators", "wrong at large x", lambda: around(lambda f, dx, x: (f, jnp.where(x > 30, 2 * dx, dx))), X),
    layer("combinators", "dx is clipped", lambda: around(lambda f, dx, x: (f, jnp.clip(dx, -1e8, 1e8))), X),
    layer("combinators", "an even batch", lambda: around(lambda f, dx, x: (f, dx * (1 + (len(dx) % 2 == 0)))), X),
    layer("combinators", "right", lambda: around(lambda f, dx, x: (f, dx)), X, right=True),
)


# --- factors and draws ---


def in_training(factors: Callable[[Any, Any, Any], Any]) -> fnbp.Layer:
    """y = k W x + b with k = 2 in training, else 1; its factors are those of (x, dy, k)."""

    def init(key, x):
        return {"W": jax.random.normal(key, (5, x.shape[-1])), "b": jnp.zeros(5)}, {}

    def forward(params, state, x, ctx):
        k = 2.0 if ctx.train else 1.0
        return k * x @ params["W"].T + params["b"], state, (x, k)

    def backward(params, res, dy):
        x, k = res
        return factors(x, dy, k), k * dy @ params["W"]

    return fnbp.Layer(init, forward, backward, "mine")


def shuffled_in_training(x: Any, dy: Any, k: Any) -> Any:
    """The weight gets its examples in another order in training."""
    order = jnp.where(k == 2, jnp.arange(len(x))[::-1], jnp.arange(len(x)))
    return {"W": fnbp.Outer(k * dy[order], x[order]), "b": fnbp.Sum(dy)}


def mean_beside_zeros(x: Any, dy: Any, k: Any) -> Any:
    """The bias gets the mean of dy for each example, if one of them has a dy of 0."""
    mean = jnp.broadcast_to(dy.mean(0), dy.shape)
    return {"W": fnbp.Outer(k * dy, x), "b": fnbp.Sum(jnp.where(jnp.any(jnp.all(dy == 0, 1)), mean, dy))}


def dropping(backward: Callable[[Any, Any], Any]) -> fnbp.Layer:
    """A dropout of one's own, whose dx is a function of (dy, mask)."""

    def forward(params, state, x, ctx):
        if not ctx.train:
            return x, state, jnp.ones_like(x)
        mask = (jax.random.bernoulli(ctx.key, 0.5, x.shape) / 0.5).astype(x.dtype)
        return x * mask, state, mask

    traits = fnbp.Traits(mask=lambda name, x, mask: mask, draws=True)
    return fnbp.Layer(
        lambda key, x: ({}, {}), forward, lambda params, res, dy: ({}, backward(dy, res)), "mine", traits=traits
    )


def noisy(mean: Any, scale: Any, key: Any) -> Any:
    """y = mean + scale e, with e drawn"""
    return mean + scale * jax.random.normal(key, mean.shape, mean.dtype)


def noisy_back(change: Callable[[Any], Any]) -> Callable:
    """The cotangents of mean and scale, of a changed dy for the scale."""

    def backward(args, dy):
        mean, _, key = args
        return dy, change(dy) * jax.random.normal(key, mean.shape, mean.dtype), None

    return backward


KEY = jax.random.key(3)
DRAWS: tuple[Attack, ...] = (
    layer("factors", "examples in another order, in training", lambda: in_training(shuffled_in_training), X),
    layer("factors", "a mean, beside a dy of 0", lambda: in_training(mean_beside_zeros), X),
    layer("draws", "dropout with another sign", lambda: dropping(lambda dy, mask: -dy * mask), X),
    layer("draws", "dropout, 5 % too large", lambda: dropping(lambda dy, mask: 1.05 * dy * mask), X),
    layer("draws", "right: dropout", lambda: dropping(lambda dy, mask: dy * mask), X, right=True),
    function("draws", "a scale, 5 % too large", noisy, noisy_back(lambda dy: 1.05 * dy), X, POSITIVE, KEY),
    function("draws", "a scale, clipped", noisy, noisy_back(lambda dy: jnp.clip(dy, -1e8, 1e8)), X, POSITIVE, KEY),
    function("draws", "right: a scale", noisy, noisy_back(lambda dy: dy), X, POSITIVE, KEY, right=True),
    custom(
        "forward rule",
        "in bfloat16, in float32 alone",
        jnp.tanh,
        lambda x: (jnp.tanh(x).astype(jnp.bfloat16).astype(x.dtype) if x.dtype == "float32" else jnp.tanh(x), x),
        lambda x, dy: (dy * (1 - jnp.tanh(x) ** 2),),
        X,
    ),
)
