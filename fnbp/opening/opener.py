"""opened: the loss of anyone's model, with a contraction in the place of the sum over examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fnbp.arrays.checks import check_is
from fnbp.backpropagation import Trace, backprop, conform
from fnbp.contraction import Contract
from fnbp.contractions import per_example, total
from fnbp.layer import Layer
from fnbp.losses.loss import Loss
from fnbp.opening.net import MEAN, Reader, factors_for, is_factor, net_of, paths_of, reader, tapped
from fnbp.opening.requests import check_batch, check_loss, check_params, masked, returned_of, shared_of
from fnbp.opening.views import Uses, keep_outputs, seen_at, uses_of
from fnbp.opening.witness import alike, by_vmap

__all__ = ["Opened", "opened"]

FEW = 3  # examples that check compares


@dataclass(frozen=True, eq=False)
class Opened:
    """What opened makes: (params, *batch) -> losses, grads. fnbp.statistics takes it in the place of a net and a loss.

    trace  what comes out, and the error, wherever a parameter meets data
    uses   a table of these places
    """

    loss: Callable[..., Any]
    contract: Contract = total
    has_aux: bool = False
    mask: Any = None
    shared: tuple[int, ...] = ()
    check: bool = False

    def __call__(self, params: Any, *batch: Any) -> tuple[Any, Any]:
        """Losses (m,), and the tree of params; with has_aux (losses, aux), and that tree."""
        x, shared = self.given(params, batch)
        if self.check:
            self.compare(params, batch)
        done = backprop(self.net, self.mean, self.contract)(params, shared, x, ())
        return ((done.prediction, done.state) if self.has_aux else done.prediction), done.grads

    def trace(self, params: Any, *batch: Any) -> Trace:
        """The outputs, and the errors dJ/dy, J the mean loss, wherever a parameter meets data.

        Their names are the path of the module, as JAX's name stack has it, the parameter, the equation, file:line.

        Shapes: (m, ...), in loops (m, turns, ...). Trace.prediction holds the losses, state aux, grads the gradient.
        """
        x, shared = self.given(params, batch)
        plan, aux_tree, axes, inputs = self.reader(params, x, shared)
        keep_outputs(plan)
        losses, pull, aux, record = tapped(plan, axes, inputs, jax.tree.leaves(x)[0].shape[0])
        (deltas,) = pull(jnp.full_like(losses, 1 / losses.shape[0]))
        factors = factors_for(plan, params, deltas, record, losses)
        grads = conform(jax.tree.map(total, factors, is_leaf=is_factor), params)
        outputs, told = seen_at(plan, deltas, record)
        state = jax.tree.unflatten(aux_tree, aux)
        return Trace(jnp.mean(losses), state, losses, grads, None, outputs, told)

    def uses(self, params: Any, *batch: Any) -> Uses:
        """A table: each parameter, where it is used, by which rule its factor is made, shape and size. Nothing runs."""
        x, shared = self.given(params, batch)
        m = jax.tree.leaves(x)[0].shape[0]
        plan, _, axes, inputs = self.reader(params, x, shared)

        def factors(inputs):
            losses, pull, _, record = tapped(plan, axes, inputs, m)
            return factors_for(plan, params, pull(losses)[0], record, losses)

        made = jax.tree.leaves(jax.eval_shape(factors, inputs), is_leaf=is_factor)
        return uses_of(plan, dict(zip(paths_of(params), made, strict=True)), m)

    # --- for statistics ---

    @property
    def name(self) -> str:
        """opened(loss)."""
        return f"opened({getattr(self.loss, '__name__', type(self.loss).__name__)})"

    @cached_property
    def net(self) -> Layer:
        """The loss as a Layer: x is the batch, a tuple, y the loss of each example, state what has no example axis."""
        return net_of(self.name, self.reader)

    @property
    def mean(self) -> Loss:
        """The Loss of that net: its outputs themselves."""
        return MEAN

    @cached_property
    def reader(self) -> Reader:
        """Plans the loss for given arrays."""

        def f(params, x, shared):
            own, others = iter(x), iter(shared)
            many = range(1, 1 + len(x) + len(shared))
            arguments = [next(others) if i in self.shared else next(own) for i in many]
            return returned_of(self.name, self.loss(params, *arguments), self.has_aux)

        def chosen(params):
            tree = jax.tree.structure(params)
            return [True] * tree.num_leaves if self.mask is None else masked(self.name, self.mask, tree)

        return reader(self.name, f, chosen)

    def given(self, params: Any, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments with an example axis, and those without. ValueError or TypeError if they do not fit."""
        check_params(self.name, params)
        check_batch(self.name, self.loss, self.shared, batch)
        return tuple(a for i, a in enumerate(batch, 1) if i not in self.shared), tuple(
            a for i, a in enumerate(batch, 1) if i in self.shared
        )

    def compare(self, params: Any, batch: tuple[Any, ...]) -> None:
        """ValueError, by its path, if a gradient of one of the first examples is not that of vmap(jax.grad)."""
        if any(isinstance(a, Tracer) for a in jax.tree.leaves((params, batch))):
            raise TypeError(f"{self.name}: check compares numbers, and jit has none; call it once without jit")
        few = tuple(a if i in self.shared else jax.tree.map(lambda a: a[:FEW], a) for i, a in enumerate(batch, 1))
        ours = jax.tree.leaves(replace(self, contract=per_example, check=False)(params, *few)[1])
        own = self.loss if not self.has_aux else lambda *args: self.loss(*args)[0]
        theirs = by_vmap(own, params, [None if i in self.shared else 0 for i in range(1, len(batch) + 1)], few)
        tree = jax.tree.structure(params)
        wanted = [True] * tree.num_leaves if self.mask is None else masked(self.name, self.mask, tree)
        for path, made, yes in zip(paths_of(params), ours, wanted, strict=True):
            if yes and path in theirs and not alike(made, theirs[path]):
                raise ValueError(
                    f"{self.name}: {path} has another gradient than by vmap(jax.grad); please report this loss"
                )


