"""The same layers and models in PyTorch, in a process of its own: see Torch in experiments/bench/turns.py."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

Run = Callable[[], None]


def of_module(make: Callable[[Any], Any], *shape: int, call: Callable | None = None) -> Callable[[Any, Callable], Run]:
    """(torch, wrap) -> forward and backward of a module, for a normal dy; the gradients of x and of all parameters."""

    def made(torch: Any, wrap: Callable) -> Run:
        module, x = make(torch.nn), torch.randn(*shape, requires_grad=True)
        apply = wrap(module if call is None else partial(call, torch, module))
        dy = torch.randn_like(apply(x))
        wanted = [x, *module.parameters()]

        def run() -> None:
            torch.autograd.grad(apply(x), wanted, dy)

        return run

    return made


def of_loss(make: Callable[[Any], Any], x: Callable[[Any], Any], classes: int, dx: bool = False) -> Callable:
    """(torch, wrap) -> the cross-entropy of a model and its gradients; those of x too, if dx."""

    def made(torch: Any, wrap: Callable) -> Run:
        model, data = make(torch.nn), x(torch)
        apply, data = wrap(model), data.requires_grad_() if dx else data
        with torch.no_grad():
            shape = model(data).shape
        y = torch.randint(0, classes, shape[:-1])
        wanted = [*model.parameters(), *([data] if dx else [])]

        def run() -> None:
            scores = apply(data)
            torch.autograd.grad(torch.nn.functional.cross_entropy(scores.flatten(0, -2), y.flatten()), wanted)

        return run

    return made


def attended(heads: int) -> Callable:
    """Causal attention with its four projections, by PyTorch's own kernel."""

    def call(torch: Any, module: Any, x: Any) -> Any:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in module[0](x).chunk(3, -1))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return module[1](o.transpose(1, 2).flatten(2))

    return call


def projections(width: int) -> Callable:
    """The matrices of attention."""
    return lambda nn: nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(width, width))


def first(torch: Any, module: Any, x: Any) -> Any:
    """What a recurrent module puts out at each position."""
    return module(x)[0]


