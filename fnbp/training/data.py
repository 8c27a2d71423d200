"""What fit trains on and what it measures: data, and how they are taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from fnbp.arrays.checks import check_is, check_size, describe
from fnbp.losses.metrics import Metric, as_metrics

__all__ = ["Batches", "Validation"]


@dataclass(frozen=True)
class Batches:
    """Training data for fnbp.fit, and how batches are taken of them.

        fit(net, loss, params, state, Batches(x, y, 128, augment=flipped), ...)

    x, y       arrays, or trees of arrays, with the examples as first axis
    size       how many examples a batch has
    drop_last  leave out, in each epoch, what does not fill the last batch. By default examples from the epoch's front
               fill it up, which do not count in the loss: each example counts once.
    augment    (key, (x, y)) -> (x, y), applied to each batch on the device, with another key each time
    """

    x: Any
    y: Any
    size: int
    drop_last: bool = False
    augment: Callable[[jax.Array, Any], Any] | None = None


@dataclass(frozen=True)
class Validation:
    """Held-out data for fnbp.fit, measured after each epoch and at the end.

        fit(..., validation=Validation(x, y, fnbp.accuracy()))

    x, y     arrays, or trees of arrays, with the examples as first axis
    metrics  what is measured beside the mean loss, as in fnbp.evaluate
    """

    x: Any
    y: Any
    metrics: Any = None

    @property
    def measures(self) -> dict[str, Metric]:
        """The metrics by name."""
        return as_metrics("fit", self.metrics)


def batches_of(x: Any, y: Any, batch_size: Any) -> Batches:
    """The data of fit, however they were given. ValueError or TypeError if they are given twice, or not at all."""
    if isinstance(x, Batches):
        if y is not None or batch_size is not None:
            raise ValueError("fit: Batches holds y and the batch size; give them there only")
        made = x
    else:
        if isinstance(x, type):
            raise TypeError(f"fit: x is the class {x.__name__}; call it: {x.__name__}(x, y, size)")
        if y is None:
            raise TypeError(
                f"fit: y is missing; give x and y, or Batches(x, y, size), as arrays; got x {describe(x)} alone"
            )
        if batch_size is None:
            raise TypeError("fit: batch_size is missing; give it beside x and y, or give Batches(x, y, size)")
        made = Batches(x, y, batch_size)
    check_size("fit", "batch_size", made.size)
    check_is("fit", "drop_last", made.drop_last, bool)
    if made.augment is not None and not callable(made.augment):
        raise TypeError(f"fit: augment must be a function, got {describe(made.augment)}")
    return made


def validation_data(validation: Any) -> Validation | None:
    """What fit measures, however it was given. TypeError if it is neither a pair nor a Validation."""
    if validation is None or isinstance(validation, Validation):
        return validation
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(
            f"fit: validation must be a pair (x, y), or Validation(x, y, metrics), got {describe(validation)}"
        )
    return Validation(*validation)
