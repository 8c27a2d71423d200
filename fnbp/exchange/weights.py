"""from_torch, to_torch, from_flax, to_flax."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh

from fnbp.arrays.checks import check_is, choose, describe
from fnbp.exchange.belonging import check_approximate, check_belongs
from fnbp.exchange.given import arrays_of, check_held_by, flat, of_gpt2, of_linen
from fnbp.exchange.nodes import Absent, Node, built, copies, node_of
from fnbp.exchange.places import Finder
from fnbp.exchange.rows import Row
from fnbp.layer import Layer
from fnbp.processes import brought

__all__ = ["from_flax", "from_torch", "to_flax", "to_torch"]

Places = Mapping[str, str] | None


def from_torch(
    net: Layer, weights: Mapping[str, Any], params: Any, state: Any, places: Places = None, layout: str = "torch"
) -> tuple[Any, Any]:
    """Return params and state of a net with the weights of a PyTorch module, by the names of its state_dict.

        from_torch(net, module.state_dict(), *net.init(key, x))      PyTorch itself is not imported

        dense      W      = weight                      conv, conv_transpose  W = weight, axis 1 moved to the end
        norms      gamma  = weight, beta = bias         batch_norm  mean, var = running_mean, running_var
        embedding  E      = weight                      positions   P = weight, of an Embedding of 0, 1, 2, ...
        cells      W, U, b, c = weight_ih, weight_hh, bias_ih, bias_hh      scan: with _l0; gates in the same order
        attention  Q, K, V = the thirds of in_proj_weight, O = out_proj.weight, biases alike
        tie        both names, or the source's alone

    By default each layer takes the first entry that is left, which must bear one of its names, and those beside it: so
    modules must have the order of our layers. transformer_block takes a TransformerEncoderLayer(norm_first=True) as
    one, stacked and bidirectional an RNN, LSTM or GRU. places says where layers stand, by their paths in named:
    {"serial[0].dense(5)": "encoder.fc1", "repeat(3)[0].dense(7)": "blocks.{}", "serial[1].scan(lstm_cell(5))":
    "lstm.*_l1"}; {} is the turn of repeat, and * where the name of the array goes.

    The bias of K is left out: softmax does not see it. count is num_batches_tracked, at least 1 and at most 2^31 - 1,
    or 1 if that is absent: PyTorch uses running statistics whatever it says. With layout "gpt2" attn.bias and
    attn.masked_bias, which hold the causal mask, are left out. What is no weight is not compared: eps, momentum, heads,
    strides, the activation. Each array takes the dtype of the one in params, and its place if that was placed, as on a
    mesh.

    Options: params, state: those of the net, or their shapes. layout: "gpt2" for the names of GPT-2, whose matrices are
             transposed, with or without "transformer." and "module." in front, for a net by
             models.gpt(..., approximate=True); a net with an exact gelu is refused.
    Source:  the docstring of each module of torch.nn, "Attributes"; for GPT-2 GPT2Attention, GPT2MLP and GPT2Block in
             models/gpt2/modeling_gpt2.py of transformers.
    Raises:  TypeError if net is not a Layer, or a layer has no counterpart; ValueError if an entry is missing, is left
             over or has another shape, the two places of a tie differ, a number is not finite, or not so in the dtype
             of params, or params or state do not belong to the net.
    """
    choose("layout", layout, {"torch": 0, "gpt2": 0}, "from_torch: ")
    check_is("from_torch", "net", net, Layer)
    given = arrays_of("from_torch", weights)
    given = of_gpt2(given) if layout == "gpt2" else given
    return taken("from_torch", net, given, params, state, places, layout)


def to_torch(
    net: Layer, params: Any, state: Any, places: Places = None, layout: str = "torch"
) -> dict[str, np.ndarray]:
    """Return the weights of a net as arrays of NumPy, by the names of a PyTorch module: what from_torch takes.

        module.load_state_dict({name: torch.tensor(a) for name, a in to_torch(net, params, state).items()})

    By default names are those of torch.nn.Sequential, "2.weight", with the same numbers as our serial and repeat; skip,
    remat, cast, ragged, freeze and tie have none. The bias of K is 0. bfloat16 is returned as float32, since NumPy has
    none.

    A tree of gradients goes likewise, to_torch(net, grads, None), and is then that of the module. Frozen layers and
    running statistics, which stand in the state, are then left out: they have no gradients.

    Options: params, state: those of the net; state=None: params are a tree of gradients. places, layout: as in
             from_torch.
    Raises:  TypeError if net is not a Layer, or a layer has no counterpart; ValueError if two layers have one place, or
             params or state do not belong to the net.
    """
    choose("layout", layout, {"torch": 0, "gpt2": 0}, "to_torch: ")
    return {name: narrowed(array) for name, array, _ in given_out("to_torch", net, params, state, places, layout)}


def from_flax(
    net: Layer, variables: Mapping[Any, Any], params: Any, state: Any, places: Places = None, layout: str = "linen"
) -> tuple[Any, Any]:
    """Return params and state of a net with the weights of a Flax module.

        from_flax(net, module.init(key, x), *net.init(key, x))                               Linen
        from_flax(net, nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))), *net.init(key, x), layout="nnx")

        dense      W = kernel^T                         conv            W = kernel, the last axis moved to the front
        norms      gamma = scale, beta = bias           conv_transpose  W = kernel, axis -2 to the front, reversed
        batch_norm mean, var = mean, var; count = 1     embedding, positions  E, P = embedding
        attention  Q, K, V, O = kernels of query, key, value, out, whose heads are one axis; the bias of K is left out
        rnn_cell   W, U, b = i.kernel^T, h.kernel^T, i.bias; c = 0
        lstm_cell  W, U, c = ii if ig io, hi hf hg ho, transposed; b = 0
        gru_cell   W, U = ir iz in, hr hz hn, transposed; b = biases of ir iz in, c = 0, 0, bias of hn

    Flax sorts what it holds by name, so there is no order to follow: by default the places are those of Sequential. The
    names of the cells are those of Linen. In NNX rnn_cell is SimpleCell and gru_cell is GRUCell, with dense_i and
    dense_h for all gates, so b holds all biases and c is 0; lstm_cell is LSTMCell. A scan is RNN, bidirectional is
    Bidirectional.

    Options: variables: of Linen "params", and "batch_stats" if there are any; other collections are refused. params,
             state, places: as in from_torch; a place is "Dense_0", or "encoder.Dense_0". layout: "linen" or "nnx".
    Source:  flax.linen and flax.nnx, version 0.12.
    Raises:  as from_torch.
    """
    choose("layout", layout, {"linen": 0, "nnx": 0}, "from_flax: ")
    check_is("from_flax", "net", net, Layer)
    if not isinstance(variables, Mapping):
        raise TypeError(f"from_flax: variables must be a dict, got {describe(variables)}")
    named = of_linen(variables) if layout == "linen" else dict(flat(variables))
    given = arrays_of("from_flax", named)
    return taken("from_flax", net, given, params, state, places, layout)


def to_flax(net: Layer, params: Any, state: Any, places: Places = None, layout: str = "linen") -> dict[Any, Any]:
    """Return the weights of a net as arrays of NumPy in the nested dicts of a Flax module: what from_flax takes.

        module.apply(to_flax(net, params, state), x)                                                        Linen
        held = nnx.state(module)                                                                            NNX
        nnx.replace_by_pure_dict(held, to_flax(net, params, state, layout="nnx")); nnx.update(module, held)

    By default names are those of Sequential, "layers_2" in Linen and "layers", 2 in NNX. Cells of Flax have one bias
    where ours have two, and take their sum, so a gradient of ours is not theirs there. The bias of K is 0. bfloat16
    stays bfloat16, the dtype of ml_dtypes that JAX uses.

    Options: params, state: those of the net; state=None: params are a tree of gradients, as in to_torch. places,
             layout: as in from_flax.
    Raises:  as to_torch; ValueError if the last third of c of gru_cell is not 0, which NNX has no place for.
    """
    choose("layout", layout, {"linen": 0, "nnx": 0}, "to_flax: ")
    found: dict[Any, Any] = {"params": {}} if layout == "linen" else {}
    for name, array, is_state in given_out("to_flax", net, params, state, places, layout):
        keys: list[Any] = name.split(".")
        if layout == "linen":
            keys.insert(0, "batch_stats" if is_state else "params")
        else:
            keys = [int(key) if key.isdigit() else key for key in keys]
        at = found
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = array
    return found


# --- both ways ---


def taken(
    maker: str, net: Layer, given: dict[str, np.ndarray], params: Any, state: Any, places: Places, library: str
) -> tuple[Any, Any]:
    """params and state, of arrays by name."""
    check_arrays(maker, params, state)
    root = node_of(net.name, net, *jax.tree.map(form_of, (params, state)))
    check_belongs(maker, root)
    if library == "gpt2":
        check_approximate(maker, root)
    finder, doubled = Finder(maker, library, root, places), copies(net.name, net)
    finder.determined(root, None if library == "torch" else "")
    if library == "torch":
        finder.in_order(given)
    left, values = dict(given), {}
    where: dict[str, str] = {}
    for leaf in root.leaves():
        values[leaf.key] = read(finder, leaf, left, given, doubled, where)
    if left:
        rest = ", ".join(f"{name} of shape {a.shape}" for name, a in left.items())
        raise ValueError(f"{maker}: nothing in {net.name} takes {rest}")

    def differ(node: Node, source: Any, target: Any) -> None:
        raise ValueError(f"{maker}: {node.path} has one parameter at {source} and {target}, and their entries differ")

    leaves, form = jax.tree.flatten(built(root, values, differ))
    return jax.tree.unflatten(form, map(laid, leaves, jax.tree.leaves((params, state))))


def check_arrays(maker: str, params: Any, state: Any) -> None:
    """TypeError unless all leaves of params and state are arrays, or the shapes of arrays."""
    for what, tree in (("params", params), ("state", state)):
        for keys, a in jax.tree_util.tree_leaves_with_path(tree):
            if not (hasattr(a, "shape") and hasattr(a, "dtype")):
                raise TypeError(f"{maker}: {what}{jax.tree_util.keystr(keys)} must be an array, got {describe(a)}")


def laid(a: np.ndarray, like: Any) -> jax.Array:
    """a as an array of JAX, where a parameter lies, if that was placed."""
    where = None if isinstance(like, Tracer) else getattr(like, "sharding", None)
    told = where is not None and getattr(like, "committed", True)
    if not told or isinstance(getattr(where, "mesh", None), AbstractMesh):
        return jnp.asarray(a)
    return jax.device_put(a, where)


def form_of(a: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, and the dtype that JAX gives it."""
    return jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.canonicalize_dtype(a.dtype))


