"""The worked 2-3-1 example of fnbp/README.md, step by step: four ways to its gradients agree.

The manual backward of fnbp stands beside jax.grad and finite differences, in float64, and each is checked against the
formulas worked in NumPy. The two errata are named. The exit code is 1 if any of the four disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.markup import escape
from rich.table import Table

import fnbp
from experiments.shared import report
from experiments.shared.report import console

MINUTES = 0.1  # on two CPU cores

ERRATA = (
    """The text that fnbp follows calls w2^T dJ/dz2 sigma'(z1) by the name dJ/da1. It already holds sigma'(z1), so it
  is dJ/dz1; dJ/da1 is only w2^T dJ/dz2. The text uses it rightly: dJ/dW1 = dJ/dz1 x^T, dJ/db1 = dJ/dz1.""",
    """The text gives y_hat - y at the output layer. But J is a mean over m examples, so it is (y_hat - y)/m;
  here m = 1. In a batch of m = 2 copies of the example, the delta of each is half:""",
)


@dataclass(frozen=True)
class Settings:
    """The numbers of the example."""

    x1: float = 0.5
    """The first input."""
    x2: float = -1.0
    """The second input."""
    y: float = 1.0
    """The label, 0 or 1."""
    alpha: float = 0.1
    """The learning rate of step 4."""
    seed: int = 0
    """The seed of the weights, which are drawn from a normal distribution and rounded to two digits."""
    out: Path = Path("results/worked_example")
    """The folder for figure.png and result.json."""


def weights(seed: int) -> dict[str, np.ndarray]:
    """Weights of two digits, so that a pocket calculator can follow."""
    rng = np.random.default_rng(seed)
    shapes = {"W1": (3, 2), "b1": (3,), "w2": (1, 3), "b2": (1,)}
    return {name: rng.normal(size=shape).round(2) for name, shape in shapes.items()}


def sigma(z: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-z))


def by_hand(w: dict[str, np.ndarray], x: np.ndarray, y: float) -> list[tuple[str, str, np.ndarray]]:
    """(name, formula, value) of every line of the example, in plain NumPy, with dJ/da1 and dJ/dz1 told apart."""
    z1 = w["W1"] @ x + w["b1"]
    a1 = sigma(z1)
    z2 = w["w2"] @ a1 + w["b2"]
    y_hat = sigma(z2)
    J = -(y * np.log(y_hat) + (1 - y) * np.log(1 - y_hat))
    dz2 = y_hat - y
    da1 = w["w2"].T @ dz2
    dz1 = da1 * a1 * (1 - a1)
    return [
        ("z1", "W1 x + b1", z1),
        ("a1", "sigma(z1)", a1),
        ("z2", "w2 a1 + b2", z2),
        ("y_hat", "sigma(z2)", y_hat),
        ("J", "-[y log y_hat + (1-y) log(1-y_hat)]", J),
        ("dJ/dz2", "y_hat - y", dz2),
        ("dJ/da1", "w2^T dJ/dz2", da1),
        ("dJ/dz1", "dJ/da1 sigma'(z1)", dz1),
        ("dJ/dw2", "dJ/dz2 a1^T", np.outer(dz2, a1)),
        ("dJ/db2", "dJ/dz2", dz2),
        ("dJ/dW1", "dJ/dz1 x^T", np.outer(dz1, x)),
        ("dJ/db1", "dJ/dz1", dz1),
    ]


def by_fnbp(w: dict[str, np.ndarray], x: np.ndarray, y: float) -> tuple[dict[str, np.ndarray], fnbp.Trace]:
    """The values of the same names, from the manual backward."""
    net = fnbp.serial(fnbp.dense(3), fnbp.sigmoid(), fnbp.dense(1), fnbp.sigmoid())
    params = ({"W": w["W1"], "b": w["b1"]}, {}, {"W": w["w2"], "b": w["b2"]}, {})
    state = net.init(jax.random.key(0), x)[1]
    seen = fnbp.trace(net, fnbp.binary_cross_entropy())(params, state, x[None], np.full((1, 1), y))
    outputs, deltas = list(seen.outputs.values()), list(seen.deltas.values())
    names = ("z1", "a1", "z2", "y_hat")
    found = dict(zip(names, outputs, strict=True)) | {"J": seen.value}
    found |= {f"dJ/d{name}": delta for name, delta in zip(names, deltas, strict=True)}
    found |= {"dJ/dW1": seen.grads[0]["W"], "dJ/db1": seen.grads[0]["b"]}
    found |= {"dJ/dw2": seen.grads[2]["W"], "dJ/db2": seen.grads[2]["b"]}
    return {name: np.asarray(value) for name, value in found.items()}, seen


def J_from(start: str, values: dict, w: dict, y: float):
    """J as a function of one quantity of the example, all that comes before it held fixed: for differentiation."""

    def J(value):
        v = {**w, **values, start: value}
        chain = ("z1", "a1", "z2")
        if start in w:
            v["z1"] = jax.numpy.dot(v["W1"], v["x"]) + v["b1"] if start in ("W1", "b1") else v["z1"]
        at = chain.index(start) if start in chain else {"W1": 0, "b1": 0, "w2": 1, "b2": 1}[start]
        a1 = jax.nn.sigmoid(v["z1"]) if at <= 0 else v["a1"]
        z2 = jax.numpy.dot(v["w2"], a1) + v["b2"] if at <= 1 else v["z2"]
        y_hat = jax.nn.sigmoid(z2)
        return -(y * jax.numpy.log(y_hat) + (1 - y) * jax.numpy.log(1 - y_hat)).sum()

    return J


def finite_differences(J: Callable, at: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Slopes by central differences, one number at a time."""
    slopes = np.empty(at.shape)
    for i in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[i] = h
        slopes[i] = (J(at + step) - J(at - step)) / (2 * h)
    return slopes


