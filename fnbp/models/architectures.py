"""Architectures: feed-forward, convolutional and recurrent nets, and a transformer."""

import math
from collections.abc import Callable

from jax.nn import initializers

from fnbp.arrays.checks import check_rate, check_size, choose, located
from fnbp.combinators.loops import repeat
from fnbp.combinators.serial import serial
from fnbp.combinators.tie import tie
from fnbp.construction import constructor
from fnbp.layer import Layer
from fnbp.layers.activation import ACTIVATIONS, relu
from fnbp.layers.convolution import conv
from fnbp.layers.dense import dense
from fnbp.layers.dropout import dropout
from fnbp.layers.embedding import embedding, positions
from fnbp.layers.norm import batch_norm, layer_norm
from fnbp.layers.pooling import flatten, global_avg_pool, last, max_pool
from fnbp.layers.recurrent import gru_cell, lstm_cell
from fnbp.models.blocks import gelu_mlp, residual, stacked, transformer_block

__all__ = ["gpt", "gru_classifier", "lenet", "lstm_classifier", "mlp", "resnet"]


@constructor
@located("mlp")
def mlp(*widths: int, activation: str = "relu", W: str | Callable = "he_normal") -> Layer:
    """Dense layers with an activation between each two.

        a_l = f(W_l a_{l-1} + b_l); the last one without f      x (m, n_in), y (m, widths[-1])

    Source:  fnbp/README.md, B1, layer by layer.
    Options: widths: the number of units of each layer. activation: its name, see fnbp.activation. W: initializer of the
             weight matrices, a name or a function.
    Raises:  ValueError if there is no width, or one is below 1.
    """
    if not widths:
        raise ValueError("mlp: expected at least one width, as in mlp(128, 10)")
    f = choose("activation", activation, ACTIVATIONS, "mlp: ")
    layers = [layer for n in widths for layer in (dense(n, W), f())]
    return serial(*layers[:-1], name="mlp")


@constructor
@located("lenet")
def lenet(classes: int = 10, activation: str = "relu", pool: Callable[[int], Layer] = max_pool) -> Layer:
    """LeNet-5: two convolutions, each followed by pooling, then three dense layers.

        6 of 5x5, pool 2, 16 of 5x5, pool 2, 120, 84, classes      x (m, 28, 28, c), y (m, classes)

    Source:  LeCun et al. 1998, Proceedings of the IEEE 86, section II.B. There the activation is a scaled tanh, the
             pooling a scaled mean (pool=fnbp.avg_pool), each map of the second convolution sees only some maps of the
             first, and the outputs are distances; here each map sees all, and the outputs are scores.
    Options: classes: number of outputs. activation: its name, see fnbp.activation. pool: a function from the size of
             the windows to a layer, fnbp.max_pool or fnbp.avg_pool.
    Raises:  ValueError if classes is below 1.
    """
    f = choose("activation", activation, ACTIVATIONS, "lenet: ")
    features = (
        conv(6, (5, 5), W="he_normal"),
        f(),
        pool(2),
        conv(16, (5, 5), padding="VALID", W="he_normal"),
        f(),
        pool(2),
    )
    scores = (dense(120, "he_normal"), f(), dense(84, "he_normal"), f(), dense(classes))
    return serial(*features, flatten(), *scores, name="lenet")


@constructor
@located("resnet")
def resnet(depth: int = 20, classes: int = 10, width: int = 16) -> Layer:
    """The residual network for small images: three stages of residual blocks, each at half the size of the last.

        conv 3x3, batch norm, relu; n blocks of width, n of 2 width, n of 4 width, depth = 6 n + 2; mean; scores

    Shapes:  x (m, height, width, c); y (m, classes).
    Source:  He et al. 2015, arXiv:1512.03385, section 4.2. There the shortcuts around a change of size have no weights;
             here they are 1x1 convolutions (its option B).
    Options: depth: number of layers with weights. classes: number of outputs. width: channels of the first stage.
    Raises:  ValueError if depth is not 6 n + 2, or a size is below 1.
    """
    check_size("resnet", "width", width)
    check_size("resnet", "depth", depth)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"resnet: depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
    n = (depth - 2) // 6
    stem = (conv(width, (3, 3), W="he_normal", b=None), batch_norm(), relu())
    stages = [
        residual(width * 2**stage, stride=2 if stage and not i else 1) for stage in range(3) for i in range(n)
    ]  # fmt: skip
    return serial(*stem, *stages, global_avg_pool(), dense(classes), name=f"resnet({depth})")


