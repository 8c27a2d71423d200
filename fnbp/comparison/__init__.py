"""Is the backward right? Every layer's manual backward beside jax.vjp of its forward, judged by its own noise."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_finite, check_floating, check_is, check_key, describe
from fnbp.comparison.alone import Judged, Options, judge, prepare
from fnbp.comparison.numerics import HAVE_FLOAT64, cast, compiled_or_plain, first_line, is_floating, on_device, on_host
from fnbp.comparison.probes import PROBES, moved
from fnbp.comparison.report import Report, Row
from fnbp.comparison.subject import Unit, unit_of_function, unit_of_layer, unit_of_loss
from fnbp.comparison.transforms import TRANSFORMS
from fnbp.comparison.whole_pass import Whole, first_deltas
from fnbp.layer import Context, Layer, checked, map_layers, mask_behind
from fnbp.losses.loss import Loss, check_target, losses_of

__all__ = ["Report", "compare"]

float0 = jax.dtypes.float0
DRAWS = ("given", "another", "nearby", "another", "another", "nearby")
EXTREMES = tuple(name for name in PROBES if name not in DRAWS)


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
    probes: Sequence[str] = DRAWS + EXTREMES,
    transforms: Sequence[str] = tuple(TRANSFORMS),
) -> Report:
    """A manual backward against jax.vjp: right or wrong, and if wrong where, and what the mistake may be.

        compare(net, x)                                   a Layer, each of its layers alone, and the whole pass
        compare(net, x, params=params, loss=loss, y=y)    the same at given params, under a loss
        compare(custom, *args, reference=plain)           a jax.custom_vjp, against a plain function
        compare(f, *args, vjp=backward)                   backward(args, cotangent) -> cotangents of args, a tuple

    No tolerance: a leaf is wrong where its error in float64 is 64 times the rounding noise that its own conditioning
    allows, z = (|m64 - a64| / |a64|) / (2^-53 n / 2^-24) with n = |a32 - a64| / |a64|, m manual and a automatic. In the
    dtype of the arguments it must be about as accurate as autodiff. Each unit is tried at the given point, at draws
    around it, and at zeros, ties, large values, a batch and a length of 1, full masks, and other sizes (PROBES); and
    under jit, vmap and on all devices (TRANSFORMS). Differences of the forward are the third witness.

    What is not given is drawn from key: params (moved off their initial zeros and ones) and cotangents.

    Raises: ValueError for non-finite, random or integer-only subjects, a loss without y, an unknown probe; TypeError
            for what is neither a Layer nor a function, and for a function without vjp and reference.
    """
    check_names("probe", probes, PROBES)
    check_names("transform", transforms, TRANSFORMS)
    key = jax.random.key(0) if key is None else key
    check_key("compare", key)
    seed = np.asarray(jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key)
    options = Options(tuple(probes), tuple(transforms), np.random.default_rng(seed.ravel().tolist()))
    if isinstance(subject, Layer):
        if reference is not None or vjp is not None:
            raise TypeError("compare: reference= and vjp= go with a function; a Layer has its backward in it")
        if len(args) != 1:
            raise TypeError(f"compare: a Layer is compared at one x, got {len(args)} positional arguments")
        return compare_net(subject, args[0], params, state, ctx, loss, y, key, options)
    of_layers = {"params": params, "state": state, "loss": loss, "y": y}
    for name, value in of_layers.items():
        if value is not None:
            raise TypeError(f"compare: {name}= goes with a Layer; a function takes all that it needs as arguments")
    return compare_function(subject, args, reference, vjp, options)


def check_names(what: str, names: Sequence[str], table: dict[str, Any]) -> None:
    """ValueError for a name that is not in the table."""
    for name in names:
        if name not in table:
            raise ValueError(f"compare: unknown {what} {name!r}; there are: {', '.join(table)}")
    if what == "probe" and list(names[:1]) != ["given"]:
        raise ValueError("compare: the first probe must be 'given', the point that all others start from")


# --- functions ---


def compare_function(f: Any, args: tuple, reference: Any, vjp: Any, options: Options) -> Report:
    """Ways (b) and (c)."""
    if isinstance(f, type) or not callable(f):
        raise TypeError(f"compare: a Layer or a function is due, got {describe(f)}")
    name = getattr(f, "__name__", type(f).__name__)
    if getattr(f, "__module__", "").startswith("fnbp.layers"):
        raise TypeError(f"compare: {name} makes a layer; call it: {name}()")
    if (reference is None) == (vjp is None):
        raise TypeError(
            f"compare: {name} has no backward to compare: give reference=plain for a jax.custom_vjp, or "
            "vjp=backward, backward(args, cotangent) -> cotangents of args (one of the two)"
        )
    check_arrays(name, args)
    args = on_host(args)
    for i, leaf in enumerate(jax.tree.leaves(args)):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"compare: leaf {i} of the arguments of {name} is {describe(leaf)}: close over it instead")
    if not any(is_floating(a) for a in jax.tree.leaves(args)):
        raise ValueError(
            f"compare: {name} has no floating point argument to differentiate, got "
            f"{', '.join(describe(a) for a in jax.tree.leaves(args)) or 'none'}"
        )
    check_finite("compare", f"the arguments of {name}", args)
    unit = unit_of_function(f, args, reference, vjp)
    rows = compare_forwards(unit, args) if reference is not None else []
    check_differentiable(unit, args)
    judged = [judge(one, options) for one in prepare([unit], options)] if not rows else []
    return report_of(judged, rows, options)


def check_arrays(name: str, args: tuple) -> None:
    """TypeError for a list of numbers, which JAX takes for a tree of scalars."""
    for arg in args:
        if (
            isinstance(arg, (list, tuple))
            and arg
            and all(isinstance(leaf, (int, float)) for leaf in jax.tree.leaves(arg))
        ):
            raise TypeError(
                f"compare: {name} is given a {type(arg).__name__} of numbers; give an array: jnp.asarray(...)"
            )


def check_differentiable(unit: Unit, args: tuple) -> None:
    """TypeError where jax.vjp can make nothing of the reference, or it returns nothing to differentiate."""

    def pulled(*args):
        y, pull = jax.vjp(lambda *a: unit.reference(a, unit.fixed), *args)
        zeros = [
            jnp.zeros(a.shape, a.dtype) if is_floating(a) else np.zeros(a.shape, float0) for a in jax.tree.leaves(y)
        ]
        return [d for d in jax.tree.leaves(pull(jax.tree.unflatten(jax.tree.structure(y), zeros))) if is_floating(d)]

    y = jax.eval_shape(lambda *args: unit.reference(args, unit.fixed), *args)
    if not any(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(y)):
        found = ", ".join(describe(a) for a in jax.tree.leaves(y)) or "nothing"
        raise TypeError(f"compare: {unit.path} must return a floating point array to be differentiated, got {found}")
    try:
        jax.eval_shape(pulled, *args)
    except Exception as error:
        raise TypeError(
            f"compare: jax.vjp cannot differentiate {unit.path}, so there is nothing to compare with: "
            f"{first_line(error)}"
        ) from error


def compare_forwards(unit: Unit, args: tuple) -> list[Row]:
    """A row of kind "forward" where a custom_vjp and its reference return different values."""
    shapes = [jax.eval_shape(lambda *a, f=f: f(a, unit.fixed), *args) for f in (unit.forward, unit.reference)]
    ours, theirs = ([(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in shapes)
    if ours != theirs or jax.tree.structure(shapes[0]) != jax.tree.structure(shapes[1]):
        text = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in side) for side in (ours, theirs)]
        raise ValueError(f"compare: {unit.path} returns {text[0]}, its reference {text[1]}; they must be alike")
    rows = []
    y, due = (jax.tree.leaves(f(cast(args, None), unit.fixed)) for f in (unit.forward, unit.reference))
    for i, (a, b) in enumerate(zip(y, due, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        eps = float(jnp.finfo(y[i].dtype).eps) if is_floating(y[i]) else 0.0
        apart = float(np.max(abs(a - b), initial=0)) / (float(np.max(abs(b), initial=0)) or 1.0)
        if apart > 1e3 * eps:
            index = tuple(int(n) for n in np.unravel_index(np.argmax(abs(a - b)), a.shape))
            hint = f"the functions themselves differ by {apart:.1e}: the reference is of another function"
            spot = {"index": index, "manual": float(a[index]), "automatic": float(b[index])}
            leaf = "y" if len(y) == 1 else f"y[{i}]"
            rows.append(Row(unit.path, leaf, a.shape, str(y[i].dtype), "forward", error=apart, hint=hint, **spot))
    return rows


# --- nets ---


def compare_net(net, x, params, state, ctx, loss, y, key, options: Options) -> Report:
    """Way (a)."""
    if loss is not None:
        check_is("compare", "loss", loss, Loss)
    if (loss is None) != (y is None):
        raise ValueError("compare: a loss needs y, and y a loss")
    check_arrays(net.name, (x, y))
    x, y = on_host((x, y))
    check_finite("compare", "x", x)
    drawn = on_host(compiled_or_plain(net.init, key, x)) if params is None or state is None else (None, None)
    params = moved(drawn[0], options.rng) if params is None else on_host(params)
    state = drawn[1] if state is None else on_host(state)
    ctx = on_host(ctx)
    check_finite("compare", "params", params)
    forward = map_layers(checked, net).forward
    prediction = on_host(compiled_or_plain(lambda *args: forward(*args)[0], params, state, x, ctx))
    check_floating("compare", f"what {net.name} returns", prediction)
    check_finite("compare", f"what {net.name} returns", prediction)
    units, mask = [], None
    if loss is not None:
        mask = on_host(mask_behind(net, x, ctx.mask))
        check_target(loss, *on_device((prediction, y, mask)))
        jax.eval_shape(partial(losses_of, loss), prediction, y, mask)
        units.append(unit_of_loss(loss, prediction, y, mask))
    deltas = first_deltas(prediction, loss, mask, options.rng)
    whole = Whole(net, params, state, x, ctx, y, prediction, deltas)
    units = [
        unit_of_layer(path, layer, (s.params, s.x), (s.state, s.ctx), s.dy) for path, layer, s in whole.nodes
    ] + units
    judged = [judge(one, options) for one in prepare(units, options)]
    joints = {path for path, layer, _ in whole.nodes if layer.parts}
    rows = [row for one in judged for row in whole.beside(one.rows)]
    rows = [row for row in rows if row.path not in joints or row.leaf == "x" or not row.ok]
    if all(row.ok for row in rows):
        rows = whole.blame(rows)
    return report_of(judged, rows, options)


def report_of(judged: list[Judged], rows: list[Row], options: Options) -> Report:
    """All units in one Report."""
    rows = rows or [row for one in judged for row in one.rows]
    checks: dict[str, str] = {}
    for name in (*options.transforms, "differences"):
        words = [one.transforms[name] for one in judged if name in one.transforms]
        worst = [word for word in words if word == "WRONG"] or [word for word in words if word != "ok"]
        if words:
            checks[name] = worst[0] if worst else "ok"
    notes = [note for one in judged for note in one.notes]
    if jax.default_backend() not in HAVE_FLOAT64:
        notes.append(f"{jax.default_backend()} has no float64: the float64 side ran on the CPU")
    conventions = [row for one in judged for row in one.conventions]
    return Report(tuple(rows), checks, tuple(dict.fromkeys(notes)), tuple(conventions))


__all__ = ["PROBES", "TRANSFORMS", "Report", "Row", "compare"]
