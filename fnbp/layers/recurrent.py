"""Recurrent cells, from (h, x) to (h, y): fnbp.scan runs them over time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import check_floating, check_params, check_size, describe
from fnbp.arrays.placement import zeros_beside
from fnbp.construction import constructor
from fnbp.factor import Outer, Sum
from fnbp.layer import Layer, stateless
from fnbp.layers.initializers import initializer, initializer_of
from fnbp.layers.parameters import Shapes, drawn
from fnbp.layers.sequences import GRU, LSTM, in_chunks
from fnbp.steps import with_whole

__all__ = ["gru_cell", "lstm_cell", "rnn_cell"]

X = Float[Array, "m d"]
Y = Float[Array, "m n"]
sigma = jax.nn.sigmoid


@constructor
def rnn_cell(n: int, W: str | Callable = "glorot_uniform", U: str | Callable = "orthogonal") -> Layer:
    """Elman's cell: tanh of a dense layer of the input and the last output.

        h' = tanh(W x + b + U h + c)      y = h'
        da = dh' (1 - h'^2)               dW = da x^T    db = dc = sum da    dU = da h^T    dx = W^T da    dh = U^T da

    Here dh' includes dy.

    Shapes:   x (m, d); h, h', y (m, n); W (n, d); U (n, n); b, c (n,); saved x, h, h'.
    Forward:  Elman 1990, Cognitive Science 14; two biases as in PyTorch.
    Backward: fnbp/README.md, B4 to B6, with tanh' = 1 - tanh^2.
    Options:  n: number of units. W, U: initializers of the matrices, a name (see fnbp.initializer) or a function (key,
              shape, dtype) -> array. h=None in the input: start from zeros.
    Raises:   ValueError if n is below 1, or params or h do not fit; TypeError if x is not floating point.
    """
    name = f"rnn_cell({n})"

    def forward(params: dict, hx: Any) -> tuple[tuple[Any, Y], tuple]:
        (h,), x = check_turn(name, params, hx, n, 1)
        y = jnp.tanh(x @ params["W"].T + params["b"] + h @ params["U"].T + params["c"])
        return (y, y), (x, h, y)

    def backward(params: dict, res: tuple, d: tuple[Any, Y]) -> tuple[dict, tuple[Any, X]]:
        x, h, y = res
        dh, dy = d
        dh = dh + dy
        da = dh * (1 + y) * (1 - y)
        factors = {"W": Outer(da, x), "U": Outer(da, h), "b": Sum(da), "c": Sum(da)}
        return factors, (da @ params["U"], da @ params["W"])

    return stateless(init_of(name, n, 1, W, U), forward, backward, name)


@constructor
def lstm_cell(n: int, W: str | Callable = "glorot_uniform", U: str | Callable = "orthogonal") -> Layer:
    """Long short-term memory: gates that decide what a cell s keeps, adds and shows.

        i, f, g, o = sigma, sigma, tanh, sigma of the quarters of a = W x + b + U h + c
        s' = f s + i g      h' = o tanh s'      y = h'
        do = dh' tanh s'    ds' += dh' o (1 - tanh^2 s')    di = ds' g    df = ds' s    dg = ds' i    ds = ds' f
        da = (di i (1 - i), df f (1 - f), dg (1 - g^2), do o (1 - o))
        dW = da x^T    db = dc = sum da    dU = da h^T    dx = W^T da    dh = U^T da

    Here dh' includes dy. The carry is (h, s).

    Shapes:   x (m, d); h, s, y (m, n); W (4n, d); U (4n, n); b, c (4n,); saved x, h, s, i, f, g, o, tanh s'.
    Forward:  Hochreiter & Schmidhuber 1997, Neural Computation 9; the forget gate of Gers, Schmidhuber & Cummins 2000,
              Neural Computation 12; the order of the gates and two biases as in PyTorch.
    Backward: Greff et al. 2015, arXiv:1503.04069, section II.B, without peepholes.
    Options:  n: number of units. W, U: initializers of the matrices, a name (see fnbp.initializer) or a function (key,
              shape, dtype) -> array. (h, s)=None in the input: start from zeros.
    Raises:   ValueError if n is below 1, or params or the carry do not fit; TypeError if x is not floating point.
    """
    name = f"lstm_cell({n})"

    def forward(params: dict, hx: Any) -> tuple[tuple[Any, Y], tuple]:
        (h, s), x = check_turn(name, params, hx, n, 4)
        a = x @ params["W"].T + params["b"] + h @ params["U"].T + params["c"]
        a_i, a_f, a_g, a_o = jnp.split(a, 4, -1)
        i, f, g, o = sigma(a_i), sigma(a_f), jnp.tanh(a_g), sigma(a_o)
        s_new = f * s + i * g
        tanh_s = jnp.tanh(s_new)
        y = o * tanh_s
        return ((y, s_new), y), (x, h, s, i, f, g, o, tanh_s)

    def backward(params: dict, res: tuple, d: tuple[Any, Y]) -> tuple[dict, tuple[Any, X]]:
        x, h, s, i, f, g, o, tanh_s = res
        (dh, ds), dy = d
        dh = dh + dy
        do = dh * tanh_s
        ds = ds + dh * o * (1 + tanh_s) * (1 - tanh_s)
        di, df, dg = ds * g, ds * s, ds * i
        da = jnp.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 + g) * (1 - g), do * o * (1 - o)], -1)
        factors = {"W": Outer(da, x), "U": Outer(da, h), "b": Sum(da), "c": Sum(da)}
        return factors, ((da @ params["U"], ds * f), da @ params["W"])

    return with_whole(stateless(init_of(name, n, 4, W, U), forward, backward, name), in_chunks(LSTM))


@constructor
def gru_cell(n: int, W: str | Callable = "glorot_uniform", U: str | Callable = "orthogonal") -> Layer:
    """The gated recurrent unit.

        r, z = sigma of the first two thirds of a + e      a = W x + b      e = U h + c
        k = tanh t, t = a_k + r e_k                        h' = (1 - z) k + z h      y = h'
        dk = dh' (1 - z)    dz = dh' (h - k)    dt = dk (1 - k^2)    dr = dt e_k
        da = (dr r (1 - r), dz z (1 - z), dt)              de = (the same, the same, dt r)
        dW = da x^T    db = sum da    dx = W^T da          dU = de h^T    dc = sum de    dh = U^T de + dh' z

    Here dh' includes dy.

    Shapes:   x (m, d); h, y (m, n); W (3n, d); U (3n, n); b, c (3n,); saved x, h, r, z, k, e_k.
    Forward:  Cho et al. 2014, arXiv:1406.1078, section 2.3; as in PyTorch, r multiplies U h + c, and r comes before z.
    Backward: by the chain rule.
    Options:  n: number of units. W, U: initializers of the matrices, a name (see fnbp.initializer) or a function (key,
              shape, dtype) -> array. h=None in the input: start from zeros.
    Raises:   ValueError if n is below 1, or params or h do not fit; TypeError if x is not floating point.
    """
    name = f"gru_cell({n})"

    def forward(params: dict, hx: Any) -> tuple[tuple[Any, Y], tuple]:
        (h,), x = check_turn(name, params, hx, n, 3)
        a_r, a_z, a_k = jnp.split(x @ params["W"].T + params["b"], 3, -1)
        e_r, e_z, e_k = jnp.split(h @ params["U"].T + params["c"], 3, -1)
        r, z = sigma(a_r + e_r), sigma(a_z + e_z)
        k = jnp.tanh(a_k + r * e_k)
        y = (1 - z) * k + z * h
        return (y, y), (x, h, r, z, k, e_k)

    def backward(params: dict, res: tuple, d: tuple[Any, Y]) -> tuple[dict, tuple[Any, X]]:
        x, h, r, z, k, e_k = res
        dh, dy = d
        dh = dh + dy
        dk, dz = dh * (1 - z), dh * (h - k)
        dt = dk * (1 + k) * (1 - k)
        da_r, da_z = dt * e_k * r * (1 - r), dz * z * (1 - z)
        da, de = jnp.concatenate([da_r, da_z, dt], -1), jnp.concatenate([da_r, da_z, dt * r], -1)
        factors = {"W": Outer(da, x), "U": Outer(de, h), "b": Sum(da), "c": Sum(de)}
        return factors, (de @ params["U"] + dh * z, da @ params["W"])

    return with_whole(stateless(init_of(name, n, 3, W, U), forward, backward, name), in_chunks(GRU))


def shapes_of(n: int, gates: int, x: Any) -> Shapes:
    """The shapes of the parameters of a cell."""
    return {"W": (gates * n, x.shape[-1]), "U": (gates * n, n), "b": (gates * n,), "c": (gates * n,)}


def init_of(name: str, n: int, gates: int, W: str | Callable, U: str | Callable) -> Callable:
    """The init (key, (h, x)) -> params of a cell."""
    check_size(name, "n", n)
    zeros = initializer("zeros")
    makers = {"W": initializer_of(name, "W", W), "U": initializer_of(name, "U", U), "b": zeros, "c": zeros}

    def init(key: Any, hx: Any) -> dict[str, jax.Array]:
        _, x = check_pair(name, hx)
        check_floating(name, "x", x)
        if len(x.shape) != 2 or not x.shape[1]:
            raise ValueError(f"{name}: x must be (m, d) with d at least 1, got shape {x.shape}")
        return drawn(name, key, shapes_of(n, gates, x), makers, x.dtype)

    return init


def check_pair(name: str, hx: Any) -> tuple[Any, Any]:
    """Return h and x. Raise a TypeError if hx is not a pair."""
    if not isinstance(hx, tuple) or len(hx) != 2:
        raise TypeError(
            f"{name}: a cell takes a pair (h, x), h=None for zeros, got {describe(hx)}; for a whole sequence: "
            f"fnbp.scan({name})"
        )
    return hx


def check_turn(name: str, params: Any, hx: Any, n: int, gates: int) -> tuple[tuple, jax.Array]:
    """Return the parts of h, zeros if h is None, and x. Raise a ValueError if params or h do not fit."""
    h, x = check_pair(name, hx)
    check_floating(name, "x", x)
    if len(x.shape) != 2:
        raise ValueError(f"{name}: x must be (m, d), got shape {x.shape}; for a whole sequence: fnbp.scan({name})")
    check_params(name, params, x, shapes_of(n, gates, x))
    count = 2 if gates == 4 else 1
    if h is None:
        return (zeros_beside(x, (x.shape[0], n), x.dtype),) * count, x
    parts = h if count == 2 else (h,)
    shape = (x.shape[0], n)
    shapes = [getattr(part, "shape", None) for part in parts] if isinstance(parts, tuple) else []
    if shapes != [shape] * count:
        expected = f"one array of shape {shape}" if count == 1 else f"a tuple (h, s), both arrays of shape {shape}"
        raise ValueError(f"{name}: h must be {expected}, or None for zeros; got {describe(h)}")
    for part in parts:
        check_floating(name, "h", part)
    return parts, x
