"""Forwards by NumPy alone, in float64, by loops that are slow and plain: what the layers of cases.py must return."""

import itertools

import numpy as np


def spread(value, axes):
    return (value,) * axes if isinstance(value, int) else tuple(value)


def pads_of(padding, size, extent, stride):
    """(low, high) for each axis, as TensorFlow and JAX define SAME."""
    if padding == "VALID":
        return [(0, 0)] * len(size)
    if padding == "SAME":
        over = [max((-(-n // s) - 1) * s + e - n, 0) for n, e, s in zip(size, extent, stride, strict=True)]
        return [(n // 2, n - n // 2) for n in over]
    return [(p, p) if isinstance(p, int) else p for p in spread(padding, len(size))]


def cells(size, kernel, stride, padding, dilation=1):
    """For every window its place, and the (offset, position) pairs of it that lie within the input."""
    axes = len(size)
    kernel, stride, dilation = (spread(v, axes) for v in (kernel, stride, dilation))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = pads_of(padding, size, extent, stride)
    count = [(n + low + high - e) // s + 1 for n, (low, high), e, s in zip(size, pads, extent, stride, strict=True)]
    for p in itertools.product(*map(range, count)):
        held = []
        for k in itertools.product(*map(range, kernel)):
            at = tuple(p[i] * stride[i] + k[i] * dilation[i] - pads[i][0] for i in range(axes))
            if all(0 <= a < n for a, n in zip(at, size, strict=True)):
                held.append((k, at))
        yield p, held, count


def conv(x, W, b=0.0, stride=1, padding="SAME", dilation=1, groups=1):
    size, kernel = x.shape[1:-1], W.shape[1:-1]
    n_out, n_in = W.shape[0] // groups, x.shape[-1] // groups
    y = None
    for p, held, count in cells(size, kernel, stride, padding, dilation):
        y = np.zeros((len(x), *count, W.shape[0])) if y is None else y
        for k, at in held:
            for g in range(groups):
                out, into = slice(g * n_out, (g + 1) * n_out), slice(g * n_in, (g + 1) * n_in)
                y[(slice(None), *p, out)] += x[(slice(None), *at, into)] @ W[(out, *k)].T
    return y + b


def conv_transpose(x, W, b=0.0, size=None, stride=1, padding="SAME", dilation=1, groups=1):
    """size: of the output."""
    n_in, n_out = x.shape[-1] // groups, W.shape[-1]
    y = np.zeros((len(x), *size, n_out * groups))
    for p, held, _ in cells(size, W.shape[1:-1], stride, padding, dilation):
        for k, at in held:
            for g in range(groups):
                out, into = slice(g * n_out, (g + 1) * n_out), slice(g * n_in, (g + 1) * n_in)
                y[(slice(None), *at, out)] += x[(slice(None), *p, into)] @ W[(into, *k)]
    return y + b


def pool(reduce, x, kernel, stride=None, padding="VALID"):
    """reduce: of (numbers of a window, m, c) to (m, c)."""
    y = None
    for p, held, count in cells(x.shape[1:-1], kernel, kernel if stride is None else stride, padding):
        y = np.zeros((len(x), *count, x.shape[-1])) if y is None else y
        y[(slice(None), *p)] = reduce(np.stack([x[(slice(None), *at)] for _, at in held]))
    return y


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def rnn(p, x, reverse=False):
    h, y = np.zeros((len(x), p["U"].shape[1])), np.zeros((*x.shape[:2], p["U"].shape[1]))
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        h = y[:, t] = np.tanh(x[:, t] @ p["W"].T + p["b"] + h @ p["U"].T + p["c"])
    return y


def lstm(p, x, reverse=False):
    n = p["U"].shape[1]
    h = s = np.zeros((len(x), n))
    y = np.zeros((*x.shape[:2], n))
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ p["W"].T + p["b"] + h @ p["U"].T + p["c"], 4, -1)
        s = sigmoid(f) * s + sigmoid(i) * np.tanh(g)
        h = y[:, t] = sigmoid(o) * np.tanh(s)
    return y


def gru(p, x, reverse=False):
    n = p["U"].shape[1]
    h, y = np.zeros((len(x), n)), np.zeros((*x.shape[:2], n))
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        a_r, a_z, a_k = np.split(x[:, t] @ p["W"].T + p["b"], 3, -1)
        e_r, e_z, e_k = np.split(h @ p["U"].T + p["c"], 3, -1)
        z = sigmoid(a_z + e_z)
        h = y[:, t] = (1 - z) * np.tanh(a_k + sigmoid(a_r + e_r) * e_k) + z * h
    return y


def attention(p, x, heads, kv=None, causal=False, rotary=None, memory=None, mask=None):
    """Head by head, query by query."""
    z, kv = x if memory is None else memory, heads if kv is None else kv
    m, T, n = x.shape
    d, S = n // heads, z.shape[1]
    part = lambda leaf, a: a @ p[leaf].T + p.get(f"b_{leaf}", 0.0)  # noqa: E731
    q = part("Q", x).reshape(m, T, heads, d)
    k, v = (part(leaf, z).reshape(m, S, kv, d) for leaf in "KV")
    o = np.zeros((m, T, heads, d))
    for i, h, t in np.ndindex(m, heads, T):
        seen = [s for s in range(S) if (s <= t or not causal) and (mask is None or mask[i, s])]
        if not seen:
            continue
        own = rotated(q[i, t, h], t, rotary)
        scores = np.array([own @ rotated(k[i, s, h * kv // heads], s, rotary) for s in seen]) / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        o[i, t, h] = (weights / weights.sum()) @ v[i, seen, h * kv // heads]
    return part("O", o.reshape(m, T, n))


def rotated(a, t, base):
    """Pairs as complex numbers, turned by multiplication."""
    if base is None:
        return a
    turned = (a[::2] + 1j * a[1::2]) * np.exp(1j * t * base ** (-np.arange(0, len(a), 2) / len(a)))
    return np.stack([turned.real, turned.imag], -1).reshape(a.shape)
