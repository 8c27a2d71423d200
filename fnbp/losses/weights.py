"""A loss of which some examples do not count: those that fill up a batch."""

from typing import Any

import jax
import jax.numpy as jnp

from fnbp.construction import constructor, made_of
from fnbp.losses.loss import Loss


@constructor
def counting_some(loss: Loss) -> Loss:
    """The loss whose target is a pair (t, c): an example counts where c, (m,), is True.

        l = c loss(p, t) m / sum c      dp = c dloss m / sum c      so that the mean over m is that of those that count
        Hessian = c that of loss m / sum c      roots c r sqrt(m / sum c)

    A loss that takes a mask is told that no position of the others counts; one that is a share of the whole batch,
    reduce="tokens", leaves them out of that batch, and has no factor m / sum c.
    """

    def forward(prediction, target, mask=None):
        t, c = target
        scale = c.shape[0] / jnp.sum(c)
        if loss.takes_mask:
            counts = c if mask is None else mask & rows(c, mask)
            losses, res = loss.forward(prediction, t, counts)
            scale = (scale if loss.positions is None else jnp.ones(())).astype(losses.dtype)
            return losses * scale, (res, c, scale)
        losses, res = loss.forward(prediction, t)
        return jnp.where(c, losses * scale.astype(losses.dtype), 0), (res, c, scale.astype(losses.dtype))

    def backward(res):
        res, c, scale = res
        count = (lambda d: d) if loss.takes_mask else (lambda d: jnp.where(rows(c, d), d, 0))
        return jax.tree.map(lambda d: count(d * scale.astype(d.dtype)), loss.backward(res))

    def positions(prediction, target, mask):
        t, c = target
        assert loss.positions is not None
        return loss.positions(prediction, t, c if mask is None else mask & rows(c, mask))

    def roots(res):
        res, c, scale = res
        assert loss.roots is not None
        r = loss.roots(res)
        return jnp.where(rows(c, r[0]), r * jnp.sqrt(scale).astype(r.dtype), 0)

    more = {
        "positions": None if loss.positions is None else positions,
        "roots": None if loss.roots is None else roots,
        "joint": loss.joint,
        "of_scores": None if loss.of_scores is None or made_of(loss) is None else counting_some(loss.of_scores),
    }
    return Loss(forward, backward, loss.name, takes_mask=loss.takes_mask, **more)


def only_some(loss: Loss) -> Loss:
    """The loss whose target is a pair (t, c): 0 for an example where c, (m,), is False; the others stay as they are.

    l = c loss(p, t)      dp = c dloss
    """

    def forward(prediction, target, mask=None):
        t, c = target
        losses, res = loss.forward(prediction, t, *(() if mask is None else (mask,)))
        return jnp.where(c, losses, 0), (res, c)

    def backward(res):
        res, c = res
        return jax.tree.map(lambda d: jnp.where(rows(c, d), d, 0), loss.backward(res))

    return Loss(forward, backward, loss.name, takes_mask=loss.takes_mask)


def rows(c: jax.Array, a: Any) -> jax.Array:
    """c (m,), beside a (m, ...)."""
    return c.reshape(-1, *[1] * (a.ndim - 1))
