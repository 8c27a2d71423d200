"""Losses: what the first delta is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fnbp.checks import check_floating, concrete, describe
from fnbp.factor import wide

SUM_TOLERANCE = 1e-3  # how far the sum of soft labels may be from 1


class Loss(NamedTuple):
    """A loss of each example, and its backward.

        forward  (prediction, target) -> losses (m,), res
        backward (res)                -> dprediction of the sum of losses
        name     for reports
        check    (prediction, target) -> None: raises where they do not fit; prediction may be a mere shape

    fnbp.backprop takes the mean over the m examples. Where a prediction has positions (time, outputs), an example's
    loss is the mean over its own.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    name: str = "loss"
    check: Callable[..., None] = lambda prediction, target: None


def check_losses(name: str, losses: Any, prediction: Any) -> None:
    """ValueError unless a loss's forward returned one number an example."""
    due = jax.tree.leaves(prediction)[0].shape[:1]
    if jnp.shape(losses) != due:
        raise ValueError(f"{name}: forward must return one loss an example, shape {due}, got {jnp.shape(losses)}")


def each_example(losses: jax.Array) -> jax.Array:
    """The mean over all axes but the first."""
    return jnp.mean(losses, range(1, losses.ndim))


def softmax_cross_entropy() -> Loss:
    """Cross-entropy of softmax(a) against labels, on whatever the net returns.

        l = -sum_j y_j log y_hat_j      y_hat = softmax(a)      da = y_hat - y

    Shapes:   a (m, ..., k); y (m, ...) of integer labels below k, or (m, ..., k) of distributions (one-hot, soft);
              l (m,); saved y_hat (m, ..., k) and y.
    Source:   the document, sections 4.1 and 4.2, with the 1/m of J taken in fnbp.backprop.
    Raises:   TypeError for labels that are not integers; ValueError for another shape, and, outside jit, for a label
              outside 0..k-1 or soft labels that are no distribution. Under jit such a label makes the loss NaN.
    """

    def check(a, y):
        check_floating(name, "prediction", a)
        if a.ndim < 2:
            raise ValueError(f"{name}: prediction must be (m, ..., k), got shape {a.shape}")
        if y.shape not in (a.shape[:-1], a.shape):
            raise ValueError(
                f"{name}: target has shape {y.shape}; prediction of shape {a.shape} needs "
                f"integer labels {a.shape[:-1]} or distributions {a.shape}"
            )
        if is_labels(a, y):
            check_labels(name, y, a.shape[-1])
        else:
            check_distributions(name, y)

    def forward(a: Float[Array, "m *s k"], y) -> tuple[Float[Array, " m"], tuple]:
        check(a, y)
        log_y_hat, y_hat = jax.nn.log_softmax(wide(a), -1), jax.nn.softmax(wide(a), -1)
        if is_labels(a, y):
            # a negative label is out of range too, not counted from the end: no number stands at k
            y = jnp.where(y < 0, a.shape[-1], y.astype(int))
            at_label = jnp.take_along_axis(log_y_hat, y[..., None], -1, mode="fill", fill_value=jnp.nan)
            losses = -at_label[..., 0]
        else:
            losses = -jnp.sum(jnp.where(y > 0, y * log_y_hat, 0), -1)  # 0 log 0 = 0
        return each_example(losses), (y_hat, y, a[:0])  # a[:0] carries a's dtype alone

    def backward(res: tuple) -> Float[Array, "m *s k"]:
        y_hat, y, like = res
        if is_labels(y_hat, y):
            da = minus_one_hot(y_hat, y)
        else:
            da = y_hat * jnp.sum(y, -1, keepdims=True) - y  # the sum is 1, exactly so only on paper
        return (da / positions(da[..., 0])).astype(like.dtype)

    name = "softmax_cross_entropy"
    return Loss(forward, backward, name, check)


def minus_one_hot(y_hat: jax.Array, y: jax.Array) -> jax.Array:
    """y_hat - one_hot(y), touching one number a position; a label of k or more touches none."""
    rows = y_hat.reshape(-1, y_hat.shape[-1])
    return jax.vmap(lambda row, label: row.at[label].add(-1))(rows, y.ravel()).reshape(y_hat.shape)


def is_labels(a: Any, y: Any) -> bool:
    """True where y holds one number a position, not one a class."""
    return y.ndim == a.ndim - 1


def check_labels(name: str, y: Any, k: int) -> None:
    """TypeError unless y is of integers; ValueError for one outside 0..k-1."""
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {describe(y)}")
    if concrete(y):
        y = np.asarray(y)
        for first in np.argwhere((y < 0) | (y >= k))[:1].tolist():
            raise ValueError(f"{name}: label {y[tuple(first)]} at index {first} is outside 0..{k - 1}")


