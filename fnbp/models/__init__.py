"""Models made of layers, such as `fnbp.models.gpt(...)`, and the blocks that they are built from."""

from fnbp.models.architectures import gpt, gru_classifier, lenet, lstm_classifier, mlp, resnet

__all__ = ["gpt", "gru_classifier", "lenet", "lstm_classifier", "mlp", "resnet"]
