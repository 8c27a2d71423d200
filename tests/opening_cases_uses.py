"""Losses to open: how parameters are used before, where and without that they meet data."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.opening_case import DENSE, SQUARE, TWO, below, case, dense, energy, symmetric

# --- helpers that jit, and return a view of a parameter ---


@jax.jit
def transposed(w):
    return w.T


@jax.jit
def bare(w):
    return w


@jax.jit
def reshaped(w):
    return w.reshape(-1)


@jax.jit
def sliced(w):
    return w[1:, :2]


@jax.jit
def twice(w):
    return bare(transposed(w))


@jax.jit
def halves(w):
    return w[:2].T, w[2, 1:]


@jax.jit
def passes(w, x):
    """A view, and what meets data, of one call."""
    return w.T, x @ w, w


JITS = (
    case("jit: transposed", lambda p, x: energy(x @ transposed(p["w"])), {"w": (7, 3)}, (3,), quick=True),
    case("jit: bare", lambda p, x: energy(x @ bare(p["w"])), {"w": (3, 7)}, (3,)),
    case("jit: reshaped", lambda p, x: energy(x * reshaped(p["w"])), {"w": (3, 7)}, (21,)),
    case("jit: sliced", lambda p, x: energy(x @ sliced(p["w"])), {"w": (3, 7)}, (2,)),
    case("jit: nested", lambda p, x: energy(x @ twice(p["w"])), {"w": (7, 3)}, (3,)),
    case("jit: two results", lambda p, x: energy(x @ halves(p["w"])[0] * halves(p["w"])[1]), {"w": (3, 3)}, (3,)),
    case(
        "jit: a view and a product",
        lambda p, x: energy((views := passes(p["w"], x))[1] @ views[0] + x @ views[2] @ views[0]),
        {"w": (3, 7)},
        (3,),
    ),
    case("jit: the loss", jax.jit(lambda p, x: energy(dense(p, x))), DENSE, (3,)),
    case(
        "jit: dynamic_index_in_dim",
        lambda p, x: energy(x * lax.dynamic_index_in_dim(p["w"], 1, keepdims=False)),
        {"w": (3, 7)},
        (7,),
    ),
)


# --- parameters that meet each other before any data ---


def doubled(p, x):
    """A naive tree of what made w would have 2^40 parts."""
    w = p["w"]
    for _ in range(40):
        w = (w + w) / 2
    return energy(x @ w)


def weight_normed(p, x):
    return energy(x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)))


def spectral(p, x):
    """The largest singular value by power iteration, through which no gradient goes."""
    w = lax.stop_gradient(p["w"])

    def turn(_, u):
        v = w @ u
        return (u := w.T @ (v / jnp.linalg.norm(v))) / jnp.linalg.norm(u)

    u = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, turn(*c)), (0, jnp.ones(7)))[1]
    v = w @ u
    return energy(x @ p["w"] / (v / jnp.linalg.norm(v) @ p["w"] @ u))


def gated(p, x):
    """The four kernels of an LSTM cell, in one product."""
    i, f, g, o = jnp.split(x @ jnp.concatenate([p[k] for k in "ifgo"], 1), 4)
    return energy(jax.nn.sigmoid(i) * jnp.tanh(g) + jax.nn.sigmoid(f) * o)


def orthogonal(w):
    """Cayley's map."""
    return jnp.linalg.solve(jnp.eye(3) + w - w.T, jnp.eye(3) - w + w.T)


def regularised(loss):
    return lambda p, x: loss(p, x) + sum(0.1 * jnp.vdot(w, w) for w in jax.tree.leaves(p))


def standardised(w):
    return (w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-5)


def in_and_behind(p, x):
    """One matrix in every turn of a loop and behind it."""
    h, _ = lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), jnp.zeros(3), x)
    return energy(h @ p["w"])


def there_and_back(p, x):
    return energy(lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]) @ p["w"].T, x))


