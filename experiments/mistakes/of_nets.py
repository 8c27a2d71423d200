"""Dense nets and their losses as anyone writes them: f, its backward, and what naming a mistake changes in it.

A backward is backward(args, dy, mistake) -> cotangents of args; mistake "" is the right one. A subject is the three of
f, backward and a draw of args. Sizes are primes, each its own; W is square where the mistake would not run otherwise.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm


def draw(*shapes: tuple[int, ...]) -> Any:
    """rng -> Gaussian arrays of these shapes; matrices over the root of their last size."""

    def drawn(rng: np.random.Generator) -> tuple:
        return tuple(gaussian(rng, *shape) / (math.sqrt(shape[-1]) if len(shape) == 2 else 1) for shape in shapes)

    return drawn


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal, float32."""
    return rng.standard_normal(shape).astype(np.float32)


def labels(rng: np.random.Generator, classes: int, *shape: int) -> np.ndarray:
    """Classes, int32."""
    return rng.integers(0, classes, shape).astype(np.int32)


# --- losses over one dense layer ---


def squared_error(x: jax.Array, W: jax.Array, b: jax.Array, t: jax.Array):
    """J = 1/m sum (x W^T + b - t)^2."""
    return jnp.sum((x @ W.T + b - t) ** 2) / len(x)


def squared_error_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dz = 2 (z - t) / m      dW = dz^T x      db = sum dz      dx = dz W      dt = -dz"""
    x, W, b, t = args
    z = x @ W.T + b
    dz = dJ * 2 * (z - t) / len(x)
    if mistake == "1/m is missing":
        dz = dJ * 2 * (z - t)
    if mistake == "mean for sum":
        dz = dJ * 2 * (z - t) / z.size
    if mistake == "factor 2 of the square is missing":
        dz = dJ * (z - t) / len(x)
    if mistake == "sign flipped":
        dz = dJ * 2 * (t - z) / len(x)
    return dz @ W, dz.T @ x, dz.sum(0), -dz


SQUARED_ERROR = squared_error, squared_error_backward, draw((7, 11), (5, 11), (5,), (7, 5))


def cross_entropy(x: jax.Array, W: jax.Array, b: jax.Array, y: jax.Array):
    """J = 1/m sum -log softmax(x W^T + b)[y]."""
    z = x @ W.T + b
    return jnp.mean(jax.nn.logsumexp(z, -1) - z[jnp.arange(len(z)), y])


def cross_entropy_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dz = (softmax(z) - onehot(y)) / m"""
    x, W, b, y = args
    z = x @ W.T + b
    dz = dJ * (jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)) / len(x)
    if mistake == "cotangent ignored":
        dz = dz / dJ
    if mistake == "cotangent divided by":
        dz = dz / dJ**2
    return dz @ W, dz.T @ x, dz.sum(0), None


def draw_cross_entropy(rng: np.random.Generator):
    """A dense layer, and a class a row."""
    return *draw((7, 11), (5, 11), (5,))(rng), labels(rng, 5, 7)


CROSS_ENTROPY = cross_entropy, cross_entropy_backward, draw_cross_entropy


def log_of_softmax(z: jax.Array, y: jax.Array):
    """J = 1/m sum -log(softmax(z)[y] + 1e-6)."""
    p = jax.nn.softmax(z)[jnp.arange(len(z)), y]
    return -jnp.mean(jnp.log(p + 1e-6))


