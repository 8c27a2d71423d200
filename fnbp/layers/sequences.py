"""Recurrent cells over a whole sequence, a few positions at a time: how scan runs an lstm_cell or a gru_cell.

The formulas are those of the cell; what differs is when each is computed. Forward, for each chunk of 8 positions:

    a = W' x + b'                  of the chunk in one product
    the gates of a + U' h          turn by turn; W', U', b' are W, U, b, halved in the rows of sigma

Back, last chunk first: the errors da turn by turn, then dW, dU, db and dx of the chunk, while its arrays are in the
cache. So no array of the whole sequence is read twice, and but for the gates none is kept. What the totals do not need,
da of all positions, is not computed under jit.

Shapes, in a chunk: the position first, (c, m, ...).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fnbp.arrays.placement import einsum, varying, zeros_beside
from fnbp.arrays.sums import wide
from fnbp.factor import Outer, Sum
from fnbp.steps import Whole
from fnbp.wrapping import Formed

CHUNK = 8  # positions
UNROLL = 4  # turns that are compiled as one

X = Float[Array, "m t d"]
Y = Float[Array, "m t n"]


class Turn(NamedTuple):
    """A cell, turn by turn, where a = W' x + b' is there already.

    halves   for each gate 1/2 for sigma, 1 for tanh
    joined   True if U h + c is added to a, so that both have one error
    forward  (U', c', h, a)             -> h, (y, saved)
    backward (U, dh, (dy, saved, h))    -> dh, errors    of a, and of U h + c unless joined
    """

    halves: tuple[float, ...]
    joined: bool
    forward: Callable[..., Any]
    backward: Callable[..., Any]


# --- the long short-term memory ---


def lstm_turn(U: Any, c: Any, hs: Any, a: Any) -> tuple[Any, tuple]:
    """As the forward of lstm_cell; saved: the four gates, and s before the turn."""
    h, s = hs
    gates = i, f, g, o = lstm_gates(a + h @ U.T)
    s_new = f * s + i * g
    y = o * jnp.tanh(s_new)
    return (y, s_new), (y, (jnp.concatenate(gates, -1), s))


def lstm_turn_back(U: Any, d: Any, each: tuple) -> tuple[Any, tuple]:
    """As the backward of lstm_cell."""
    (dh, ds), (dy, (gates, s), _) = d, each
    i, f, g, o = jnp.split(gates, 4, -1)
    tanh_s = jnp.tanh(f * s + i * g)
    dh = dh + dy
    do = dh * tanh_s
    ds = ds + dh * o * (1 + tanh_s) * (1 - tanh_s)
    di, df, dg = ds * g, ds * s, ds * i
    da = jnp.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 + g) * (1 - g), do * o * (1 - o)], -1)
    return (da @ U, ds * f), (da,)


def lstm_gates(e: Any) -> tuple[Any, ...]:
    """i, f, g, o of W' x + U' h + b'."""
    e_i, e_f, e_g, e_o = jnp.split(e, 4, -1)
    return sigma(e_i), sigma(e_f), jnp.tanh(e_g), sigma(e_o)


# --- the gated recurrent unit ---


def gru_turn(U: Any, c: Any, h: Any, a: Any) -> tuple[Any, tuple]:
    """As the forward of gru_cell; saved: r, z, k and e_k."""
    a_r, a_z, a_k = jnp.split(a, 3, -1)
    e_r, e_z, e_k = jnp.split(h @ U.T + c, 3, -1)
    r, z = sigma(a_r + e_r), sigma(a_z + e_z)
    k = jnp.tanh(a_k + r * e_k)
    y = (1 - z) * k + z * h
    return y, (y, (r, z, k, e_k))


def gru_turn_back(U: Any, dh: Any, each: tuple) -> tuple[Any, tuple]:
    """As the backward of gru_cell."""
    dy, (r, z, k, e_k), h = each
    dh = dh + dy
    dk, dz = dh * (1 - z), dh * (h - k)
    dt = dk * (1 + k) * (1 - k)
    da_r, da_z = dt * e_k * r * (1 - r), dz * z * (1 - z)
    da, de = jnp.concatenate([da_r, da_z, dt], -1), jnp.concatenate([da_r, da_z, dt * r], -1)
    return de @ U + dh * z, (da, de)


def sigma(e: Any) -> Any:
    """sigma(2 e): the rows of a gate are halved. Not (1 + tanh e) / 2, which loses all digits of a closed gate."""
    return jax.nn.sigmoid(2 * e)


LSTM = Turn((0.5, 0.5, 1, 0.5), True, lstm_turn, lstm_turn_back)
GRU = Turn((0.5, 0.5, 1), False, gru_turn, gru_turn_back)


# --- a whole sequence ---


