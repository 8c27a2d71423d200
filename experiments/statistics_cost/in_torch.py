"""PyTorch, Opacus and BackPACK: the same nets and the same statistics, in a process of their own."""

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

PYTORCH, GHOST, HOOKS = "PyTorch eager", "Opacus, ghost clipping", "Opacus, grad_sample"
BACKPACK, KFAC = "BackPACK", "BackPACK, KFAC"
NEEDS = {GHOST: "opacus", HOOKS: "opacus", BACKPACK: "backpack", KFAC: "backpack", PYTORCH: "torch"}
PEERS = {  # statistic -> who computes it
    "gradient": (PYTORCH,),
    "clipped": (GHOST,),
    "norms beside": (BACKPACK, HOOKS),
    "second moment beside": (BACKPACK,),
    "kfac of the Fisher": (KFAC,),
}


class Problem(NamedTuple):
    """A net by its weights, as fnbp.to_torch gives them, with a batch; images are (m, height, width, channels)."""

    name: str
    weights: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    limit: float


def installed(peer: str) -> bool:
    """True if the packages of a peer are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", NEEDS[peer]))


def module_of(problem: Problem) -> Any:
    """The net as torch.nn.Sequential, with its weights."""
    import torch
    from torch import nn

    sizes = {name: a.shape for name, a in problem.weights.items()}

    def linear(name: str) -> Any:
        n_out, n_in = sizes[name]
        return nn.Linear(n_in, n_out)

    if problem.name == "mlp":
        layers = []
        for i in range(0, len(sizes), 2):
            layers += [linear(f"{i}.weight"), nn.ReLU()]
    else:
        layers = []
        for i, padding in ((0, 2), (3, 0)):
            n_out, n_in, *window = sizes[f"{i}.weight"]
            layers += [nn.Conv2d(n_in, n_out, tuple(window), padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        layers.append(nn.Flatten())
        for i in (7, 9, 11):
            layers += [linear(f"{i}.weight"), nn.ReLU()]
    module = nn.Sequential(*layers[:-1]).to(torch.tensor(problem.x).dtype)
    module.load_state_dict({name: torch.tensor(a) for name, a in problem.weights.items()})
    return module


def given(x: np.ndarray) -> Any:
    """x for PyTorch, images with the channels first, in memory too: of others, even of those with one channel, whose
    channel has a stride of 1, Opacus 1.6.0 computes wrong gradients of a convolution (unfold2d)."""
    import torch

    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    return torch.empty(x.shape, dtype=torch.tensor(x.flat[0]).dtype).copy_(torch.tensor(np.ascontiguousarray(x)))


class Computed(NamedTuple):
    """What a peer computed: the loss, the gradient by the names of the module, and the statistic."""

    value: float
    grads: dict[str, np.ndarray]
    more: Any


def functions(problem: Problem) -> dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], Computed]]]:
    """(statistic, peer) -> a function that computes it, and one that computes it and returns it as fnbp would."""
    import torch

    x, y, m = given(problem.x), torch.tensor(problem.y).long(), len(problem.y)
    of_backpack = {
        "norms beside": ("BatchL2Grad", lambda p: p.batch_l2.numpy() * m**2),
        "second moment beside": ("SumGradSquared", lambda p: p.sum_grad_squared.numpy() * m**2),
        "kfac of the Fisher": ("KFAC", lambda p: [factor.numpy() for factor in p.kfac]),
    }
    makers = {
        PYTORCH: lambda statistic: eager(module_of(problem), x, y),
        GHOST: lambda statistic: ghost(module_of(problem), x, y, problem.limit),
        HOOKS: lambda statistic: hooked(module_of(problem), x, y),
        BACKPACK: lambda statistic: packed(module_of(problem), x, y, *of_backpack[statistic]),
        KFAC: lambda statistic: packed(module_of(problem), x, y, *of_backpack[statistic]),
    }
    found = ((statistic, peer) for statistic, peers in PEERS.items() for peer in peers if installed(peer))
    return {(statistic, peer): makers[peer](statistic) for statistic, peer in found}


def grads_of(module: Any, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The gradients of a module by name."""
    return {name.removeprefix("_module."): p.grad.numpy() * scale for name, p in module.named_parameters()}


