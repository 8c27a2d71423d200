"""What of the noise of gradients stands in its table of experiments/README.md: labels, and texts with figures."""


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
