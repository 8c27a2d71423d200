"""Fifty-four mistakes that people make in backwards written by hand, each beside the right backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.mistakes import of_layers as layers
from experiments.mistakes import of_nets as nets


@dataclass(frozen=True)
class Mistake:
    """One wrong backward. f and draw make the case; backward(args, dy, mistake=title) makes the mistake.

    expected   "fault"; "random": a fault of that kind; "convention": at a kink, and no fault
    devices    True if the mistake needs several devices
    """

    number: int
    title: str
    f: Callable
    backward: Callable
    draw: Callable[[np.random.Generator], tuple]
    expected: str = "fault"
    devices: bool = False

    @property
    def right(self) -> Callable[[tuple, Any], tuple]:
        return partial(self.backward, mistake="")

    @property
    def wrong(self) -> Callable[[tuple, Any], tuple]:
        return partial(self.backward, mistake=self.title)

    def args(self, seed: int) -> tuple:
        """The arguments, which are the same for every mistake in one function."""
        return self.draw(np.random.default_rng(seed))


CATALOGUE = (
    Mistake(1, "1/m is missing", *nets.SQUARED_ERROR),
    Mistake(2, "mean for sum", *nets.SQUARED_ERROR),
    Mistake(3, "factor 2 of the square is missing", *nets.SQUARED_ERROR),
    Mistake(4, "dW transposed", *nets.SQUARE_DENSE),
    Mistake(5, "dx by W^T, not W", *nets.SQUARE_DENSE),
    Mistake(6, "db a mean, not a sum", *nets.MLP),
    Mistake(7, "db zero", *nets.MLP),
    Mistake(8, "sign flipped", *nets.SQUARED_ERROR),
    Mistake(9, "cotangent ignored", *nets.CROSS_ENTROPY),
    Mistake(10, "cotangent divided by", *nets.CROSS_ENTROPY),
    Mistake(11, "z (1 - z) for a (1 - a)", *nets.MLP),
    Mistake(12, "sigma' left out", *nets.MLP),
    Mistake(13, "dW2 from z1, not a1", *nets.MLP),
    Mistake(14, "the leaky slope is left out", *nets.LEAKY),
    Mistake(15, "silu' without g sigma'(g)", *nets.SWIGLU),
    Mistake(16, "softmax Jacobian, its diagonal alone", *layers.SOFTMAX),
    Mistake(17, "softmax backward along the wrong axis", *layers.SOFTMAX),
    Mistake(18, "label smoothing ignored", *layers.TOKEN_LOSS),
    Mistake(19, "divided by all rows, not the valid", *layers.TOKEN_LOSS),
    Mistake(20, "ignored rows not masked", *layers.TOKEN_LOSS),
    Mistake(21, "mean term of the layernorm left out", *layers.LAYERNORM),
    Mistake(21, "xhat term of the layernorm left out", *layers.LAYERNORM),
    Mistake(22, "batch statistics held constant", *layers.BATCHNORM),
    Mistake(23, "dgamma from x, not xhat", *layers.BATCHNORM),
    Mistake(24, "1/sqrt(d) left out", *layers.GROUPED_ATTENTION),
    Mistake(24, "1/sqrt(d) taken twice", *layers.GROUPED_ATTENTION),
    Mistake(25, "mean over the heads of a group", *layers.GROUPED_ATTENTION),
    Mistake(25, "one head of a group alone", *layers.GROUPED_ATTENTION),
    Mistake(26, "turned on, not back", *layers.ROPE),
    Mistake(27, "1/(1 - p) left out", *layers.DROPOUT),
    Mistake(28, "a fresh mask", *layers.DROPOUT),
    Mistake(29, "backpropagation through time cut midway", *layers.RNN),
    Mistake(30, "dWh from h_t, not h_{t-1}", *layers.RNN),
    Mistake(31, "scattered by set, not add", *layers.EMBEDDING),
    Mistake(32, "gradient of one of two tied uses", *layers.TIED),
    Mistake(33, "kernel not flipped", *layers.CONV),
    Mistake(34, "the residual path is left out", *nets.RESIDUAL),
    Mistake(35, "dW by way of bfloat16", *nets.DENSE),
    Mistake(36, "sigma'(a) for sigma'(z)", *nets.CLASSIFIER),
    Mistake(37, "derivative of the tanh GELU for the erf GELU", *nets.GELU),
    Mistake(38, "a stray L2 term, 1e-4 W", *nets.CLASSIFIER),
    Mistake(39, "z-loss omitted", *layers.TOKEN_LOSS),
    Mistake(40, "epsilon of the layernorm omitted", *layers.LAYERNORM),
    Mistake(40, "epsilon of the log omitted", *nets.LOG_OF_SOFTMAX),
    Mistake(41, "N - 1 for N, width 1021", *layers.WIDE_LAYERNORM),
    Mistake(42, "time loop ends a step early", *layers.RNN),
    Mistake(43, "dh0 zero", *layers.RNN),
    Mistake(44, "one element of 585,209 not written", *nets.LARGE_DENSE),
    Mistake(45, "gradient of a learned slope left out", *nets.PRELU),
    Mistake(46, "dW of 299,209 left out, behind a small scale", *nets.LAYER_SCALE),
    Mistake(47, "gradient leaks through stop_gradient", *nets.VALUE_LOSS),
    Mistake(48, "relu'(0) = 1", *nets.RELU, "convention"),
    Mistake(48, "relu'(0) = 2", *nets.RELU),
    Mistake(49, "a tie goes to its first", *layers.MAX_POOL, "convention"),
    Mistake(49, "a tie is multiplied, not shared", *layers.MAX_POOL),
    Mistake(50, "log 0 in the backward", *nets.ENTROPY),
    Mistake(51, "softmax of a row fully masked", *layers.MASKED_ATTENTION),
    Mistake(52, "psum of dW forgotten", *layers.SHARDED, devices=True),
    Mistake(53, "dW noisy: rounded at random", *nets.DENSE, "random"),
    Mistake(54, "db keeps its summed axis", *nets.DENSE),
)
