"""Figures of a trained net on data: accuracy and others, as sums over examples that batches add to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import check_name, check_number, check_size, describe
from fnbp.construction import Made, call_of, constructor, hashed, is_alike, is_other, itself, reduced
from fnbp.losses.reduction import check_ignored, check_reduce, counted, shares, summed_up
from fnbp.losses.targets import is_labels

MOST_CLASSES = 46_340  # of a confusion table: its places are counted in int32

__all__ = ["Metric", "accuracy", "confusion", "perplexity", "top_k"]


def mean(total: Any, examples: int, loss: float) -> Any:
    """total / examples."""
    return jax.tree.map(lambda a: a / examples, total)


class Metric(NamedTuple):
    """A figure of predictions, from sums over examples.

        total   (prediction, target, losses, mask) -> a tree of sums over the examples of a batch
        finish  (total over all batches, number of examples, mean loss) -> the figure; by default the mean

    losses (m,) are those of the net's Loss; mask is that of the prediction's positions, or None.
    """

    total: Callable[[Any, Any, Any, Any], Any]
    finish: Callable[[Any, int, float], Any] = mean
    name: str = "metric"
    made: Made | None = None

    __eq__, __ne__, __hash__ = is_alike, is_other, hashed
    __repr__, __reduce__ = call_of, reduced
    __copy__ = __deepcopy__ = itself


@constructor
def metric_of(f: Callable[[Any, Any], Any]) -> Metric:
    """The mean over examples of f(prediction, target) -> (m, ...)."""
    name = getattr(f, "__name__", type(f).__name__)

    def total(prediction, target, losses, mask):
        values = f(prediction, target)
        if jnp.shape(values)[:1] != losses.shape:
            raise ValueError(
                f"{name}: a metric must return one value an example, {losses.shape}, got shape {jnp.shape(values)}: "
                "the mean over the examples is taken later"
            )
        return jnp.sum(values, 0, dtype=jnp.result_type(values, jnp.float32))

    return Metric(total, name=name)


def as_metrics(caller: str, metrics: Any) -> dict[str, Metric]:
    """Metrics by name, of a dict, of several in a row, or of one; TypeError if one is neither a Metric nor a function.

    Raises: ValueError if two have one name, or one is called "loss".
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        several = metrics if isinstance(metrics, (tuple, list)) and not isinstance(metrics, Metric) else (metrics,)
        pairs = [(getattr(one, "name", None) or getattr(one, "__name__", ""), one) for one in several]
    else:
        pairs = list(metrics.items())
    found: dict[str, Metric] = {}
    for name, one in pairs:
        if not isinstance(one, Metric) and (not callable(one) or hasattr(one, "backward")):
            raise TypeError(
                f"{caller}: a metric must be a Metric, such as fnbp.accuracy(), or a function (prediction, target) -> "
                f"(m,), got {describe(one)}"
            )
        if one in (accuracy, confusion, perplexity, top_k):
            raise TypeError(f"{caller}: call the metric: {getattr(one, '__name__', name)}()")
        check_name(caller, name)
        if name in found or name in ("loss", "step"):
            raise ValueError(f'{caller}: two metrics are called "{name}"; name them: metrics={{"name": metric}}')
        found[name] = one if isinstance(one, Metric) else metric_of(one)
    return found


@constructor
def accuracy(threshold: float | None = None, ignore_index: int | None = None, reduce: str = "examples") -> Metric:
    """The fraction of right predictions.

        right = [argmax_j p_j = t]      with a threshold: right = [(p > threshold) = (t > 1/2)], number by number

    A prediction that holds NaN is wrong. An example without positions that count is left out.

    Shapes:  p (m, ..., k), t (m, ...) of labels or (m, ..., k) of distributions; with a threshold t is as p.
    Options: threshold: for predictions of yes or no: 0 for scores, 0.5 for probabilities. ignore_index: label of
             positions that do not count. reduce: "examples": the mean over examples of the fraction of their positions;
             "tokens": every position weighs the same.
    Raises:  ValueError or TypeError if an option is out of range, or a target does not fit.
    """
    check_ignored("accuracy", ignore_index)
    check_reduce("accuracy", reduce)
    if threshold is not None:
        check_number("accuracy", "threshold", threshold)

    def right(p, t):
        if threshold is not None:
            if jnp.shape(t) != p.shape:
                raise ValueError(f"accuracy: target has shape {jnp.shape(t)}, prediction {p.shape}; a threshold needs "
                                 "the same")  # fmt: skip
            return ((p > threshold) == (t > 0.5)) & ~jnp.isnan(p)
        label = labels_of("accuracy", p, t)
        return (jnp.argmax(p, -1) == label) & ~jnp.isnan(p).any(-1)

    return hits("accuracy", right, ignore_index, reduce, by_number=threshold is not None)


