"""Between fnbp and the rest of JAX: a manual backward inside any model, an automatic one inside any net."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import (
    as_arrays,
    check_array,
    check_held,
    check_is,
    check_key,
    check_name,
    choose,
    describe,
    takes,
)
from fnbp.arrays.masks import RULES, Rule, refused
from fnbp.arrays.placement import by_example, check_whole, each_example, of_param, summed, varying
from fnbp.arrays.sums import wide
from fnbp.backpropagation import check_batch, conform
from fnbp.construction import constructor
from fnbp.contraction import contracted, keep
from fnbp.contractions import Contraction, total
from fnbp.factor import Factor, Mixed, along_examples, register_factor
from fnbp.layer import (
    MIXES,
    Context,
    Layer,
    Traits,
    counting,
    drawing,
    map_layers,
    mask_behind,
    mask_of,
    mixing,
    traits_of,
)
from fnbp.losses.loss import Loss, losses_of
from fnbp.losses.reduction import check_reduce, how_many, share, shares, summed_up
from fnbp.opening import opened

__all__ = ["automatic_value_and_grad", "from_jax", "loss_from_jax", "to_jax"]


def empty_state(layer: Layer, params: Any, x: Any) -> Any:
    """The state of a net without state: a tree without arrays. ValueError if the net has state."""
    _, state = jax.eval_shape(layer.init, jax.random.key(0), x)
    if jax.tree.leaves(state):
        raise ValueError(f"to_jax: {layer.name} has state; give it as to_jax(layer, state=...)")
    return state


def to_jax(layer: Layer, state: Any = None, ctx: Context = Context(), with_state: bool = False) -> Callable[..., Any]:
    """Make a function apply(params, x) -> y for any JAX, Flax or Equinox model, with the manual backward as its VJP.

        jax.vjp(apply, params, x)[1](dy) = total of backward's factors, dx

    jax.grad, vjp, jit, vmap, hessian and shard_map go through it; jvp cannot, as for any jax.custom_vjp. Params come
    from layer.init(key, x)[0]. Without with_state, state and ctx are fixed and the new state is dropped.

    Options: with_state: the function is apply(params, state, x, ctx=ctx) -> (y, new state), for batch_norm, dropout and
             whatever changes from step to step. State and context have no cotangent.
    Raises:  ValueError if the layer has state and none is given, or a fixed state is given beside with_state; TypeError
             if the argument is not a Layer.
    """
    check_is("to_jax", "layer", layer, Layer)
    check_is("to_jax", "with_state", with_state, bool)
    if with_state and state is not None:
        raise ValueError("to_jax: with with_state=True the state is an argument of the function; give no fixed one")
    net = map_layers(contracted(total), layer)

    @jax.custom_vjp
    def apply(params, state, x, ctx):
        return forward(params, state, x, ctx)[0]

    def forward(params, state, x, ctx):
        check_whole("to_jax", params)
        y, state, res = net.forward(params, state, x, ctx)
        return (y, state), (params, x, res)

    def backward(saved, d):
        (params, x, res), (dy, _) = saved, d
        grads, dx = net.backward(params, res, dy)
        dx = jax.tree.map(lambda d, x: None if d is None else of_param(d, x), dx, x, is_leaf=lambda d: d is None)
        return conform(grads, params), None, dx, None

    apply.defvjp(forward, backward)
    if with_state:
        return lambda params, state, x, ctx=ctx: apply(params, state, x, ctx)
    return lambda params, x: apply(params, empty_state(layer, params, x) if state is None else state, x, ctx)[0]


@register_factor
@dataclass(frozen=True)
class Automatic(Factor):
    """The gradient of one parameter of a function that JAX differentiates.

        total        jax.vjp of the function at dy           per_example  the same, for each example alone
        others       of the factor that fnbp.opened finds in <dy_i, f(params, x_i)>

    Shapes: d, the tree dy, (m, ...); inputs params, state, x, ctx; layer, and which of its parameters, are static.
    """

    d: Any
    inputs: tuple
    gradient: Any
    layer: Layer = field(metadata={"static": True})
    which: int = field(metadata={"static": True})
    sliced: ClassVar[bool] = False

    @property
    def examples(self) -> int:
        return jax.tree.leaves(self.d)[0].shape[0]

    def total(self) -> jax.Array:
        params, state, x, ctx = self.inputs
        return self.pull(params, state, x, ctx, self.d) if self.gradient is None else self.gradient

    @each_example
    def per_example(self) -> jax.Array:
        return jax.vmap(self.alone())(*self.slices())

    def contracted(self, contraction: Contraction, *given: Any) -> Any:
        where = by_example if contraction.joined == "stacked" else summed

        def of_factor(self: "Automatic", given: tuple[Any, ...]) -> Any:
            try:
                factor = self.opened()
            except TypeError:  # it has what opened refuses
                return contraction.of_form(self, *given)
            return contraction(factor, *given)

        self.alone()  # which refuses what draws for a batch as a whole
        return where(of_factor, self, given)

    def opened(self) -> Factor:
        """The factor of the parameter in the inner product of dy and y of each example alone."""
        params, state, _, ctx = self.inputs

        def loss(params, x, mask, dy):
            x, mask = jax.tree.map(lambda a: a[None], (x, mask))
            y, _, _ = self.layer.forward(params, state, x, replace(ctx, mask=mask))
            parts = jax.tree.map(lambda d, y: jnp.sum(wide(d) * wide(y[0])), dy, y)
            return sum(jax.tree.leaves(parts))

        factors = opened(loss, keep)(params, *self.slices())[1]
        return jax.tree.leaves(factors, is_leaf=lambda f: isinstance(f, Factor))[self.which]

    def widened(self) -> "Automatic":
        return self

    def scaled(self, c: Any) -> "Automatic":
        return replace(self, d=jax.tree.map(lambda d: along_examples(c, d), self.d), gradient=None)

    def pull(self, params: Any, state: Any, x: Any, ctx: Context, dy: Any) -> jax.Array:
        """The parameter's gradient of <dy, y>."""
        # within shard_map jax.vjp adds up over devices for parameters that are the same on all
        params = jax.tree.map(lambda p: varying(p, jax.tree.leaves(dy)[0]), params)
        _, pull = jax.vjp(lambda params: self.layer.forward(params, state, x, ctx)[0], params)
        return jax.tree.leaves(pull(dy)[0])[self.which]

    def alone(self) -> Callable[[Any, Any, Any], jax.Array]:
        """(x, mask, dy) of one example -> its gradient."""
        params, state, _, ctx = self.inputs
        if ctx.train and ctx.key is not None and (path := drawing(self.layer)):
            raise TypeError(
                f"{self.layer.name}: {path} draws for a batch as a whole; what jax.vjp finds for one example alone is "
                "another draw, so only total is defined under from_jax in training"
            )

        def of_one(x, mask, dy):
            x, mask, dy = jax.tree.map(lambda a: a[None], (x, mask, dy))
            return self.pull(params, state, x, replace(ctx, mask=mask), dy)

        return of_one

    def slices(self) -> tuple[Any, Any, Any]:
        """What has the example as first axis: x, mask, dy."""
        _, _, x, ctx = self.inputs
        return x, ctx.mask, self.d