def log_of_softmax_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dp = -1 / (m (p + 1e-6))      dz = p dp (onehot(y) - softmax(z))"""
    z, y = args
    q = jax.nn.softmax(z)
    at = jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)
    p = jnp.sum(q * at, -1, keepdims=True)
    dp = -dJ / (p + 1e-6) / len(z)
    if mistake == "epsilon of the log omitted":
        dp = -dJ / p / len(z)
    return p * dp * (at - q), None


LOG_OF_SOFTMAX = log_of_softmax, log_of_softmax_backward, lambda rng: (3 * gaussian(rng, 7, 5), labels(rng, 5, 7))


def entropy(p: jax.Array):
    """H = -sum p log p for each row, with 0 log 0 = 0."""
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)


def entropy_backward(args: tuple, dH: jax.Array, mistake: str = ""):
    """dp = -(log p + 1) where p > 0"""
    (p,) = args
    dp = dH[:, None] * -jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)) + 1, 0)
    if mistake == "log 0 in the backward":
        dp = dH[:, None] * (p > 0) * -(jnp.log(p) + 1)
    return (dp,)


def draw_entropy(rng: np.random.Generator):
    """Probabilities, some of them 0."""
    p = np.maximum(gaussian(rng, 7, 5), 0) + np.eye(7, 5, dtype=np.float32)
    p[5:, 0] += 1
    return (p / p.sum(-1, keepdims=True),)


ENTROPY = entropy, entropy_backward, draw_entropy


def value_loss(x: jax.Array, successor: jax.Array, r: jax.Array, W: jax.Array, w: jax.Array):
    """J = 1/m sum (r + 0.9 v(successor) - v(x))^2 / 2 with v(x) = tanh(x W^T) w; the target is held constant."""
    target = jax.lax.stop_gradient(r + 0.9 * jnp.tanh(successor @ W.T) @ w)
    return jnp.mean((target - jnp.tanh(x @ W.T) @ w) ** 2) / 2


def value_loss_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dv = (v - target) / m, and nothing for the target"""
    x, successor, r, W, w = args
    h, g = jnp.tanh(x @ W.T), jnp.tanh(successor @ W.T)
    dv = dJ * (h @ w - r - 0.9 * (g @ w)) / len(x)
    dz = dv[:, None] * w * (1 - h**2)
    dx, dW, dw = dz @ W, dz.T @ x, h.T @ dv
    if mistake == "gradient leaks through stop_gradient":
        du = -0.9 * dv
        dz = du[:, None] * w * (1 - g**2)
        return dx, dz @ W, -dv, dW + dz.T @ successor, dw + g.T @ du
    return dx, jnp.zeros_like(successor), jnp.zeros_like(r), dW, dw


VALUE_LOSS = value_loss, value_loss_backward, draw((7, 11), (7, 11), (7,), (5, 11), (5,))


# --- dense layers ---


def dense(x: jax.Array, W: jax.Array, b: jax.Array):
    """z = x W^T + b."""
    return x @ W.T + b


def dense_backward(args: tuple, dz: jax.Array, mistake: str = ""):
    """dx = dz W      dW = dz^T x      db = sum dz"""
    x, W, _ = args
    dx, dW, db = dz @ W, dz.T @ x, dz.sum(0)
    if mistake == "dW transposed":
        dW = x.T @ dz
    if mistake == "dx by W^T, not W":
        dx = dz @ W.T
    if mistake == "db keeps its summed axis":
        db = dz.sum(0, keepdims=True)
    if mistake == "one element of 585,209 not written":
        dW = dW.at[-1, -1].set(0)
    if mistake == "dW by way of bfloat16":
        dW = (dz.astype(jnp.bfloat16).T @ x.astype(jnp.bfloat16)).astype(W.dtype)
    if mistake == "dW noisy: rounded at random":
        dW = jnp.floor(dW * 2**12 + np.random.random_sample(dW.shape).astype(dW.dtype)) / 2**12
    return dx, dW, db


DENSE = dense, dense_backward, draw((7, 11), (5, 11), (5,))
SQUARE_DENSE = dense, dense_backward, draw((7, 11), (11, 11), (11,))
LARGE_DENSE = dense, dense_backward, draw((3, 769), (761, 769), (761,))


def mlp(x: jax.Array, W1: jax.Array, b1: jax.Array, W2: jax.Array, b2: jax.Array):
    """z2 = sigma(x W1^T + b1) W2^T + b2."""
    return jax.nn.sigmoid(x @ W1.T + b1) @ W2.T + b2


