"""Gradients of which no example has more than its share: clipped one by one, with noise on request."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_is, check_positive, describe
from fnbp.arrays.sums import wide
from fnbp.backpropagation import Pass, backprop, check_training
from fnbp.combinators.unrolling import unrolled
from fnbp.contraction import as_is, is_plain
from fnbp.contractions import quadratic, rows_of, sq_norms
from fnbp.factor import Factor
from fnbp.layer import Context, Layer, leaves
from fnbp.losses.loss import Loss
from fnbp.losses.weights import only_some
from fnbp.statistics.of_opened import opens

__all__ = ["clipped"]

ROOM = 1 << 30  # bytes of factors that are kept for one backward
TURNS = 12  # of a loop that is written out
APART = 2**31 - 1  # of the key of the noise from those of layers, which count from 0


@opens
def clipped(
    net: Layer,
    loss: Loss,
    limit: float,
    per_layer: bool = False,
    noise: float | None = None,
    passes: int | None = None,
    size: float | None = None,
) -> Callable[..., Any]:
    """Make the function of J and the mean of clipped gradients: (params, state, x, y, ctx, counts) -> J, gradient.

        c_i = min(1, limit / |g_i|)      gradient = sum_i c_i g_i / size      + noise limit N(0, 1) / size

    It returns (value, state), gradient as value_and_grad does, for any training step: fit(...,
    gradient=functools.partial(clipped, limit=1.0)). value is J, without clipping, of the examples that count.

    In one backward the factors are kept, scaled and summed; in two the first gives the norms and the second the sum, so
    that no factor outlives its layer. In one, loops over depth of at most 12 turns are written out: what a loop keeps
    of each turn it copies.

    An example that does not count adds exactly 0. One whose gradient, or the square of it, is not finite makes the sum
    NaN, which fit reports; but with noise, where that would give it away, or with counts it adds 0.

    Privacy: to add or leave out one example changes the sum by at most limit, up to rounding; per layer by limit
             sqrt(layers). An accountant of the sampled Gaussian mechanism asks that each step draws each example with
             probability q, independently: give such batches with counts, and size = q times the number of all examples.
             fit shuffles, which is another way to sample, and where it fills up the last batch of an epoch it clips to
             limit times the share of examples that count: Batches(..., drop_last=True). The noise is a function of
             ctx.key: give another key in each step, since two gradients with one key have the same noise, and their
             difference has none. J and state are not private.

    Shapes:  counts (m,) of bool: which examples count; by default all.
    Options: per_layer: clip the gradient of each layer to limit; the layers of a repeat are one. noise: the standard
             deviation of what is added to the sum, in units of the most that one example can change it: of limit, or,
             per layer, of limit sqrt(layers). It is drawn with ctx.key. passes: 1 or 2; by default 1 if all factors
             take at most 1 GiB. size: what the sum is divided by; by default how many examples count.
    Source:  Abadi et al. 2016, arXiv:1607.00133, algorithm 1; Lee & Kifer 2020, arXiv:2009.03106, for two passes.
    Raises:  ValueError if limit or size is not above 0, noise is negative or not finite, or there is noise without
             ctx.key, with counts and no size, or with a loss that is a share of the whole batch
             (reduce="tokens"; it takes no counts, either); if passes is not 1 or 2, or 2 per layer, counts do not fit
             x, or the net has no parameters. TypeError, by its name, if a layer mixes the examples.
    """
    limit = checked(net, loss, limit, per_layer, noise, passes, size)

    def clipped_of(params, state, x, y, ctx=Context(), counts=None):
        check_training(net, ctx)
        m = jax.tree.leaves(x)[0].shape[0]
        check_given(net, loss, params, ctx, noise, size, counts, m)
        many = m if counts is None else jnp.maximum(jnp.sum(counts), 1)
        over = many if size is None else size
        of = loss if counts is None else only_some(loss)
        given = params, state, x, y if counts is None else (y, counts), ctx
        safe = bool(noise) or counts is not None
        done, grads = means_of(net, of, limit, per_layer, passes, given, over, safe)
        if noise:
            most = limit * np.sqrt(len(list(layers_of(net, params))) if per_layer else 1)
            grads = noisy(grads, params, jax.random.fold_in(ctx.key, APART), noise * most / over)
        return (done.value if counts is None else done.value * (m / many), done.state), grads

    return clipped_of


def means_of(
    net: Layer, loss: Loss, limit: float, per_layer: bool, passes: int | None, given: Any, over: Any, safe: bool
) -> tuple[Pass, Any]:
    """A pass, and the sums of its clipped gradients, divided by over. given: what backprop is given."""
    kept_of = backprop(net, loss, as_is)
    if per_layer or passes == 1 or (passes is None and size_of(jax.eval_shape(kept_of, *given).grads) <= ROOM):
        return in_one_backward(net, loss, limit, per_layer, given, over, safe)
    scale = share(all_of(jax.tree.leaves(backprop(net, loss, sq_norms)(*given).grads)), limit, safe)
    done = backprop(net, loss, lambda factor: summed(factor, scale, over, safe))(*given)
    return done, done.grads


def in_one_backward(
    net: Layer, loss: Loss, limit: float, per_layer: bool, given: Any, over: Any, safe: bool
) -> tuple[Pass, Any]:
    """The same, of factors that are kept, scaled and summed; layer by layer the layers of a repeat stay one."""
    flat = unrolled(net, most=0 if per_layer else TURNS)
    params, state, *rest = given
    done = backprop(flat.net, loss, as_is)(flat.apart(params), flat.apart(state), *rest)
    scales = scales_of(flat.net, done.grads, limit, per_layer, safe)
    m = jax.tree.leaves(done.prediction)[0].shape[0]
    sums = jax.tree.map(lambda f, scale: summed(f, m * scale, over, safe), done.grads, scales, is_leaf=is_factor)
    return done._replace(state=flat.together(done.state)), flat.together(sums)


def checked(net: Any, loss: Any, limit: Any, per_layer: Any, noise: Any, passes: Any, size: Any) -> float:
    """limit as a float; ValueError or TypeError unless these are options of clipped."""
    check_is("clipped", "net", net, Layer)
    check_is("clipped", "loss", loss, Loss)
    limit = check_positive("clipped", "limit", limit)
    check_is("clipped", "per_layer", per_layer, bool)
    if noise is not None and not (isinstance(noise, (int, float)) and 0 <= noise < np.inf):
        raise ValueError(f"clipped: noise must be a number from 0 on, got {noise!r}")
    if passes not in (None, 1, 2) or (passes == 2 and per_layer):
        raise ValueError(f"clipped: passes must be 1 or 2, and 1 per layer; got {passes!r}")
    if size is not None:
        check_positive("clipped", "size", size)
    return limit


def check_given(
    net: Layer, loss: Loss, params: Any, ctx: Context, noise: float | None, size: float | None, counts: Any, m: int
) -> None:
    """ValueError or TypeError unless a batch of m examples fits the options of clipped."""
    if not jax.tree.leaves(params):
        raise ValueError(f"clipped: {net.name} has no parameters")
    if noise and ctx.key is None:
        raise ValueError("clipped: noise needs a key: Context(key, train=True)")
    if (noise or counts is not None) and loss.positions is not None:
        raise ValueError(
            f"clipped: in {loss.name} each loss is a share of the whole batch, so an example changes the gradients of "
            "others: it takes neither noise nor counts; use reduce='examples'"
        )
    if counts is None:
        return
    if jnp.shape(counts) != (m,) or jnp.result_type(counts) != np.bool_:
        raise ValueError(f"clipped: counts must be of bool, one for each of {m} examples; got {describe(counts)}")
    if noise and size is None:
        raise ValueError(
            "clipped: how many examples count is itself private: with noise and counts give size, the expected number"
        )


def all_of(squares: list[jax.Array]) -> jax.Array:
    """Their sum."""
    return sum(squares[1:], squares[0])


def share(squares: jax.Array, limit: float, safe: bool) -> jax.Array:
    """min(1, limit / norm), (m,); 1 for a gradient of 0; NaN for one whose square is not finite, or, if safe, 0."""
    least = jnp.finfo(squares.dtype).tiny
    scale = jnp.minimum(1, limit / jnp.sqrt(jnp.maximum(squares, least)))
    return jnp.where(jnp.isfinite(squares), scale, 0 if safe else jnp.nan)


def scales_of(net: Layer, kept: Any, limit: float, per_layer: bool, safe: bool) -> Any:
    """How much of each example's gradient is left, (m,) for each parameter: a tree of params."""
    squares = jax.tree.map(lambda f: quadratic(sq_norms(f), f.examples), kept, is_leaf=is_factor)
    if not per_layer:
        scale = share(all_of(jax.tree.leaves(squares)), limit, safe)
        return jax.tree.map(lambda _: scale, squares)
    leaf, tree = jax.tree.flatten(squares)
    places = jax.tree.unflatten(tree, range(len(leaf)))
    for _, _, own in layers_of(net, places):
        scale = share(all_of([leaf[i] for i in jax.tree.leaves(own)]), limit, safe)
        for i in jax.tree.leaves(own):
            leaf[i] = scale
    return jax.tree.unflatten(tree, leaf)


