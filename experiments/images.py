"""A convolutional network learns MNIST or Fashion-MNIST by its manual backward alone: LeNet-5 or a residual net.

It prints the network, the test accuracy after each epoch, and what the training took. --side-by-side trains once more
by jax.grad over the same batches and compares losses and costs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fnbp
from experiments.shared import data, report
from experiments.shared.classification import Training, classify

MINUTES = 1  # on two CPU cores


@dataclass(frozen=True)
class Settings(Training):
    """Settings of the training."""

    model: Literal["lenet", "resnet"] = "lenet"
    """LeNet-5, or a residual network."""
    depth: int = 8
    """The depth of the residual network, 6 n + 2; the paper starts at 20, which takes about 3 times as long as 8."""
    width: int = 16
    """The number of channels of its first stage."""
    limit: int = 0
    """The number of images to train on; 0 means all 60,000."""
    out: Path = Path("results/images")
    """The folder for figure.png and result.json."""


def main(settings: Settings) -> int:
    """Run the experiment."""
    loaded = data.load(settings.data, settings.data_folder, settings.download)
    limit = settings.limit or len(loaded.train_y)
    if not settings.batch_size <= limit <= len(loaded.train_y):
        raise report.InputError(f"--limit must be from one batch, {settings.batch_size}, to {len(loaded.train_y)}")
    images = [x.reshape(-1, 28, 28, 1) for x in (loaded.train_x[:limit], loaded.test_x)]
    loaded = data.Data(images[0], loaded.train_y[:limit], images[1], loaded.test_y)
    if settings.model == "lenet":
        return classify(fnbp.models.lenet(), loaded, settings, settings.out)
    try:
        net = fnbp.models.resnet(settings.depth, width=settings.width)
    except ValueError as error:
        raise report.InputError(str(error)) from error
    return classify(net, loaded, settings, settings.out)


if __name__ == "__main__":
    report.run(Settings, main)
