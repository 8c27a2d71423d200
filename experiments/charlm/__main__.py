"""A transformer learns Shakespeare letter by letter, by its manual backward alone; at the end it writes.

The defaults are the CPU recipe of nanoGPT (github.com/karpathy/nanoGPT, README): 4 layers, 4 heads, width 128, 64
letters of context, batches of 12, 2,000 steps, no dropout. Only the learning rate differs (--learning-rate 1e-3 is
nanoGPT's); its validation loss is 1.88. --peer trains the same model in PyTorch eager in turns with this one, from the
same weights, on the same batches; --side-by-side also trains by jax.grad.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fnbp
from experiments.charlm import peer as charlm_torch
from experiments.shared import data, report
from experiments.shared.report import console

MINUTES = 2  # on two CPU cores

NANOGPT = 1.88
SAMPLED = 240  # blocks that its figure is the mean of: 20 batches of 12, drawn from the last tenth
STEPS = 200  # over which the losses of two trainings are compared
TURN = 50  # steps that one side makes before it is the other's turn
DECAYED = frozenset("EPQKVOW")  # matrices; biases, gains and shifts are not


@dataclass(frozen=True)
class Settings:
    """The CPU recipe of nanoGPT, with a larger learning rate."""

    layers: int = 4
    """The transformer blocks."""
    heads: int = 4
    """The heads of attention in each block."""
    width: int = 128
    """The features of each position."""
    block: int = 64
    """Letters of context."""
    batch_size: int = 12
    """The blocks of text in one step."""
    steps: int = 2_000
    """The steps of the training."""
    learning_rate: float = 8e-3
    """The largest learning rate of AdamW, reached after 100 steps; then it falls to a tenth. nanoGPT's is 1e-3."""
    dropout: float = 0.0
    """The probability to drop, in training."""
    seed: int = 0
    """The seed of the parameters and of the batches."""
    held_out: Literal["tenth", "ninth"] = "tenth"
    """The tenth of the text that the loss is measured on. ninth: train on the eight before it, and leave the last one
    unseen, to pick settings by."""
    evaluate_every: int = 250
    """Steps between two measurements on the held-out part."""
    letters: int = 500
    """The number of letters to write at the end."""
    temperature: float = 0.8
    """Below 1, likely letters are preferred; above 1, unlikely ones."""
    side_by_side: bool = False
    """Also train by jax.grad, in turns, on the same batches."""
    peer: bool = False
    """Also train the same model in PyTorch eager, in turns, on the same batches (extra: peers)."""
    data_folder: Path | None = None
    """The folder of tinyshakespeare.txt; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the text if it is missing."""
    out: Path = Path("results/charlm")
    """The folder for figure.png, sample.txt and result.json."""


@dataclass
class Side:
    """One of the trainings that take turns."""

    name: str
    turn: Callable[[int, int], tuple[np.ndarray, float]]  # from a step to another -> the losses, and the seconds
    evaluate: Callable[[], float]
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)


def main(settings: Settings) -> int:
    """Run the experiment."""
    began = time.perf_counter()
    if settings.peer:
        charlm_torch.require()
    letters, text = data.shakespeare(settings.data_folder, settings.download)
    train, held_out = split(text, settings.held_out)
    net = network(settings, len(letters))
    params, state = jax.jit(net.init)(jax.random.key(settings.seed), train[None, : settings.block])
    console.print(fnbp.tabulate(net, train[None, : settings.block], params, state))

    trained = Trained(net, params, state, train, held_out, settings)
    sides = [Side("fnbp", trained.by(fnbp.value_and_grad), trained.evaluate)]
    if settings.side_by_side:
        other = Trained(net, params, state, train, held_out, settings)
        sides.append(Side("jax.grad", other.by(fnbp.automatic_value_and_grad), other.evaluate))
    if settings.peer:
        torch_side = charlm_torch.Peer(params, settings, schedule(settings), DECAYED)
        batches = lambda n, last: [jax.device_get(trained.batch(i)) for i in range(n, last)]  # noqa: E731
        turn = lambda n, last: torch_side.turn(n, batches(n, last))  # noqa: E731
        sides.append(Side("PyTorch eager", turn, lambda: torch_side.evaluate(held_out)))
    stopped = in_turns(sides, settings)

    first = sides[0]
    written = write(net, trained.params, trained.state, letters, settings)
    console.print(f"\n{written}\n", markup=False, highlight=False, style="cyan")
    (settings.out / "sample.txt").write_text(written + "\n")
    rows = [(f"validation loss, {side.name}", f"{side.validations[-1][1]:.4f}") for side in sides if side.validations]
    spread = np.std(trained.block_losses()) / math.sqrt(SAMPLED)
    rows.append(
        ("nanoGPT's figure", f"{NANOGPT} after 2,000 steps, from {SAMPLED} blocks; ours from so few: +-{spread:.3f}")
    )
    rows.append(("training", f"{stopped} after {len(first.losses):,} steps; {sum(first.turns):.0f} s with compilation"))
    measured = {side.name: compared(first, side) for side in sides[1:]}
    for name, one in measured.items():
        rows.append((f"time, {name} over fnbp", f"{one['time_ratio']:.2f} (median of {len(first.turns) - 1} turns)"))
        rows.append((f"losses, {name} and fnbp", f"within {one['apart']:.1e} (relative), {STEPS} steps"))
    console.print(report.figures(rows), highlight=False)
    figure(settings.out / "figure.png", sides)
    report.save(settings.out, settings, {
        "parameters": report.count(params),
        "validation": {side.name: side.validations for side in sides},
        "training_seconds": {side.name: sum(side.turns) for side in sides},
        "against": measured,
        "stopped": stopped,
        "wall_seconds": time.perf_counter() - began,
    })  # fmt: skip
    return 0 if np.isfinite(first.losses[-1]) and measured.get("jax.grad", {"apart": 0})["apart"] <= 1e-4 else 1


