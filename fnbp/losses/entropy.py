"""Cross-entropies of classes, and of a yes or no."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_floating, check_is
from fnbp.arrays.placement import by_example
from fnbp.arrays.sums import complement, like, log_total, wide
from fnbp.construction import constructor
from fnbp.losses.loss import Loss, of_pairs
from fnbp.losses.reduction import (
    check_options,
    check_weights,
    check_z_loss,
    counted,
    how_many,
    only,
    share,
    shares,
    summed_up,
)
from fnbp.losses.targets import (
    check_classes,
    check_distributions,
    check_labels,
    check_unit_interval,
    in_unit_interval,
    is_good,
    is_labels,
)

__all__ = ["binary_cross_entropy", "softmax_cross_entropy"]


@constructor
def softmax_cross_entropy(
    ignore_index: int | None = None,
    weights: Any = None,
    label_smoothing: float = 0.0,
    reduce: str = "examples",
    z_loss: float = 0.0,
) -> Loss:
    """Cross-entropy of softmax(a) and a target, where a is the prediction.

        l = (-sum_j v_j log y_hat_j + c z^2) / s      y_hat = softmax(a)      z = log sum_j e^a_j
        da = (y_hat sum v - v + 2 c z y_hat) / s
        v = w q      q = (1 - e) y + e / k      y a distribution, one-hot for a label; w weights, e label_smoothing
        Hessian = (diag(y_hat) - y_hat y_hat^T) sum v / s      roots sqrt(y_hat_j sum v / s) (e_j - y_hat), e_j one-hot

    Without options v = y, so da = (y_hat - y) / s. l is also summed over the s positions of an example that count; a
    position that does not count adds 0 to l and has da = 0.

    Shapes:   a (m, ..., k); y (m, ...) of integer labels below k, or (m, ..., k) of distributions (one-hot, soft);
              l (m,); saved y_hat (m, ..., k) and y.
    Options:  ignore_index: label of positions that do not count. weights: w, one for each class, (k,); PyTorch divides
              by their sum, fnbp by s. label_smoothing: e. reduce: "examples": s is of the example, so l is its mean; or
              "tokens": s is of the whole batch, divided by m, so that every position of the batch weighs the same.
              z_loss: c, which keeps z near 0; with it no roots of the Hessian are given.
    Source:   fnbp/README.md, B2 and B3; fnbp.backprop takes the 1/m of B2. label_smoothing: Szegedy et al. 2015,
              arXiv:1512.00567, section 7. z_loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    Raises:   TypeError if labels are not integers; ValueError if an option is out of range, a shape does not fit, or,
              outside jit, a label is outside 0..k-1 or a soft label is not a distribution. Under jit such a label makes
              the loss and the gradient NaN.
    """
    name = "softmax_cross_entropy"
    label_smoothing = check_options(name, ignore_index, label_smoothing, reduce)
    w = check_weights(name, "weights", weights)
    c = check_z_loss(name, z_loss)

    check = partial(check_against, name, w, ignore_index)

    def forward(a: Float[Array, "m *s k"], y, mask=None) -> tuple[Float[Array, " m"], tuple]:
        check(a, y, mask)
        counts = counted(mask, y, ignore_index) if is_labels(a, y) else mask
        a, y = only(counts, a), only(counts, y)
        M, r = log_total(wide(a))
        y_hat = softmax_of(wide(a), M, r)
        losses = cross_entropies(wide(a), y, weighed(y_hat, y, w, label_smoothing), M, r)
        z = M + jnp.log1p(r) if c else None
        losses = jnp.where(is_good(a, y), losses if z is None else losses + c * z[..., 0] ** 2, jnp.nan)
        at = shares(reduce, losses, counts)
        return summed_up(at, losses), (y_hat, r, y, at, like(a), z)

    def backward(res: tuple) -> Float[Array, "m *s k"]:
        y_hat, r, y, at, like_a, z = res
        v = weighed(y_hat, y, w, label_smoothing)
        da = by_example(minus_one_hot, y_hat, r, y) if v is None else minus(y_hat, r, v)
        da = jnp.where(is_good(y_hat, y)[..., None], da if z is None else da + 2 * c * z * y_hat, jnp.nan)
        return share(at, da).astype(like_a.dtype)

    def roots(res: tuple) -> Float[Array, "k m *s k"]:
        y_hat, _, y, at, like_a, _ = res
        return softmax_roots(y_hat, y, at, weighed(y_hat, y, w, label_smoothing)).astype(like_a.dtype)

    return Loss(forward, backward, name, check, True, positions_of(reduce, ignore_index), None if c else roots)


def check_against(name: str, w: np.ndarray | None, ignore_index: int | None, a: Any, y: Any, mask: Any = None) -> None:
    """Raise a TypeError or ValueError unless y holds labels or distributions for the prediction a."""
    check_floating(name, "prediction", a)
    check_classes(name, a, y, w)
    if is_labels(a, y):
        check_labels(name, y, a.shape[-1], counted(mask, y, ignore_index))
    else:
        check_distributions(name, y, mask)


def positions_of(reduce: str, ignore_index: int | None) -> Callable[..., Any] | None:
    """How many positions of a batch count, as a Loss says it; None if each loss is of its example."""

    def positions(a, y, mask):
        return how_many(counted(mask, y, ignore_index) if is_labels(a, y) else mask, a.shape[:-1])

    return positions if reduce == "tokens" else None


def weighed(y_hat: jax.Array, y: jax.Array, w: np.ndarray | None, e: float) -> jax.Array | None:
    """v = w q, q = (1 - e) y + e / k; None for labels without weights and smoothing."""
    k = y_hat.shape[-1]
    if is_labels(y_hat, y):
        if w is None and not e:
            return None
        y = hot(y, k)
    q = y.astype(y_hat.dtype)
    q = (1 - e) * q + e / k if e else q
    return q if w is None else jnp.asarray(w, q.dtype) * q


def softmax_of(a: jax.Array, M: jax.Array, r: jax.Array) -> jax.Array:
    """softmax(a), with the M and r of log_total(a)."""
    # without the barrier the compiler keeps every e^(a - M) of r's sum for this line
    return jnp.exp(a - jax.lax.optimization_barrier(M)) / (1 + r)


def minus(y_hat: jax.Array, r: jax.Array, v: jax.Array) -> jax.Array:
    """y_hat sum v - v, in a form that does not cancel if both are near 1."""
    return y_hat * (jnp.sum(v, -1, keepdims=True) - v) - v * complement(y_hat, r)


def cross_entropies(a: jax.Array, y: jax.Array, v: jax.Array | None, M: jax.Array, r: jax.Array) -> jax.Array:
    """The loss of each position, with the M and r of log_total(a): of the label y, or of v."""
    if v is None:
        return jnp.log1p(r[..., 0]) - (by_example(at_label, a, y) - M[..., 0])
    return cross_entropy(v, (a - M) - jnp.log1p(r))


def cross_entropy(v: jax.Array, log_y_hat: jax.Array) -> jax.Array:
    """-sum_j v_j log y_hat_j, with 0 log 0 = 0."""
    return -jnp.sum(jnp.where(v > 0, v * log_y_hat, 0), -1)


def softmax_roots(y_hat: jax.Array, y: jax.Array, at: Any, v: jax.Array | None) -> jax.Array:
    """r_j = sqrt(y_hat_j weight) (e_j - y_hat), with sum_j r_j r_j^T = weight (diag(y_hat) - y_hat y_hat^T).

    The weight is the sum of v, or 1 for None, by shares(at).
    """
    weight = jnp.ones(y_hat.shape[:-1], y_hat.dtype) if v is None else jnp.sum(v, -1)
    weight = share(at, jnp.where(is_good(y_hat, y), weight, jnp.nan)[..., None])
    e = jnp.eye(y_hat.shape[-1], dtype=y_hat.dtype)
    return jnp.moveaxis(jnp.sqrt(y_hat * weight)[..., None] * (e - y_hat[..., None, :]), -2, 0)


def hot(y: jax.Array, k: int) -> jax.Array:
    """True at the label: (..., k). False everywhere for a label outside 0..k-1."""
    return y.astype(int)[..., None] == jnp.arange(k)


def minus_one_hot(y_hat: jax.Array, r: jax.Array, y: jax.Array) -> jax.Array:
    """y_hat - one_hot(y), which changes one number of each position, or none for a label outside 0..k-1."""
    k = y_hat.shape[-1]
    label = jnp.where(y < 0, k, y.astype(int)).ravel()
    set_in = jax.vmap(lambda row, r, i: row.at[i].set(-complement(row.at[i].get(mode="clip"), r[0]), mode="drop"))
    return set_in(y_hat.reshape(-1, k), r.reshape(-1, 1), label).reshape(y_hat.shape)


def at_label(a: jax.Array, y: jax.Array) -> jax.Array:
    """a[..., y]; NaN for a label outside 0..k-1, also for a negative one."""
    y = jnp.where(y < 0, a.shape[-1], y.astype(int))
    return jnp.take_along_axis(a, y[..., None], -1, mode="fill", fill_value=jnp.nan)[..., 0]


@constructor
def binary_cross_entropy(
    from_logits: bool = False,
    pos_weight: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduce: str = "examples",
) -> Loss:
    """Cross-entropy of a yes or no, where the prediction is a probability y_hat or a logit z.

        y_hat    l = -[w y log y_hat + (1 - y) log(1 - y_hat)] / s    dy_hat = [(1 - y) / (1 - y_hat) - w y / y_hat] / s
        logits   l = [w y log(1 + e^-z) + (1 - y) log(1 + e^z)] / s   dz = [(1 - y) sigma(z) - w y sigma(-z)] / s
        Hessian  [(1 - y) / (1 - y_hat)^2 + w y / y_hat^2] / s; of logits (1 - y + w y) sigma(z) sigma(-z) / s

    w is pos_weight, 1 by default. l is summed over the s outputs of an example that count. The logarithms of y_hat and
    1 - y_hat are taken of at least the eps of the dtype: nearer to 0 and 1 the loss is flat and its derivative 0. Give
    logits if a sigmoid may saturate: they are exact everywhere.

    Shapes:  y_hat or z, and y in [0, 1] (m, ...); l (m,); saved both.
    Options: from_logits: True if the prediction is z. pos_weight: as in PyTorch, a number, or one for each output,
             (n,). label_smoothing: e; y becomes (1 - e) y + e / 2. ignore_index: label of outputs that do not count.
             reduce: as in softmax_cross_entropy.
    Source:  fnbp/README.md, the worked example.
    Raises:  ValueError if an option is out of range, the target has another shape, or, outside jit, a target or y_hat
             is outside [0, 1]. Under jit such a number makes the loss and the gradient NaN.
    """
    name = "binary_cross_entropy"
    check_is(name, "from_logits", from_logits, bool)
    label_smoothing = check_options(name, ignore_index, label_smoothing, reduce)
    given = check_weights(name, "pos_weight", pos_weight)

    def check(p, t, counts):
        check_unit_interval(name, "target", t, counts)
        if not from_logits:
            hint = "; for logits: binary_cross_entropy(from_logits=True)"
            check_unit_interval(name, "prediction", p, counts, hint)
        if given is not None and given.ndim and given.shape != p.shape[-1:]:
            raise ValueError(f"{name}: pos_weight of shape {given.shape} does not fit a prediction of shape {p.shape}")

    def yes_and_no(p, t):
        """Return w y and 1 - y, smoothed; NaN for a target or y_hat outside [0, 1]."""
        y = (1 - label_smoothing) * t + label_smoothing / 2 if label_smoothing else t
        good = in_unit_interval(t) if from_logits else in_unit_interval(t) & in_unit_interval(p)
        y = jnp.where(good, y, jnp.nan).astype(p.dtype)
        return y if given is None else jnp.asarray(given, p.dtype) * y, 1 - y

    formulas = of_logits(yes_and_no) if from_logits else of_probabilities(yes_and_no)
    return of_pairs(name, *formulas[:2], reduce, check, ignore_index, formulas[2])


def of_probabilities(yes_and_no: Callable) -> tuple[Callable, Callable, Callable]:
    """The loss of each output, and its derivatives by y_hat; flat below eps and above 1 - eps."""

    def inside(y_hat):
        eps = jnp.finfo(y_hat.dtype).eps
        return jnp.clip(y_hat, eps, 1 - eps)

    def loss(y_hat, t):
        yes, no = yes_and_no(y_hat, t)
        return -(yes * jnp.log(inside(y_hat)) + no * jnp.log1p(-inside(y_hat)))

    def dloss(y_hat, t):
        (yes, no), p = yes_and_no(y_hat, t), inside(y_hat)
        return jnp.where(p == y_hat, no / (1 - p) - yes / p, 0 * (yes + no))

    def d2loss(y_hat, t):
        (yes, no), p = yes_and_no(y_hat, t), inside(y_hat)
        return jnp.where(p == y_hat, no / (1 - p) ** 2 + yes / p**2, 0 * (yes + no))

    return loss, dloss, d2loss


def of_logits(yes_and_no: Callable) -> tuple[Callable, Callable, Callable]:
    """The loss of each output, and its derivatives by z."""

    def loss(z, t):
        yes, no = yes_and_no(z, t)
        return yes * jax.nn.softplus(-z) + no * jax.nn.softplus(z)

    def dloss(z, t):
        yes, no = yes_and_no(z, t)
        return no * jax.nn.sigmoid(z) - yes * jax.nn.sigmoid(-z)

    def d2loss(z, t):
        yes, no = yes_and_no(z, t)
        return (yes + no) * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    return loss, dloss, d2loss
