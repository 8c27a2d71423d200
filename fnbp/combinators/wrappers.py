"""One layer in another setting: with a path around it, recomputed, in another dtype, over lengths, untrained."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_array, check_floating, check_held, check_is, concrete, describe, shown
from fnbp.arrays.masks import check_mask, kept
from fnbp.arrays.sums import like
from fnbp.combinators.factors import Cast
from fnbp.combinators.parts import at_path, one_part, placed
from fnbp.combinators.stepping import beginning, going_on
from fnbp.construction import constructor
from fnbp.contraction import Contracted, is_open
from fnbp.factor import Factor
from fnbp.layer import Context, Layer, counting, map_layers, mask_behind, mask_of, shape_of, traits_of
from fnbp.losses.linear import Scores
from fnbp.steps import Steps

__all__ = ["cast", "freeze", "ragged", "remat", "skip"]


@constructor
def skip(layer: Layer) -> Layer:
    """Add a path around a layer.

        y = x + f(x)      dx = dy + b(dy)

    params, state, factors: a tuple of one entry.
    Source: He et al. 2015, arXiv:1512.03385, section 3.2.
    Raises: ValueError if the layer changes the shape; TypeError if the argument is not a Layer.
    """
    part = placed("skip", 0, layer)

    def init(key, x):
        check_floating("skip", "x", x)
        params, state = part.init(key, x)
        check_same(x, shape_of(part, params, state, x))
        return params, state

    def forward(params, state, x, ctx):
        check_floating("skip", "x", x)
        y, state, res = part.forward(params, state, x, ctx)
        check_same(x, y)
        return x + y, state, res

    def backward(params, res, dy):
        factors, dx = part.backward(params, res, dy)
        return factors, dy + dx

    def check_same(x, y):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"skip: {layer.name} maps {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}; "
                "a sum with its input needs the same"
            )

    functions = counting("skip", mask_of(layer), forward, backward)
    return one_part("skip", layer, *functions, skip, init)


@constructor
def remat(layer: Layer) -> Layer:
    """Save only the input of a layer, and compute again what its backward needs.

        y = f(x)      dx = b(dy), after another forward

    On the CPU the compiler finds the second forward and keeps the first one's results, as with jax.checkpoint, but for
    loops: there, repeat(remat(layer), n), it saves what it should.

    params, state, factors: a tuple of one entry; saved: state, x, and the context.
    Source: Chen et al. 2016, arXiv:1604.06174, section 4.
    Raises: TypeError if the argument is not a Layer.
    """
    part = placed("remat", 0, layer)

    def forward(params, state, x, ctx):
        y, new_state, _ = part.forward(params, state, x, ctx)
        return y, new_state, (state, x, ctx)

    def backward(params, res, dy):
        # behind the barrier, or the compiler finds that it has all this already, and keeps it
        params, (state, x, ctx), dy = jax.lax.optimization_barrier((params, res, dy))
        _, _, res = part.forward(params, state, x, ctx)
        return part.backward(params, res, dy)

    traits = traits_of(layer, mask_of(layer), last=0)
    return one_part("remat", layer, forward, backward, remat, traits=traits)


@constructor
def cast(layer: Layer, dtype: Any) -> Layer:
    """Compute a layer in another dtype: bfloat16 inside, float32 weights and neighbours outside.

        y = f(x), params and x cast on the way in, y cast back      dy cast in, dx and factors cast back

    params, state, factors: a tuple of one entry. params and state are in the dtypes that the layer has without the
    cast, and so are gradients; per-example quantities are in the wider of those and dtype.
    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.1, for the weights that stay wide.
    Raises: TypeError if the first argument is not a Layer, or dtype is not one of floating point numbers.
    """
    check_is("cast", "the layer", layer, Layer)
    try:
        low = jnp.dtype("None" if dtype is None else dtype)  # None is float64 to NumPy
    except TypeError as error:
        raise TypeError(f"cast: expected a floating point dtype, got {shown(dtype)}") from error
    if not jnp.issubdtype(low, jnp.floating):
        raise TypeError(f"cast: expected a floating point dtype, got {low}")
    part = placed(f"cast({low})", 0, layer)

    def forward(params, state, x, ctx):
        due = shape_of(part, params, state, x, ctx)
        y, state, res = part.forward(to(low, params), state, to(low, x), ctx)
        if isinstance(y, Scores):  # which are cast when they are formed
            return replace(y, dtype=due.dtype), state, (res, None, like(x))
        return to_dtypes_of(due, y), state, (res, like(y), like(x))

    def backward(params, res, dy):
        res, like_y, like_x = res
        dy = dy if isinstance(dy, Scores) else to_dtypes_of(like_y, dy)
        factors, dx = part.backward(to(low, params), res, dy)
        leaves = jax.tree.leaves(params)
        wide = jnp.result_type(*leaves) if leaves else low
        return cast_back(factors, wide, low), to_dtypes_of(like_x, dx)

    traits = traits_of(layer, mask_of(layer), last=0)
    return one_part(f"cast({low})", layer, forward, backward, lambda layer: cast(layer, low), traits=traits)


def cast_back(tree: Any, dtype: Any, low: Any) -> Any:
    """Factors computed in low, and what was made of them, in the dtype of the parameters."""
    rows = jnp.promote_types(dtype, low)

    def back(node: Any) -> Any:
        if isinstance(node, Factor):
            return Cast(node, dtype, rows)
        if isinstance(node, Contracted):
            return node.map(lambda made: cast_back(made, rows, low))
        return to(dtype, node)

    return jax.tree.map(back, tree, is_leaf=is_open)


def to(dtype: Any, tree: Any) -> Any:
    """The floating leaves in that dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def to_dtypes_of(like: Any, tree: Any) -> Any:
    """Each leaf in the dtype of the leaf of like that stands in its place; None stays None."""
    return jax.tree.map(lambda a, b: None if b is None else b.astype(a.dtype), like, tree, is_leaf=lambda a: a is None)