def convolved_and_multiplied(p, x, v):
    """One array as the kernel of a convolution and as a matrix."""
    y = lax.conv_general_dilated(x[None], p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return energy(y) + energy(jnp.tanh(v @ p["w"].reshape(6, 5)))


def in_two_dtypes(p, x):
    return energy(x @ p["w"]) + energy((x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(x.dtype))


def in_a_branch(p, x, s):
    return energy(lax.cond(s > 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: x @ p["w"].T, x) + x @ p["w"])


LORA = {"w": (3, 7), "a": (3, 2), "b": (2, 7)}
DERIVED = (
    case("tied: twice", lambda p, x: energy(jnp.tanh(x @ p["w"]) @ p["w"].T), {"w": (3, 7)}, (3,), quick=True),
    case("tied: embed, attend", lambda p, x: energy(jnp.tanh(p["e"][x]) @ p["e"].T), {"e": (7, 3)}, below(7, 2)),
    case("tied: one leaf at two places", lambda p, x: energy(x * p["s"] + p["s"]), {"s": (3,)}, (3,)),
    case("tied: in and behind a loop", in_and_behind, SQUARE, (4, 3)),
    case("tied: kernel and its transpose in a loop", there_and_back, {"w": (3, 7)}, (3,)),
    case("tied: convolved and multiplied", convolved_and_multiplied, {"w": (3, 2, 5)}, (8, 2), (6,)),
    case("tied: itself and its softmax", lambda p, x: energy(x @ p["w"] + x @ jax.nn.softmax(p["w"])), SQUARE, (3,)),
    case("tied: in two dtypes", in_two_dtypes, {"w": (3, 7)}, (3,), tolerance=1e-6),
    case("tied: in a branch and beside it", in_a_branch, SQUARE, (3,), ()),
    case("derived: weight norm", weight_normed, {"g": (7,), "v": (3, 7)}, (3,), quick=True),
    case("derived: LoRA", lambda p, x: energy(x @ (p["w"] + p["a"] @ p["b"])), LORA, (3,), quick=True),
    case("derived: LoRA, decayed", regularised(lambda p, x: energy(x @ (p["w"] + p["a"] @ p["b"]))), LORA, (3,)),
    case("derived: kernels joined", gated, dict.fromkeys("ifgo", (3, 7)), (3,), quick=True),
    case("derived: spectral norm", spectral, {"w": (3, 7)}, (3,)),
    case("derived: kron", lambda p, x: energy(x @ jnp.kron(p["a"], p["b"])), {"a": (2, 3), "b": (3, 2)}, (6,)),
    case("derived: w * w", lambda p, x: energy(x @ (p["w"] * p["w"])), {"w": (3, 7)}, (3,)),
    case("derived: w ** 2", lambda p, x: energy(x @ p["w"] ** 2), {"w": (3, 7)}, (3,)),
    case("derived: weight decay", regularised(lambda p, x: energy(dense(p, x))), DENSE, (3,), quick=True),
    case("derived: roll", lambda p, x: energy(x @ jnp.roll(p["w"], 2, 1)), {"w": (3, 7)}, (3,)),
    case("derived: cholesky", lambda p, x: energy(x @ jnp.linalg.cholesky(symmetric(p["w"]))), SQUARE, (3,)),
    case("derived: eigh", lambda p, x: energy(x * jnp.linalg.eigh(symmetric(p["w"]))[0]), SQUARE, (3,)),
    case("derived: expm", lambda p, x: energy(x @ jax.scipy.linalg.expm(p["w"])), SQUARE, (3,)),
    case("derived: qr", lambda p, x: energy(x @ jnp.linalg.qr(symmetric(p["w"]))[0]), SQUARE, (3,)),
    case("derived: orthogonal", lambda p, x: energy(x @ orthogonal(p["w"])), SQUARE, (3,)),
    case("derived: standardised", lambda p, x: energy(x @ standardised(p["w"])), {"w": (3, 7)}, (3,)),
    case("derived: exp", lambda p, x: energy(x * jnp.exp(p["s"])), {"s": (3,)}, (3,)),
    case("derived: softplus", lambda p, x: energy(x * jax.nn.softplus(p["s"])), {"s": (3,)}, (3,)),
    case("derived: mean", lambda p, x: energy(x * jnp.mean(p["w"])), {"w": (3, 7)}, (3,)),
    case("derived: tile", lambda p, x: energy(x * jnp.tile(p["s"], 2)), {"s": (3,)}, (6,)),
    case("derived: softmax", lambda p, x: energy(x @ jax.nn.softmax(p["w"], 0)), {"w": (3, 7)}, (3,)),
    case("derived: 2^40 paths", doubled, {"w": (3, 7)}, (3,)),
    case(
        "derived: hypernetwork",
        lambda p, x: energy(x @ (p["z"] @ p["h"]).reshape(3, 2)),
        {"z": (2,), "h": (2, 6)},
        (3,),
    ),
    case(
        "derived: interpolated",
        lambda p, x: energy(x @ (p["c"] * p["v"] + (1 - p["c"]) * p["w"])),
        {"c": (), "v": (3, 7), "w": (3, 7)},
        (3,),
    ),
)


# --- the loss is a parameter ---

OUTPUTS = (
    case("output: p", lambda p, x: p["c"], {"c": ()}, (3,), quick=True),
    case("output: p, of one", lambda p, x: p["c"].reshape(()), {"c": (1,)}, (3,)),
    case("output: p[1]", lambda p, x: p["c"][1], {"c": (3,)}, (3,)),
    case("output: p, by jit", lambda p, x: bare(p["c"]), {"c": ()}, (3,)),
    case("output: p, and aux", lambda p, x: (p["c"], {"c": p["c"], "x": x}), {"c": ()}, (3,), has_aux=True),
    case("output: a constant beside data", lambda p, x: energy(x @ p["w"]) + p["c"], {"w": (3, 7), "c": ()}, (3,)),
    case("output: one of two", lambda p, x: jnp.where(x > 0, p["a"], p["b"]), {"a": (), "b": ()}, ()),
    case("output: temperature", lambda p, x: energy(x / p["t"]) + jnp.log(p["t"] ** 2), {"t": ()}, (3,)),
    case(
        "output: NaN, a norm at 0",
        lambda p, x: jnp.linalg.norm(x * p["w"]) + energy(x * p["v"]),
        {"w": (3,), "v": (3,)},
        lambda rng, lead: jnp.asarray(rng.normal(size=(*lead, 3))).at[2].set(0),
    ),
    case(
        "output: NaN, where(log)",
        lambda p, x: energy(jnp.where(x > 0, jnp.log(x * p["w"]), p["v"])),
        {"w": np.arange(1.0, 4), "v": (3,)},
        lambda rng, lead: jnp.asarray(rng.normal(size=(*lead, 3))).at[1, 1:].set(0),
    ),
    case("output: infinite", lambda p, x: energy(x * p["v"]) + jnp.sqrt(p["w"]), {"w": np.zeros(()), "v": (3,)}, (3,)),
)


# --- several parameters in one equation, several outputs, none ---


def chosen(p, x):
    """Closures over parameters."""
    return energy(lax.cond(x[0] > 0, lambda x: x @ p["v"], lambda x: jnp.tanh(x @ p["w"]), x))


def routed(p, x):
    """One expert of three, and how sure the gate is of it."""
    experts = [lambda x, i=i: x @ p["w"][i] for i in range(2)] + [lambda x: p["b"]]
    scores = jax.nn.softmax(x @ p["gate"])
    return energy(lax.switch(jnp.argmax(scores), experts, x) * jnp.max(scores))


def chosen_by_parameter(p, x):
    return energy(lax.cond(p["c"] > 0, lambda: x @ p["v"], lambda: x @ p["w"]))


def one_branch_infinite(p, x):
    return energy(lax.cond(x[0] > 0, lambda: jnp.sqrt(p["w"]) * x, lambda: p["v"] * x))


def sharded(p, x):
    mesh = Mesh(np.array(jax.devices()[:1]), "a")
    specs = (P(), P(), P("a"))
    return energy(
        jax.shard_map(lambda w, b, x: x @ w + b, mesh=mesh, in_specs=specs, out_specs=P("a"))(p["w"], p["b"], x)
    )


def placed(p, x):
    """A constraint on where a parameter lies."""
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), "a"), P("a"))
    return energy(x @ lax.with_sharding_constraint(p["w"], where))


