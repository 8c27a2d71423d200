"""What factors make of each example, beside jax.vjp of the forward at that example alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.combinators.parts import tied_leaves
from fnbp.comparison.evaluation import Evaluator
from fnbp.comparison.leaf import Leaf, Scale, worst_spot
from fnbp.comparison.numerics import U32, arithmetic, as_jax, as_numpy, compiled, first_line, is_inexact, relative
from fnbp.comparison.probe import Probe
from fnbp.comparison.report import Row
from fnbp.comparison.rounding import Z_LIMIT
from fnbp.contraction import closed, contract_leaf, contracted, is_open
from fnbp.contractions import gram, per_example, second_moment, sq_norms
from fnbp.factor import Factor, Mixed
from fnbp.layer import Context, drawing, map_layers, mixing

BESIDE = ("dy_zero_rows", "other_mode")
FASTER = {  # contractions that a factor may have a way of its own to, and what they are of the gradients of examples
    "second_moment": (second_moment, lambda g: jnp.sum(g**2, 0)),
    "gram": (gram, lambda g: jnp.einsum("mp,np->mn", g.reshape(g.shape[0], -1), g.reshape(g.shape[0], -1))),
}
SLACK = 16.0  # times Z_LIMIT: the total and the single ones are summed in other orders


def by_example(
    evaluator: Evaluator, probes: list[Probe], leaves: Mapping[str, Leaf], scale: Scale
) -> tuple[list[Row], dict[str, str]]:
    """Compare per_example, sq_norms, and the total of weighted factors with the gradients of single examples.

    A sum over examples may be right though its terms are not. At the draw nearest to the given point, with rows of
    zeros in dy, and in the other mode.
    """
    subject, probe = evaluator.subject, next((p for p in probes if p.name == "another"), probes[0])
    if subject.layer is None or not jax.tree.leaves(subject.args[0]):
        return [], {}
    try:
        refused = why_not(evaluator, probe)
        if refused:
            return [], {"examples": f"not tried: {refused}"}
        others = [p for p in probes if p.name in BESIDE and not why_not(evaluator, p)]
        both = both_of(evaluator)
        rows = first_rows(differing(evaluator, p, leaves, scale, both) for p in (probe, *others))
    except Exception as error:
        hint = f"what its factors make of each example raises {type(error).__name__}: {first_line(error)}"
        return [leaf.row("example", probe=probe.title, hint=hint) for leaf in leaves.values()], {"examples": "WRONG"}
    return rows, {"examples": "WRONG" if rows else "ok"}


def first_rows(of_probes: Iterable[Iterator[Row]]) -> list[Row]:
    """The rows of the first probe that has some."""
    return next((rows for rows in map(list, of_probes) if rows), [])


def why_not(evaluator: Evaluator, probe: Probe) -> str:
    """Why no example has a gradient of its own here, or ""."""
    subject, ctx = evaluator.subject, probe.fixed[1]
    layer = subject.layer
    assert layer is not None
    if mixing(layer, ctx):
        return "it mixes the examples"
    if ctx.train and drawing(layer):
        return "it draws"
    if subject.is_narrow:
        return "it computes in a narrower dtype, whose rounding differs between one example and all"
    if has_no_batch(probe):
        return "its arrays have no axis of examples in common"
    at = as_jax((probe.args, probe.fixed, probe.dy))
    factors = backward_of(layer, *at) if evaluator.eager else jax.eval_shape(partial(backward_of, layer), *at)
    flat = jax.tree.leaves(factors, is_leaf=lambda node: isinstance(node, Factor))
    if not all(isinstance(factor, Factor) and not isinstance(factor, Mixed) for factor in flat):
        return "its backward returns finished gradients"
    return ""


def has_no_batch(probe: Probe) -> bool:
    """True if x, dy and the mask have no first axis in common, or numbers have no axis behind it, or it is empty."""
    xs = jax.tree.leaves(probe.args[1])
    sizes = {np.shape(a)[:1] for a in (*xs, *jax.tree.leaves((probe.dy, probe.fixed[1].mask)))}
    return len(sizes) != 1 or sizes <= {(), (0,)} or any(is_inexact(x) and x.ndim < 2 for x in xs)


def backward_of(layer: Any, args: tuple, fixed: Any, dy: Any) -> Any:
    """The factors that a layer's backward returns."""
    _, _, res = layer.forward(args[0], fixed[0], args[1], fixed[1])
    return layer.backward(args[0], res, dy)[0]


