"""Backpropagation: forward, loss, backward, and what is made of the factors."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import as_arrays, check_finite, check_is, check_key, describe
from fnbp.arrays.masks import kept
from fnbp.arrays.placement import of_param
from fnbp.arrays.sums import wide
from fnbp.combinators.parts import map_last, tied_leaves
from fnbp.construction import made_of
from fnbp.contraction import (
    Contract,
    beside,
    check_given,
    closed,
    contract_leaf,
    contracted,
    given_to,
    is_open,
    map_given,
)
from fnbp.contractions import sq_norms, total
from fnbp.factor import MIXED, Factor
from fnbp.layer import Around, Context, Layer, drawing, leaves, map_layers, mask_behind, mixing
from fnbp.losses.linear import Scores
from fnbp.losses.loss import Loss, losses_of
from fnbp.sharding import over_model, predicted, sharded

SCORES = "softmax_cross_entropy takes any net"

__all__ = ["Pass", "Trace", "apply", "backprop", "per_example_norms", "trace", "value_and_grad"]


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


def check_batch(x: Any, y: Any, finite: bool = True) -> None:
    """ValueError if the batch is empty, lengths differ, or data are not finite; TypeError if one is not an array."""
    for leaf in jax.tree.leaves((x, y)):
        if not jnp.ndim(leaf):
            raise TypeError(f"backprop: x and y must be arrays with a first axis, the examples; got {describe(leaf)}")
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((x, y))}
    if (0,) in sizes:
        raise ValueError("backprop: a batch of 0 examples has no mean loss")
    if len(sizes) > 1:
        raise ValueError(f"backprop: x and y must have equally many examples, got {sorted(s[0] for s in sizes)}")
    if finite:
        check_finite("backprop", "x", x)
        check_finite("backprop", "y", y)


def backprop(net: Layer, loss: Loss, contract: Contract = total) -> Callable[..., Pass]:
    """Make the backpropagation of a net and a loss: (params, state, x, y, ctx=Context()) -> Pass.

        1  prediction, saved = forward of every layer            2  J = mean of the losses
        3  delta = dJ/dprediction; then, last layer first:  factors, delta = backward(params, saved, delta)
        4  grads = contract of each factor

    contract is a Contraction (fnbp.total, sq_norms, per_example, ...), keep, with_path(f), or a function of a factor; a
    tuple of them: the leaves of grads are then tuples; or a dict: grads is then a dict of trees. total is the gradient
    of J. All others are of each example's own loss, without the 1/m. A pure function: jit it, vmap it, scan over it.
    Positions of the prediction that do not count, by Context.mask or in ragged, are left out of the loss.

    Values that only jit sees cannot raise. There a label, token or length out of range, or batch_norm at inference
    before any training, makes the loss and the gradient NaN.

    Shapes: x (m, ...), y as the loss expects it.
    Source: fnbp/README.md, B1 to B6.
    Raises: ValueError if the batch is empty, targets, params or factors do not fit, and, outside jit, if data are not
            finite; TypeError if a layer mixes the examples, its backward has no factor for that contraction, or there
            is a mask and the loss takes none.
    """
    check_is("backprop", "net", net, Layer)
    check_is("backprop", "loss", loss, Loss)
    if isinstance(contract, dict):
        return by_name(backprop(net, loss, tuple(contract.values())), tuple(contract))

    def make(net, loss=loss):
        return one_pass(map_layers(contracted(contract, tied_leaves(net)), net), loss, contract)

    joined = loss.of_scores if contract is total and made_of(loss) is not None else None
    run = on_devices(net, make, None if joined is None else make(map_last(scores_of(loss), net), joined))

    def backprop_of(params, state, x, y, ctx=Context()):
        if contract is not total and isinstance(ctx, Context) and (path := mixing(net, ctx)):
            raise TypeError(f"{path}: {MIXED}")
        check_given(contract, params)
        done = run(params, state, x, y, ctx)
        if contract is total:
            return done._replace(grads=conform(done.grads, params))
        return done._replace(grads=closed_all(contract, done.grads, params, net.name))

    return backprop_of


def closed_all(contract: Contract, grads: Any, params: Any, name: str) -> Any:
    """The tree of params as the caller sees it; what was left open, since it is tied, is contracted now."""
    tree = jax.tree.structure(params)
    each = map_given(contract, given_to(contract, lambda given: given), tree.flatten_up_to)
    made = []
    for i, (node, param) in enumerate(zip(tree.flatten_up_to(grads), jax.tree.leaves(params), strict=True)):
        own = map_given(contract, each, lambda leaves, i=i: leaves[i])
        done = contract_leaf(contract, node, name, given=own) if isinstance(node, Factor) else node
        made.append(jax.tree.map(lambda one, param=param: closed(one, param), done, is_leaf=is_open))
    return jax.tree.unflatten(tree, made)


def by_name(run: Callable[..., Pass], names: tuple[str, ...]) -> Callable[..., Pass]:
    """A pass whose grads are a tree of params for each name, of one whose leaves are tuples in that order."""

    def named_of(params, *args, **options):
        done = run(params, *args, **options)
        leaves, tree = jax.tree.structure(params).flatten_up_to(done.grads), jax.tree.structure(params)
        trees = (jax.tree.unflatten(tree, [leaf[i] for leaf in leaves]) for i in range(len(names)))
        return done._replace(grads=dict(zip(names, trees, strict=True)))

    return named_of


def scores_of(loss: Loss) -> Callable[[str, Layer], Layer]:
    """For map_last: the layer that hands on its x, W and b. TypeError if it is no dense layer as it was made."""

    def handing_on(path: str, layer: Layer) -> Layer:
        if layer.traits.scores is None:
            raise TypeError(f"{loss.name}: the net must end in fnbp.dense, it ends in {path}; {SCORES}")
        if made_of(layer) is None:
            raise TypeError(f"{loss.name} does not call the functions of {path}, which were replaced; {SCORES}")
        return layer.traits.scores

    return handing_on


def on_devices(net: Layer, make: Callable[[Layer], Callable[..., Any]], plain: Any = None) -> Callable[..., Any]:
    """make(net), a pass, or plain; for params that are split over devices, of the net that keeps to their places."""
    plain = make(net) if plain is None else plain

    def run(params, *args):
        here = sharded(net, params)
        return over_model(plain if here is net else make(here), params, *args)

    return run


def one_pass(net: Layer, loss: Loss, contract: Contract = total) -> Callable[..., Pass]:
    """Forward, loss, backward: (params, state, x, y, ctx=Context()) -> Pass, with grads as net gives them.

    contract: what the net contracts by, and is given something for.
    """
    check_is("backprop", "loss", loss, Loss)

    def run(params, state, x, y, ctx=Context()):
        check_batch(x, y, finite=not net.traits.opened)
        check_is("backprop", "ctx", ctx, Context)
        if ctx.key is not None:
            check_key("backprop", ctx.key)
        params, x, y = (as_arrays("backprop", what, a) for what, a in (("params", params), ("x", x), ("y", y)))
        prediction, state, res = net.forward(params, state, x, ctx)
        mask = mask_behind(net, x, ctx.mask)
        losses, loss_res = losses_of(loss, prediction, y, mask)
        delta = mean_delta(loss.backward(loss_res), losses.shape[0])
        grads, dx = net.backward(beside(contract, net, params), res, delta)
        prediction = kept(mask, prediction.formed()) if isinstance(prediction, Scores) else prediction
        return Pass(jnp.mean(losses), state, prediction, grads, dx)

    return run


def mean_delta(dlosses: Any, m: int) -> Any:
    """Turn the cotangent of the summed loss into that of the mean over m examples."""
    return jax.tree.map(lambda d: (wide(d) / m).astype(d.dtype), dlosses)


def conform(grads: Any, params: Any) -> Any:
    """Gradients in the dtypes of params, as jax.grad has them; ValueError if tree or shapes differ from params'."""
    if jax.tree.structure(grads) != jax.tree.structure(params):
        raise ValueError(f"backward returns {jax.tree.structure(grads)}, params are {jax.tree.structure(params)}")
    for (where, g), p in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        if g.shape != jnp.shape(p):
            path = jax.tree_util.keystr(where)
            raise ValueError(f"params{path} has shape {jnp.shape(p)}, its gradient {g.shape}: is its backward wrong?")
    return jax.tree.map(of_param, grads, params)