def convolved(nn: Any, *layers: Any, flat: int) -> Any:
    """Convolutions, then two fully connected layers."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn(nn: Any) -> Any:
    """As cases.cnn."""
    one = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return convolved(nn, *one, nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), flat=64 * 49)


def lenet(nn: Any) -> Any:
    """As fnbp.models.lenet."""
    one, two = (nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)), (nn.Conv2d(6, 16, 5), nn.ReLU())
    ends = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*one, *two, nn.MaxPool2d(2), nn.Flatten(), *ends)


def residual(nn: Any, n_in: int, n_out: int) -> Any:
    """A residual block; the shortcut projects where the width changes."""
    stride = 1 if n_in == n_out else 2

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            conv = lambda n, stride: nn.Conv2d(n, n_out, 3, stride, 1, bias=False)  # noqa: E731
            self.path = nn.Sequential(
                conv(n_in, stride), nn.BatchNorm2d(n_out), nn.ReLU(), conv(n_out, 1), nn.BatchNorm2d(n_out)
            )
            around = (nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            self.around = nn.Identity() if stride == 1 else nn.Sequential(*around)

        def forward(self, x):
            return (self.path(x) + self.around(x)).relu()

    return Block()


def resnet(nn: Any) -> Any:
    """As fnbp.models.resnet(20)."""
    start = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = (residual(nn, *pair) for pair in pairwise(widths))
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def gpt(vocabulary: int, length: int, layers: int, heads: int, width: int) -> Callable:
    """As fnbp.models.gpt."""

    def make(nn: Any) -> Any:
        import torch

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
                self.attention = projections(width)(nn)
                self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

            def forward(self, x):
                x = x + attended(heads)(torch, self.attention, self.norms[0](x))
                return x + self.mlp(self.norms[1](x))

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.E, self.P = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
                self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width)

            def forward(self, x):
                return self.norm(self.blocks(self.E(x) + self.P.weight[: x.shape[1]])) @ self.E.weight.T

        return Model()

    return make


def normal(*shape: int) -> Callable[[Any], Any]:
    """(torch) -> normal numbers."""
    return lambda torch: torch.randn(*shape)


PEERS: dict[str, Callable[[Any, Callable], Run]] = {
    "dense 1024, (512, 784)": of_module(lambda nn: nn.Linear(784, 1024), 512, 784),
    "dense 1024, (4096, 128)": of_module(lambda nn: nn.Linear(128, 1024), 4096, 128),
    "conv 32 3x3, (64, 28, 28, 1)": of_module(lambda nn: nn.Conv2d(1, 32, 3, padding=1), 64, 1, 28, 28),
    "conv 64 3x3, (64, 14, 14, 32)": of_module(lambda nn: nn.Conv2d(32, 64, 3, padding=1), 64, 32, 14, 14),
    "conv_transpose 64, 16, stride 8, (4, 1000, 64)": of_module(
        lambda nn: nn.ConvTranspose1d(64, 64, 16, 8), 4, 64, 1000
    ),
    "max_pool 2x2, (64, 28, 28, 32)": of_module(lambda nn: nn.MaxPool2d(2), 64, 32, 28, 28),
    "max_pool 3x3, stride 2": of_module(lambda nn: nn.MaxPool2d(3, 2), 64, 32, 28, 28),
    "avg_pool 2x2, (64, 28, 28, 32)": of_module(lambda nn: nn.AvgPool2d(2), 64, 32, 28, 28),
    "batch_norm, (64, 14, 14, 64)": of_module(lambda nn: nn.BatchNorm2d(64), 64, 64, 14, 14),
    "group_norm 8, (64, 14, 14, 64)": of_module(lambda nn: nn.GroupNorm(8, 64), 64, 64, 14, 14),
    "layer_norm, (4096, 512)": of_module(lambda nn: nn.LayerNorm(512), 4096, 512),
    "rms_norm, (4096, 512)": of_module(lambda nn: nn.RMSNorm(512), 4096, 512),
    "gelu, (4096, 512)": of_module(lambda nn: nn.GELU(), 4096, 512),
    "silu, (4096, 512)": of_module(lambda nn: nn.SiLU(), 4096, 512),
    "dropout 0.1, (4096, 512)": of_module(lambda nn: nn.Dropout(0.1), 4096, 512),
    "attention, 8 heads, causal, (1, 2048, 512)": of_module(projections(512), 1, 2048, 512, call=attended(8)),
    "attention, 6 heads, causal, (12, 256, 384)": of_module(projections(384), 12, 256, 384, call=attended(6)),
    "LSTM 256, (32, 128, 128)": of_module(lambda nn: nn.LSTM(128, 256, batch_first=True), 32, 128, 128, call=first),
    "GRU 256, (32, 128, 128)": of_module(lambda nn: nn.GRU(128, 256, batch_first=True), 32, 128, 128, call=first),
    "head and loss, 2048 x 256 x 16384": of_loss(
        lambda nn: nn.Linear(256, 16384, bias=False), normal(2048, 256), 16384, dx=True
    ),
    "head and loss, 2048 x 512 x 32768": of_loss(
        lambda nn: nn.Linear(512, 32768, bias=False), normal(2048, 512), 32768, dx=True
    ),
    "MLP 784-1024-1024-10, 512": of_loss(
        lambda nn: nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        ),
        normal(512, 784),
        10,
    ),
    "LeNet, 64": of_loss(lenet, normal(64, 1, 28, 28), 10),
    "CNN 32-64, 64": of_loss(cnn, normal(64, 1, 28, 28), 10),
    "resnet(20), 32": of_loss(resnet, normal(32, 3, 32, 32), 10),
    "gpt, nanoGPT recipe, 12 x 256": of_loss(
        gpt(65, 256, 6, 6, 384), lambda torch: torch.randint(0, 65, (12, 256)), 65
    ),
}


def serve(pipe: Connection, threads: int, compiled: bool) -> None:
    """Answer ("make", name) by True, then ("time", calls) by the seconds of one call, until None comes.

    compiled: torch.compile it.
    """
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    run: Run = lambda: None  # noqa: E731
    while (asked := pipe.recv()) is not None:
        what, given = asked
        if what == "make":
            run = PEERS[given](torch, torch.compile if compiled else lambda f: f)
            run()
            pipe.send(True)
            continue
        run()  # wakes the threads; not timed
        began = time.perf_counter()
        for _ in range(given):
            run()
        pipe.send((time.perf_counter() - began) / given)
