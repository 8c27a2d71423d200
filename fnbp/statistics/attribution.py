"""Which training examples a prediction comes from: inner products of their gradients with those of a query."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import check_size
from fnbp.backpropagation import backprop
from fnbp.contraction import keep
from fnbp.contractions import cross_gram
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss

__all__ = ["influence"]


def influence(net: Layer, loss: Loss, chunk: int = 256, projection: Any = None) -> Callable[..., jax.Array]:
    """Make the function of influences: (params, state, (x, y), (x_query, y_query), ctx) -> (n, q).

        influence of example i on query j = <g_i, h_j>, gradients of each one's own loss

    A step of gradient descent on example i changes the loss of query j by -rate times it, to first order: what is large
    helps. The factors of the queries are kept, and the training examples go by, chunk of them at a time.

    Options: chunk: how many training examples at once. projection: a Contraction by project(key, k_out, k_in), to
             compare random projections instead: of all parameters k_out k_in numbers each.
    Source:  Pruthi et al. 2020, arXiv:2002.08484, section 3, for one checkpoint.
    Raises:  ValueError if there is no example; TypeError, by its name, if a layer mixes the examples.
    """
    check_size("influence", "chunk", chunk)

    def influence_of(params, state, train, query, ctx=Context()):
        n = jax.tree.leaves(train)[0].shape[0]
        if not n:
            raise ValueError("influence: there is no training example")
        if projection is None:
            kept = backprop(net, loss, keep)(params, state, *query, ctx).grads
            run = backprop(net, loss, cross_gram(kept))
            products = lambda grads: jnp.sum(jnp.stack(jax.tree.leaves(grads)), 0)  # noqa: E731
        else:
            run = backprop(net, loss, projection)
            rows = rows_of(run(params, state, *query, ctx).grads)
            products = lambda grads: rows_of(grads) @ rows.T  # noqa: E731

        def of(part: Any) -> jax.Array:
            return products(run(params, state, *part, ctx).grads)

        whole = n // chunk * chunk
        parts = jax.tree.map(lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:]), train)
        found = [jax.lax.map(of, parts).reshape(whole, -1)] if whole else []
        found += [of(jax.tree.map(lambda a: a[whole:], train))] if whole < n else []
        return jnp.concatenate(found)

    return influence_of


def rows_of(projected: Any) -> jax.Array:
    """The projections of all parameters side by side."""
    return jnp.concatenate(jax.tree.leaves(projected), 1)
