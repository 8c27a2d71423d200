"""Blocks that architectures are built of: a few layers under one name."""

from collections.abc import Callable

from fnbp.arrays.checks import check_each, check_is, check_rate, check_size, describe, located
from fnbp.combinators.loops import scan
from fnbp.combinators.parallel import parallel
from fnbp.combinators.serial import serial
from fnbp.combinators.wrappers import skip
from fnbp.construction import constructor
from fnbp.layer import Layer
from fnbp.layers.activation import gelu, identity, relu, silu
from fnbp.layers.attention import attention
from fnbp.layers.convolution import conv
from fnbp.layers.dense import dense
from fnbp.layers.dropout import dropout
from fnbp.layers.norm import batch_norm, layer_norm

__all__ = ["bidirectional", "gelu_mlp", "residual", "stacked", "swiglu", "transformer_block"]

Maker = str | Callable


@constructor
@located("residual")
def residual(n_out: int, stride: int = 1, project: bool | None = None) -> Layer:
    """Two convolutions and a shortcut around them.

        y = relu(f(x) + s(x))      f: conv 3x3, batch norm, relu, conv 3x3, batch norm
        dx = b_f(dz) + b_s(dz), dz = dy [y > 0]      s: identity, or conv 1x1, batch norm

    Shapes:  x (m, height, width, c); y (m, height / stride, width / stride, n_out), rounded up.
    Source:  He et al. 2015, arXiv:1512.03385, section 3.2 and, for the 1x1 convolution, section 3.3, option B.
    Options: stride: of the first convolution and of the shortcut s. project: True for a 1x1 convolution in s, False for
             the identity; by default a convolution only if stride > 1.
    Raises:  ValueError if f and s do not return the same shape.
    """
    name = f"residual({n_out})" if stride == 1 else f"residual({n_out}, {stride})"
    if project is not None:
        check_is(name, "project", project, bool)
    normed = lambda *size: (conv(n_out, *size, W="he_normal", b=None), batch_norm())  # noqa: E731
    f = serial(*normed((3, 3), stride), relu(), *normed((3, 3)))
    s = serial(*normed((1, 1), stride)) if project or (project is None and stride > 1) else identity()
    return serial(parallel(f, s), relu(), name=name)


@constructor
@located("gelu_mlp")
def gelu_mlp(
    hidden: int,
    n_out: int,
    W: Maker = "glorot_uniform",
    b: Maker | None = "zeros",
    W_out: Maker | None = None,
    approximate: bool = False,
) -> Layer:
    """The two dense layers of a transformer.

        y = W2 gelu(W1 x + b1) + b2      dx = W1^T (gelu'(W1 x + b1) W2^T dy)

    Shapes:  x (..., n_in); y (..., n_out); between them hidden features.
    Source:  Vaswani et al. 2017, arXiv:1706.03762, section 3.3; gelu: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    Options: W, b: initializers of W1 and of the biases, names or functions; b=None: no biases. W_out: initializer of
             W2, by default W. approximate: that of gelu.
    Raises:  TypeError if approximate is not a bool.
    """
    first, second = dense(hidden, W, b), dense(n_out, W if W_out is None else W_out, b)
    return serial(first, gelu(approximate), second, name=f"gelu_mlp({hidden}, {n_out})")


@constructor
@located("swiglu")
def swiglu(hidden: int, n_out: int, W: Maker = "glorot_uniform", W_out: Maker | None = None) -> Layer:
    """A gated layer and a dense layer after it.

        y = W2 (silu(W x) V x)      dx = W^T (silu'(W x) V x dh) + V^T (silu(W x) dh), dh = W2^T dy

    Shapes:  x (..., n_in); y (..., n_out); between them hidden features.
    Source:  Shazeer 2020, arXiv:2002.05202, section 2.
    Options: W: initializer of W and V, a name or a function. W_out: initializer of W2, by default W.
    """
    gate = serial(dense(hidden, W, None), silu())
    both = parallel(gate, dense(hidden, W, None), join="product")
    return serial(both, dense(n_out, W if W_out is None else W_out, None), name=f"swiglu({hidden}, {n_out})")


