"""compare names the culprit of one mistake in a random net of many layers: its layer, its leaf, its likely kind."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.random_nets import random_net, size

MINUTES = 15  # on two CPU cores


@dataclass
class Settings:
    """Settings of the nets, of eight layers or more, in each of which one mistake is planted."""

    trials: int = 200
    """The number of nets. 200 take about 15 minutes on two cores."""
    seed: int = 0
    """The seed of the first net; the others follow it."""
    jobs: int = os.cpu_count() or 1
    """The number of processes that share the work."""
    out: Path = Path("results/localisation")
    """The folder for result.json, trials.jsonl and the figure of the first net."""


class Mistake(NamedTuple):
    """A change of one cotangent: (right, x, dy) -> wrong; and what a hint must say if there is one."""

    change: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    says: str
    fits: Callable[[jax.Array, jax.Array], bool] = lambda d, dy: True


MISTAKES = {
    "sign": Mistake(lambda d, x, dy: -d, "the sign is flipped"),
    "a factor 2": Mistake(lambda d, x, dy: 2 * d, "a factor 2 too many"),
    "a missing 2": Mistake(lambda d, x, dy: d / 2, "a factor 2 is missing"),
    "mean for sum": Mistake(lambda d, x, dy: d / len(x), f"divided by {13}"),
    "sum for mean": Mistake(lambda d, x, dy: d * len(x), f"times {13}"),
    "dropped": Mistake(lambda d, x, dy: 0 * d, "all zero"),
    "one percent": Mistake(lambda d, x, dy: 1.01 * d, "1.01 times"),
    "bfloat16 inside": Mistake(lambda d, x, dy: d.astype(jnp.bfloat16).astype(d.dtype), "bfloat16"),
    "float32 inside": Mistake(lambda d, x, dy: d.astype(jnp.float32).astype(d.dtype), "float32"),
    "a row left out": Mistake(lambda d, x, dy: d.at[-1].set(0), "wrong at", lambda d, dy: len(d) > 2),
    "off by one": Mistake(lambda d, x, dy: jnp.roll(d, 1, 0), "off by one", lambda d, dy: len(d) > 3),
    "transposed": Mistake(lambda d, x, dy: d.T, "transposed", lambda d, dy: d.ndim == 2 and len(set(d.shape)) == 1),
    "slope left out": Mistake(lambda d, x, dy: dy, "dy as it came", lambda d, dy: d.shape == dy.shape),
    "dy twice": Mistake(lambda d, x, dy: d + dy, "once too often", lambda d, dy: d.shape == dy.shape),
    "decay": Mistake(lambda d, x, dy: d + 1e-4 * x, "0.0001 times x", lambda d, dy: d.shape == dy.shape),
    "dy ignored": Mistake(lambda d, x, dy: jnp.cos(jnp.arange(1.0, d.size + 1)).reshape(d.shape), "does not depend"),
    "a mean missing": Mistake(
        lambda d, x, dy: d + d.mean(-1, keepdims=True), "a mean over it", lambda d, dy: d.ndim == 2 and d.shape[1] > 2
    ),
}  # fmt: skip
M = 13


def planted(net: fnbp.Layer, path: str, leaf: str, mistake: Mistake) -> fnbp.Layer:
    """A net with a mistake in one cotangent of one layer."""

    def at(here, layer):
        if here != path:
            return layer

        def forward(params, state, x, ctx):
            y, state, res = layer.forward(params, state, x, ctx)
            return y, state, (res, x)

        def backward(params, res, dy):
            res, x = res
            factors, dx = layer.backward(params, res, dy)
            if leaf == "x":
                return factors, mistake.change(dx, x, dy).astype(dx.dtype)
            total = factors[leaf].total()
            return factors | {leaf: mistake.change(total, x, dy).astype(total.dtype)}, dx

        return fnbp.replace_functions(layer, forward=forward, backward=backward)

    return fnbp.map_layers(at, net)


def one_trial(seed: int, figure: Path | None = None) -> dict[str, Any]:
    """Plant a mistake in a net and ask compare which layer is wrong; draw the report if a path is given."""
    rng = np.random.default_rng(seed)
    net = random_net(rng, int(rng.integers(8, 13)), 12)
    x = jnp.asarray(rng.standard_normal((M, size(rng, 11))), jnp.float32)
    params, state = jax.jit(net.init)(jax.random.key(seed), x)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    shapes = shapes_by_path(net, params, state, x)
    seen = [(path, layer, p, shapes[path]) for path, layer, p in fnbp.leaves(net, params)]
    while True:
        path, layer, p, (d, dy) = seen[rng.integers(len(seen))]
        leaf = ["x", *p][rng.integers(1 + len(p))]
        name = list(MISTAKES)[rng.integers(len(MISTAKES))]
        right = d if leaf == "x" else p[leaf]
        if MISTAKES[name].fits(right, dy) and not harmless(layer, leaf, name, dy):
            break
    start = time.perf_counter()
    found = fnbp.compare(
        planted(net, path, leaf, MISTAKES[name]), x, params=params, state=state, key=jax.random.key(seed),
        probes=("given", "another", "nearby"), transforms=(),
    )  # fmt: skip
    if figure:
        found.plot(figure)
    fault = found.first_fault
    return {
        "seed": seed,
        "layers": len(seen),
        "planted": [path, leaf, name],
        "blamed": [fault.path, fault.leaf, fault.kind, fault.hint] if fault else None,
        "caught": fault is not None,
        "layer": bool(fault and fault.path == path),
        "leaf": bool(fault and (fault.path, fault.leaf) == (path, leaf)),
        "named": bool(fault and fault.hint),
        "mistake": bool(fault and fault.hint and MISTAKES[name].says in fault.hint),
        "others": len(found.faults) - 1 if fault else 0,
        "seconds": time.perf_counter() - start,
    }


ADDED = ("dy twice", "decay", "dy ignored", "slope left out")  # what changes a cotangent of zeros too


def harmless(layer: fnbp.Layer, leaf: str, name: str, dy: Any) -> bool:
    """True if the change is no mistake: the identity's slope, or a factor of the dx of a softmax of one number."""
    slope = layer.name == "identity" and leaf == "x" and name == "slope left out"
    constant = layer.name in ("softmax", "log_softmax") and dy.shape[-1] == 1 and name not in ADDED
    return slope or constant


