"""The figure of a report: each leaf's error, by itself and in the whole pass, from the input up to the loss."""

from typing import Any

import numpy as np

FLOOR, CEILING = 1e-18, 1e3  # an exact 0 is drawn on the floor, an infinite error under the ceiling
COLOURS = {"ok": "#0b6e99", "inherits": "#e08e0b", "convention": "#3c8d5a"}
FAULT = "#b3261e"


def draw(report: Any, path: Any = None) -> Any:
    """Draw the report as a matplotlib Figure, and save it if there is a path.

    Raises: ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Report.plot draws with matplotlib: pip install 'fnbp[plot]'") from error
    rows = report.rows
    figure = Figure(figsize=(9, 1.6 + 0.26 * max(len(rows), 3)), layout="constrained")
    axes = figure.add_subplot()
    heights = range(len(rows))
    for height, row in enumerate(rows):
        draw_row(axes, height, row)
    axes.set_yticks(heights, [escaped(f"{row.path}   d{row.leaf}") for row in rows], fontsize=8, family="monospace")
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(COLOURS.get(row.kind, FAULT) if row.kind != "ok" else "#222222")
    bands(axes, rows)
    axes.set_xscale("log")
    axes.set_xlim(FLOOR / 3, CEILING * 3)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("|manual - automatic| / |automatic| in float64; an exact 0 at the left edge")
    title = "every leaf is right" if report.ok else f"first fault: {report.faults[0].path} -> d{report.faults[0].leaf}"
    figure.suptitle(escaped(f"manual against automatic: {title}"), x=0.01, ha="left", fontsize=11, fontweight="bold")
    legend(axes, any(row.whole is not None for row in rows))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def escaped(text: str) -> str:
    """The text with its dollar signs escaped, so that matplotlib does not read a formula."""
    return text.replace("$", r"\$")


def draw_row(axes: Any, height: float, row: Any) -> None:
    """Draw a leaf: what rounding allows, the error of the layer by itself, the error in the whole pass."""
    colour = COLOURS.get(row.kind, FAULT)
    alone = on_scale(row.error)
    if row.limit:
        axes.plot([row.limit] * 2, [height - 0.36, height + 0.36], color="#999999", lw=1.2)
    if row.whole is not None:
        whole = on_scale(row.whole)
        axes.plot([alone, whole], [height] * 2, color=colour, lw=0.8, alpha=0.5)
        axes.plot(whole, height, "o", mfc="white", mec=colour, ms=6)
    axes.plot(alone, height, "o" if row.ok else "X", color=colour, ms=4 if row.ok else 9)
    if not row.ok:
        axes.annotate(row.kind, (alone, height), xytext=(8, -3), textcoords="offset points", color=FAULT, fontsize=8)


def on_scale(error: float) -> float:
    """The error, moved onto the axis."""
    return float(np.clip(np.nan_to_num(error, nan=CEILING, posinf=CEILING), FLOOR, CEILING))


def bands(axes: Any, rows: Any) -> None:
    """Draw a grey band behind every other layer."""
    paths = list(dict.fromkeys(row.path for row in rows))
    for height, row in enumerate(rows):
        if paths.index(row.path) % 2:
            axes.axhspan(height - 0.5, height + 0.5, color="#f2f2f2", lw=0, zorder=0)


def legend(axes: Any, whole: bool) -> None:
    """Draw the legend."""
    axes.plot([], [], "o", color=COLOURS["ok"], ms=4, label="the layer by itself, given the right delta")
    if whole:
        axes.plot([], [], "o", mfc="white", mec=COLOURS["ok"], ms=6, label="at the end of the whole backward pass")
        axes.plot([], [], "o", mfc="white", mec=COLOURS["inherits"], ms=6, label="inherits an error from above")
    axes.plot([], [], color="#999999", lw=1.2, label="what rounding may do to this leaf")
    axes.plot([], [], "X", color=FAULT, ms=9, label="wrong")
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
