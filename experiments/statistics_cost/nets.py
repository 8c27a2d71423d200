"""The nets that statistics are timed on, and random data for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import fnbp

LOSS = fnbp.softmax_cross_entropy()


class Net(NamedTuple):
    """A net, and the function that draws its batches: (rng, m) -> x, y. m: the examples of a batch."""

    layer: fnbp.Layer
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    m: int


class Case(NamedTuple):
    """A net with parameters, a batch and a query of one example: what every statistic is a function of.

    limit: the norm that half of the examples exceed.
    """

    net: fnbp.Layer
    args: tuple[Any, ...]  # params, state, x, y, (x of the query, y of the query)
    limit: float


def labelled(*shape: int) -> Callable:
    """Normal numbers of a shape, with labels from 0 to 9."""

    def draw(rng, m):
        return rng.standard_normal((m, *shape)).astype(np.float32), rng.integers(0, 10, m).astype(np.int32)

    return draw


def letters(block: int, vocabulary: int) -> Callable:
    """Random tokens, and the token after each."""

    def draw(rng, m):
        text = rng.integers(0, vocabulary, (m, block + 1)).astype(np.int32)
        return text[:, :-1], text[:, 1:]

    return draw


NETS = {
    "mlp": Net(fnbp.models.mlp(1000, 500, 100, 10), labelled(784), 128),
    "lenet": Net(fnbp.models.lenet(), labelled(28, 28, 1), 64),
    "lstm": Net(fnbp.models.lstm_classifier(128, 10), labelled(28, 28), 64),
    "gpt": Net(fnbp.models.gpt(65, 64, 4, 4, 128), letters(64, 65), 16),
}


def case_of(net: Net, seed: int, dtype: Any = np.float32) -> Case:
    """A net with parameters and data that are drawn."""
    rng = np.random.default_rng(seed)
    x, y, *query = (a if a.dtype == np.int32 else a.astype(dtype) for m in (net.m, 1) for a in net.draw(rng, m))
    params, state = jax.jit(net.layer.init)(jax.random.key(seed), x)
    norms = jax.jit(fnbp.per_example_norms(net.layer, LOSS))(params, state, x, y)
    return Case(net.layer, jax.device_put((params, state, x, y, tuple(query))), float(np.median(norms)))
