"""A net at work: predictions batch by batch, and figures of them on held-out data."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnbp.arrays.checks import as_arrays, check_is, check_size, describe
from fnbp.arrays.placement import placement, summed
from fnbp.arrays.sums import wide
from fnbp.construction import once
from fnbp.layer import Context, Layer, mask_behind, mixing
from fnbp.losses.loss import Loss, check_target, losses_of
from fnbp.losses.metrics import Metric, as_metrics
from fnbp.processes import brought, is_shared
from fnbp.sharding import predicted

__all__ = ["evaluate", "predict"]

BATCH = 1024  # examples at once


def predict(net: Layer, params: Any, state: Any, x: Any, *, batch_size: int = BATCH) -> Any:
    """Apply a net to many examples, batch_size at once, as at inference.

        y = net.forward(params, state, x, Context())      but in parts, each on the device

    x may be larger than the device's memory, a NumPy array mapped from a file for example; so may y, which comes back
    as NumPy arrays.

    Shapes: x (n, ...), or a tree of such arrays; y (n, ...).
    Raises: TypeError if net is not a Layer, or x holds what is no array; ValueError if batch_size is below 1, x has no
            example, or does not fit.
    """
    check_is("predict", "net", net, Layer)
    check_size("predict", "batch_size", batch_size)
    check_outside("predict", params, state, x)
    n = examples_of("predict", x)
    size = at_once(x, n, batch_size)
    params = as_arrays("predict", "params", params)
    run = once(predictor, net)
    parts, check = [], Checker("predict", net, params, state)
    for part in cut(x, n, size):
        part = as_arrays("predict", "x", part)
        check(part)
        parts.append(brought(run(params, state, part)))
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


def check_outside(name: str, *trees: Any) -> None:
    """TypeError under jit, where there are no values to bring back."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise TypeError(f"{name}: it runs batch by batch, outside jit and vmap; inside them call fnbp.apply")


def predictor(net: Layer) -> Callable[..., Any]:
    """(params, state, x) -> y, compiled."""
    return jax.jit(lambda params, state, x: predicted(net, params, state, x, Context()))


def evaluate(
    net: Layer,
    loss: Loss,
    params: Any,
    state: Any,
    x: Any,
    y: Any = None,
    *,
    metrics: Any = None,
    batch_size: int = BATCH,
) -> dict[str, Any]:
    """Measure a net on data, as at inference: the mean loss, and more.

        {"loss": J, "accuracy": ...} = evaluate(net, loss, params, state, x, y, metrics=fnbp.accuracy())

    Each example counts once, in the last batch too.

    Options: x, y: arrays, of NumPy too, mapped from a file for example; or x an iterable of batches (x, y), without y.
             metrics: a Metric, several in a row, or a dict of them: accuracy, top_k, perplexity, confusion, or a
             function (prediction, target) -> (m,), whose mean is taken. batch_size: how many at once, of arrays.
    Raises:  ValueError or TypeError if data do not fit the net or the loss, there is no batch, or a metric is none.
    """
    check_is("evaluate", "net", net, Layer)
    check_is("evaluate", "loss", loss, Loss)
    check_size("evaluate", "batch_size", batch_size)
    check_outside("evaluate", params, state, None if y is None else (x, y))
    wanted = as_metrics("evaluate", metrics)
    params = as_arrays("evaluate", "params", params)
    return figures(net, loss, wanted, params, state, batches("evaluate", x, y, batch_size))


def figures(
    net: Layer, loss: Loss, metrics: dict[str, Metric], params: Any, state: Any, data: Iterator[tuple[Any, Any]]
) -> dict[str, Any]:
    """The mean loss and the metrics over batches. ValueError if there is no batch."""
    run = once(adder, net, loss, tuple(metrics.values()), None)
    totals, examples, check = None, 0, Checker("evaluate", net, params, state)
    for x, y in data:
        check_target(loss, check(x), y, mask_behind(net, x, None))  # outside jit, where labels have values
        here = run(params, state, x, y)
        totals = here if totals is None else jax.tree.map(jnp.add, totals, here)
        examples += jax.tree.leaves(x)[0].shape[0]
    if totals is None:
        raise ValueError("evaluate: there is no batch to measure")
    return finished(metrics, totals, examples)


def finished(metrics: dict[str, Metric], totals: Any, examples: int) -> dict[str, Any]:
    """The mean loss and the metrics, of their sums over all examples."""
    J, weights, *others = jax.device_get(totals)
    loss = float(J / weights) if weights else float("nan")
    found = {"loss": loss}
    for (name, metric), total in zip(metrics.items(), others, strict=True):
        found[name] = plain(metric.finish(total, examples, loss))
    return found


def validation_of(
    net: Layer, loss: Loss, metrics: dict[str, Metric], x: Any, y: Any
) -> Callable[[Any, Any], dict[str, Any]]:
    """(params, state) -> the mean loss and the metrics over arrays on the device, in one compiled call."""
    run, examples = once(adder, net, loss, tuple(metrics.values()), BATCH), examples_of("fit", x)
    return lambda params, state: finished(metrics, run(params, state, x, y), examples)


