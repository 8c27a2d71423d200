"""Gradients of which no example has more than its share: clipped one by one, with noise on request."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_is, check_positive
from fnbp.backpropagation import Pass, backprop, check_training
from fnbp.combinators.unrolling import unrolled
from fnbp.contraction import keep
from fnbp.contractions import sq_norms
from fnbp.factor import Factor
from fnbp.layer import Context, Layer, leaves
from fnbp.losses.loss import Loss

__all__ = ["clipped"]

ROOM = 1 << 30  # bytes of factors that are kept for one backward
TURNS = 12  # of a loop that is written out
APART = 2**31 - 1  # of the key of the noise from those of layers, which count from 0


def clipped(
    net: Layer,
    loss: Loss,
    limit: float,
    per_layer: bool = False,
    noise: float | None = None,
    passes: int | None = None,
) -> Callable[..., Any]:
    """Make the function of J and the mean of clipped gradients: (params, state, x, y, ctx) -> (value, state), gradient.

        c_i = min(1, limit / |g_i|)      gradient = sum_i c_i g_i / m      + noise limit N(0, 1) / m

    The shape of value_and_grad, for any training step: fit(..., gradient=functools.partial(clipped, limit=1.0)). value
    is J, without clipping.

    In one backward the factors are kept, scaled and summed; in two the first gives the norms and the second the sum, so
    that no factor outlives its layer. In one, loops over depth of at most 12 turns are written out: what a loop keeps
    of each turn it copies.

    Options: per_layer: clip the gradient of each layer to limit; the layers of a repeat are one. noise: the standard
             deviation of what is added to the sum, in units of the most that one example can change it: of limit, or,
             per layer, of limit sqrt(layers). It is drawn with ctx.key. passes: 1 or 2; by default 1 if all factors
             take at most 1 GiB.
    Source:  Abadi et al. 2016, arXiv:1607.00133, algorithm 1; Lee & Kifer 2020, arXiv:2009.03106, for two passes.
    Raises:  ValueError if limit is not above 0, noise is negative, passes is not 1 or 2, or 2 per layer, there is noise
             and no ctx.key, or the net has no parameters; TypeError, by its name, if a layer mixes the examples.
    """
    check_is("clipped", "net", net, Layer)
    check_is("clipped", "loss", loss, Loss)
    limit = check_positive("clipped", "limit", limit)
    check_is("clipped", "per_layer", per_layer, bool)
    if noise is not None and not (isinstance(noise, (int, float)) and noise >= 0):
        raise ValueError(f"clipped: noise must be a number from 0 on, got {noise!r}")
    if passes not in (None, 1, 2) or (passes == 2 and per_layer):
        raise ValueError(f"clipped: passes must be 1 or 2, and 1 per layer; got {passes!r}")
    kept_of, squares_of = backprop(net, loss, keep), backprop(net, loss, sq_norms)
    in_one = in_one_backward(net, loss, limit, per_layer)

    def clipped_of(params, state, x, y, ctx=Context()):
        check_training(net, ctx)
        if not jax.tree.leaves(params):
            raise ValueError(f"clipped: {net.name} has no parameters")
        if noise and ctx.key is None:
            raise ValueError("clipped: noise needs a key: Context(key, train=True)")
        given = params, state, x, y, ctx
        if per_layer or passes == 1 or (passes is None and size_of(jax.eval_shape(kept_of, *given).grads) <= ROOM):
            done = in_one(*given)
        else:
            squares = jax.tree.leaves(squares_of(*given).grads)
            scale = share(all_of(squares), limit)
            done = backprop(net, loss, lambda factor: summed(factor, scale))(*given)
        grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), done.grads, params)
        if noise:
            spread = noise * limit * np.sqrt(len(list(layers_of(net, params))) if per_layer else 1)
            grads = noisy(grads, jax.random.fold_in(ctx.key, APART), spread / jax.tree.leaves(x)[0].shape[0])
        return (done.value, done.state), grads

    return clipped_of


def in_one_backward(net: Layer, loss: Loss, limit: float, per_layer: bool) -> Callable[..., Pass]:
    """A pass whose factors are kept, scaled and summed; layer by layer the layers of a repeat stay one."""
    flat = unrolled(net, most=0 if per_layer else TURNS)
    run = backprop(flat.net, loss, keep)

    def clipped_pass(params, state, x, y, ctx):
        done = run(flat.apart(params), flat.apart(state), x, y, ctx)
        scales = scales_of(flat.net, done.grads, limit, per_layer)
        grads = jax.tree.map(summed, done.grads, scales, is_leaf=is_factor)
        return done._replace(grads=flat.together(grads), state=flat.together(done.state))

    return clipped_pass


def all_of(squares: list[jax.Array]) -> jax.Array:
    """Their sum."""
    return sum(squares[1:], squares[0])


def share(squares: jax.Array, limit: float) -> jax.Array:
    """min(1, limit / norm), (m,); 1 for a gradient of 0."""
    return jnp.minimum(1, limit / jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny)))


def scales_of(net: Layer, kept: Any, limit: float, per_layer: bool) -> Any:
    """How much of each example's gradient is left, (m,) for each parameter: a tree of params."""
    squares = jax.tree.map(sq_norms, kept, is_leaf=is_factor)
    if not per_layer:
        scale = share(all_of(jax.tree.leaves(squares)), limit)
        return jax.tree.map(lambda _: scale, squares)
    leaf, tree = jax.tree.flatten(squares)
    places = jax.tree.unflatten(tree, range(len(leaf)))
    for _, _, own in layers_of(net, places):
        scale = share(all_of([leaf[i] for i in jax.tree.leaves(own)]), limit)
        for i in jax.tree.leaves(own):
            leaf[i] = scale
    return jax.tree.unflatten(tree, leaf)


def layers_of(net: Layer, tree: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, its entry) of the layers that have parameters."""
    return (found for found in leaves(net, tree) if jax.tree.leaves(found[2]))


def summed(factor: Factor, scale: jax.Array) -> jax.Array:
    """The mean over examples of their gradients, each scaled."""
    return factor.scaled(scale / factor.examples).total()


def noisy(grads: Any, key: jax.Array, spread: float) -> Any:
    """grads with independent normal numbers of that standard deviation added."""
    leaf, tree = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaf))
    return jax.tree.unflatten(
        tree, [g + spread * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaf, keys, strict=True)]
    )


def is_factor(node: Any) -> bool:
    """True for a factor."""
    return isinstance(node, Factor)


def size_of(tree: Any) -> int:
    """How many bytes the arrays of a tree take."""
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
