"""Is the backward right? Every layer's manual backward beside jax.vjp of its forward, in float64."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from fnbp.backpropagation import contracted, mean_delta
from fnbp.checks import check_finite, check_floating, check_is
from fnbp.factor import total
from fnbp.layer import Context, Layer, leaves, map_layers
from fnbp.losses import Loss, check_losses
from fnbp.rendering import Tabular

TOLERANCE = 1e-10  # relative, in float64: far above rounding, far below any mistake in a formula


@dataclass(frozen=True)
class Row:
    """One leaf: a parameter's gradient, or the dx of a layer, or the dprediction of a loss.

    path       "serial[3].dense(17)"
    leaf       "W", or "x" for the input's cotangent
    error      |manual - automatic| / |automatic|, the layer alone, told the reference delta from above
    inherited  the same at the end of the whole backward pass, where it differs by what came from above
    index      where the layer alone is worst, with both values there
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    error: float
    inherited: float
    index: tuple[int, ...]
    manual: float
    automatic: float

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE

    @property
    def verdict(self) -> str:
        if not self.ok:
            return "WRONG"
        return "ok" if self.inherited <= TOLERANCE else "inherits"


@dataclass(frozen=True)
class Report(Tabular):
    """What compare found: rows from input to output, faults from the last layer to the first."""

    rows: tuple[Row, ...]

    @property
    def faults(self) -> tuple[Row, ...]:
        layers = dict.fromkeys(row.path for row in self.rows)
        return tuple(row for path in reversed(layers) for row in self.rows if row.path == path and not row.ok)

    @property
    def first_fault(self) -> Row | None:
        """The fault that a backward pass meets first."""
        return next(iter(self.faults), None)

    @property
    def ok(self) -> bool:
        return all(row.verdict == "ok" for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest relative error, of a layer alone or of the whole pass."""
        return float(np.max([(row.error, row.inherited) for row in self.rows]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "worst": self.worst,
            "rows": [asdict(row) | {"verdict": row.verdict} for row in self.rows],
        }

    def raise_if_bad(self) -> None:
        """AssertionError, with the report as its message, unless every row is ok."""
        if not self.ok:
            raise AssertionError(f"manual and automatic gradients differ\n{self}")

    def __rich__(self) -> Table:
        table = Table(title=f"manual against automatic, float64: {'ok' if self.ok else 'WRONG'}", title_justify="left")
        for name in ("layer", "leaf", "shape", "layer alone", "whole pass", "verdict"):
            table.add_column(name, justify="right" if name in ("layer alone", "whole pass") else "left", no_wrap=True)
        for row in self.rows:
            style = {"ok": "", "inherits": "yellow", "WRONG": "bold red"}[row.verdict]
            shape = "x".join(map(str, row.shape)) or "()"
            numbers = (f"{row.error:.1e}", f"{row.inherited:.1e}")
            table.add_row(row.path, row.leaf, shape, *numbers, row.verdict, style=style)
        if self.first_fault:
            at = self.first_fault
            where = f"{list(at.index)}: manual {at.manual:+.6g}, automatic {at.automatic:+.6g}"
            table.caption = f"first fault: {at.path}, d{at.leaf}{where}"
        return table


class Pair(NamedTuple):
    """The gradients and dx of one layer, manual and automatic, told the same delta."""

    manual: Any
    automatic: Any


def side_by_side(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer that runs both backwards and sends the automatic dx on, so that no error is inherited."""

    def forward(params, state, x, ctx):
        def differentiated(params, x):
            y, new_state, _ = layer.forward(params, state, x, ctx)
            return y, new_state

        _, pull, _ = jax.vjp(differentiated, params, x, has_aux=True)
        y, state, res = layer.forward(params, state, x, ctx)
        return y, state, (pull, res)

    def backward(params, res, dy):
        pull, res = res
        manual = layer.backward(params, res, dy)
        automatic = pull(dy)
        return Pair(manual, automatic), automatic[1]

    return layer._replace(forward=forward, backward=backward)


def to_float64(tree: Any) -> Any:
    """Floating point leaves as float64, the rest as they are."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, float) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, tree
    )


def draw_params(net: Layer, key: jax.Array, x: Any) -> tuple[Any, Any]:
    """net.init, moved a little everywhere: at an initial zero many a mistake has no effect."""
    params, state = net.init(key, x)
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(flat) + 1)
    moved = [a + 0.1 * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(flat, keys[1:], strict=True)]
    return jax.tree.unflatten(tree, moved), state


def compare(
    net: Layer,
    x: Any,
    *,
    params: Any = None,
    state: Any = None,
    ctx: Context = Context(),
    loss: Loss | None = None,
    y: Any = None,
    key: jax.Array | None = None,
) -> Report:
    """Every leaf of net's backward against jax.vjp of its forward, in float64, layer by layer and as a whole.

    Each layer alone is told the reference delta, so an error shows where it is made; the whole pass then shows how it
    spreads. Under a loss, J is differentiated; else a random cotangent of the output is pulled back. What is not given
    is drawn from key: params (moved away from their initial zeros) and the cotangent.

    Raises: ValueError for non-finite x or params, or a loss without y; what the layers raise.
    """
    check_is("compare", "net", net, Layer)
    if loss is not None:
        check_is("compare", "loss", loss, Loss)
    if (loss is None) != (y is None):
        raise ValueError("compare: a loss needs y, and y a loss")
    check_finite("compare", "x", x)
    with jax.enable_x64(True):
        key = jax.random.key(0) if key is None else key
        x = to_float64(x)
        if params is None:
            params, drawn_state = draw_params(net, key, x)
            state = drawn_state if state is None else state
        elif state is None:
            state = net.init(key, x)[1]
        params, state = to_float64((params, state))
        check_finite("compare", "params", params)
        return Report(tuple(compare_rows(net, params, state, x, ctx, loss, y, key)))


def compare_rows(net, params, state, x, ctx, loss, y, key) -> list[Row]:
    """The rows of compare, of float64 arguments, inside enable_x64."""
    prediction = jax.jit(net.forward)(params, state, x, ctx)[0]
    check_floating("compare", f"what {net.name} returns", prediction)
    if loss is None:
        delta = jax.random.normal(jax.random.fold_in(key, 1), prediction.shape, prediction.dtype)
        loss_deltas = None
    else:
        loss_deltas = jax.jit(lambda p: both_deltas(loss, p, y))(prediction)
        delta = loss_deltas[1]

    paired, whole, reference = jax.jit(lambda *args: both_passes(net, *args))(params, state, x, ctx, delta)
    rows = []
    for path, _, alone, (grads, dx), grads_reference in leaves(net, paired, whole[0], reference[0]):
        (m_grads, m_dx), (a_grads, a_dx) = alone
        rows += rows_of(path, m_grads, a_grads, grads, grads_reference)
        rows += rows_of(path, {"x": m_dx}, {"x": a_dx}, {"x": dx}, {"x": a_dx})
    last = list(rows_of(net.name, {"x": whole[1]}, {"x": reference[1]}, {"x": whole[1]}, {"x": reference[1]}))
    alone_right = all(row.ok for row in rows)  # then what the whole has wrong, a combinator did
    worst = max((row.inherited for row in rows + last), default=0.0) if alone_right else 0.0
    rows += [replace(row, error=worst) for row in last]
    if loss is not None and loss_deltas is not None:
        manual, automatic = ({"prediction": d} for d in loss_deltas)
        rows += rows_of(loss.name, manual, automatic, manual, automatic)
    return rows


def both_deltas(loss: Loss, prediction: jax.Array, y: Any) -> tuple[jax.Array, jax.Array]:
    """dJ/dprediction, by the loss's backward and by jax.vjp of its forward."""

    def J(p):
        return jnp.mean(loss.forward(p, y)[0])

    losses, res = loss.forward(prediction, y)
    check_losses(loss.name, losses, prediction)
    return mean_delta(loss.backward(res), losses.shape[0]), jax.grad(J)(prediction)


def both_passes(net: Layer, params: Any, state: Any, x: Any, ctx: Context, delta: Any) -> tuple[Any, Any, Any]:
    """Each layer alone, as Pairs; the whole manual pass, with the dx of every layer; the whole automatic pass."""

    def differentiated(params, x):
        y, new_state, _ = net.forward(params, state, x, ctx)
        return y, new_state

    def with_dx(path, layer):
        def backward(params, res, dy):
            grads, dx = layer.backward(params, res, dy)
            return (grads, dx), dx

        return layer._replace(backward=backward)

    manual = map_layers(contracted(total), net)
    alone, whole = map_layers(side_by_side, manual), map_layers(with_dx, manual)
    paired, _ = alone.backward(params, alone.forward(params, state, x, ctx)[2], delta)
    seen = whole.backward(params, whole.forward(params, state, x, ctx)[2], delta)
    return paired, seen, jax.vjp(differentiated, params, x, has_aux=True)[1](delta)


def rows_of(path: str, manual: Any, automatic: Any, whole: Any, reference: Any) -> Iterator[Row]:
    """A Row for each leaf of a tree of gradients; leaves that integers have none of are left out."""
    if jax.tree.structure(manual) != jax.tree.structure(automatic):
        trees = f"{jax.tree.structure(manual)}, params are {jax.tree.structure(automatic)}"
        raise ValueError(f"{path}: backward returns {trees}")
    flat = zip(*(jax.tree.leaves(tree) for tree in (automatic, whole, reference)), strict=True)
    for (where, m), (a, m_whole, a_whole) in zip(jax.tree_util.tree_leaves_with_path(manual), flat, strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        leaf = jax.tree_util.keystr(where, simple=True, separator=".")
        m, a = np.asarray(m), np.asarray(a)
        same = m.shape == a.shape
        index = np.unravel_index(np.argmax(abs(m - a)), a.shape) if same and a.size else ()
        values = (float(m[index]), float(a[index])) if same and a.size else (np.nan, np.nan)
        at = tuple(int(i) for i in index)
        yield Row(path, leaf, a.shape, relative_error(m, a), relative_error(m_whole, a_whole), at, *values)


def relative_error(manual: Any, automatic: Any) -> float:
    """|manual - automatic| / |automatic|; infinite for another shape, for NaN, or beside an exact zero."""
    manual, automatic = np.asarray(manual), np.asarray(automatic)
    if manual.shape != automatic.shape:
        return float("inf")
    difference, size = np.linalg.norm(manual - automatic), np.linalg.norm(automatic)
    error = 0.0 if difference == 0 else difference / size if size else np.inf
    return float(error) if np.isfinite(error) else float("inf")