def shapes_by_path(net: fnbp.Layer, params: Any, state: Any, x: Any) -> "dict[str, Shapes]":
    """The shapes of the input and of the output of every layer, by path."""
    found = {}

    def noted(path, layer):
        def forward(params, state, x, ctx):
            y, state, res = layer.forward(params, state, x, ctx)
            found[path] = Shapes(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y, state, res

        return fnbp.replace_functions(layer, forward=forward)

    spied = fnbp.map_layers(noted, net)
    jax.eval_shape(lambda p, s, x: spied.forward(p, s, x, fnbp.Context())[0], params, state, x)
    return found


class Shapes(NamedTuple):
    """The shapes of the input of a layer and of its output."""

    x: Any
    y: Any


def main(settings: Settings) -> int:
    """Run all trials and print which layer was blamed. Returns: 1 if a rate is too low, else 0."""
    seeds = range(settings.seed, settings.seed + settings.trials)
    tasks = [(seed, settings.out / "figure.png" if seed == settings.seed else None) for seed in seeds]
    log = settings.out / "trials.jsonl"
    said = list(report.spread(one_trial, tasks, settings.jobs, log, "planting mistakes"))
    report.console.print(by_mistake(said))
    rates = {name: np.mean([one[name] for one in said]) for name in ("caught", "layer", "leaf", "named")}
    named = [one for one in said if one["named"]]
    rates["mistake"] = np.mean([one["mistake"] for one in named])
    rows = [
        ("nets", f"{len(said)}, of {min(o['layers'] for o in said)} to {max(o['layers'] for o in said)} layers"),
        ("caught", f"{rates['caught']:.1%}"),
        ("the right layer is the first fault", f"{rates['layer']:.1%}"),
        ("and the right leaf", f"{rates['leaf']:.1%}"),
        ("a likely mistake is named", f"{rates['named']:.1%}"),
        ("and is the right one", f"{rates['mistake']:.1%} of those"),
        ("other leaves accused", f"{sum(one['others'] for one in said)} leaves in all"),
    ]
    report.console.print(report.figures(rows))
    for one in said:
        if not one["leaf"] or (one["named"] and not one["mistake"]):
            report.console.print(
                f"[yellow]missed[/] seed {one['seed']}: planted {one['planted']}, blamed {one['blamed']}"
            )
    sizes = {
        "nets": len(said),
        "fewest_layers": min(o["layers"] for o in said),
        "most_layers": max(o["layers"] for o in said),
    }
    report.save(settings.out, settings, rates | sizes | {"trials": said})
    return int(rates["layer"] < 0.99 or rates["leaf"] < 0.97 or rates["mistake"] < 0.9)


def by_mistake(said: list[dict[str, Any]]) -> Table:
    """A table with one row for each kind of mistake."""
    groups = defaultdict(list)
    for one in said:
        groups[one["planted"][2]].append(one)
    table = Table(title="One mistake in a net: who is blamed", title_justify="left")
    for name in ("mistake", "planted", "layer", "leaf", "named", "rightly"):
        table.add_column(name, justify="left" if name == "mistake" else "right")
    for name in MISTAKES:
        ones = groups[name]
        counts = [len(ones), *(sum(o[key] for o in ones) for key in ("layer", "leaf", "named", "mistake"))]
        table.add_row(name, *map(str, counts))
    return table


if __name__ == "__main__":
    report.run(Settings, main)
