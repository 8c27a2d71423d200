"""A loss of each example, with its backward: where every backward pass begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_floating, describe
from fnbp.arrays.masks import check_truth, of_queries
from fnbp.arrays.sums import wide
from fnbp.losses.reduction import counted, only, share, shares, summed_up

__all__ = ["Loss"]


class Loss(NamedTuple):
    """A loss of each example, and its backward.

        forward     (prediction, target) -> losses (m,), res
        backward    (res)                -> dprediction of the sum of losses
        name        for reports
        check       (prediction, target) -> None: raises if they do not fit; prediction may be a mere shape
        takes_mask  True if forward and check take a third argument: the mask of the prediction's positions, or None

    fnbp.backprop takes the mean over the m examples. Where a prediction has positions (time, outputs), an example's
    loss is the mean over its own that count.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    name: str = "loss"
    check: Callable[..., None] = lambda prediction, target: None
    takes_mask: bool = False


def losses_of(loss: Loss, prediction: Any, target: Any, mask: Any = None) -> tuple[jax.Array, Any]:
    """loss.forward, told which positions of the prediction count.

    Raises: TypeError if some may not count and the loss takes no mask; ValueError unless it returns one loss for each
            example.
    """
    losses, res = loss.forward(prediction, target, *mask_for(loss, prediction, mask))
    due = jax.tree.leaves(prediction)[0].shape[:1]
    if jnp.shape(losses) != due:
        raise ValueError(f"{loss.name}: forward must return one loss an example, shape {due}, got {jnp.shape(losses)}")
    return losses, res


def check_target(loss: Loss, prediction: Any, target: Any, mask: Any = None) -> None:
    """What loss.check raises, told which positions of the prediction count."""
    loss.check(prediction, target, *mask_for(loss, prediction, mask))


def mask_for(loss: Loss, prediction: Any, mask: Any) -> tuple[Any, ...]:
    """The third argument of a loss's forward and check: none if all positions count."""
    single = hasattr(prediction, "ndim")
    if mask is None or (single and of_queries(prediction, mask)):
        return ()
    check_truth(loss.name, mask)
    if not loss.takes_mask:
        raise TypeError(
            f"{loss.name}: some positions of the prediction do not count (Context.mask, or ragged), and this loss "
            "takes no mask; one that does takes it as third argument of forward and check: Loss(..., takes_mask=True)"
        )
    if not single or mask.ndim >= prediction.ndim or mask.shape != prediction.shape[: mask.ndim]:
        came = prediction.shape if single else describe(prediction)
        raise ValueError(f"{loss.name}: the mask of shape {mask.shape} does not fit the prediction of shape {came}")
    return (mask,)


def accept(p: Any, t: Any, counts: Any) -> None:
    """Any values will do."""


def of_pairs(
    name: str,
    loss: Callable,
    dloss: Callable,
    reduce: str,
    check_values: Callable = accept,
    ignore_index: int | None = None,
) -> Loss:
    """A Loss of pairs of numbers; reduce: "examples", "tokens", or "sum" over an example's outputs."""

    def check(p, t, mask=None):
        check_floating(name, "prediction", p)
        if p.ndim < 1 or jnp.shape(t) != p.shape:
            raise ValueError(f"{name}: target has shape {jnp.shape(t)}, prediction {p.shape}; they must be the same")
        check_values(p, t, counted(mask, t, ignore_index))

    def forward(p: Float[Array, "m *n"], t, mask=None) -> tuple[Float[Array, " m"], tuple]:
        check(p, t, mask)
        counts = counted(mask, t, ignore_index)
        p, t = only(counts, p), only(counts, t)
        losses = loss(wide(p), t)
        at = shares(reduce, losses, counts)
        return summed_up(at, losses), (p, t, at)

    def backward(res: tuple) -> Float[Array, "m *n"]:
        p, t, at = res
        return share(at, dloss(wide(p), t)).astype(p.dtype)

    return Loss(forward, backward, name, check, takes_mask=True)