@constructor
@located("transformer_block")
def transformer_block(
    width: int,
    heads: int,
    kv_heads: int | None = None,
    causal: bool = True,
    rotary: float | None = None,
    mlp: Layer | None = None,
    norm: Callable[[], Layer] = layer_norm,
    rate: float = 0.0,
    W: Maker = "glorot_uniform",
    W_out: Maker | None = None,
    b: Maker | None = "zeros",
) -> Layer:
    """Attention, then an mlp at each position; both normalise their input, and add to it.

        h = x + dropout(attention(norm(x)))      y = h + dropout(mlp(norm(h)))
        dh = dy + b_mlp(dy)      dx = dh + b_attention(dh)

    Shapes:  x, y (m, T, width).
    Source:  Xiong et al. 2020, arXiv:2002.04745, figure 1(b): the norm comes first.
    Options: heads, kv_heads, causal, rotary: those of attention. mlp: a layer, by default gelu_mlp(4 width, width).
             norm: a constructor, layer_norm or rms_norm. rate: of the dropouts; 0: no dropout. W, b: initializers of
             all weights and biases, names or functions; b=None: no biases. W_out: initializer of the last weights of
             attention and of gelu_mlp, by default W.
    """
    check_size("transformer_block", "width", width)
    if isinstance(norm, Layer):
        raise TypeError(
            f"transformer_block: norm must make a layer each time, layer_norm and not layer_norm(); got {norm.name}"
        )
    if not callable(norm):
        raise TypeError(f"transformer_block: norm must be a constructor, such as fnbp.layer_norm, got {describe(norm)}")
    check_rate("transformer_block", rate)
    check_is("transformer_block", "causal", causal, bool)
    if mlp is not None:
        check_is("transformer_block", "mlp", mlp, Layer)
    mlp = gelu_mlp(4 * width, width, W, b, W_out) if mlp is None else mlp
    attend = attention(heads, kv_heads, causal, rotary, W, b, W if W_out is None else W_out)
    noise = (dropout(rate),) if rate else ()
    branches = (skip(serial(norm(), layer, *noise)) for layer in (attend, mlp))
    return serial(*branches, name=f"transformer_block({width}, {heads})")


@constructor
@located("bidirectional")
def bidirectional(cell: Layer, back: Layer | None = None) -> Layer:
    """One cell run from first to last and one from last to first, side by side.

        y[t] = (y[t] of cell, y[t] of back)      dx[t] = dx[t] of cell + dx[t] of back

    Shapes:  x (m, T, n_in); y (m, T, the widths of both together).
    Source:  Schuster & Paliwal 1997, Bidirectional recurrent neural networks, IEEE Trans. on Signal Processing 45.
    Options: back: the cell that runs from last to first, by default one like cell with weights of its own.
    """
    return parallel(scan(cell), scan(cell if back is None else back, reverse=True), join="concat")


@constructor
@located("stacked")
def stacked(*cells: Layer, rate: float = 0.0) -> Layer:
    """Recurrent layers, each of which reads the output of the one below.

        y = scan(c_n)(... scan(c_2)(scan(c_1)(x)))      dx = b_1(... b_n(dy)), as serial

    Shapes:  x (m, T, n_in); y (m, T, n_out of the last).
    Source:  Graves, Mohamed & Hinton 2013, arXiv:1303.5778, section 2.
    Options: rate: of dropout between them; 0: no dropout.
    Raises:  ValueError if there is no cell; TypeError if a cell is not a Layer.
    """
    if not cells:
        raise ValueError("stacked: expected at least one cell")
    check_each("stacked", "stacked", cells, Layer)
    check_rate("stacked", rate)
    scans = [layer for cell in cells for layer in (scan(cell), dropout(rate))]
    return serial(*(scans[:-1] if rate else scans[::2]), name="stacked")
