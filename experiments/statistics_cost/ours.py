"""The statistics by fnbp, and the same quantities by jax.vmap of jax.grad: functions (params, state, x, y, query)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fnbp
from experiments.statistics_cost.nets import LOSS, Case
from fnbp import statistics

VMAP, JVP = "vmap(jax.grad)", "jax.jvp"


class Statistic(NamedTuple):
    """One statistic.

    make    Case -> the function that computes it
    others  name -> Case -> a function of the same quantity by other means
    most    net -> the most of the time of one gradient that it is to take
    memory  net -> the most of the memory
    checked what of the results must agree
    """

    make: Callable[[Case], Callable]
    others: dict[str, Callable[[Case], Callable]] = {}  # noqa: RUF012 (never written)
    most: dict[str, float] = {}  # noqa: RUF012
    memory: dict[str, float] = {}  # noqa: RUF012
    checked: Callable[[Any], Any] = lambda made: made


# --- by fnbp ---


def plain(case: Case) -> Callable:
    """The gradient alone: what all others are measured by."""
    run = fnbp.value_and_grad(case.net, LOSS)
    return lambda params, state, x, y, query: run(params, state, x, y)


def beside(contraction: Any) -> Callable[[Case], Callable]:
    """The gradient, and a contraction, in one backward."""

    def make(case):
        run = fnbp.backprop(case.net, LOSS, {"gradient": fnbp.total, "more": contraction})

        def gradient_and_more(params, state, x, y, query):
            done = run(params, state, x, y)
            return done.value, done.grads["gradient"], done.grads["more"]

        return gradient_and_more

    return make


def alone(contraction: Any) -> Callable[[Case], Callable]:
    """A contraction alone."""

    def make(case):
        run = fnbp.backprop(case.net, LOSS, contraction)
        return lambda params, state, x, y, query: run(params, state, x, y).grads

    return make


def norms_beside(case: Case) -> Callable:
    """The gradient, and the squared norms of single gradients, (m,)."""
    both = beside(fnbp.sq_norms)(case)

    def gradient_and_norms(*args):
        value, grads, squares = both(*args)
        return value, grads, added(squares)

    return gradient_and_norms


def norms(case: Case) -> Callable:
    """The norms of single gradients, (m,)."""
    run = fnbp.per_example_norms(case.net, LOSS)
    return lambda params, state, x, y, query: run(params, state, x, y)


def clipped(**options: Any) -> Callable[[Case], Callable]:
    """The mean of clipped gradients; half of the examples are clipped."""

    def make(case):
        run = statistics.clipped(case.net, LOSS, case.limit, **options)

        def value_and_clipped(params, state, x, y, query):
            (value, _), grads = run(params, state, x, y)
            return value, grads

        return value_and_clipped

    return make


def moments(case: Case) -> Callable:
    """The gradient, the variance of each of its numbers, and the ratio of signal to noise."""
    run = statistics.moments(case.net, LOSS)

    def value_and_moments(params, state, x, y, query):
        (value, _), found = run(params, state, x, y)
        return value, found.mean, found.variance, found.signal_to_noise

    return value_and_moments


def noise_scale(case: Case) -> Callable:
    """The gradient, and the noise scale of the batch."""
    run = statistics.noise_scale(case.net, LOSS)

    def value_and_noise(params, state, x, y, query):
        (value, _, found), grads = run(params, state, x, y)
        return value, grads, found.scale, found.trace, found.square

    return value_and_noise


def fisher(case: Case) -> Callable:
    """The gradient, and the factors of K-FAC by labels that the model draws: one more backward."""
    gradient, factors = fnbp.value_and_grad(case.net, LOSS), statistics.fisher(case.net, LOSS, fnbp.kronecker())

    def gradient_and_fisher(params, state, x, y, query):
        (value, _), grads = gradient(params, state, x, y)
        return value, grads, factors(params, state, x, y, fnbp.Context(jax.random.key(0)))

    return gradient_and_fisher


def influence(case: Case) -> Callable:
    """The inner products of the gradients of the batch with that of one query, (m, 1)."""
    run = statistics.influence(case.net, LOSS)
    return lambda params, state, x, y, query: run(params, state, (x, y), query)


def influence_beside(case: Case) -> Callable:
    """The gradient of the batch, and the same inner products, in one backward."""

    def gradient_and_influence(params, state, x, y, query):
        kept = fnbp.backprop(case.net, LOSS, fnbp.keep)(params, state, *query).grads
        contract = {"gradient": fnbp.total, "products": fnbp.cross_gram(kept)}
        done = fnbp.backprop(case.net, LOSS, contract)(params, state, x, y)
        return done.value, done.grads["gradient"], added(done.grads["products"])

    return gradient_and_influence


def added(tree: Any) -> jax.Array:
    """The sum over parameters."""
    return jnp.sum(jnp.stack(jax.tree.leaves(tree)), 0)


# --- by jax.vmap of jax.grad ---


def by_vmap(make: Callable[..., Any]) -> Callable[[Case], Callable]:
    """make(values, gradients of single examples, gradient of the query, limit), the gradients by jax.vmap."""

    def of(case):
        run = fnbp.automatic_value_and_grad(case.net, LOSS)

        def function(params, state, x, y, query):
            def own(x, y):
                (value, _), grads = run(params, state, x[None], y[None])
                return value, grads

            values, rows = jax.vmap(own)(x, y)
            return make(jnp.mean(values), rows, lambda: run(params, state, *query)[1], case.limit)

        return function

    return of


def squares_of(rows: Any) -> jax.Array:
    """|g_i|^2, (m,)."""
    return added(jax.tree.map(lambda g: jnp.sum(g**2, range(1, g.ndim)), rows))


def mean_of(rows: Any) -> Any:
    """The mean over examples."""
    return jax.tree.map(lambda g: jnp.mean(g, 0), rows)


def clipped_by_vmap(value: Any, rows: Any, query: Callable, limit: float) -> Any:
    """Each gradient times min(1, limit / norm)."""
    scale = jnp.minimum(1, limit / jnp.sqrt(squares_of(rows)))
    return value, jax.tree.map(lambda g: jnp.tensordot(scale, g, 1) / len(scale), rows)


def moments_by_vmap(value: Any, rows: Any, query: Callable, limit: float) -> Any:
    """Mean, variance, mean^2 / variance."""
    mean, variance = mean_of(rows), jax.tree.map(lambda g: jnp.var(g, 0, ddof=1), rows)
    return value, mean, variance, jax.tree.map(lambda g, v: g**2 / v, mean, variance)


def noise_by_vmap(value: Any, rows: Any, query: Callable, limit: float) -> Any:
    """trace / square, and both."""
    squares, grads = squares_of(rows), mean_of(rows)
    m, single, whole = len(squares), jnp.mean(squares), added(jax.tree.map(lambda g: jnp.sum(g**2), grads))
    trace, square = m / (m - 1) * (single - whole), (m * whole - single) / (m - 1)
    return value, grads, trace / square, trace, square


def products_by_vmap(value: Any, rows: Any, query: Callable, limit: float) -> Any:
    """<g_i, h>, (m, 1), h the gradient of the query."""
    return added(jax.tree.map(lambda g, h: g.reshape(len(g), -1) @ h.reshape(-1, 1), rows, query()))


def gram_by_vmap(value: Any, rows: Any, query: Callable, limit: float) -> Any:
    """<g_i, g_j> for each parameter."""
    return jax.tree.map(lambda g: g.reshape(len(g), -1) @ g.reshape(len(g), -1).T, rows)


def products_by_jvp(case: Case) -> Callable:
    """<g_i, h> as the derivative of each loss in the direction h."""
    gradient = fnbp.automatic_value_and_grad(case.net, LOSS)

    def products(params, state, x, y, query):
        def losses(params):
            return LOSS.forward(case.net.forward(params, state, x, fnbp.Context())[0], y)[0]

        return jax.jvp(losses, (params,), (gradient(params, state, *query)[1],))[1][:, None]

    return products


SECOND = by_vmap(lambda v, rows, *_: (v, mean_of(rows), jax.tree.map(lambda g: jnp.sum(g**2, 0), rows)))
CLIPPED = {VMAP: by_vmap(clipped_by_vmap)}
CLIP_MOST = {"mlp": 1.15, "gpt": 1.20}
PRODUCTS = {VMAP: by_vmap(products_by_vmap), JVP: products_by_jvp}

STATISTICS = {
    "norms beside": Statistic(
        norms_beside,
        {VMAP: by_vmap(lambda v, rows, *_: (v, mean_of(rows), squares_of(rows)))},
        {"mlp": 1.05, "lenet": 1.20, "gpt": 1.15, "lstm": 1.15},
        {"mlp": 1.15, "gpt": 1.15, "lstm": 1.15},
    ),
    "norms alone": Statistic(norms, {VMAP: by_vmap(lambda v, rows, *_: jnp.sqrt(squares_of(rows)))}),
    "clipped": Statistic(clipped(), CLIPPED, CLIP_MOST),
    "clipped, 1 pass": Statistic(clipped(passes=1), {}, CLIP_MOST),
    "clipped, 2 passes": Statistic(clipped(passes=2), {}, CLIP_MOST),
    "second moment beside": Statistic(beside(fnbp.second_moment), {VMAP: SECOND}, {"mlp": 1.5}),
    "moments": Statistic(  # the ratio of signal to noise is 0 / 0 where a unit is off for all examples
        moments, {VMAP: by_vmap(moments_by_vmap)}, {"mlp": 1.5}, checked=lambda made: made[:3]
    ),
    "noise scale": Statistic(noise_scale, {VMAP: by_vmap(noise_by_vmap)}, {"mlp": 1.15}),
    "kfac beside": Statistic(beside(fnbp.kronecker()), {}, {"mlp": 1.7, "lenet": 2.4, "gpt": 2.4}),
    "kfac beside, reduced": Statistic(beside(fnbp.kronecker("reduce")), {}),
    "kfac of the Fisher": Statistic(fisher, {}),
    "gram": Statistic(alone(fnbp.gram), {VMAP: by_vmap(gram_by_vmap)}),
    "influence": Statistic(influence, PRODUCTS, {"mlp": 1.17}),
    "influence beside": Statistic(influence_beside, {}, {"mlp": 1.17}),
    "per_example": Statistic(alone(fnbp.per_example), {VMAP: by_vmap(lambda v, rows, *_: rows)}),
}
