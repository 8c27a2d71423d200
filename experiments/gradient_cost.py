"""A manual gradient costs what that of jax.grad costs; what it shows beside the gradient costs little.

Each net is timed against the same forward differentiated automatically, and against the net as one would write it in
plain JAX with the loss of optax. Then come trace and the per-example norms. A ratio is manual / automatic, the median
over interleaved samples; memory is the temporary memory of the compiled program; FLOPs are those that XLA counts.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.report import console
from fnbp.measurement import Cost, flops_of, ratio, temp_bytes_of, versus

MINUTES = 4  # on two CPU cores

NETS = (  # widths, batch, activation
    ((784, 1024, 1024, 10), 512, "relu"),
    ((784, 1024, 1024, 10), 512, "sigmoid"),
    ((784, 128, 10), 128, "relu"),
    ((784, 128, 10), 128, "sigmoid"),
)
NORMS_NET = ((784, 1000, 500, 100, 10), 128, "relu")
PLAIN = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    samples: int = 200
    """The number of interleaved samples for each comparison."""
    seed: int = 0
    """The seed of parameters and data."""
    out: Path = Path("results/gradient_cost")
    """The folder for figure.png and result.json."""


def problem(widths: tuple[int, ...], batch: int, activation: str, seed: int):
    """A net, its params and state, and a random batch."""
    hidden = (layer for n in widths[1:-1] for layer in (fnbp.dense(n), fnbp.activation(activation)))
    net = fnbp.serial(*hidden, fnbp.dense(widths[-1]))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, widths[0])).astype(np.float32)
    y = rng.integers(0, widths[-1], batch).astype(np.int32)
    return net, (*net.init(jax.random.key(seed), x), x, y)


def plain_jax(activation: str):
    """The same net in plain JAX, with the loss of optax: (params, state, x, y) -> value, grads."""

    def J(params, x, y):
        *hidden, last = [p for p in params if p]
        for p in hidden:
            x = PLAIN[activation](x @ p["W"].T + p["b"])
        logits = x @ last["W"].T + last["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return lambda params, state, x, y: jax.value_and_grad(J)(params, x, y)


def main(settings: Settings) -> int:
    """Run the benchmark."""
    began = time.perf_counter()
    loss = fnbp.softmax_cross_entropy()
    table = Table(title=f"value_and_grad on {jax.devices()[0].device_kind}, manual / automatic", title_justify="left")
    for name in ("net", "against", "time (quartiles)", "memory", "FLOPs", "compile time"):
        table.add_column(name, justify="left" if name in ("net", "against") else "right", no_wrap=True)
    measured = {}
    for widths, batch, activation in NETS:
        net, args = problem(widths, batch, activation, settings.seed)
        name = f"{'-'.join(map(str, widths))} {activation}, batch {batch}"
        manual = fnbp.value_and_grad(net, loss)
        others = {"the same forward": fnbp.automatic_value_and_grad(net, loss), "plain JAX": plain_jax(activation)}
        for against, other in others.items():
            cost = versus(manual, other, args, settings.samples)
            low, high = cost.time_quartiles
            ratios = (cost.memory_ratio, cost.flops_ratio, cost.compile_ratio)
            time_ratio = f"{cost.time_ratio:.3f} ({low:.3f}-{high:.3f})"
            table.add_row(name, against, time_ratio, *(f"{r:.5f}" if r is not None else "-" for r in ratios))
            measured[f"{name}, against {against}"] = cost
    console.print(table)
    extras = traced(settings) | norms(settings) | comparison(settings)
    figure(settings.out / "figure.png", measured)
    report.save(settings.out, settings, {
        "max_time_ratio": max(cost.time_ratio for cost in measured.values()),
        "max_memory_ratio": max(cost.memory_ratio or 0 for cost in measured.values()),
        "max_flops_ratio": max(cost.flops_ratio or 0 for cost in measured.values()),
        **extras,
        "costs": {name: cost.to_dict() for name, cost in measured.items()},
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0


def traced(settings: Settings) -> dict[str, float]:
    """The FLOPs and memory of trace, if only its gradients are used, over those of value_and_grad."""
    net, args = problem(*NETS[0], settings.seed)
    loss = fnbp.softmax_cross_entropy()

    def gradients_of_trace(*args):
        seen = fnbp.trace(net, loss)(*args)
        return (seen.value, seen.state), seen.grads

    plain, seen = (jax.jit(f).lower(*args).compile() for f in (fnbp.value_and_grad(net, loss), gradients_of_trace))
    flops, memory = (ratio(measure(seen), measure(plain)) or np.nan for measure in (flops_of, temp_bytes_of))
    console.print(
        f"trace, if only its gradients are used, over value_and_grad: FLOPs {flops:.5f}, memory {memory:.5f}",
        highlight=False,
    )
    return {"trace_flops_ratio": flops, "trace_memory_ratio": memory}


def norms(settings: Settings) -> dict[str, float]:
    """Time the gradient with all per-example norms against the gradient, and the norms against vmap of jax.grad."""
    net, args = problem(*NORMS_NET, settings.seed)
    loss = fnbp.softmax_cross_entropy()
    both = fnbp.backprop(net, loss, contract=(fnbp.total, fnbp.sq_norms))

    def gradient_and_norms(*args):
        done = both(*args)
        return done.value, done.grads

    def squared(params, state, x, y):
        return fnbp.per_example_norms(net, loss)(params, state, x, y) ** 2

    def squared_by_vmap(params, state, x, y):
        def own(x, y):
            _, grads = fnbp.automatic_value_and_grad(net, loss)(params, state, x[None], y[None])
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

        return jax.vmap(own)(x, y)

    ours, theirs = (np.asarray(jax.jit(f)(*args)) for f in (squared, squared_by_vmap))
    error = float((abs(ours - theirs) / theirs).max())
    extra = versus(gradient_and_norms, fnbp.value_and_grad(net, loss), args, settings.samples)
    against_vmap = versus(squared, squared_by_vmap, args, max(5, settings.samples // 20))
    widths, batch, _ = NORMS_NET
    console.print(report.figures([
        ("per-example squared norms", f"{'-'.join(map(str, widths))}, batch {batch}, float32"),
        ("  against vmap(jax.grad)", f"relative difference {error:.1e}, {against_vmap.time_ratio:.4f} of its time"),
        ("  and the gradient, over the gradient only", f"time {extra.time_ratio:.3f}, memory {extra.memory_ratio:.3f}"),
    ]), highlight=False)  # fmt: skip
    return {
        "norms_max_relative_difference": error,
        "norms_time_over_vmap_grad": against_vmap.time_ratio,
        "gradient_and_norms_time_ratio": extra.time_ratio,
        "gradient_and_norms_memory_ratio": extra.memory_ratio or float("nan"),
    }


def comparison(settings: Settings) -> dict[str, float]:
    """Time compare on the digits net under its loss, in a fresh process and again, also in gradients of that net."""
    net = fnbp.serial(fnbp.dense(100), fnbp.sigmoid(), fnbp.dense(10), fnbp.sigmoid())
    rng = np.random.default_rng(settings.seed)
    x, y = rng.uniform(size=(16, 64)).astype(np.float32), rng.integers(0, 10, 16).astype(np.int32)
    loss = fnbp.softmax_cross_entropy()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        assert fnbp.compare(net, x, loss=loss, y=y).ok
        seconds.append(time.perf_counter() - began)
    params, state = net.init(jax.random.key(settings.seed), x)
    gradient = fnbp.cost(net, loss, params, state, x, y, samples=20).manual.seconds
    multiple = seconds[1] / gradient
    console.print(
        f"compare of the digits net: {seconds[0]:.1f} s, again {seconds[1]:.1f} s, or {multiple:,.0f} gradients",
        highlight=False,
    )
    return {"compare_first_seconds": seconds[0], "compare_seconds": seconds[1], "compare_over_gradient": multiple}


def figure(path: Path, measured: dict[str, Cost]) -> None:
    """Draw the time ratios with their quartiles."""
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(9, 0.6 * len(measured) + 1.2))
        at = np.arange(len(measured))[::-1]
        for place, cost in zip(at, measured.values(), strict=True):
            axes.plot(cost.time_quartiles, (place, place), color=report.MANUAL, lw=4, alpha=0.4, solid_capstyle="butt")
            axes.plot(cost.time_ratio, place, "o", color=report.MANUAL)
        axes.axvline(1, color=report.INK, lw=1, ls=":")
        axes.set(yticks=at, yticklabels=list(measured), xlabel="time, manual / automatic: median and quartiles")
        axes.set_title(f"One gradient on {jax.devices()[0].device_kind}", loc="left")
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
