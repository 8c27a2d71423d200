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

STATISTICS: dict[str, Shown] = {
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
