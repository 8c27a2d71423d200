"""Between fnbp and the rest of JAX: a manual backward inside any model, an automatic one inside any net."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.backpropagation import check_batch, conform, contracted
from fnbp.checks import check_is, check_key
from fnbp.factor import total
from fnbp.layer import Context, Layer, map_layers
from fnbp.losses import Loss, check_losses


def empty_state(layer: Layer, params: Any, x: Any) -> Any:
    """The state of a net that has none: a tree without arrays. ValueError where the net has some."""
    _, state = jax.eval_shape(layer.init, jax.random.key(0), x)
    if jax.tree.leaves(state):
        raise ValueError(f"to_jax: {layer.name} has state; give it as to_jax(layer, state=...)")
    return state


def to_jax(layer: Layer, state: Any = None, ctx: Context = Context()) -> Callable[[Any, Any], Any]:
    """A function apply(params, x) -> y for any JAX, Flax or Equinox model, with the manual backward as its VJP.

        jax.vjp(apply, params, x)[1](dy) = total of backward's factors, dx

    jax.grad, vjp, jit, vmap and hessian go through it; jvp cannot, as for any jax.custom_vjp.
    state and ctx are fixed; the new state is dropped. Params come from layer.init(key, x)[0].

    Raises: ValueError for a layer with state where none is given; TypeError for what is no Layer.
    """
    check_is("to_jax", "layer", layer, Layer)
    net = map_layers(contracted(total), layer)

    @jax.custom_vjp
    def apply(params, x):
        return forward(params, x)[0]

    def forward(params, x):
        y, _, res = net.forward(params, empty_state(layer, params, x) if state is None else state, x, ctx)
        return y, (params, res)

    def backward(saved, dy):
        params, res = saved
        grads, dx = net.backward(params, res, dy)
        return conform(grads, params), dx

    apply.defvjp(forward, backward)
    return apply


def from_jax(apply: Layer | Callable, init: Callable | None = None, name: str | None = None) -> Layer:
    """A Layer whose backward is jax.vjp: of any Layer, or of a function apply(params, x) -> y.

        from_jax(dense(10))                   the same layer, differentiated automatically
        from_jax(apply, init, "mine")         init(key, x) -> params; without it the function has no parameters: {}

    Its gradients come summed over examples, so total is the only contraction that it allows. Integers have no
    cotangent: there dx is None.

    Raises: TypeError for what is neither a Layer nor a function.
    """
    if isinstance(apply, Layer):
        layer = apply
    elif callable(apply):
        label = name or getattr(apply, "__name__", "from_jax")
        layer = lifted(apply, init or (lambda key, x: {}), label)
    else:
        raise TypeError(f"from_jax: a Layer or a function apply(params, x) is due, got {apply!r}")

    def forward(params, state, x, ctx):
        def differentiated(params, x):
            y, new_state, _ = layer.forward(params, state, x, ctx)
            return y, new_state

        y, pull, new_state = jax.vjp(differentiated, params, x, has_aux=True)
        return y, new_state, (pull,)

    def backward(params, res, dy):
        (pull,) = res
        dparams, dx = pull(dy)
        return dparams, jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, dx)

    return Layer(layer.init, forward, backward, name or f"from_jax({layer.name})")


def lifted(apply: Callable, init: Callable, name: str) -> Layer:
    """A Layer around a function apply(params, x) -> y, without a backward of its own."""

    def init_lifted(key, x):
        check_key(name, key)
        return init(key, x), {}

    def forward(params, state, x, ctx):
        return apply(params, x), state, ()

    def backward(params, res, dy):
        raise TypeError(f"{name}: it has no manual backward")

    return Layer(init_lifted, forward, backward, name)


def automatic_value_and_grad(net: Layer, loss: Loss) -> Callable[..., Any]:
    """fnbp.value_and_grad by jax.value_and_grad of the same forward: the reference for every comparison.

    Raises: as fnbp.value_and_grad; TypeError for what is no Layer, or no Loss.
    """
    check_is("automatic_value_and_grad", "net", net, Layer)
    check_is("automatic_value_and_grad", "loss", loss, Loss)

    def J(params, state, x, y, ctx):
        prediction, state, _ = net.forward(params, state, x, ctx)
        losses, _ = loss.forward(prediction, y)
        check_losses(loss.name, losses, prediction)
        return jnp.mean(losses), state

    def value_and_grad_of(params, state, x, y, ctx=Context()):
        check_batch(x, y)
        params, x, y = jax.tree.map(jnp.asarray, (params, x, y))
        return jax.value_and_grad(J, has_aux=True)(params, state, x, y, ctx)

    return value_and_grad_of
