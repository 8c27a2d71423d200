"""Whether params and state belong to a net: the forward of each layer is asked, for an input that its leaves tell."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import describe
from fnbp.combinators.loops import scan
from fnbp.construction import Made
from fnbp.exchange.nodes import Node
from fnbp.exchange.rows import Held
from fnbp.layer import Context
from fnbp.layers.activation import gelu
from fnbp.layers.attention import attention
from fnbp.layers.convolution import bias, conv, conv_transpose
from fnbp.layers.dense import dense
from fnbp.layers.embedding import embedding, positions
from fnbp.layers.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnbp.layers.recurrent import gru_cell, lstm_cell, rnn_cell

Arguments = Mapping[str, Any]
FLOAT = jnp.float32  # of the inputs: only shapes are compared


def last(held: Held, leaf: str) -> int:
    """The last axis of a leaf; 1 if there is none."""
    shape = held[leaf].shape if leaf in held else ()
    return shape[-1] if shape else 1


def features(leaf: str, *before: int) -> Callable[[Arguments, Held], Any]:
    """An input whose features are the last axis of a leaf."""
    return lambda arguments, held: jax.ShapeDtypeStruct((*before, last(held, leaf)), FLOAT)


def cell_input(arguments: Arguments, held: Held) -> Any:
    """(h, x) of a cell."""
    return None, features("W", 1)(arguments, held)


def sequences(arguments: Arguments, held: Held) -> Any:
    """A sequence or, where K has a width of its own, a pair of sequences."""
    x, memory = (features(leaf, 1, 1)(arguments, held) for leaf in "QK")
    return x if x.shape == memory.shape else (x, memory)


def images(axis: int) -> Callable[[Arguments, Held], Any]:
    """An image of one window, and more where the padding takes some away. axis: of W, the one of the channels."""

    def of(arguments: Arguments, held: Held) -> Any:
        W = held["W"].shape if "W" in held else (1, 1, 1)
        kernel, padding = arguments["kernel"], arguments["padding"]
        spatial = len(kernel) if isinstance(kernel, (tuple, list)) else max(1, len(W) - 2)
        around = 0 if isinstance(padding, str) else int(np.sum(padding))
        size = int(np.max(kernel)) * int(np.max(arguments["dilation"])) + 2 * around
        groups = arguments["groups"] if axis == -1 else 1
        channels = W[axis] * groups if W else groups
        return jax.ShapeDtypeStruct((1, *[size] * spatial, channels), FLOAT)

    return of


def tokens(arguments: Arguments, held: Held) -> Any:
    """One token."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


INPUTS: dict[Callable[..., Any], Callable[[Arguments, Held], Any]] = {
    dense: features("W", 1),
    bias: features("b", 1),
    conv: images(-1),
    conv_transpose: images(0),
    layer_norm: features("gamma", 1),
    group_norm: features("gamma", 1),
    rms_norm: features("gamma", 1),
    batch_norm: features("gamma", 1),
    embedding: tokens,
    positions: features("P", 1, 1),
    attention: sequences,
    rnn_cell: cell_input,
    lstm_cell: cell_input,
    gru_cell: cell_input,
    scan: features("W", 1, 1),
}


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
        if made is not None and made.constructor in INPUTS and not any(leaf.turns) and "params" not in leaf.absent:
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
    x = INPUTS[made.constructor](made.arguments, leaf.held)
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
