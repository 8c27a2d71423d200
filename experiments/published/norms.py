"""Normalisers: batch norm, layer norm and RMS norm, each by the backwards that papers, courses and kernels use."""

import jax
import jax.numpy as jnp

from experiments.published.entry import Entry, normal, with_backward

EPS = 1e-5
IOFFE = "Ioffe & Szegedy 2015, arXiv:1502.03167, section 3"
COURSE = "as in CS231n, course notes and assignments"
MAKEMORE = "Karpathy, makemore part 4"
BA = "Ba et al. 2016, arXiv:1607.06450"
KERNEL = "llm.c and other fused kernels"
APEX = "memory-saving kernels, as NVIDIA Apex"
FLAX = "use_fast_variance, as in Flax"
ZHANG = "Zhang & Sennrich 2019, arXiv:1910.07467"

X, GAIN, SHIFT = normal(1, (11, 7), scale=2, shift=0.5) + normal(2, (7,), (7,))
OFFSET = X + 100


def mean(a: jax.Array):
    """The mean of each row."""
    return jnp.mean(a, -1, keepdims=True)


# --- batch norm ---


def batch_norm(x: jax.Array, gain: jax.Array, shift: jax.Array):
    """y = gain (x - mu) / sqrt(var + eps) + shift, mu and var of each column."""
    mu = jnp.mean(x, 0)
    var = jnp.mean((x - mu) ** 2, 0)
    return gain * (x - mu) / jnp.sqrt(var + EPS) + shift


def batch_norm_staged(args: tuple, dy: jax.Array):
    """The chain rule of the paper: dx^, dvar, dmu, then dx of all three."""
    x, gain, _ = args
    m = len(x)
    mu = jnp.mean(x, 0)
    var = jnp.mean((x - mu) ** 2, 0)
    std = jnp.sqrt(var + EPS)
    dx_hat = dy * gain
    dvar = jnp.sum(dx_hat * (x - mu), 0) * -0.5 * (var + EPS) ** -1.5
    dmu = -jnp.sum(dx_hat, 0) / std + dvar * jnp.sum(-2 * (x - mu), 0) / m
    dx = dx_hat / std + dvar * 2 * (x - mu) / m + dmu / m
    return dx, jnp.sum(dy * (x - mu) / std, 0), jnp.sum(dy, 0)


def batch_norm_formula(args: tuple, dy: jax.Array):
    """dx = gain / (m std) (m dy - sum dy - x^ sum dy x^)."""
    x, gain, _ = args
    m = len(x)
    mu = jnp.mean(x, 0)
    std = jnp.sqrt(jnp.mean((x - mu) ** 2, 0) + EPS)
    x_hat = (x - mu) / std
    dgain, dshift = jnp.sum(dy * x_hat, 0), jnp.sum(dy, 0)
    return gain / (m * std) * (m * dy - dshift - x_hat * dgain), dgain, dshift


def batch_norm_bessel(x: jax.Array, gain: jax.Array, shift: jax.Array):
    """Batch norm with the variance over m - 1."""
    mu = jnp.mean(x, 0)
    var = jnp.sum((x - mu) ** 2, 0) / (len(x) - 1)
    return gain * (x - mu) * (var + EPS) ** -0.5 + shift


def bessel_backward(correction: float):
    """dx = gain / (m std) (m dy - sum dy - c x^ sum dy x^), c = m / (m - 1) or 1."""

    def backward(args, dy):
        x, gain, _ = args
        m = len(x)
        mu = jnp.mean(x, 0)
        inverse = (jnp.sum((x - mu) ** 2, 0) / (m - 1) + EPS) ** -0.5
        x_hat = (x - mu) * inverse
        dgain, dshift = jnp.sum(dy * x_hat, 0), jnp.sum(dy, 0)
        c = m / (m - 1) if correction else 1.0
        return gain * inverse / m * (m * dy - dshift - c * x_hat * dgain), dgain, dshift

    return backward


