"""The tables of what single gradients tell."""

from experiments.shared.shown import Row, Shown

SUSPECT = (
    ("self-influence, the squared norm of its gradient", "self-influence"),
    ("harm to the held-out digits of one class, the largest of ten", "harm to one class"),
    ("harm to all held-out digits", "harm to all"),
    ("for comparison, its loss", "loss"),
)

STATISTICS: dict[str, Shown] = {
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
