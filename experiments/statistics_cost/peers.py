"""What others take for the same: libraries of PyTorch in a process of their own, those of JAX in ours."""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import fnbp
from experiments.shared.timing import Side, distance, in_turns, ratios_of, side_of
from experiments.statistics_cost import in_torch
from experiments.statistics_cost.nets import LOSS, Case
from experiments.statistics_cost.ours import STATISTICS, VMAP, plain

PRIVACY, PARTS, KFAC_JAX = "jax_privacy", "jax_privacy, 16 at once", "kfac-jax"
NETS = ("mlp", "lenet")
PEERS = {
    "gradient": in_torch.PEERS["gradient"],
    "clipped": (*in_torch.PEERS["clipped"], PRIVACY, PARTS, VMAP),
    "norms beside": in_torch.PEERS["norms beside"],
    "second moment beside": in_torch.PEERS["second moment beside"],
    "kfac beside": (KFAC_JAX,),
    "kfac of the Fisher": (*in_torch.PEERS["kfac of the Fisher"], KFAC_JAX),
}
NEEDS = {PRIVACY: "jax_privacy", PARTS: "jax_privacy", KFAC_JAX: "kfac_jax", VMAP: "jax"}
MISSING = "not installed"


def installed(peer: str) -> bool:
    """True if the packages of a peer are there."""
    return in_torch.installed(peer) if peer in in_torch.NEEDS else importlib.util.find_spec(NEEDS[peer]) is not None


def ours(statistic: str, case: Case) -> Callable:
    """The statistic by fnbp."""
    return plain(case) if statistic == "gradient" else STATISTICS[statistic].make(case)


# --- in JAX ---


def privately(case: Case, microbatch: int | None = None) -> Callable:
    """The value and the mean of clipped gradients, by jax_privacy."""
    import jax_privacy  # pyright: ignore[reportMissingImports]

    def function(params, state, x, y, query):
        def J(params, x, y):
            return jnp.mean(LOSS.forward(case.net.forward(params, state, x, fnbp.Context())[0], y)[0])

        run = jax_privacy.clipped_grad(
            J,
            l2_clip_norm=case.limit,
            normalize_by=len(y),
            batch_argnums=(1, 2),
            return_values=True,
            microbatch_size=microbatch,
        )
        grads, aux = run(params, x, y)
        return jnp.mean(aux.values), grads

    return function


def kfac_jax_mended() -> Any:
    """A context in which kfac-jax 0.0.8 runs: its evaluation of an equation takes two values from get_bind_params,
    which returns one since jax 0.10."""
    from kfac_jax._src import tag_graph_matcher  # pyright: ignore[reportMissingImports]

    def evaluated(eqn, values):
        made = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return made if isinstance(made, list) else [made]

    return mock.patch.object(tag_graph_matcher, "eval_jaxpr_eqn", evaluated)