# --- layer norm ---


def layer_norm(x: jax.Array, gain: jax.Array, shift: jax.Array):
    """y = gain x^ + shift, x^ = (x - mu) / sqrt(var + eps), mu and var of each row."""
    mu = mean(x)
    return gain * (x - mu) / jnp.sqrt(mean((x - mu) ** 2) + EPS) + shift


def three_terms(x_hat: jax.Array, rstd: jax.Array, gain: jax.Array, dy: jax.Array):
    """dx = rstd (dx^ - mean dx^ - x^ mean(dx^ x^)), and the gradients of gain and shift."""
    dx_hat = dy * gain
    dx = rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))
    return dx, jnp.sum(dy * x_hat, 0), jnp.sum(dy, 0)


def layer_norm_three_terms(args: tuple, dy: jax.Array):
    """x^ anew from x, in the arithmetic of x."""
    x, gain, _ = args
    rstd = jax.lax.rsqrt(mean((x - mean(x)) ** 2) + EPS)
    return three_terms((x - mean(x)) * rstd, rstd, gain, dy)


def layer_norm_fast_variance(args: tuple, dy: jax.Array):
    """The variance as E[x^2] - E[x]^2, in one sweep over x."""
    x, gain, _ = args
    mu = mean(x)
    rstd = jax.lax.rsqrt(mean(x**2) - mu**2 + EPS)
    return three_terms((x - mu) * rstd, rstd, gain, dy)


def layer_norm_saves_statistics(x: jax.Array, gain: jax.Array, shift: jax.Array):
    """y, with x, mu and rstd saved."""
    mu = mean(x)
    rstd = jax.lax.rsqrt(mean((x - mu) ** 2) + EPS)
    return layer_norm(x, gain, shift), (x, mu, rstd, gain)


def layer_norm_from_statistics(res: tuple, dy: jax.Array):
    """x^ = (x - mu) rstd anew, from what was saved."""
    x, mu, rstd, gain = res
    return three_terms((x - mu) * rstd, rstd, gain, dy)


def layer_norm_wide(args: tuple, dy: jax.Array, back: bool = False):
    """The kernel's arithmetic: float32 at least, whatever comes in; back: cast to the dtypes of args at the end."""
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (*args, dy)]
    cotangents = layer_norm_three_terms(tuple(wide[:-1]), wide[-1])
    return tuple(d.astype(a.dtype) for d, a in zip(cotangents, args, strict=True)) if back else cotangents


def layer_norm_saves_output(x: jax.Array, gain: jax.Array, shift: jax.Array):
    """y, with y and rstd saved in place of x."""
    y = layer_norm(x, gain, shift)
    return y, (y, jax.lax.rsqrt(mean((x - mean(x)) ** 2) + EPS), gain, shift)


def layer_norm_from_output(res: tuple, dy: jax.Array):
    """x^ = (y - shift) / gain."""
    y, rstd, gain, shift = res
    return three_terms((y - shift) / gain, rstd, gain, dy)


def layer_norm_from_output_guarded(res: tuple, dy: jax.Array):
    """x^ = (y - shift) / gain, with a gain of at least eps."""
    y, rstd, gain, shift = res
    divisor = jnp.where(gain >= 0, jnp.maximum(gain, EPS), jnp.minimum(gain, -EPS))
    return three_terms((y - shift) / divisor, rstd, gain, dy)


# --- RMS norm ---


def rms_norm(x: jax.Array, gain: jax.Array):
    """y = gain x / sqrt(mean x^2 + eps)."""
    return gain * x / jnp.sqrt(mean(x**2) + EPS)


def rms_norm_printed(x: jax.Array, gain: jax.Array):
    """The paper's, which has no eps."""
    return gain * x / jnp.sqrt(mean(x**2))


