"""Arrays on many devices: what a computation must say where a mesh has Explicit axes, and within shard_map.

jax.make_mesh gives Explicit axes: the type of an array then says how each axis is split over devices, and JAX asks what
becomes of an axis that is summed over. Within shard_map the type says over which axes of the mesh an array varies.
Elsewhere these functions are the plain ones.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, auto_axes


def placement(*arrays: Any) -> NamedSharding | None:
    """The sharding of the first of these arrays that is split over Explicit axes, or None."""
    for a in jax.tree.leaves(arrays):
        sharding = getattr(jax.typeof(a), "sharding", None)
        if sharding is not None and sharding.mesh.explicit_axes and any(sharding.spec):
            return sharding
    return None


def varies(x: Any) -> frozenset[str]:
    """The axes of the mesh over which an array varies within shard_map."""
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())


def summed(f: Callable, *args: Any) -> Any:
    """f(*args) for an f that sums over the examples: its result is the same on all devices."""
    at = placement(*args)
    return f(*args) if at is None else placed(f, at, PartitionSpec())(*args)


def by_example(f: Callable, *args: Any) -> Any:
    """f(*args) for an f that takes the examples one by one: they stay where they are."""
    at = placement(*args)
    return f(*args) if at is None else placed(f, at, PartitionSpec(at.spec[0]))(*args)


def over_examples(method: Callable) -> Callable:
    """For a method of a tree of arrays that sums over the examples: see summed."""
    return functools.wraps(method)(lambda self: summed(method, self))


def each_example(method: Callable) -> Callable:
    """For a method of a tree of arrays that takes the examples one by one: see by_example."""
    return functools.wraps(method)(lambda self: by_example(method, self))


def placed(f: Callable, at: NamedSharding, spec: PartitionSpec) -> Callable:
    """f with the Explicit axes as Auto ones inside, its result split as spec says."""
    return auto_axes(f, axes=at.mesh.explicit_axes, out_sharding=NamedSharding(at.mesh, spec))


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """jnp.einsum; the axes that stay are split as they were, the sum over the others is over all devices."""
    at = placement(*operands)
    if at is None:
        return jnp.einsum(subscripts, *operands)
    inputs, output = subscripts.split("->")
    split: dict[str, Any] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        spec = jax.typeof(operand).sharding.spec
        first, _, last = letters.partition("...")
        for letter, axis in (*zip(first, spec, strict=False), *zip(reversed(last), reversed(spec), strict=False)):
            split[letter] = split.get(letter) or axis
    spec = PartitionSpec(*(split.get(letter) for letter in output))
    return jnp.einsum(subscripts, *operands, out_sharding=NamedSharding(at.mesh, spec))


def reshaped(x: jax.Array, *shape: int) -> jax.Array:
    """x.reshape(shape), whose first axis is x's or a part of it."""
    return by_example(lambda x: x.reshape(shape), x)


def rows_of(a: jax.Array, rows: jax.Array) -> jax.Array:
    """The examples of a at rows, over the devices as a's are if they fill them, else on all."""

    def take(a, rows):
        return jnp.take(a, rows, 0, mode="clip")

    at = placement(a)
    if at is None:
        return take(a, rows)
    axis = at.spec[0]
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    devices = math.prod(at.mesh.shape[name] for name in names)
    return placed(take, at, PartitionSpec(axis if rows.shape[0] % devices == 0 else None))(a, rows)


def zeros_beside(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros whose first axis lies where x's does, and which vary as x does."""
    at = placement(x)
    where = None if at is None else NamedSharding(at.mesh, PartitionSpec(at.spec[0], *[None] * (len(shape) - 1)))
    return varying(jnp.zeros(shape, dtype, device=where), x)


def varying(a: jax.Array, x: Any) -> jax.Array:
    """a as an array that varies over the axes of the mesh over which x does."""
    more = tuple(varies(x) - varies(a))
    return jax.lax.pcast(a, more, to="varying") if more else a


def of_param(gradient: jax.Array, param: Any) -> jax.Array:
    """A gradient in the dtype of its parameter and where that lies, as jax.grad has it.

    Within shard_map a parameter that is the same on all devices gets the sum of what the devices found.
    """
    more = tuple(varies(gradient) - varies(param))
    gradient = jax.lax.psum(gradient, more) if more else gradient
    at = placement(param)
    gradient = gradient if at is None else jax.sharding.reshard(gradient, at)
    return gradient.astype(jnp.result_type(param))


def in_shard_map() -> bool:
    """True within shard_map: an array then holds the examples of one device only."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
