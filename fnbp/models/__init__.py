"""Models made of layers, such as `fnbp.models.gpt(...)`, the blocks that they are built from, and writing by them."""

from fnbp.models.architectures import gpt, gru_classifier, lenet, lstm_classifier, mlp, resnet
from fnbp.models.generation import generate

__all__ = ["generate", "gpt", "gru_classifier", "lenet", "lstm_classifier", "mlp", "resnet"]
