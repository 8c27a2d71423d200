"""What it costs to open the loss of a Flax or an Equinox model: norms, K-FAC factors, the gradient with both.

Each contraction of fnbp.opened is timed against jax.grad of the mean loss of the same model, in turns in one run, and
the norms against jax.vmap of jax.grad. mlp is an Equinox MLP 784-1000-1000-1000-10 with 128 examples; transformer a
Flax one of 4 blocks of width 128 with 12 examples of 64 positions; wide one of 6 blocks of width 512 with 16 examples
of 128 positions. Exit code 1 if two ways to one quantity disagree.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.report import console
from experiments.shared.timing import distance, in_turns, ratios_of, side_of

MINUTES = 3  # on two CPU cores

AGREE = 1e-3  # the most that two ways may differ in float32, relative to the largest number of an array
MOST = {("mlp", "norms"): 1.0, ("transformer", "norms"): 1.1, ("mlp", "pairs"): 1.7, ("transformer", "pairs"): 2.4}
HEADS = ("model", "what", "over", "ms", "ratio (quartiles)", "asked", "memory", "compile", "apart")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    samples: int = 16
    """Pairs of timings."""
    samples_wide: int = 4
    """Pairs of timings of the wide model."""
    model: str = ""
    """Only models whose name contains this: mlp, transformer, wide."""
    seed: int = 0
    """The seed of parameters and data."""
    out: Path = Path("results/opening_cost")
    """The folder for result.json."""


class Model(NamedTuple):
    """The loss of one example of a model, its parameters, and a batch."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, ...]


# --- the models ---


def mlp(seed: int) -> Model:
    """An MLP of Equinox."""
    net = eqx.nn.MLP(784, 10, 1000, 3, key=jax.random.key(seed))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(eqx.combine(params, static)(x), y)

    key = jax.random.key(seed + 1)
    return Model(loss, params, (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10)))


class Block(nn.Module):
    """Attention, then two dense layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape."""
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.zeros(x.shape[0]))
        x = x + nn.MultiHeadDotProductAttention(4)(h, h, mask=mask)
        h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(h))


class Transformer(nn.Module):
    """A language model of letters."""

    blocks: int
    width: int
    letters: int = 65

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Scores of the next letter at every position."""
        x = nn.Embed(self.letters, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(), x.shape)
        for _ in range(self.blocks):
            x = Block(self.width)(x)
        return nn.Dense(self.letters)(nn.LayerNorm()(x))


def transformer(seed: int, blocks: int, width: int, positions: int, examples: int) -> Model:
    """A transformer of Flax."""
    net, keys = Transformer(blocks, width), jax.random.split(jax.random.key(seed), 2)
    tokens = jax.random.randint(keys[0], (examples, positions + 1), 0, net.letters)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(net.apply(params, x)), y).mean()

    return Model(loss, jax.jit(net.init)(keys[1], tokens[0, :-1]), (tokens[:, :-1], tokens[:, 1:]))


MODELS: dict[str, Callable[[int], Model]] = {
    "mlp": mlp,
    "transformer": lambda seed: transformer(seed, 4, 128, 64, 12),
    "wide": lambda seed: transformer(seed, 6, 512, 128, 16),
}


# --- what is measured ---


def of_mean(model: Model) -> Callable:
    """jax.value_and_grad of the mean loss."""
    axes = (None, *[0] * len(model.batch))

    def J(params, *batch):
        return jnp.mean(jax.vmap(model.loss, axes)(params, *batch))

    return jax.value_and_grad(J)


def norms_by_vmap(model: Model) -> Callable:
    """The squared norm of each example's gradient, by jax.vmap of jax.grad."""
    axes = (None, *[0] * len(model.batch))

    def norms(params, *batch):
        rows = jax.tree.leaves(jax.vmap(jax.grad(model.loss), axes)(params, *batch))
        return sum(jnp.sum(g**2, range(1, g.ndim)) for g in rows)

    return norms


def norms(model: Model) -> Callable:
    """The same by fnbp."""
    run = fnbp.opened(model.loss, fnbp.sq_norms)
    return lambda params, *batch: sum(jax.tree.leaves(run(params, *batch)[1]))