class Checker:
    """Looks at batches outside jit, where layers see the values of x: tokens, lengths."""

    def __init__(self, name: str, net: Layer, params: Any, state: Any):
        self.name, self.net, self.params, self.state = name, net, params, state
        self.seen: dict[str, Any] = {}

    def __call__(self, x: Any) -> Any:
        """The shape of the prediction, without computing it. TypeError if it depends on how x is cut into batches."""
        if self.seen and (path := mixing(self.net, Context())):
            raise TypeError(
                f"{self.name}: {path} mixes the examples, so what it returns depends on the batch; give all in one, by "
                "batch_size"
            )
        form = str(jax.tree.map(jax.typeof, x))
        if form not in self.seen or any(jnp.issubdtype(a.dtype, jnp.integer) for a in jax.tree.leaves(x)):
            forward = lambda params: predicted(self.net, params, self.state, x, Context())  # noqa: E731
            self.seen[form] = jax.eval_shape(forward, self.params)
        return self.seen[form]


def plain(figure: Any) -> Any:
    """A figure as Python and NumPy have it: a number, or an array."""
    return jax.tree.map(lambda a: np.asarray(a).item() if np.ndim(a) == 0 else np.asarray(a), figure)


def adder(net: Layer, loss: Loss, metrics: tuple[Metric, ...], batch: int | None) -> Callable[..., Any]:
    """(params, state, x, y) -> the mean loss times its weight, that weight, and the sums of each metric; compiled.

    The weight is the number of examples, or, for a loss that is a share of the whole batch, of positions.

    batch: how many examples at once; None: all.
    """

    def sums(params, state, x, y):
        prediction = net.forward(params, state, x, Context())[0]
        mask = mask_behind(net, x, None)
        losses, _ = losses_of(loss, prediction, y, mask)
        m = losses.shape[0]
        weight = jnp.asarray(m if loss.positions is None else loss.positions(prediction, y, mask), jnp.float32)
        totals = (metric.total(prediction, y, losses, mask) for metric in metrics)
        return jax.tree.map(widened, (jnp.mean(wide(losses)) * weight, weight, *totals))

    def in_batches(params, state, x, y):
        examples = jax.tree.leaves(x)[0].shape[0]
        full = examples // batch * batch
        parts = []
        if full:
            whole = jax.tree.map(lambda a: a[:full].reshape(-1, batch, *a.shape[1:]), (x, y))
            each = jax.lax.map(lambda xy: sums(params, state, *xy), whole)
            parts.append(jax.tree.map(lambda a: jnp.sum(a, 0), each))
        if full < examples:
            parts.append(sums(params, state, *jax.tree.map(lambda a: a[full:], (x, y))))
        return jax.tree.map(lambda *each: sum(each[1:], each[0]), *parts)

    return jax.jit(functools.partial(summed, sums if batch is None else in_batches))


def widened(a: Any) -> Any:
    """A sum in at least float32: sums of batches add up."""
    return wide(a) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a


# --- batches ---


def batches(name: str, x: Any, y: Any, size: int) -> Iterator[tuple[Any, Any]]:
    """Pairs (x, y) of at most size examples, as JAX arrays."""
    if y is None and hasattr(x, "__iter__") and not hasattr(x, "dtype") and not isinstance(x, (tuple, dict)):
        for i, pair in enumerate(x):
            yield of_pair(name, i, pair)
        return
    if y is None:
        raise ValueError(f"{name}: y is missing; give x and y, or as x an iterable of pairs (x, y); got {describe(x)}")
    n = examples_of(name, (x, y))
    for part in cut((x, y), n, at_once((x, y), n, size)):
        yield as_arrays(name, "x", part[0]), as_arrays(name, "y", part[1])


def at_once(tree: Any, n: int, size: int) -> int:
    """How many examples at once: all n if arrays are split over devices, since they cannot be cut where none ends."""
    arrays = [a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]
    return n if any(placement(a) is not None or is_shared(a) for a in arrays) else size


def of_pair(name: str, i: int, pair: Any) -> tuple[Any, Any]:
    """A batch of an iterable. TypeError if it is not a pair of arrays."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: batch {i} must be a pair (x, y), got {describe(pair)}")
    examples_of(f"{name}: batch {i}", tuple(pair))
    return as_arrays(name, "x", pair[0]), as_arrays(name, "y", pair[1])


def examples_of(name: str, tree: Any) -> int:
    """The number of examples. ValueError if there is none, or arrays differ; TypeError if a leaf is no array."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves or [tree]:
        if not hasattr(leaf, "shape") or not leaf.shape:
            raise TypeError(f"{name}: expected arrays with the examples as first axis, got {describe(leaf)}")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"{name}: expected equally many examples, at least 1; got {sorted(sizes)}")
    return sizes.pop()


def cut(tree: Any, n: int, size: int) -> Iterator[Any]:
    """Parts of at most size examples."""
    for start in range(0, n, size):
        yield jax.tree.map(lambda a, start=start: a[start : start + size], tree)
