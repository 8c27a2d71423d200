"""Losses to open: rules of the user, what is dead or stopped, effects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.ode import odeint

from tests.opening_case import DENSE, SQUARE, TWO, bits, case, dense, energy, keys, symmetric

# --- rules of the user: each differs from the derivative, so that it shows whether it is kept ---


def ruled(forward, backward, **options):
    """forward with a backward (saved arguments, error) -> gradients."""
    f = jax.custom_vjp(forward)
    f.defvjp(lambda *args: (forward(*args), args), backward, **options)
    return f


identity = ruled(lambda w: w, lambda saved, d: (3 * d,))
rounded = ruled(lambda a: jnp.round(a), lambda saved, d: (d,))
reversed_ = ruled(lambda a: a, lambda saved, d: (-0.3 * d,))
clipped = ruled(lambda a: a, lambda saved, d: (jnp.clip(d, -0.1, 0.1),))
product = ruled(lambda x, w: x @ w, lambda s, d: (d @ s[1].T, 2 * jnp.outer(s[0], d)))
affine = ruled(lambda x, s, b: s * x + b, lambda saved, d: (d * saved[1], 3 * d * saved[0], 2 * d))


def normed(x, s, b):
    return s * (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) + b


fused_norm = ruled(normed, lambda saved, d: tuple(2 * g for g in jax.vjp(normed, *saved)[1](d)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def applied(f, w, x):
    return f(w * x)


applied.defvjp(lambda f, w, x: (f(w * x), (w, x)), lambda f, saved, d: (2 * f(d * saved[1]), d * saved[0]))


@jax.custom_jvp
def blended(v, w, x):
    return v * w * x


@blended.defjvp
def blended_jvp(primals, tangents):
    (v, w, x), (dv, dw, dx) = primals, tangents
    return v * w * x, 2 * dv * w * x + 3 * v * dw * x + v * w * dx


@jax.custom_gradient
def guided(w, x):
    return w * x, lambda d: (5 * d * x, d * w)


def perturbed(x, w):
    """A rule that asks which of its arguments are differentiated."""
    f = jax.custom_vjp(lambda x, w: x * w)

    def forward(x, w):
        return x.value * w.value, (x.value, w.value, 2.0 if x.perturbed else 7.0)

    f.defvjp(forward, lambda s, d: (d * s[1], s[2] * d * s[0]), symbolic_zeros=True)
    return f(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_point(f, p, x):
    return lax.while_loop(lambda c: c[0] < 30, lambda c: (c[0] + 1, f(p, x, c[1])), (0, jnp.zeros_like(x)))[1]


def fixed_point_forward(f, p, x):
    return (z := fixed_point(f, p, x)), (p, x, z)


def fixed_point_backward(f, saved, d):
    p, x, z = saved
    back = jax.vjp(lambda z: f(p, x, z), z)[1]
    d = lax.while_loop(lambda c: c[0] < 30, lambda c: (c[0] + 1, d + back(c[1])[0]), (0, d))[1]
    return jax.vjp(lambda p, x: f(p, x, z), p, x)[1](d)


fixed_point.defvjp(fixed_point_forward, fixed_point_backward)


def settled(p, x, z):
    return jnp.tanh(0.1 * z @ p["w"] + x + p["b"])


def root(p, x):
    """The z for which z + tanh(s z) = x + b."""

    def f(z):
        return z + jnp.tanh(p["s"] ** 2 * z) - x - p["b"]

    def solve(f, z):
        return lax.fori_loop(0, 30, lambda _, z: z - f(z) / jax.jvp(f, (z,), (jnp.ones_like(z),))[1], z)

    return energy(lax.custom_root(f, x, solve, lambda g, y: y / g(jnp.ones_like(y))))


def solved(p, x):
    a = symmetric(p["w"])
    return energy(jax.scipy.sparse.linalg.cg(lambda y: a @ y, x + p["b"], maxiter=7)[0])


def flow(p, x):
    """A neural differential equation."""
    return energy(odeint(lambda y, t, w, b: jnp.tanh(y @ w + b * t), x, np.linspace(0, 1, 3), p["w"], p["b"]))


def flow_by_closure(p, x):
    return energy(odeint(lambda y, t: jnp.tanh(y @ p["w"] + np.arange(3.0)), x, np.linspace(0, 1, 2)))


AFFINE, AT_0 = {"w": (3, 3), "b": (3,)}, {"w": np.arange(3.0) - 1}
# --- rules that are not linear in the error, whose result has several uses: they see the sum of the errors ---

paired = ruled(lambda w: (2 * w, w**2), lambda saved, d: (jnp.clip(d[0], -0.1, 0.1) * jnp.tanh(d[1]),))


def used_twice(a, x):
    return (jnp.sin(a) * x).sum() + (jnp.cos(a) * jnp.sin(x)).sum()


def clipped_twice(p, x):
    return used_twice(clipped(p["w"]), x)


def clipped_again(p, x):
    a, b = paired(clipped(jnp.sin(p["w"])))
    return used_twice(clipped(a), x) + (a * b * x).sum()


def two_results(p, x):
    a, b = paired(p["w"])
    return (a * x).sum() + (jnp.sin(b) * x**2).sum()


def looped(outside):
    """One call in front of a loop, or one a turn."""

    def loss(p, x):
        made = paired(p["w"])

        def turn(h, _):
            a, b = made if outside else paired(p["w"])
            return h + (a * x).sum() + (jnp.sin(b) * h).sum(), None

        return lax.scan(turn, 0.3, None, length=3)[0]

    return loss


def each_turn(p, x):
    def turn(h, w):
        a, b = paired(w)
        return h + (a * x).sum() + (jnp.sin(b) * h).sum(), None

    return lax.scan(turn, 0.3, p["w"])[0]


RULES = (
    case("rule: relu(w) at 0", lambda p, x: energy(x * jax.nn.relu(p["w"])), AT_0, (3,), quick=True),
    case("rule: relu(w x) at 0", lambda p, x: energy(jax.nn.relu(x * p["w"])), AT_0, (3,)),
    case("rule: straight through", lambda p, x: energy(x @ rounded(p["w"])), {"w": (3, 7)}, (3,), quick=True),
    case("rule: straight through, of data", lambda p, x: energy(rounded(x @ p["w"])), {"w": (3, 7)}, (3,)),
    case("rule: identity on a weight", lambda p, x: energy(x @ identity(p["w"])), {"w": (3, 7)}, (3,), quick=True),
    case("rule: identity, jit", lambda p, x: energy(x @ jax.jit(identity)(p["w"])), {"w": (3, 7)}, (3,)),
    case("rule: a product", lambda p, x: energy(product(x, p["w"])), {"w": (3, 7)}, (3,), quick=True),
    case("rule: x, s, b", lambda p, x: energy(affine(x, p["s"], p["b"])), {"s": (3,), "b": (3,)}, (3,), quick=True),
    case("rule: a fused norm", lambda p, x: energy(fused_norm(x, p["s"], p["b"])), {"s": (7,), "b": (7,)}, (7,)),
    case("rule: clipped error, weight", lambda p, x: energy(x @ clipped(p["w"])), {"w": (3, 7)}, (3,), linear=False),
    case("rule: clipped error, two uses", clipped_twice, {"w": (3,)}, (3,), linear=False),
    case("rule: clipped error, two uses in remat", jax.checkpoint(clipped_twice), {"w": (3,)}, (3,), linear=False),
    case("rule: clipped error, uses of a use", clipped_again, {"w": (3,)}, (3,), linear=False),
    case("rule: two results", two_results, {"w": (3,)}, (3,), linear=False),
    case("rule: two results, used in a loop", looped(outside=True), {"w": (3,)}, (3,), linear=False),
    case("rule: two results in a loop", looped(outside=False), {"w": (3,)}, (3,), linear=False),
    case("rule: two results, a parameter a turn", each_turn, {"w": (2, 3)}, (3,), linear=False),
    case("rule: clipped error, data", lambda p, x: energy(clipped(x @ p["w"])), {"w": (3, 7)}, (3,)),
    case("rule: reversed gradient", lambda p, x: energy(reversed_(dense(p, x))), DENSE, (3,)),
    case("rule: nondiff_argnums", lambda p, x: energy(applied(jnp.sin, p["w"], x)), {"w": (3,)}, (3,)),
    case("rule: custom_jvp", lambda p, x: energy(blended(p["v"], p["w"], x)), {"v": (3,), "w": (3,)}, (3,)),
    case(
        "rule: custom_jvp, no data", lambda p, x: energy(x * blended(p["v"], p["w"], 2.0)), {"v": (3,), "w": (3,)}, (3,)
    ),
    case("rule: custom_gradient", lambda p, x: energy(guided(p["w"], x)), {"w": (3,)}, (3,)),
    case(
        "rule: symbolic zeros",
        lambda p, x: energy(perturbed(x, p["w"])),
        {"w": (3,)},
        (3,),
        either=("symbolic_zeros", "w"),
    ),
    case(
        "rule: symbolic zeros, later",
        lambda p, x: energy(perturbed(x * p["v"], p["w"])),
        {"v": (3,), "w": (3,)},
        (3,),
        either=("symbolic_zeros", "w"),
    ),
    case(
        "rule: within a scan",
        lambda p, xs: energy(
            lax.scan(lambda h, x: (jnp.tanh(product(h, rounded(p["w"])) + x), None), jnp.zeros(3), xs)[0]
        ),
        SQUARE,
        (2, 3),
    ),
    case("rule: a fixed point", lambda p, x: energy(fixed_point(settled, p, x)), AFFINE, (3,)),
    case("rule: custom_root", root, {"s": (3,), "b": (3,)}, (3,)),
    case("rule: custom_linear_solve", solved, AFFINE, (3,), tolerance=1e-11),
    case("rule: odeint", flow, AFFINE, (3,), tolerance=1e-10),
    case("rule: odeint, closure", flow_by_closure, SQUARE, (3,), tolerance=1e-10),
)


# --- what is dead or stopped, with an infinite slope ---


def with_metric(p, x):
    metric = jnp.log(p["w"]) * x
    return energy(x @ p["v"]), {"metric": metric, "w": p["w"]}


def quantised(p, x):
    """A vector of a codebook in place of the encoder's, as in a VQ-VAE."""
    z = x @ p["w"]
    code = p["e"][jnp.argmin(jnp.sum((p["e"] - z) ** 2, 1))]
    held = z + lax.stop_gradient(code - z)
    return energy(held @ p["v"]) + jnp.sum((lax.stop_gradient(z) - code) ** 2 + (z - lax.stop_gradient(code)) ** 2)