def value_and_grad(net: Layer, loss: Loss) -> Callable[..., Any]:
    """Make the function of J and its gradient: (params, state, x, y, ctx=Context()) -> (value, state), grads.

    The shape of jax.value_and_grad with has_aux=True, so that it drops into any training step. A step that trains
    passes Context(key, train=True), with another key each time: a UserWarning says so if the net draws and ctx does not
    train.

    Raises: as backprop.
    """
    run = backprop(net, loss)

    def value_and_grad_of(params, state, x, y, ctx=Context()):
        check_training(net, ctx)
        out = run(params, state, x, y, ctx)
        return (out.value, out.state), out.grads

    return value_and_grad_of


def check_training(net: Layer, ctx: Context) -> None:
    """A UserWarning if the net draws in training and this context does not train."""
    if isinstance(ctx, Context) and not ctx.train and (path := drawing(net)):
        warnings.warn(
            f"value_and_grad: {path} draws only in training, and this context is one of inference; a training step "
            "passes fnbp.Context(key, train=True)",
            stacklevel=3,
        )


def apply(net: Layer, params: Any, state: Any, x: Any, ctx: Context = Context()) -> Any:
    """Predict: y of the forward of a net, without the new state and what a backward needs.

    By default as at inference: nothing is drawn, and batch_norm uses its running statistics.

    Raises: TypeError if net is not a Layer, or ctx is not a Context; ValueError or TypeError as the forward of the net.
    """
    check_is("apply", "net", net, Layer)
    check_is("apply", "ctx", ctx, Context)
    params, x = as_arrays("apply", "params", params), as_arrays("apply", "x", x)
    return predicted(net, params, state, x, ctx)


