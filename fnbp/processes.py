"""Processes that share arrays: what each of them holds alone must be the same, and what one ends all end."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

RAISED = "raised"  # what a process says that has an exception, the last word in the alphabet


def is_shared(arrays: Any) -> bool:
    """True if other processes hold a part of these arrays."""
    return not all(a.is_fully_addressable for a in jax.tree.leaves(arrays) if isinstance(a, jax.Array))


def agreed(word: str, arrays: Any) -> str:
    """The last in the alphabet of what the processes say that share these arrays; of one process what it says.

    They must do the same, but what a clock or a signal tells differs between them.
    """
    if not is_shared(arrays):
        return word
    letters = np.zeros(16, np.uint8)
    letters[: len(word)] = list(word.encode())
    return max(bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(letters))


def in_all(f: Callable[[], Any], arrays: Any) -> Any:
    """What f returns. RuntimeError in each process that shares these arrays if f raises in another one of them."""
    if not is_shared(arrays):
        return f()
    try:
        found = f()
    except BaseException:
        agreed(RAISED, arrays)
        raise
    if agreed("", arrays) == RAISED:
        raise RuntimeError("fit: an exception was raised in another process; see what that one wrote")
    return found


def least(number: int) -> int:
    """The least of what all processes say."""
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def check_alike(name: str, held: Mapping[str, Any]) -> None:
    """ValueError if the processes hold different things, in memory of their own. held: by name, in all processes."""
    sums = multihost_utils.process_allgather(np.asarray([*map(checksum, held.values())], np.uint32))
    others = [what for what, column in zip(held, np.reshape(sums, (-1, len(held))).T, strict=True) if np.ptp(column)]
    if others:
        raise ValueError(
            f"{name}: the processes hold different {' and '.join(others)}; each gives the same, and all of it. Data of "
            "which each process has a part: jax.make_array_from_process_local_data"
        )


def checksum(tree: Any) -> int:
    """A number that tells trees apart: their shapes, dtypes, and what lies here alone."""
    found = zlib.crc32(str(jax.tree.structure(tree)).encode())
    for a in jax.tree.leaves(tree):
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a = jax.random.key_data(a)
        form = f"{getattr(a, 'dtype', type(a))}{np.shape(a)}"
        here = not is_shared(a)
        found = zlib.crc32(np.ascontiguousarray(a).tobytes() if here else b"", zlib.crc32(form.encode(), found))
    return found


def put_whole(tree: Any, place: NamedSharding) -> Any:
    """Arrays, of which each process has the whole, where place says: each process brings its part."""
    if place.is_fully_addressable:
        return jax.device_put(tree, place)

    def put_one(a):
        if isinstance(a, jax.Array) and not a.is_fully_addressable:
            return jax.device_put(a, place)
        a = np.asarray(a)
        a = a.astype(jax.dtypes.canonicalize_dtype(a.dtype))
        return jax.make_array_from_callback(a.shape, place, lambda part: a[part])

    return jax.tree.map(put_one, tree)


def brought(tree: Any) -> Any:
    """Arrays as NumPy has them, whole, in each process."""

    def bring(a):
        return multihost_utils.process_allgather(a, tiled=True) if is_shared(a) else np.asarray(a)

    return jax.tree.map(bring, tree) if is_shared(tree) else jax.device_get(tree)
