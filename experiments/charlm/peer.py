"""The model of charlm in PyTorch eager, from the same weights: the peer that is trained in turns with it."""

import time
from typing import Any

import jax
import numpy as np

from experiments.shared.report import InputError


def require() -> None:
    """Raise InputError if PyTorch is not installed, before anything is trained."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("--peer needs PyTorch: pip install 'fnbp[peers]'") from error


class Peer:
    """The same training in PyTorch."""

    def __init__(self, params: Any, settings: Any, schedule: Any, decayed: frozenset[str]):
        import torch

        embedding, positions, *dropout, blocks, norm, _ = params[0]
        if any(dropout):
            raise InputError("--peer is for a model without dropout: the two draw different numbers")
        self.heads, self.schedule = settings.heads, schedule
        tensor = lambda a: torch.tensor(np.asarray(a), requires_grad=True)  # noqa: E731
        (attention,), (mlp,) = blocks[0]
        turns = range(settings.layers)
        self.leaves = {
            "E": tensor(embedding["E"]),
            "P": tensor(positions["P"]),
            "norm": {name: tensor(a) for name, a in norm.items()},
            "blocks": [jax.tree.map(lambda a, i=i: tensor(a[i]), (attention, mlp)) for i in turns],
        }
        groups: dict[bool, list] = {True: [], False: []}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.leaves):
            groups[path[-1].key in decayed].append(leaf)
        self.parameters = groups[True] + groups[False]
        by_decay = [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(by_decay, lr=1.0, betas=(0.9, 0.99))

    def forward(self, x: Any) -> Any:
        """The scores of the next letter."""
        import torch.nn.functional as F  # noqa: N812

        def normed(p, h):
            return F.layer_norm(h, h.shape[-1:], p["gamma"], p["beta"])

        def part(p, leaf, h):
            return F.linear(h, p[leaf], p.get(f"b_{leaf}"))

        def attend(p, h):
            q, k, v = (part(p, leaf, h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for leaf in "QKV")
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return part(p, "O", o.transpose(1, 2).flatten(2))

        def dense(p, h):
            return F.linear(h, p["W"], p["b"])

        h = F.embedding(x, self.leaves["E"]) + self.leaves["P"][: x.shape[1]]
        for (norm, attention), (second, (up, _, down)) in self.leaves["blocks"]:
            h = h + attend(attention, normed(norm, h))
            h = h + dense(down, F.gelu(dense(up, normed(second, h))))
        return normed(self.leaves["norm"], h) @ self.leaves["E"].T

    def loss(self, x: np.ndarray, y: np.ndarray) -> Any:
        """The mean loss of a letter."""
        import torch

        tokens, targets = (torch.tensor(a, dtype=torch.long) for a in (x, y))
        return torch.nn.functional.cross_entropy(self.forward(tokens).flatten(0, 1), targets.flatten())

    def turn(self, n: int, batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, float]:
        """Take a step on each batch, starting at step n. Returns: the losses and the seconds."""
        began = time.perf_counter()
        losses = [self.step(n + i, *batch) for i, batch in enumerate(batches)]
        return np.asarray(losses), time.perf_counter() - began

    def step(self, n: int, x: np.ndarray, y: np.ndarray) -> float:
        """Update the parameters once. Returns: the loss."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedule(n))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()

    def evaluate(self, text: np.ndarray) -> float:
        """The mean loss over all whole blocks of a text."""
        import torch

        block = self.leaves["P"].shape[0]
        n = (len(text) - 1) // block
        x, y = text[: n * block].reshape(n, block), text[1 : n * block + 1].reshape(n, block)
        with torch.no_grad():
            parts = zip(np.array_split(x, 8), np.array_split(y, 8), strict=True)
            return sum(self.loss(*part).item() * len(part[0]) for part in parts) / n
