"""The tables of what single gradients tell."""

from experiments.shared.shown import Row, Shown

SUSPECT = (
    ("self-influence, the squared norm of its gradient", "self-influence"),
    ("harm to the held-out digits of one class, the largest of ten", "harm to one class"),
    ("harm to all held-out digits", "harm to all"),
    ("for comparison, its loss", "loss"),
)


def both(name: str, digits: int) -> str:
    """A figure with its standard error, by single gradients and by its definition."""
    keys = (name, f"{name}_error", f"{name}_defined", f"{name}_defined_error")
    return "{} +- {}, {} +- {}".format(*(f"{{definition[{key}]:.{digits}f}}" for key in keys))


NOISE = (
    ("gradient norm of the median example, early and at the end", "{norm_median[0]:.2f}, {norm_median[1]:.2f}"),
    (
        "the largest of a batch over the median, early and at the end",
        "{largest_over_median[0]:.2f}, {largest_over_median[1]:.2f}",
    ),
    ("noise scale, all layers", "{scale[all][0]:.1f}, {scale[all][1]:.1f}"),
    ("noise scale, layer norms alone", "{scale[norms][0]:.1f}, {scale[norms][1]:.1f}"),
    (
        "their correlation over the steps, and that of their logarithms",
        "{correlation:.3f}, {correlation_of_logs:.3f}",
    ),
    (
        "slope of all on layer norms, through 0, and how far off it is",
        "{slope:.2f}, off by {off:.1%} (root mean square)",
    ),
    ("trace, by single gradients and by its definition", both("trace", 2)),
    ("square, by single gradients and by its definition", both("square", 4)),
)

BESIDE = (
    ("the gradient and all norms", "norms beside"),
    ("norms alone", "norms alone"),
    ("the mean of clipped gradients", "clipped"),
    ("the gradient and second moments", "second moment beside"),
    ("`moments`", "moments"),
    ("`noise_scale`", "noise scale"),
    ("the gradient and `kronecker()`", "kfac beside"),
    ('the gradient and `kronecker("reduce")`', "kfac beside, reduced"),
    ("`gram`", "gram"),
    ("`influence` of the batch on one example", "influence"),
    ("`per_example`", "per_example"),
)
NO_VMAP = ("kfac beside", "kfac beside, reduced")  # which single gradients cannot give
COSTS = ("mlp", "lenet", "lstm", "gpt")
PEERS = (
    ("the gradient", "gradient", "PyTorch eager"),
    ("clipped", "clipped", "Opacus, ghost clipping"),
    ("clipped", "clipped", "jax_privacy"),
    ("the gradient and norms", "norms beside", "BackPACK"),
    ("the gradient and norms", "norms beside", "Opacus, grad_sample"),
    ("the gradient and second moments", "second moment beside", "BackPACK"),
    ("the gradient and K-FAC factors of sampled labels", "kfac of the Fisher", "BackPACK, KFAC"),
    ("the gradient and K-FAC factors of sampled labels", "kfac of the Fisher", "kfac-jax"),
)


def cost_of(statistic: str, against: str, memory: bool) -> tuple[str, ...]:
    """The ratio of times on each net, and of memories on request."""
    at = [f"{{{net}[{statistic}][{against}]" for net in COSTS]
    return tuple(f"{one}[time]:.2f}}" + f" ({one}[memory]:.2f}})" * memory for one in at)


def beside_peer(statistic: str, peer: str) -> tuple[str, ...]:
    """On both nets our milliseconds, theirs, and the median of the ratios."""
    at = [f"{{{net}[{statistic}][{peer}]" for net in COSTS[:2]]
    return tuple(f"{one}[ms]:.1f}} / {one}[their_ms]:,.1f}}: {one}[time]:.3f}}" for one in at)


OPENED = (
    ("the gradient of the mean loss", "gradient", "jax.grad"),
    ("norms of single gradients", "norms", "jax.grad"),
    ("norms of single gradients", "norms", "vmap(jax.grad)"),
    ("the gradient and norms", "gradient and norms", "jax.grad"),
    ("`kronecker()`", "pairs", "jax.grad"),
    ("the gradient and `kronecker()`", "gradient and pairs", "jax.grad"),
)


