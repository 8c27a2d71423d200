"""Compare a net: each of its layers and combinators by itself, its loss, and the whole backward pass."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from fnbp.arrays.checks import check_finite, check_floating, check_is
from fnbp.combinators.parts import map_last
from fnbp.comparison.numerics import as_jax, as_numpy_32, compiled_or_plain
from fnbp.comparison.plan import Plan, check_no_lists
from fnbp.comparison.probe import moved_a_tenth
from fnbp.comparison.report import Row
from fnbp.comparison.subject import Subject, subject_of_layer, subject_of_loss, subject_of_scores
from fnbp.comparison.whole_pass import NetArguments, WholePass, first_deltas, whole_pass
from fnbp.construction import made_of
from fnbp.layer import Context, Layer, checked, map_layers, mask_behind
from fnbp.losses.loss import Loss, check_target, losses_of


def plan_of_net(
    net: Layer,
    x: Any,
    params: Any,
    state: Any,
    ctx: Context,
    loss: Loss | None,
    y: Any,
    key: jax.Array,
    rng: np.random.Generator,
    quick: bool = False,
) -> Plan:
    """Plan the comparison of a net: take the whole pass, and make a subject of every node at what it met there.

    Raises: ValueError for a loss without y, and for numbers that are not finite; TypeError for what is no Loss, and
            for a net that returns no floating point numbers.
    """
    if loss is not None:
        check_is("compare", "loss", loss, Loss)
    if (loss is None) != (y is None):
        raise ValueError("compare: give both loss and y, or neither")
    check_no_lists(net.name, (x, y))
    at = net_arguments(net, x, params, state, ctx, y, key, rng)
    prediction = prediction_of(net, at)
    subjects, mask = [], None
    if loss is not None:
        mask = as_numpy_32(mask_behind(net, at.x, at.ctx.mask))
        check_target(loss, *as_jax((prediction, at.y, mask)))
        jax.eval_shape(partial(losses_of, loss), prediction, at.y, mask)
        subjects = [subject_of_loss(loss, prediction, at.y, mask)]
    whole = whole_pass(net, at, prediction, first_deltas(prediction, loss, mask, rng))
    of_nodes = [
        subject_of_layer(path, layer, (met.params, met.x), (met.state, met.ctx), met.dy)
        for path, layer, met in whole.nodes
        if not (quick and layer.parts and whole.right)
    ]
    if loss is not None and loss.of_scores is not None:
        subjects += of_last(net, loss, whole, at.y, mask)
    notes = ()
    if whole.unopened:
        notes = (f"{net.name}: compared as one; its parts are not: it does not run each once, or reads their state",)
    return Plan(of_nodes + subjects, partial(rows_of_net, whole), notes)


def of_last(net: Layer, loss: Loss, whole: WholePass, y: Any, mask: Any) -> list[Subject]:
    """The last layer of a net together with a loss that forms its scores; none if backprop refuses that net."""
    last: list[tuple[str, Layer]] = []
    map_last(lambda path, layer: last.append((path, layer)) or layer, net)
    (place,) = last
    met = next((met for path, _, met in whole.nodes if path == place[0]), None)
    if met is None or place[1].traits.scores is None or made_of(place[1]) is None or made_of(loss) is None:
        return []
    return [subject_of_scores(*place, loss, (met.params, met.x), (met.state, met.ctx, y, mask))]


def net_arguments(
    net: Layer, x: Any, params: Any, state: Any, ctx: Context, y: Any, key: jax.Array, rng: np.random.Generator
) -> NetArguments:
    """What the net is compared at; params that are not given are drawn, and moved off their initial zeros and ones."""
    x, y = as_numpy_32((x, y))
    check_finite("compare", "x", x)
    drawn = as_numpy_32(compiled_or_plain(net.init, key, x)) if params is None or state is None else (None, None)
    params = moved_a_tenth(drawn[0], rng) if params is None else as_numpy_32(params)
    state = trained(net, params, drawn[1], x, ctx, key) if state is None else as_numpy_32(state)
    check_finite("compare", "params", params)
    return NetArguments(params, state, x, as_numpy_32(ctx), y)


def trained(net: Layer, params: Any, state: Any, x: Any, ctx: Context, key: jax.Array) -> Any:
    """The state after one forward in training: before any, batch_norm has no statistics."""
    if not jax.tree.leaves(state):
        return state
    training = replace(ctx, key=key if ctx.key is None else ctx.key, train=True)
    return as_numpy_32(compiled_or_plain(lambda *args: net.forward(*args)[1], params, state, x, as_numpy_32(training)))


def prediction_of(net: Layer, at: NetArguments) -> Any:
    """What the net returns. Raises: TypeError or ValueError unless it is an array of finite floating point numbers."""
    forward = map_layers(checked, net).forward
    args = (at.params, at.state, at.x, at.ctx)
    prediction = as_numpy_32(compiled_or_plain(lambda *args: forward(*args)[0], *args))
    check_floating("compare", f"what {net.name} returns", prediction)
    check_finite("compare", f"what {net.name} returns", prediction)
    return prediction


def rows_of_net(whole: WholePass, rows: list[Row]) -> list[Row]:
    """Rows with their error in the whole pass. Of a combinator, what its parts do not say already: dx, and faults."""
    combinators = {path for path, layer, _ in whole.nodes if layer.parts}
    shown = [row for row in whole.beside(rows) if row.path not in combinators or row.leaf == "x" or not row.ok]
    if all(row.ok for row in shown):
        shown = whole.blame_net(shown)
    return shown or rows
