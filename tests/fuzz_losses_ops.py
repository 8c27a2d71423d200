"""Lines without a function of their own: layouts, functions of one value, and meetings of two or three.

The tables hold templates: {v} is a value, {s} the same made small, {u} and {z} others, {a} an axis, {n} its length.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz_losses_parts import LARGEST, RANK, Scope, Value


def templates(text: str) -> list[str]:
    """Of a table: parted by lines and by bars."""
    return [one.strip() for one in text.replace("\n", "|").split("|") if one.strip()]


# --- layouts ---


def put(shape: tuple[int, ...], a: int, *n: int) -> tuple[int, ...]:
    """The shape with these lengths in place of that of axis a."""
    return (*shape[:a], *n, *shape[a + 1 :])


def at(v: Value, a: int, index: Any) -> str:
    return f"{v}[{', '.join([':'] * a + [str(index)])}]"


def padded(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...]]:
    """Padded within and on both sides, or cut there."""
    low, high, inner = m.whole(-1, 2), m.whole(0, 1), m.whole(0, 1)
    widths = [(low, high, inner) if i == a else (0, 0, 0) for i in range(len(v.shape))]
    return f"jax.lax.pad({v}, jnp.zeros((), {v}.dtype), {widths})", put(v.shape, a, n + low + high + inner * (n - 1))


def cut(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value]:
    """A slice that starts where an index says."""
    size = m.whole(1, n)
    k = m.index(n - size + 1)
    return f"jax.lax.dynamic_slice_in_dim({v}, {k}, {size}, {a})", put(v.shape, a, size), k


def picked(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value]:
    k = m.index(n)
    return at(v, a, k), put(v.shape, a), k


def taken(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value]:
    k = m.index(n, (m.dim(),))
    return f"jnp.take({v}, {k}, axis={a})", put(v.shape, a, *k.shape), k


def turned(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...]]:
    order = [int(i) for i in m.rng.permutation(len(v.shape))]
    return f"jnp.transpose({v}, {order})", tuple(v.shape[i] for i in order)


def reshaped(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...]]:
    factor = m.choose([d for d in range(1, v.size + 1) if v.size % d == 0])
    shape = m.choose([(factor, v.size // factor), (factor, -1, 1), (-1,)])
    return f"{v}.reshape({shape})", tuple(
        (v.size // factor if len(shape) > 1 else v.size) if d == -1 else d for d in shape
    )


def joined(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value]:
    u = m.get(m.choose(("P", "")), put(v.shape, a, m.whole(1, 3)))
    first, last = (v, u) if m.chance(0.5) else (u, v)
    return f"jnp.concatenate([{first}, {last}], {a})", put(v.shape, a, n + u.shape[a]), u


def stacked(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value]:
    u = m.get(m.choose(("P", "")), v.shape)
    return f"jnp.stack([{v}, {u}], {a})", (*v.shape[:a], 2, *v.shape[a:]), u


def written(m: Scope, v: Value, a: int, n: int) -> tuple[str, tuple[int, ...], Value, Value]:
    """A row put in, added or multiplied where an index says."""
    k, u = m.index(n), m.get("", put(v.shape, a))
    place = at(v._replace(text=f"{v}.at"), a, k)
    return f"{place}.{m.choose(('set', 'add', 'multiply', 'add'))}({u}.astype({v}.dtype))", v.shape, k, u


LAYOUTS: list[tuple[int, Callable]] = [
    (0, lambda m, v, a, n: (f"{v}.reshape(-1)", (v.size,))),
    (0, lambda m, v, a, n: (f"jnp.expand_dims({v}, 0)", (1, *v.shape))),
    (0, lambda m, v, a, n: (f"jnp.broadcast_to({v}, {(2, *v.shape)})", (2, *v.shape))),
    (0, lambda m, v, a, n: (f"view({v})", v.shape[::-1])),
    (0, lambda m, v, a, n: (f"itself({v})", v.shape)),
    (0, lambda m, v, a, n: (f"jnp.squeeze({v})", tuple(d for d in v.shape if d != 1))),
    (0, lambda m, v, a, n: (f"{v}[..., None]", (*v.shape, 1))),
    (0, stacked),
    (1, turned),
    (1, turned),
    (1, reshaped),
    (1, padded),
    (1, padded),
    (1, cut),
    (1, cut),
    (1, picked),
    (1, picked),
    (1, taken),
    (1, joined),
    (1, joined),
    (1, written),
    (1, lambda m, v, a, n: (f"jnp.flip({v}, {a})", v.shape)),
    (1, lambda m, v, a, n: (at(v, a, "::-1"), v.shape)),
    (1, lambda m, v, a, n: (at(v, a, "::2"), put(v.shape, a, (n + 1) // 2))),
    (1, lambda m, v, a, n: (f"jax.lax.slice_in_dim({v}, {n // 2}, {n}, axis={a})", put(v.shape, a, n - n // 2))),
    (1, lambda m, v, a, n: (at(v, a, -1), put(v.shape, a))),
    (1, lambda m, v, a, n: (at(v, a, f"np.array([0, {n - 1}, 0])"), put(v.shape, a, 3))),
    (1, lambda m, v, a, n: (f"jnp.roll({v}, 1, {a})", v.shape)),
    (1, lambda m, v, a, n: (f"jnp.repeat({v}, 2, axis={a})", put(v.shape, a, 2 * n))),
    (1, lambda m, v, a, n: (f"jnp.tile({v}, 2)", (*v.shape[:-1], 2 * v.shape[-1]))),
    (1, lambda m, v, a, n: (f"jnp.array_split({v}, 2, {a})[0]", put(v.shape, a, (n + 1) // 2))),
    (1, lambda m, v, a, n: (f"jnp.stack([*{v}])", v.shape)),
    (1, lambda m, v, a, n: (f"jnp.diag({v}.reshape(-1))", (v.size, v.size))),
    (2, lambda m, v, a, n: (f"jnp.swapaxes({v}, 0, -1)", (v.shape[-1], *v.shape[1:-1], v.shape[0]))),
    (2, lambda m, v, a, n: (f"jnp.moveaxis({v}, 0, -1)", (*v.shape[1:], v.shape[0]))),
    (2, lambda m, v, a, n: (f"jnp.triu({v})", v.shape)),
    (2, lambda m, v, a, n: (f"jnp.diagonal({v})", (*v.shape[2:], min(v.shape[:2])))),
]


def layout(m: Scope) -> None:
    """A chain of one to three, of parameters mostly."""
    v = m.pick("P" if m.chance(0.8) else "")
    for _ in range(m.whole(1, 3)):
        a = m.whole(0, max(0, len(v.shape) - 1))
        make = m.choose([make for rank, make in LAYOUTS if rank <= len(v.shape)])
        text, shape, *more = make(m, v, a, v.shape[a] if v.shape else 1)
        if len(shape) <= RANK and 0 not in shape and np.prod(shape) <= LARGEST:
            v = m.emit(text, shape, tame=v.tame and all(u.tame or not u.shape for u in more))


# --- functions of one value ---

SINGLES = templates("""
jnp.exp({s}) | jnp.tanh({v}) ! | jnp.sin({v}) ! | jnp.sqrt(1 + {v} ** 2) | jnp.log1p({v} ** 2) | 1 / (1 + {v} ** 2) !
{s} * {s} | {s} ** 3 | -{v} | {v} + {v} | jnp.square({s}) | jax.nn.sigmoid({v}) ! | jax.nn.softplus({v}) | jnp.abs({v})
jax.nn.relu({v}) | jax.nn.gelu({v}) | jax.nn.silu({v}) | jax.nn.elu({v}) | jax.nn.leaky_relu({v}) | jax.nn.relu6({v})
jax.scipy.special.erf({v}) ! | jax.nn.log_sigmoid({v}) | jax.lax.rsqrt(1 + {v} * {v}) ! | bent({v}) ! | against({v})
limited({v}) | limited({v}) | straight({v}) | powered(2, {s}) | jax.lax.optimization_barrier({v}) | jnp.sinc({s} + 2) !
jax.checkpoint(lambda c: jnp.sin(c) * c)({v}) | jax.lax.stop_gradient({v}) | jnp.where(mask({i}, {v}.shape), {v}, 0.0)
{v} + jax.lax.stop_gradient(jnp.round({v}) - {v}) | {v} * mask({i}, {v}.shape) | jnp.clip({v}, -1, 1) !
jnp.where({v} > 0, jnp.sqrt(jnp.where({v} > 0, {v}, 1.0)), {v}) | jnp.cumsum({v}.reshape(-1)).reshape({v}.shape)
jnp.sort({v}.reshape(-1)).reshape({v}.shape) | jax.jvp(jnp.sin, ({v},), ({s},))[1] | {v} * arr({i}, {v}.shape)
jax.grad(lambda c: jnp.sum(jnp.sin(c) ** 2))({v}) ! | jnp.vectorize(lambda c: c * jnp.cos(c))({v}) | jnp.nan_to_num({v})
jax.lax.select(mask({i}, {v}.shape), {v}, 2 * {v}) | jnp.where({v} == {v}, {v}, jnp.log({v} - {v})) ?
jax.random.gamma(jax.random.key({i}), 1 + {c} ** 2) ?
""")

ALONG = templates("""
jax.nn.softmax({v}, {a}) ! = | jax.nn.log_softmax({v}, {a}) = | jax.nn.logsumexp({v}, {a}) - | jnp.mean({v}, {a}) -
jnp.cumsum({v}, {a}) = | jnp.cumprod({s}, {a}) ! = | jnp.sum({v}, {a}) - | jnp.prod({s}, {a}) ! - | jnp.max({v}, {a}) -
{v} / jnp.sqrt(0.1 + jnp.sum({v} ** 2, {a}, keepdims=True)) ! = | {v} - jnp.mean({v}, {a}, keepdims=True) =
({v} - {v}.mean({a}, keepdims=True)) / jnp.sqrt({v}.var({a}, keepdims=True) + 0.1) = | jnp.sort({v}, {a}) =
jnp.linalg.norm(1.5 + {s}, axis={a}) - | jax.lax.cummax({v}, {a}) = | jnp.var({v}, {a}) - | jnp.min({v}, {a}) -
jnp.fft.fft({c}, axis={a}).real = | jnp.abs(1 + jnp.fft.fft({c}, axis={a})) = | jnp.median({v}, {a}) -
jax.lax.associative_scan(jnp.add, {v}, axis={a}) = | jax.lax.associative_scan(lambda c, d: c * d + d, {s}, axis={a}) =
jnp.diff({v}, axis={a}, prepend=0.5) = | jnp.take_along_axis({v}, jnp.argsort({v}, {a}), {a}) =
jax.nn.standardize({v}, {a}, epsilon=0.1) = | jax.lax.cumlogsumexp({v}, {a}, reverse=True) =
""")


def single(m: Scope) -> None:
    """A function of one value; a cast and back makes the comparison looser."""
    v = m.pick("P" if m.chance(0.5) else "", rank=m.whole(0, 1))
    if m.root.dtype == "float64" and m.chance(0.04):
        m.root.loosest = "float32"
        m.emit(f"{v}.astype('float32').astype(float)", v.shape, tame=v.tame)
        return
    a = m.whole(0, max(0, len(v.shape) - 1))
    template = m.choose(ALONG if v.shape and m.chance(0.4) else [t for t in SINGLES if "?" not in t or m.chance(0.2)])
    text = template.rstrip(" !=-?").format(v=v, s=m.soft(v), a=a, i=m.whole(0, 999), c=m.cast(v))
    m.emit(text, put(v.shape, a) if template.endswith("-") else v.shape, tame="!" in template)


def matrix(m: Scope) -> None:
    """What linear algebra makes of a square matrix."""
    n = m.whole(2, 3)
    v = m.soft(m.get("P" if m.chance(0.6) else "", (n, n)))
    text = m.choose((
        "jnp.linalg.inv({p})", "jnp.linalg.cholesky({p})", "jnp.linalg.slogdet({p})[1]", "jnp.linalg.solve({p}, {u})",
        "jax.scipy.linalg.solve_triangular({p}, {u}, lower=True)", "jnp.linalg.matrix_power({s}, 3)", "jnp.trace({v})",
        "jax.scipy.linalg.expm(0.3 * {s})", "jnp.linalg.qr({p})[1]",
    ))  # fmt: skip
    u = m.soft(m.get("", (n, 2)))
    c = m.cast(v)
    text = text.format(p=f"(2 * jnp.eye({n}) + {c} @ {c}.T)", u=m.cast(u), s=c, v=v)
    m.emit(text, () if "det" in text or "trace" in text else (n, 2) if "solve" in text else (n, n))


# --- meetings ---

PAIRS = templates("""
{v} + {u} | {v} - {u} | {v} * {u} | {v} * {u} | {v} / (1.5 + jnp.sin({u})) | jnp.maximum({v}, {u})
jnp.power(1.5 + jnp.sin({v}), jnp.sin({u})) | jnp.arctan2({v}, 2 + jnp.sin({u})) | jnp.logaddexp({v}, {u})
jnp.where({z} > 0, {v}, {u}) | jnp.where({z} > 0, {v}, {u} * {z}) | jnp.clip({z}, {v} - 1, {v} + 1) | {v} * {u} + {z}
jnp.sqrt(1 + {v} ** 2 + {u} ** 2) | kinked({cv}, {cu}) | scaled({cv}, {cu}, {cz}) | scaled({cz}, {cv}, {cu})
{v} * {u} * {z} | jax.lax.clamp({cu} - 1, {cv}, {cu} + 1) | {v} + {u} * {z} | jnp.minimum({v}, {u}) | {su} * {v} + {su}
jnp.cumsum(({v} * {u}).reshape(-1)).reshape({v}.shape) | mixed({v}, {u})[2] | mixed({v}, {u})[1] * {z}
jax.checkpoint(lambda c, d: jnp.sin(c * d) * d)({v}, {u}) | jnp.where({u} > 0, {v}, -{v}) | jnp.hypot({v}, 1.5 + {su})
jax.lax.select({u} > 0, {cv}, {cz}) | jnp.where(({z} > 0) & ({v} > 0), {v}, {u}) | jnp.copysign({v}, {u})
jnp.heaviside({u}, 0.5) * {v} | jnp.where(jnp.sum({z}) > 0, {v}, {u}) | jax.vmap(lambda c, d: c * d)({v}, {u})
jax.lax.fori_loop(0, 2, lambda _, c: jnp.sin(c) * {cu}, {cv} * 1.0) | jnp.where({z} > 9, jnp.sqrt({v} - {v}), {u}) ?
jnp.where(jnp.abs({z}) > 1e-9, {v}, jnp.log({u} - {u})) ? | asked({cv}, {cu}) ?
""")

SPECS = templates("""
i,i-> | ij,j->i | ij,jk->ik | ij,kj->ki | hij,hj->hi | hij,jk->hik | hij,hjk->ihk | ij,hjk->hik | i,j->ij | ij,ij->i
ij,ij-> | ii,i->i | ij,ik->jk | bhd,hde->bhe | thd,shd->hts | i,ij->j | ij,i->ij | ij,jk,kl->il | hi,hij,hj->h
i,ij,j-> | ij,ij,ij->j | hts,shd->thd | ij,i,j->ij | ii,ii->i
""")


def pair(m: Scope) -> None:
    """Two or three values, number by number; the second may be broadcast."""
    template = m.choose([t for t in PAIRS if "?" not in t or m.chance(0.15)])
    kinds = m.choose((("P", "D"), ("D", "P"), ("P", "P"), ("P", "DP"), ("", "")))
    v = m.pick(kinds[0][:1], rank=int("vmap" in template))
    same = any(word in template for word in ("lax", "scaled", "kinked", "vmap", "asked"))
    shape = v.shape if same or m.chance(0.6) or not v.shape else m.choose((v.shape[1:], put(v.shape, 0, 1), ()))
    u, z = m.get(kinds[1][:1], shape), m.get(m.choose(("D", "P", "")), v.shape)
    if m.chance(0.1):
        u = m.fit(v, shape)
    more = {"cu": m.cast(u), "cv": m.cast(v), "cz": m.cast(z), "su": m.soft(u)}
    m.emit(template.rstrip(" ?").format(v=v, u=u, z=z, **more), v.shape, tame="sin(" in template[:12])


def einsum(m: Scope) -> None:
    spec = m.choose(SPECS)
    inputs, output = spec.split("->")
    inputs = inputs.split(",")
    first = m.pick(m.choose(("P", "D")), len(inputs[0]))
    if len(first.shape) != len(inputs[0]) or len(set(inputs[0])) != len(inputs[0]):
        first = None
    sizes = {i: m.whole(2, 3) for i in set(spec)}
    sizes |= dict(zip(inputs[0], first.shape, strict=True)) if first else {}
    kinds = m.choose((("P", "D", "P"), ("D", "P", "P"), ("P", "P", "D"), ("P", "P", "P"), ("D", "", "P")))
    values = [m.get(kind, tuple(sizes[i] for i in one)) for kind, one in zip(kinds, inputs, strict=False)]
    values = [first, *values[1:]] if first else values
    shape = tuple(sizes[i] for i in output)
    if np.prod(shape) <= 2 * LARGEST:
        m.emit(f"jnp.einsum('{spec}', {', '.join(map(str, values))})", shape)


def matmul(m: Scope) -> None:
    """Products of matrices and vectors, on both sides; W + A B, and the like."""
    n, k, o, h = m.dim(), m.dim(), m.dim(), 2
    a, b = m.choose((("P", "D"), ("D", "P"), ("P", "P"), ("", "P")))
    forms = {
        "{v} @ {u}": m.choose((
            ((n,), (n, k), (k,)), ((n, k), (k,), (n,)), ((n, k), (k, o), (n, o)), ((n,), (n,), ()),
            ((h, n, k), (k, o), (h, n, o)), ((n, k), (h, k, o), (h, n, o)), ((h, n, k), (h, k, o), (h, n, o)),
        )),
        "{v} @ {u}.T": ((n, k), (o, k), (n, o)),
        "({z} + {v} @ {u})": ((n, k), (k, o), (n, o)),
        "jnp.kron({v}, {u})": ((2, k), (2,), (2, 2 * k)),
        "jnp.outer({v}, {u})": ((n,), (k,), (n, k)),
        "jax.lax.dot_general({cv}, {cu}, (((1,), (2,)), ((0,), (1,))))": ((h, n, k), (o, h, n), (h, k, o)),
        "jax.lax.dot_general({cv}, {cu}, (((0, 1), (1, 0)), ((), ())))": ((n, k), (k, n), ()),
        "jnp.tensordot({v}, {u}, 2)": ((h, n, k), (n, k, o), (h, o)),
        "product({cv}, {cu})": ((n, k), (k, o), (n, o)),
        "{z} * {v} / jnp.sqrt(0.1 + jnp.sum({v} ** 2, 0))": ((n, k), (k,), (n, k)),
        "jnp.convolve({v}, {u})": ((n,), (k,), (n + k - 1,)),
        "jnp.cross({v}, {u})": ((3,), (3,), (3,)),
        "jnp.polyval({v}, jnp.sin({u}))": ((n,), (k,), (k,)),
        "jnp.interp({v}, jnp.linspace(-2, 2, 3), {u})": ((n,), (3,), (n,)),
        "jax.nn.dot_product_attention({cv}, {cu}, {cz})": ((n, h, k), (o, h, k), (n, h, k)),
    }  # fmt: skip
    text = m.choose([*forms][:3] * 3 + [*forms])
    left, right, out = forms[text]
    if np.prod(out) > 2 * LARGEST:
        return
    v, u = m.get(a, left), m.get(b, right)
    v, u = (m.soft(v), m.soft(u)) if m.chance(0.5) else (v, u)
    z = m.get("P", (o, h, k) if "attention" in text else out)
    m.emit(text.format(v=v, u=u, z=z, cv=m.cast(v), cu=m.cast(u), cz=m.cast(z)), out)


def convolution(m: Scope) -> None:
    """One or two axes, with strides, dilations and groups; the kernel on either side."""
    axes, groups, per = m.whole(1, 2), m.whole(1, 2), m.whole(1, 2)
    wide, n_out = groups * per, groups * m.whole(1, 2)
    size, kernel = m.dims(axes), tuple(m.whole(1, 2) for _ in range(axes))
    stride, dilate, spread = (tuple(m.whole(1, 2) for _ in range(axes)) for _ in range(3))
    spread = spread if m.chance(0.3) else (1,) * axes
    pads = [(m.whole(0, 1), m.whole(0, 2)) for _ in range(axes)]
    out = tuple(
        ((n - 1) * d + 1 + low + high - ((k - 1) * e + 1)) // s + 1
        for n, k, s, e, d, (low, high) in zip(size, kernel, stride, dilate, spread, pads, strict=True)
    )
    if min(out) < 1 or np.prod(out) * n_out > 2 * LARGEST:
        return
    last = m.chance(0.5)
    x_shape, y_shape = ((1, *size, wide), (1, *out, n_out)) if last else ((1, wide, *size), (1, n_out, *out))
    w_shape = (*kernel, per, n_out) if last else (n_out, per, *kernel)
    kinds = m.choose((("D", "P"), ("D", "P"), ("P", "D"), ("P", "P"), ("", "P")))
    x, w = m.get(kinds[0], x_shape), m.get(kinds[1], w_shape)
    letters = "HW"[:axes]
    dims = (
        (f"N{letters}C", f"{letters}IO", f"N{letters}C") if last else (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    )
    options = f"{stride}, {pads}, {spread}, {dilate}, {dims}, feature_group_count={groups}"
    y = m.emit(f"jax.lax.conv_general_dilated({m.cast(x)}, {m.cast(w)}, {options})", y_shape)
    if m.chance(0.2):
        window = ", ".join("2" if 1 <= i <= 1 and n > 1 else "1" for i, n in enumerate(y_shape))
        shape = put(y_shape, 1, y_shape[1] - 1) if y_shape[1] > 1 else y_shape
        how = m.choose(("-jnp.inf, jax.lax.max", "0.0, jax.lax.add"))
        m.emit(f"jax.lax.reduce_window({y}, {how}, ({window}), (1,) * {len(y_shape)}, 'VALID')", shape)


def table(m: Scope) -> None:
    """Rows by integers: looked up, added to, by a one-hot vector, sorted by the data."""
    n, c, t = m.dim(), m.dim(), m.dim()
    w, x = m.get("P" if m.chance(0.8) else "", (n, c)), m.get("D" if m.chance(0.7) else "", (t, c))
    k, one, e = m.index(n, (t,)), m.index(n), m.get("D", (n,))
    text, shape = m.choose((
        (f"{w}[{k}]", (t, c)),
        (f"jnp.take({w}, {k}, axis=0, mode='clip')", (t, c)),
        (f"{w}[{k}, {m.index(c, (t,))}]", (t,)),
        (f"{w}[{one}]", (c,)),
        (f"jax.nn.one_hot({k}, {n}) @ {w}", (t, c)),
        (f"(1.0 * {w}).at[{k}].add({x}.astype({w}.dtype))", (n, c)),
        (f"(1.0 * {w}).at[{one}].set({x}[0].astype({w}.dtype))", (n, c)),
        (f"(1.0 * {w}).at[{one}].multiply({x}[0].astype({w}.dtype))", (n, c)),
        (f"(1.0 * {w}).at[{one}].max({x}[0].astype({w}.dtype))", (n, c)),
        (f"jnp.zeros(({n}, {c})).at[{k}].add({x} * {w}[0])", (n, c)),
        (f"jax.ops.segment_sum({x} * {w}[1], {k}, {n})", (n, c)),
        (f"jax.lax.dynamic_update_slice(1.0 * {w}, {x}[:1].astype({w}.dtype), ({one}, 0))", (n, c)),
        (f"{w}[jnp.argsort({e})]", (n, c)),
        (f"jax.lax.sort(({m.cast(e)}, {m.cast(w)}[:, 0]), num_keys=1)[1]", (n,)),
        (f"jax.lax.top_k({m.cast(w)}, 2)[0]", (n, 2)),
        (f"{w}[jax.lax.top_k({m.cast(e)}, 2)[1]]", (2, c)),
        (f"jnp.take_along_axis({w}, jnp.argsort({e})[:, None], 1, mode='clip')", (n, 1)),
        (f"{w}[jnp.searchsorted(jnp.linspace(-1, 1, {n - 1}), {e})]", (n, c)),
        (f"{w}[{one}] @ {w}.T", (n,)),
        (f"{w}[jnp.argmax({e})] + {w}[jnp.argmin({w}[:, 0])]", (c,)),
        (f"jax.vmap(lambda i: {w}[i] * {x}[0])({k})", (t, c)),
        (f"jax.lax.map(lambda i: {w}[i] + {x}[0], {k})", (t, c)),
        (f"jax.random.normal(jax.random.fold_in(jax.random.key(1), {one}), ({c},)) * {w}", (n, c)),
    ))  # fmt: skip
    m.emit(text, shape)