JOINT = (
    case(
        "joint: clamp",
        lambda p, x: energy(lax.clamp(p["lo"], x, p["hi"])),
        {"lo": np.full(7, -0.5), "hi": np.full(7, 0.5)},
        (7,),
        quick=True,
    ),
    case("joint: clip by scalars", lambda p, x: energy(jnp.clip(x, p["lo"], p["hi"])), {"lo": -0.5, "hi": 0.5}, (7,)),
    case("joint: where", lambda p, x: energy(jnp.where(x > 0, p["w"], p["v"])), TWO, (3,), quick=True),
    case("joint: maximum", lambda p, x: energy(jnp.maximum(x * p["v"], p["w"])), TWO, (3,)),
    case("joint: sin(w x)", lambda p, x: energy(jnp.sin(p["w"] * x)), {"w": (3,)}, (3,)),
    case(
        "joint: concatenate",
        lambda p, x: energy(jnp.concatenate([p["cls"], x, p["reg"]]) @ p["w"]),
        {"cls": (1, 3), "reg": (2, 3), "w": (3, 7)},
        (5, 3),
        quick=True,
    ),
    case("joint: scatter-add", lambda p, i: energy(p["w"].at[i].add(p["v"])), {"w": (7, 2), "v": (3, 2)}, below(7, 3)),
    case("joint: cond", chosen, {"v": (3, 7), "w": (3, 7)}, (3,), quick=True),
    case("joint: cond on a parameter", chosen_by_parameter, {"c": (), "v": (3, 7), "w": (3, 7)}, (3,)),
    case("joint: cond, an infinite branch", one_branch_infinite, {"v": (3,), "w": np.zeros(3)}, (3,)),
    case("joint: switch, experts", routed, {"w": (2, 3, 7), "b": (7,), "gate": (3, 3)}, (3,), quick=True),
    case("joint: shard_map", sharded, DENSE, (2, 3)),
    case("joint: sharding constraint", placed, {"w": (3, 7)}, (3,)),
    case("joint: sort((x, w))", lambda p, x: energy(lax.sort((x, p["w"]))[1] * np.arange(7)), {"w": (7,)}, (7,)),
    case(
        "joint: sort((x w, v))",
        lambda p, x: energy(jnp.stack(lax.sort((x * p["w"], p["v"]))) * np.arange(3)),
        TWO,
        (3,),
    ),
    case(
        "joint: optimization_barrier",
        lambda p, x: energy(jnp.prod(jnp.stack(lax.optimization_barrier((x, p["w"] * 2))), 0)),
        {"w": (3,)},
        (3,),
    ),
    case("joint: pad", lambda p, x: energy(lax.pad(x * p["w"], p["c"], [(1, 2, 1)])), {"w": (3,), "c": ()}, (3,)),
    case("joint: atan2", lambda p, x: energy(jnp.arctan2(p["w"], x) * p["v"]), TWO, (3,)),
    case("joint: two parameters, then data", lambda p, x: energy((x + p["v"]) * p["w"]), TWO, (3,)),
)


