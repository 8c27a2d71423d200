"""fnbp: backpropagation as a value. Every layer is (init, forward, backward); the backward is the published formula."""

from fnbp import models as models
from fnbp.backpropagation import Pass, Trace, backprop, per_example_norms, trace, value_and_grad, with_path
from fnbp.blocks import bidirectional, gelu_mlp, residual, stacked, swiglu, transformer_block
from fnbp.chain import serial
from fnbp.combinators import parallel, skip, tie
from fnbp.comparison import Report, compare
from fnbp.compound import Added, Cast, Shared, Stacked
from fnbp.factor import (
    Correlation,
    Factor,
    Lookup,
    Mixed,
    Outer,
    PerExample,
    Product,
    Rows,
    Sum,
    keep,
    per_example,
    register_factor,
    sq_norms,
    total,
)
from fnbp.initialisers import initialiser
from fnbp.interop import automatic_value_and_grad, from_jax, loss_from_jax, to_jax
from fnbp.layer import Context, Layer, Traits, leaves, map_layers, stateless
from fnbp.layers.activation import (
    activation,
    elu,
    gelu,
    identity,
    leaky_relu,
    log_softmax,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from fnbp.layers.attention import attention
from fnbp.layers.convolution import bias, conv, conv_transpose
from fnbp.layers.dense import dense
from fnbp.layers.dropout import drop_path, dropout
from fnbp.layers.embedding import embedding, positions, sinusoids
from fnbp.layers.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnbp.layers.pooling import avg_pool, flatten, global_avg_pool, last, max_pool, reshape
from fnbp.layers.recurrent import gru_cell, lstm_cell, rnn_cell
from fnbp.losses import Loss, binary_cross_entropy, half_squared_error, mean_squared_error, softmax_cross_entropy
from fnbp.measurement import Cost, cost
from fnbp.scanning import repeat, scan
from fnbp.training import Fit, History, fit
from fnbp.wrappers import cast, freeze, ragged, remat

__all__ = [  # in the order in which the README teaches them
    # a layer is a value
    "Layer", "stateless", "Context", "Traits", "dense", "activation", "sigmoid", "tanh", "relu", "leaky_relu", "elu",
    "softplus", "silu", "gelu", "identity", "softmax", "log_softmax", "initialiser", "serial", "skip", "map_layers",
    "leaves", "conv", "conv_transpose", "bias", "max_pool", "avg_pool", "global_avg_pool", "reshape", "flatten",
    "layer_norm", "rms_norm", "group_norm", "batch_norm", "dropout", "drop_path",
    "embedding", "positions", "sinusoids", "rnn_cell", "lstm_cell", "gru_cell", "scan", "last", "attention",
    "parallel", "repeat", "ragged", "remat", "cast", "tie", "freeze",
    "residual", "gelu_mlp", "swiglu", "transformer_block", "bidirectional", "stacked",
    # a loss of each example
    "Loss", "softmax_cross_entropy", "binary_cross_entropy", "mean_squared_error", "half_squared_error",
    "loss_from_jax",
    # backpropagation, and what is made of the factors
    "backprop", "Pass", "value_and_grad", "per_example_norms", "trace", "Trace",
    "Factor", "register_factor", "Outer", "Sum", "Product", "PerExample", "Rows", "Correlation", "Lookup", "Mixed",
    "Stacked", "Shared", "Added", "Cast",
    "total", "keep", "sq_norms", "per_example", "with_path",
    # prove, measure, train, exchange
    "compare", "Report", "cost", "Cost", "fit", "Fit", "History", "to_jax", "from_jax", "automatic_value_and_grad",
]  # fmt: skip