@constructor
def ragged(layer: Layer) -> Layer:
    """Apply a layer to sequences of different lengths, each filled up at its end.

        y = f(x), where Context.mask is True below each length      dx = b(dy); lengths have no cotangent

    The input is a pair (x, lengths), x (m, T, ...) and lengths (m,), whole numbers from 0 to T: data of fit may be
    ragged so. It goes around the layers that know a mask: scan, attention, last.

    params, state, factors: a tuple of one entry.
    Raises: ValueError if x is not a pair, lengths have another shape, or, outside jit, a length is outside 0..T;
            TypeError if the argument is not a Layer, or lengths are not integers.
    """
    part = placed("ragged", 0, layer)

    def init(key, x):
        x, _ = check_lengths(x)
        return part.init(key, x)

    def forward(params, state, x, ctx):
        x, lengths = check_lengths(x)
        mask = counted(x, lengths, ctx.mask)
        after = mask_behind(part, x, mask)
        y, state, res = part.forward(params, state, kept(mask, x), replace(ctx, mask=mask))
        wrong = (lengths < 0) | (lengths > x.shape[1])  # seen by jit only: outside of it they were refused
        return handed_on(lambda y: spoilt(wrong, kept(after, y)), y), state, (res, mask, after, wrong)

    def backward(params, res, dy):
        res, mask, after, wrong = res
        factors, dx = part.backward(params, res, handed_on(lambda dy: spoilt(wrong, kept(after, dy)), dy))
        return factors, (kept(mask, dx), None)

    def rule(name, x, mask):
        if x is None:
            raise TypeError(
                f"{name}: it makes a mask of lengths, so it stands first in a net whose output has positions"
            )
        x, lengths = check_lengths(x)
        return mask_behind(layer, x, counted(x, lengths, mask))

    traits = replace(traits_of(layer, rule), alone=False, last=0)
    return one_part("ragged", layer, forward, backward, ragged, init, traits)


def handed_on(f: Callable, y: Any) -> Any:
    """f(y), or of Scores f of their x: a position of which nothing is left has no score either."""
    return replace(y, x=f(y.x)) if isinstance(y, Scores) else f(y)


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
    """x and lengths; ValueError or TypeError unless they are such a pair."""
    if not isinstance(x, tuple) or len(x) != 2:
        raise ValueError(f"ragged: expected a pair (x, lengths), got {describe(x)}")
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


@constructor
def freeze(layer: Layer) -> Layer:
    """Take the weights of a layer out of training: they stand in the state, where no optimizer sees them.

        y = f(x)      dx = b(dy)

    It stands still: batch_norm inside uses its running statistics, in training too, and they do not move.

    params: none, {}; state: {"params": ..., "state": ...} of the layer. Put trained weights there:
    net = freeze(layer); state = {"params": params, "state": state}.
    Raises: TypeError if the argument is not a Layer; ValueError if there are params, or state is not as above.
    """
    check_is("freeze", "the layer", layer, Layer)
    name = f"freeze({layer.name})"
    net = map_layers(standing, layer)
    still = at_path(name, net)

    def init(key, x):
        params, state = still.init(key, x)
        return {}, {"params": params, "state": state}

    def forward(params, state, x, ctx):
        check_held(name, "params", params, {})
        if not isinstance(state, Mapping) or set(state) != {"params", "state"}:
            raise ValueError(f"{name}: state must hold 'params' and 'state' of the layer, got {describe(state)}")
        y, new_state, res = still.forward(state["params"], state["state"], x, ctx)
        return y, {**state, "state": new_state}, (state["params"], res)

    def backward(params, res, dy):
        frozen, res = res
        _, dx = still.backward(frozen, res, dy)
        return {}, dx

    def first(params, state, x, length):
        y, kept, _ = beginning(net, length).forward(state["params"], state["state"], x, Context())
        return y, kept

    def then(params, state, kept, x):
        y, kept, _ = going_on(net).forward(state["params"], kept, x, Context())
        return y, kept

    return Layer(init, forward, backward, name, traits=traits_of(still, mask_of(still), steps=Steps(first, then)))


def standing(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer that mixes examples in training only, as it is at inference."""
    if layer.traits.mixes != "training":
        return layer

    def forward(params, state, x, ctx):
        return layer.forward(params, state, x, replace(ctx, train=False))

    return layer._replace(forward=forward, traits=replace(layer.traits, mixes="never"))