def rms_norm_backward(eps: float):
    """dx = (dx^ - x^ mean(dx^ x^)) / rms."""

    def backward(args, dy):
        x, gain = args
        rms = jnp.sqrt(mean(x**2) + eps)
        x_hat, dx_hat = x / rms, dy * gain
        return (dx_hat - x_hat * mean(dx_hat * x_hat)) / rms, jnp.sum(dy * x_hat, 0)

    return backward


def rms_norm_cubed(args: tuple, dy: jax.Array):
    """dx = r gain dy - r^3 x mean(gain dy x), r = 1 / rms."""
    x, gain = args
    r = jax.lax.rsqrt(mean(x**2) + EPS)
    return r * gain * dy - r**3 * x * mean(gain * dy * x), jnp.sum(dy * x * r, 0)


NORMS = (X, GAIN, SHIFT)
ENTRIES = (
    Entry("batch norm, staged", IOFFE, batch_norm, NORMS, batch_norm_staged),
    Entry("batch norm, one formula", COURSE, batch_norm, NORMS, batch_norm_formula),
    Entry("batch norm over m - 1, one formula", MAKEMORE, batch_norm_bessel, NORMS, bessel_backward(True)),
    Entry(
        "batch norm over m - 1, the formula for m",
        COURSE + ", on the makemore forward",
        batch_norm_bessel,
        NORMS,
        bessel_backward(False),
        expected="formula",
        bfloat16="formula",
        right=False,
        remark="each is right beside its own forward",
        mended="batch norm over m - 1, one formula",
    ),
    Entry("layer norm, three terms", BA, layer_norm, NORMS, layer_norm_three_terms),
    Entry(
        "layer norm, E[x^2] - E[x]^2",
        FLAX,
        layer_norm,
        (OFFSET, GAIN, SHIFT),
        layer_norm_fast_variance,
        expected="precision",
        bfloat16=None,
        remark="x near 100, where it cancels; bfloat16 has no such x",
        mended="layer norm, x - mu squared",
    ),
    Entry(
        "layer norm, x - mu squared",
        BA,
        layer_norm,
        (OFFSET, GAIN, SHIFT),
        layer_norm_three_terms,
        bfloat16=None,
    ),
    Entry(
        "layer norm, x^ from x, mu, rstd",
        KERNEL,
        with_backward(layer_norm, layer_norm_saves_statistics, layer_norm_from_statistics),
        NORMS,
        reference=layer_norm,
    ),
    Entry(
        "layer norm, in float32 throughout",
        KERNEL + ", carried over as they are",
        layer_norm,
        NORMS,
        layer_norm_wide,
        bfloat16="structure",
        remark="a kernel's store casts; JAX does not",
        mended="layer norm, in float32, cast back",
    ),
    Entry(
        "layer norm, in float32, cast back",
        "ours",
        layer_norm,
        NORMS,
        lambda args, dy: layer_norm_wide(args, dy, back=True),
    ),
    Entry(
        "layer norm, x^ from y",
        APEX + ", unguarded",
        with_backward(layer_norm, layer_norm_saves_output, layer_norm_from_output),
        NORMS,
        reference=layer_norm,
        expected="nonfinite",
        bfloat16="nonfinite",
        remark="y forgets x where the gain is 0",
        mended="layer norm, x^ from x, mu, rstd",
    ),
    Entry(
        "layer norm, x^ from y, gain kept off 0",
        APEX,
        with_backward(layer_norm, layer_norm_saves_output, layer_norm_from_output_guarded),
        NORMS,
        reference=layer_norm,
        expected="formula",
        bfloat16="formula",
        remark="finite, yet x is forgotten all the same",
        mended="layer norm, x^ from x, mu, rstd",
    ),
    Entry("RMS norm, as printed", ZHANG, rms_norm_printed, (X, GAIN), rms_norm_backward(0.0)),
    Entry("RMS norm with eps", ZHANG, rms_norm, (X, GAIN), rms_norm_backward(EPS)),
    Entry("RMS norm, 1 / rms cubed", "fused kernels", rms_norm, (X, GAIN), rms_norm_cubed),
)
