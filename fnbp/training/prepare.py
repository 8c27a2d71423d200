"""What fit needs before its first step: batches and held-out data that fit the net and the loss, and compiled loops."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fnbp.arrays.checks import as_arrays, describe
from fnbp.construction import once
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.sharding import over_data, sharded
from fnbp.training.data import Batches, Stream, Validation, is_stream
from fnbp.training.evaluation import batches, examples_of, figures, validation_of
from fnbp.training.loop import CAPACITY, Batching, compiled_loop, permutation
from fnbp.training.requests import arrays_of, check_augmented, check_data, check_examples
from fnbp.training.sources import Batch, Passes, Rows
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


def supply_of(request: Request, ahead: tuple[Batch, ...]) -> tuple[Resident | Streamed, Form]:
    """Where the batches come from, checked as far as they are there, and their form. ahead: those to begin with."""
    batches = request.batches
    if isinstance(batches, Stream):
        source = batches.source()
        source.tells = request.checkpoint is not None
        source.take(ahead)
        return streamed(request, source, batches.number)
    if batches.host:
        examples = examples_of("fit", (batches.x, batches.y))
        size = size_of(batches, examples)
        source = Rows(batches.x, batches.y, size, examples, batches.drop_last, orders(request.key, examples))
        return streamed(request, source, source.each)
    x, y = arrays_of("training data", batches.x, batches.y)
    examples = check_training("training data", x, y, request)
    size = size_of(batches, examples)
    partial = bool(examples % size) and not batches.drop_last
    batching = Batching(size, examples // size + partial, partial, batches.augment)
    run, number = loop_of(request, batching), batching.number
    return Resident(run, number, x, y, examples), Form(size, batches.drop_last, forms((x, y)))


def streamed(request: Request, source: Passes | Rows, number: int | None) -> tuple[Streamed, Form]:
    """Batches of a source, the first of them checked."""
    first = source.peek()
    x, y = as_arrays("fit", "batch 0: x", first.x), as_arrays("fit", "batch 0: y", first.y)
    size = check_training("batch 0", x, y, request)
    loops = tuple(loop_of(request, Batching(size, None, partial, request.batches.augment)) for partial in (False, True))
    drop_last = isinstance(request.batches, Batches) and request.batches.drop_last
    place = over_data("fit", request.params, size)
    check = functools.partial(check_training, request=request)
    made = Streamed((loops[0], loops[1]), number, source, batches_at_once((first.x, first.y)), place, check)
    return made, Form(size, drop_last, forms((x, y)))


def loop_of(request: Request, batching: Batching) -> Callable:
    """The compiled loop, of an equal request before if there was one."""
    net, loss, params, *_, optimizer, _, gradient, record, _ = request
    batching = batching._replace(place=over_data("fit", params, batching.size))
    return once(compiled_loop, sharded(net, params), loss, gradient, optimizer, batching, record, CAPACITY)


def check_training(what: str, x: Any, y: Any, request: Request) -> int:
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
        if hasattr(validation.x, "__next__"):
            raise TypeError(
                f"fit: validation is an iterator, {describe(validation.x)}, which begins only once; give a list, or "
                "what can be passed through again"
            )
        for x, y in held_out(validation.x):
            check_data("validation batch 0", net, loss, params, state, x, y, Context(), whole=False)
            break
        return lambda params, state: figures(net, loss, measures, params, state, held_out(validation.x))
    at, due = arrays_of("validation data", validation.x, validation.y)
    check_data("validation data", net, loss, params, state, at, due, Context())
    return validation_of(net, loss, measures, at, due)


def held_out(iterable: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Batches of held-out data. ValueError if one holds NaN or infinity."""
    for i, (x, y) in enumerate(batches("fit: validation", iterable, None, 1)):
        check_examples(f"validation batch {i}", x, y)
        yield x, y


permuted = jax.jit(permutation, static_argnums=2)


def order_of(key: jax.Array, epoch: int, examples: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return permuted(jax.random.split(key)[0], epoch, examples)


def orders(key: jax.Array, examples: int) -> Callable[[int], np.ndarray]:
    """The epoch -> order_of it, for a thread, which does not see the settings of jax that this one has made."""
    key = jax.random.split(key)[0]
    compiled = permuted.lower(key, np.int32(0), examples).compile()
    return lambda epoch: np.asarray(compiled(key, np.int32(epoch)))


def forms(tree: Any) -> list[str]:
    """The dtype and shape of each array."""
    return [f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tree)]
