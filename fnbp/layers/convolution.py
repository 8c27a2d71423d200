"""Convolution: one small dense layer, moved over space or time; its transpose; and the bias that goes with it."""

from collections.abc import Callable

from jaxtyping import Array, Float

from fnbp.checks import check_params, check_size
from fnbp.factor import Correlation, Sum
from fnbp.initialisers import initialiser_of, weights
from fnbp.layer import Layer, stateless, without
from fnbp.masks import Rule, by_position
from fnbp.windows import Padding, Sizes, Sliding, convolve, convolve_back


def conv(
    n_out: int,
    kernel: Sizes,
    stride: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
) -> Layer:
    """A weighted sum over every window of the input, for each of n_out channels.

        y[p] = b + sum_k W[k] x[p stride + k dilation - low]
        dW[k] = sum_p dy[p] x[p stride + k dilation - low]^T      db = sum dy
        dx[i] = sum of W[k]^T dy[p] over all p, k with p stride + k dilation - low = i

    Shapes:   x (m, *size, n_in), of 1, 2 or more spatial axes; y (m, *count, n_out);
              W (n_out, *kernel, n_in / groups); b (n_out,); saved x.
    Forward:  Dumoulin & Visin 2016, arXiv:1603.07285, chapter 2, for the arithmetic of sizes.
    Backward: the same, chapter 4, for dx; dW by the chain rule.
    Options:  kernel, stride, dilation: one number, or one for each spatial axis. padding: "SAME", "VALID", numbers, or
              (low, high) pairs. groups: the channels in as many groups, each for itself; groups = n_in is depthwise.
              W, b: an initialiser by name (see fnbp.initialiser) or a function; b=None: without.
    Raises:   ValueError for sizes below 1, a kernel larger than the padded input, groups that do not divide n_in and
              n_out, params that do not fit x; TypeError for x that is not floating point.
    """
    name = f"conv({n_out}, {kernel})"
    slide = Sliding(name, kernel, stride, padding, dilation)
    check_size(name, "n_out", n_out)
    check_size(name, "groups", groups)
    check_divides(name, "n_out", n_out, groups)

    def over(x):
        check_divides(name, "the channels of x", x.shape[-1], groups)
        return slide.over(x.shape)

    def shapes(x):
        due = {"W": (n_out, *over(x).kernel, x.shape[-1] // groups), "b": (n_out,)}
        return due if b is not None else {"W": due["W"]}

    def forward(params: dict, x: Float[Array, "m *s n_in"]) -> tuple[Float[Array, "m *t n_out"], tuple]:
        check_params(name, params, x, shapes)
        y = convolve(x, params["W"], over(x), groups)
        return y + params["b"] if "b" in params else y, (x,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *t n_out"]) -> tuple[dict, Float[Array, "m *s n_in"]]:
        (x,) = res
        return {"W": Correlation(dy, x, over(x), groups), "b": Sum(dy)}, convolve_back(dy, params["W"], over(x), groups)

    init_b = initialiser_of(name, "b", "zeros" if b is None else b)
    init = weights(name, shapes, {"W": initialiser_of(name, "W", W, out_axis=0), "b": init_b})
    backward = backward if b is not None else without("b", backward)
    return stateless(init, forward, backward, name, mask=a_window_for_each(over), alone=True)


def a_window_for_each(over: Callable) -> Rule:
    """The rule of conv: every position has a window, in which the positions that do not count are padding."""

    def rule(name, x, mask):
        if mask is not None and len(getattr(x, "shape", ())) > 2:
            at = over(x)
            if at.count != at.size or set(at.stride) != {1}:
                raise TypeError(
                    f"{name}: under a mask (Context.mask, or ragged) every position needs a window: stride 1 and as "
                    f"many windows as positions, as with padding='SAME'; got stride {at.stride}, padding {at.padding}"
                )
        return by_position(name, x, mask)

    return rule


def conv_transpose(
    n_out: int,
    kernel: Sizes,
    stride: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
    W: str | Callable = "glorot_uniform",
    b: str | Callable | None = "zeros",
) -> Layer:
    """The transpose of a convolution: every position of the input spread over a window of the output.

        y[i] = b + sum of W[k]^T x[p] over all p, k with p stride + k dilation - low = i
        dW[k] = sum_p x[p] dy[p stride + k dilation - low]^T      db = sum dy
        dx[p] = sum_k W[k] dy[p stride + k dilation - low]

    Shapes:   x (m, *count, n_in); y (m, *size, n_out); b (n_out,); saved x. W (n_in, *kernel, n_out / groups), as
              in the convolution that it transposes.
              SAME: size = count stride; VALID: size = (count - 1) stride + the extent of the kernel; padding p cuts p
              positions off each end of that.
    Forward:  Dumoulin & Visin 2016, arXiv:1603.07285, chapter 4.
    Backward: dx is the convolution that the forward transposes; dW by the chain rule.
    Options:  as conv.
    Raises:   as conv; ValueError where the padding leaves nothing.
    """
    name = f"conv_transpose({n_out}, {kernel})"
    slide = Sliding(name, kernel, stride, padding, dilation)
    check_size(name, "n_out", n_out)
    check_size(name, "groups", groups)
    check_divides(name, "n_out", n_out, groups)

    def over(x):
        """The windows over y."""
        check_divides(name, "the channels of x", x.shape[-1], groups)
        return slide.behind(x.shape)

    def shapes(x):
        due = {"W": (x.shape[-1], *over(x).kernel, n_out // groups), "b": (n_out,)}
        return due if b is not None else {"W": due["W"]}

    def forward(params: dict, x: Float[Array, "m *s n_in"]) -> tuple[Float[Array, "m *t n_out"], tuple]:
        check_params(name, params, x, shapes)
        y = convolve_back(x, params["W"], over(x), groups)
        return y + params["b"] if "b" in params else y, (x,)

    def backward(params: dict, res: tuple, dy: Float[Array, "m *t n_out"]) -> tuple[dict, Float[Array, "m *s n_in"]]:
        (x,) = res
        factors = {"W": Correlation(dy, x, over(x), groups, spread=True), "b": Sum(dy)}
        return factors, convolve(dy, params["W"], over(x), groups)

    init_b = initialiser_of(name, "b", "zeros" if b is None else b)
    init = weights(name, shapes, {"W": initialiser_of(name, "W", W, 0, -1), "b": init_b})
    backward = backward if b is not None else without("b", backward)
    return stateless(init, forward, backward, name, alone=True)


def bias(b: str | Callable = "zeros") -> Layer:
    """A number of its own added to each channel.

        y = x + b
        db = sum dy      dx = dy

    Shapes: x, y (..., n); b (n,); nothing saved.
    Raises: ValueError for params that do not fit x; TypeError for x that is not floating point.
    """

    def shapes(x):
        return {"b": x.shape[-1:]}

    def forward(params: dict, x: Float[Array, "*m n"]) -> tuple[Float[Array, "*m n"], tuple]:
        check_params("bias", params, x, shapes)
        return x + params["b"], ()

    def backward(params: dict, res: tuple, dy: Float[Array, "*m n"]) -> tuple[dict, Float[Array, "*m n"]]:
        return {"b": Sum(dy)}, dy

    init = weights("bias", shapes, {"b": initialiser_of("bias", "b", b)})
    return stateless(init, forward, backward, "bias", mask="position", alone=True)


def check_divides(name: str, what: str, value: int, groups: int) -> None:
    """ValueError unless groups divide that many channels."""
    if value % groups:
        raise ValueError(f"{name}: {what} must be a multiple of groups, got {value} for {groups} groups")