def mlp_backward(args: tuple, dz2: jax.Array, mistake: str = ""):
    """dz1 = dz2 W2 a (1 - a)      dW = dz^T input      db = sum dz"""
    x, W1, b1, W2, _ = args
    z1 = x @ W1.T + b1
    a = jax.nn.sigmoid(z1)
    slope = a * (1 - a)
    if mistake == "z (1 - z) for a (1 - a)":
        slope = z1 * (1 - z1)
    if mistake == "sigma' left out":
        slope = 1
    dz1 = dz2 @ W2 * slope
    dW1, db1, dW2, db2 = dz1.T @ x, dz1.sum(0), dz2.T @ a, dz2.sum(0)
    if mistake == "db a mean, not a sum":
        db1 = dz1.mean(0)
    if mistake == "db zero":
        db1 = jnp.zeros_like(b1)
    if mistake == "dW2 from z1, not a1":
        dW2 = dz2.T @ z1
    return dz1 @ W1, dW1, db1, dW2, db2


MLP = mlp, mlp_backward, draw((7, 11), (13, 11), (13,), (5, 13), (5,))


def classifier(x: jax.Array, W1: jax.Array, b1: jax.Array, W2: jax.Array, b2: jax.Array, y: jax.Array):
    """J = mean cross-entropy of mlp(x)."""
    z = mlp(x, W1, b1, W2, b2)
    return jnp.mean(jax.nn.logsumexp(z, -1) - z[jnp.arange(len(z)), y])


def classifier_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dz2 = (softmax(z2) - onehot(y)) / m, and on through the net"""
    x, W1, b1, W2, b2, y = args
    a = jax.nn.sigmoid(x @ W1.T + b1)
    z = a @ W2.T + b2
    dz2 = dJ * (jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)) / len(x)
    s = jax.nn.sigmoid(a) if mistake == "sigma'(a) for sigma'(z)" else a
    dz1 = dz2 @ W2 * s * (1 - s)
    dW1, dW2 = dz1.T @ x, dz2.T @ a
    if mistake == "a stray L2 term, 1e-4 W":
        dW1 = dW1 + 1e-4 * W1
    return dz1 @ W1, dW1, dz1.sum(0), dW2, dz2.sum(0), None


def draw_classifier(rng: np.random.Generator):
    """A net, and a class a row."""
    return *draw((17, 11), (13, 11), (13,), (5, 13), (5,))(rng), labels(rng, 5, 17)


CLASSIFIER = classifier, classifier_backward, draw_classifier


# --- activations ---


def leaky(x: jax.Array, W: jax.Array):
    """a = leaky_relu(x W^T), slope 0.01 below 0."""
    return jax.nn.leaky_relu(x @ W.T, 0.01)


def leaky_backward(args: tuple, da: jax.Array, mistake: str = ""):
    """dz = da (z >= 0), 0.01 da below"""
    x, W = args
    dz = da * jnp.where(x @ W.T >= 0, 1, 0 if mistake == "the leaky slope is left out" else 0.01).astype(da.dtype)
    return dz @ W, dz.T @ x


LEAKY = leaky, leaky_backward, draw((7, 11), (5, 11))


def prelu(x: jax.Array, W: jax.Array, alpha: jax.Array, t: jax.Array):
    """J = mean (a - t)^2 with a = z where z > 0, alpha z below, z = x W^T; alpha is learned."""
    z = x @ W.T
    return jnp.mean((jnp.where(z > 0, z, alpha * z) - t) ** 2)


def prelu_backward(args: tuple, dJ: jax.Array, mistake: str = ""):
    """dalpha = sum of da z below 0"""
    x, W, alpha, t = args
    z = x @ W.T
    da = dJ * 2 * (jnp.where(z > 0, z, alpha * z) - t) / t.size
    dz = jnp.where(z > 0, da, alpha * da)
    dalpha = jnp.sum(jnp.where(z > 0, 0, da * z))
    if mistake == "gradient of a learned slope left out":
        dalpha = jnp.zeros_like(alpha)
    return dz @ W, dz.T @ x, dalpha, -da


def draw_prelu(rng: np.random.Generator):
    """The learned slope is one number."""
    x, W, t = draw((23, 61), (29, 61), (23, 29))(rng)
    return x, W, np.float32(0.25), t


PRELU = prelu, prelu_backward, draw_prelu


def swiglu(x: jax.Array, G: jax.Array, U: jax.Array):
    """y = silu(x G^T) (x U^T)."""
    return jax.nn.silu(x @ G.T) * (x @ U.T)


def swiglu_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dg = dy u s (1 + g (1 - s)) with s = sigma(g)      du = dy silu(g)"""
    x, G, U = args
    g, u = x @ G.T, x @ U.T
    s = jax.nn.sigmoid(g)
    slope = s if mistake == "silu' without g sigma'(g)" else s * (1 + g * (1 - s))
    dg, du = dy * u * slope, dy * g * s
    return dg @ G + du @ U, dg.T @ x, du.T @ x


