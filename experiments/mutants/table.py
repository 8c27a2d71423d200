"""The calls of constructors that mutants are tried on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fnbp
from experiments.mutants.around import (
    cell_of,
    closed,
    finished,
    gain,
    gains,
    nearly_flat,
    of_lengths,
    of_some,
    used_twice,
    with_start,
)


class Trial(NamedTuple):
    """A call of a constructor, and what it is tried on.

    x      "normal", "unit" (between 0 and 1), "tokens" (integers below 13), "many tokens" (below 4,099: more than
           a float16 tells apart)
    y      of a loss: "labels", "soft" (distributions), "unit", "yes or no" (1, 0, or -1 for neither), "normal"
    train  with Context(key, train=True); otherwise a layer with state has had one training step before
    mask   how many of the first axes a Context.mask has; 0 for none
    """

    make: Callable[[Any], Any] = lambda constructor: constructor()
    shape: tuple[int, ...] = (7, 11)
    x: str = "normal"
    y: str = ""
    train: bool = False
    mask: int = 0


MEAN = (fnbp.reshape(-1, 1), fnbp.global_avg_pool())  # of each row
WITH_MEMORY = fnbp.parallel(fnbp.identity(), fnbp.conv(7, 2, padding="VALID"), join="tuple")
WITH_SAME = fnbp.parallel(fnbp.identity(), fnbp.dense(7), join="tuple")
WEIGHTS = np.linspace(0.5, 1.5, 11)
HEAVY = np.linspace(1, 5_001, 11)

TABLE: dict[str, tuple[Trial, ...]] = {
    "leaky_relu": (Trial(lambda f: f(0.2)),),
    "elu": (Trial(lambda f: f(1.7)),),
    "gelu": (Trial(), Trial(lambda f: f(approximate=True))),
    "softmax": (Trial(), Trial(shape=(5, 3, 11))),
    "log_softmax": (
        Trial(),
        Trial(shape=(5, 3, 11)),
        Trial(lambda f: closed(fnbp.serial(nearly_flat(4_096), f(), *MEAN)), (5, 4)),
    ),
    "dense": (
        Trial(lambda f: f(5)),
        Trial(lambda f: f(5), (5, 3, 11)),
        Trial(lambda f: f(1)),
        Trial(lambda f: f(5, b=None)),
        Trial(lambda f: f(5), (5, 3, 11), mask=2),
    ),
    "conv": (
        Trial(lambda f: f(7, 3), (3, 11, 5)),
        Trial(lambda f: f(7, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1)), (3, 7, 5, 2)),
        Trial(lambda f: f(10, 3, groups=5, padding="VALID"), (3, 7, 5)),
        Trial(lambda f: f(1, 1), (3, 11, 5)),
        Trial(lambda f: f(7, 3, stride=2), (3, 11, 5)),
        Trial(lambda f: f(7, 3), (3, 11, 5), mask=2),
    ),
    "conv_transpose": (
        Trial(lambda f: f(7, 3, stride=2, padding=1), (3, 5, 2)),
        Trial(lambda f: f(7, 8, stride=3), (3, 5, 2)),
        Trial(lambda f: f(10, (2, 3), groups=5, dilation=2), (3, 5, 7, 5)),
    ),
    "max_pool": (Trial(lambda f: f(2), (3, 7, 5, 2)), Trial(lambda f: f(3, stride=2, padding="SAME"), (3, 7, 5, 2))),
    "avg_pool": (
        Trial(lambda f: f(3, stride=2, padding="SAME"), (3, 7, 5, 2)),
        Trial(lambda f: f(2, padding=1, count_padding=True), (3, 7, 2)),
    ),
    "global_avg_pool": (
        Trial(shape=(3, 7, 5, 2)),
        Trial(shape=(3, 7, 5, 2), mask=3),
    ),
    "last": (
        Trial(shape=(3, 5, 7)),
        Trial(shape=(5, 7), mask=2),
        Trial(lambda f: of_lengths(fnbp.ragged(f())), (5, 7, 3)),
        Trial(shape=(3, 5, 7), mask=2),
    ),
    "reshape": (Trial(lambda f: f(-1, 5), (3, 5, 7)),),
    "flatten": (Trial(shape=(3, 5, 7)),),
    "serial": (Trial(lambda f: f(fnbp.dense(5), fnbp.dense(3), fnbp.tanh())),),
    "skip": (
        Trial(lambda f: f(fnbp.dense(11))),
        Trial(lambda f: f(fnbp.dense(7)), (3, 5, 7), mask=2),
    ),
    "layer_norm": (Trial(), Trial(shape=(5, 3, 11))),
    "rms_norm": (Trial(), Trial(shape=(5, 3, 11))),
    "group_norm": (
        Trial(lambda f: f(3), (2, 5, 6)),
        Trial(lambda f: f(1), (5, 11)),
        Trial(lambda f: f(3), (2, 5, 6), mask=2),
    ),
    "batch_norm": (
        Trial(train=True),
        Trial(shape=(2, 5, 7), train=True),
        Trial(),
        Trial(shape=(2, 5, 7), train=True, mask=2),
        Trial(shape=(2, 5, 7), mask=2),
        Trial(lambda f: fnbp.serial(f(), fnbp.relu()), train=True),  # dy of batch_norm is 0 at some places
    ),
    "dropout": (Trial(lambda f: f(0.3), train=True), Trial(lambda f: f(0.3))),
    "drop_path": (Trial(lambda f: f(0.3), (7, 5, 3), train=True),),
    "embedding": (
        Trial(lambda f: f(13, 3), (5, 11), "tokens"),
        Trial(lambda f: f(4_099, 3), (7,), "many tokens"),
        Trial(lambda f: f(13, 3), (5, 11), "tokens", mask=2),
    ),
    "positions": (
        Trial(lambda f: f(17), (7, 5, 3)),
        Trial(lambda f: f(5), (7, 5, 3)),
        Trial(lambda f: f(1), (7, 1, 3)),
    ),
    "sinusoids": (Trial(shape=(7, 5, 3)),),
    "attention": (
        Trial(lambda f: f(3, causal=True), (2, 5, 6)),
        Trial(lambda f: f(4, 2, rotary=100.0, b=None), (2, 5, 8)),
        Trial(lambda f: fnbp.serial(WITH_MEMORY, f(3)), (2, 5, 6)),
        Trial(lambda f: f(3), (2, 5, 6), mask=2),
        Trial(lambda f: fnbp.serial(WITH_SAME, f(3)), (2, 5, 6), mask=2),
        Trial(lambda f: f(2, 1, causal=True), (2, 131, 2)),
    ),
    "rnn_cell": (Trial(lambda f: fnbp.scan(f(7)), (5, 3, 2)),),
    "lstm_cell": (Trial(lambda f: fnbp.scan(f(7)), (5, 3, 2)), Trial(lambda f: fnbp.scan(f(3)), (2, 19, 2))),
    "gru_cell": (Trial(lambda f: fnbp.scan(f(7)), (5, 3, 2)), Trial(lambda f: fnbp.scan(f(3)), (2, 19, 2))),
    "scan": (
        Trial(lambda f: f(fnbp.lstm_cell(3)), (5, 3, 2)),
        Trial(lambda f: f(fnbp.gru_cell(3), True), (5, 3, 2)),
        Trial(lambda f: f(fnbp.gru_cell(3)), (2, 19, 2)),
        Trial(lambda f: with_start(f(fnbp.lstm_cell(2), True), False), (2, 11, 2)),
        Trial(lambda f: of_lengths(fnbp.ragged(f(fnbp.lstm_cell(3)))), (5, 7, 2)),
        Trial(lambda f: of_lengths(fnbp.ragged(with_start(f(fnbp.rnn_cell(2)), True))), (5, 7, 2)),
        Trial(lambda f: with_start(f(fnbp.rnn_cell(2)), True), (5, 3, 2)),
        Trial(lambda f: with_start(f(fnbp.rnn_cell(2)), False), (5, 3, 2)),
        Trial(lambda f: f(cell_of(fnbp.conv(2, 3))), (5, 3, 7, 2)),
        Trial(lambda f: f(cell_of(fnbp.batch_norm())), (5, 3, 2), train=True),
        Trial(lambda f: f(cell_of(finished(fnbp.dense(2)))), (5, 3, 2)),
    ),
    "parallel": (
        Trial(lambda f: f(fnbp.dense(5), fnbp.dense(5)), (7, 3)),
        Trial(lambda f: f(fnbp.dense(5), fnbp.tanh(), join="concat"), (7, 3)),
        Trial(lambda f: f(fnbp.dense(5), fnbp.dense(5), fnbp.dense(5), join="product"), (7, 3)),
        Trial(lambda f: f(fnbp.dense(5), fnbp.tanh(), fnbp.dense(2), join="concat"), (5, 3, 7)),
        Trial(lambda f: f(fnbp.dense(5)), (7, 3)),
        Trial(lambda f: fnbp.serial(f(fnbp.identity(), fnbp.dense(7), join="tuple"), fnbp.attention(3)), (2, 5, 6)),
        Trial(lambda f: f(fnbp.dense(5), join="product"), (7, 3)),
        Trial(lambda f: f(fnbp.dense(5), join="concat"), (7, 3)),
    ),
    "repeat": (
        Trial(lambda f: f(fnbp.dense(3), 2), (7, 3)),
        Trial(lambda f: closed(f(fnbp.serial(fnbp.dense(3), fnbp.tanh()), 2)), (7, 3)),
        Trial(lambda f: closed(f(fnbp.dense(3), 1)), (7, 3)),
        Trial(lambda f: closed(f(fnbp.batch_norm(), 2)), (7, 3), train=True),
    ),
    "ragged": (
        Trial(lambda f: of_lengths(f(fnbp.serial(fnbp.scan(fnbp.rnn_cell(2)), fnbp.last()))), (5, 7, 3)),
        Trial(lambda f: of_lengths(f(fnbp.dense(2))), (5, 7, 3)),
    ),
    "remat": (
        Trial(lambda f: f(fnbp.dense(5)), (7, 3)),
        Trial(lambda f: f(fnbp.dropout(0.3)), (7, 3), train=True),
        Trial(lambda f: closed(f(fnbp.dense(5))), (7, 3)),
        Trial(lambda f: f(fnbp.batch_norm()), (7, 3)),
    ),
    "cast": (
        Trial(lambda f: f(fnbp.dense(5), "float32"), (7, 3)),
        Trial(lambda f: closed(f(fnbp.dense(5), "float32")), (7, 3)),
        Trial(lambda f: f(fnbp.embedding(13, 3), "float32"), (5, 7), "tokens"),
    ),
    "freeze": (
        Trial(lambda f: fnbp.serial(fnbp.dense(5), f(fnbp.dense(3))), (7, 3)),
        Trial(lambda f: f(fnbp.layer_norm()), (7, 3)),
    ),
    "tie": (
        Trial(
            lambda f: f(fnbp.serial(fnbp.embedding(13, 3), fnbp.dense(13, b=None)), (0, "E"), (1, "W")),
            (5, 7),
            "tokens",
        ),
        Trial(lambda f: f(fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(3)), (0, "W"), (2, "W")), (7, 3)),
        Trial(lambda f: closed(f(fnbp.serial(fnbp.dense(3), fnbp.tanh(), fnbp.dense(3)), (0, "W"), (2, "W"))), (7, 3)),
        Trial(lambda f: closed(f(fnbp.serial(fnbp.dense(1), fnbp.tanh(), fnbp.dense(1)), (0, "W"), (2, "W"))), (7, 1)),
    ),
    "softmax_cross_entropy": (
        Trial(y="labels"),
        Trial(y="soft"),
        Trial(shape=(5, 3, 11), y="labels"),
        Trial(lambda f: f(weights=WEIGHTS, label_smoothing=0.1), y="labels"),
        Trial(lambda f: f(weights=WEIGHTS), y="soft"),
        Trial(lambda f: f(weights=WEIGHTS), (5, 3, 11), y="labels"),
        Trial(lambda f: f(weights=HEAVY), y="labels"),
        Trial(lambda f: f(label_smoothing=0.1), y="labels"),
        Trial(lambda f: f(ignore_index=0, reduce="tokens"), (5, 3, 11), y="labels"),
        Trial(lambda f: f(z_loss=0.2), (5, 3, 11), y="labels"),
        Trial(shape=(5, 3, 11), y="soft", mask=2),
    ),
    "linear_cross_entropy": (Trial(lambda f: f(label_smoothing=0.1, z_loss=0.2), (5, 3, 11), y="labels"),),
    "binary_cross_entropy": (
        Trial(x="unit", y="unit"),
        Trial(lambda f: f(from_logits=True), y="unit"),
        Trial(lambda f: f(pos_weight=3, label_smoothing=0.1), x="unit", y="unit"),
        Trial(lambda f: f(from_logits=True, pos_weight=WEIGHTS, label_smoothing=0.1), y="unit"),
        Trial(lambda f: f(from_logits=True, ignore_index=-1, reduce="tokens"), y="yes or no"),
    ),
    "mean_squared_error": (
        Trial(y="normal"),
        Trial(lambda f: f(reduce="tokens"), (5, 3, 7), y="normal", mask=2),
    ),
    "checked": (Trial(lambda f: f("dense(5)", fnbp.dense(5))),),
    "PerExample": (Trial(gain), Trial(gains)),
    "counting_some": (
        Trial(lambda f: of_some(f, fnbp.mean_squared_error()), y="normal"),
        Trial(lambda f: of_some(f, fnbp.softmax_cross_entropy()), (5, 3, 11), y="labels", mask=2),
        Trial(lambda f: of_some(f, fnbp.softmax_cross_entropy(reduce="tokens")), (5, 3, 11), y="labels"),
        Trial(lambda f: of_some(f, fnbp.softmax_cross_entropy(reduce="tokens")), (5, 3, 11), y="labels", mask=2),
    ),
    "Added": (Trial(used_twice),),
    "half_squared_error": (
        Trial(y="normal"),
        Trial(shape=(5, 3, 7), y="normal", mask=2),
    ),
}

INNER = {  # beside the public constructors: their files
    "checked": "layer.py",
    "PerExample": "factor.py",
    "counting_some": "losses/weights.py",
    "Added": "factor.py",
}
FOR = {  # of a helper of many constructors, those that it is tried with
    "parameterless": ("identity", "tanh"),
    "counting": ("dense", "skip", "group_norm", "global_avg_pool", "embedding"),
    "due": ("dense", "attention"),
    "add_bias": ("dense", "attention"),
    "in_wide": ("layer_norm", "softmax", "gelu", "rms_norm"),
    "widen": ("layer_norm", "softmax", "gelu"),
    "one_part": ("skip", "repeat", "tie"),
    "cut": ("parallel",),
    "where": ("scan",),
    "by_example": ("conv", "softmax_cross_entropy"),
    "Mixed": ("batch_norm", "repeat", "scan"),
    "of_pairs": ("binary_cross_entropy", "mean_squared_error", "half_squared_error"),
    "share": ("softmax_cross_entropy", "binary_cross_entropy", "mean_squared_error", "half_squared_error"),
    "along": ("last",),
    "rotate": ("attention",),
    "unrotate": ("attention",),
    "split_heads": ("attention",),
    "merge_heads": ("attention",),
    "kept": ("dense", "global_avg_pool", "ragged"),
    "wide": ("attention", "global_avg_pool", "mean_squared_error"),
    "reshaped": ("group_norm", "reshape"),
}
