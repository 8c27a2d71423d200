"""The fully connected layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float

from fnbp.arrays.checks import check_size
from fnbp.arrays.masks import kept
from fnbp.construction import constructor
from fnbp.factor import Mixed, Outer, Sum
from fnbp.layer import Layer, stateless
from fnbp.layers.initializers import initializer_of
from fnbp.layers.parameters import Shapes, add_bias, due, optional, weights
from fnbp.losses.linear import Scores

__all__ = ["dense"]


@constructor
def dense(n_out: int, W: str | Callable = "glorot_uniform", b: str | Callable | None = "zeros") -> Layer:
    """Multiply the features by a matrix and add a bias: the fully connected layer.

        z = x W^T + b
        dW = dz^T x      db = sum dz      dx = dz W

    Shapes:   x (..., n_in); z (..., n_out); W (n_out, n_in); b (n_out,); saved x.
    Forward:  fnbp/README.md, B1.
    Backward: fnbp/README.md, B6 for dW and db, B5 for dx.
    Options:  W: initializer of the weight matrix, a name (see fnbp.initializer) or a function (key, shape, dtype) ->
              array. b: initializer of the bias; b=None: no bias.
    Raises:   ValueError if n_out is below 1, an initializer is unknown, or params do not fit x; TypeError if key is not
              a random key or x is not floating point.
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

    layer = stateless(init, forward, backward, name, mask="position", alone=True)
    return layer._replace(traits=replace(layer.traits, scores=handing_on(layer, check)))


def handing_on(layer: Layer, check: Callable[[Any, Any], None]) -> Layer:
    """The layer that hands on x, W and b as Scores, and is told dx, dW and db by the loss; see linear_cross_entropy."""

    def forward(params, state, x, ctx):
        check(params, x)
        layer.traits.mask(layer.name, x, ctx.mask)
        return Scores(kept(ctx.mask, x), params["W"], params.get("b"), x.dtype), state, (ctx.mask,)

    def backward(params, res, da):
        (mask,) = res
        return due(params, W=Mixed(da.W), b=Mixed(da.b)), kept(mask, da.x)

    return layer._replace(forward=forward, backward=backward)
