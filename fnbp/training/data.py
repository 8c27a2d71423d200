"""What fit trains on and what it measures: data, and how they are taken."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from fnbp.arrays.checks import check_is, check_size, describe
from fnbp.losses.metrics import Metric, as_metrics
from fnbp.training.sources import Passes

ENDLESS = 2**31 - 1  # what repeats without end may say a length as large as this

__all__ = ["Batches", "Stream", "Validation"]


@dataclass(frozen=True)
class Batches:
    """Training data for fnbp.fit, and how batches are taken of them.

        fit(net, loss, params, state, Batches(x, y, 128, augment=flipped), ...)

    x, y       arrays, or trees of arrays, with the examples as first axis
    size       how many examples a batch has
    drop_last  leave out, in each epoch, what does not fill the last batch. By default examples from the epoch's front
               fill it up, which do not count in the loss: each example counts once.
    augment    (key, (x, y)) -> (x, y), applied to each batch on the device, with another key each time
    host       leave x and y, NumPy arrays or arrays mapped from a file, where they are, and bring batch after batch to
               the device. What is computed is the same.
    """

    x: Any
    y: Any
    size: int
    drop_last: bool = False
    augment: Callable[[jax.Array, Any], Any] | None = None
    host: bool = False


@dataclass(frozen=True)
class Stream:
    """Training data for fnbp.fit that come batch by batch, from any loader.

        fit(net, loss, params, state, Stream(loader), steps=1000, ...)

    batches  an iterable of pairs (x, y) of arrays, with the examples as first axis; or a function of the epoch, 0, 1,
             ..., that returns one. Each pass through it is an epoch. All batches have one shape; one with fewer
             examples is filled up with examples that do not count.
    epoch    how many batches an epoch has. By default len(batches); without either, fit knows no epochs.
    augment  as in Batches

    Batches are drawn in a thread, ahead of the training. A fit that goes on, from an earlier Fit or a checkpoint,
    passes over the batches that were used; an iterator with get_state and set_state, as those of grain, is set instead.
    So a loader must yield the same batches again: give one that shuffles anew in each pass as a function of the epoch.
    An iterator begins only once. With resume= it goes on where it is, behind the batches in Fit.ahead; with checkpoint=
    it must be a new one, at its beginning.
    """

    batches: Iterable[Any] | Callable[[int], Iterable[Any]]
    epoch: int | None = None
    augment: Callable[[jax.Array, Any], Any] | None = None

    def source(self) -> Passes:
        """The batches, from their beginning."""
        each = length(self.batches)
        return Passes(self.batches, self.epoch if each is None and callable(self.batches) else each)

    @property
    def number(self) -> int | None:
        """How many batches an epoch has, if that is known."""
        return length(self.batches) if self.epoch is None else self.epoch


@dataclass(frozen=True)
class Validation:
    """Held-out data for fnbp.fit, measured after each epoch and at the end.

        fit(..., validation=Validation(x, y, fnbp.accuracy()))

    x, y     arrays, or trees of arrays, with the examples as first axis; or x is an iterable of batches (x, y), passed
             through anew each time, without y: no iterator
    metrics  what is measured beside the mean loss, as in fnbp.evaluate
    """

    x: Any
    y: Any = None
    metrics: Any = None

    @property
    def measures(self) -> dict[str, Metric]:
        """The metrics by name."""
        return as_metrics("fit", self.metrics)


def length(batches: Any) -> int | None:
    """How many batches there are; None if that is not known, or without end."""
    try:
        n = len(batches)
    except TypeError:
        return None
    except OverflowError:  # larger than any
        return None
    return n if 0 < n < ENDLESS else None


def is_stream(x: Any) -> bool:
    """True for an iterable that is neither an array nor a tree of arrays."""
    return hasattr(x, "__iter__") and not hasattr(x, "dtype") and not isinstance(x, (tuple, list, dict, str))


def batches_of(x: Any, y: Any, batch_size: Any) -> Batches | Stream:
    """The data of fit, however they were given. ValueError or TypeError if they are given twice, or not at all."""
    if y is None and is_stream(x):
        x = Stream(x)
    if isinstance(x, Stream):
        return checked(x, y, batch_size)
    if isinstance(x, Batches):
        if y is not None or batch_size is not None:
            raise ValueError("fit: Batches holds y and the batch size; give them there only")
        made = x
    else:
        if isinstance(x, type):
            raise TypeError(f"fit: x is the class {x.__name__}; call it: {x.__name__}(x, y, size)")
        if y is None:
            raise TypeError(
                f"fit: y is missing; give x and y, or Batches(x, y, size), as arrays, or Stream(batches); got x "
                f"{describe(x)} alone"
            )
        if batch_size is None:
            raise TypeError("fit: batch_size is missing; give it beside x and y, or give Batches(x, y, size)")
        made = Batches(x, y, batch_size)
    check_size("fit", "batch_size", made.size)
    check_is("fit", "drop_last", made.drop_last, bool)
    check_is("fit", "host", made.host, bool)
    if made.augment is not None and not callable(made.augment):
        raise TypeError(f"fit: augment must be a function, got {describe(made.augment)}")
    return made


def takes_one(f: Callable) -> bool:
    """True unless the signature of a function says that it cannot be called with one argument."""
    try:
        inspect.signature(f).bind(0)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def checked(stream: Stream, y: Any, batch_size: Any) -> Stream:
    """The stream. ValueError or TypeError if it is none, or the data are given twice."""
    if y is not None or batch_size is not None:
        raise ValueError("fit: the batches of a stream hold y, and have their size; give neither beside it")
    if isinstance(stream.batches, type):
        raise TypeError(
            f"fit: Stream holds the class {stream.batches.__name__}; make one: {stream.batches.__name__}(...)"
        )
    if not callable(stream.batches) and not hasattr(stream.batches, "__iter__"):
        raise TypeError(f"fit: Stream needs an iterable of batches (x, y), got {describe(stream.batches)}")
    if callable(stream.batches) and not hasattr(stream.batches, "__iter__") and not takes_one(stream.batches):
        raise TypeError(
            f"fit: Stream: a function of batches takes the epoch, 0, 1, ...; got {describe(stream.batches)}, which "
            "does not take one argument"
        )
    if hasattr(stream.batches, "dtype") or isinstance(stream.batches, (tuple, dict, str)):
        raise TypeError(
            f"fit: Stream needs an iterable of batches (x, y), got {describe(stream.batches)}; arrays go into Batches"
        )
    if stream.epoch is not None:
        check_size("fit", "epoch", stream.epoch)
    if stream.augment is not None and not callable(stream.augment):
        raise TypeError(f"fit: augment must be a function, got {describe(stream.augment)}")
    return stream


def validation_data(validation: Any) -> Validation | None:
    """What fit measures, however it was given. TypeError if it is neither a pair nor a Validation."""
    if validation is None or isinstance(validation, Validation):
        return validation
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(
            f"fit: validation must be a pair (x, y), or Validation(x, y, metrics), got {describe(validation)}"
        )
    return Validation(*validation)
