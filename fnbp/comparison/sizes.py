"""Other sizes of the batch, of the positions, and of every axis: what a backward takes for granted shows."""

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import as_numpy_32, compiled_or_plain, is_floating
from fnbp.comparison.probe import At, Place, Rng, flowing, moved_a_tenth
from fnbp.comparison.subject import Subject

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
MORE_SIZES = (3, 5, 6, 32, 64, 100, 257)
ELEMENTS = 1 << 16  # of x: no larger sizes are tried


def resized(subject: Subject, n: int, length: int | None = None) -> Place:
    """A batch of n examples: those that there are, again and again; with that many positions, if they have some.

    One compilation for both: a layer that refuses that length is tried with its own.
    """
    if subject.sizes is not None:
        return At(as_numpy_32(tuple(subject.sizes(n))), subject.fixed)
    m = batch_of(subject)
    if subject.take is None or not m or n * sum(a.size for a in flowing(subject)) > ELEMENTS * m:
        return None
    rows = np.arange(n) % m
    place = At(*subject.take(subject.args, subject.fixed, lambda a: a[rows]))
    longer = stretched(subject, place, length) if length else None
    if longer is None:
        return None if n == m else place
    try:
        jax.eval_shape(subject.reference, longer.args, longer.fixed)
    except Exception:
        return None if n == m else place
    return longer


def stretched(subject: Subject, place: At, n: int) -> Place:
    """n positions, if x has an axis of positions: those that there are, again and again."""
    xs = jax.tree.leaves(place.args[1:] if subject.layer is not None else place.args)
    lengths = {x.shape[1] for x in xs if x.ndim > 2}
    if len(lengths) != 1 or any(x.ndim < 3 for x in xs) or lengths & {0, n}:
        return None
    length = lengths.pop()
    if n * sum(x.size for x in xs) > ELEMENTS * length:
        return None
    places = np.arange(n) % length
    assert subject.take is not None
    return At(*subject.take(place.args, place.fixed, lambda a: a[:, places] if a.ndim > 1 else a))


def one_example(subject: Subject, rng: Rng) -> Place:
    """A batch of 1."""
    return resized(subject, 1)


def two_examples(subject: Subject, rng: Rng) -> Place:
    """A batch of 2, of 130 positions."""
    return resized(subject, 2, 130)


def sixteen_examples(subject: Subject, rng: Rng) -> Place:
    """A batch of 16: even, and a power of two; of one position."""
    return resized(subject, 16, 1)


def many_examples(subject: Subject, rng: Rng) -> Place:
    """A batch of 129: more than 64, more than 128, odd, and one more than a power of two; of two positions."""
    return resized(subject, 129, 2)


def prime_sizes(subject: Subject, rng: Rng) -> Place:
    """Make every axis of x a prime of its own, with parameters to match: square ones hide a transpose."""
    if subject.sizes is not None:
        return resized(subject, 31)
    if not resizable(subject):
        return prime_batch(subject, rng)
    (x,) = flowing(subject)
    primes = PRIMES[3 : 3 + 2 * x.ndim : 2] if x.ndim < 5 else PRIMES[: x.ndim]  # of many axes, small ones
    return reshaped(subject, rng, primes) or prime_batch(subject, rng)


def even_sizes(subject: Subject, rng: Rng) -> Place:
    """Make every axis of x even, and the last one 144, with parameters to match."""
    if subject.sizes is not None:
        return resized(subject, 30)
    if not resizable(subject):
        return None
    (x,) = flowing(subject)
    return reshaped(subject, rng, (*(4 + 4 * i for i in range(x.ndim - 1)), 144)) if x.ndim < 5 else None


def more_sizes(subject: Subject, rng: Rng) -> list[At]:
    """For a function with sizes: small ones, powers of two, and beyond 64 and 128."""
    made = [resized(subject, n) for n in MORE_SIZES] if subject.sizes is not None else []
    return [place._replace(part=f"size {n}") for n, place in zip(MORE_SIZES, made, strict=False) if place is not None]


def reshaped(subject: Subject, rng: Rng, shape: tuple[int, ...]) -> Place:
    """The values of x in that shape, with parameters to match; None if the layer takes only one size."""
    assert subject.layer is not None
    (x,) = flowing(subject)
    if not x.size or len(shape) != x.ndim:
        return None
    x = np.asarray(rng.choice(np.asarray(x, np.float64).ravel(), shape), x.dtype)
    key = jax.random.key(int(rng.integers(1 << 31)))
    try:
        params, state = as_numpy_32(compiled_or_plain(subject.layer.init, key, x))
        jax.eval_shape(subject.layer.forward, params, state, x, subject.fixed[1])
    except Exception:
        return None
    return At((moved_a_tenth(params, rng), x), (state, subject.fixed[1]))


def prime_batch(subject: Subject, rng: Rng) -> Place:
    """Draw a batch whose size is no other size of the subject."""
    m = batch_of(subject)
    if subject.take is None or not m:
        return None
    others = {n for leaf in jax.tree.leaves(subject.args) for n in jnp.shape(leaf)}
    size = next((p for p in PRIMES if p > 4 and p not in others), None)
    if size is None:
        return None
    rows = rng.integers(0, m, size)
    return At(*subject.take(subject.args, subject.fixed, lambda a: a[rows]))


def resizable(subject: Subject) -> bool:
    """True for a layer that has no state, and takes one floating x without a mask."""
    if subject.layer is None or subject.layer.parts or subject.fixed[1].mask is not None:
        return False
    xs = flowing(subject)
    return not jax.tree.leaves(subject.fixed[0]) and len(xs) == 1 and is_floating(xs[0]) and xs[0].ndim > 0


def batch_of(subject: Subject) -> int | None:
    """The number of examples; None if the leaves of x do not agree."""
    sizes = {leaf.shape[0] if jnp.ndim(leaf) else None for leaf in flowing(subject)}
    return sizes.pop() if len(sizes) == 1 else None


RESIZED = (one_example, two_examples, sixteen_examples, many_examples, prime_sizes, even_sizes, more_sizes)
SIZES = tuple(f.__name__ for f in RESIZED)