@constructor
def top_k(k: int, ignore_index: int | None = None, reduce: str = "examples") -> Metric:
    """The fraction of predictions whose k largest scores hold the label.

        right = [#{j: p_j > p_t, or p_j = p_t and j < t} < k]

    Shapes:  p (m, ..., n), t (m, ...) of labels or (m, ..., n) of distributions.
    Options: ignore_index, reduce: as in accuracy.
    Raises:  ValueError if k is below 1, or above the number of classes; as accuracy.
    """
    check_size("top_k", "k", k)
    check_ignored("top_k", ignore_index)
    check_reduce("top_k", reduce)

    def right(p, t):
        n, label = p.shape[-1], labels_of("top_k", p, t)
        if k > n:
            raise ValueError(f"top_k: k is {k}, and predictions of shape {p.shape} have {n} classes")
        of_label = jnp.take_along_axis(p, label[..., None], -1, mode="clip")
        ahead = ~(p <= of_label) | ((p == of_label) & (jnp.arange(n) < label[..., None]))  # so is NaN
        return (jnp.sum(ahead, -1) < k) & (label >= 0) & (label < n)

    return hits(f"top_{k}", right, ignore_index, reduce)


def hits(
    name: str, right: Callable[[Any, Any], Any], ignore_index: int | None, reduce: str, by_number: bool = False
) -> Metric:
    """The fraction of positions that are right, of those that count.

    by_number: targets are shaped as predictions, and are labels all the same.
    """

    def total(p, t, losses, mask):
        hit = right(p, t).astype(jnp.float32)
        counts = whole(counted(mask, t, ignore_index) if by_number or t.ndim < p.ndim else mask, hit.shape)
        if reduce == "tokens":
            return jnp.sum(hit * counts), jnp.sum(counts, dtype=jnp.float32)
        some = counts.reshape(counts.shape[0], -1).any(-1)
        return jnp.sum(summed_up(shares("examples", hit, counts), hit)), jnp.sum(some, dtype=jnp.float32)

    return Metric(total, ratio, name)


def whole(counts: Any, shape: tuple[int, ...]) -> jax.Array:
    """True where a position counts, in that shape."""
    if counts is None:
        return jnp.ones(shape, bool)
    return jnp.broadcast_to(counts.reshape(*counts.shape, *[1] * (len(shape) - counts.ndim)), shape)


def ratio(total: Any, examples: int, loss: float) -> Any:
    """What is right / what counts; NaN if nothing counts."""
    right, counts = total
    return right / jnp.where(counts > 0, counts, jnp.nan)


@constructor
def perplexity() -> Metric:
    """e to the mean loss: of a cross-entropy, between how many equally likely tokens a net chooses.

        exp(mean l)

    Shapes: l (m,), the losses of the net's Loss.
    """
    return Metric(lambda p, t, losses, mask: (), lambda total, m, loss: jnp.exp(loss), "perplexity")


@constructor
def confusion(k: int, ignore_index: int | None = None) -> Metric:
    """How often each label was predicted as each.

        C[i, j] = #{positions with label i and argmax p = j}

    A prediction that holds NaN stands in no column, a label outside 0..k-1 in no row.

    Shapes:  p (m, ..., k), t (m, ...) of labels or (m, ..., k) of distributions; C (k, k).
    Options: ignore_index: label of positions that do not count.
    Raises:  ValueError if k is below 1 or above 46,340, or predictions have another number of classes.
    """
    check_size("confusion", "k", k)
    check_ignored("confusion", ignore_index)
    k = int(k)
    if k > MOST_CLASSES:
        raise ValueError(f"confusion: k must be at most {MOST_CLASSES}, got {k}: the table has k x k entries")

    def total(p, t, losses, mask):
        if p.shape[-1] != k:
            raise ValueError(f"confusion: predictions of shape {p.shape} have {p.shape[-1]} classes, not {k}")
        label, came = labels_of("confusion", p, t), jnp.argmax(p, -1)
        counts = whole(counted(mask, t, ignore_index) if t.ndim < p.ndim else mask, label.shape)
        counts &= ~jnp.isnan(p).any(-1)
        at = jnp.where(counts & (label >= 0) & (label < k), label * k + came, k * k)
        return jnp.zeros(k * k, int).at[at.ravel()].add(1, mode="drop").reshape(k, k)

    return Metric(total, lambda total, m, loss: total, "confusion")


def labels_of(name: str, p: Any, t: Any) -> Any:
    """The label of each position, of labels or distributions. ValueError or TypeError if they do not fit p."""
    if p.ndim < 2 or jnp.shape(t) not in (p.shape[:-1], p.shape):
        raise ValueError(
            f"{name}: target of shape {jnp.shape(t)} does not fit predictions of shape {p.shape}: expected labels "
            f"{p.shape[:-1]} or distributions {p.shape}"
        )
    if not is_labels(p, t):
        return jnp.argmax(t, -1)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {describe(t)}")
    return t.astype(int)