# --- tables ---

TABLES = (
    case("table: e[x]", lambda p, x: energy(p["e"][x]), {"e": (7, 3)}, below(7, 2), quick=True),
    case("table: e[x], repeated", lambda p, x: energy(p["e"][jnp.stack([x, x])]), {"e": (7, 3)}, below(7)),
    case("table: e[x, y]", lambda p, x, y: energy(p["e"][x, y] * (y + 1)), {"e": (7, 3, 2)}, below(7), below(3)),
    case("table: one_hot", lambda p, x: energy(jax.nn.one_hot(x, 7) @ p["e"]), {"e": (7, 3)}, below(7, 2)),
    case(
        "table: dynamic_slice", lambda p, x: energy(lax.dynamic_slice(p["w"], (x, 1), (2, 2))), {"w": (7, 3)}, below(7)
    ),
    case(
        "table: dynamic_index_in_dim", lambda p, x: energy(lax.dynamic_index_in_dim(p["w"], x)), {"w": (7, 3)}, below(7)
    ),
    case(
        "table: take_along_axis", lambda p, x: energy(jnp.take_along_axis(p["w"], x, 1)), {"w": (3, 7)}, below(7, 3, 2)
    ),
    case(
        "table: take, fill",
        lambda p, x: energy(jnp.take(p["e"], x, 0, mode="fill", fill_value=2.0)),
        {"e": (7, 3)},
        below(11, 2),
    ),
    case("table: e[x] under tie", lambda p, x: energy(p["e"][x] @ p["e"].T), {"e": (2, 3)}, below(2, 7)),
    case("table: w.at[x].set", lambda p, x, i: energy(p["w"].at[i].set(x)), {"w": (7,)}, (), below(7)),
    case("table: w.at[x].add", lambda p, x, i: energy(p["w"].at[i].add(x)), {"w": (7,)}, (3,), below(7, 3)),
    case(
        "table: w.at[x].mul",
        lambda p, x, i: energy(p["w"].at[i].mul(x, unique_indices=True)),
        {"w": (7,)},
        (),
        below(7),
    ),
    case("table: x.at[i].set(w)", lambda p, x, i: energy(x.at[i].set(p["w"])), {"w": (2,)}, (7, 2), below(7)),
    case(
        "table: dynamic_update_slice of data",
        lambda p, x, i: energy(lax.dynamic_update_slice(x, p["w"], (i,))),
        {"w": (2,)},
        (7,),
        below(7),
    ),
    case(
        "table: dynamic_update_slice of w",
        lambda p, x, i: energy(lax.dynamic_update_slice(p["w"], x, (i,))),
        {"w": (7,)},
        (2,),
        below(7),
    ),
    case(
        "table: segment_sum",
        lambda p, x, i: energy(jax.ops.segment_sum(x * p["w"], i, 3)),
        {"w": (7,)},
        (7,),
        below(3, 7),
    ),
)


CASES = JITS + DERIVED + OUTPUTS + JOINT + TABLES