def read(
    finder: Finder, leaf: Node, left: dict[str, Any], given: Mapping[str, np.ndarray], doubled: Mapping[str, str],
    where: dict[str, str],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The arrays of one layer. ValueError if one is missing or has another shape."""
    of, place = finder.counterpart(leaf), finder.found.get(leaf.key)
    theirs: dict[str, np.ndarray] = {}
    for one in of.of(leaf.held):
        due, ours = one.shape(leaf.held), leaves_of(leaf, one)
        name = one.theirs + of.suffix if place is None else place.replace("*", one.theirs)
        if place is None or name not in given:
            if of.optional(one) or all(f"{leaf.path}.{piece.leaf}" in doubled for piece in one.pieces):
                continue
            close = "" if place is not None else finder.nearby(leaf, one.theirs)
            late = " in its turn" if name in given else ""
            raise ValueError(
                f"{finder.maker}: no entry {name} of shape {due}{late}, which {ours} needs{close}; there are "
                f"{', '.join(list(given)[:8]) or 'none'}{', ...' if len(given) > 8 else ''}"
            )
        if name in where:
            raise ValueError(f"{finder.maker}: {where[name]} and {ours} have one place, {name}")
        where[name] = ours
        left.pop(name, None)
        if given[name].shape != due:
            raise ValueError(f"{finder.maker}: {name} has shape {given[name].shape}, {ours} needs {due}")
        if not jnp.issubdtype(given[name].dtype, jnp.floating) and not of.optional(one):
            raise TypeError(f"{finder.maker}: {name} must be of floating point numbers, got {describe(given[name])}")
        check_held_by(finder.maker, name, given[name], dtype_of(leaf, one))
        theirs[one.theirs] = given[name]
    return {name: a.astype(leaf.held[name].dtype) for name, a in of.back(leaf.held, theirs).items()}


def dtype_of(leaf: Node, one: Row) -> Any:
    """The dtype of the leaves of a row."""
    piece = one.pieces[0]
    return leaf.held[piece.leaf if piece.leaf in leaf.held else str(piece.like)].dtype


def leaves_of(leaf: Node, one: Row) -> str:
    """The leaves of a row, with their shapes, as a message names them."""
    held = [piece.leaf for piece in one.pieces if piece.leaf in leaf.held]
    return ", ".join(f"{leaf.label}.{name} of shape {leaf.held[name].shape}" for name in dict.fromkeys(held))


def given_out(
    maker: str, net: Layer, params: Any, state: Any, places: Places, library: str
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(name, array, True if it is of the state), layer by layer."""
    check_is(maker, "net", net, Layer)
    check_arrays(maker, params, state)
    params, state = brought((params, Absent() if state is None else state))
    root = node_of(net.name, net, params, state)
    check_belongs(maker, root)
    finder, seen = Finder(maker, library, root, places), {}
    finder.determined(root, "")
    for leaf in root.leaves():
        of, place = finder.counterpart(leaf), finder.found[leaf.key]
        try:
            arrays = of.there(leaf.held)
        except ValueError as error:
            raise ValueError(f"{maker}: {leaf.label}: {error}") from error
        for one in of.of(leaf.held):
            name = place.replace("*", one.theirs)
            if name in seen:
                raise ValueError(f"{maker}: {seen[name]} and {leaf.label} have one place, {name}")
            seen[name] = leaf.label
            yield name, arrays[one.theirs], all(piece.leaf in leaf.state for piece in one.pieces)


def narrowed(a: np.ndarray) -> np.ndarray:
    """An array in a dtype of NumPy: bfloat16, which NumPy has not, as float32."""
    return a.astype(np.float32) if a.dtype == jnp.bfloat16 else a
