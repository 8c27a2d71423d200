"""Losses to open: the functions of jax.numpy and jax.lax, and derivatives within a loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.opening_case import below, bits, case, complexes, energy, keys, narrow, positive, symmetric

VECTOR, MATRIX = {"w": (7,)}, {"w": (3, 7)}


def ordered(a):
    """Of a sorted array, a number to which each place matters."""
    return energy(a * np.arange(1, a.shape[-1] + 1))


# --- jax.numpy and jax.lax ---


def matrix(p, x):
    """A regular matrix, of data and a parameter."""
    return jnp.outer(x, x) * p["w"][0, 0] + symmetric(p["w"])


def linear_recurrence(p, x):
    def joined(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    return energy(lax.associative_scan(joined, (jnp.broadcast_to(jnp.tanh(p["a"]), x.shape), x * p["b"]))[1])


def per_head(p, x):
    def head(q, k, v):
        return jax.nn.softmax(x @ q @ (x @ k).T) @ (x @ v)

    return energy(jax.vmap(head)(p["q"], p["k"], p["v"]))


def of_heads(p, x):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, p[name]) for name in "qkv")
    return energy(jax.nn.dot_product_attention(q, k, v, is_causal=True))


def conv(x, w, stride=1, padding="SAME", **options):
    return lax.conv_general_dilated(x[None], w, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"), **options)


def conv_of_parameters(p, x):
    """The parameter is what the data is laid over."""
    return energy(lax.conv_general_dilated(p["w"][None], x, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")))


def remat(p, x):
    block = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
    return energy(block(p["w"], block(p["w"], x)))


def remat_of_parameters(p, x):
    return energy(x @ jax.checkpoint(lambda w: jnp.tanh(w) @ w)(p["w"]))


def remat_policy(p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return energy(jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w, policy=policy)(p["w"], x))


def filtered(p, x):
    return energy(jnp.fft.irfft(jnp.fft.rfft(x) * (p["re"] + 1j * p["im"]), 7))


def complex_dense(p, x):
    return energy(jnp.abs(x @ p["w"]) ** 2)


def ragged(p, x, n):
    return energy(lax.ragged_dot(x, p["rate"], jnp.stack([n, 5 - n])))


def pooled(p, x):
    return energy(lax.reduce_window(x * p["w"], -jnp.inf, lax.max, (3,), (2,), "VALID"))


def averaged(p, x):
    return energy(lax.reduce_window(x * p["w"], 0.0, lax.add, (3,), (1,), "SAME"))


def pieces(p, x):
    return energy(jnp.piecewise(x, [x < -0.5, x > 0.5], [lambda x: x * p["v"], lambda x: x**2, lambda x: x + p["w"]]))


def drawn_gamma(p, x, key):
    return energy(jax.random.gamma(key, jnp.exp(p["a"])) * x)


def drawn_softly(p, x, key):
    return energy(x * jax.nn.softmax(p["w"] + jax.random.gumbel(key, (7,))))


def drawn_hard(p, x, key):
    return energy(x * jax.random.bernoulli(key, jax.nn.sigmoid(p["w"])) * p["w"])


def vectorised(p, x):
    return energy(jnp.vectorize(lambda a, b: a @ b, signature="(n,k),(k)->(n)")(p["w"], x))


def cast(p, x):
    return energy(x @ p["w"].astype(jnp.bfloat16).astype(float))


def preferred(p, x):
    return energy(lax.dot(x, p["w"], preferred_element_type=jnp.float32))


def batched(p, x):
    """The parameter has batch dimensions of its own."""
    return energy(jnp.einsum("bi,bij->bj", x, p["w"]))


def layer_normed(p, x):
    return energy((x - x.mean()) * lax.rsqrt(x.var() + 1e-5) * p["g"] + p["b"])


NUMERICS = (
    case("fft: a filter", filtered, {"re": (4,), "im": (4,)}, (7,), quick=True),
    case("fft: of a parameter", lambda p, x: energy(jnp.fft.fft(p["w"]).real * x), VECTOR, (7,)),
    case("fft: of x w", lambda p, x: energy(jnp.abs(jnp.fft.fft(x * p["w"]))), VECTOR, (7,)),
    case("fft: two dimensions", lambda p, x: energy(jnp.fft.fft2(x * p["w"]).imag), MATRIX, (3, 7)),
    case("complex: params", complex_dense, {"w": complexes(3, 7)}, complexes(3), contracted=False),
    case("complex: of real params", complex_dense, MATRIX, complexes(3)),
    case(
        "complex: part of params", lambda p, x: energy((p["w"] * x).real), {"w": complexes(3)}, (3,), contracted=False
    ),
    case("conv: plain", lambda p, x: energy(conv(x, p["w"])), {"w": (3, 2, 7)}, (11, 2), quick=True),
    case("conv: depthwise", lambda p, x: energy(conv(x, p["w"], feature_group_count=3)), {"w": (2, 1, 3)}, (11, 3)),
    case("conv: grouped", lambda p, x: energy(conv(x, p["w"], feature_group_count=2)), {"w": (3, 2, 6)}, (11, 4)),
    case("conv: strided", lambda p, x: energy(conv(x, p["w"], 2, [(1, 0)])), {"w": (3, 2, 7)}, (11, 2)),
    case("conv: dilated", lambda p, x: energy(conv(x, p["w"], rhs_dilation=(2,))), {"w": (3, 2, 7)}, (11, 2)),
    case(
        "conv: transposed",
        lambda p, x: energy(conv(x, p["w"], 1, [(1, 2)], lhs_dilation=(2,))),
        {"w": (3, 2, 7)},
        (5, 2),
    ),
    case("conv: of parameters", conv_of_parameters, {"w": (11, 2)}, (3, 2, 7)),
    case("conv: jnp.convolve", lambda p, x: energy(jnp.convolve(x, p["w"])), {"w": (3,)}, (7,)),
    case("dot: batch dimensions", batched, {"w": (2, 3, 7)}, (2, 3), quick=True),
    case(
        "dot: einsum of three",
        lambda p, x: energy(jnp.einsum("i,ijk,k->j", x, p["v"], p["w"])),
        {"v": (3, 2, 7), "w": (7,)},
        (3,),
    ),
    case("dot: tensordot", lambda p, x: energy(jnp.tensordot(x, p["w"], 2)), {"w": (2, 3, 7)}, (2, 3)),
    case("dot: w @ x", lambda p, x: energy(p["w"] @ x), MATRIX, (7, 2)),
    case("dot: x w y", lambda p, x, y: x @ p["w"] @ y, MATRIX, (3,), (7,)),
    case("dot: positions", lambda p, x: energy(x @ p["w"] + p["b"]), {"w": (3, 7), "b": (7,)}, (11, 3), quick=True),
    case("dot: outer", lambda p, x: energy(jnp.outer(p["w"], x)), VECTOR, (3,)),
    case("dot: cross", lambda p, x: energy(jnp.cross(p["w"], x)), {"w": (3,)}, (3,)),
    case(
        "dot: preferred_element_type",
        preferred,
        {"w": narrow(jnp.bfloat16, 3, 7)},
        narrow(jnp.bfloat16, 3),
        tolerance=2e-2,
    ),
    case("dot: vectorize", vectorised, MATRIX, (7,)),
    case("dot: ragged", ragged, {"rate": (2, 3, 7)}, (5, 3), below(5), refused=("ragged", "rate")),
    case("sort: top_k", lambda p, x: ordered(lax.top_k(x * p["w"], 3)[0]), VECTOR, (7,)),
    case("sort: top_k of w", lambda p, x: ordered(lax.top_k(p["w"], 3)[0] * x), VECTOR, (3,)),
    case("sort: w", lambda p, x: energy(jnp.sort(p["w"]) * x), VECTOR, (7,)),
    case("sort: x w", lambda p, x: ordered(jnp.sort(x * p["w"])), VECTOR, (7,)),
    case("sort: w[argsort(x)]", lambda p, x: ordered(p["w"][jnp.argsort(x)]), VECTOR, (7,)),
    case("sort: median", lambda p, x: energy(jnp.median(x * p["w"])), VECTOR, (7,)),
    case("sort: searchsorted", lambda p, x: energy(p["w"][jnp.searchsorted(np.arange(6.0), x)]), VECTOR, (3,)),
    case("interp: of w", lambda p, x: energy(jnp.interp(x, np.arange(7.0) - 3, p["w"])), VECTOR, (3,)),
    case("interp: at w", lambda p, x: energy(jnp.interp(p["w"], np.arange(7.0) - 3, x)), {"w": (3,)}, (7,)),
    case("interp: knots", lambda p, x: energy(jnp.interp(x, p["w"], np.arange(3.0))), {"w": np.arange(3.0)}, (7,)),
    case("cumulative: associative_scan", linear_recurrence, {"a": (3,), "b": (3,)}, (7, 3), quick=True),
    case(
        "cumulative: associative_scan of w",
        lambda p, x: energy(x * lax.associative_scan(jnp.multiply, p["w"])),
        VECTOR,
        (7,),
    ),
    case("cumulative: cumsum of w", lambda p, x: energy(x * jnp.cumsum(p["w"])), VECTOR, (7,)),
    case("cumulative: cumsum of x w", lambda p, x: energy(jnp.cumsum(x * p["w"])), VECTOR, (7,)),
    case("cumulative: cumprod", lambda p, x: energy(jnp.cumprod(x * p["w"])), VECTOR, (7,)),
    case("cumulative: cummax", lambda p, x: energy(lax.cummax(x * p["w"])), VECTOR, (7,)),
    case("cumulative: cumlogsumexp", lambda p, x: energy(lax.cumlogsumexp(x * p["w"])), VECTOR, (7,)),
    case("map: over data", lambda p, xs: energy(lax.map(lambda x: jnp.tanh(x @ p["w"]), xs)), MATRIX, (2, 3)),
    case(
        "map: over parameters", lambda p, x: energy(lax.map(lambda w: jnp.tanh(x @ w), p["w"])), {"w": (2, 3, 7)}, (3,)
    ),
    case("map: batch_size", lambda p, xs: energy(lax.map(lambda x: x @ p["w"], xs, batch_size=2)), MATRIX, (5, 3)),
    case("vmap: heads", per_head, dict.fromkeys("qkv", (2, 7, 3)), (5, 7), quick=True),
    case("vmap: dot_product_attention", of_heads, dict.fromkeys("qkv", (7, 2, 3)), (5, 7), tolerance=1e-6),
    case("vmap: data", lambda p, xs: energy(jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(xs)), MATRIX, (2, 3)),
    case("remat: twice", remat, {"w": (3, 3)}, (3,), quick=True),
    case("remat: parameters alone", remat_of_parameters, {"w": (3, 3)}, (3,)),
    case("remat: a policy", remat_policy, {"w": (3, 3)}, (3,)),
    case("random: gamma(w)", drawn_gamma, {"a": (3,)}, (3,), keys, tolerance=1e-11),
    case("random: gumbel", drawn_softly, VECTOR, (7,), keys),
    case("random: bernoulli(w)", drawn_hard, VECTOR, (7,), keys),
    case("linalg: solve(w, x)", lambda p, x: energy(jnp.linalg.solve(symmetric(p["w"]), x)), MATRIX, (3,)),
    case("linalg: solve(x, w)", lambda p, x: energy(jnp.linalg.solve(matrix(p, x), p["w"])), MATRIX, (3,)),
    case(
        "linalg: triangular",
        lambda p, x: energy(jax.scipy.linalg.solve_triangular(p["w"], x)),
        {"w": np.eye(3) + np.ones((3, 3))},
        (3,),
    ),
    case(
        "linalg: cholesky of data",
        lambda p, x: energy(jnp.linalg.cholesky(matrix(p, x) @ matrix(p, x).T)),
        MATRIX,
        (3,),
    ),
    case("linalg: slogdet", lambda p, x: jnp.linalg.slogdet(matrix(p, x))[1], MATRIX, (3,)),
    case("linalg: svd", lambda p, x: energy(jnp.linalg.svd(x * p["w"], compute_uv=False)), {"w": (2, 3)}, (3,)),
    case("linalg: matrix_power", lambda p, x: energy(x @ jnp.linalg.matrix_power(p["w"], 3)), {"w": (3, 3)}, (3,)),
    case("linalg: norm of a row", lambda p, x: energy(jnp.linalg.norm(x * p["w"], axis=1)), MATRIX, (3, 7)),
    case("window: max", pooled, VECTOR, (7,)),
    case("window: sum", averaged, VECTOR, (7,)),
    case("window: max of equals", lambda p, x: energy(jnp.max(jnp.round(x) * p["w"])), {"w": np.ones(7)}, (7,)),
    case("reduce: logsumexp", lambda p, x: jax.nn.logsumexp(x @ p["w"]), MATRIX, (3,)),
    case("reduce: prod, a zero", lambda p, x: energy(jnp.prod(x * p["w"])), {"w": np.array([0.0, 1, 2])}, (3,)),
    case("reduce: var", lambda p, x: energy(jnp.std(x @ p["w"])), MATRIX, (3,)),
    case("reduce: layer norm", layer_normed, {"g": (7,), "b": (7,)}, (7,), quick=True),
    case(
        "reduce: mean over masked",
        lambda p, x, m: energy(jnp.mean(x @ p["w"], where=m)),
        {"w": (3,)},
        (7, 3),
        lambda rng, lead: bits(7)(rng, lead).at[:, 0].set(True),
    ),
    case(
        "shape: flip, repeat, stack",
        lambda p, x: energy(jnp.stack([jnp.flip(p["w"]), p["w"]]).repeat(2, 0) @ x),
        VECTOR,
        (7,),
    ),
    case(
        "shape: split", lambda p, x: energy(jnp.split(p["w"], [3])[0] * x[:3] + jnp.split(p["w"], [4])[1]), VECTOR, (7,)
    ),
    case("shape: triu, diag", lambda p, x: energy(x @ (jnp.triu(p["w"]) + jnp.diag(p["w"][0]))), {"w": (3, 3)}, (3,)),
    case("shape: strided slice", lambda p, x: energy(x * p["w"][::-2]), VECTOR, (4,)),
    case("shape: broadcast_to", lambda p, x: energy(jnp.broadcast_to(p["w"], (3, 7)) * x), VECTOR, (3, 7)),
    case("shape: pad of w", lambda p, x: energy(jnp.pad(p["w"], 2, mode="reflect") * x), VECTOR, (11,)),
    case("shape: block", lambda p, x: energy(x @ jnp.block([[p["w"], x[:, None]], [x, 1.0]])[:3]), {"w": (3, 3)}, (3,)),
    case(
        "cast: float32 and back",
        lambda p, x: energy(x @ p["w"].astype(jnp.float32).astype(float)),
        MATRIX,
        (3,),
        tolerance=1e-5,
    ),
    case("cast: bfloat16 and back", cast, MATRIX, (3,), tolerance=2e-2),
    case(
        "cast: reduce_precision",
        lambda p, x: energy(x @ lax.reduce_precision(p["w"], 8, 7)),
        MATRIX,
        (3,),
        tolerance=2e-2,
    ),
    case("point: abs at 0", lambda p, x: energy(jnp.abs(p["w"]) * x), {"w": np.zeros(3)}, (3,)),
    case("point: x ** w", lambda p, x: energy(x ** p["w"]), {"w": (3,)}, positive(3)),
    case("point: w ** x", lambda p, x: energy(p["w"] ** x), {"w": positive(3)}, (3,)),
    case(
        "point: erf, lgamma, digamma",
        lambda p, x: energy(jax.scipy.special.digamma(jax.lax.lgamma(x + p["w"]) + 2) * lax.erf(p["w"])),
        {"w": positive(3)},
        positive(3),
    ),
    case(
        "point: igamma(x, w)",
        lambda p, x: energy(jax.scipy.special.gammainc(x, p["w"])),
        {"w": positive(3)},
        positive(3),
    ),
    case("point: rem", lambda p, x: energy(jnp.fmod(x, p["w"])), {"w": positive(3)}, (3,)),
    case("point: nan_to_num", lambda p, x: energy(jnp.nan_to_num(p["w"] * x)), {"w": (3,)}, (3,)),
    case("point: select, piecewise", pieces, {"v": (), "w": ()}, (7,)),
    case("point: polyval", lambda p, x: energy(jnp.polyval(p["w"], x)), {"w": (3,)}, (7,)),
)


# --- derivatives within the loss ---


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def gradient_penalty(p, x):
    return net(p, x) ** 2 + (jnp.linalg.norm(jax.grad(net, 1)(p, x)) - 1) ** 2


def laplacian(p, x):
    return (jnp.trace(jax.hessian(net, 1)(p, x)) - net(p, x)) ** 2


def score_matching(p, x):
    def score(x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    return jnp.trace(jax.jacfwd(score)(x)) + jnp.sum(score(x) ** 2) / 2


def grad_of_scan(p, xs):
    def last(xs):
        return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), jnp.zeros(3), xs)[0])

    return energy(jax.grad(last)(xs))


def adapted(p, x, y, z):
    """A step of gradient descent on one pair, and the loss at another: MAML."""

    def error(p, x):
        return (net(p, x) - y) ** 2

    steps = jax.tree.map(lambda a, d: a - 0.1 * d, p, jax.grad(error)(p, x))
    return error(steps, z)


def tangents(p, x, v):
    y, dy = jax.jvp(lambda x: net(p, x), (x,), (v,))
    return y**2 + jnp.sin(dy)


def linearised(p, x, v):
    """The tangent at the parameters, as in a neural tangent kernel."""
    y, push = jax.linearize(lambda p: net(p, x), p)
    return (y + push(jax.tree.map(lambda a: 0.1 * a * a, p)) - v[0]) ** 2


def times_hessian(p, x, v):
    return energy(jax.jvp(jax.grad(lambda x: net(p, x)), (x,), (v,))[1])


def jacobian_of_params(p, x):
    return sum(energy(j) for j in jax.tree.leaves(jax.jacrev(lambda p: jnp.tanh(x @ p["w"]))(p)))


NET = {"w": (3, 7), "v": (7,)}
WITHIN = (
    case("within: gradient penalty", gradient_penalty, NET, (3,), quick=True),
    case("within: Laplacian", laplacian, NET, (3,)),
    case("within: score matching", score_matching, {"w": (3, 7)}, (3,)),
    case("within: grad of scan", grad_of_scan, {"w": (3, 3)}, (2, 3)),
    case("within: MAML", adapted, NET, (3,), (), (3,)),
    case("within: jvp", tangents, NET, (3,), (3,)),
    case("within: linearize of params", linearised, NET, (3,), (1,)),
    case("within: Hessian times v", times_hessian, NET, (3,), (3,)),
    case("within: Jacobian of params", jacobian_of_params, {"w": (3, 7)}, (3,)),
    case("within: grad of params", lambda p, x: energy(jax.grad(net)(p, x)["w"]), NET, (3,)),
)

CASES = NUMERICS + WITHIN
