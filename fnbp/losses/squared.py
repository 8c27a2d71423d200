"""Squared distances."""

from fnbp.losses.loss import Loss, of_pairs
from fnbp.losses.reduction import check_reduce

__all__ = ["half_squared_error", "mean_squared_error"]


def mean_squared_error(reduce: str = "examples") -> Loss:
    """The squared distance, as a mean over outputs.

        l = mean_j (p_j - t_j)^2      dp = 2 (p - t) / n

    Shapes:  p, t (m, ...), n numbers an example; l (m,); saved both.
    Options: reduce: as in softmax_cross_entropy; they differ only where some positions do not count.
    Source:  the document, section 2, names it.
    Raises:  ValueError for a target of another shape; TypeError for a prediction that is not floating point.
    """
    check_reduce("mean_squared_error", reduce)
    return of_pairs("mean_squared_error", lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t), reduce)


def half_squared_error() -> Loss:
    """Half the squared distance, as a sum over outputs: the quadratic cost.

        l = 1/2 sum_j (p_j - t_j)^2      dp = p - t

    Shapes: p, t (m, ...); l (m,); saved both.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 1, the quadratic cost.
    Raises: ValueError for a target of another shape; TypeError for a prediction that is not floating point.
    """
    return of_pairs("half_squared_error", lambda p, t: (p - t) ** 2 / 2, lambda p, t: p - t, "sum")
