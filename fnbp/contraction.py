"""What can be made of a factor, and how what was made leaves the loops that the factor was in.

A contraction is a function of a factor. It runs inside the net, as soon as a backward has returned the factor; what it
makes is then carried out of repeat, tie and cast in a Contracted, and handed to the caller at the end of the pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import describe
from fnbp.factor import MIXED, Factor, Mixed
from fnbp.layer import Layer, checked

__all__ = ["keep", "per_example", "sq_norms", "total", "with_path"]

Contraction = Any  # a function of a factor, a WithPath, or a tuple of them


def total(factor: Factor) -> jax.Array:
    """The sum over examples. Under backprop: the gradient of the mean loss J."""
    return factor.total()


def keep(factor: Factor) -> Factor:
    """The factor itself, to rescale or to contract later. Under backprop its d is of each example's own loss."""
    return factor


def sq_norms(factor: Factor) -> jax.Array:
    """The squared norm of each example's gradient, (m,), in at least float32."""
    return factor.sq_norms()


def per_example(factor: Factor) -> jax.Array:
    """Each example's gradient, (m, the shape of the parameter): m times the memory of total."""
    return factor.per_example()


OVER_DEPTH: dict[Callable, Callable] = {  # what was made of each of n layers of one shape -> as of their Stacked
    sq_norms: lambda squares: jnp.sum(squares, 0),
    per_example: lambda rows: jnp.moveaxis(rows, 0, 1),
}


@dataclass(frozen=True)
class WithPath:
    """A contraction that is told where the factor is."""

    contract: Callable[[str, Factor], Any]


def with_path(contract: Callable[[str, Factor], Any]) -> WithPath:
    """A contraction that sees the path: contract(path, factor), path "serial[0].dense(128).W".

    For what differs by layer: a limit for each, a curvature for one. Under backprop as any contraction of your own.

    Raises: TypeError if contract is not a function.
    """
    if not callable(contract):
        raise TypeError(f"with_path: contract must be a function (path, factor) -> any tree, got {contract!r}")
    return WithPath(contract)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contracted:
    """What a contraction made of a factor, on its way out of the loops that the factor was in."""

    value: Any
    contract: Callable = field(metadata={"static": True})

    def over_depth(self, each: Callable[[Any], Any]) -> "Contracted":
        """Of all layers of a loop over depth, whose axis is the first of every array; each: what becomes of a factor.

        What a contraction of your own makes keeps the depth as its first axis.
        """
        if self.contract in OVER_DEPTH:
            return replace(self, value=OVER_DEPTH[self.contract](self.value))
        return self.map(each)

    def map(self, f: Callable[[Any], Any]) -> "Contracted":
        """With every factor and every array of the value replaced by f of it."""
        return replace(self, value=jax.tree.map(f, self.value, is_leaf=is_open))


def is_open(node: Any) -> bool:
    """True for what is not yet as the caller will see it."""
    return isinstance(node, (Factor, Contracted))


def closed(node: Any) -> Any:
    """A node as the caller will see it."""
    return node.value if isinstance(node, Contracted) else node


def contract_leaf(contract: Contraction, leaf: Any, path: str, key: str = "") -> Any:
    """What contract makes of one factor. The error runs down the net as dJ/dy, so the factors hold the 1/m of J;
    every contraction but total sees each example's own, which is m times that."""
    if isinstance(contract, tuple):
        made = (contract_leaf(c, leaf, path, key) for c in contract)
        return tuple(Contracted(one, c) if c is total else one for one, c in zip(made, contract, strict=True))
    if not isinstance(leaf, Factor):
        if contract is total:
            return leaf
        name = getattr(contract, "__name__", repr(contract))
        raise TypeError(f"{path}: its backward returns a finished gradient, so only total is defined, not {name}")
    if contract is total:
        return total(leaf)
    if isinstance(leaf, Mixed):
        raise TypeError(f"{path}: {MIXED}")
    own = (leaf if contract is keep else leaf.bare()).scaled(leaf.examples)
    if isinstance(contract, WithPath):
        return Contracted(contract.contract(f"{path}.{key}" if key else path, own), contract.contract)
    return Contracted(contract(own), contract)


def check_factors(path: str, factors: Any, params: Any, m: int) -> None:
    """ValueError unless each factor is of its parameter's shape and of m examples; TypeError if it is not a pytree."""
    is_factor = lambda node: isinstance(node, Factor)  # noqa: E731
    found, tree = jax.tree_util.tree_flatten_with_path(factors, is_factor)
    if tree != jax.tree.structure(params):
        raise ValueError(f"{path}: backward returns {tree}, params are {jax.tree.structure(params)}")
    for (where, factor), p in zip(found, jax.tree.leaves(params), strict=True):
        if not isinstance(factor, Factor) or isinstance(factor, Mixed):
            continue
        kind, name = type(factor).__name__, f"params{jax.tree_util.keystr(where)}"
        if jax.tree_util.all_leaves([factor]):
            raise TypeError(f"{path}: register {kind} with @fnbp.register_factor, so that JAX sees its arrays")
        shape = jnp.shape(p)
        for made, due in ((total, shape), (per_example, (m, *shape)), (sq_norms, (m,))):
            came = jax.eval_shape(lambda made=made, factor=factor: made(factor)).shape
            if came != due:
                what = "its gradient" if made is total else f"{made.__name__} of its {kind}"
                hint = "is its backward wrong?" if made is total else f"expected {due}: is the example its first axis?"
                raise ValueError(f"{path}: {name} has shape {shape}, {what} {came}: {hint}")


def contracted(contract: Contraction, later: frozenset[str] = frozenset()) -> Callable[[str, Layer], Layer]:
    """For map_layers: a layer whose backward contracts its factors as soon as they exist; but for those at later, the
    paths of layers whose factors are still to be added to others. Only total can be added when it is done."""
    for c in contract if isinstance(contract, tuple) and not isinstance(contract, Layer) else (contract,):
        if isinstance(c, Layer) or not (callable(c) or isinstance(c, (tuple, WithPath))):
            raise TypeError(f"contract must be a function of a factor, or a tuple of such, got {describe(c)}")

    def at(path, layer):
        layer = checked(path, layer)

        def backward(params, res, dy):
            factors, dx = layer.backward(params, res, dy)
            if contract is not total:
                check_factors(path, factors, params, jax.tree.leaves(dy)[0].shape[0])
                if path in later:
                    return factors, dx
            return jax.tree_util.tree_map_with_path(finish, factors, is_leaf=lambda leaf: isinstance(leaf, Factor)), dx

        def finish(where, leaf):
            return contract_leaf(contract, leaf, path, ".".join(str(getattr(k, "key", k)) for k in where))

        return layer._replace(backward=backward)

    return at
