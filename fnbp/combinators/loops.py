"""Loops that are compiled once: over time, with the same weights in every turn, and over depth, with others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnbp.arrays.checks import check_array, check_is, check_key, check_size, concrete
from fnbp.arrays.masks import check_mask
from fnbp.arrays.placement import varying, zeros_beside
from fnbp.arrays.sums import like
from fnbp.combinators.factors import over_depth, over_time, together, turns
from fnbp.combinators.parts import at_path, one_part, placed
from fnbp.construction import constructor
from fnbp.contraction import is_open
from fnbp.layer import Context, Layer, Static, mask_of, mixing, shape_of, traits_of
from fnbp.steps import Steps, Whole

__all__ = ["repeat", "scan"]


@constructor
def repeat(layer: Layer, n: int) -> Layer:
    """Apply a layer n times, each time with weights of its own, compiled once.

        y = f_n(... f_2(f_1(x)))      dx = b_1(b_2(... b_n(dy))), as serial

    Shapes: params, state: a tuple of one entry, whose arrays have a first axis of n; so have the factors: Stacked.
    Source: fnbp/README.md, B1 and B5, with lax.scan for the loop over layers.
    Raises: ValueError if n is below 1, the layer changes the shape, or params or state do not belong to this layer;
            TypeError if the argument is not a Layer, or key is not a random key.
    """
    name = f"repeat({n})"
    check_size(name, "n", n)
    part = placed(name, 0, layer)

    def init(key, x):
        check_key(name, key)
        params, state = jax.vmap(lambda i: part.init(jax.random.fold_in(key, i), x))(jnp.arange(n))
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
        check_same(name, layer, x, shape_of(part, first[0], first[1], x))
        return params, state

    def forward(params, state, x, ctx):
        def turn(x, each):
            p, s, key = each
            y, s, res = part.forward(p, s, x, replace(ctx, key=key))
            check_same(name, layer, x, y)
            return y, (s, res)

        for leaf in jax.tree.leaves(x):
            check_array(name, "x", leaf)
        check_values(part, params, state, x, ctx)
        y, (state, saved) = lax.scan(turn, x, (params, state, keys_of(ctx, n)), length=n)
        return y, state, saved

    def backward(params, res, dy):
        def turn(dy, each):
            p, r = each
            factors, dx = part.backward(p, r, dy)
            return dx, (factors, ())

        dx, factors, _ = turns(turn, dy, (params, res), length=n, reverse=True)
        return jax.tree.map(over_depth, together(*factors), is_leaf=is_open), dx

    def check_turns(what, tree):
        sizes = {jnp.shape(a)[:1] for a in jax.tree.leaves(tree)} - {(n,)}
        if sizes:
            raise ValueError(
                f"{name}: {what} must have a first axis of {n}, got {sorted(sizes)}; do they belong to a different net?"
            )

    traits = traits_of(layer, mask_of(layer), turns=n)
    return one_part(name, layer, forward, backward, lambda layer: repeat(layer, n), init, traits, check_turns)


@constructor
def scan(cell: Layer, reverse: bool = False) -> Layer:
    """Turn a cell once for every position, first to last or back: recurrence, and its backward through time.

        h[t], y[t] = cell(h[t-1], x[t])
        dh[t-1], dx[t] = its backward of (dh[t], dy[t]), last turn first      weights: one contraction after the loop

    A cell is a Layer from (h, x) to (h, y); h is any tree, None its start: zeros. A scan takes x and returns y; given
    (h_0, x) it returns (h_T, y). Where Context.mask is False h stays and y is 0. It is a leaf with the cell's params.

    Without a mask, an lstm_cell or a gru_cell is run in chunks of 8 positions: see fnbp/layers/sequences.py.

    Shapes:  x (m, T, ...); y (m, T, ...); mask (m, T); saved: what the cell saves, T times; of chunks x, y, gates.
    Source:  Werbos 1990, Proceedings of the IEEE 78, Backpropagation through time.
    Options: reverse: from the last position to the first; y stands where its x does.
    Raises:  ValueError if the sequence is empty, the mask has another shape, or the cell changes the shape of h;
             TypeError if the cell is not a Layer, the mask is not of bool, or there is one and the cell mixes examples.
    """
    check_is("scan", "the cell", cell, Layer)
    check_is("scan", "reverse", reverse, bool)
    name = f"scan({cell.name}, reverse)" if reverse else f"scan({cell.name})"
    turned = at_path(name, cell)
    whole = whole_of(cell)

    def forward(params, state, x, ctx):
        given, (h, x) = isinstance(x, tuple), check_sequence(name, x)
        if ctx.mask is not None and (path := mixing(cell, ctx)):
            raise TypeError(f"{name}: {path} mixes the examples, also those that the mask leaves out")
        mask, keys = mask_in_time(name, ctx, x), keys_of(ctx, x.shape[1])
        h_0 = of_zeros(turned, params, state, x, ctx) if h is None else jax.tree.map(lambda a: varying(a, x), h)
        at_once = whole is not None and mask is None and x.shape[1] >= whole.least
        if whole is not None and at_once:
            check_turn(name, turned, params, state, h_0, x, ctx)
            h_T, y, saved = whole.forward(params, h_0, x, reverse)
        else:
            turn, each = one_turn(name, turned, params, ctx), (time_first(x), mask, keys)
            (h_T, state), (y, saved) = lax.scan(turn, (h_0, state), each, reverse=reverse)
            y = example_first(y)
        return (h_T, y) if given else y, state, (saved, mask, like(h_T), Static((h is None, at_once)))

    def backward(params, res, dy):
        saved, mask, like_h, static = res
        from_zeros, at_once = static.value
        given, (dh_T, dy) = isinstance(dy, tuple), dy if isinstance(dy, tuple) else (zeros_of(like_h, dy), dy)

        def turn(dh, each):
            res, counts, dy = each
            factors, (dh_in, dx) = turned.backward(params, res, (where(counts, dh, 0), where(counts, dy, 0)))
            around = dh_in if counts is None else where(counts, dh_in, dh)  # h went around the cell
            return around, (factors, dx)

        if whole is not None and at_once:
            factors, dh_0, dx = whole.backward(params, saved, dh_T, dy, reverse)
        else:
            dh_0, factors, dx = turns(turn, dh_T, (saved, mask, time_first(dy)), reverse=not reverse)
            factors, dx = over_time(*factors), example_first(dx)
        return factors, (None if from_zeros else dh_0, dx) if given else dx

    steps = None if reverse else steps_of(turned, forward)
    traits = traits_of(cell, positions_stay, carries=True, steps=steps)
    return Layer(init_of(name, turned), forward, backward, name, traits=traits)


def init_of(name: str, cell: Layer) -> Callable:
    """The init of scan: that of its cell, with the first position of x."""

    def init(key, x):
        check_key(name, key)
        h, x = check_sequence(name, x)
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0], *a.shape[2:]), a.dtype), x)
        return cell.init(key, (h, first))

    return init


def one_turn(name: str, cell: Layer, params: Any, ctx: Context) -> Callable:
    """(h and state, (x, counts, key)) -> h and state, (y, res): the forward at one position."""

    def turn(carry, each):
        (h, state), (x, counts, key) = carry, each
        x = where(counts, x, 0)  # what stands at a position that does not count may be NaN
        (new, y), state, res = cell.forward(params, state, (h, x), replace(ctx, key=key, mask=None))
        check_same(name, cell, h, new)
        return (where(counts, new, h), state), (where(counts, y, 0), res)

    return turn


def whole_of(cell: Layer) -> Whole | None:
    """How a cell is run over a whole sequence, if it says so, and its functions are those that this equals."""
    whole = cell.traits.whole
    return whole if whole is not None and whole.fits(cell) else None


def check_turn(name: str, cell: Layer, params: Any, state: Any, h: Any, x: jax.Array, ctx: Context) -> None:
    """Let the cell check its params, h and x, without computing a turn. ValueError if it changes the shape of h."""
    check_same(name, cell, h, shape_of(cell, params, state, (h, x[:, 0]), ctx)[0])


def steps_of(cell: Layer, forward: Callable) -> Steps:
    """How a scan goes from one position to the next: it keeps h, and the state of its cell."""

    def onward(params: Any, state: Any, h: Any, x: Any) -> tuple[Any, tuple]:
        (h, y), state, _ = forward(params, state, (h, x), Context())
        return y, (h, state)

    def first(params: Any, state: Any, x: Any, length: int) -> tuple[Any, tuple]:
        return onward(params, state, None, x)

    def then(params: Any, state: Any, kept: tuple, x: Any) -> tuple[Any, tuple]:
        h, state = kept
        due = start_of(cell, params, state, x, Context())  # another dtype where cast asks for shapes
        return onward(params, state, jax.tree.map(lambda a, b: a.astype(b.dtype), h, due), x)

    return Steps(first, then)


def positions_stay(name: str, x: Any, mask: Any) -> Any:
    """The rule of scan: y stands at the positions of x, or of the x in (h_0, x)."""
    x = x[1] if isinstance(x, tuple) else x
    if mask is not None and x is not None:
        check_mask(name, mask, x.shape[:2])
    return mask


def check_values(layer: Layer, params: Any, state: Any, x: Any, ctx: Context) -> None:
    """Let the first turn check its state, outside jit: there the state has values, and within the loop it has none."""
    if jax.tree.leaves(state) and all(map(concrete, jax.tree.leaves(state))):
        p, s = jax.tree.map(lambda a: a[0], (params, state))
        jax.eval_shape(lambda x: layer.forward(p, s, x, ctx)[0], x)


def check_sequence(name: str, x: Any) -> tuple[Any, Any]:
    """h_0, or None, and x; ValueError unless x is a sequence of at least one position."""
    if isinstance(x, tuple) and len(x) != 2:
        raise ValueError(f"{name}: expected x, or (h_0, x); got a tuple of {len(x)}")
    h, x = x if isinstance(x, tuple) else (None, x)
    check_array(name, "x", x)
    if len(x.shape) < 2 or not x.shape[1]:
        raise ValueError(f"{name}: x must be (m, T, ...) with T at least 1, got shape {tuple(x.shape)}")
    return h, x


def of_zeros(cell: Layer, params: Any, state: Any, x: jax.Array, ctx: Context) -> Any:
    """The h that the cell takes None for."""
    return zeros_of(start_of(cell, params, state, x, ctx), x)


def start_of(cell: Layer, params: Any, state: Any, x: jax.Array, ctx: Context) -> Any:
    """Shapes and dtypes of that h."""
    return shape_of(cell, params, state, (None, x[:, 0]), replace(ctx, mask=None))[0]


def mask_in_time(name: str, ctx: Context, x: jax.Array) -> jax.Array | None:
    """The mask, time first. As check_mask raises."""
    if ctx.mask is None:
        return None
    check_mask(name, ctx.mask, x.shape[:2])
    return jnp.moveaxis(ctx.mask, 1, 0)


def keys_of(ctx: Context, n: int) -> jax.Array | None:
    """A key for each of n turns. TypeError if the key is not a random key."""
    if ctx.key is not None:
        check_key("Context", ctx.key)
    return None if ctx.key is None else jax.vmap(lambda i: jax.random.fold_in(ctx.key, i))(jnp.arange(n))


def zeros_of(tree: Any, beside: jax.Array) -> Any:
    """Zeros of these shapes and dtypes, with the examples of another array."""
    m = beside.shape[:1]
    return jax.tree.map(lambda a: zeros_beside(beside, m + a.shape[1:], a.dtype), tree)


def time_first(tree: Any) -> Any:
    """(m, T, ...) as (T, m, ...)."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)


def example_first(tree: Any) -> Any:
    """(T, m, ...) as (m, T, ...)."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), tree)


def where(counts: jax.Array | None, yes: Any, no: Any) -> Any:
    """yes for the examples that count, no, a tree or 0, for the others; yes if there is no mask."""
    if counts is None:
        return yes
    no = jax.tree.map(lambda a: jnp.zeros((), a.dtype), yes) if isinstance(no, int) else no
    return jax.tree.map(lambda a, b: jnp.where(counts.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


def check_same(name: str, layer: Layer, x: Any, y: Any) -> None:
    """ValueError if a layer returns another shape or dtype than it takes."""
    forms = [[f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tree)] for tree in (x, y)]
    if forms[0] != forms[1] or jax.tree.structure(x) != jax.tree.structure(y):
        raise ValueError(
            f"{name}: {layer.name} maps {', '.join(forms[0])} to {', '.join(forms[1])}; both must be the same"
        )