@constructor
def from_jax(
    apply: Layer | Callable,
    init: Callable | None = None,
    name: str | None = None,
    mask: str | Rule | None = None,
    mixes: Literal["never", "training", "always"] = "never",
) -> Layer:
    """Make a Layer whose backward is jax.vjp, of any Layer or of a function apply(params, x) -> y.

        from_jax(dense(10))                   the same layer, differentiated automatically
        from_jax(apply, init, "mine")         init(key, x) -> params; without it the function has no parameters: {}

    Its factors keep what jax.vjp needs, so per-example quantities are of each example alone. Integers have no
    cotangent: there dx is None.

    Options: mask: of a function, as in stateless; by default a mask is refused. mixes: of a function, when an example's
             y depends on other examples; nothing else can tell. A Layer brings both along.
    Raises:  TypeError if the argument is neither a Layer nor a function; ValueError if mixes is unknown.
    """
    if name is not None:
        check_name("from_jax", name)
    if isinstance(apply, Layer):
        if init is not None or mask is not None or mixes != "never":
            raise TypeError(
                f"from_jax: init, mask and mixes go with a function; {apply.name} is a Layer, which has its own"
            )
        layer, label = apply, name or f"from_jax({apply.name})"
    elif callable(apply):
        own = name_of(apply)
        label = name or (f"from_jax({own})" if own else "from_jax")
        check_functions(own or "the function", apply, init)
        layer = lifted(apply, init, label, mask or refused, mixes)
    else:
        raise TypeError(f"from_jax: expected a Layer or a function apply(params, x), got {describe(apply)}")

    def forward(params, state, x, ctx):
        def differentiated(params, x):
            y, new_state, _ = layer.forward(params, state, x, ctx)
            return y, new_state

        check_leaves(label, x)
        y, pull, new_state = jax.vjp(differentiated, params, x, has_aux=True)
        return y, new_state, (pull, state, x, ctx)

    def backward(params, res, dy):
        pull, state, x, ctx = res
        dparams, dx = pull(dy)
        gradients, tree = jax.tree.flatten(dparams)
        factors = [Automatic(dy, (params, state, x, ctx), g, layer, i) for i, g in enumerate(gradients)]
        if mixing(layer, ctx):
            factors = [Mixed(g) for g in gradients]
        dx = jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, dx)
        return jax.tree.unflatten(tree, factors), dx

    traits = replace(traits_of(layer, mask_of(layer)), carries=layer.traits.carries)
    return Layer(layer.init, forward, backward, label, traits=traits)