def cost_of_opening(what: str, against: str) -> tuple[str, ...]:
    """The ratios of time, of memory, and of the time to trace and compile, on each model."""
    at = [f"{{{model}[{what}][{against}]" for model in ("mlp", "transformer", "wide")]
    cells = [f"{one}[time]:.2f}} ({one}[memory]:.2f}}, {one}[compile]:.2f}})" for one in at]
    return tuple(cells if against == "jax.grad" else [*cells[:2], ""])


STATISTICS: dict[str, Shown] = {
    "opening": Shown(
        ("time (memory, tracing and compiling)", "over", "Equinox MLP", "Flax transformer", "the same, wide"),
        tuple(
            Row(label, "opening_cost/default", (against, *cost_of_opening(what, against)))
            for label, what, against in OPENED
        ),
    ),
    "cost of statistics": Shown(
        ("over one gradient: time (memory)", "MLP", "LeNet", "LSTM", "gpt"),
        tuple(Row(label, "statistics_cost/default", cost_of(one, "one gradient", True)) for label, one in BESIDE),
    ),
    "statistics by vmap": Shown(
        ("over the same by vmap(jax.grad): time", "MLP", "LeNet", "LSTM", "gpt"),
        tuple(
            Row(label, "statistics_cost/default", cost_of(one, "vmap(jax.grad)", False))
            for label, one in BESIDE
            if one not in NO_VMAP
        ),
    ),
    "statistics of other libraries": Shown(
        ("ours / theirs in ms: ratio", "against", "MLP", "LeNet"),
        tuple(Row(label, "statistics_cost/default", (peer, *beside_peer(one, peer))) for label, one, peer in PEERS),
    ),
    "privacy": Shown(
        ("epsilon, delta 1e-5", "by Rényi divergences", "noise / limit", "test accuracy"),
        (
            *(
                Row(
                    epsilon,
                    "private/default",
                    (
                        f"{{{epsilon}[epsilon_rdp]:.3f}}",
                        f"{{{epsilon}[noise]:.3f}}",
                        f"{{{epsilon}[accuracy]:.2%}}",
                    ),
                )
                for epsilon in ("1", "3", "8")
            ),
            Row("without noise", "private/default", ("", "0", "{control[accuracy]:.2%}")),
        ),
    ),
    "K-FAC": Shown(
        ("autoencoder of MNIST, 200 steps of 1,000 images", "the best of its 4 trials", "loss of the last epoch"),
        (
            *(
                Row(kind, "kfac/default", (f"{{best[{kind}]}}", f"{{final[{kind}]:.4f}}"))
                for kind in ("K-FAC", "Adam", "SGD")
            ),
            Row(
                "K-FAC to the last loss of Adam",
                "kfac/default",
                (
                    "{steps_over_adam:.2f} of the steps",
                    "{time_over_adam:.2f} of the time, {step_over_adam_time:.1f} a step",
                ),
            ),
        ),
    ),
    "noise of gradients": Shown(
        ("gpt of 2 layers of width 48, batches of 32, 2,000 steps", "measured"),
        tuple(Row(label, "norms/default", (cell,)) for label, cell in NOISE),
    ),
    "wrong labels": Shown(
        (
            "score of a training digit, summed over 10 checkpoints",
            "of 50 wrong labels, among the 100 largest, by seed",
        ),
        tuple(Row(label, "influence/default", (f"{{found[{score}]}}",)) for label, score in SUSPECT),
    ),
    "projected influence": Shown(
        ("influence on 5 mistaken test digits, by 64 random numbers for each parameter", "measured"),
        (
            Row(
                "rank correlation with the exact influence",
                "influence/default",
                ("{least_rank_correlation:.2f} to {most_rank_correlation:.2f}",),
            ),
            Row(
                "the ten that help most and the ten that harm most",
                "influence/default",
                ("{fewest_same_extremes} to {most_same_extremes} of 20 are the same",),
            ),
        ),
    ),
}
