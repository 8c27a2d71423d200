"""Loss: the loss of each example, with the backward where every backward pass begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_floating, describe
from fnbp.arrays.masks import check_truth, of_queries
from fnbp.arrays.sums import wide
from fnbp.construction import Made, call_of, hashed, is_alike, is_other, itself, reduced
from fnbp.losses.reduction import counted, how_many, only, share, shares, summed_up

__all__ = ["Loss"]


class Loss(NamedTuple):
    """A loss for each example, and its backward.

        forward     (prediction, target) -> losses (m,), res
        backward    (res)                -> dprediction, of the sum of losses
        name        reports name the loss by it
        check       (prediction, target) -> None: raises if they do not fit; prediction may be a jax.ShapeDtypeStruct
        takes_mask  True if forward and check take a third argument: the mask of the prediction's positions, or None
        positions   (prediction, target, mask) -> how many positions count, if each loss is a share of a whole batch, as
                    for reduce="tokens"; None otherwise
        roots       (res) -> r (k, m, ...), so that sum_k r_k r_k^T is the Hessian of each loss by its prediction; None
                    if there is none of this form
        joint       how many of the last axes of the prediction belong together in that Hessian, 1 or 0; numbers at
                    different places of the others do not, and each place has roots of its own
        of_scores   the same loss of Scores, of which it forms the cotangent without the scores themselves; see
                    linear_cross_entropy. None for a loss that takes the prediction only
        made        the call that made it, see fnbp.constructor

    fnbp.backprop takes the mean over the m examples. If a prediction has positions (time, outputs), the loss of an
    example is the mean over its positions that count.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    name: str = "loss"
    check: Callable[..., None] = lambda prediction, target: None
    takes_mask: bool = False
    positions: Callable[..., Any] | None = None
    roots: Callable[..., Any] | None = None
    joint: int = 1
    of_scores: "Loss | None" = None
    made: Made | None = None

    __eq__, __ne__, __hash__ = is_alike, is_other, hashed
    __repr__, __reduce__ = call_of, reduced
    __copy__ = __deepcopy__ = itself


def losses_of(loss: Loss, prediction: Any, target: Any, mask: Any = None) -> tuple[jax.Array, Any]:
    """Call loss.forward with the mask of the positions of the prediction, if there is one.

    Raises: TypeError if there is a mask and the loss takes none; ValueError if forward does not return one loss for
            each example.
    """
    losses, res = loss.forward(prediction, target, *mask_for(loss, prediction, mask))
    expected = jax.tree.leaves(prediction)[0].shape[:1]
    if jnp.shape(losses) != expected:
        came = jnp.shape(losses)
        raise ValueError(f"{loss.name}: forward must return one loss an example, shape {expected}, got {came}")
    return losses, res


def check_target(loss: Loss, prediction: Any, target: Any, mask: Any = None) -> None:
    """Call loss.check with the mask of the positions of the prediction, if there is one."""
    loss.check(prediction, target, *mask_for(loss, prediction, mask))


def mask_for(loss: Loss, prediction: Any, mask: Any) -> tuple[Any, ...]:
    """The third argument of loss.forward and loss.check, as a tuple: () if all positions count."""
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
    """Accept any values."""


def of_pairs(
    name: str,
    loss: Callable,
    dloss: Callable,
    reduce: str,
    check_values: Callable = accept,
    ignore_index: int | None = None,
    d2loss: Callable | None = None,
) -> Loss:
    """A Loss that compares prediction and target number by number.

        l = sum_j loss(p_j, t_j) / s      dp = dloss(p, t) / s      Hessian: diagonal, d2loss(p, t) / s

    s is 1 for reduce="sum", else as in softmax_cross_entropy.
    """

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

    def positions(p, t, mask):
        return how_many(counted(mask, t, ignore_index), p.shape)

    def roots(res: tuple) -> Float[Array, "1 m *n"]:
        p, t, at = res
        assert d2loss is not None
        return jnp.sqrt(share(at, d2loss(wide(p), t)))[None].astype(p.dtype)

    of = positions if reduce == "tokens" else None
    return Loss(forward, backward, name, check, True, of, None if d2loss is None else roots, 0)