@constructor
def loss_from_jax(f: Callable[[Any, Any], jax.Array], name: str | None = None, reduce: str = "examples") -> Loss:
    """Make a Loss whose backward is jax.vjp, of a function f(prediction, target) -> losses (m,), as optax has them.

        l = f(p, t)      dp = jax.vjp of f at 1

    If f returns losses of positions or outputs, (m, ...), an example's loss is the mean over those that count.

    Shapes:  p the prediction, t the target, l (m,); saved what jax.vjp needs.
    Source:  that of f: loss_from_jax(optax.sigmoid_focal_loss).
    Options: reduce: as in fnbp.softmax_cross_entropy.
    Raises:  TypeError if f is not a function, or is a Loss already; ValueError, with the first batch, if it does not
             return at least one loss an example, as a function that takes the mean over the batch itself.
    """
    if not callable(f) or isinstance(f, (Layer, Loss)):
        raise TypeError(f"loss_from_jax: a function (prediction, target) -> losses (m,) is expected, got {describe(f)}")
    label = name or name_of(f) or "loss_from_jax"
    check_reduce(label, reduce)

    def forward(prediction, target, mask=None):
        losses, pull = jax.vjp(lambda p: f(p, target), prediction)
        m = jax.tree.leaves(prediction)[0].shape[0]
        if losses.shape[:1] != (m,):
            raise ValueError(
                f"{label}: expected one loss an example, ({m}, ...), got shape {losses.shape}: the mean over the "
                "batch is taken later"
            )
        if mask is not None and losses.shape[: mask.ndim] != mask.shape:
            raise TypeError(
                f"{label}: it returns losses of shape {losses.shape}, which a mask of {mask.shape} does not fit"
            )
        at = shares(reduce, losses, mask)
        return summed_up(at, losses), (pull, at, jnp.ones_like(losses))

    def backward(res):
        pull, at, ones = res
        return pull(share(at, ones))[0]

    def positions(prediction, target, mask):
        return how_many(mask, jax.eval_shape(f, prediction, target).shape)

    return Loss(forward, backward, label, takes_mask=True, positions=positions if reduce == "tokens" else None)


def name_of(f: Callable) -> str | None:
    """What a function is called; None if it has no name, as a lambda."""
    name = getattr(f, "__name__", "<lambda>")
    return None if name == "<lambda>" else name


def check_leaves(name: str, x: Any) -> None:
    """TypeError if jax.vjp does not take a leaf of x as an argument."""
    for leaf in jax.tree.leaves(x):
        if not isinstance(leaf, (jax.Array, bool, int, float, complex)):
            check_array(name, "x", leaf)


def check_functions(name: str, apply: Callable, init: Any) -> None:
    """TypeError unless apply can be called with params and x, and init, if there is one, with a key and x."""
    if not takes(apply, 2):
        alone = f"; for a function of x alone: from_jax(lambda params, x: {name}(x))" if takes(apply, 1) else ""
        raise TypeError(f"from_jax: {name} must take (params, x){alone}")
    if init is not None and (isinstance(init, Layer) or not callable(init) or not takes(init, 2)):
        raise TypeError(f"from_jax: init must be a function (key, x) -> params, got {describe(init)}")


def lifted(apply: Callable, init: Callable | None, name: str, mask: str | Rule, mixes: Any) -> Layer:
    """A Layer around a function apply(params, x) -> y, without a backward of its own."""
    rule = mask if callable(mask) else choose("rule for a mask", mask, RULES, f"{name}: ")
    choose("mixes", mixes, dict.fromkeys(MIXES, 0), f"{name}: ")

    def init_lifted(key, x):
        check_key(name, key)
        return init(key, x) if init is not None else {}, {}

    def forward(params, state, x, ctx):
        if init is None:
            check_held(name, "params", params, {})
        return apply(params, x), state, ()

    def backward(params, res, dy):
        raise TypeError(f"{name}: it has no manual backward")

    functions = counting(name, rule, forward, backward)
    return Layer(init_lifted, *functions, name, traits=Traits(rule, mixes))


def automatic_value_and_grad(net: Layer, loss: Loss) -> Callable[..., Any]:
    """Make fnbp.value_and_grad by jax.value_and_grad of the same forward: the reference for every comparison.

    Raises: as fnbp.value_and_grad; TypeError if net is not a Layer, or loss is not a Loss.
    """
    check_is("automatic_value_and_grad", "net", net, Layer)
    check_is("automatic_value_and_grad", "loss", loss, Loss)

    def J(params, state, x, y, ctx):
        prediction, state, _ = net.forward(params, state, x, ctx)
        losses, _ = losses_of(loss, prediction, y, mask_behind(net, x, ctx.mask))
        return jnp.mean(losses), state

    def value_and_grad_of(params, state, x, y, ctx=Context()):
        check_batch(x, y)
        name = "automatic_value_and_grad"
        params, x, y = (as_arrays(name, what, a) for what, a in (("params", params), ("x", x), ("y", y)))
        return jax.value_and_grad(J, has_aux=True)(params, state, x, y, ctx)

    return value_and_grad_of