def main(settings: Settings) -> int:
    """Run the experiment. Returns: 0 if all four agree, else 1."""
    if settings.y not in (0, 1):
        raise report.InputError(f"--y must be 0 or 1, got {settings.y:g}")
    with jax.enable_x64(True):
        return walk(settings)


def walk(settings: Settings) -> int:
    """Work all lines of the example, in float64."""
    w, x, y = weights(settings.seed), np.array([settings.x1, settings.x2]), settings.y
    hand = by_hand(w, x, y)
    values = {name: value for name, _, value in hand} | {"x": x}
    manual, _ = by_fnbp(w, x, y)
    for name, value in {"x": x, "y": y, **w}.items():
        console.print(f"{name:2} = {np.asarray(value).tolist()}", highlight=False, markup=False)

    table = Table(title="the worked example, in float64", title_justify="left", show_lines=True)
    for name in ("", "formula", "manual backward", "jax.grad", "finite differences"):
        table.add_column(name)
    worst_manual, worst_automatic, worst_differences = 0.0, 0.0, 0.0
    for name, formula, value in hand:
        ours = manual[name].reshape(value.shape)
        worst_manual = max(worst_manual, relative(ours, value))
        automatic = differences = None
        if name.startswith("dJ/d"):
            J = J_from(name[4:], values, w, y)
            at = {**w, **values}[name[4:]]
            automatic, differences = np.asarray(jax.grad(J)(at)), finite_differences(J, at)
            worst_automatic = max(worst_automatic, relative(automatic, value))
            worst_differences = max(worst_differences, relative(differences, value))
        shown = ("" if v is None else text(v) for v in (ours, automatic, differences))
        table.add_row(name, escape(formula), *shown)
    console.print(table)

    new = {name: w[name] - settings.alpha * values[f"dJ/d{name}"] for name in w}
    J_before, J_after = (float(np.sum(by_hand(v, x, y)[4][2])) for v in (w, new))
    console.print(f"step 4, alpha = {settings.alpha:g}: J falls from {J_before:.6f} to {J_after:.6f}", highlight=False)
    console.print("\nErrata", style="bold")
    for number, erratum in enumerate(ERRATA, 1):
        console.print(f"{number} {erratum}", highlight=False)
    halves = two_copies(w, x, y)
    console.print(
        f"  delta at z2: {values['dJ/dz2'][0]:+.5f} for m = 1, {halves[0]:+.5f} each for m = 2\n", highlight=False
    )

    ok = worst_manual <= 1e-12 and worst_automatic <= 1e-12 and worst_differences <= 1e-6
    console.print(report.figures([
        ("fnbp against by hand", f"{worst_manual:.1e}"),
        ("jax.grad against by hand", f"{worst_automatic:.1e}"),
        ("finite differences against by hand", f"{worst_differences:.1e}"),
        ("all four", "agree" if ok else "DISAGREE"),
    ]), highlight=False)  # fmt: skip
    figure(settings.out / "figure.png", hand, settings)
    report.save(settings.out, settings, {
        "max_relative_error_float64": worst_manual,
        "max_relative_error_jax_grad": worst_automatic,
        "max_relative_error_finite_differences": worst_differences,
        "loss_before": J_before,
        "loss_after": J_after,
        "values": {name: value for name, _, value in hand},
    })  # fmt: skip
    return 0 if ok else 1


