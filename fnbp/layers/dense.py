"""The fully connected layer."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from fnbp.arrays.checks import check_size
from fnbp.factor import Outer, Sum
from fnbp.layer import Layer, stateless
from fnbp.layers.initializers import initializer_of
from fnbp.layers.parameters import Shapes, add_bias, due, optional, weights

__all__ = ["dense"]


def dense(n_out: int, W: str | Callable = "glorot_uniform", b: str | Callable | None = "zeros") -> Layer:
    """A weighted sum of the features for each of n_out units.

        z = x W^T + b
        dW = dz^T x      db = sum dz      dx = dz W

    Shapes:   x (..., n_in); z (..., n_out); W (n_out, n_in); b (n_out,); saved x.
    Forward:  the document, section 4.1.
    Backward: the document, section 4.2.
    Options:  W, b: an initializer by name (see fnbp.initializer) or a function (key, shape, dtype) -> array;
              b=None: without.
    Raises:   ValueError for n_out < 1, an unknown initializer, params that do not fit x; TypeError for a key that is
              none, and for x that is not floating point.
    """
    name = f"dense({n_out})"
    check_size(name, "n_out", n_out)

    def shapes(x: Any) -> Shapes:
        return {"W": (n_out, x.shape[-1]), "b": (n_out,)}

    hint = "; the number of inputs is inferred from x"
    init, check = weights(name, shapes, W=initializer_of(name, "W", W, hint=hint), b=optional(name, "b", b))

    def forward(params: dict, x: Float[Array, "*m n_in"]) -> tuple[Float[Array, "*m n_out"], tuple]:
        check(params, x)
        return add_bias(x @ params["W"].T, params), (x,)

    def backward(params: dict, res: tuple, dz: Float[Array, "*m n_out"]) -> tuple[dict, Float[Array, "*m n_in"]]:
        (x,) = res
        return due(params, W=Outer(dz, x), b=Sum(dz)), dz @ params["W"]

    return stateless(init, forward, backward, name, mask="position", alone=True)