def per_example_norms(net: Layer, loss: Loss) -> Callable[..., jax.Array]:
    """Make the function of each example's gradient norm: (params, state, x, y, ctx=Context()) -> (m,).

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorded(Around):
    """What trace keeps of one layer."""

    grads: Any
    output: Any
    delta: Any

    @property
    def inside(self) -> Any:
        """The factors that it wraps."""
        return self.grads

    def holding(self, factors: Any) -> "Recorded":
        """With other factors inside."""
        return replace(self, grads=factors)


def traced(path: str, layer: Layer) -> Layer:
    """For map_layers: a layer that hands out its output and its delta beside its gradients."""

    def forward(params, state, x, ctx):
        y, state, res = layer.forward(params, state, x, ctx)
        return y, state, (y, res)

    def backward(params, res, dy):
        y, res = res
        grads, dx = layer.backward(params, res, dy)
        return Recorded(grads, y, dy), dx

    return layer._replace(forward=forward, backward=backward)


def trace(net: Layer, loss: Loss) -> Callable[..., Trace]:
    """Make a pass that returns every layer's output and error: (params, state, x, y, ctx=Context()) -> Trace.

        outputs["serial[0].dense(128)"] = y      deltas["serial[0].dense(128)"] = dJ/dy

    What autodiff hides. Under jit, what you do not use of it is not computed.

    Source: fnbp/README.md, B3 to B5.
    Raises: as backprop.
    """
    check_is("trace", "net", net, Layer)

    def recording(net):
        run = one_pass(map_layers(traced, map_layers(contracted(total), net)), loss)

        def record(params, state, x, y, ctx):
            out = run(params, state, x, y, ctx)
            seen = {path: node for path, _, node in leaves(net, out.grads)}
            grads = jax.tree.map(lambda node: node.grads, out.grads, is_leaf=lambda node: isinstance(node, Recorded))
            outputs = OrderedDict((path, node.output) for path, node in seen.items())
            deltas = OrderedDict((path, node.delta) for path, node in seen.items())
            return Trace(out.value, out.state, out.prediction, grads, out.dx, outputs, deltas)

        return record

    run = on_devices(net, recording)

    def trace_of(params, state, x, y, ctx=Context()):
        out = run(params, state, x, y, ctx)
        return out._replace(grads=conform(out.grads, params))

    return trace_of
