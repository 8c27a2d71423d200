"""What comes from another library: its arrays by name, and the numbers in them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import LONGEST, check_finite, cut, describe, shown

MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of GPT-2
WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)+")  # by DataParallel, DistributedDataParallel and torch.compile


def arrays_of(maker: str, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state_dict. TypeError unless it is a dict of arrays, and its names are texts."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{maker}: weights must be a dict of arrays by name, got {describe(weights)}")
    for name in weights:
        if not isinstance(name, str):
            raise TypeError(f"{maker}: names of weights must be texts, such as '0.weight', got {shown(name)}")
    return {name: array_of(maker, name, a) for name, a in weights.items()}


def array_of(maker: str, name: str, a: Any) -> np.ndarray:
    """One of these arrays. TypeError if NumPy does not take it."""
    try:
        if hasattr(a, "detach"):  # a tensor of PyTorch
            a = a.detach().cpu()
            a = a.float() if str(a.dtype) == "torch.bfloat16" else a
        array = np.asarray(a)
    except (TypeError, ValueError, RuntimeError) as error:
        why = cut(str(error), 2 * LONGEST)
        raise TypeError(
            f"{maker}: {name} must be an array that NumPy takes, got a {type(a).__name__}: {why}"
        ) from error
    if array.dtype == object:
        raise TypeError(f"{maker}: {name} must be an array, got {describe(a)}")
    return array


def of_linen(variables: Mapping[Any, Any]) -> dict[str, Any]:
    """The arrays of "params" and "batch_stats" by name. ValueError if there is another collection."""
    known = {"params", "batch_stats"}
    if others := [name for name in variables if name not in known]:
        hint = "" if known & set(variables) else ': give {"params": ...}, or say layout="nnx"'
        raise ValueError(
            f"from_flax: variables hold {', '.join(map(shown, others))}; expected 'params', and 'batch_stats' if there "
            f"are any{hint}"
        )
    found: dict[str, Any] = {}
    for kind, tree in variables.items():
        if not isinstance(tree, Mapping):
            raise TypeError(f"from_flax: variables[{kind!r}] must be a dict, got {describe(tree)}")
        for name, a in flat(tree):
            if name in found:
                raise ValueError(f"from_flax: params and batch_stats both hold {name}")
            found[name] = a
    return found


def of_gpt2(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by the names of GPT2LMHeadModel: without what wraps it, and without masks.

    A GPT2Model leaves out what stands in front.
    """
    wrapped = WRAPPED.match(next(iter(given), ""))
    before = wrapped[0] if wrapped and all(name.startswith(wrapped[0]) for name in given) else ""
    bare = {name.removeprefix(before): a for name, a in given.items() if not name.endswith(MASKS)}
    inside = ("transformer.", "lm_head.")
    return {name if name.startswith(inside) else f"transformer.{name}": a for name, a in bare.items()}


def flat(tree: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, array) of nested dicts: "layers.0.kernel"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def check_held_by(maker: str, name: str, a: np.ndarray, dtype: Any) -> None:
    """ValueError if an array holds NaN or infinity, or a number that is one of them in this dtype."""
    if not np.isfinite(a).all():
        check_finite(maker, name, a)
    if a.dtype == dtype or not jnp.issubdtype(dtype, jnp.floating):
        return
    with np.errstate(over="ignore"):
        beyond = np.argwhere(~np.isfinite(a.astype(dtype)))
    for first in beyond[:1].tolist():
        raise ValueError(
            f"{maker}: {name} holds {a[tuple(first)]} at index {tuple(first)}, which {dtype} does not hold"
        )
