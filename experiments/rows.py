"""A recurrent network reads MNIST row by row, and learns by its manual backward through time alone.

Each image of MNIST or Fashion-MNIST is a sequence of 28 rows of 28 pixels; what the network holds after the last row is
scored. --side-by-side trains once more by jax.grad over the same batches and compares losses and costs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fnbp
from experiments.shared import data, report
from experiments.shared.classification import Training, classify

MINUTES = 1  # on two CPU cores

MODELS = {"lstm": fnbp.models.lstm_classifier, "gru": fnbp.models.gru_classifier}


@dataclass(frozen=True)
class Settings(Training):
    """Settings of the training."""

    model: Literal["lstm", "gru"] = "lstm"
    """The kind of cell."""
    units: int = 128
    """The units of the cell."""
    layers: int = 1
    """The number of recurrent layers, stacked."""
    rate: float = 0.0
    """The rate of dropout between them."""
    out: Path = Path("results/rows")
    """The folder for figure.png and result.json."""


def main(settings: Settings) -> int:
    """Run the experiment."""
    loaded = data.load(settings.data, settings.data_folder, settings.download)
    rows = [x.reshape(-1, 28, 28) for x in (loaded.train_x, loaded.test_x)]
    try:
        net = MODELS[settings.model](settings.units, 10, settings.layers, settings.rate)
    except ValueError as error:
        raise report.InputError(str(error)) from error
    return classify(net, data.Data(rows[0], loaded.train_y, rows[1], loaded.test_y), settings, settings.out)


if __name__ == "__main__":
    report.run(Settings, main)
