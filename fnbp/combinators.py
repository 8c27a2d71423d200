"""Layers made of layers."""

import jax

from fnbp.checks import check_is, check_key, check_parts, located
from fnbp.layer import Context, Layer


def serial(*layers: Layer) -> Layer:
    """Layers one after the other.

        y = f_n(... f_2(f_1(x)))      dx = b_1(b_2(... b_n(dy))), the chain rule, last layer first

    params, state, factors: a tuple, one entry a layer.
    Source: the document, section 3.2, steps 1 and 3.
    Raises: ValueError where params or state are not of these layers; TypeError for a key, or a layer, that is none.
    """
    for i, layer in enumerate(layers):
        check_is("serial", f"part {i}", layer, Layer)

    def init(key, x):
        check_key("serial", key)
        params, states = [], []
        for i, layer in enumerate(layers):
            with located(f"serial[{i}].{layer.name}"):
                p, s = layer.init(jax.random.fold_in(key, i), x)
                x, _, _ = jax.eval_shape(layer.forward, p, s, x, Context())
            params.append(p)
            states.append(s)
        return tuple(params), tuple(states)

    def forward(params, state, x, ctx):
        check_parts("serial", "params", params, len(layers))
        check_parts("serial", "state", state, len(layers))
        states, saved = [], []
        for i, (layer, p, s, c) in enumerate(zip(layers, params, state, ctx.split(len(layers)), strict=True)):
            with located(f"serial[{i}].{layer.name}"):
                x, s, res = layer.forward(p, s, x, c)
            states.append(s)
            saved.append(res)
        return x, tuple(states), tuple(saved)

    def backward(params, res, dy):
        factors = []
        for i in reversed(range(len(layers))):
            with located(f"serial[{i}].{layers[i].name}"):
                f, dy = layers[i].backward(params[i], res[i], dy)
            factors.append(f)
        return tuple(reversed(factors)), dy

    return Layer(init, forward, backward, "serial", layers, lambda parts: serial(*parts))


def skip(layer: Layer) -> Layer:
    """A layer, and a path around it.

        y = x + f(x)      dx = dy + b(dy)

    params, state, factors: a tuple of one entry.
    Source: He et al. 2015, arXiv:1512.03385, section 3.2.
    Raises: ValueError where the layer changes the shape; TypeError for a layer that is none.
    """
    check_is("skip", "the layer", layer, Layer)

    def init(key, x):
        with located(f"skip[0].{layer.name}"):
            p, s = layer.init(key, x)
            y, _, _ = jax.eval_shape(layer.forward, p, s, x, Context())
        check_same(x, y)
        return (p,), (s,)

    def forward(params, state, x, ctx):
        check_parts("skip", "params", params, 1)
        check_parts("skip", "state", state, 1)
        with located(f"skip[0].{layer.name}"):
            y, s, res = layer.forward(params[0], state[0], x, ctx)
        check_same(x, y)
        return x + y, (s,), (res,)

    def backward(params, res, dy):
        with located(f"skip[0].{layer.name}"):
            factors, dx = layer.backward(params[0], res[0], dy)
        return (factors,), dy + dx

    def check_same(x, y):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"skip: {layer.name} maps {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}; "
                "a sum with its input needs the same"
            )

    return Layer(init, forward, backward, "skip", (layer,), lambda parts: skip(*parts))
