"""Where backwards go wrong: other contexts, if the layer reacts to them."""

from dataclasses import replace

import jax
import numpy as np

from fnbp.comparison.code import reacts
from fnbp.comparison.numerics import is_inexact
from fnbp.comparison.probe import At, Place, Rng, flowing, of_numbers
from fnbp.comparison.subject import Subject
from fnbp.layer import Context


def masked(subject: Subject, rng: Rng) -> Place:
    """Mask the whole first example."""
    ctx = subject.fixed[1] if subject.layer is not None else None
    if ctx is None or ctx.mask is None:
        return None
    mask = jax.tree.map(lambda m: np.where(np.arange(len(m)).reshape(-1, *[1] * (m.ndim - 1)) == 0, False, m), ctx.mask)
    return At(subject.args, (subject.fixed[0], replace(ctx, mask=mask)))


def other_mode(subject: Subject, rng: Rng) -> Place:
    """Train if the given context does not, and the other way round, for a layer that reacts to it."""
    if subject.layer is None:
        return None
    ctx = subject.fixed[1]
    key = jax.random.key(int(rng.integers(1 << 31))) if ctx.key is None else ctx.key
    return when_it_reacts(subject, replace(ctx, key=key, train=not ctx.train), replace(ctx, key=key))


def positions_masked(subject: Subject, rng: Rng) -> list[At]:
    """Mask some positions, and the whole of one example, for a layer that reacts to it, if no mask was given."""
    if subject.layer is None or subject.fixed[1].mask is not None:
        return []
    xs = flowing(subject)
    if len(xs) != 1 or not of_numbers(xs[0]) or xs[0].ndim < (3 if is_inexact(xs[0]) else 2):
        return []
    ctx = subject.fixed[1]
    some = rng.random(xs[0].shape[:2]) < 0.6
    none = some & (np.arange(len(some)) > 0)[:, None]
    some[:, 0] = True
    place = when_it_reacts(subject, replace(ctx, mask=some), ctx)
    if place is None:
        return []
    whole = At(subject.args, (subject.fixed[0], replace(ctx, mask=none)), part="a whole example")
    return [place, whole] if len(some) > 1 else [place]


def when_it_reacts(subject: Subject, other: Context, ctx: Context) -> Place:
    """The given point in the other context, if the layer computes or saves something else there than in ctx."""
    (params, x), (state, _), layer = subject.args, subject.fixed, subject.layer
    assert layer is not None
    reacting = reacts(layer.forward, (params, state, x, ctx), (params, state, x, other))
    return At(subject.args, (state, other)) if reacting else None


CONTEXTS = (masked, other_mode, positions_masked)