def network(settings: Settings, vocabulary: int) -> fnbp.Layer:
    """The model. Raises: InputError if the sizes do not fit each other."""
    try:
        sizes = (settings.block, settings.layers, settings.heads, settings.width)
        return fnbp.models.gpt(vocabulary, *sizes, rate=settings.dropout)
    except ValueError as error:
        raise report.InputError(str(error)) from error


def schedule(settings: Settings) -> optax.Schedule:
    """The schedule of nanoGPT: up over 100 steps, then down along half a cosine to a tenth."""
    top, warmup = settings.learning_rate, min(100, settings.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, top, warmup, max(settings.steps, warmup + 1), top / 10)


def optimizer_of(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of nanoGPT: clip the gradient to a norm of 1, then AdamW with weight decay on matrices."""

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    adamw = optax.adamw(schedule(settings), b2=0.99, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class Trained:
    """A training: parameters that take one step after another on crops of a text."""

    def __init__(
        self, net: fnbp.Layer, params: Any, state: Any, train: np.ndarray, held_out: np.ndarray, settings: Settings
    ):
        self.net, self.params, self.state, self.settings = net, params, state, settings
        self.optimizer, self.key = optimizer_of(settings), jax.random.key(settings.seed + 1)
        self.opt_state = self.optimizer.init(params)
        self.train, self.held_out = jnp.asarray(train), held_out
        self.measure = jax.jit(lambda p, s, x, y: LOSS.forward(net.forward(p, s, x, fnbp.Context())[0], y)[0])

    def batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        """The crops of one step, and the letters that follow them."""
        s = self.settings
        return crops(self.train, jax.random.fold_in(self.key, step), s.batch_size, s.block)

    def by(self, gradient: Callable) -> Callable[[int, int], tuple[np.ndarray, float]]:
        """The training by one kind of gradient: TURN steps in one compiled call."""
        run = gradient(self.net, LOSS)

        def step(n, carry):
            params, state, opt_state, losses = carry
            key = jax.random.fold_in(jax.random.fold_in(self.key, n), 1)
            (loss, state), grads = run(params, state, *self.batch(n), fnbp.Context(key, train=True))
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), state, opt_state, losses.at[n % TURN].set(loss)

        loop = jax.jit(lambda n, last, carry: jax.lax.fori_loop(n, last, step, carry))

        def turn(n, last):
            began = time.perf_counter()
            carry = (self.params, self.state, self.opt_state, jnp.zeros(TURN))
            *arrived, losses = jax.block_until_ready(loop(n, last, carry))
            self.params, self.state, self.opt_state = arrived
            return np.asarray(losses)[: last - n], time.perf_counter() - began

        return turn

    def block_losses(self) -> np.ndarray:
        """The loss of each whole block of the held-out text."""
        x, y = blocks(self.held_out, self.settings.block)
        parts = zip(np.array_split(x, 8), np.array_split(y, 8), strict=True)
        return np.concatenate([self.measure(self.params, self.state, *part) for part in parts])

    def evaluate(self) -> float:
        """The mean loss of these blocks."""
        return float(self.block_losses().mean())


LOSS = fnbp.softmax_cross_entropy()


def split(text: np.ndarray, held_out: Literal["tenth", "ninth"]) -> tuple[np.ndarray, np.ndarray]:
    """Split a text into the part to train on and the tenth after it, which is held out."""
    tenths = 9 if held_out == "tenth" else 8
    train, held, _ = np.split(text, [len(text) * tenths // 10, len(text) * (tenths + 1) // 10])
    return train, held


def crops(text: jax.Array, key: jax.Array, batch_size: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Random crops, (batch_size, block), and the same crops one letter later."""
    starts = jax.random.randint(key, (batch_size, 1), 0, len(text) - block)
    at = starts + jnp.arange(block + 1)
    cut = text[at]
    return cut[:, :-1], cut[:, 1:]


def blocks(text: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """A text in whole blocks, and the same blocks one letter later."""
    n = (len(text) - 1) // block
    return text[: n * block].reshape(n, block), text[1 : n * block + 1].reshape(n, block)


def in_turns(sides: list[Side], settings: Settings) -> str:
    """Train all sides to the last step, TURN steps at a time; Ctrl-C ends the training after a whole turn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    n = 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=settings.steps)
        try:
            while n < settings.steps:
                last = min(n + TURN, settings.steps)
                for side in sides:
                    losses, seconds = side.turn(n, last)
                    side.losses += losses.tolist()
                    side.turns.append(seconds)
                    if last % settings.evaluate_every < last - n or last == settings.steps:
                        side.validations.append((last, side.evaluate()))
                n = last
                told = " ".join(f"{side.name} {side.losses[-1]:.3f}" for side in sides)
                bar.update(task, completed=n, description=f"loss {told}")
                if not all(math.isfinite(side.losses[-1]) for side in sides):
                    return "not finite"
        except KeyboardInterrupt:
            if not sides[0].losses:
                raise
            return "interrupted"
    return "done"


def compared(ours: Side, other: Side) -> dict[str, float]:
    """The median ratio of the times of a turn, without the first, which compiles; and how far the losses part."""
    n = min(len(ours.turns), len(other.turns))
    ratios = np.asarray(other.turns[1:n]) / np.asarray(ours.turns[1:n])
    m = min(STEPS, len(ours.losses), len(other.losses))
    a, b = (np.asarray(side.losses[:m]) for side in (ours, other))
    low, middle, high = np.percentile(ratios, (25, 50, 75)) if len(ratios) else (np.nan,) * 3
    return {
        "time_ratio": float(middle),
        "time_ratio_low": float(low),
        "time_ratio_high": float(high),
        "apart": float(np.max(abs(a - b) / b)),
    }


def write(net: fnbp.Layer, params: Any, state: Any, letters: str, settings: Settings) -> str:
    """Let the model write: it starts after the end of a line and sees the last block of its own letters."""
    block = settings.block

    def one(carry, key):
        window, n = carry
        scores = net.forward(params, state, window[None], fnbp.Context())[0][0, n - 1]
        letter = jax.random.categorical(key, scores / settings.temperature).astype(window.dtype)
        full = n == block
        window = jnp.where(full, jnp.roll(window, -1), window).at[jnp.where(full, block - 1, n)].set(letter)
        return (window, jnp.minimum(n + 1, block)), letter

    @jax.jit
    def run(key):
        window = jnp.zeros(block, jnp.int32).at[0].set(letters.index("\n"))
        return jax.lax.scan(one, (window, jnp.asarray(1)), jax.random.split(key, settings.letters))[1]

    return "".join(letters[i] for i in np.asarray(run(jax.random.key(settings.seed)))).strip()


def figure(path: Path, sides: list[Side]) -> None:
    """Draw the losses of the training, smoothed, and those of the held-out text."""
    colours = {"fnbp": report.MANUAL, "jax.grad": report.AUTOMATIC, "PyTorch eager": report.ACCENT}
    with plt.rc_context(report.STYLE):
        fig, axes = plt.subplots(figsize=(7, 4.2))
        for side in sides:
            window = max(1, len(side.losses) // 50)
            smooth = np.convolve(side.losses, np.ones(window) / window, "valid")
            axes.plot(np.arange(len(smooth)) + window, smooth, color=colours[side.name], lw=1, alpha=0.6)
            steps, losses = zip(*side.validations, strict=True) if side.validations else ((), ())
            axes.plot(steps, losses, "o-", ms=4, color=colours[side.name], label=f"{side.name}, held-out tenth")
        axes.axhline(NANOGPT, color=report.INK, ls=":", lw=1, label="nanoGPT's figure for this recipe")
        axes.set(title="Letters of Shakespeare", xlabel="step", ylabel="loss of a letter, nats (thin: training)")
        axes.legend()
        fig.savefig(path)
        plt.close(fig)
    console.print(f"\nsaved {path}", highlight=False)


if __name__ == "__main__":
    report.run(Settings, main)
