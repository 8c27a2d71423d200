"""The tables of how fast the hand-written backwards are, and how that grows."""

from experiments.shared.shown import Row, Shown

CELLS = ("ms", "peak", "MB", "memory", "jax.grad", "plain JAX", "Flax NNX", "Equinox", "PyTorch")
LAYERS = (
    "dense 1024, (512, 784)",
    "dense 1024, (4096, 128)",
    "conv 32 3x3, (64, 28, 28, 1)",
    "conv 64 3x3, (64, 14, 14, 32)",
    "conv_transpose 64, 16, stride 8, (4, 1000, 64)",
    "max_pool 2x2, (64, 28, 28, 32)",
    "max_pool 3x3, stride 2",
    "avg_pool 2x2, (64, 28, 28, 32)",
    "batch_norm, (64, 14, 14, 64)",
    "group_norm 8, (64, 14, 14, 64)",
    "layer_norm, (4096, 512)",
    "rms_norm, (4096, 512)",
    "gelu, (4096, 512)",
    "silu, (4096, 512)",
    "swiglu 512, (1024, 512)",
    "dropout 0.1, (4096, 512)",
    "embedding 16384 x 256, (8, 256)",
    "attention, 8 heads, causal, (1, 2048, 512)",
    "attention, 6 heads, causal, (12, 256, 384)",
    "LSTM 256, (32, 128, 128)",
    "GRU 256, (32, 128, 128)",
)
WHOLE = (
    "head and loss, 2048 x 256 x 16384",
    "head and loss, 2048 x 512 x 32768",
    "MLP 784-1024-1024-10, 512",
    "LeNet, 64",
    "CNN 32-64, 64",
    "resnet(20), 32",
    "LSTM classifier 128, (64, 28, 28)",
    "gpt, nanoGPT recipe, 12 x 256",
    "step of LeNet, 64",
    "step of a gpt, 8192 positions, width 128, 4 layers",
    "step of a gpt, vocabulary 16384, linear_cross_entropy",
)
GROWTH = (
    ("MLP 784-512-512-10", "batch", ("fnbp", "jax.grad")),
    ("MLP of two hidden layers, batch 256", "width", ("fnbp", "jax.grad")),
    ("transformer blocks", "depth", ("fnbp", "jax.grad")),
    ("attention", "length", ("fnbp", "jax.grad", "plain JAX")),
    ("LSTM", "length", ("fnbp", "jax.grad")),
)


def benched(name: str) -> Row:
    """What a case costs."""
    return Row(name, "bench/default", tuple(f"{{{name}[said][{cell}]}}" for cell in CELLS))


def grown(name: str, what: str, side: str) -> Row:
    """The slopes of a side."""
    of = f"{{slopes[{name}][{side}]"
    return Row(f"{name}: {what}", "growth/default", (side, f"{of}[time]:.2f}}", f"{of}[memory]:.2f}}"))


HEADS = ("forward and backward: fnbp / other", "ms", "of the peak", "MB", "memory / jax.grad", *CELLS[4:])
SPEED = {
    "speed of layers": Shown(HEADS, tuple(map(benched, LAYERS))),
    "speed of models": Shown(HEADS, tuple(map(benched, WHOLE))),
    "growth": Shown(
        ("what grows", "side", "slope of time", "slope of memory"),
        tuple(grown(name, what, side) for name, what, sides in GROWTH for side in sides),
    ),
}
