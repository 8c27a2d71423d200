"""Losses and the functions in them: cross-entropy by courses and exercises, and log(1 + e^x)."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.published.entry import Entry, integers, normal, with_backward

COURSE = "as in CS231n, course notes and assignments"
MAKEMORE = "Karpathy, makemore part 4"
COURSERA = "Ng, Neural Networks and Deep Learning, week 4"
DOCS = "JAX docs, custom derivative rules"

LOGITS, Y = normal(3, (11, 5), scale=2)[0], integers(4, 5, 11)
SCORES, BITS = normal(5, (11,), scale=2)[0], integers(6, 2, 11).astype(np.float32)
NEGATIVE = normal(7, (11,), scale=2, shift=-10)[0]


def one_hot(x: jax.Array, y: jax.Array):
    """1 at the label."""
    return jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype)


def losses(x: jax.Array, y: jax.Array):
    """l = log sum e^x - x_y, of each example."""
    return jax.nn.logsumexp(x, axis=-1) - jnp.take_along_axis(x, y[:, None], -1)[:, 0]


def mean_loss(x: jax.Array, y: jax.Array):
    """J = mean l."""
    return jnp.mean(losses(x, y))


def course_gradient(x: jax.Array, y: jax.Array):
    """probs with 1 taken off at the label, over m."""
    e = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    probs = e / jnp.sum(e, -1, keepdims=True)
    return probs.at[jnp.arange(len(x)), y].add(-1) / len(x)


def without_upstream(args: tuple, dJ: jax.Array):
    """As the course has it: J is the end of the graph, so dJ = 1."""
    return course_gradient(*args), None


def with_upstream(args: tuple, dJ: jax.Array):
    """The same, times dJ."""
    return dJ * course_gradient(*args), None


def baked_in(args: tuple, dl: jax.Array):
    """The losses of the examples are asked for, yet 1/m is in their gradient."""
    return dl[:, None] * course_gradient(*args), None


def per_example(args: tuple, dl: jax.Array):
    """dx = dl (p - one_hot)."""
    x, y = args
    return dl[:, None] * (jax.nn.softmax(x) - one_hot(x, y)), None


def exercise(args: tuple, dJ: jax.Array):
    """Every intermediate of the exercise, one by one, from log probs down to logits."""
    x, y = args
    m = len(x)
    label = one_hot(x, y)
    top = jnp.max(x, -1, keepdims=True)
    counts = jnp.exp(x - top)
    total = jnp.sum(counts, -1, keepdims=True)
    inverse = 1 / total
    probs = counts * inverse
    dlog_probs = -label / m * dJ
    dprobs = dlog_probs / probs
    dinverse = jnp.sum(counts * dprobs, -1, keepdims=True)
    dtotal = -(inverse**2) * dinverse
    dcounts = inverse * dprobs + dtotal
    dnormed = counts * dcounts
    dtop = -jnp.sum(dnormed, -1, keepdims=True)
    return dnormed + one_hot(x, jnp.argmax(x, -1)) * dtop, None


# --- binary cross-entropy ---


def binary(z: jax.Array, y: jax.Array):
    """l = log(1 + e^z) - y z, the cross-entropy of sigma(z) and y."""
    return jnp.logaddexp(z, 0) - y * z


def by_probability(args: tuple, dl: jax.Array):
    """da = -(y / a - (1 - y) / (1 - a)), then dz = da a (1 - a); the loss is taken to be linear in y."""
    z, y = args
    a = jax.nn.sigmoid(z)
    da = -(y / a - (1 - y) / (1 - a)) * dl
    return da * a * (1 - a), -z * dl


def by_logit(args: tuple, dl: jax.Array):
    """dz = a - y."""
    z, y = args
    return (jax.nn.sigmoid(z) - y) * dl, -z * dl


# --- log(1 + e^x) ---


def log1pexp(x: jax.Array):
    """y = log(1 + e^x)."""
    return jnp.logaddexp(x, 0)


def log1pexp_chain(args: tuple, dy: jax.Array):
    """dx = dy e^x / (1 + e^x), the chain rule written out."""
    (x,) = args
    return (dy * jnp.exp(x) / (1 + jnp.exp(x)),)


log1pexp_docs = jax.custom_jvp(log1pexp)
log1pexp_docs.defjvps(lambda dx, y, x: (1 - 1 / (1 + jnp.exp(x))) * dx)


def log1pexp_sigmoid(args: tuple, dy: jax.Array):
    """dx = dy sigma(x)."""
    (x,) = args
    return (dy * jax.nn.sigmoid(x),)


def sin_times(x: jax.Array, y: jax.Array):
    """z = sin(x) y."""
    return jnp.sin(x) * y


def sin_times_backward(res: tuple, dz: jax.Array):
    """dx = dz y cos x, dy = dz sin x."""
    cos_x, sin_x, y = res
    return cos_x * dz * y, sin_x * dz


ENTRIES = (
    Entry(
        "softmax cross-entropy, dJ = 1",
        COURSE + "; makemore part 4",
        mean_loss,
        (LOGITS, Y),
        without_upstream,
        expected="formula",
        bfloat16="formula",
        right=False,
        remark="right at the end of a graph, and only there",
        mended="softmax cross-entropy, times dJ",
    ),
    Entry(
        "softmax cross-entropy, times dJ",
        "ours",
        mean_loss,
        (LOGITS, Y),
        with_upstream,
    ),
    Entry(
        "losses of examples, 1/m baked in",
        COURSE,
        losses,
        (LOGITS, Y),
        baked_in,
        expected="formula",
        bfloat16="formula",
        right=False,
        mended="losses of examples",
    ),
    Entry("losses of examples", "ours", losses, (LOGITS, Y), per_example),
    Entry(
        "cross-entropy, every intermediate",
        MAKEMORE + ", exercise 1",
        mean_loss,
        (LOGITS, Y),
        exercise,
        expected="nonfinite",
        bfloat16="nonfinite",
        remark="1 / p where p is rounded to 0",
        mended="softmax cross-entropy, times dJ",
    ),
    Entry(
        "binary cross-entropy, da then dz",
        COURSERA,
        binary,
        (SCORES, BITS),
        by_probability,
        expected="nonfinite",
        bfloat16="nonfinite",
        remark="1 / (1 - a) where a is rounded to 1",
        mended="binary cross-entropy, a - y",
    ),
    Entry(
        "binary cross-entropy, a - y",
        "ours",
        binary,
        (SCORES, BITS),
        by_logit,
    ),
    Entry(
        "log(1 + e^x), the chain rule",
        DOCS + ", the problem that they state",
        log1pexp,
        (SCORES,),
        log1pexp_chain,
        expected="nonfinite",
        bfloat16="nonfinite",
        remark="inf / inf above 88",
        mended="log(1 + e^x), sigma(x)",
    ),
    Entry(
        "log(1 + e^x), 1 - 1 / (1 + e^x)",
        DOCS + ", their remedy",
        log1pexp_docs,
        (NEGATIVE,),
        reference=log1pexp,
        expected="precision",
        bfloat16="precision",
        remark="x near -10, where it cancels",
        mended="log(1 + e^x), sigma(x)",
    ),
    Entry(
        "log(1 + e^x), sigma(x)",
        "ours",
        log1pexp,
        (NEGATIVE,),
        log1pexp_sigmoid,
    ),
    Entry(
        "sin(x) y, cos and sin saved",
        DOCS,
        with_backward(sin_times, lambda x, y: (sin_times(x, y), (jnp.cos(x), jnp.sin(x), y)), sin_times_backward),
        (SCORES, NEGATIVE),
        reference=sin_times,
    ),
)
