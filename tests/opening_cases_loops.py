"""Losses to open: scan, fori_loop and while."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.opening_case import SQUARE, TWO, below, case, energy

# --- scans ---


def rnn(w, u, h, xs, **options):
    return lax.scan(lambda h, x: ((h := jnp.tanh(h @ w + x @ u)), h), h, xs, **options)


def of_consts(p, xs):
    return energy(rnn(p["w"], p["u"], jnp.zeros(2), xs)[1])


def of_xs(p, x):
    return energy(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0])


def of_carry(p, xs):
    h, hs = rnn(p["w"], p["u"], p["h"], xs)
    return energy(h) + energy(hs[1])


def of_all_three(p, xs):
    def step(h, given):
        x, u = given
        return jnp.tanh(h @ p["w"] + x * u), h[0] * u

    h, ys = lax.scan(step, p["h"], (xs, p["u"]))
    return energy(h) + energy(ys)


def handed_on(p, xs):
    """A parameter that the carry returns unchanged."""

    def step(carry, x):
        w, h = carry
        return (w, jnp.tanh(h + x @ w)), None

    (w, h), _ = lax.scan(step, (p["w"], jnp.zeros(2)), xs)
    return energy(h) + energy(w)


def swapped(p, xs):
    def step(carry, x):
        v, w, h = carry
        return (w, v, jnp.tanh(h + x @ w)), None

    return energy(lax.scan(step, (p["v"], p["w"], jnp.zeros(2)), xs)[0][2])


def fast_weights(p, xs):
    """Linear attention: what was learned is where the matrix in the carry starts."""

    def step(w, x):
        return 0.9 * w + jnp.outer(x, x @ p["k"]), x @ w

    return energy(lax.scan(step, p["w"], xs)[1])


def learned_at_test_time(p, xs):
    def step(w, x):
        slope = jax.grad(lambda w: jnp.sum((jnp.tanh(x @ w) - x @ p["k"]) ** 2))(w)
        return w - p["rate"] * slope, x @ w

    return energy(lax.scan(step, p["w"], xs)[1])


def slices_as_ys(p, xs):
    def step(i, x):
        return i + 1, lax.dynamic_index_in_dim(p["w"], i, keepdims=False)

    return energy(lax.scan(step, 0, xs)[1] * xs)


def bare_as_ys(p, xs):
    return energy(lax.scan(lambda h, x: (h + x, p["w"]), jnp.zeros(3), xs)[1] * xs)


def nested(p, xs):
    """A recurrent net within a loop over depth."""
    return energy(lax.scan(lambda xs, one: (rnn(*one, jnp.zeros(2), xs)[1], None), xs, (p["w"], p["u"]))[0])


def chunked(p, xs):
    """A loop over chunks, each kept as its first state alone."""
    chunk = jax.checkpoint(lambda h, xs: rnn(p["w"], p["u"], h, xs))
    return energy(lax.scan(chunk, p["h"], xs.reshape(2, 2, -1))[1])


def thrice(p, xs):
    def outer(h, w):
        def middle(h, x):
            return lax.scan(lambda h, u: (jnp.sin(h * u + x @ w), None), h, p["u"])[0], None

        return lax.scan(middle, h, xs)[0], h

    h, hs = lax.scan(outer, p["h"], p["w"])
    return energy(h) + energy(hs)


def without_data(p, x):
    """A loop in which there are parameters alone."""
    w = lax.scan(lambda w, b: (jnp.tanh(w @ p["v"]) + b, None), p["w"], p["b"])[0]
    return energy(x @ w)


def indexed(p, xs):
    return energy(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), xs))


def taken(p, xs):
    return energy(lax.scan(lambda h, i: (jnp.tanh(h + jnp.take(p["e"], i, 0)), None), jnp.zeros(3), xs)[0])


def dead_carry(p, xs):
    """log(w) at w = 0 goes into a carry that no one reads."""

    def step(carry, x):
        h, sum_ = carry
        return (jnp.tanh(h + x @ p["w"]), sum_ + jnp.log(p["v"]) * x), None

    return energy(lax.scan(step, (jnp.zeros(2), jnp.zeros(3)), xs)[0][0])


def stopped_carry(p, xs):
    def step(h, x):
        return jnp.tanh(lax.stop_gradient(h) @ p["w"] + x @ p["u"]), h

    return energy(lax.scan(step, p["h"], xs)[1])


def data_at_last(p, xs):
    """The carry is made of parameters at first, and of data after the first turn."""

    def step(carry, x):
        a, b = carry
        return (b, b * x), a

    return energy(lax.scan(step, (p["a"], p["b"]), xs)[1])


RNN = {"w": (2, 2), "u": (3, 2), "h": (2,)}
SCANS = (
    case("scan: consts", of_consts, {"w": (2, 2), "u": (3, 2)}, (7, 3), quick=True),
    case("scan: xs", of_xs, {"w": (7, 3, 3)}, (3,), quick=True),
    case("scan: carry, a learned h0", of_carry, RNN, (7, 3), quick=True),
    case("scan: a learned h0 alone", lambda p, xs: energy(rnn(np.eye(2), np.ones((3, 2)), p, xs)[0]), (2,), (7, 3)),
    case("scan: consts, xs, carry", of_all_three, {"w": (2, 2), "u": (7, 2), "h": (2,)}, (7, 2)),
    case("scan: carry returned unchanged", handed_on, {"w": (3, 2)}, (7, 3)),
    case("scan: carries swapped", swapped, {"v": (3, 2), "w": (3, 2)}, (7, 3)),
    case("scan: fast weights", fast_weights, {"w": (3, 2), "k": (3, 2)}, (7, 3)),
    case("scan: a gradient step in the body", learned_at_test_time, {"w": (3, 2), "k": (3, 2), "rate": ()}, (2, 3)),
    case("scan: slices as ys", slices_as_ys, {"w": (7, 3)}, (7, 3)),
    case("scan: a bare parameter as ys", bare_as_ys, {"w": (3,)}, (7, 3)),
    case("scan: reversed", lambda p, xs: energy(rnn(p["w"], p["u"], p["h"], xs, reverse=True)[1]), RNN, (7, 3)),
    case("scan: unrolled", lambda p, xs: energy(rnn(p["w"], p["u"], p["h"], xs, unroll=2)[1]), RNN, (7, 3)),
    case(
        "scan: reversed, xs",
        lambda p, x: energy(lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, p["w"], reverse=True)[1]),
        {"w": (7, 3, 3)},
        (3,),
    ),
    case("scan: nested", nested, {"w": (3, 2, 2), "u": (3, 2, 2)}, (7, 2), quick=True),
    case("scan: three deep", thrice, {"h": (2,), "w": (5, 3, 2), "u": (3, 2)}, (2, 3)),
    case("scan: chunks, remat", chunked, {"w": (2, 2), "u": (3, 2), "h": (2,)}, (4, 3)),
    case("scan: no data", without_data, {"w": (3, 2), "v": (2, 2), "b": (7, 2)}, (3,)),
    case("scan: fori_loop, p[i]", indexed, {"w": (3, 2, 2)}, (2,)),
    case("scan: take in the body", taken, {"e": (11, 3)}, below(11, 7)),
    case("scan: a dead carry", dead_carry, {"w": (3, 2), "v": np.zeros(3)}, (7, 3)),
    case("scan: a stopped carry", stopped_carry, RNN, (7, 3)),
    case("scan: data after the first turn", data_at_last, {"a": (3,), "b": (3,)}, (7, 3)),
    case(
        "scan: learned xs on one carry",
        lambda p, x: energy(lax.scan(lambda h, b: (h, h * b), x, p["b"])[1]),
        {"b": (7, 3)},
        (3,),
    ),
)


# --- while ---


def iterated(w, turn, times=3):
    return lax.while_loop(lambda c: c[0] < times, lambda c: (c[0] + 1, turn(c[1])), (0, w))[1]


def doubly_stochastic(w):
    return w / w.sum(0) / (w / w.sum(0)).sum(1, keepdims=True)


def live(p, x):
    return energy(iterated(x, lambda h: h * p["rate"]))


def live_without_data(p, x):
    return energy(x * iterated(p["rate"], jnp.sin))


def sinkhorn(p, x):
    plan = iterated(jnp.exp(lax.stop_gradient(p["w"])), doubly_stochastic)
    return energy(x @ (plan * p["w"]))


def counted(p, x):
    """The number of turns comes from the data, and what is turned from no parameter."""
    return energy(lax.while_loop(lambda h: jnp.sum(h) < 7, lambda h: 2 * h, jnp.abs(x) + 0.1) * p["w"])


LIVE = {"rate": (3,)}
WHILES = (
    case("while: stopped before", sinkhorn, SQUARE, (3,)),
    case(
        "while: stopped after",
        lambda p, x: energy(lax.stop_gradient(iterated(p["w"], jnp.sin)) * x * p["v"]),
        TWO,
        (3,),
    ),
    case(
        "while: stopped after, with data",
        lambda p, x: energy(lax.stop_gradient(iterated(x * p["w"], lambda h: h * p["w"])) * p["v"]),
        TWO,
        (3,),
    ),
    case("while: of data alone", counted, {"w": (3,)}, (3,)),
    case("while: of integers", lambda p, x: energy(p["w"] * x * iterated(1, lambda n: 2 * n)), {"w": (3,)}, (3,)),
    case("while: dead", lambda p, x: (iterated(p["w"], jnp.sin), energy(x * p["w"]))[1], {"w": (3,)}, (3,)),
    case("while: live, data", live, LIVE, (3,), refused=("while", "rate")),
    case("while: live, no data", live_without_data, LIVE, (3,), refused=("while", "rate")),
    case(
        "while: live, fori_loop",
        lambda p, x, n: energy(lax.fori_loop(0, n, lambda _, h: h * p["rate"], x)),
        LIVE,
        (3,),
        below(7),
        refused=("while", "rate"),
    ),
)


CASES = SCANS + WHILES
