"""A transformer writes Shakespeare with what its layers keep of earlier letters, as without, several times as fast.

The net is that of experiments.charlm, trained briefly. It writes the same letters both ways: of the highest scores, and
drawn. A ratio is without / with the cache, the median over pairs of runs in turns; both are compiled and warm. The net
sees --block letters at once. If the text is longer than that, it reads the later half of them again each time they are
used up, in both ways. Their scores are compared in float64, over one block.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import fnbp
from experiments.charlm.__main__ import Settings as Recipe
from experiments.charlm.__main__ import Trained, network, split
from experiments.shared import data, report
from experiments.shared.report import console
from fnbp.combinators.stepping import beginning, going_on
from fnbp.combinators.unrolling import unrolled

MINUTES = 1  # on two CPU cores

LEAST = 5  # times as fast


@dataclass(frozen=True)
class Settings:
    """The net of experiments.charlm, and what it writes."""

    letters: int = 256
    """The letters to write."""
    prompt: str = "ROMEO:"
    """What they stand behind."""
    block: int = 64
    """Letters of context: 64 in the recipe. With 264 the net sees all that it writes."""
    temperature: float = 0.8
    """Below 1, likely letters are preferred; above 1, unlikely ones."""
    top_k: int = 20
    """Letters are drawn among so many of the highest scores."""
    train_steps: int = 200
    """The steps of the training, 2,000 in the recipe."""
    samples: int = 15
    """The pairs of runs that are timed."""
    seed: int = 0
    """The seed of the parameters, of the batches, and of the letters that are drawn."""
    data_folder: Path | None = None
    """The folder of tinyshakespeare.txt; by default $FNBP_DATA, else the user's cache."""
    download: bool = False
    """Download the text if it is missing."""
    out: Path = Path("results/generation")
    """The folder for result.json."""


def main(settings: Settings) -> int:
    """Run the experiment."""
    began = time.perf_counter()
    letters, text = data.shakespeare(settings.data_folder, settings.download)
    prompt = prompt_of(settings, letters)
    net, params, state = trained(settings, letters, text)
    longer = prompt.shape[1] + settings.letters - 1 > settings.block
    common = {"window": settings.block if longer else None}
    drawn = {"key": jax.random.key(settings.seed), "temperature": settings.temperature, "top_k": settings.top_k}
    apart = scores_apart(net, params, state, prompt, settings, len(letters))
    rows = [("scores in float64, with and without the cache", f"apart by {apart:.1e} of the largest")]
    measured: dict[str, Any] = {"scores_apart_float64": apart}
    for name, options in (("highest score", {"temperature": 0}), ("drawn", drawn)):
        runs = [
            runner(net, params, state, prompt, settings.letters, cache=cache, **common, **options)
            for cache in (True, False)
        ]
        written = [np.asarray(run()) for run in runs]
        same = bool((written[0] == written[1]).all())
        console.print(f"\n{''.join(letters[i] for i in written[0][0])}\n", markup=False, highlight=False, style="cyan")
        seconds = timed(runs, settings.samples, name)
        low, middle, high = np.percentile(seconds[:, 1] / seconds[:, 0], (25, 50, 75))
        with_cache, without = np.median(seconds, 0)
        rows += [
            (f"{name}: the same letters", "yes" if same else "no"),
            (f"{name}: without / with the cache", f"{middle:.1f} ({low:.1f}-{high:.1f})"),
            (f"{name}: seconds", f"{without:.3f} without, {with_cache:.3f} with"),
        ]
        measured[name.replace(" ", "_")] = {
            "same": same, "ratio": middle, "quartiles": [low, high], "seconds": [with_cache, without]
        }  # fmt: skip
    console.print(report.figures(rows), highlight=False)
    report.save(settings.out, settings, measured | {"wall_seconds": time.perf_counter() - began})
    ways = [one for one in measured.values() if isinstance(one, dict)]
    return 0 if apart <= 1e-12 and all(one["same"] and one["ratio"] >= LEAST for one in ways) else 1


def prompt_of(settings: Settings, letters: str) -> np.ndarray:
    """The numbers of the letters of the prompt, (1, T). Raises: InputError if one is not in the text."""
    unknown = sorted(set(settings.prompt) - set(letters))
    if unknown or not settings.prompt:
        raise report.InputError(f"--prompt must be of letters of the text, got {unknown or 'none'}")
    if len(settings.prompt) > settings.block:
        raise report.InputError(f"--prompt has {len(settings.prompt)} letters, more than --block {settings.block}")
    if settings.top_k > len(letters):
        raise report.InputError(f"--top-k must be at most {len(letters)}, got {settings.top_k}")
    return np.array([[letters.index(letter) for letter in settings.prompt]])


def trained(settings: Settings, letters: str, text: np.ndarray) -> tuple[fnbp.Layer, Any, Any]:
    """The net after its training, and its params and state."""
    recipe = Recipe(block=settings.block, steps=settings.train_steps, seed=settings.seed)
    train, held_out = split(text, "tenth")
    net = network(recipe, len(letters))
    params, state = jax.jit(net.init)(jax.random.key(settings.seed), train[None, : settings.block])
    run = Trained(net, params, state, train, held_out, recipe)
    turn, losses = run.by(fnbp.value_and_grad), np.array([np.nan])
    for n in range(0, settings.train_steps, 50):
        losses, _ = turn(n, min(n + 50, settings.train_steps))
    console.print(
        f"trained for {settings.train_steps} steps; the last losses {losses[-5:].mean():.3f}", highlight=False
    )
    return net, run.params, run.state


def scores_apart(net: fnbp.Layer, params: Any, state: Any, prompt: np.ndarray, settings: Settings, k: int) -> float:
    """How far the scores of a block, letter by letter, are from those of the plain forward, over the largest."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, state))
        rest = np.random.default_rng(0).integers(0, k, (1, settings.block - prompt.shape[1]))
        tokens = np.concatenate([prompt, rest], 1).astype(np.int32)
        then, in_turn, _ = unrolled(going_on(net))

        @jax.jit
        def both(params, state, tokens):
            T = prompt.shape[1]
            scores, kept, _ = beginning(net, settings.block).forward(params, state, tokens[:, :T], fnbp.Context())
            in_turns = in_turn(params)

            def turn(kept, token):
                scores, kept, _ = then.forward(in_turns, kept, token[:, None], fnbp.Context())
                return kept, scores[:, 0]

            later = jax.lax.scan(turn, in_turn(kept), tokens[:, T:].T)[1]
            found = jnp.concatenate([scores, jnp.moveaxis(later, 0, 1)], 1)
            return found, net.forward(params, state, tokens, fnbp.Context())[0]

        found, expected = map(np.asarray, both(*wide, tokens))
    return float(abs(found - expected).max() / abs(expected).max())


def runner(*args: Any, **options: Any) -> Callable[[], jax.Array]:
    """A call of generate that is over when its letters are there."""
    return lambda: jax.block_until_ready(fnbp.models.generate(*args, **options))


def timed(runs: list[Callable[[], Any]], samples: int, name: str) -> np.ndarray:
    """The seconds of each run, (samples, runs), in turns; the first run of a pair is another each time."""
    seconds = np.zeros((samples, len(runs)))
    for i in track(range(samples), f"timing: {name}", console=console, transient=True, disable=not console.is_terminal):
        for j in (0, 1) if i % 2 else (1, 0):
            began = time.perf_counter()
            runs[j]()
            seconds[i, j] = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    report.run(Settings, main)
