"""The generalised Gauss-Newton matrix, by backward passes of the roots of the loss's Hessian."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import check_is, check_size
from fnbp.arrays.placement import placement
from fnbp.backpropagation import backprop
from fnbp.contraction import keep
from fnbp.contractions import second_moment
from fnbp.layer import Context, Layer, mask_behind
from fnbp.losses.loss import Loss, losses_of
from fnbp.statistics.of_opened import only_nets

__all__ = ["fisher", "ggn_diagonal"]

APART = 2**31 - 2  # of the key of the signs from those of layers, which count from 0


@only_nets
def ggn_diagonal(net: Layer, loss: Loss, samples: int | None = None, chunk: int = 16) -> Callable[..., Any]:
    """Make the function of the diagonal of the generalised Gauss-Newton matrix: (params, state, x, y, ctx) -> tree.

        GGN = sum_i J_i^T H_i J_i / m      H_i = sum_k r_ik r_ik^T, the Hessian of the loss by the prediction
        its diagonal = sum_ik (J_i^T r_ik)^2 / m, one backward for each root r_k

    The gradient of the mean loss has the m in it, and so has this. For softmax_cross_entropy and squared errors it is
    the diagonal of the Fisher information, too.

    Options: samples: so many random sums of all roots, sum_k e_k r_k with signs e_k drawn by ctx.key, in place of all
             roots: right in the mean. chunk: how many backwards at once.
    Source:  Martens 2020, arXiv:1412.1193, for the matrix; Dangel, Kunstner & Hennig 2020, arXiv:1912.10985, for its
             diagonal by roots and by sampling.
    Raises:  ValueError if the Hessian of the loss has no roots, or samples come without ctx.key; TypeError, by its
             name, if a layer mixes the examples.
    """
    check_roots("ggn_diagonal", net, loss)
    check_size("ggn_diagonal", "chunk", chunk)
    run = fisher(net, loss, second_moment, samples, chunk)
    return lambda *given: run(*given, mean=True)


@only_nets
def fisher(
    net: Layer, loss: Loss, contract: Any = second_moment, samples: int | None = 1, chunk: int = 16
) -> Callable[..., Any]:
    """Make the function of a contraction of sampled gradients: (params, state, x, y, ctx) -> what contract makes.

        g_i = J_i^T sum_k e_k r_ik      signs e_k drawn by ctx.key, so that the mean of g_i g_i^T is J_i^T H_i J_i

    For softmax_cross_entropy and squared errors that is the Fisher information of the model's own labels: with
    kronecker these are the factors of K-FAC, with second_moment its diagonal.

    Options: contract: any contraction, or a tuple or dict of them; each is the mean over samples. samples: how many;
             None: all K roots one by one, g_i = sqrt(K) J_i^T r_ik, whose mean over them is J_i^T H_i J_i itself.
             chunk: how many backwards at once, of all roots.
    Source:  Martens & Grosse 2015, arXiv:1503.05671, section 5, for sampled gradients in K-FAC; Dangel et al. 2025,
             arXiv:2507.05127, for all roots.
    Raises:  as ggn_diagonal; ValueError if samples are drawn and there is no ctx.key; TypeError for keep.
    """
    check_roots("fisher", net, loss)
    check_size("fisher", "chunk", chunk)
    if samples is not None:
        check_size("fisher", "samples", samples)
    each = contract.values() if isinstance(contract, dict) else contract if isinstance(contract, tuple) else (contract,)
    if keep in each:
        raise TypeError("fisher: keep gives factors, which have no mean over samples; contract them")

    def fisher_of(params, state, x, y, ctx=Context(), mean=False):
        if samples is not None and ctx.key is None:
            raise ValueError("fisher: signs are drawn, so it needs a key: Context(key)")
        given = params, state, x, y, ctx
        found = (
            of_all(net, loss, contract, chunk, *given)
            if samples is None
            else drawn(net, loss, contract, samples, *given)
        )
        return jax.tree.map(lambda a: a / jax.tree.leaves(x)[0].shape[0], found) if mean else found

    return fisher_of


def drawn(net: Layer, loss: Loss, contract: Any, samples: int, *given: Any) -> Any:
    """What contract makes of random sums of all roots: the mean over samples."""

    def of(key: jax.Array) -> Any:
        def backward(res):
            r = assured(loss)(res)
            places = r.shape[: r.ndim - loss.joint]
            signs = jax.random.rademacher(key, places, r.dtype).reshape(*places, *[1] * loss.joint)
            return jnp.sum(signs * r, 0)

        return backprop(net, loss._replace(backward=backward), contract)(*given).grads

    keys = jax.random.split(jax.random.fold_in(given[-1].key, APART), samples)
    return jax.tree.map(lambda a: jnp.mean(a, 0), jax.lax.map(of, keys))


def of_all(net: Layer, loss: Loss, contract: Any, chunk: int, *given: Any) -> Any:
    """What contract makes of each root at each place, times the square root of their number: the mean over them."""
    params, state, x, _, ctx = given
    form = jax.eval_shape(lambda: prediction_of(net, params, state, x, ctx))
    places = form.shape[1 : form.ndim - loss.joint]
    sites = math.prod(places)
    roots = sites * jax.eval_shape(lambda: roots_of(net, loss, *given)).shape[0]

    def of(number: jax.Array) -> Any:
        at = (jnp.arange(sites) == number % sites).reshape(1, *places, *[1] * loss.joint)

        def backward(res):
            r = assured(loss)(res)[number // sites]
            return jnp.where(at, r * math.sqrt(roots), 0).astype(r.dtype)

        return backprop(net, loss._replace(backward=backward), contract)(*given).grads

    sums = jax.eval_shape(of, jnp.zeros((), int))
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)

    def weighed(number: jax.Array) -> Any:
        share = (number < roots) / roots  # 0 for those that fill up the last chunk
        return jax.tree.map(lambda a: a * share.astype(a.dtype), of(number))

    def add(so_far, numbers):
        if chunk == 1:
            return jax.tree.map(jnp.add, so_far, weighed(numbers[0])), None
        return jax.tree.map(lambda a, b: a + b.sum(0), so_far, jax.vmap(weighed)(numbers)), None

    chunk = chunk if placement(x) is None else 1  # JAX does not map convolutions over data on Explicit axes
    steps = -(-roots // chunk)
    return jax.lax.scan(add, start, jnp.arange(steps * chunk).reshape(steps, chunk))[0]


def check_roots(name: str, net: Any, loss: Any) -> None:
    """ValueError unless the Hessian of the loss has roots."""
    check_is(name, "net", net, Layer)
    check_is(name, "loss", loss, Loss)
    if loss.roots is None:
        raise ValueError(
            f"{name}: {loss.name} does not say the roots of its Hessian by the prediction; a loss of your own says "
            "them as Loss(..., roots=...)"
        )


def assured(loss: Loss) -> Callable[..., Any]:
    """roots of a loss that has them."""
    assert loss.roots is not None
    return loss.roots


def prediction_of(net: Layer, params: Any, state: Any, x: Any, ctx: Context) -> Any:
    """y of the net."""
    return net.forward(params, state, x, ctx)[0]


def roots_of(net: Layer, loss: Loss, params: Any, state: Any, x: Any, y: Any, ctx: Context) -> Any:
    """The roots of the loss at the prediction, for their number."""
    return assured(loss)(
        losses_of(loss, prediction_of(net, params, state, x, ctx), y, mask_behind(net, x, ctx.mask))[1]
    )
