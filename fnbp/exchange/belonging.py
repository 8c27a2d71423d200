"""Whether params and state belong to a net: the forward of each layer is asked, for the input that the table says."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fnbp.arrays.checks import describe
from fnbp.construction import Made
from fnbp.exchange.inputs import FLOAT
from fnbp.exchange.nodes import Node
from fnbp.exchange.table import TABLE
from fnbp.layer import Context
from fnbp.layers.activation import gelu
from fnbp.layers.norm import batch_norm


def state_of(constructor: Callable[..., Any], x: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The state of a layer; all but batch_norm have none, and do not look at what they are given."""
    if constructor is not batch_norm:
        return {}
    each = jax.ShapeDtypeStruct(x.shape[-1:], FLOAT)
    return {"mean": each, "var": each, "count": jax.ShapeDtypeStruct((), jnp.int32)}


def check_belongs(maker: str, root: Node) -> None:
    """ValueError unless each layer takes its params and state; TypeError if a parameter is not floating point."""
    for leaf in ends(root):
        made = leaf.made
        if made is not None and made.constructor in TABLE and not any(leaf.turns) and "params" not in leaf.absent:
            check_leaf(maker, leaf, made)


def check_approximate(maker: str, root: Node) -> None:
    """ValueError if a net for the weights of GPT-2 has an exact gelu, which is another function than GPT-2's."""
    for leaf in ends(root):
        if leaf.made is not None and leaf.made.constructor is gelu and not leaf.made.arguments["approximate"]:
            raise ValueError(
                f"{maker}: {leaf.label} is exact, that of GPT-2 is approximate; expected gelu(approximate=True), as "
                "models.gpt(..., approximate=True) has it"
            )


def ends(node: Node) -> Iterator[Node]:
    """Every layer below that has no parts, also one without arrays."""
    if not node.parts:
        yield node
    for part in node.parts:
        yield from ends(part)


def check_leaf(maker: str, leaf: Node, made: Made) -> None:
    """The same for one layer."""
    x = TABLE[made.constructor].x(made.arguments, leaf.held)
    due = state_of(made.constructor, x)
    if strangers := [name for name in leaf.state if name not in due]:
        raise ValueError(f"{maker}: params and state do not belong to {leaf.label}: its state has no {strangers[0]!r}")
    params, state = ({name: form(a) for name, a in tree.items()} for tree in (leaf.params, leaf.state))
    state = due if "state" in leaf.absent else state
    try:
        jax.eval_shape(lambda p, s, x: leaf.layer.forward(p, s, x, Context())[0], params, state, x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{maker}: params and state do not belong to {leaf.label}: {error}") from error
    for name, a in leaf.params.items():
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f"{maker}: {leaf.label}.{name} must be of floating point numbers, got {describe(a)}")


def form(a: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, in the dtype of the inputs if it is of floating point numbers."""
    return jax.ShapeDtypeStruct(a.shape, FLOAT if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)
