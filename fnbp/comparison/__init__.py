"""Is the backward right, and what does it cost? The manual backward beside jax.vjp of the same forward."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fnbp.backpropagation import value_and_grad
from fnbp.comparison.functions import plan_of_function
from fnbp.comparison.nets import plan_of_net
from fnbp.comparison.plan import check_for_function, check_for_layer, options_of
from fnbp.comparison.report import Report, report_of
from fnbp.interop import automatic_value_and_grad
from fnbp.layer import Context, Layer
from fnbp.losses.loss import Loss
from fnbp.measurement import Cost, versus

__all__ = ["Report", "compare", "cost"]


def compare(
    subject: Layer | Callable,
    *args: Any,
    params: Any = None,
    state: Any = None,
    ctx: Context = Context(),
    loss: Loss | None = None,
    y: Any = None,
    key: jax.Array | None = None,
    reference: Callable | None = None,
    vjp: Callable | None = None,
    sizes: Callable[[int], tuple] | None = None,
    domain: Callable[..., Any] | None = None,
    name: str | None = None,
    level: str = "full",
    probes: Sequence[str] | None = None,
    transforms: Sequence[str] | None = None,
    limit: float | None = 60.0,
    cost: bool = False,
) -> Report:
    """Compare a manual backward with jax.vjp: is it right, and if not, where, and what may the mistake be?

        compare(net, x)                                   a Layer, each of its layers by itself, and the whole pass
        compare(net, x, params=params, loss=loss, y=y)    the same at given params, under a loss
        compare(custom, *args)                            a jax.custom_vjp, against its own primal function
        compare(custom, *args, reference=plain)           the same, against another function
        compare(f, *args, vjp=backward)                   backward(args, cotangent) -> cotangents of args, a tuple

    There is no tolerance to tune. A leaf is wrong if its error in float64 is more than 64 times what rounding explains,
    z = (|m64 - a64| / |a64|) / (2^-53 n / 2^-24) with n = |a32 - a64| / |a64|, m manual and a automatic. In the dtype
    of the arguments it must be about as accurate as autodiff. Each layer is tried at the given point, at draws around
    it, at other values of x, params and state, at other cotangents, contexts and sizes (probes); under jit, vmap and on
    all devices (transforms); and what its factors make of each example is compared too. Differences of the forward
    check autodiff itself. What is not given is drawn from key: params, moved off their initial
    zeros and ones, and cotangents.

    Options: level: "quick", formulas at a few probes; "full"; or "deep", with more draws, probes in pairs, and random
             programs around the backward. probes and transforms name those to try in the place of the level's; the
             transforms "programs" and "second_order", the backward's own derivative, are tried on request too.
             sizes: for a function, n -> its arguments at size n, so that other sizes are tried.
             domain: for a function, args -> True where it is defined; probes outside are not tried, and a note says so.
             limit: the seconds that one call may take; at a probe, what does not end is left behind, and noted.
             name: of a function, in the report. cost: time and memory of both sides too, as ratios.

    Raises: ValueError for a subject that is random, endless, not finite, or has only integer arguments, for a loss
            without y, and for an unknown name; TypeError if subject is neither a Layer nor a function, and for a
            function without vjp and reference.
    """
    from fnbp.comparison.alone import compare_each  # here, for the time that `import fnbp` takes

    key = jax.random.key(0) if key is None else key
    options = options_of(level, probes, transforms, key, limit, cost)
    if isinstance(subject, Layer):
        check_for_layer(args, ctx, {"reference": reference, "vjp": vjp, "sizes": sizes, "domain": domain, "name": name})
        plan = plan_of_net(subject, args[0], params, state, ctx, loss, y, key, options.rng, options.quick)
    else:
        check_for_function({"params": params, "state": state, "loss": loss, "y": y}, ctx)
        plan = plan_of_function(subject, args, reference, vjp, sizes, name, domain)
    found = compare_each(plan.subjects, options)  # of each: probes, four gradients, noise, verdict -> rows
    return report_of(plan.rows_of([row for one in found for row in one.rows]), found, options.transforms, plan.notes)


def cost(
    net: Layer,
    loss: Loss,
    params: Any,
    state: Any,
    x: Any,
    y: Any,
    ctx: Context = Context(),
    *,
    samples: int = 100,
    compiles: int = 3,
) -> Cost:
    """Measure time, temporary memory, FLOPs and compile time of fnbp.value_and_grad and of jax.value_and_grad.

    Both take the gradient of the same forward, and both are compiled and warmed up. Their samples take turns, and the
    time ratio is the median of the pairwise ratios.

    samples    how many times each is timed
    compiles   how many times each is compiled

    Raises: ValueError if samples or compiles is below 1; what fnbp.value_and_grad raises.
    """
    return versus(
        value_and_grad(net, loss), automatic_value_and_grad(net, loss), (params, state, x, y, ctx), samples, compiles
    )
