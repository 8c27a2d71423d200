"""One layer in another setting: recomputed, in another dtype, untrained."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.checks import check_array, check_held, check_is, check_parts, concrete, describe, located, shown
from fnbp.compound import Cast, Contracted, Stacked, is_contracted, is_open
from fnbp.factor import Factor
from fnbp.layer import Layer, map_layers, mask_behind, mask_of, shape_of, traits_of
from fnbp.masks import check_mask, kept
from fnbp.sums import like


def remat(layer: Layer) -> Layer:
    """A layer that saves its input alone, and computes what backward needs once more.

        y = f(x)      dx = b(dy), after another forward

    On the CPU the compiler finds the second forward and keeps the first one's results, as with jax.checkpoint, but for
    loops: there, repeat(remat(layer), n), it saves what it should.

    params, state, factors: a tuple of one entry; saved: state, x, and the context.
    Source: Chen et al. 2016, arXiv:1604.06174, section 4.
    Raises: TypeError for a layer that is none.
    """
    check_is("remat", "the layer", layer, Layer)
    here = f"remat[0].{layer.name}"

    def init(key, x):
        with located(here):
            p, s = layer.init(key, x)
        return (p,), (s,)

    def forward(params, state, x, ctx):
        check_parts("remat", "params", params, 1)
        check_parts("remat", "state", state, 1)
        with located(here):
            y, s, _ = layer.forward(params[0], state[0], x, ctx)
        return y, (s,), (state[0], x, ctx)

    def backward(params, res, dy):
        # behind the barrier, or the compiler finds that it has all this already, and keeps it
        params, (state, x, ctx), dy = jax.lax.optimization_barrier((params, res, dy))
        with located(here):
            _, _, res = layer.forward(params[0], state, x, ctx)
            factors, dx = layer.backward(params[0], res, dy)
        return (factors,), dx

    traits = traits_of(layer, mask_of(layer))
    return Layer(init, forward, backward, "remat", (layer,), lambda parts: remat(*parts), traits)


def cast(layer: Layer, dtype: Any) -> Layer:
    """A layer computed in another dtype: bfloat16 inside, float32 weights and neighbours outside.

        y = f(x), params and x cast on the way in, y cast back      dy cast in, dx and factors cast back

    params, state, factors: a tuple of one entry. params and state are in the dtypes that the layer has without the
    cast, and so are gradients; per-example quantities are in the wider of those and dtype.
    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.1, for the weights that stay wide.
    Raises: TypeError for a layer that is none, and for a dtype that is not floating point.
    """
    check_is("cast", "the layer", layer, Layer)
    try:
        low = jnp.dtype("None" if dtype is None else dtype)  # None is float64 to NumPy
    except TypeError as error:
        raise TypeError(f"cast: a floating point dtype is due, got {shown(dtype)}") from error
    if not jnp.issubdtype(low, jnp.floating):
        raise TypeError(f"cast: a floating point dtype is due, got {low}")
    name = f"cast({low})"
    here = f"{name}[0].{layer.name}"

    def init(key, x):
        with located(here):
            p, s = layer.init(key, x)
        return (p,), (s,)

    def forward(params, state, x, ctx):
        check_parts(name, "params", params, 1)
        check_parts(name, "state", state, 1)
        with located(here):
            due = shape_of(layer, params[0], state[0], x, ctx)
            y, s, res = layer.forward(to(low, params[0]), state[0], to(low, x), ctx)
        return to_dtypes_of(due, y), (s,), (res, like(y), like(x))

    def backward(params, res, dy):
        res, like_y, like_x = res
        with located(here):
            factors, dx = layer.backward(to(low, params[0]), res, to_dtypes_of(like_y, dy))
        widest = jnp.result_type(low, *jax.tree.leaves(params[0]))
        return (jax.tree.map(partial(widened, widest), factors, is_leaf=is_open),), to_dtypes_of(like_x, dx)

    traits = traits_of(layer, mask_of(layer))
    return Layer(init, forward, backward, name, (layer,), lambda parts: cast(parts[0], low), traits)


def to(dtype: Any, tree: Any) -> Any:
    """The floating leaves in that dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def to_dtypes_of(like: Any, tree: Any) -> Any:
    """Each leaf in the dtype of the leaf of like that stands in its place; None stays None."""
    return jax.tree.map(lambda a, b: None if b is None else b.astype(a.dtype), like, tree, is_leaf=lambda a: a is None)


def widened(dtype: Any, node: Any) -> Any:
    """A factor, or what was made of it, in the dtype of the parameters."""
    if isinstance(node, Stacked) and is_contracted(node):
        return replace(node, factor=widened(dtype, node.factor))
    if isinstance(node, Factor):
        return Cast(node, dtype)
    if isinstance(node, Contracted):
        return replace(node, value=jax.tree.map(partial(widened, dtype), node.value, is_leaf=is_open))
    return to(dtype, node)


