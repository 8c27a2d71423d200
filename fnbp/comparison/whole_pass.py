"""The whole backward pass of a net: how far its manual gradients are off at the end, and who inherits whose error."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.comparison.numerics import (
    U64,
    arithmetic,
    as_numpy,
    compiled_or_plain,
    first_line,
    in_dtype,
    is_floating,
    relative,
)
from fnbp.comparison.report import Row
from fnbp.comparison.rounding import Z_LIMIT, roundings
from fnbp.comparison.taps import Record, automatic_pass, manual_pass, nodes, tapped
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss, losses_of

SCALING = 2.0**-40  # of params and x, relative; the gradients of a net that computes in float64 move by about as much
Deltas = Callable[[Any, Any], Any]


class NetArguments(NamedTuple):
    """All that a net and its loss are given."""

    params: Any
    state: Any
    x: Any
    ctx: Context
    y: Any


def first_deltas(prediction: Any, loss: Loss | None, mask: Any, rng: np.random.Generator) -> Deltas:
    """(prediction, y) -> the delta that the pass starts from: of the mean loss, or a Gaussian draw without a loss."""
    if loss is None:
        drawn = rng.standard_normal(prediction.shape)
        return lambda p, y: jnp.asarray(drawn, p.dtype)  # in float64 it has more digits than in float32
    return lambda p, y: jax.grad(lambda p: jnp.mean(losses_of(loss, p, y, mask)[0]))(p)


@dataclass(frozen=True)
class WholePass:
    """The whole backward pass, manual beside automatic.

    nodes    every node of the net: path, layer, and what it met in the automatic pass
    errors   by (path, leaf): |manual - automatic| / |automatic| at the end of the whole pass in float64, and its z
    failed   why the pass could not be taken, or ""
    unopened why nobody can look inside the net, so that it is one node, or ""
    """

    net: Layer
    nodes: list[tuple[str, Layer, Record]]
    errors: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    failed: str = ""
    unopened: str = ""

    @property
    def right(self) -> bool:
        """True if the pass could be taken, and every gradient at its end is right."""
        return (
            not self.failed
            and not self.unopened
            and bool(self.errors)
            and all(z <= Z_LIMIT for _, z in self.errors.values())
        )

    def beside(self, rows: list[Row]) -> list[Row]:
        """Add to each row its error in the whole pass; a leaf that is right by itself and wrong there inherits."""
        found = []
        for row in rows:
            error, z = self.errors.get((row.path, row.leaf), (None, 0.0))
            inherits = row.kind in ("ok", "convention") and z > Z_LIMIT
            found.append(replace(row, whole=error, kind="inherits" if inherits else row.kind))
        return found

    def blame_net(self, rows: list[Row]) -> list[Row]:
        """Blame the net itself if the whole is wrong although each of its parts, by itself, is right."""
        hint = "every layer is right by itself, but not in this net: does one read what it is not given?"
        if self.failed:
            return [*rows, Row(self.net.name, "params", (), "", "raises", hint=f"{hint} {self.failed}")]
        return [replace(row, kind="formula", hint=hint) if row.kind == "inherits" else row for row in rows]


def whole_pass(net: Layer, at: NetArguments, prediction: Any, deltas: Deltas) -> WholePass:
    """Take the whole pass, automatic and manual.

    Raises: ValueError for a combinator whose own functions were replaced.
    """
    delta = np.asarray(deltas(prediction, at.y))
    closed = [(net.name, net, Record(at.params, at.state, at.x, at.ctx, delta, None, None, ()))]
    if not net.parts:
        return WholePass(net, closed)
    tapped(net)  # raises for a combinator whose own functions were replaced

    def automatic(dtype: Any, scaled_by: float = 1.0) -> Record:
        return pass_in(dtype, net, at, deltas, scaled_by)

    try:
        working = automatic(None)
        met = list(nodes(net, working, one_turn=True))
    except Exception as error:  # a node hands on a state that is not its parts': nobody can look inside
        return WholePass(net, closed, unopened=f"{type(error).__name__}: {first_line(error)}")
    try:
        exact = automatic(np.float64)
        dtypes = {a.dtype for a in jax.tree.leaves((at.params, at.x)) if is_floating(a)}
        single = working if dtypes == {np.dtype(np.float32)} else automatic(np.float32)
        with arithmetic(np.float64):
            point = in_dtype((at.params, at.state, at.x, at.ctx), np.float64)
            manual = compiled_or_plain(lambda *args: manual_pass(net, *args), *point, exact.dy)
        sides = list(zip(*(nodes(net, side) for side in (manual, exact, single)), strict=True))
    except Exception as error:  # the layer that fails is compared by itself too, and says so there
        return WholePass(net, met, failed=f"{type(error).__name__}: {first_line(error)}")
    errors = {}
    for (path, _, ours), (_, _, wide), (_, _, narrow) in sides:
        errors |= errors_of_node(path, ours, wide, narrow)
    if any(z > Z_LIMIT for _, z in errors.values()):
        scaled = nodes(net, automatic(np.float64, scaled_by=1 + SCALING))
        for (path, _, wide), (_, _, other) in zip(nodes(net, exact), scaled, strict=True):
            errors |= {place: (errors[place][0], 0.0) for place in cast_down(path, wide, other) if place in errors}
    return WholePass(net, met, errors)


def pass_in(dtype: Any, net: Layer, at: NetArguments, deltas: Deltas, scaled_by: float) -> Record:
    """The automatic pass in dtype, or, for None, in the dtypes that were given; params and x times scaled_by."""

    def taken(params, state, x, ctx, y):
        return automatic_pass(net, params, state, x, ctx, deltas(net.forward(params, state, x, ctx)[0], y))

    with arithmetic(dtype):
        here = in_dtype(at, dtype)
        if scaled_by != 1:
            params, x = jax.tree.map(lambda a: a * scaled_by if is_floating(a) else a, (here.params, here.x))
            here = here._replace(params=params, x=x)
        return as_numpy(compiled_or_plain(taken, *here))


def errors_of_node(path: str, ours: Record, wide: Record, narrow: Record) -> dict[tuple[str, str], tuple[float, float]]:
    """The errors of one node's gradients and dx in the whole pass, with their z; ours is manual."""
    trees = [(s.grads if ours.grads is not None else {}, s.dx) for s in (ours, wide, narrow)]
    if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
        return {}
    errors = {}
    for (leaf, m), (_, a), (_, low) in zip(ours.leaves(), wide.leaves(), narrow.leaves(), strict=True):
        if is_floating(a) and jnp.shape(m) == jnp.shape(a):
            error = relative(m, a)
            errors[path, leaf] = error, error / (U64 * roundings(np.asarray(low), np.asarray(a)))
    return errors


def cast_down(path: str, wide: Record, scaled: Record) -> list[tuple[str, str]]:
    """The leaves that move by steps, or not at all, as params and x are scaled by a little in float64.

    There the net casts to a narrower dtype, and its rounding is no error.
    """
    found = []
    for (leaf, a), (_, moved) in zip(wide.leaves(), scaled.leaves(), strict=True):
        if np.any(a) and not 1e-3 * SCALING < relative(moved, a) < 1e4 * SCALING:
            found.append((path, leaf))
    return found