@constructor
@located("lstm_classifier")
def lstm_classifier(units: int, classes: int, layers: int = 1, rate: float = 0.0) -> Layer:
    """LSTM layers over a sequence, then scores from its last position.

        h = stacked LSTMs of x      y = W h[last] + b      x (m, T, n_in), y (m, classes)

    Within fnbp.ragged the last position is that of each sequence's length.

    Source:  Hochreiter & Schmidhuber 1997, Neural Computation 9; see lstm_cell.
    Options: units: of each layer. classes: number of outputs. layers: number of LSTM layers. rate: of dropout between
             them.
    Raises:  ValueError if a size is below 1.
    """
    return classifier("lstm_classifier", lstm_cell, units, classes, layers, rate)


@constructor
@located("gru_classifier")
def gru_classifier(units: int, classes: int, layers: int = 1, rate: float = 0.0) -> Layer:
    """GRU layers over a sequence, then scores from its last position.

        h = stacked GRUs of x      y = W h[last] + b      x (m, T, n_in), y (m, classes)

    Within fnbp.ragged the last position is that of each sequence's length.

    Source:  Cho et al. 2014, arXiv:1406.1078, section 2.3; see gru_cell.
    Options: units: of each layer. classes: number of outputs. layers: number of GRU layers. rate: of dropout between
             them.
    Raises:  ValueError if a size is below 1.
    """
    return classifier("gru_classifier", gru_cell, units, classes, layers, rate)


def classifier(name: str, cell: Callable[[int], Layer], units: int, classes: int, layers: int, rate: float) -> Layer:
    """Recurrent layers, their output at the last position, and scores."""
    check_size(name, "layers", layers)
    check_rate(name, rate)
    return serial(stacked(*(cell(units) for _ in range(layers)), rate=rate), last(), dense(classes), name=name)


@constructor
@located("gpt")
def gpt(
    vocabulary: int, length: int, layers: int, heads: int, width: int, rate: float = 0.0, approximate: bool = False
) -> Layer:
    """A transformer that scores the token after each position, from that position and those before it.

        h = E[x] + P      h := transformer_block(h), layers times      y = E norm(h)

    One matrix E embeds the tokens and scores them (tie); the blocks are one compiled loop (repeat). Weights start with
    a standard deviation of 0.02, those at the end of each branch with 0.02 / sqrt(2 layers).

    With a large vocabulary, train it by linear_cross_entropy, which never holds the scores of all positions.

    Shapes:  x (m, T) of integers below vocabulary, T at most length; y (m, T, vocabulary), scores of the next token.
    Source:  Radford et al. 2019, Language models are unsupervised multitask learners, section 2.3; E in two places:
             Press & Wolf 2016, arXiv:1608.05859.
    Options: layers: number of blocks. heads, width: those of transformer_block. rate: of dropout, on the embedding and
             at the end of each branch. approximate: True for the tanh form of gelu, which GPT-2 has; with it, length
             1024, 12 layers, 12 heads, width 768 and vocabulary 50257 are GPT-2 small: see fnbp.from_torch.
    Raises:  ValueError if a size is below 1, or heads does not divide width; TypeError if approximate is not a bool.
    """
    check_size("gpt", "layers", layers)
    check_rate("gpt", rate)
    check_size("gpt", "heads", heads)
    check_size("gpt", "width", width)
    if width % heads:
        raise ValueError(f"gpt: width must be a multiple of heads, got {width} for {heads}")
    start, at_end = initializers.normal(0.02), initializers.normal(0.02 / math.sqrt(2 * layers))
    mlp = gelu_mlp(4 * width, width, start, "zeros", at_end, approximate)
    block = transformer_block(width, heads, mlp=mlp, rate=rate, W=start, W_out=at_end)
    parts = (
        embedding(vocabulary, width, start),
        positions(length, start),
        *((dropout(rate),) if rate else ()),
        repeat(block, layers),
        layer_norm(),
        dense(vocabulary, b=None),
    )
    return tie(serial(*parts, name="gpt"), (0, "E"), (len(parts) - 1, "W"))
