"""What can be made of a factor, and how what was made leaves the loops that the factor was in.

A contraction is a function of a factor. It runs inside the net, as soon as a backward has returned the factor; what it
makes is then carried out of repeat, tie and cast in a Contracted, and handed to the caller at the end of the pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import describe
from fnbp.arrays.placement import of_param, placement
from fnbp.contractions import Contraction, per_example, rows_of, sq_norms, total
from fnbp.factor import MIXED, Factor, Mixed, Outer
from fnbp.layer import Around, Layer, checked

__all__ = ["keep", "with_path"]

Contract = Any  # a Contraction, a function of a factor, a WithPath, or a tuple of them


def keep(factor: Factor) -> Factor:
    """The factor itself, to rescale or to contract later. Under backprop its d is of each example's own loss."""
    return factor


def as_is(factor: Factor) -> Factor:
    """The factor as the backward returned it: under backprop with the 1/m of J."""
    return factor


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
        if isinstance(self.contract, Contraction):
            return replace(self, value=self.contract.depth(self.value))
        return self.map(each)

    def map(self, f: Callable[[Any], Any]) -> "Contracted":
        """With every factor and every array of the value replaced by f of it."""
        return replace(self, value=jax.tree.map(f, self.value, is_leaf=is_open))


def is_open(node: Any) -> bool:
    """True for what is not yet as the caller will see it."""
    return isinstance(node, (Factor, Contracted))


def closed(node: Any, param: Any = None) -> Any:
    """A node as the caller will see it: a total as its parameter has it, if that is given. A factor that is kept is
    scaled here, behind the loops, where two weights that share an error still share it."""
    if not isinstance(node, Contracted):
        return node
    if node.contract is keep:
        return node.value.scaled(node.value.examples)
    return node.value if param is None or node.contract is not total else of_param(node.value, param)


def contract_leaf(
    contract: Contract, leaf: Any, path: str, key: str = "", given: tuple[Any, ...] = (), whole: Any = None
) -> Any:
    """What contract makes of one factor; given: of its parameter. whole: its total, if it is there already.

    The error runs down the net as dJ/dy, so the factors hold the 1/m of J; every contraction but total sees each
    example's own, which is m times that.
    """
    if isinstance(contract, tuple):
        made = (contract_leaf(c, leaf, path, key, g, whole) for c, g in zip(contract, given, strict=True))
        return tuple(Contracted(one, c) if c is total else one for one, c in zip(made, contract, strict=True))
    if not isinstance(leaf, Factor):
        if contract is total:
            return leaf
        name = getattr(contract, "name", getattr(contract, "__name__", repr(contract)))
        raise TypeError(f"{path}: its backward returns a finished gradient, so only total is defined, not {name}")
    if contract is total:
        return total(leaf) if whole is None else whole
    if isinstance(leaf, Mixed):
        raise TypeError(f"{path}: {MIXED}")
    if isinstance(contract, Contraction) and contract.scaled is not None:
        return Contracted(contract.scaled(contract(leaf.bare(), *given), leaf.examples), contract)
    if contract is keep or contract is as_is:
        return Contracted(leaf, contract)
    own = leaf.bare().scaled(leaf.examples)
    if isinstance(contract, WithPath):
        return Contracted(contract.contract(f"{path}.{key}" if key else path, own), contract.contract)
    return Contracted(contract(own, *given), contract)


# --- what a contraction is given for each parameter ---


def given_to(contract: Contract, at: Callable[[Any], Any]) -> tuple[Any, ...]:
    """What a contraction is given, a tuple of none or one tree; of a tuple of contractions a tuple of such. at: what of
    a tree of params is meant."""
    if isinstance(contract, tuple):
        return tuple(given_to(c, at) for c in contract)
    return (at(contract.given),) if isinstance(contract, Contraction) and contract.given is not None else ()


