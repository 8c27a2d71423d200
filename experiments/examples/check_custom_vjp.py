"""Check the backward of a jax.custom_vjp: fnbp.compare names the wrong cotangent and the likely mistake."""

import jax
import jax.numpy as jnp

import fnbp


def plain(x, gain):
    """RMS norm, for jax to differentiate."""
    return gain * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def forward(x, gain):
    """The same, with what the backward needs."""
    r = 1 / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return gain * x * r, (x, gain, r)


def backward(saved, dy):
    """dx = r (dn - x r^2 mean(dn x))    dn = dy gain    dgain = sum dy x r"""
    x, gain, r = saved
    dn = dy * gain
    dx = r * (dn - x * r**2 * jnp.mean(dn * x, -1, keepdims=True))
    return dx, jnp.sum(dy * x * r, 0)


def forgetful(saved, dy):
    """The same without the term in the mean: r is taken for a constant."""
    x, gain, r = saved
    return r * dy * gain, jnp.sum(dy * x * r, 0)


x = jax.random.normal(jax.random.key(0), (7, 5))
gain = jax.random.normal(jax.random.key(1), (5,))
for rule in (backward, forgetful):
    rms_norm = jax.custom_vjp(plain)
    rms_norm.defvjp(forward, rule)
    report = fnbp.compare(rms_norm, x, gain, reference=plain)
    print(f"{rule.__name__}: {'right' if report.ok else 'wrong'}")
    for fault in report.faults:
        print(f"d{fault.leaf} is wrong: {fault.hint}")
