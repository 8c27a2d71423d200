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
import numpy as np
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


def with_sums(f: Callable, *args: Any) -> Any:
    """f(*args) for an f that returns a pair: arrays of examples, which stay where they are, and sums over them."""
    at = placement(*args)
    return f(*args) if at is None else placed(f, at, (PartitionSpec(at.spec[0]), PartitionSpec()))(*args)


def over_examples(method: Callable) -> Callable:
    """For a method of a tree of arrays that sums over the examples: see summed."""
    return functools.wraps(method)(lambda self: summed(method, self))


def each_example(method: Callable) -> Callable:
    """For a method of a tree of arrays that takes the examples one by one: see by_example."""
    return functools.wraps(method)(lambda self: by_example(method, self))


def placed(f: Callable, at: NamedSharding, specs: Any) -> Callable:
    """f with the Explicit axes as Auto ones inside, its result split as specs say."""
    out = jax.tree.map(lambda spec: NamedSharding(at.mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return auto_axes(f, axes=at.mesh.explicit_axes, out_sharding=out)


def einsum(subscripts: str, *operands: jax.Array, **options: Any) -> jax.Array:
    """jnp.einsum; the axes that stay are split as they were, the sum over the others is over all devices."""
    at = placement(*operands)
    if at is None:
        return jnp.einsum(subscripts, *operands, **options)
    inputs, output = subscripts.split("->")
    split: dict[str, Any] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        spec = jax.typeof(operand).sharding.spec
        first, _, last = letters.partition("...")
        for letter, axis in (*zip(first, spec, strict=False), *zip(reversed(last), reversed(spec), strict=False)):
            split[letter] = split.get(letter) or axis
    spec = PartitionSpec(*(split.get(letter) for letter in output))
    return jnp.einsum(subscripts, *operands, out_sharding=NamedSharding(at.mesh, spec), **options)


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


def varying(a: jax.Array, *others: Any) -> jax.Array:
    """a as an array that varies over the axes of the mesh over which one of the others does."""
    more = tuple(frozenset().union(*map(varies, jax.tree.leaves(others))) - varies(a))
    return jax.lax.pcast(a, more, to="varying") if more else a


def laid(a: jax.Array, place: NamedSharding) -> jax.Array:
    """a where place says: over Auto axes as a constraint on the compiler, over Explicit axes by moving it.

    Within shard_map a as it is.
    """
    if in_shard_map():
        return a
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(a).sharding.mesh if mesh.empty else mesh
    mesh = place.mesh if mesh.empty else mesh
    if mesh.explicit_axes:
        a = jax.sharding.reshard(a, NamedSharding(mesh, over(place.spec, mesh.explicit_axes)))
    if mesh.auto_axes:
        a = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, over(place.spec, mesh.auto_axes)))
    return a


def over(spec: PartitionSpec, axes: Any) -> PartitionSpec:
    """A spec, of these axes of the mesh alone."""
    entries = (entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec)
    kept = (tuple(name for name in entry if name in axes) for entry in entries)
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in kept))


def axes_of(*arrays: Any) -> tuple[frozenset[str], Any]:
    """The Explicit axes over which arrays are split, and their mesh; none and None if they are not."""
    found: set[str] = set()
    mesh = None
    for a in jax.tree.leaves(arrays):
        at = placement(a) if isinstance(a, jax.Array) else None
        if at is not None:
            mesh = at.mesh
            found |= {name for name in mesh.explicit_axes if over(at.spec, (name,)) != over(at.spec, ())}
    return frozenset(found), mesh


def check_whole(name: str, params: Any) -> None:
    """ValueError if parameters are split over Explicit axes, which only a pass with a loss takes."""
    axes, _ = axes_of(params)
    if axes:
        raise ValueError(
            f"{name}: params are split over the Explicit axes {sorted(axes)}; it takes them split over Auto axes, or "
            "whole: jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))"
        )


def left_to_compiler(f: Callable, axes: frozenset[str], mesh: Any, where: Callable[[Any], Any], *args: Any) -> Any:
    """f(*args) with these Explicit axes as Auto ones inside; where: what f returns -> its specs over them, a tree."""
    inside = mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh
    types = {name: jax.sharding.AxisType.Auto if name in axes else kind for name, kind in named_types(inside)}
    inside = jax.sharding.AbstractMesh(inside.axis_sizes, inside.axis_names, axis_types=tuple(types.values()))

    def entered(a):
        spec = jax.typeof(a).sharding.spec
        return jax.sharding.reshard(a, NamedSharding(inside, over(spec, inside.explicit_axes)))

    with jax.sharding.use_abstract_mesh(inside):
        out = f(*jax.tree.map(entered, args))
        kept = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, out)

    def leaves(a, spec, own):
        both = [*zip((*spec, *[None] * (a.ndim - len(spec))), (*own, *[None] * (a.ndim - len(own))), strict=True)]
        return jax.sharding.reshard(a, NamedSharding(mesh, PartitionSpec(*(joined(*pair) for pair in both))))

    return jax.tree.map(leaves, out, kept, where(out))


def named_types(mesh: Any) -> list[tuple[str, Any]]:
    """Each axis of a mesh and its type."""
    return list(zip(mesh.axis_names, mesh.axis_types, strict=True))


def joined(one: Any, other: Any) -> Any:
    """The axes of two entries of specs."""
    names = [name for entry in (one, other) for name in (entry if isinstance(entry, tuple) else (entry,)) if name]
    return tuple(names) if len(names) > 1 else names[0] if names else None


def of_param(gradient: jax.Array, param: Any) -> jax.Array:
    """A gradient in the dtype of its parameter and where that lies, as jax.grad has it.

    Within shard_map a parameter that is the same on all devices gets the sum of what the devices found.
    """
    more = tuple(varies(gradient) - varies(param))
    gradient = jax.lax.psum(gradient, more) if more else gradient
    at = placement(param)
    gradient = gradient if at is None else jax.sharding.reshard(gradient, at)
    dtype = jnp.result_type(param)
    return gradient.astype(dtype) if isinstance(dtype, np.dtype) else gradient  # a random key has a dtype of its own


def in_shard_map() -> bool:
    """True within shard_map: an array then holds the examples of one device only."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