def opened(
    loss: Callable[..., Any],
    contract: Contract = total,
    has_aux: bool = False,
    mask: Any = None,
    shared: Sequence[int] | int = (),
    check: bool = False,
) -> Opened:
    """Open the loss of any JAX model: (params, *batch) -> losses, grads, what contract makes of each factor.

        losses, squares = fnbp.opened(loss, fnbp.sq_norms)(params, x, y)

    loss(params, *example) -> () is a JAX function of one example, of a Flax, Equinox or any other model, and params any
    tree. It is traced with shapes only. Where a parameter meets data a zero is added to what comes out, and one
    backward to these zeros, for all examples, gives the error at every such place: with the data there it is the
    factor. total is the gradient of the mean loss; all other contractions are of each example's own loss.

    A term of parameters alone, a penalty for example, is part of the gradient of each example. A loss sees one example:
    batch statistics are those of a batch of one, so batch_norm must use its running ones. A key is an argument of the
    batch, one for each example: jax.random.split(key, m).

    Shapes:  each argument of batch, a tree, has the example as first axis; losses (m,); grads the tree of params. What
             the loss does not depend on, and what is no floating-point array, has the gradient 0.
    Options: contract: as of fnbp.backprop. has_aux: the loss returns (loss, aux), and (losses, aux), grads come back.
             mask: a tree of params, True where it is differentiated. shared: arguments without an example axis: (2,)
             is the second behind params. check: hold the gradients of the first 3 examples against vmap(jax.grad); not
             under jit.
    Source:  fnbp/opening/README.md.
    Raises:  TypeError if loss is not a function, returns what is no real number, or a parameter goes into what JAX has
             no reverse derivative of, by file and line; ValueError if two arguments differ in the number of examples,
             or check finds a difference.
    """
    check_loss(loss)
    check_is("opened", "has_aux", has_aux, bool)
    check_is("opened", "check", check, bool)
    return Opened(loss, contract, has_aux, mask, shared_of(shared), check)