SWIGLU = swiglu, swiglu_backward, draw((7, 11), (5, 11), (5, 11))


def gelu(x: jax.Array, W: jax.Array):
    """a = z Phi(z), z = x W^T."""
    return jax.nn.gelu(x @ W.T, approximate=False)


def gelu_backward(args: tuple, da: jax.Array, mistake: str = ""):
    """dz = da (Phi(z) + z phi(z))"""
    x, W = args
    z = x @ W.T
    slope = norm.cdf(z) + z * norm.pdf(z)
    if mistake == "derivative of the tanh GELU for the erf GELU":
        c = math.sqrt(2 / math.pi)
        t = jnp.tanh(c * (z + 0.044715 * z**3))
        slope = (1 + t) / 2 + z / 2 * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)
    dz = da * slope
    return dz @ W, dz.T @ x


GELU = gelu, gelu_backward, draw((7, 11), (5, 11))


def relu(x: jax.Array):
    """a = max(x, 0)."""
    return jax.nn.relu(x)


def relu_backward(args: tuple, da: jax.Array, mistake: str = ""):
    """dx = da where x > 0"""
    (x,) = args
    at_zero = {"relu'(0) = 1": 1, "relu'(0) = 2": 2}.get(mistake, 0)
    return (da * jnp.where(x == 0, at_zero, x > 0).astype(x.dtype),)


RELU = relu, relu_backward, lambda rng: (np.round(gaussian(rng, 7, 11), 0),)


# --- around the layer ---


def residual(x: jax.Array, W1: jax.Array, b1: jax.Array, W2: jax.Array):
    """y = x + relu(x W1^T + b1) W2^T."""
    return x + jax.nn.relu(x @ W1.T + b1) @ W2.T


def residual_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dx = dy + dz W1"""
    x, W1, b1, W2 = args
    z = x @ W1.T + b1
    dz = dy @ W2 * (z > 0)
    dx = dy + dz @ W1
    if mistake == "the residual path is left out":
        dx = dz @ W1
    return dx, dz.T @ x, dz.sum(0), dy.T @ jax.nn.relu(z)


RESIDUAL = residual, residual_backward, draw((7, 11), (13, 11), (13,), (11, 13))


def layer_scale(x: jax.Array, W: jax.Array, g: jax.Array):
    """y = x + g (x W^T), the scale g near 0."""
    return x + g * (x @ W.T)


def layer_scale_backward(args: tuple, dy: jax.Array, mistake: str = ""):
    """dW = (g dy)^T x, small as g is"""
    x, W, g = args
    dz = g * dy
    dW = jnp.zeros_like(W) if mistake == "dW of 299,209 left out, behind a small scale" else dz.T @ x
    return dy + dz @ W, dW, jnp.sum(dy * (x @ W.T), 0)


def draw_layer_scale(rng: np.random.Generator):
    """The scale is of the order of 1e-6."""
    x, W, g = draw((3, 547), (547, 547), (547,))(rng)
    return x, W, np.float32(1e-6) * g


LAYER_SCALE = layer_scale, layer_scale_backward, draw_layer_scale
