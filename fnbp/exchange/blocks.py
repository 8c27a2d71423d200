"""Blocks that another library has as one module, whose names do not follow the order of our layers."""

from collections.abc import Callable, Iterator, Sequence

from fnbp.combinators.loops import scan
from fnbp.exchange.nodes import Node
from fnbp.layer import Layer
from fnbp.layers.attention import attention
from fnbp.layers.dense import dense
from fnbp.layers.norm import layer_norm
from fnbp.models.architectures import gpt
from fnbp.models.blocks import bidirectional, stacked, transformer_block

Places = Sequence[str]


def block_of(norm1: str, attend: str, norm2: str, first: str, second: str) -> Callable[[list[Node]], Places | None]:
    """The places of a transformer_block with layer_norm and an mlp of two dense layers."""
    form = layer_norm, attention, layer_norm, dense, dense

    def of(leaves: list[Node]) -> Places | None:
        alike = tuple(leaf.made.constructor if leaf.made else None for leaf in leaves) == form
        return (norm1, attend, norm2, first, second) if alike else None

    return of


IN_TORCH = block_of("norm1", "self_attn", "norm2", "linear1", "linear2")
IN_GPT2 = block_of("ln_1", "attn", "ln_2", "mlp.c_fc", "mlp.c_proj")


def one_kind(leaves: list[Node]) -> bool:
    """True if all are scans of one kind of cell, of one size."""
    cells = {leaf.made.arguments["cell"].name if leaf.made and leaf.made.constructor is scan else "" for leaf in leaves}
    return len(cells) == 1 and "" not in cells


def levels(leaves: list[Node]) -> Places | None:
    """A recurrent module of several layers."""
    return [f"*_l{i}" for i in range(len(leaves))] if one_kind(leaves) else None


def directions(leaves: list[Node]) -> Places | None:
    """A recurrent module of two directions."""
    return ("*_l0", "*_l0_reverse") if one_kind(leaves) else None


def halves(leaves: list[Node]) -> Places | None:
    """Bidirectional of Flax."""
    return "forward_rnn", "backward_rnn"


def of_gpt2(leaves: list[Node]) -> Places | None:
    """GPT2LMHeadModel."""

    def places() -> Iterator[str]:
        yield from ("transformer.wte", "transformer.wpe")
        for i in range(len(leaves) // 5):
            block = IN_GPT2(leaves[2 + 5 * i : 7 + 5 * i]) or ()
            yield from (f"transformer.h.{i}.{part}" for part in block)
        yield from ("transformer.ln_f", "lm_head")

    found = list(places())
    return found if len(found) == len(leaves) else None


BLOCKS: dict[Callable[..., Layer], dict[str, Callable[[list[Node]], Places | None]]] = {
    transformer_block: {"torch": IN_TORCH, "gpt2": IN_GPT2},
    stacked: {"torch": levels},
    bidirectional: {"torch": directions, "linen": halves, "nnx": halves},
    gpt: {"gpt2": of_gpt2},
}


def block(library: str, node: Node) -> Places | None:
    """The places of the layers of a node that a library has as one module, relative to it; None if it has not."""
    if node.made is None:
        return None
    of = BLOCKS.get(node.made.constructor, {}).get(library)
    return None if of is None else of(list(node.leaves()))