def taught(p, x):
    teacher = lax.stop_gradient(jnp.tanh(x @ p["teacher"]) ** 0.5)
    return jnp.sum((jnp.tanh(x @ p["student"]) - teacher) ** 2)


def masked(p, x):
    return energy(x @ (p["w"] * p["mask"]))


def drawn_dropout(p, x):
    return energy(x @ jnp.where(jax.random.bernoulli(p["key"], 0.5, (3, 7)), p["w"], 0))


DEAD = {"w": np.zeros(3), "v": (3, 7)}


def dead_in_branch(p, x):
    def one(a, x):
        (3 * a).sum()
        return jnp.cos(x)

    return energy(lax.cond(p["v"][0, 0] > 0, one, lambda a, x: jnp.sin(x), jnp.log(p["w"]) * x, x @ p["v"]))


def dead_result_of_branch(p, x):
    a, b = jnp.log(p["w"]) * x, x @ p["v"]
    return energy(lax.cond(x[0] > 0, lambda a, b: (b, a), lambda a, b: (2 * b, a), a, b)[0])


STOPPED = (
    case("dead: log(w) x at 0", lambda p, x: (jnp.log(p["w"]) * x, energy(x @ p["v"]))[1], DEAD, (3,), quick=True),
    case("dead: in a branch", dead_in_branch, DEAD, (3,)),
    case("dead: a result of a branch", dead_result_of_branch, DEAD, (3,)),
    case("dead: a metric in aux", with_metric, DEAD, (3,), has_aux=True, contracted=False),
    case(
        "dead: times what is stopped",
        lambda p, x: energy(x * p["v"]) + jnp.sum(lax.stop_gradient(jnp.log(p["w"]) * x > 0)),
        {"w": np.zeros(3), "v": (3,)},
        (3,),
    ),
    case(
        "stop: pow(w, -0.5) at 0",
        lambda p, x: energy(x * p["v"] + jnp.exp(-lax.stop_gradient(p["w"] ** -0.5))),
        {"w": np.zeros(3), "v": (3,)},
        (3,),
        quick=True,
    ),
    case("stop: w", lambda p, x: energy(x @ lax.stop_gradient(p["w"]) + p["b"]), DENSE, (3,)),
    case("stop: all", lambda p, x: energy(lax.stop_gradient(dense(p, x))), DENSE, (3,)),
    case(
        "stop: w + stop(round(w) - w)",
        lambda p, x: energy(x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"]))),
        {"w": (3, 7)},
        (3,),
    ),
    case("stop: a codebook", quantised, {"w": (3, 2), "e": (7, 2), "v": (2, 2)}, (3,)),
    case(
        "stop: a teacher",
        taught,
        {"student": (3, 7), "teacher": np.ones((3, 7))},
        lambda rng, lead: jnp.asarray(rng.random((*lead, 3))),
    ),
    case("leaf: unused", lambda p, x: energy(x @ p["w"]), DENSE, (3,), quick=True),
    case(
        "leaf: compared alone",
        lambda p, x: energy(jnp.where(x > p["t"], x, 2 * x) * p["w"]),
        {"t": (3,), "w": (3,)},
        (3,),
    ),
    case("leaf: rounded alone", lambda p, x: energy(jnp.floor(p["t"]) * x * p["w"]), {"t": (3,), "w": (3,)}, (3,)),
    case("leaf: integer", lambda p, x: energy(p["w"][p["i"]] * x), {"w": (7,), "i": np.array([2, 2, 5])}, (3,)),
    case("leaf: boolean", masked, {"w": (3, 7), "mask": bits(3, 7)}, (3,), quick=True),
    case("leaf: a mask of floats", masked, {"w": (3, 7), "mask": np.eye(3, 7)}, (3,)),
    case("leaf: a key", drawn_dropout, {"w": (3, 7), "key": keys}, (3,)),
    case("leaf: a key, not used", lambda p, x: energy(x @ p["w"]), {"w": (3, 7), "key": keys}, (3,)),
    case("leaf: none, no data", lambda p, x: energy(p["w"]), {"w": (3, 7)}, (3,)),
    case("leaf: none used", lambda p, x: energy(x), {"w": (3, 7)}, (3,)),
)


# --- references, prints, callbacks ---


def printed(p, x):
    jax.debug.print("w {w} x {x}", w=p["w"][0], x=x[0])
    return energy(x @ p["w"])


def called_back(p, x):
    jax.debug.callback(lambda w, y: None, p["w"], x @ p["w"])
    return energy(x @ p["w"])


def called_back_stopped(p, x):
    jax.debug.callback(lambda w: None, lax.stop_gradient(p["w"]))
    return energy(x @ p["w"])


def called_back_in_scan(p, xs):
    def step(h, x):
        jax.debug.callback(lambda w, h: None, p["w"], h)
        return jnp.tanh(h + x @ p["w"]), None

    return energy(lax.scan(step, jnp.zeros(7), xs)[0])


def host(w):
    return jax.pure_callback(lambda w: np.sin(w), jax.ShapeDtypeStruct(w.shape, w.dtype), w, vmap_method="sequential")


def referred(p, x):
    ref = jax.new_ref(p["w"])
    ref[...] = ref[...] * 2
    return energy(x @ ref[...])


def gathered_in_ref(p, x):
    """A reference that holds data, to which a parameter adds."""
    ref = jax.new_ref(x)
    ref[...] += p["w"]
    ref[0] *= p["w"][1]
    return energy(ref[...])


EFFECTS = (
    case("effect: debug.print", printed, {"w": (3, 7)}, (3,)),
    case("effect: debug.callback", called_back, {"w": (3, 7)}, (3,)),
    case("effect: debug.callback, stopped", called_back_stopped, {"w": (3, 7)}, (3,)),
    case("effect: debug.callback in a scan", called_back_in_scan, {"w": (3, 7)}, (2, 3)),
    case(
        "effect: pure_callback, stopped", lambda p, x: energy(x * host(lax.stop_gradient(p["w"])) * p["v"]), TWO, (3,)
    ),
    case(
        "effect: pure_callback, live",
        lambda p, x: energy(x * host(p["rate"])),
        {"rate": (3,)},
        (3,),
        refused=("pure_callback", "rate"),
    ),
    case("effect: a reference", referred, {"w": (3, 7)}, (3,), either=("Ref",)),
    case("effect: a reference to data", gathered_in_ref, {"w": (3,)}, (3,), either=("Ref",)),
)


CASES = RULES + STOPPED + EFFECTS