def check_distributions(name: str, y: Any) -> None:
    """ValueError for soft labels that are negative or do not sum to 1."""
    if concrete(y):
        eps = jnp.finfo(y.dtype).eps if jnp.issubdtype(y.dtype, jnp.floating) else 0
        y = np.asarray(y, float)
        good = (abs(y.sum(-1) - 1) <= max(SUM_TOLERANCE, eps)) & (y >= 0).all(-1)
        for first in np.argwhere(~good)[:1].tolist():
            row = y[tuple(first)]
            raise ValueError(
                f"{name}: soft labels at index {first} are no distribution: sum {row.sum():.6g}, least {row.min():.6g}"
            )


def check_unit_interval(name: str, what: str, x: Any, hint: str = "") -> None:
    """ValueError for a number outside [0, 1], NaN among them."""
    if concrete(x):
        x = np.asarray(x)
        for first in np.argwhere(~((x >= 0) & (x <= 1)))[:1].tolist():
            raise ValueError(f"{name}: {what} {x[tuple(first)]} at index {first} is outside [0, 1]{hint}")


def positions(losses: jax.Array) -> int:
    """How many positions an example has."""
    return int(np.prod(losses.shape[1:]))


def elementwise(name: str, loss: Callable, dloss: Callable, mean: bool, check_values: Callable) -> Loss:
    """A Loss of pairs of numbers, averaged or summed over an example's outputs."""

    def check(p, t):
        check_floating(name, "prediction", p)
        if p.ndim < 1 or jnp.shape(t) != p.shape:
            raise ValueError(f"{name}: target has shape {jnp.shape(t)}, prediction {p.shape}; they must be the same")
        check_values(p, t)

    def forward(p: Float[Array, "m *n"], t) -> tuple[Float[Array, " m"], tuple]:
        check(p, t)
        losses = loss(wide(p), t)
        return each_example(losses) if mean else jnp.sum(losses, range(1, losses.ndim)), (p, t)

    def backward(res: tuple) -> Float[Array, "m *n"]:
        p, t = res
        dp = dloss(wide(p), t)
        return (dp / positions(dp) if mean else dp).astype(p.dtype)

    return Loss(forward, backward, name, check)


def binary_cross_entropy(from_logits: bool = False) -> Loss:
    """Cross-entropy of a yes or no, on the sigmoid's output or on what goes into it.

        on y_hat    l = -[y log y_hat + (1 - y) log(1 - y_hat)]    dy_hat = (y_hat - y) / (y_hat (1 - y_hat))
        on logits   l = log(1 + e^z) - z y                         dz = sigma(z) - y

    On y_hat, the logarithms are taken no nearer to 0 and 1 than the dtype's eps: beyond, the loss is flat and its
    derivative 0. Where a sigmoid may saturate, give the logits instead: they are exact everywhere.

    Shapes: y_hat or z, and y in [0, 1] (m, ...); l (m,), the mean over an example's outputs; saved both.
    Source: the document, section 4.3.
    Raises: ValueError for a target of another shape, and, outside jit, for a target or y_hat outside [0, 1].
    """

    def check(p, t):
        check_unit_interval(name, "target", t)
        if not from_logits:
            check_unit_interval(name, "prediction", p, "; for logits: binary_cross_entropy(from_logits=True)")

    def inside(y_hat):
        eps = jnp.finfo(y_hat.dtype).eps
        return jnp.clip(y_hat, eps, 1 - eps)

    def loss(y_hat, y):
        return -(y * jnp.log(inside(y_hat)) + (1 - y) * jnp.log1p(-inside(y_hat)))

    def dloss(y_hat, y):
        p = inside(y_hat)
        return jnp.where(p == y_hat, (p - y) / (p * (1 - p)), 0)

    def loss_of_logits(z, y):
        return jax.nn.softplus(z) - z * y

    def dloss_of_logits(z, y):
        return jax.nn.sigmoid(z) - y

    name = "binary_cross_entropy"
    if from_logits:
        return elementwise(name, loss_of_logits, dloss_of_logits, True, check)
    return elementwise(name, loss, dloss, True, check)


def mean_squared_error() -> Loss:
    """The squared distance, as a mean over outputs.

        l = mean_j (p_j - t_j)^2      dp = 2 (p - t) / n

    Shapes: p, t (m, ...), n numbers an example; l (m,); saved both.
    Source: the document, section 2, names it.
    Raises: ValueError for a target of another shape; TypeError for a prediction that is not floating point.
    """
    return elementwise("mean_squared_error", lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t), True, accept)


def half_squared_error() -> Loss:
    """Half the squared distance, as a sum over outputs: the quadratic cost.

        l = 1/2 sum_j (p_j - t_j)^2      dp = p - t

    Shapes: p, t (m, ...); l (m,); saved both.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 1, the quadratic cost.
    Raises: ValueError for a target of another shape; TypeError for a prediction that is not floating point.
    """
    return elementwise("half_squared_error", lambda p, t: (p - t) ** 2 / 2, lambda p, t: p - t, False, accept)


def accept(p: Any, t: Any) -> None:
    """Any values will do."""