def map_given(contract: Contract, given: tuple[Any, ...], f: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The same with f of every tree."""
    if isinstance(contract, tuple):
        return tuple(map_given(c, g, f) for c, g in zip(contract, given, strict=True))
    return tuple(map(f, given))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beside(Around):
    """The params of a layer, and what contractions are given for them: both go through every loop alike."""

    params: Any
    given: Any

    @property
    def inside(self) -> Any:
        return self.params

    def holding(self, factors: Any) -> "Beside":
        return replace(self, params=factors)


def beside(contract: Contract, layer: Layer, params: Any, at: Callable[[Any], Any] = lambda tree: tree) -> Any:
    """params, with what contract is given beside those of each layer."""
    if not jax.tree.leaves(given_to(contract, lambda tree: tree)):
        return params
    if layer.rebuild is None:
        return Beside(params, given_to(contract, at))

    def turn(node: Any) -> Any:
        return node.in_turn() if layer.traits.turns and isinstance(node, Factor) else node

    def part_of(i: int) -> Callable[[Any], Any]:
        return lambda tree: jax.tree.map(turn, at(tree)[i], is_leaf=lambda node: isinstance(node, Factor))

    return tuple(beside(contract, part, params[i], part_of(i)) for i, part in enumerate(layer.parts))


def check_given(contract: Contract, params: Any) -> None:
    """ValueError unless what a contraction is given is a tree of params."""

    def check(c: Contraction) -> None:
        tree = jax.tree.structure(params)
        try:
            each = tree.flatten_up_to(c.given)
        except (ValueError, TypeError) as error:
            came = jax.tree.structure(c.given, is_leaf=is_open)
            raise ValueError(f"{c.name}: expected a tree of params, {tree}, got {came}") from error
        for a, p in zip(each, jax.tree.leaves(params), strict=True):
            if not isinstance(a, Factor) and not jax.tree_util.all_leaves([a]):
                continue  # some other form, which only the contraction knows
            came = jax.eval_shape(a.total).shape if isinstance(a, Factor) else jnp.shape(a)
            if came != jnp.shape(p):
                raise ValueError(f"{c.name}: a parameter of shape {jnp.shape(p)} is given one of shape {came}")

    for c in contract if isinstance(contract, tuple) else (contract,):
        if isinstance(c, tuple):
            check_given(c, params)
        elif isinstance(c, Contraction) and c.given is not None:
            check(c)


# --- in a net ---


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
                what = "its gradient" if made is total else f"{made.name} of its {kind}"
                hint = "is its backward wrong?" if made is total else f"expected {due}: is the example its first axis?"
                raise ValueError(f"{path}: {name} has shape {shape}, {what} {came}: {hint}")


def finished(contract: Contract, factors: Any, given: Any, path: str) -> Any:
    """What contract makes of a tree of factors. given: trees of the same form, as given_to has them."""
    given = given_to(contract, lambda tree: tree) if given is None else given
    found, tree = jax.tree_util.tree_flatten_with_path(factors, is_leaf=is_open)
    each = map_given(contract, given, tree.flatten_up_to)
    own = [map_given(contract, each, lambda leaves, i=i: leaves[i]) for i in range(len(found))]
    whole = shared_totals(contract, [leaf for _, leaf in found], own)
    made = []
    for (where, leaf), given, sum_of_all in zip(found, own, whole, strict=True):
        key = ".".join(str(getattr(k, "key", k)) for k in where)
        done = isinstance(leaf, Contracted)
        made.append(leaf if done else contract_leaf(contract, leaf, path, key, given, sum_of_all))
    return jax.tree.unflatten(tree, made)


def is_plain(node: Any) -> bool:
    """True for a factor of one layer, on one device or on axes that the compiler splits."""
    own = isinstance(node, Factor) and type(node).contracted is Factor.contracted
    return own and placement(node) is None


def shared_totals(contract: Contract, factors: list[Any], given: list[Any]) -> list[Any]:
    """The totals of the factors of one layer that come cheaper by shared work; None for the others.

    Where another contraction forms the gradients of all examples, their sum is the total. Outer products that share the
    error, d x^T and d z^T over several positions, are one product, d [x, z]^T.
    """
    made: list[Any] = [None] * len(factors)
    if not any(c is total for c, _ in each_contraction(contract, ())):
        return made
    alike: dict[Any, list[int]] = {}  # by the error, and the positions of what came in
    for i, (factor, own) in enumerate(zip(factors, given, strict=True)):
        if not is_plain(factor):
            continue
        beside = [(c, g) for c, g in each_contraction(contract, own) if isinstance(c, Contraction)]
        if any(c.forms_rows(factor, *g) for c, g in beside):
            made[i] = jnp.sum(rows_of(factor), 0).astype(jax.eval_shape(factor.total).dtype)
        elif type(factor) is Outer and factor.d.ndim > 2:
            alike.setdefault((id(factor.d), factor.x.shape[:-1]), []).append(i)
    for those in alike.values():
        if len(those) > 1:
            pairs = [factors[i] for i in those]
            at_once = Outer(pairs[0].d, jnp.concatenate([pair.x for pair in pairs], -1)).total()
            ends = [int(end) for end in np.cumsum([pair.x.shape[-1] for pair in pairs])[:-1]]
            for i, part in zip(those, jnp.split(at_once, ends, 1), strict=True):
                made[i] = part
    return made


def each_contraction(contract: Contract, given: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every contraction, and what it is given."""
    if not isinstance(contract, tuple):
        yield contract, given
        return
    for c, own in zip(contract, given or [()] * len(contract), strict=True):
        yield from each_contraction(c, own)


def contracted(contract: Contract, later: frozenset[str] = frozenset()) -> Callable[[str, Layer], Layer]:
    """For map_layers: a layer whose backward contracts its factors as soon as they exist; but for those at later, the
    paths of layers whose factors are still to be added to others. Only total can be added when it is done."""
    for c in contract if isinstance(contract, tuple) and not isinstance(contract, Layer) else (contract,):
        if isinstance(c, Layer) or not (callable(c) or isinstance(c, (tuple, WithPath))):
            raise TypeError(
                "contract must be a Contraction, a function of a factor, a tuple of these, or a dict of any of these; "
                f"got {describe(c)}"
            )

    def at(path, layer):
        layer = checked(path, layer)

        def forward(params, state, x, ctx):  # in remat: params come as in backward
            return layer.forward(params.params if isinstance(params, Beside) else params, state, x, ctx)

        def backward(params, res, dy):
            params, given = (params.params, params.given) if isinstance(params, Beside) else (params, None)
            factors, dx = layer.backward(params, res, dy)
            if contract is not total and not layer.traits.opened:
                check_factors(path, factors, params, jax.tree.leaves(dy)[0].shape[0])
            if contract is not total and path in later:
                return factors, dx
            return finished(contract, factors, given, path), dx

        return layer._replace(forward=forward, backward=backward)

    return at