def in_chunks(turn: Turn) -> Whole:
    """How scan runs the cell of these turns over a whole sequence of at least 8 positions."""

    def forward(params: dict, h_0: Any, x: X, reverse: bool) -> tuple[Any, Y, tuple]:
        n = params["U"].shape[-1]
        half = jnp.repeat(jnp.asarray(turn.halves, params["U"].dtype), n)
        W, U = half[:, None] * params["W"], half[:, None] * params["U"]
        b, c = half * (params["b"] + params["c"] if turn.joined else params["b"]), half * params["c"]

        def chunk(size, carry, each):
            h, y = carry
            start, _ = each
            a = time_first(cut(x, start, size)) @ W.T + b
            last, (ys, saved) = lax.scan(partial(turn.forward, U, c), h, a, reverse=reverse, unroll=min(UNROLL, size))
            return (last, paste(y, time_first(ys), start)), (saved, hidden(h))

        y = varying(zeros_beside(x, (*x.shape[:2], n), hidden(h_0).dtype), h_0, params)
        (h_T, y), saved = over_chunks(chunk, (h_0, y), x.shape[1], reverse)
        return h_T, y, (x, y, hidden(h_0), saved)

    def backward(params: dict, res: tuple, dh: Any, dy: Y, reverse: bool) -> tuple[dict, Any, X]:
        x, y, h_0, saved = res

        def chunk(size, carry, each):
            dh, dx, sums = carry
            start, (saved, h) = each
            xs, ys, dys = (time_first(cut(a, start, size)) for a in (x, y, dy))
            hs = before(h, ys, reverse)
            step = partial(turn.backward, params["U"])
            dh, errors = lax.scan(step, dh, (dys, saved, hs), reverse=not reverse, unroll=min(UNROLL, size))
            inputs = (jnp.concatenate([xs, hs], -1),) if turn.joined else (xs, hs)
            sums = jax.tree.map(jnp.add, sums, [of_chunk(z, e) for z, e in zip(inputs, errors, strict=True)])
            dx = paste(dx, time_first(errors[0] @ params["W"]), start)
            return (dh, dx, sums), errors

        d, n, dtype = x.shape[-1], params["U"].shape[0], jnp.result_type(*map(wide, (x, y, dy)))
        widths = (d + h_0.shape[-1],) if turn.joined else (d, h_0.shape[-1])
        among = x, dy, dh, saved, params
        zeros = lambda *shape: varying(jnp.zeros(shape, dtype), among)  # noqa: E731
        sums = [(zeros(width, n), zeros(n)) for width in widths]
        dx = varying(zeros_beside(x, x.shape, jnp.result_type(params["W"], *jax.tree.leaves((dy, dh, saved)))), among)
        start = dh, dx, sums
        (dh_0, dx, sums), errors = over_chunks(chunk, start, x.shape[1], not reverse, saved)
        errors = in_order(*errors)
        da, de = errors[0], errors[-1]
        h = time_first(before(h_0, time_first(y), reverse))
        dWU, db = [[a.astype(da.dtype) for a in each] for each in zip(*sums, strict=True)]
        dW, dU = jnp.split(dWU[0], [d]) if turn.joined else dWU
        factors = {
            "W": Formed(Outer(da, x), dW.T),
            "U": Formed(Outer(de, h), dU.T),
            "b": Formed(Sum(da), db[0]),
            "c": Formed(Sum(de), db[-1]),
        }
        return factors, dh_0, dx

    return Whole(forward, backward, CHUNK)


def over_chunks(chunk: Callable, carry: Any, T: int, reverse: bool, each: Any = ((), ())) -> tuple[Any, tuple]:
    """chunk(size, carry, (start, each)) -> carry, y, for every chunk in order, and for the rest of T if there is one.

    Returns: the last carry, and the y of all chunks and of the rest, each as each has them.
    """
    count, rest = divmod(T, CHUNK)
    starts = CHUNK * jnp.arange(count), CHUNK * count
    whole = lambda carry: lax.scan(partial(chunk, CHUNK), carry, (starts[0], each[0]), reverse=reverse)  # noqa: E731
    behind = lambda carry: chunk(rest, carry, (starts[1], each[1]))  # noqa: E731
    if not rest:
        carry, y = whole(carry)
        return carry, (y, ())
    if reverse:
        carry, tail = behind(carry)
        carry, y = whole(carry)
    else:
        carry, y = whole(carry)
        carry, tail = behind(carry)
    return carry, (y, tail)


def in_order(chunks: tuple, rest: tuple) -> list[jax.Array]:
    """Arrays (K, c, m, ...) of all chunks and (r, m, ...) of the rest, as (m, T, ...)."""
    whole = [a.reshape(-1, *a.shape[2:]) for a in chunks]
    return [time_first(jnp.concatenate(pair) if rest else pair[0]) for pair in zip(whole, rest or whole, strict=True)]


def of_chunk(z: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of z e^T and of e over a chunk."""
    at_least = wide(e).dtype
    return einsum("tmi,tmo->io", z, e, preferred_element_type=at_least), jnp.sum(e, (0, 1), dtype=at_least)


def before(h: jax.Array, ys: jax.Array, reverse: bool) -> jax.Array:
    """What each turn takes as h, given the first and what each puts out: (c, m, n)."""
    return jnp.concatenate([ys[1:], h[None]] if reverse else [h[None], ys[:-1]])


def hidden(h: Any) -> jax.Array:
    """h of a carry, which is h alone or (h, s)."""
    return h[0] if isinstance(h, tuple) else h


def time_first(a: jax.Array) -> jax.Array:
    """(m, c, ...) as (c, m, ...), and back."""
    return jnp.swapaxes(a, 0, 1)


def cut(a: jax.Array, start: Any, size: int) -> jax.Array:
    """Some positions of (m, T, ...)."""
    return lax.dynamic_slice_in_dim(a, start, size, 1)


def paste(a: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    """(m, T, ...) with a part in its place."""
    return lax.dynamic_update_slice_in_dim(a, part, start, 1)
