"""Optimizers that precondition the gradient by Kronecker factors: K-FAC, its eigenbasis, and descent on neurons."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnbp.arrays.checks import check_is, check_number, check_positive, check_size, describe
from fnbp.arrays.sums import wide
from fnbp.backpropagation import backprop
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.pairs import kronecker, second_moment_in
from fnbp.statistics.curvature import check_roots, fisher
from fnbp.statistics.kroneckers import (
    applied,
    bases_of,
    corrected,
    damped_inverse,
    divided,
    input_inverse,
    mapped,
    moved,
    zeros,
)
from fnbp.statistics.of_opened import only_nets

__all__ = ["ekfac", "foof", "kfac"]

Schedule = float | Callable[[Any], Any]
Optimizer = optax.GradientTransformationExtraArgs


class Options(NamedTuple):
    """What the optimizers have in common."""

    damping: float
    interval: int
    decay: float
    momentum: float
    clip: float | None


class Inverses(NamedTuple):
    """The state of kfac and of foof: trees of params, for each parameter a KroneckerPair.

    step      how many updates there were
    averages  the moving averages of A and G, not corrected for their start at 0
    inverses  the damped inverses of the corrected averages
    """

    step: jax.Array
    averages: Any
    inverses: Any


class Eigen(NamedTuple):
    """The state of ekfac.

    step      how many updates there were
    averages  as those of kfac
    bases     the eigenvectors of the averages, a KroneckerPair for each parameter
    squares   the moving averages of the second moments in these bases, (n_out, n_in), not corrected
    """

    step: jax.Array
    averages: Any
    bases: Any
    squares: Any


@only_nets
def kfac(
    net: Layer,
    loss: Loss,
    x: Any,
    y: Any,
    learning_rate: Schedule,
    damping: float = 1e-3,
    interval: int = 10,
    decay: float = 0.95,
    reduce: str = "expand",
    samples: int | None = 1,
    momentum: float = 0.9,
    clip: float | None = 1e-3,
) -> Optimizer:
    """Make the optimizer K-FAC, for optax and for fit: the gradient dW of each parameter between two inverses.

        A, G  = moving averages of the pairs of fisher(net, loss, kronecker(reduce), samples), every interval steps
        V     = (G + sqrt(damping) / pi)^-1 dW (A + pi sqrt(damping))^-1      pi^2 = (tr A / n_in) / (tr G / n_out)
        M     = momentum M + V      W := W - learning_rate M

    An average begins at 0 and is divided by 1 - decay^t after t estimates. A step between two estimates costs two
    products of matrices for each parameter more than one of SGD. kronecker says what A and G are of a bias, an
    embedding, and what has no matrix.

    fit gives the batch to update. In a step of your own:
    optimizer.update(grads, opt_state, params, batch=(state, x, y, ctx)), what value_and_grad was given.

    Options: x, y: data, or jax.ShapeDtypeStructs: only their form is used, to say the shapes of the state.
             learning_rate: a number, or a schedule of optax. samples: as of fisher; None takes all roots and needs no
             key. clip: V is scaled down to c V so that (c learning_rate)^2 <V, dW>, the sum over all parameters, is
             at most that; None: never. It and damping are in units of the loss.
    Source:  Martens & Grosse 2015, arXiv:1503.05671, section 6.3 for pi; Eschenhagen et al. 2023, arXiv:2311.00636,
             for reduce; Ba, Grosse & Martens 2017, ICLR, Distributed Second-Order Optimization, for clip.
    Raises:  ValueError if an option is out of range, the loss has no roots, params do not belong to the net, or update
             gets no batch or no ctx.key; TypeError, by its name, if a layer mixes the examples. Estimates that are not
             finite make this update and all later ones NaN, and fit stops and says so; with damping 0, so does an A or
             G without an inverse.
    """
    check_roots("kfac", net, loss)
    options = checked("kfac", learning_rate, damping, interval, decay, momentum, clip)
    estimate = estimate_of("kfac", net, kronecker(reduce), samples)

    def inverse(pair: Any) -> Any:
        return damped_inverse(pair, options.damping)

    made = by_inverses("kfac", net, loss, (x, y), learning_rate, options, estimate, inverse)
    return finished(made, learning_rate, options)


@only_nets
def foof(
    net: Layer,
    loss: Loss,
    x: Any,
    y: Any,
    learning_rate: Schedule,
    damping: float = 1e-3,
    interval: int = 10,
    decay: float = 0.95,
    reduce: str = "expand",
    momentum: float = 0.9,
    clip: float | None = 1e-3,
) -> Optimizer:
    """Make the optimizer FOOF, gradient descent on neurons: K-FAC with G = 1.

        V = dW (A + damping)^-1      M = momentum M + V      W := W - learning_rate M

    A is what goes into a layer, so any loss will do, no sign is drawn, and an estimate costs no backward. What has
    A = 1, a bias for example, has V = dW / (1 + damping).

    Options: as of kfac.
    Source:  Benzing 2022, arXiv:2201.12250.
    Raises:  as kfac, but for roots and ctx.key.
    """
    check_is("foof", "net", net, Layer)
    check_is("foof", "loss", loss, Loss)
    options = checked("foof", learning_rate, damping, interval, decay, momentum, clip)
    contract = kronecker(reduce)

    def estimate(loss: Loss, params: Any, batch: tuple) -> Any:
        return mapped(lambda pair: replace(pair, G=None), backprop(net, loss, contract)(params, *batch).grads)

    def inverse(pair: Any) -> Any:
        return input_inverse(pair, options.damping)

    made = by_inverses("foof", net, loss, (x, y), learning_rate, options, estimate, inverse)
    return finished(made, learning_rate, options)


@only_nets
def ekfac(
    net: Layer,
    loss: Loss,
    x: Any,
    y: Any,
    learning_rate: Schedule,
    damping: float = 1e-3,
    interval: int = 10,
    decay: float = 0.95,
    reduce: str = "expand",
    samples: int | None = 1,
    momentum: float = 0.9,
    clip: float | None = 1e-3,
) -> Optimizer:
    """Make the optimizer EKFAC: K-FAC whose eigenvalues are measured, in the eigenbasis of its factors.

        G = U_G diag U_G^T      A = U_A diag U_A^T      of the moving averages of kfac, every interval steps
        s = moving average of mean_i (U_G^T g_i U_A)^2, every step, over the steps since the bases are these
        V = U_G ((U_G^T dW U_A) / (s + damping)) U_A^T      M = momentum M + V      W := W - learning_rate M

    g_i is the sampled gradient of example i, as of fisher: one more forward and backward in every step.

    Options: as of kfac.
    Source:  George et al. 2018, arXiv:1806.03884.
    Raises:  as kfac.
    """
    check_roots("ekfac", net, loss)
    options = checked("ekfac", learning_rate, damping, interval, decay, momentum, clip)
    made = by_eigenbases(net, loss, (x, y), learning_rate, options, kronecker(reduce), samples)
    return finished(made, learning_rate, options)


def estimate_of(name: str, net: Layer, contract: Any, samples: Any) -> Callable[..., Any]:
    """The function (loss, params, batch) -> what contract makes, as of fisher. samples: a number, or None."""
    if samples is not None:
        check_size(name, "samples", samples)

    def estimate(loss: Loss, params: Any, batch: tuple) -> Any:
        if samples is not None and batch[-1].key is None:
            raise ValueError(
                f"{name}: signs are drawn, so the ctx of batch=(state, x, y, ctx) needs a key: Context(key, train=True)"
            )
        return fisher(net, loss, contract, samples)(params, *batch)

    return estimate


def by_eigenbases(
    net: Layer,
    loss: Loss,
    data: tuple[Any, Any],
    learning_rate: Schedule,
    options: Options,
    contract: Any,
    samples: int | None,
) -> Optimizer:
    """The transformation U_G ((U_G^T dW U_A) / (s + damping)) U_A^T."""
    estimate = estimate_of("ekfac", net, contract, samples)

    def squares_of(loss: Loss, params: Any, batch: tuple, bases: Any) -> Any:
        return fisher(net, loss, second_moment_in(bases), samples)(params, *batch, mean=True)

    forms = forms_of("ekfac", net, loss, data, estimate)

    def init(params: Any) -> Eigen:
        pairs = forms(params)
        squares = mapped(lambda pair, p: jnp.zeros(pair.matrix(p).shape, pair.G.dtype), zeros(pairs), params)
        return Eigen(jnp.zeros((), jnp.int32), zeros(pairs), zeros(pairs), squares)

    def update(
        grads: Any, state: Eigen, params: Any = None, *, batch: Any = None, loss: Loss = loss, **extra: Any
    ) -> tuple[Any, Eigen]:
        check_update("ekfac", grads, state.averages, params, batch)
        since = state.step % options.interval

        def estimated(averages: Any, bases: Any, squares: Any) -> tuple[Any, Any, Any]:
            averages = moved(averages, estimate(loss, params, batch), options.decay)
            due = corrected(averages, state.step // options.interval + 1, options.decay)
            return averages, mapped(bases_of, due), jax.tree.map(jnp.zeros_like, squares)

        averages, bases, squares = jax.lax.cond(since == 0, estimated, lambda *kept: kept, *state[1:])
        squares = moved(squares, squares_of(loss, params, batch, bases), options.decay)
        due = corrected(squares, since + 1, options.decay)
        made = mapped(lambda pair, s, g: divided(pair, s + options.damping, g), bases, due, grads)
        made = clipped_to(options.clip, made, grads, learning_rate, state.step)
        return made, Eigen(jnp.asarray(optax.safe_increment(state.step)), averages, bases, squares)

    return Optimizer(init, update)  # pyright: ignore[reportArgumentType] (its extra arguments have names)


def by_inverses(
    name: str,
    net: Layer,
    loss: Loss,
    data: tuple[Any, Any],
    learning_rate: Schedule,
    options: Options,
    estimate: Callable[..., Any],
    inverse: Callable[[Any], Any],
) -> Optimizer:
    """The transformation G^-1 dW A^-1. estimate: (loss, params, batch) -> pairs; inverse: of an average, damped."""
    forms = forms_of(name, net, loss, data, estimate)

    def init(params: Any) -> Inverses:
        pairs = forms(params)
        return Inverses(jnp.zeros((), jnp.int32), zeros(pairs), zeros(pairs))

    def update(
        grads: Any, state: Inverses, params: Any = None, *, batch: Any = None, loss: Loss = loss, **extra: Any
    ) -> tuple[Any, Inverses]:
        check_update(name, grads, state.averages, params, batch)

        def estimated(averages: Any, inverses: Any) -> tuple[Any, Any]:
            averages = moved(averages, estimate(loss, params, batch), options.decay)
            due = corrected(averages, state.step // options.interval + 1, options.decay)
            return averages, mapped(inverse, due)

        now = state.step % options.interval == 0
        averages, inverses = jax.lax.cond(now, estimated, lambda *kept: kept, *state[1:])
        made = clipped_to(options.clip, mapped(applied, inverses, grads), grads, learning_rate, state.step)
        return made, Inverses(jnp.asarray(optax.safe_increment(state.step)), averages, inverses)

    return Optimizer(init, update)  # pyright: ignore[reportArgumentType] (its extra arguments have names)


def finished(scale: Optimizer, learning_rate: Schedule, options: Options) -> Optimizer:
    """What scale makes of the gradient, with momentum, times -learning_rate."""
    moving = [optax.trace(options.momentum)] if options.momentum else []
    return optax.chain(scale, *moving, optax.scale_by_learning_rate(learning_rate))


def clipped_to(most: float | None, made: Any, grads: Any, learning_rate: Schedule, step: jax.Array) -> Any:
    """c made, so that (c learning_rate)^2 <made, grads> is at most that."""
    if most is None:
        return made
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    products = jax.tree.map(lambda v, g: jnp.sum(wide(v) * wide(g)), made, grads)
    size = rate**2 * sum(jax.tree.leaves(products))
    scale = jnp.sqrt(most / jnp.maximum(size, most))
    return jax.tree.map(lambda v: v * scale.astype(v.dtype), made)


def forms_of(
    name: str, net: Layer, loss: Loss, data: tuple[Any, Any], estimate: Callable[..., Any]
) -> Callable[[Any], Any]:
    """params -> shapes and dtypes of what estimate gives. ValueError if params do not belong to the net."""
    x, y = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), data)

    def of(params: Any) -> Any:
        key = jax.eval_shape(lambda: jax.random.key(0))
        due, state = jax.eval_shape(net.init, key, x)
        check_tree(name, "params", params, due)
        ctx = Context(key, train=True)
        return jax.eval_shape(lambda params, *batch: estimate(loss, params, batch), params, state, x, y, ctx)

    return of


def checked(name: str, rate: Any, damping: Any, interval: Any, decay: Any, momentum: Any, clip: Any) -> Options:
    """The options. ValueError or TypeError if one is out of range."""
    if not callable(rate) and not isinstance(rate, jax.Array):
        check_number(name, "learning_rate", rate)
    damping = check_number(name, "damping", damping)
    if damping < 0:
        raise ValueError(f"{name}: damping must be at least 0, got {damping}")
    check_size(name, "interval", interval)
    for what, value in (("decay", decay), ("momentum", momentum)):
        if not 0 <= check_number(name, what, value) < 1:
            raise ValueError(f"{name}: {what} must be in [0, 1), got {value}")
    clip = None if clip is None else check_positive(name, "clip", clip)
    return Options(damping, interval, float(decay), float(momentum), clip)


def check_update(name: str, grads: Any, averages: Any, params: Any, batch: Any) -> None:
    """ValueError or TypeError unless update was given what it needs."""
    if batch is None or params is None:
        raise ValueError(
            f"{name}: update estimates the curvature, so it needs params and the batch: optimizer.update(grads, "
            "opt_state, params, batch=(state, x, y, ctx)), what value_and_grad was given; fnbp.fit passes them itself"
        )
    if not isinstance(batch, tuple) or len(batch) != 4 or not isinstance(batch[-1], Context):
        raise TypeError(f"{name}: batch must be (state, x, y, ctx) with ctx a Context, got {describe(batch)}")
    tree = jax.tree.structure(params)
    if jax.tree.structure(grads) != tree or jax.tree.structure(mapped(lambda pair: 0, averages)) != tree:
        raise ValueError(
            f"{name}: params, grads and the optimizer's state must belong to the same net; params are {tree}, grads "
            f"{jax.tree.structure(grads)}"
        )


def check_tree(name: str, what: str, tree: Any, due: Any) -> None:
    """ValueError unless a tree has the structure and the shapes of the params of the net."""
    came = [jnp.shape(a) for a in jax.tree.leaves(tree)]
    if jax.tree.structure(tree) != jax.tree.structure(due) or came != [a.shape for a in jax.tree.leaves(due)]:
        forms = [jax.tree.map(lambda a: list(jnp.shape(a)), one) for one in (due, tree)]
        raise ValueError(f"{name}: {what} do not belong to the net: expected {forms[0]}, got {forms[1]}")