def ragged(layer: Layer) -> Layer:
    """A layer over sequences of different lengths, each filled up at its end.

        y = f(x), where Context.mask is True below each length      dx = b(dy); lengths have no cotangent

    The input is a pair (x, lengths), x (m, T, ...) and lengths (m,), whole numbers from 0 to T: data of fit may be
    ragged so. It goes around the layers that know a mask: scan, attention, last.

    params, state, factors: a tuple of one entry.
    Raises: ValueError for x that is no pair, lengths of another shape, and, outside jit, a length outside 0..T;
            TypeError for a layer that is none, lengths that are no integers.
    """
    check_is("ragged", "the layer", layer, Layer)
    here = f"ragged[0].{layer.name}"

    def init(key, x):
        x, _ = check_lengths(x)
        with located(here):
            p, s = layer.init(key, x)
        return (p,), (s,)

    def forward(params, state, x, ctx):
        check_parts("ragged", "params", params, 1)
        check_parts("ragged", "state", state, 1)
        x, lengths = check_lengths(x)
        mask = counted(x, lengths, ctx.mask)
        with located(here):
            after = mask_behind(layer, x, mask)
            y, s, res = layer.forward(params[0], state[0], kept(mask, x), replace(ctx, mask=mask))
        wrong = (lengths < 0) | (lengths > x.shape[1])  # seen by jit only: outside of it they were refused
        return spoilt(wrong, kept(after, y)), (s,), (res, mask, after, wrong)

    def backward(params, res, dy):
        res, mask, after, wrong = res
        with located(here):
            factors, dx = layer.backward(params[0], res, spoilt(wrong, kept(after, dy)))
        return (factors,), (kept(mask, dx), None)

    def rule(name, x, mask):
        if x is None:
            raise TypeError(
                f"{name}: it makes a mask of lengths, so it stands first in a net whose output has positions"
            )
        x, lengths = check_lengths(x)
        return mask_behind(layer, x, counted(x, lengths, mask))

    traits = replace(traits_of(layer, rule), alone=False)
    return Layer(init, forward, backward, "ragged", (layer,), lambda parts: ragged(*parts), traits)


def counted(x: Any, lengths: Any, mask: Any) -> Any:
    """The mask of positions below each length, and where another mask is given below both."""
    at = np.arange(x.shape[1])
    if concrete(lengths):  # so that a check of values within sees them
        with jax.ensure_compile_time_eval():
            own = at < lengths[:, None]
    else:
        own = at < lengths[:, None]
    if mask is None:
        return own
    check_mask("ragged", mask, own.shape)
    return own & mask


def spoilt(wrong: Any, tree: Any) -> Any:
    """NaN for the examples that are wrong."""

    def one(a: Any) -> Any:
        at = wrong.reshape(-1, *[1] * (a.ndim - 1))
        return jnp.where(at, jnp.asarray(jnp.nan, a.dtype), a) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(one, tree)


def check_lengths(x: Any) -> tuple[Any, Any]:
    """x and lengths; ValueError or TypeError where they are no such pair."""
    if not isinstance(x, tuple) or len(x) != 2:
        raise ValueError(f"ragged: a pair (x, lengths) is due, got {describe(x)}")
    x, lengths = x
    for what, a in (("x", x), ("lengths", lengths)):
        check_array("ragged", what, a)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"ragged: lengths must be integers, got {describe(lengths)}")
    if len(x.shape) < 2 or lengths.shape != x.shape[:1]:
        raise ValueError(f"ragged: x of shape {x.shape} needs lengths of shape {x.shape[:1]}, got {lengths.shape}")
    T = x.shape[1]
    if concrete(lengths):
        n = np.asarray(lengths)
        for i in np.flatnonzero((n < 0) | (n > T))[:1].tolist():
            raise ValueError(f"ragged: length {n[i]} of example {i} is outside 0..{T}, the positions of x")
    return x, lengths


def freeze(layer: Layer) -> Layer:
    """A layer whose weights are not trained: they stand in the state, where no optimiser sees them.

        y = f(x)      dx = b(dy)

    It stands still: batch_norm inside uses its running statistics, in training too, and they do not move.

    params: none, {}; state: {"params": ..., "state": ...} of the layer. Put trained weights there:
    net = freeze(layer); state = {"params": params, "state": state}.
    Raises: TypeError for a layer that is none; ValueError for params, or a state without the layer's.
    """
    check_is("freeze", "the layer", layer, Layer)
    name = f"freeze({layer.name})"
    still = map_layers(standing, layer)

    def init(key, x):
        with located(name):
            params, state = layer.init(key, x)
        return {}, {"params": params, "state": state}

    def forward(params, state, x, ctx):
        check_held(name, "params", params, {})
        if not isinstance(state, Mapping) or set(state) != {"params", "state"}:
            raise ValueError(f"{name}: state must hold 'params' and 'state' of the layer, got {describe(state)}")
        with located(name):
            y, s, res = still.forward(state["params"], state["state"], x, ctx)
        return y, {**state, "state": s}, (state["params"], res)

    def backward(params, res, dy):
        frozen, res = res
        with located(name):
            _, dx = still.backward(frozen, res, dy)
        return {}, dx

    return Layer(init, forward, backward, name, traits=traits_of(still, mask_of(still)))


def standing(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer that mixes examples in training only, as it is at inference."""
    if layer.traits.mixes != "training":
        return layer

    def forward(params, state, x, ctx):
        return layer.forward(params, state, x, replace(ctx, train=False))

    return layer._replace(forward=forward, traits=replace(layer.traits, mixes="never"))
