"""On paper: how long a step of GPT-2 takes on many accelerators, from the FLOPs and bytes that its program is made of.

XLA counts the FLOPs and the bytes of one compiled block and of the rest of the net, in float32 on the CPU; a program
that fuses more moves fewer bytes. An accelerator needs the longer of the time to compute and the time to move; then
gradients are added up over all, by a ring within each node and one between nodes. Nothing here is timed: the speeds are
those of a data sheet, and --used says what part of them a program reaches. The defaults are of an NVIDIA H200 (989
TFLOP/s in bfloat16, 4.8 TB/s, 450 GB/s to its neighbours in a node of eight), with a network of 50 GB/s for each.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.report import console

MINUTES = 1  # on two CPU cores


@dataclass(frozen=True)
class Settings:
    """GPT-2 small on accelerators of one kind."""

    layers: int = 12
    """The blocks of the net."""
    heads: int = 12
    """The heads of attention."""
    width: int = 768
    """The features of each position."""
    vocabulary: int = 50_257
    """The tokens that there are."""
    length: int = 1024
    """The tokens of an example."""
    batch_size: int = 8
    """The examples of one accelerator, where each has as many, however many accelerators there are."""
    total: int = 512
    """The examples of all together, where they share a batch."""
    accelerators: tuple[int, ...] = (1, 8, 256)
    """How many accelerators there are."""
    node: int = 8
    """How many stand in a node."""
    flops: float = 989e12
    """What an accelerator computes in a second."""
    memory: float = 4.8e12
    """The bytes that it reads or writes in a second."""
    link: float = 450e9
    """The bytes that it sends in a second to its neighbours in the node."""
    network: float = 50e9
    """The bytes that it sends in a second to another node."""
    used: float = 0.4
    """What part of these speeds a program reaches."""
    gradient_bytes: int = 4
    """The bytes of a number of a gradient."""
    out: Path = Path("results/scaling")
    """The folder for result.json."""


class Work(NamedTuple):
    """What one example takes: FLOPs and bytes; and the parameters of the net."""

    flops: float
    bytes: float
    parameters: int


def main(settings: Settings) -> int:
    """Predict. Returns: 0."""
    work = work_of(settings)
    console.print(f"{work.parameters:,} parameters; {work.flops:.3g} FLOPs and {work.bytes:.3g} bytes for an example")
    table = Table(title="a step, in milliseconds", title_justify="left")
    for column in ("accelerators", "examples of each", "compute", "add up", "step", "of the speed of one"):
        table.add_column(column, justify="right")
    rows = []
    for fixed in (True, False):
        for n in settings.accelerators:
            each = settings.batch_size if fixed else settings.total / n
            computing, adding = each * seconds_of(settings, work), adding_up(settings, work, n)
            alone = computing / (computing + adding)
            milliseconds = {"compute_ms": 1e3 * computing, "add_ms": 1e3 * adding}
            rows.append({"n": n, "each": each, **milliseconds, "alone": alone})
            taken = (f"{ms:.1f}" for ms in (*milliseconds.values(), sum(milliseconds.values())))
            table.add_row(str(n), f"{each:g}", *taken, f"{alone:.0%}")
        table.add_section()
    console.print(table)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    stops = stops_at(settings, work)
    console.print(f"{settings.total} examples on {stops} accelerators: adding up takes as long as computing")
    report.save(settings.out, settings, {**work._asdict(), **columns, "stops_at": stops})
    return 0


def work_of(settings: Settings) -> Work:
    """What XLA counts for one example. A loop over depth is counted once, so that the other blocks are added to it."""
    tokens = jax.ShapeDtypeStruct((1, settings.length), jnp.int32)
    sizes = settings.length, settings.heads, settings.width
    net = fnbp.models.gpt(settings.vocabulary, sizes[0], settings.layers, *sizes[1:])
    x = jax.ShapeDtypeStruct((1, settings.length, settings.width), jnp.float32)
    whole, params = counted(net, fnbp.softmax_cross_entropy(), tokens, tokens)
    block, _ = counted(fnbp.transformer_block(settings.width, settings.heads), squared(), x, x)
    flops, moved = (a + (settings.layers - 1) * b for a, b in zip(whole, block, strict=True))
    return Work(flops, moved, sum(leaf.size for leaf in jax.tree.leaves(params)))


def squared() -> fnbp.Loss:
    """A loss that costs next to nothing."""
    return fnbp.mean_squared_error()


def counted(net: fnbp.Layer, loss: fnbp.Loss, x: jax.ShapeDtypeStruct, y: jax.ShapeDtypeStruct) -> tuple[tuple, dict]:
    """The FLOPs and bytes of the gradient of a net, as XLA counts them; and its params, as shapes."""
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)
    analysis = jax.jit(fnbp.value_and_grad(net, loss)).lower(params, state, x, y).compile().cost_analysis()
    assert analysis is not None  # every backend of XLA counts
    return (analysis["flops"], analysis["bytes accessed"]), params


def seconds_of(settings: Settings, work: Work) -> float:
    """How long an accelerator takes for one example: the longer of computing and moving."""
    return max(work.flops / settings.flops, work.bytes / settings.memory) / settings.used


def adding_up(settings: Settings, work: Work, n: int) -> float:
    """How long the sum of the gradients over n accelerators takes, beside nothing else: 2 (n - 1) / n of their bytes.

    Within a node by a ring over its links; then each of its members adds up its part with those of the other nodes.
    """
    size = settings.gradient_bytes * work.parameters
    inside, nodes = min(n, settings.node), -(-n // settings.node)
    within = 2 * (inside - 1) / inside * size / settings.link
    between = 2 * (nodes - 1) / nodes * size / inside / settings.network
    return (within + between) / settings.used


def stops_at(settings: Settings, work: Work) -> int:
    """The first power of two of accelerators on which adding up takes as long as computing."""
    n = 2
    while settings.total / n * seconds_of(settings, work) > adding_up(settings, work, n):
        n *= 2
    return n


if __name__ == "__main__":
    report.run(Settings, main)
