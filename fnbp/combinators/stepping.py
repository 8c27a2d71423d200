"""A net that takes a sequence one position at a time: the same params, and in its state what each layer keeps."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_returned
from fnbp.arrays.masks import RULES
from fnbp.layer import Context, Layer, map_layers

TRIED = 31  # positions on which a layer is held to its word
NOISE = 1009  # numbers, a prime, so that rows of a table differ


class Kept(NamedTuple):
    """The state of a leaf that goes step by step: its own, and what it keeps of earlier positions."""

    state: Any
    kept: Any


def beginning(net: Layer, length: int) -> Layer:
    """The net on the first positions of a sequence: its new state holds what later ones need.

    Raises: TypeError if a layer mixes positions and does not state its steps.
    """

    def at(path: str, layer: Layer) -> Layer:
        check_steps(path, layer)
        steps = layer.traits.steps

        def forward(params, state, x, ctx):
            if steps is None:
                check_apart(path, layer, params, state, x, min(length, TRIED))
                y, state, _ = layer.forward(params, state, x, ctx)
                return y, Kept(state, None), ()
            y, kept = check_returned(f"{path}: Steps", "first", steps.first(params, state, x, length), "y, kept")
            return y, Kept(state, kept), ()

        return layer._replace(forward=forward)

    return map_layers(at, net)


def going_on(net: Layer) -> Layer:
    """The net on the next position of a sequence, with the state that the earlier ones left. As beginning raises."""

    def at(path: str, layer: Layer) -> Layer:
        check_steps(path, layer)
        steps = layer.traits.steps

        def forward(params, state, x, ctx):
            own, kept = state
            if steps is None:
                y, own, _ = layer.forward(params, own, x, ctx)
                return y, Kept(own, None), ()
            y, kept = check_returned(f"{path}: Steps", "then", steps.then(params, own, kept, x), "y, kept")
            return y, Kept(own, kept), ()

        return layer._replace(forward=forward)

    return map_layers(at, net)


def check_steps(path: str, layer: Layer) -> None:
    """TypeError unless a leaf states how it goes along a sequence, by its steps or by its rule for a mask."""
    traits, made = layer.traits, layer.made
    if traits.mixes == "always":
        raise TypeError(f"{path} mixes the examples, so it cannot go on for each of them")
    if traits.steps is None:
        if traits.mask not in RULES.values():
            raise TypeError(
                f"{path} mixes positions, or does not say that it keeps them apart, so it cannot take a sequence one "
                'position at a time; a layer of your own says so: stateless(..., mask="position"), or '
                "Traits(steps=fnbp.Steps(first, then))"
            )
    elif made is not None and layer.forward is not made.fields[1] and traits is made.fields[-1]:
        raise TypeError(
            f"{path}: its forward was replaced, and its steps are those of the old one; give it its own: "
            "Traits(steps=fnbp.Steps(first, then))"
        )


def check_apart(path: str, layer: Layer, params: Any, state: Any, x: Any, positions: int) -> None:
    """TypeError unless a layer without steps treats each position by itself, wherever it stands; found out by noise."""
    sequence = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, positions, *a.shape[2:]), a.dtype), x)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), (params, state))
    leaves, tree = jax.tree.flatten((*given, sequence))
    if not is_apart(layer, tuple(leaves), tree):
        raise TypeError(
            f"{path}: what it makes of a position depends on where that stands, or on other positions, though its rule "
            "for a mask says that it treats each by itself; it needs steps: Traits(steps=fnbp.Steps(first, then))"
        )


@functools.lru_cache(maxsize=256)
def is_apart(layer: Layer, leaves: tuple[Any, ...], tree: Any) -> bool:
    """True if a layer makes of a sequence what it makes of each of its positions alone. leaves: of params, state, x."""
    params, state, x = jax.tree.unflatten(tree, [noise(i, form) for i, form in enumerate(leaves)])
    alone = jax.tree.map(lambda a: a.reshape(-1, 1, *a.shape[2:]), x)
    with jax.ensure_compile_time_eval():
        run = jax.jit(lambda params, state, x: layer.forward(params, state, x, Context())[0])
        together, apart = (jax.tree.map(np.asarray, run(params, state, one)) for one in (x, alone))
    return all(map(alike, jax.tree.leaves(together), jax.tree.leaves(apart)))


def noise(i: int, form: Any) -> np.ndarray:
    """Numbers of that shape and dtype: positive, as a variance is; 0 and 1 for integers."""
    numbers = np.random.default_rng(i).uniform(0.1, 1.9, NOISE)
    return np.resize(numbers if jnp.issubdtype(form.dtype, jnp.inexact) else numbers > 1, form.shape).astype(form.dtype)


def alike(together: np.ndarray, apart: np.ndarray) -> bool:
    """True if (1, n, ...) and (n, 1, ...) hold the same, within rounding."""
    if together.shape[:2] != apart.shape[1::-1] or together.shape[2:] != apart.shape[2:]:
        return False
    if not jnp.issubdtype(together.dtype, jnp.inexact):
        return np.array_equal(together[0], apart[:, 0])
    a, b = (one.astype(np.promote_types(one.dtype, np.float32)) for one in (together[0], apart[:, 0]))
    within = float(jnp.finfo(together.dtype).eps) ** 0.5 * np.max(abs(b), initial=0, where=np.isfinite(b))
    return bool(np.allclose(a, b, rtol=0, atol=within, equal_nan=True))