def layers_of(net: Layer, tree: Any) -> Iterator[tuple[Any, ...]]:
    """(path, leaf, its entry) of the layers that have parameters."""
    return (found for found in leaves(net, tree) if jax.tree.leaves(found[2]))


def summed(factor: Factor, scale: jax.Array, over: Any, safe: bool) -> jax.Array:
    """The sum of the gradients of all examples, each scaled, divided by over. safe: a scale of 0 leaves out NaN.

    Where their norms are those of gradients that are formed, they are summed as they are.
    """

    def only(a: jax.Array, axis: int) -> jax.Array:
        if axis < 0:
            return a
        return jnp.where((scale > 0).reshape(-1, *[1] * (a.ndim - 1 - axis)), a, 0)

    if is_plain(factor) and sq_norms.forms_rows(factor):
        rows = rows_of(factor)
        whole = jnp.tensordot(wide(scale / over), only(rows, 0) if safe else rows, 1)
        return whole.astype(jax.eval_shape(factor.total).dtype)
    kept = jax.tree.map(only, factor, factor.example_axes()) if safe and factor.sliced else factor
    return kept.weighted(scale / over)


def noisy(grads: Any, params: Any, key: jax.Array, spread: float) -> Any:
    """grads with independent normal numbers of that standard deviation added, in at least float32."""
    leaf, tree = jax.tree.flatten(grads)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaf))))

    def noisy_leaf(g: jax.Array, p: jax.Array, key: jax.Array) -> jax.Array:
        g = wide(g)
        return (g + spread * jax.random.normal(key, g.shape, g.dtype)).astype(jnp.result_type(p))

    return jax.tree.map(noisy_leaf, grads, params, keys)


def is_factor(node: Any) -> bool:
    """True for a factor."""
    return isinstance(node, Factor)


def size_of(tree: Any) -> int:
    """How many bytes the arrays of a tree take."""
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