def two_copies(w: dict[str, np.ndarray], x: np.ndarray, y: float) -> np.ndarray:
    """The delta at z2 of a batch that holds the example twice."""
    net = fnbp.serial(fnbp.dense(3), fnbp.sigmoid(), fnbp.dense(1), fnbp.sigmoid())
    params = ({"W": w["W1"], "b": w["b1"]}, {}, {"W": w["w2"], "b": w["b2"]}, {})
    loss = fnbp.binary_cross_entropy()
    seen = fnbp.trace(net, loss)(params, ({},) * 4, np.stack([x, x]), np.full((2, 1), y))
    return np.asarray(seen.deltas["serial[2].dense(1)"]).ravel()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def text(value: np.ndarray) -> str:
    """A vector as a column, a matrix row by row."""
    value = np.asarray(value)
    rows = value[:, None] if value.ndim == 1 else np.atleast_2d(value)
    return "\n".join(" ".join(f"{number:+.5f}" for number in row) for row in rows)


def figure(path: Path, hand: list, settings: Settings) -> None:
    """Draw the network with its numbers: the forward in each unit, its delta below."""
    v = {name: np.atleast_1d(value) for name, _, value in hand}
    w = weights(settings.seed)
    layers = [
        (0.0, [("x1", settings.x1, None), ("x2", settings.x2, None)]),
        (1.0, [(f"a1[{i + 1}]", v["a1"][i], v["dJ/dz1"][i]) for i in range(3)]),
        (2.0, [("y_hat", v["y_hat"][0], v["dJ/dz2"][0])]),
    ]
    at = [(x, np.linspace(1, -1, len(units)) if len(units) > 1 else np.zeros(1), units) for x, units in layers]
    gradients = [v["dJ/dW1"], v["dJ/dw2"]]
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(9, 5))
        for layer, (W, dW) in enumerate(zip((w["W1"], w["w2"]), gradients, strict=True)):
            (x0, from_y, _), (x1, to_y, _) = at[layer], at[layer + 1]
            for j, i in np.ndindex(W.shape):
                width = 0.5 + 6 * abs(dW[j, i]) / max(abs(g).max() for g in gradients)
                color = report.MANUAL if dW[j, i] > 0 else report.ACCENT
                axes.plot((x0, x1), (from_y[i], to_y[j]), lw=width, color=color, alpha=0.45, zorder=1)
        for x, ys, units in at:
            for y, (name, value, delta) in zip(ys, units, strict=True):
                axes.scatter(x, y, s=2600, color="white", edgecolor=report.INK, zorder=2)
                axes.text(x, y, f"{name}\n{value:+.3f}", ha="center", va="center", zorder=3)
                if delta is not None:
                    axes.text(
                        x, y - 0.33, f"delta {delta:+.4f}", ha="center", va="center", color=report.ACCENT, zorder=3
                    )
        axes.set(xlim=(-0.3, 2.3), ylim=(-1.5, 1.4))
        axes.axis("off")
        axes.set_title("Forward values in the units, dJ/dz below them; lines: |dJ/dW|, blue positive, red negative")
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