def eager(module: Any, x: Any, y: Any) -> tuple[Callable, Callable]:
    """The gradient."""
    import torch

    def run():
        module.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        return loss

    return run, lambda: Computed(run().item(), grads_of(module), None)


def ghost(module: Any, x: Any, y: Any, limit: float) -> tuple[Callable, Callable]:
    """The sum of clipped gradients, by two backwards."""
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # pyright: ignore[reportMissingImports]
    from opacus.optimizers import DPOptimizerFastGradientClipping  # pyright: ignore[reportMissingImports]
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # pyright: ignore[reportMissingImports]

    private = GradSampleModuleFastGradientClipping(
        module,
        max_grad_norm=limit,  # pyright: ignore[reportArgumentType]
        use_ghost_clipping=True,
    )
    sgd = torch.optim.SGD(private.parameters(), lr=0.1)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=0.0, max_grad_norm=limit, expected_batch_size=len(y)
    )
    criterion = DPLossFastGradientClipping(private, optimizer, torch.nn.CrossEntropyLoss())

    def run():
        private.zero_grad(set_to_none=True)
        loss = criterion(private(x), y)
        loss.backward()
        return loss

    return run, lambda: Computed(run().item(), grads_of(private, 1 / len(y)), None)


def hooked(module: Any, x: Any, y: Any) -> tuple[Callable, Callable]:
    """The gradient and the squared norms, of single gradients that are formed."""
    import torch
    from opacus.grad_sample import GradSampleModule  # pyright: ignore[reportMissingImports]

    private = GradSampleModule(module)

    def run():
        private.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(private(x), y)
        loss.backward()
        each = (getattr(p, "grad_sample") for p in private.parameters())  # noqa: B009 (pyright does not know it)
        squares = torch.stack([rows.flatten(1).pow(2).sum(1) for rows in each]).sum(0)
        return loss, squares

    def value():
        loss, squares = run()
        return Computed(loss.item(), grads_of(private), squares.detach().numpy())

    return run, value


def packed(module: Any, x: Any, y: Any, name: str, read: Callable) -> tuple[Callable, Callable]:
    """The gradient, and what an extension of BackPACK stores beside it."""
    import torch
    from backpack import backpack, extend, extensions  # pyright: ignore[reportMissingImports]

    module, loss_of = extend(module), extend(torch.nn.CrossEntropyLoss())

    def run():
        module.zero_grad(set_to_none=True)
        loss = loss_of(module(x), y)
        with backpack(getattr(extensions, name)()):
            loss.backward()
        return (loss, sum(p.batch_l2 for p in module.parameters())) if name == "BatchL2Grad" else (loss, None)

    def value():
        loss, _ = run()
        more = {key: copy.deepcopy(read(p)) for key, p in module.named_parameters()}
        return Computed(loss.item(), grads_of(module), sum(more.values()) if name == "BatchL2Grad" else more)

    return run, value


def serve(pipe: Connection, problem: Problem, threads: int) -> None:
    """Answer ("time", key, calls) by the seconds of one call and ("value", key) by a Computed, until None comes."""
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # Opacus and PyTorch warn of hooks that they set themselves
    known = functions(problem)
    pipe.send(sorted(known))
    while (asked := pipe.recv()) is not None:
        what, key, *rest = asked
        run, value = known[key]
        if what == "value":
            pipe.send(value())
            continue
        run()  # wakes the threads; not timed
        began = time.perf_counter()
        for _ in range(rest[0]):
            run()
        pipe.send((time.perf_counter() - began) / rest[0])
