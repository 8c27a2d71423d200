"""Many devices: a mesh, where parameters and batches lie on it, and a net that keeps to these places.

    mesh = fnbp.sharding.mesh(data=4, model=2)
    params = fnbp.sharding.place(net, params, mesh, fully=True)
    x, y = fnbp.sharding.split(mesh, x, y)
    fnbp.fit(net, loss, params, state, x, y, ...)      # as on one device

A mesh has two axes. The batch is split along "data". Along "model" layers compute on parts of their parameters.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fnbp.arrays.checks import check_is, check_representable, check_size, describe
from fnbp.arrays.masks import RULES
from fnbp.arrays.placement import axes_of, laid, left_to_compiler, over
from fnbp.combinators.tie import look_up, put
from fnbp.construction import constructor
from fnbp.contraction import Contracted, is_open
from fnbp.contractions import total
from fnbp.factor import Factor, Mixed
from fnbp.layer import Context, Layer, child, leaves, map_layers
from fnbp.naming import by_pattern, check_patterns, map_named
from fnbp.processes import check_alike, put_whole
from fnbp.wrapping import Placed

__all__ = ["mesh", "place", "places", "sharded", "split"]

DATA, MODEL = "data", "model"
SMALL = 1 << 9  # elements of a parameter that is not worth to be split


def mesh(data: int = -1, model: int = 1, explicit: bool = False) -> Mesh:
    """Make a mesh of the devices that there are, with the axes "data" and "model".

    Options: data: how many parts a batch has; -1: as many as there are devices for. model: how many parts a parameter
             has along which its layer computes. explicit: Explicit axes, as jax.make_mesh makes them; else Auto ones.
    Raises:  ValueError if the mesh is larger than the machine, model does not divide the devices, or, with several
             processes, a device is left out.
    """
    check_size("mesh", "model", model)
    check_is("mesh", "explicit", explicit, bool)
    there = jax.device_count()
    if data == -1:
        if there % model:
            raise ValueError(f"mesh: model {model} does not divide the {devices(there)} that there are")
        data = there // model
    check_size("mesh", "data", data)
    if data * model > there:
        raise ValueError(f"mesh: data {data} x model {model} needs {data * model} devices, there are {there}")
    if data * model < there and jax.process_count() > 1:
        raise ValueError(f"mesh: data {data} x model {model} leaves out some of the {there} devices of all processes")
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(kind, kind), devices=jax.devices()[: data * model])


def devices(n: int) -> str:
    """How many devices, in words."""
    return f"{n} device{'' if n == 1 else 's'}"


def split(mesh: Mesh, *trees: Any) -> Any:
    """Place batches, or all data, along the axis "data": the first axis of every array is cut into equal parts.

    Returns one tree for one, a tuple for several. Each process gives the whole data; for a part in each, see
    jax.make_array_from_process_local_data.

    Raises: ValueError if the axis "data" does not divide the examples, or processes give different ones; TypeError if a
            leaf is no array.
    """
    check_mesh("split", mesh)
    parts = mesh.shape[DATA]
    check_representable("split", "an array", trees)
    for leaf in jax.tree.leaves(trees):
        if not hasattr(leaf, "shape") or not leaf.shape:
            raise TypeError(f"split: expected arrays with the examples as first axis, got {describe(leaf)}")
        if leaf.shape[0] % parts:
            raise ValueError(f"split: {leaf.shape[0]} examples cannot be split over {devices(parts)} along {DATA!r}")
    where = NamedSharding(mesh, PartitionSpec(DATA))
    if not where.is_fully_addressable:
        check_alike("split", {"arrays": trees})
    placed = put_whole(trees, where)
    return placed[0] if len(trees) == 1 else placed


def place(
    net: Layer, params: Any, mesh: Mesh, fully: bool = False, patterns: Mapping[str, PartitionSpec] | None = None
) -> Any:
    """Place the parameters of a net on a mesh, as places has it. What an optimizer makes of them lies there, too.

    Options and raises: those of places.
    """
    return jax.device_put(params, places(net, params, mesh, fully, patterns))


def places(
    net: Layer, params: Any, mesh: Mesh, fully: bool = False, patterns: Mapping[str, PartitionSpec] | None = None
) -> Any:
    """Say where each parameter of a net is to lie: a tree of NamedSharding, also for jax.jit(out_shardings=...).

    Along "model", if the mesh has it: column, then row.

        attention      Q, K, V and their biases by heads, O by its inputs           if kv_heads are a multiple of model
        dense          of two with only elementwise layers between them, the first by outputs, the second by inputs;
                       the last one of a net, the scores, by outputs
        embedding      E by rows, the vocabulary
        all others     whole on each device

    Along "data": whole on each device; with fully=True, each along the largest of its axes that is a multiple of data
    and not split yet. What has less than 512 numbers stays whole. In a loop over depth each layer is split by itself.

    Options: params: arrays, or jax.ShapeDtypeStruct. patterns: for parameters whose name matches, as in fnbp.matching,
             a PartitionSpec in place of the above; of the layer's own axes, without that of a loop over depth.
    Raises:  ValueError if a pattern matches nothing, or a PartitionSpec does not fit; TypeError if net is not a Layer.
    """
    check_is("places", "net", net, Layer)
    check_is("places", "fully", fully, bool)
    check_mesh("places", mesh)
    given = {} if patterns is None else dict(patterns)
    if given:
        check_patterns("places", net, tuple(given))
    chosen = by_pattern("places", net, params, tuple(given)) if given else {}
    roles, depths = roles_of(net, mesh.shape[MODEL]), depths_of(net)

    def at(name: str, a: Any) -> NamedSharding:
        path, leaf = next((path, name[len(path) + 1 :]) for path in depths if name.startswith(f"{path}."))
        depth = depths[path]
        if name in chosen:
            spec = given[chosen[name]]
            check_spec(name, spec, a.shape[depth:], mesh)
        else:
            spec = along_model(roles.get(path, {}).get(leaf), a.shape[depth:], mesh.shape[MODEL])
            spec = along_data(spec, a.shape[depth:], mesh.shape[DATA]) if fully else spec
        return NamedSharding(mesh, PartitionSpec(*[None] * depth, *spec))

    return map_named(at, net, params)


def along_model(axis: int | None, shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """One axis split along "model", if it can be."""
    fits = axis is not None and parts > 1 and shape[axis] % parts == 0
    return PartitionSpec(*(MODEL if fits and i == axis else None for i in range(len(shape))))


def along_data(spec: PartitionSpec, shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """The largest axis that is not split yet, split along "data"; as it was for a small parameter."""
    free = [i for i, n in enumerate(shape) if spec[i] is None and n % parts == 0]
    if not free or parts == 1 or math.prod(shape) < SMALL:
        return spec
    best = max(free, key=lambda i: shape[i])
    return PartitionSpec(*(DATA if i == best else entry for i, entry in enumerate(spec)))


Roles = dict[str, dict[str, int]]  # path of a layer -> leaf -> the axis that is split along "model"
COLUMN, ROW = {"W": 0, "b": 0}, {"W": 1}
HEADS = {"Q": 0, "K": 0, "V": 0, "b_Q": 0, "b_K": 0, "b_V": 0, "O": 1}


def roles_of(net: Layer, parts: int) -> Roles:
    """Which axis of which parameter is split along "model"."""
    roles: Roles = {}
    last = [path for path, leaf in leaves(net) if made_by(leaf) == "dense"][-1:]

    def walk(path: str, layer: Layer, open_: tuple[str, ...]) -> tuple[str, ...]:
        """open_: the dense layers whose outputs come in split, if the next one takes them so."""
        kind = made_by(layer)
        if layer.rebuild is None:
            return leaf(path, layer, kind, open_)
        inside = () if kind in ("skip", "repeat") else open_
        if kind == "parallel":
            ends = [walk(child(path, i, part), part, inside) for i, part in enumerate(layer.parts)]
            return tuple(one for end in ends for one in end) if all(ends) else ()
        for i, part in enumerate(layer.parts):
            inside = walk(child(path, i, part), part, inside)
        return () if kind in ("skip", "repeat") else inside

    def leaf(path: str, layer: Layer, kind: str, open_: tuple[str, ...]) -> tuple[str, ...]:
        if kind == "dense" and open_:
            roles.update({path: ROW} | dict.fromkeys(open_, COLUMN))
            return ()
        if kind == "dense":
            return (path,)
        if kind == "attention" and arguments(layer)["kv_heads"] % parts == 0:
            roles[path] = HEADS
        if kind == "embedding":
            roles[path] = {"E": 0}
        return open_ if layer.traits.mask is RULES["elementwise"] and kind != "embedding" else ()

    walk(net.name, net, ())
    return dict.fromkeys(last, COLUMN) | roles


def made_by(layer: Layer) -> str:
    """The name of the constructor of a layer, "" without one."""
    return layer.made.constructor.__name__ if layer.made is not None else ""


def arguments(layer: Layer) -> dict[str, Any]:
    """The arguments of the attention that this layer is."""
    assert layer.made is not None
    given = layer.made.given.arguments
    return {**given, "kv_heads": given.get("kv_heads") or given["heads"]}


def depths_of(net: Layer) -> dict[str, int]:
    """For each leaf, by path, how many loops over depth it is in; the longest paths first."""
    found: dict[str, int] = {}

    def walk(path: str, layer: Layer, depth: int) -> None:
        if layer.rebuild is None:
            found[path] = depth
        for i, part in enumerate(layer.parts):
            walk(child(path, i, part), part, depth + (layer.traits.turns is not None))

    walk(net.name, net, 0)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


# --- a net that keeps to the places ---


def sharded(net: Layer, params: Any) -> Layer:
    """Make the same net, told where its parameters lie: it gathers each along "data" where a layer needs it whole.

        run = jax.jit(fnbp.value_and_grad(sharded(net, params), loss))

    Its gradients lie where the parameters do. fit does this by itself. With Explicit axes backprop does, too. With Auto
    axes, under jit, nothing tells where a parameter lies; without this the compiler moves what it likes, and the
    numbers are the same. If nothing is split it is the net itself.

    Raises: TypeError if net is not a Layer; ValueError if params do not belong to it.
    """
    check_is("sharded", "net", net, Layer)
    found = jax.tree.map(place_of, params)
    split_ones = [one for one in jax.tree.leaves(found) if one is not None and any(one.spec)]
    if not split_ones or made_by(net) == "keeping":
        return net
    whole = NamedSharding(split_ones[0].mesh, PartitionSpec())
    return keeping(net, jax.tree.map(lambda a: place_of(a) or whole, params))


def place_of(a: Any) -> NamedSharding | None:
    """Where an array lies on a mesh, of an array that is traced as its type has it."""
    here = jax.typeof(a).sharding if isinstance(a, Tracer) else getattr(a, "sharding", None)
    return here if isinstance(here, NamedSharding) and not here.mesh.empty else None


@constructor
def keeping(net: Layer, where: Any) -> Layer:
    """A net of layers that gather their parameters, and leave their gradients where these lie."""
    entries: dict[str, Any] = {}

    def walk(path: str, layer: Layer, entry: Any) -> None:
        if layer.rebuild is None:
            entries[path] = entry
            return
        if layer.traits.tied:
            source, target = layer.traits.tied
            entry = (put(entry[0], target, look_up(entry[0], source)),)
        if layer.traits.turns is not None:
            entry = jax.tree.map(lambda one: NamedSharding(one.mesh, PartitionSpec(*one.spec[1:])), entry)
        for i, part in enumerate(layer.parts):
            walk(child(path, i, part), part, entry[i])

    walk(net.name, net, where)
    return map_layers(lambda path, leaf: kept_in_place(leaf, entries[path]), net)


def kept_in_place(layer: Layer, where: Any) -> Layer:
    """A layer that gathers its parameters along every axis but "model"."""

    def whole(a, place):
        spec = over(place.spec, (MODEL,))
        return laid(a, NamedSharding(place.mesh, spec)) if spec != place.spec else a

    def forward(params, state, x, ctx):
        return layer.forward(jax.tree.map(whole, params, where), state, x, ctx)

    def backward(params, res, dy):
        factors, dx = layer.backward(jax.tree.map(whole, params, where), res, dy)
        return jax.tree.map(finish, factors, where, is_leaf=lambda node: isinstance(node, Factor)), dx

    def finish(node, place):
        if isinstance(node, Mixed):
            return Mixed(laid(node.d, place))
        return Placed(node, place) if isinstance(node, Factor) else laid(node, place)

    return layer._replace(forward=forward, backward=backward)


def over_model(f: Callable[..., Any], params: Any, *args: Any) -> Any:
    """f(params, *args), where Explicit axes "model" over which params are split are the compiler's.

    What comes out is whole along "model"; but for the gradients of a Pass, which lie where params do.
    """
    axes, on = axes_of(params)
    axes &= {MODEL}
    if not axes:
        return f(params, *args)
    if not any(isinstance(a, Tracer) for a in jax.tree.leaves((params, *args))):
        raise TypeError("params are split over the Explicit axis 'model'; compute with them under jax.jit")

    def specs(out):
        none = jax.tree.map(lambda a: PartitionSpec(), out)
        if not hasattr(out, "grads"):
            return none
        below = lambda p, node: jax.tree.map(lambda one: own(p, one), node, is_leaf=is_open)  # noqa: E731
        return none._replace(grads=jax.tree.map(below, params, out.grads))

    def own(p, node):
        is_sum = node.contract is total if isinstance(node, Contracted) else not isinstance(node, Factor)
        spec = over(jax.typeof(p).sharding.spec, axes) if is_sum else PartitionSpec()
        return jax.tree.map(lambda a: spec, node)

    return left_to_compiler(f, axes, on, specs, params, *args)


def predicted(net: Layer, params: Any, state: Any, x: Any, ctx: Context) -> Any:
    """y of the forward of a net, wherever its parameters lie."""
    return over_model(lambda params, *args: sharded(net, params).forward(params, *args)[0], params, state, x, ctx)


def over_data(name: str, params: Any, size: int) -> NamedSharding | None:
    """Where a batch of that size is to lie if params lie on a mesh with the axis "data"; else None.

    Raises: ValueError if it cannot be split so.
    """
    on = next((one.mesh for one in map(place_of, jax.tree.leaves(params)) if one and DATA in one.mesh.shape), None)
    if on is None or on.shape[DATA] == 1:
        return None
    if size % on.shape[DATA]:
        raise ValueError(f"{name}: batch_size {size} cannot be split over {devices(on.shape[DATA])} along {DATA!r}")
    return NamedSharding(on, PartitionSpec(DATA))


# --- checks ---


def check_mesh(name: str, mesh: Any) -> None:
    """TypeError unless it is a mesh with the axes "data" and "model"."""
    if not isinstance(mesh, Mesh) or not {DATA, MODEL} <= set(mesh.axis_names):
        raise TypeError(f"{name}: expected a mesh as fnbp.sharding.mesh makes it, with the axes 'data' and 'model'")


def check_spec(name: str, spec: Any, shape: tuple[int, ...], mesh: Mesh) -> None:
    """TypeError unless spec is a PartitionSpec; ValueError if it does not fit the shape and the mesh."""
    check_is("places", f"the place of {name}", spec, PartitionSpec)
    if len(spec) > len(shape):
        raise ValueError(f"places: {spec} has more axes than {name}, {shape}")
    for n, entry in zip(shape, spec, strict=False):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if unknown := [one for one in names if one not in mesh.shape]:
            raise ValueError(f"places: {spec} of {name}: the mesh has no axis {unknown[0]!r}")
        parts = math.prod(mesh.shape[one] for one in names)
        if n % parts:
            raise ValueError(f"places: {spec} of {name}: {n} cannot be split over {devices(parts)}")