def by_kfac_jax(case: Case, mode: str) -> Callable:
    """The value, the gradient, and the blocks' factors by kfac-jax, whose W is (n_in, n_out) beside b."""
    import kfac_jax  # pyright: ignore[reportMissingImports]

    *_, x, y, _ = case.args
    relu = lambda x: jnp.maximum(x, 0)  # noqa: E731 (jax.nn.relu is a custom_jvp, which kfac-jax does not read)

    def J(weights, batch):
        x, y = batch
        logits = forward(weights, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        top = jax.lax.stop_gradient(jnp.max(logits, 1, keepdims=True))
        norm = jnp.log(jnp.sum(jnp.exp(logits - top), 1)) + top[:, 0]
        return jnp.mean(norm - logits[jnp.arange(len(y)), y])

    def forward(weights, x):
        for i, (W, b) in enumerate(weights):
            if W.ndim == 4:
                padding = "SAME" if i == 0 else "VALID"
                numbers = ("NHWC", "HWIO", "NHWC")
                x = relu(jax.lax.conv_general_dilated(x, W, (1, 1), padding, dimension_numbers=numbers) + b)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            else:
                x = x.reshape(len(x), -1) @ W + b
                x = x if i == len(weights) - 1 else relu(x)
        return x

    def turned(params):
        return [(jnp.moveaxis(p["W"], 0, -1) if p["W"].ndim == 4 else p["W"].T, p["b"]) for p in params if p]

    estimator = kfac_jax.BlockDiagonalCurvature(J, default_estimation_mode=mode)
    with kfac_jax_mended():
        start = estimator.init(jax.random.key(0), (turned(case.args[0]), (x, y)), None, None)

    def function(params, state, x, y, query):
        weights = turned(params)
        value, grads = jax.value_and_grad(J)(weights, (x, y))
        with kfac_jax_mended():
            found = estimator.update_curvature_matrix_estimate(
                start, 0.0, 1.0, 1.0, len(y), jax.random.key(0), (weights, (x, y))
            )
        return value, grads, [[factor.value for factor in block.factors] for block in found.blocks_states]

    return function


IN_JAX: dict[tuple[str, str], Callable[[Case], Callable]] = {
    ("clipped", PRIVACY): privately,
    ("clipped", PARTS): lambda case: privately(case, 16),
    ("clipped", VMAP): STATISTICS["clipped"].others[VMAP],
    ("kfac beside", KFAC_JAX): lambda case: by_kfac_jax(case, "fisher_empirical"),
    ("kfac of the Fisher", KFAC_JAX): lambda case: by_kfac_jax(case, "fisher_gradients"),
}


# --- both ---


def problem_of(name: str, case: Case) -> in_torch.Problem:
    """A case for PyTorch."""
    params, state, x, y, _ = case.args
    weights = channels_first(fnbp.to_torch(case.net, params, state))
    return in_torch.Problem(name, weights, np.asarray(x), np.asarray(y), case.limit)


FLAT = "7.weight"  # of LeNet: the weights of 5 x 5 numbers in 16 channels, which PyTorch flattens channel by channel


def channels_first(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, or what has their shape, with those behind flatten in the order of PyTorch."""
    return named | {name: a.reshape(-1, 5, 5, 16).transpose(0, 3, 1, 2).reshape(a.shape) for name, a in at_flat(named)}


def channels_last(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The way back."""
    return named | {name: a.reshape(-1, 16, 5, 5).transpose(0, 2, 3, 1).reshape(a.shape) for name, a in at_flat(named)}


def at_flat(named: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The weights behind flatten, if there are any."""
    return [(FLAT, named[FLAT])] if FLAT in named else []


class Torch:
    """The process of PyTorch.

    Its threads and those of XLA would take each other's cores if both were in one process: after each operation those
    of OpenMP wait in a busy loop for some milliseconds. So PyTorch has a process of its own, with as many threads as
    there are cores; only one of the two works at a time; and before each sample both rest (timing.REST), until the
    threads of the other sleep. The first call of a sample wakes a side's own threads and is not timed.
    """

    def __init__(self, problem: in_torch.Problem):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=in_torch.serve, args=(there, problem, cores()), daemon=True)
        self.process.start()
        there.close()
        self.pipe.recv()

    def ask(self, *what: Any) -> Any:
        """Send a question and wait for its answer."""
        self.pipe.send(what)
        return self.pipe.recv()

    def side(self, key: tuple[str, str]) -> Side:
        """One of its functions, to be timed there."""
        return lambda calls: self.ask("time", key, calls)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


@contextmanager
def torch_for(name: str, case: Case, wanted: bool) -> Iterator[Torch | None]:
    """The process of PyTorch, if it is wanted."""
    process = Torch(problem_of(name, case)) if wanted else None
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured(name: str, case: Case, wanted: list[tuple[str, str]], samples: int) -> Iterator[dict[str, Any]]:
    """A row for each (statistic, peer) that is wanted: both side by side, after both were found to agree."""
    in_its_own = any(peer in in_torch.NEEDS and installed(peer) for _, peer in wanted)
    with torch_for(name, case, in_its_own) as torch:
        for statistic, peer in wanted:
            row = {"net": name, "statistic": statistic, "against": peer}
            if not installed(peer):
                yield row | {"missing": MISSING}
                continue
            mine = jax.jit(ours(statistic, case)).lower(*case.args).compile()
            side = side_of(mine, case.args, wake=True)
            if torch is not None and peer in in_torch.NEEDS:
                due = of_torch(case, torch.ask("value", (statistic, peer)))
                other = torch.side((statistic, peer))
            else:
                theirs = jax.jit(IN_JAX[statistic, peer](case)).lower(*case.args).compile()
                due, other = theirs(*case.args), side_of(theirs, case.args, wake=True)
            apart = distance(comparable(statistic, mine(*case.args)), comparable(statistic, due))
            yield row | ratios_of(in_turns((side, other), samples, rest=True)) | {"apart": apart}


def of_torch(case: Case, found: in_torch.Computed) -> Any:
    """What PyTorch computed, as fnbp returns it."""
    params, state = case.args[:2]
    tree = lambda named: fnbp.from_torch(case.net, channels_last(named), params, state)[0]  # noqa: E731
    more = found.more
    if isinstance(more, dict):
        more = tree(more) if not isinstance(next(iter(more.values())), list) else None
    return found.value, tree(found.grads), more


def comparable(statistic: str, made: Any) -> Any:
    """What two sides must agree on. Factors of K-FAC are drawn, or of other conventions, so there the loss alone is."""
    if statistic == "gradient":
        (value, _), grads, *_ = made if isinstance(made[0], tuple) else ((made[0], None), made[1])
        return value, grads
    return made[0] if statistic.startswith("kfac") else [part for part in made if part is not None]
