"""The algorithm of the document's section 3.2: forward, loss, backward, and what is made of the factors."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.checks import check_finite, check_is, check_key, describe
from fnbp.combinators import tied_leaves
from fnbp.compound import Contracted, is_contracted, is_open, out_of_depth
from fnbp.factor import MIXED, Factor, Mixed, sq_norms, total, wide
from fnbp.layer import Context, Layer, checked, leaves, map_layers
from fnbp.losses import Loss, check_losses

Contraction = Callable[[Any], Any] | tuple


class Pass(NamedTuple):
    """One forward and one backward.

    value       J, the mean of the examples' losses, ()
    state       the new state of the net
    prediction  what the net returned, (m, ...)
    grads       the tree of params, each leaf what contract made of its factor
    dx          dJ/dx
    """

    value: jax.Array
    state: Any
    prediction: jax.Array
    grads: Any
    dx: Any


class Trace(NamedTuple):
    """A Pass, and what every layer put out and was told.

    outputs  path -> y of that layer
    deltas   path -> dJ/dy of that layer, its error
    """

    value: jax.Array
    state: Any
    prediction: jax.Array
    grads: Any
    dx: Any
    outputs: OrderedDict[str, Any]
    deltas: OrderedDict[str, Any]


def contract_leaf(contract: Contraction, leaf: Any, path: str) -> Any:
    """What contract makes of one factor. The error runs down the net as dJ/dy, so the factors hold the 1/m of J;
    every contraction but total sees each example's own, which is m times that."""
    if isinstance(contract, tuple):
        made = (contract_leaf(c, leaf, path) for c in contract)
        return tuple(Contracted(one, c) if c is total else one for one, c in zip(made, contract, strict=True))
    if not isinstance(leaf, Factor):
        if contract is total:
            return leaf
        name = getattr(contract, "__name__", repr(contract))
        raise TypeError(f"{path}: its backward returns a finished gradient, so only total is to be had, not {name}")
    if contract is total:
        return total(leaf)
    if isinstance(leaf, Mixed):
        raise TypeError(f"{path}: {MIXED}")
    return Contracted(contract(leaf.scaled(leaf.d.shape[0])), contract)


def contracted(contract: Contraction, later: frozenset[str] = frozenset()) -> Callable[[str, Layer], Layer]:
    """For map_layers: a layer whose backward contracts its factors as soon as they exist; but for those at later, the
    paths of layers whose factors are still to be added to others. Only total can be added when it is done."""
    for c in contract if isinstance(contract, tuple) else (contract,):
        if not callable(c) and not isinstance(c, tuple):
            raise TypeError(f"contract must be a function of a factor, or a tuple of such, got {c!r}")

    def at(path, layer):
        layer = checked(path, layer)
        if path in later and contract is not total:
            return layer

        def backward(params, res, dy):
            factors, dx = layer.backward(params, res, dy)
            return jax.tree.map(finish, factors, is_leaf=lambda leaf: isinstance(leaf, Factor)), dx

        def finish(leaf):
            return contract_leaf(contract, leaf, path)

        return layer._replace(backward=backward)

    return at


def check_batch(x: Any, y: Any) -> None:
    """ValueError for a batch of 0, x and y of other lengths, or non-finite data; TypeError for what is no array."""
    for leaf in jax.tree.leaves((x, y)):
        if not jnp.ndim(leaf):
            raise TypeError(f"backprop: x and y must be arrays with a first axis, the examples; got {describe(leaf)}")
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((x, y))}
    if (0,) in sizes:
        raise ValueError("backprop: a batch of 0 examples has no mean loss")
    if len(sizes) > 1:
        raise ValueError(f"backprop: x and y must have as many examples each, got {sorted(s[0] for s in sizes)}")
    check_finite("backprop", "x", x)
    check_finite("backprop", "y", y)


def backprop(net: Layer, loss: Loss, contract: Contraction = total) -> Callable[..., Pass]:
    """Backpropagation: (params, state, x, y, ctx=Context()) -> Pass.

        1  prediction, saved = forward of every layer            2  J = mean of the losses
        3  delta = dJ/dprediction; then, last layer first:  factors, delta = backward(params, saved, delta)
        4  grads = contract of each factor

    contract is a function of a factor (fnbp.total, keep, sq_norms, per_example, or your own), or a tuple of them; the
    leaves of grads are then tuples. total is the gradient of J. All others are of each example's own loss, without
    the 1/m. A pure function: jit it, vmap it, scan over it.

    Shapes: x (m, ...), y as the loss wants it.
    Source: the document, section 3.2.
    Raises: ValueError for a batch of 0, targets or params that do not fit, and, outside jit, non-finite data; TypeError
            where a layer's backward has no factor for that contraction.
    """
    check_is("backprop", "net", net, Layer)
    run = one_pass(map_layers(contracted(contract, tied_leaves(net)), net), loss)

    def finish(node):
        done = node if is_contracted(node) else contract_leaf(contract, node, net.name)
        return jax.tree.map(out_of_depth, done, is_leaf=is_open)

    def backprop_of(params, state, x, y, ctx=Context()):
        done = run(params, state, x, y, ctx)
        if contract is total:
            return done._replace(grads=conform(done.grads, params))
        return done._replace(grads=jax.tree.map(finish, done.grads, is_leaf=is_open))

    return backprop_of


