"""What fit needs before its first step: batches and held-out data that fit the net and the loss, and compiled loops."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fnbp.arrays.checks import as_arrays
from fnbp.construction import once
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.sharding import over_data, sharded
from fnbp.training.data import Batches, Stream, Validation, is_stream
from fnbp.training.evaluation import batches, examples_of, figures, validation_of
from fnbp.training.loop import CAPACITY, Batching, compiled_loop, permutation
from fnbp.training.requests import arrays_of, check_augmented, check_data
from fnbp.training.sources import Passes, Rows
from fnbp.training.steps import Record
from fnbp.training.supply import Resident, Streamed, batches_at_once


class Request(NamedTuple):
    """What fit is to train, on what, and how."""

    net: Layer
    loss: Loss
    params: Any
    state: Any
    batches: Batches | Stream
    validation: Validation | None
    optimizer: optax.GradientTransformation
    key: jax.Array
    gradient: Callable
    record: Record
    checkpoint: Any


class Form(NamedTuple):
    """What a checkpoint knows of the data."""

    size: int
    drop_last: bool
    arrays: list[str]


def data_in(data: Batches | Stream | Validation | None) -> Any:
    """The arrays of data."""
    return None if data is None or isinstance(data, Stream) or is_stream(data.x) else (data.x, data.y)


def supply_of(request: Request) -> tuple[Resident | Streamed, Form]:
    """Where the batches come from, checked as far as they are there, and their form."""
    batches = request.batches
    if isinstance(batches, Stream):
        return streamed(request, batches.source(), batches.number)
    if batches.host:
        examples = examples_of("fit", (batches.x, batches.y))
        size = size_of(batches, examples)
        order = lambda epoch: np.asarray(order_of(request.key, epoch, examples))  # noqa: E731
        source = Rows(batches.x, batches.y, size, examples, batches.drop_last, order)
        return streamed(request, source, source.each)
    x, y = arrays_of("training data", batches.x, batches.y)
    examples = check_training("training data", request, x, y)
    size = size_of(batches, examples)
    partial = bool(examples % size) and not batches.drop_last
    batching = Batching(size, examples // size + partial, partial, batches.augment)
    run, number = loop_of(request, batching), batching.number
    return Resident(run, number, x, y, examples), Form(size, batches.drop_last, forms((x, y)))


def streamed(request: Request, source: Passes | Rows, number: int | None) -> tuple[Streamed, Form]:
    """Batches of a source, the first of them checked."""
    first = source.peek()
    x, y = as_arrays("fit", "batch 0: x", first.x), as_arrays("fit", "batch 0: y", first.y)
    size = check_training("batch 0", request, x, y)
    loops = tuple(loop_of(request, Batching(size, None, partial, request.batches.augment)) for partial in (False, True))
    drop_last = isinstance(request.batches, Batches) and request.batches.drop_last
    place = over_data("fit", request.params, size)
    made = Streamed((loops[0], loops[1]), number, source, batches_at_once((first.x, first.y)), place)
    return made, Form(size, drop_last, forms((x, y)))


def loop_of(request: Request, batching: Batching) -> Callable:
    """The compiled loop, of an equal request before if there was one."""
    net, loss, params, *_, optimizer, _, gradient, record, _ = request
    batching = batching._replace(place=over_data("fit", params, batching.size))
    return once(compiled_loop, sharded(net, params), loss, gradient, optimizer, batching, record, CAPACITY)


def check_training(what: str, request: Request, x: Any, y: Any) -> int:
    """How many examples there are, which fit the net and the loss."""
    net, loss, params, state, batches, *_ = request
    given = what, net, loss, params, state, x, y, Context(request.key, train=True)
    if batches.augment is not None:
        return check_augmented(*given, batches.augment)
    return check_data(*given, whole=isinstance(batches, Batches) and not batches.host)


def size_of(batches: Batches, examples: int) -> int:
    """The size of a batch. ValueError if there are fewer examples."""
    if batches.size > examples:
        raise ValueError(f"fit: batch_size {batches.size} is more than the {examples} examples")
    return int(batches.size)


def evaluation_of(request: Request) -> Callable[[Any, Any], dict[str, Any]] | None:
    """(params, state) -> what is measured of the validation data, or None without."""
    net, loss, params, state, _, validation, *_ = request
    if validation is None:
        return None
    measures = validation.measures
    if validation.y is None and (is_stream(validation.x) or isinstance(validation.x, list)):
        each = functools.partial(batches, "fit: validation", validation.x, None, 1)
        return lambda params, state: figures(net, loss, measures, params, state, each())
    at, due = arrays_of("validation data", validation.x, validation.y)
    check_data("validation data", net, loss, params, state, at, due, Context())
    return validation_of(net, loss, measures, at, due)


permuted = jax.jit(permutation, static_argnums=2)


def order_of(key: jax.Array, epoch: int, examples: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return permuted(jax.random.split(key)[0], epoch, examples)


def forms(tree: Any) -> list[str]:
    """The dtype and shape of each array."""
    return [f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tree)]
