"""An opened loss as a Layer: its forward is the loss of each example, its backward returns factors."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fnbp.arrays.placement import placement, varies, varying
from fnbp.arrays.sums import wide
from fnbp.factor import Factor
from fnbp.layer import Layer, Static, Traits
from fnbp.losses.loss import Loss
from fnbp.opening.factors import Nothing
from fnbp.opening.passes import factors_of, for_all, taps_of
from fnbp.opening.plan import Plan, plan_of
from fnbp.opening.program import Kind, read

Reader = Callable[[Any, Any, Any], tuple[Plan, Any, list[int | None], list[Any]]]


def itself() -> Loss:
    """The loss of a net whose outputs are losses."""
    return Loss(lambda losses, target: (losses, losses), jnp.ones_like, "mean")


MEAN = itself()


def reader(name: str, f: Callable[..., tuple[Any, Any]], chosen: Callable[[Any], list[bool]]) -> Reader:
    """Make the function that plans f(params, x, state) -> loss, aux, of one example, for given arrays.

    It returns the plan, the tree of aux, which inputs have an example axis, and all inputs, params first.
    """

    def read_for(params, x, state):
        forms = [jax.tree.structure(tree) for tree in (params, x, state)]
        groups = [jax.tree.leaves(tree) for tree in (params, x, state)]
        ends = np.cumsum([len(group) for group in groups])[:-1]
        aux_tree: list[Any] = []

        def of_one(*inputs):
            parts = inputs[: ends[0]], inputs[ends[0] : ends[1]], inputs[ends[1] :]
            loss, aux = f(*(jax.tree.unflatten(form, part) for form, part in zip(forms, parts, strict=True)))
            flat, form = jax.tree.flatten(aux)
            aux_tree[:] = [form]
            return [jnp.asarray(a) for a in (loss, *flat)]

        own, data, shared = groups
        kinds: list[Kind] = [kind_of(p, yes) for p, yes in zip(own, chosen(params), strict=True)]
        avals = [shape_of(a, data[0], int(i in range(len(own), len(own) + len(data))))
                 for i, a in enumerate((*own, *data, *shared))]  # fmt: skip
        others = cast(list[Kind], ["data"] * len(data) + ["known"] * len(shared))
        program = read(of_one, kinds + others, avals, name)
        axes = [*[None] * len(own), *[0] * len(data), *[None] * len(shared)]
        plan = plan_of(program, program.outputs[:1], name, paths_of(params))
        return plan, aux_tree[0], axes, [*own, *data, *shared]

    return read_for


def paths_of(params: Any) -> list[str]:
    """The path of every parameter: block.kernel."""
    keys = (where for where, _ in jax.tree_util.tree_leaves_with_path(params))
    return [jax.tree_util.keystr(where, simple=True, separator=".") for where in keys]


def kind_of(a: Any, chosen: bool) -> Kind:
    """How a loss depends on an array without an example axis: it is differentiated by it if it is chosen."""
    return "param" if chosen and jnp.issubdtype(jnp.result_type(a), jnp.inexact) else "known"


def shape_of(a: Any, like: Any, skipped: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, without its first axes; within shard_map it varies as like does."""
    options: dict[str, Any] = {}
    if varies(like):
        place = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        options = {"manual_axis_type": jax.typeof(like).manual_axis_type, "sharding": place}
    return jax.ShapeDtypeStruct(jnp.shape(a)[skipped:], getattr(a, "dtype", jnp.result_type(a)), **options)


def net_of(name: str, read_for: Reader) -> Layer:
    """The Layer of a function that reader reads: x is the batch, a tuple; state is what has no example axis, and the
    new state is aux."""

    def init(key, x):
        raise TypeError(f"{name}: the model makes its own parameters")

    def forward(params, state, x, ctx):
        plan, aux_tree, axes, inputs = read_for(params, x, state)
        losses, pull, aux, record = tapped(plan, axes, inputs, jax.tree.leaves(x)[0].shape[0])
        return losses, jax.tree.unflatten(aux_tree, aux), (pull, record, losses, Static(plan))

    def backward(params, res, dy):
        pull, record, losses, static = res
        plan = static.value
        if not plan.rules:
            return factors_for(plan, params, pull(dy)[0], record, losses), None
        # a rule of a user's own, one that clips for example, need not be linear in the error, so it sees the whole one
        factors = factors_for(plan, params, pull(jnp.ones_like(dy))[0], record, losses)
        return jax.tree.map(lambda factor: factor.scaled(dy), factors, is_leaf=is_factor), None

    return Layer(init, forward, backward, name, traits=Traits(lambda name, x, mask: None, opened=True))


def tapped(plan: Plan, axes: list[int | None], inputs: list[Any], m: int) -> tuple[Any, Callable, Any, Any]:
    """The losses of m examples, their pullback to the taps, aux, and the record of the run."""
    run = for_all(plan, axes, m)
    like = next(a for a, axis in zip(inputs, axes, strict=True) if axis == 0)
    inputs = [varying(a, like) for a in inputs]  # within shard_map no derivative may be added up over devices

    def of_taps(taps):
        (loss, *aux), record = run(taps, inputs)
        return loss, (aux, record)

    taps = jax.tree.map(lambda tap: beside(tap, like), taps_of(plan, plan.program, (m,)))
    losses, pull, (aux, record) = jax.vjp(of_taps, taps, has_aux=True)
    return losses, pull, aux, record


def beside(a: jax.Array, like: Any) -> jax.Array:
    """An array of all examples, split over devices as another one is: over Explicit axes, or within shard_map."""
    at = placement(like)
    return (
        varying(a, like) if at is None else jax.sharding.reshard(a, NamedSharding(at.mesh, PartitionSpec(at.spec[0])))
    )


def is_factor(node: Any) -> bool:
    """True for a factor."""
    return isinstance(node, Factor)


def factors_for(plan: Plan, params: Any, deltas: Any, record: Any, losses: jax.Array) -> Any:
    """The factor of every parameter: a tree of params."""
    found = factors_of(plan, plan.program, deltas, record, {})
    leaves, tree = jax.tree.flatten(params)
    factors = []
    for value, p in zip(plan.program.inputs, leaves, strict=False):
        inexact = jnp.issubdtype(jnp.result_type(p), jnp.inexact)
        nothing = Nothing(
            jnp.zeros_like(wide(losses)), jnp.shape(p), np.dtype(jnp.result_type(p) if inexact else losses.dtype)
        )
        factors.append(found.get(value, nothing))
    return jax.tree.unflatten(tree, factors)