def differing(
    evaluator: Evaluator, probe: Probe, leaves: Mapping[str, Leaf], scale: Scale, both: Callable
) -> Iterator[Row]:
    """A row for each leaf of params that is wrong example by example, and one if an example is another alone."""
    evaluator.count(manual=1, automatic=1)
    exact = both(probe, scale.dtype)
    single = None
    for name, leaf in leaves.items():
        if name not in exact[0]:
            continue
        for what in exact[0][name]:
            m, a = (np.asarray(side[name][what], np.float64) for side in exact)
            error = relative(m, a)
            if not np.isfinite(a).all() or error <= SLACK * Z_LIMIT * scale.roundoff:
                continue
            single = both(probe, np.float32) if single is None else single
            n = max(relative(single[1][name][what], a), U32)
            if error > SLACK * Z_LIMIT * scale.roundoff * n / U32 and error > 1e3 * leaf.error:
                hint = f"{what} of its factor is off by {error:.1e}" + why_of_examples(what, probe)
                yield leaf.row("example", probe=probe.title, hint=hint, **worst_spot(m, a))
                break


def why_of_examples(what: str, probe: Probe) -> str:
    """What may be at fault where only one quantity is wrong, or only in the other mode."""
    if what == "sq_norms":
        return ": per_example is right; are two factors added before they are squared? Traits.tied names them"
    if probe.name == "other_mode":
        return f" with train={probe.fixed[1].train}: if it draws or mixes the examples there, its Traits say so"
    return ""


def both_of(evaluator: Evaluator) -> Callable[[Probe, Any], Any]:
    """(probe, dtype) -> by leaf and contraction, what the factors make, and what jax.vjp makes of single examples."""
    layer = evaluator.subject.layer
    assert layer is not None

    def run(args, fixed, dy, weights):
        return manual_of(layer, args, fixed, dy, weights), automatic_of(layer, args, fixed, dy, weights)

    call = run if evaluator.eager else compiled(run)

    def both(probe: Probe, dtype: Any) -> Any:
        with arithmetic(dtype):
            args, fixed, dy = probe.of(dtype)
            m = jax.tree.leaves(args[1])[0].shape[0]
            weights = np.random.default_rng(0).standard_normal(m).astype(dtype)
            return as_numpy(evaluator.in_time(lambda: call(*as_jax((args, fixed, dy, weights)))))

    return both


def manual_of(layer: Any, args: tuple, fixed: Any, dy: Any, weights: Any) -> dict[str, dict[str, Any]]:
    """What the factors make of each example, by leaf."""

    def weighted(factor):
        return factor.scaled(weights).total()

    own = own_ways(jax.eval_shape(partial(backward_of, layer), args, fixed, dy))
    contract, m = (per_example, sq_norms, weighted, *(FASTER[name][0] for name in own)), weights.shape[0]
    finished = map_layers(contracted(contract, tied_leaves(layer)), layer)
    factors = backward_of(finished, args, fixed, jax.tree.map(lambda d: d / m, dy))
    flat = jax.tree_util.tree_leaves_with_path(factors, is_leaf=lambda node: is_open(node) or is_made(node))
    names = ("per_example", "sq_norms", "the weighted total", *own)
    made = {
        name_of(where): leaf if is_made(leaf) else contract_leaf(contract, leaf, layer.name) for where, leaf in flat
    }
    return {name: dict(zip(names, map(closed, leaf), strict=True)) for name, leaf in made.items()}


def own_ways(factors: Any) -> list[str]:
    """The contractions of FASTER that a factor, or one within it, has a method for."""

    def kinds(node: Any) -> Iterator[type]:
        if isinstance(node, Factor):
            yield type(node)
            for part in vars(node).values():
                yield from kinds(part)

    found = {kind for node in jax.tree.leaves(factors, is_leaf=lambda n: isinstance(n, Factor)) for kind in kinds(node)}
    return [name for name in FASTER if any(hasattr(kind, name) for kind in found)]


def is_made(node: Any) -> bool:
    """True for what a tuple of contractions made of one factor."""
    return isinstance(node, tuple) and bool(node) and all(map(is_open, node))


def automatic_of(layer: Any, args: tuple, fixed: Any, dy: Any, weights: Any) -> dict[str, dict[str, Any]]:
    """The gradients of single examples, by leaf."""
    params, x = args
    state, ctx = fixed

    def alone(x, mask, dy):
        x, mask, dy = jax.tree.map(lambda a: a[None], (x, mask, dy))
        here: Context = replace(ctx, mask=mask)
        _, pull = jax.vjp(lambda params: layer.forward(params, state, x, here)[0], params)
        return pull(dy)[0]

    rows = jax.vmap(alone)(x, ctx.mask, dy)

    def made(g):
        axes = tuple(range(1, g.ndim))
        always = {"per_example": g, "sq_norms": jnp.sum(g**2, axes), "the weighted total": jnp.tensordot(weights, g, 1)}
        return always | {name: of_rows(g) for name, (_, of_rows) in FASTER.items()}

    return {name_of(where): made(g) for where, g in jax.tree_util.tree_leaves_with_path(rows)}


def name_of(where: Any) -> str:
    """The name of a leaf of params."""
    return jax.tree_util.keystr(where, simple=True, separator=".")