def one_pass(net: Layer, loss: Loss) -> Callable[..., Pass]:
    """Forward, loss, backward: (params, state, x, y, ctx=Context()) -> Pass, with grads as net gives them."""
    check_is("backprop", "loss", loss, Loss)

    def run(params, state, x, y, ctx=Context()):
        check_batch(x, y)
        check_is("backprop", "ctx", ctx, Context)
        if ctx.key is not None:
            check_key("backprop", ctx.key)
        params, x, y = jax.tree.map(jnp.asarray, (params, x, y))
        prediction, state, res = net.forward(params, state, x, ctx)
        losses, loss_res = loss.forward(prediction, y)
        check_losses(loss.name, losses, prediction)
        delta = mean_delta(loss.backward(loss_res), losses.shape[0])
        grads, dx = net.backward(params, res, delta)
        return Pass(jnp.mean(losses), state, prediction, grads, dx)

    return run


def mean_delta(dlosses: Any, m: int) -> Any:
    """The delta of the mean over m examples, of the delta of their sum."""
    return jax.tree.map(lambda d: (wide(d) / m).astype(d.dtype), dlosses)


def conform(grads: Any, params: Any) -> Any:
    """Gradients in the dtypes of params, as jax.grad has them; ValueError where tree or shapes are not params'."""
    if jax.tree.structure(grads) != jax.tree.structure(params):
        raise ValueError(f"backward returns {jax.tree.structure(grads)}, params are {jax.tree.structure(params)}")
    for (where, g), p in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        if g.shape != jnp.shape(p):
            path = jax.tree_util.keystr(where)
            raise ValueError(f"params{path} has shape {jnp.shape(p)}, its gradient {g.shape}: is its backward wrong?")
    return jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, params)


def value_and_grad(net: Layer, loss: Loss) -> Callable[..., Any]:
    """J and its gradient: (params, state, x, y, ctx=Context()) -> (value, state), grads.

    The shape of jax.value_and_grad with has_aux=True, so that it drops into any training step.

    Raises: as backprop.
    """
    run = backprop(net, loss)

    def value_and_grad_of(params, state, x, y, ctx=Context()):
        out = run(params, state, x, y, ctx)
        return (out.value, out.state), out.grads

    return value_and_grad_of


def per_example_norms(net: Layer, loss: Loss) -> Callable[..., jax.Array]:
    """The norm of each example's gradient: (params, state, x, y, ctx=Context()) -> (m,).

        |dl_i/dtheta| = sqrt(sum over parameters of sq_norms)

    Of each example's own loss, in one backward and without forming a gradient for each.

    Raises: as backprop; ValueError for a net without parameters.
    """
    run = backprop(net, loss, contract=sq_norms)

    def norms(params, state, x, y, ctx=Context()):
        squares = jax.tree.leaves(run(params, state, x, y, ctx).grads)
        if not squares:
            raise ValueError(f"per_example_norms: {net.name} has no parameters")
        return jnp.sqrt(sum(squares))

    return norms


class Seen(NamedTuple):
    """What trace keeps of one layer."""

    grads: Any
    output: Any
    delta: Any

    @property
    def inside(self) -> Any:
        """The factors that it wraps."""
        return self.grads

    def holding(self, factors: Any) -> "Seen":
        """With other factors inside."""
        return self._replace(grads=factors)


def traced(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer that hands out its output and its delta beside its gradients."""

    def forward(params, state, x, ctx):
        y, state, res = layer.forward(params, state, x, ctx)
        return y, state, (y, res)

    def backward(params, res, dy):
        y, res = res
        grads, dx = layer.backward(params, res, dy)
        return Seen(grads, y, dy), dx

    return layer._replace(forward=forward, backward=backward)


def trace(net: Layer, loss: Loss) -> Callable[..., Trace]:
    """Every layer's output and error, by path: (params, state, x, y, ctx=Context()) -> Trace.

        outputs["serial[0].dense(128)"] = y      deltas["serial[0].dense(128)"] = dJ/dy

    What autodiff hides. Under jit, what you do not use of it is not computed.

    Source: the document, section 4.2, its error terms.
    Raises: as backprop.
    """
    check_is("trace", "net", net, Layer)
    run = one_pass(map_layers(traced, map_layers(contracted(total), net)), loss)

    def trace_of(params, state, x, y, ctx=Context()):
        out = run(params, state, x, y, ctx)
        seen = {path: node for path, _, node in leaves(net, out.grads)}
        grads = jax.tree.map(lambda node: node.grads, out.grads, is_leaf=lambda node: isinstance(node, Seen))
        outputs = OrderedDict((path, node.output) for path, node in seen.items())
        deltas = OrderedDict((path, node.delta) for path, node in seen.items())
        grads = conform(grads, params)
        return Trace(out.value, out.state, out.prediction, grads, out.dx, outputs, deltas)

    return trace_of
