"""Which training examples a prediction comes from: inner products of their gradients with those of a query."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import as_arrays, check_finite, check_is, check_size, describe, located
from fnbp.arrays.placement import placement
from fnbp.backpropagation import backprop
from fnbp.contraction import keep
from fnbp.contractions import Contraction, cross_gram
from fnbp.layer import Context, Layer, mask_behind
from fnbp.losses.loss import Loss, check_target
from fnbp.sharding import predicted
from fnbp.statistics.of_opened import of_two_batches

__all__ = ["influence"]

APART = 2**31 - 3  # of the key of the queries from those of the chunks, which count from 0


@of_two_batches
def influence(net: Layer, loss: Loss, chunk: int = 256, projection: Any = None) -> Callable[..., jax.Array]:
    """Make the function of influences: (params, state, (x, y), (x_query, y_query), ctx) -> (n, q).

        influence of example i on query j = <g_i, h_j>, gradients of each one's own loss

    A step of gradient descent on example i changes the loss of query j by -rate times it, to first order: what is large
    helps. The factors of the queries are kept, and the training examples go by, chunk of them at a time. Over several
    checkpoints, stacked along a first axis of params, with the rate of each:

        of = fnbp.statistics.influence(net, loss)
        alone = lambda given: given[0] * of(given[1], state, train, query)
        jax.jit(lambda rates, params: jax.lax.map(alone, (rates, params)).sum(0))(rates, params)

    In training each chunk, and the queries, draw with a key of their own, so that what is drawn depends on chunk.

    Options: chunk: how many training examples at once. projection: a Contraction by project(key, k_out, k_in), to
             compare random projections instead: of all parameters k_out k_in numbers each.
    Memory:  the whole training set lies on the device; give a larger one in parts of one size. Of a weight at many
             positions the gradients of a chunk and of the queries are formed: q + chunk times its memory.
    Source:  Pruthi et al. 2020, arXiv:2002.08484, section 3, for one checkpoint, and for a sum over several.
    Raises:  ValueError if there is no example, data do not fit, the net has no parameters, there is a Context.mask, the
             loss of an example is a share of its batch's, or the training set is split over Explicit axes; TypeError if
             data are no pairs, projection is not by project, or, by its name, if a layer mixes the examples.
    """
    check_kinds(net, loss, chunk, projection)

    def influence_of(params, state, train, query, ctx=Context()):
        if not jax.tree.leaves(params):
            raise ValueError(f"influence: {net.name} has no parameters")
        check_context(ctx)
        query, train = (
            checked(what, net, loss, params, state, pair, ctx)
            for what, pair in (("the queries", query), ("the training set", train))
        )
        if placement(train) is not None:
            raise ValueError(
                "influence: the training set is split over Explicit axes, and goes by in chunks; give it whole, or on "
                "Auto axes"
            )
        at = with_key(ctx, APART)
        if projection is None:
            kept = backprop(net, loss, keep)(params, state, *query, at).grads
            run = backprop(net, loss, cross_gram(kept))
            products = lambda grads: jnp.sum(jnp.stack(jax.tree.leaves(grads)), 0)  # noqa: E731
        else:
            run = backprop(net, loss, projection)
            rows = rows_of(run(params, state, *query, at).grads)
            products = lambda grads: rows_of(grads) @ rows.T  # noqa: E731

        def of(number: Any, size: int = chunk) -> jax.Array:
            x, y = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, number * chunk, size), train)
            return products(run(params, state, x, y, with_key(ctx, number)).grads)

        count, rest = divmod(jax.tree.leaves(train)[0].shape[0], chunk)
        found = [jax.lax.map(of, jnp.arange(count)).reshape(count * chunk, -1)] if count else []
        found += [of(count, rest)] if rest else []
        return jnp.concatenate(found)

    return influence_of


def check_kinds(net: Any, loss: Any, chunk: Any, projection: Any) -> None:
    """TypeError or ValueError, unless the arguments of influence are what they must be."""
    check_is("influence", "net", net, Layer)
    check_is("influence", "loss", loss, Loss)
    check_size("influence", "chunk", chunk)
    if projection is not None and not (isinstance(projection, Contraction) and projection.name == "project"):
        came = projection.name if isinstance(projection, Contraction) else describe(projection)
        raise TypeError(f"influence: projection must be one by fnbp.project(key, k_out, k_in), got {came}")
    if loss.positions is not None:
        raise ValueError(
            f"influence: by {loss.name} the loss of an example is its share of a whole batch; give a loss of each "
            "example alone, of another reduce"
        )


def check_context(ctx: Any) -> None:
    """ValueError if a Context has a mask."""
    check_is("influence", "ctx", ctx, Context)
    if ctx.mask is not None:
        raise ValueError(
            "influence: Context.mask is of one batch, and there are several; in ragged, x is a pair (x, lengths)"
        )


def checked(what: str, net: Layer, loss: Loss, params: Any, state: Any, pair: Any, ctx: Context) -> tuple[Any, Any]:
    """A pair (x, y) as arrays, before anything is computed. ValueError or TypeError if it does not fit net and loss."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"influence: {what} must be a pair (x, y), got {describe(pair)}")
    if any(not hasattr(a, "shape") or not a.ndim for a in jax.tree.leaves(pair)):
        raise TypeError(f"influence: {what} must be a pair of arrays, the example their first axis")
    sizes = {a.shape[0] for a in jax.tree.leaves(pair)}
    if len(sizes) > 1:
        raise ValueError(f"influence: x and y of {what} must have equally many examples, got {sorted(sizes)}")
    if sizes in (set(), {0}):
        raise ValueError(f"influence: there is no example in {what}")
    x, y = as_arrays("influence", what, tuple(pair))
    check_finite("influence", f"{what}, x", x)
    check_finite("influence", f"{what}, y", y)
    with located(f"{what} of influence"):
        form = jax.eval_shape(lambda params: predicted(net, params, state, x, ctx), params)
        check_target(loss, form, y, mask_behind(net, x, None))
    return x, y


def with_key(ctx: Context, number: Any) -> Context:
    """ctx with another key for each number."""
    return ctx if ctx.key is None else replace(ctx, key=jax.random.fold_in(ctx.key, number))


def rows_of(projected: Any) -> jax.Array:
    """The projections of all parameters side by side."""
    return jnp.concatenate(jax.tree.leaves(projected), 1)
