"""What each layer is in PyTorch and Flax: the one table, an entry for each constructor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fnbp.combinators.loops import scan
from fnbp.construction import Made
from fnbp.exchange.inputs import Arguments, cell_input, features, images, sequences, tokens
from fnbp.exchange.nodes import intact
from fnbp.exchange.rows import (
    CHANNELS_SECOND,
    COUNT,
    OUT_LAST,
    REVERSED,
    SAME,
    TURNED,
    Counterpart,
    Held,
    Order,
    Piece,
    Row,
    row,
    split,
    split_in,
    split_out,
)
from fnbp.layer import Layer
from fnbp.layers.attention import attention
from fnbp.layers.convolution import bias, conv, conv_transpose
from fnbp.layers.dense import dense
from fnbp.layers.embedding import embedding, positions
from fnbp.layers.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnbp.layers.recurrent import gru_cell, lstm_cell, rnn_cell

Given = tuple[Row, ...] | Counterpart | Callable[[Arguments, Held], Counterpart | str] | str


@dataclass(frozen=True)
class Entry:
    """A layer in each library: rows, a function of its arguments and leaves, or why it has no counterpart there.

    x: an input that it takes, of its arguments and leaves. nnx and gpt2: where these differ from linen and torch; ()
    where they do not.
    """

    x: Callable[[Arguments, Held], Any]
    torch: Given
    linen: Given
    nnx: Given = ()
    gpt2: Given = ()

    def of(self, library: str, arguments: Arguments, held: Held) -> Counterpart | str:
        """The counterpart of a layer that was made with these arguments, or why it has none."""
        given: Given = getattr(self, library) or getattr(self, {"nnx": "linen", "gpt2": "torch"}[library])
        if isinstance(given, tuple):
            return Counterpart(given)
        return given if isinstance(given, (Counterpart, str)) else given(arguments, held)


def attention_in_torch(arguments: Arguments, held: Held) -> Counterpart | str:
    """MultiheadAttention: one array of Q, K, V, or three where the memory has a width of its own."""
    if (why := plain(arguments)) is not None:
        return f"torch.nn.MultiheadAttention {why}"
    if held["K"].shape != held["Q"].shape:
        matrices = tuple(row(f"{leaf.lower()}_proj_weight", leaf) for leaf in "QKV")
    else:
        matrices = (row("in_proj_weight", "Q", "K", "V"),)
    out = row("out_proj.weight", "O"), row("out_proj.bias", "b_O")
    return Counterpart((*matrices, row("in_proj_bias", *BIASES), *out))


def attention_in_gpt2(arguments: Arguments, held: Held) -> Counterpart | str:
    """Two Conv1D: c_attn of Q, K, V, and c_proj."""
    if (why := plain(arguments)) is not None:
        return f"the attention of GPT-2 {why}"
    matrices = row("c_attn.weight", "Q", "K", "V", order=TURNED), row("c_proj.weight", "O", order=TURNED)
    return Counterpart((*matrices, row("c_attn.bias", *BIASES), row("c_proj.bias", "b_O")))


def attention_in_flax(arguments: Arguments, held: Held) -> Counterpart | str:
    """MultiHeadDotProductAttention of Linen, MultiHeadAttention of NNX: heads have an axis of their own."""
    if (why := plain(arguments)) is not None:
        return f"the attention of Flax {why}"
    heads = arguments["heads"]
    names = dict(zip("QKV", ("query", "key", "value"), strict=True))
    matrices = [row(f"{name}.kernel", leaf, order=split_out(heads)) for leaf, name in names.items()]
    shifts = [row(f"{names[leaf]}.bias", piece, order=split(heads)) for leaf, piece in zip("QKV", BIASES, strict=True)]
    return Counterpart((*matrices, *shifts, row("out.kernel", "O", order=split_in(heads)), row("out.bias", "b_O")))


BIASES = Piece("b_Q"), Piece("b_K", like="b_Q"), Piece("b_V")  # softmax does not see a bias of K: it is 0 there


def plain(arguments: Arguments) -> str | None:
    """Why attention with these arguments is not that of another library; None if it is."""
    if arguments["rotary"] is not None:
        return "has no rotary embedding"
    if arguments["kv_heads"] not in (None, arguments["heads"]):
        return "has as many key/value heads as heads"
    return None


def not_grouped(arguments: Arguments, held: Held) -> Counterpart | str:
    """ConvTranspose of Flax, which knows no groups."""
    if arguments["groups"] != 1:
        return "ConvTranspose of Flax has no groups"
    return Counterpart((row("kernel", "W", order=REVERSED), row("bias", "b")))


def kernels(prefix: str, leaf: str, letters: str, after: str = "") -> tuple[Row, ...]:
    """A kernel for each gate: the parts of W, or of U."""
    n = len(letters)
    return tuple(
        row(f"{prefix}{letter}{after if letter == 'f' else ''}.kernel", Piece(leaf, (i, n)), order=TURNED)
        for i, letter in enumerate(letters)
    )


def lstm_in_flax(after: str) -> tuple[Row, ...]:
    """LSTMCell: a kernel for each gate, and the sum of both biases at those of h."""
    shifts = (row(f"h{letter}.bias", Piece("c", (i, 4), plus="b")) for i, letter in enumerate("ifgo"))
    return *kernels("i", "W", "ifgo", after), *kernels("h", "U", "ifgo"), *shifts


GRU_IN_LINEN = (
    *kernels("i", "W", "rzn"),
    *kernels("h", "U", "rzn"),
    *(row(f"i{letter}.bias", Piece("b", (i, 3), plus="c")) for i, letter in enumerate("rz")),
    row("in.bias", Piece("b", (2, 3))),
    row("hn.bias", Piece("c", (2, 3))),
)
GRU_IN_NNX = Counterpart(
    (
        row("dense_i.kernel", "W", order=TURNED),
        row("dense_h.kernel", "U", order=TURNED),
        row("dense_i.bias", Piece("b", (0, 3), plus="c"), Piece("b", (1, 3), plus="c"), Piece("b", (2, 3))),
    ),
    zero=(Piece("c", (2, 3)),),
)


def rnn_in_flax(i: str, h: str) -> tuple[Row, ...]:
    """SimpleCell: the sum of both biases at that of x."""
    kernels = row(f"{i}.kernel", "W", order=TURNED), row(f"{h}.kernel", "U", order=TURNED)
    return *kernels, row(f"{i}.bias", Piece("b", plus="c"))


CELL = row("weight_ih", "W"), row("weight_hh", "U"), row("bias_ih", "b"), row("bias_hh", "c")


def scanned(library: str) -> Callable[[Arguments, Held], Counterpart | str]:
    """A scan of a cell: RNN, LSTM or GRU of PyTorch, RNN of Flax."""

    def of(arguments: Arguments, held: Held) -> Counterpart | str:
        made = intact(arguments["cell"])
        if made is None or made.constructor not in (rnn_cell, lstm_cell, gru_cell):
            return "only scans of rnn_cell, lstm_cell and gru_cell have counterparts"
        if library == "torch":
            return Counterpart(CELL, suffix="_l0_reverse" if arguments["reverse"] else "_l0")
        cell = TABLE[made.constructor].of(library, {}, held)
        assert isinstance(cell, Counterpart)
        return Counterpart(tuple(Row(f"cell.{one.theirs}", one.pieces, one.order) for one in cell.rows), zero=cell.zero)

    return of


def affine(weight: str, order: Order = SAME) -> tuple[Row, ...]:
    """W by that name and in that order, and b."""
    return row(weight, "W", order=order), row("bias", "b")


def normed(gamma: str) -> tuple[Row, ...]:
    """gamma by that name, and beta."""
    return row(gamma, "gamma"), row("bias", "beta")


BATCH_NORM_IN_TORCH = Counterpart(
    (
        *normed("weight"),
        row("running_mean", "mean"),
        row("running_var", "var"),
        row("num_batches_tracked", "count", order=COUNT),
    ),
    otherwise={"count": 1},
)
BATCH_NORM_IN_FLAX = Counterpart((*normed("scale"), row("mean", "mean"), row("var", "var")), otherwise={"count": 1})

TABLE: dict[Callable[..., Layer], Entry] = {
    dense: Entry(features("W", 1), affine("weight"), affine("kernel", TURNED), gpt2=affine("weight", TURNED)),
    conv: Entry(images(-1), affine("weight", CHANNELS_SECOND), affine("kernel", OUT_LAST)),
    conv_transpose: Entry(images(0), affine("weight", CHANNELS_SECOND), not_grouped),
    bias: Entry(
        features("b", 1), "PyTorch has no module that adds only a bias", "Flax has no module that adds only a bias"
    ),
    layer_norm: Entry(features("gamma", 1), normed("weight"), normed("scale")),
    group_norm: Entry(features("gamma", 1), normed("weight"), normed("scale")),
    rms_norm: Entry(features("gamma", 1), (row("weight", "gamma"),), (row("scale", "gamma"),)),
    batch_norm: Entry(features("gamma", 1), BATCH_NORM_IN_TORCH, BATCH_NORM_IN_FLAX),
    embedding: Entry(tokens, (row("weight", "E"),), (row("embedding", "E"),)),
    positions: Entry(features("P", 1, 1), (row("weight", "P"),), (row("embedding", "P"),)),
    attention: Entry(sequences, attention_in_torch, attention_in_flax, gpt2=attention_in_gpt2),
    rnn_cell: Entry(cell_input, CELL, rnn_in_flax("i", "h"), nnx=rnn_in_flax("dense_i", "dense_h")),
    lstm_cell: Entry(cell_input, CELL, lstm_in_flax(""), nnx=lstm_in_flax("_")),
    gru_cell: Entry(cell_input, CELL, GRU_IN_LINEN, nnx=GRU_IN_NNX),
    scan: Entry(features("W", 1, 1), scanned("torch"), scanned("linen"), nnx=scanned("nnx")),
}


def counterpart(library: str, made: Made | None, held: Held) -> Counterpart | str:
    """What a layer with leaves is in a library; a text, why there is none."""
    if made is None or made.constructor not in TABLE:
        return "the table of fnbp.exchange has no entry for it"
    return TABLE[made.constructor].of(library, made.arguments, held)