def gradient(model: Model) -> Callable:
    """The gradient of the mean loss by fnbp."""
    run = fnbp.opened(model.loss)

    def of(params, *batch):
        losses, grads = run(params, *batch)
        return jnp.mean(losses), grads

    return of


def opened(contract: Any) -> Callable[[Model], Callable]:
    """A contraction of the opened loss."""
    return lambda model: fnbp.opened(model.loss, contract)


WAYS: dict[str, tuple[Callable[[Model], Callable], Callable[[Model], Callable] | None]] = {
    "gradient": (gradient, of_mean),
    "norms": (norms, None),
    "gradient and norms": (opened((fnbp.total, fnbp.sq_norms)), None),
    "pairs": (opened(fnbp.kronecker()), None),
    "gradient and pairs": (opened((fnbp.total, fnbp.kronecker())), None),
}


def main(settings: Settings) -> int:
    """Run the benchmark. Returns: 1 if two ways to one quantity disagree."""
    names = [name for name in MODELS if settings.model in name]
    if not names:
        raise report.InputError(f"--model {settings.model}: there are {', '.join(MODELS)}")
    table = Table(title=f"opened losses, on {jax.devices()[0].device_kind}", title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:3] else "right", no_wrap=True)
    measured: dict[str, Any] = {}
    for name in names:
        model = MODELS[name](settings.seed)
        samples = settings.samples_wide if name == "wide" else settings.samples
        measured[name] = {}
        for row in rows_of(name, model, samples):
            measured[name].setdefault(row["what"], {})[row["against"]] = row
            table.add_row(*cells(name, row))
    console.print(table)
    apart = max(row["apart"] or 0 for rows in measured.values() for some in rows.values() for row in some.values())
    report.save(settings.out, settings, measured | {"apart": apart})
    return int(apart > AGREE)


def rows_of(name: str, model: Model, samples: int) -> list[dict[str, Any]]:
    """A row for each contraction against jax.grad, then the norms against jax.vmap of jax.grad."""
    args = (model.params, *model.batch)
    base = timed(of_mean(model), args)
    rows = []
    for what, (make, same) in WAYS.items():
        ours = timed(make(model), args)
        rows.append(row_of(what, "jax.grad", ours, base, args, samples, same is not None))
        if what == "norms" and name != "wide":
            rows.append(row_of(what, "vmap(jax.grad)", ours, timed(norms_by_vmap(model), args), args, samples, True))
    for row in rows:
        row["most"] = MOST.get((name, row["what"])) if row["against"] == "jax.grad" else None
    return rows


def timed(function: Callable, args: tuple) -> tuple[Any, float]:
    """A function, compiled, and the seconds that tracing and compiling took."""
    jax.clear_caches()
    began = time.perf_counter()
    made = jax.jit(function).lower(*args).compile()
    return made, time.perf_counter() - began


def row_of(
    what: str, against: str, ours: tuple, theirs: tuple, args: tuple, samples: int, same: bool
) -> dict[str, Any]:
    """The ratios of time, of temporary memory, and of the time to trace and compile."""
    (run, seconds), (their_run, their_seconds) = ours, theirs
    found = ratios_of(in_turns((side_of(run, args), side_of(their_run, args)), samples))
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (run, their_run)]
    return found | {
        "what": what,
        "against": against,
        "memory": sizes[0] / sizes[1],
        "compile": seconds / their_seconds,
        "apart": distance(run(*args), their_run(*args)) if same else None,
    }


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row as text. ! marks a ratio above what was asked."""
    low, high = row["time_quartiles"]
    most = row["most"]
    return [
        name,
        row["what"],
        row["against"],
        f"{row['ms']:.1f}",
        f"{row['time']:.3f} ({low:.3f}-{high:.3f})",
        "" if most is None else f"{most:.2f}{' !' if row['time'] > most else ''}",
        f"{row['memory']:.2f}",
        f"{row['compile']:.2f}",
        "" if row["apart"] is None else f"{row['apart']:.0e}",
    ]


if __name__ == "__main__":
    report.run(Settings, main)
