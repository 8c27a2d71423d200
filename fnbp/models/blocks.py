"""What architectures are built of: a few layers under one name."""

from collections.abc import Callable

from fnbp.arrays.checks import check_each, check_is, check_rate, check_size, describe, located
from fnbp.combinators.loops import scan
from fnbp.combinators.parallel import parallel
from fnbp.combinators.serial import serial
from fnbp.combinators.wrappers import skip
from fnbp.layer import Layer
from fnbp.layers.activation import gelu, identity, relu, silu
from fnbp.layers.attention import attention
from fnbp.layers.convolution import conv
from fnbp.layers.dense import dense
from fnbp.layers.dropout import dropout
from fnbp.layers.norm import batch_norm, layer_norm

__all__ = ["bidirectional", "gelu_mlp", "residual", "stacked", "swiglu", "transformer_block"]

Maker = str | Callable


@located("residual")
def residual(n_out: int, stride: int = 1, project: bool | None = None) -> Layer:
    """Two convolutions, and a path around them.

        y = relu(f(x) + s(x))      f: conv 3x3, batch norm, relu, conv 3x3, batch norm
        dx = b_f(dz) + b_s(dz), dz = dy [y > 0]      s: identity, or conv 1x1, batch norm

    The first convolution, and that of s, go stride positions at a time. s is the identity unless project is True; None
    is for stride > 1.

    Shapes: x (m, height, width, c); y (m, height / stride, width / stride, n_out), rounded up.
    Source: He et al. 2015, arXiv:1512.03385, section 3.2 and, for the 1x1 convolution, section 3.3, option B.
    Raises: ValueError where f and s do not return the same shape.
    """
    name = f"residual({n_out})" if stride == 1 else f"residual({n_out}, {stride})"
    if project is not None:
        check_is(name, "project", project, bool)
    normed = lambda *size: (conv(n_out, *size, W="he_normal", b=None), batch_norm())  # noqa: E731
    f = serial(*normed((3, 3), stride), relu(), *normed((3, 3)))
    s = serial(*normed((1, 1), stride)) if project or (project is None and stride > 1) else identity()
    return serial(parallel(f, s), relu(), name=name)


@located("gelu_mlp")
def gelu_mlp(
    hidden: int, n_out: int, W: Maker = "glorot_uniform", b: Maker | None = "zeros", W_out: Maker | None = None
) -> Layer:
    """The two dense layers of a transformer.

        y = W2 gelu(W1 x + b1) + b2      dx = W1^T (gelu'(W1 x + b1) W2^T dy)

    Shapes:  x (..., n_in); y (..., n_out); between them hidden features.
    Source:  Vaswani et al. 2017, arXiv:1706.03762, section 3.3; gelu: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    Options: W, b, W_out: initializers, of W1 and the biases, and of W2 where it is another; b=None: without.
    """
    return serial(
        dense(hidden, W, b), gelu(), dense(n_out, W if W_out is None else W_out, b), name=f"gelu_mlp({hidden}, {n_out})"
    )


@located("swiglu")
def swiglu(hidden: int, n_out: int, W: Maker = "glorot_uniform", W_out: Maker | None = None) -> Layer:
    """A gated layer, and a dense one behind it.

        y = W2 (silu(W x) V x)      dx = W^T (silu'(W x) V x dh) + V^T (silu(W x) dh), dh = W2^T dy

    Shapes:  x (..., n_in); y (..., n_out); between them hidden features.
    Source:  Shazeer 2020, arXiv:2002.05202, section 2.
    Options: W, W_out: initializers, of W and V, and of W2 where it is another.
    """
    gate = serial(dense(hidden, W, None), silu())
    both = parallel(gate, dense(hidden, W, None), join="product")
    return serial(both, dense(n_out, W if W_out is None else W_out, None), name=f"swiglu({hidden}, {n_out})")


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
    """Attention, then a layer for each position; both take their input normalised, and add to it.

        h = x + dropout(attention(norm(x)))      y = h + dropout(mlp(norm(h)))
        dh = dy + b_mlp(dy)      dx = dh + b_attention(dh)

    Shapes:  x, y (m, T, width).
    Source:  Xiong et al. 2020, arXiv:2002.04745, figure 1(b), the norm before.
    Options: kv_heads, causal, rotary: those of attention. mlp: a layer, gelu_mlp(4 width, width) where none is given.
             norm: a constructor, layer_norm or rms_norm. rate: of the dropouts, none at 0. W, b, W_out: initializers,
             of all weights and biases, and of the last weights of attention and of gelu_mlp where they are others.
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


@located("bidirectional")
def bidirectional(cell: Layer, back: Layer | None = None) -> Layer:
    """A cell turned from first to last, another from last to first, side by side.

        y[t] = (forward's y[t], back's y[t])      dx[t] = the sum of what both pass back

    Shapes: x (m, T, n_in); y (m, T, both widths together).
    Source: Schuster & Paliwal 1997, IEEE Transactions on Signal Processing 45, Bidirectional recurrent neural networks.
    Options: back: the cell from last to first, one like the other where none is given. Its weights are its own.
    """
    return parallel(scan(cell), scan(cell if back is None else back, reverse=True), join="concat")


@located("stacked")
def stacked(*cells: Layer, rate: float = 0.0) -> Layer:
    """Recurrent layers, each reading what the one below puts out.

        y = scan(c_n)(... scan(c_2)(scan(c_1)(x)))      dx = b_1(... b_n(dy)), as serial

    Shapes:  x (m, T, n_in); y (m, T, n_out of the last).
    Source:  Graves, Mohamed & Hinton 2013, arXiv:1303.5778, section 2.
    Options: rate: of dropout between them, none at 0.
    Raises:  ValueError without a cell; TypeError for a cell that is no Layer.
    """
    if not cells:
        raise ValueError("stacked: at least one cell is due")
    check_each("stacked", "stacked", cells, Layer)
    check_rate("stacked", rate)
    scans = [layer for cell in cells for layer in (scan(cell), dropout(rate))]
    return serial(*(scans[:-1] if rate else scans[::2]), name="stacked")
