"""Squared errors."""

import jax.numpy as jnp

from fnbp.construction import constructor
from fnbp.losses.loss import Loss, of_pairs
from fnbp.losses.reduction import check_reduce

__all__ = ["half_squared_error", "mean_squared_error"]


@constructor
def mean_squared_error(reduce: str = "examples") -> Loss:
    """The mean over outputs of the squared difference between prediction and target.

        l = sum_j (p_j - t_j)^2 / s      dp = 2 (p - t) / s      s: number of outputs of an example that count
        Hessian = 2 / s, root sqrt(2 / s) for each output

    Shapes:  p, t (m, ...); l (m,); saved both.
    Options: reduce: as in softmax_cross_entropy; it matters only if some positions do not count.
    Source:  Goodfellow, Bengio & Courville 2016, Deep Learning, section 5.1.4.
    Raises:  ValueError if the target has another shape; TypeError if the prediction is not floating point.
    """
    check_reduce("mean_squared_error", reduce)
    second = lambda p, t: 2 * jnp.ones_like(p)  # noqa: E731
    name = "mean_squared_error"
    return of_pairs(name, lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t), reduce, d2loss=second)


@constructor
def half_squared_error() -> Loss:
    """Half the sum over outputs of the squared difference between prediction and target: the quadratic cost.

        l = 1/2 sum_j (p_j - t_j)^2      dp = p - t      Hessian = 1, root 1 for each output

    Shapes: p, t (m, ...); l (m,); saved both.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 1, the quadratic cost.
    Raises: ValueError if the target has another shape; TypeError if the prediction is not floating point.
    """
    second = lambda p, t: jnp.ones_like(p)  # noqa: E731
    return of_pairs("half_squared_error", lambda p, t: (p - t) ** 2 / 2, lambda p, t: p - t, "sum", d2loss=second)
