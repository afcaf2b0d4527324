"""Curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from featherface.files import atomic_write


def draw_curves(metrics: Sequence[Mapping[str, str]], validation: Sequence[Mapping[str, str]], path: Path) -> bool:
    """Draws losses, learning rate and validation AP from the rows of the two tables.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    if not metrics:
        return True
    steps = [int(row["step"]) for row in metrics]
    figure = Figure(figsize=(12, 4))
    FigureCanvasAgg(figure)
    losses, rate, ap = figure.subplots(1, 3)
    first = list(metrics[0])
    for name in first[first.index("loss") : first.index("gradient_norm")]:
        values = [float(row[name]) for row in metrics]
        if any(values):
            losses.plot(steps, values, label=name, linewidth=2 if name == "loss" else 1)
    losses.set(title="weighted losses", xlabel="step", yscale="log")
    losses.legend(fontsize="small")
    rate.plot(steps, [float(row["lr"]) for row in metrics])
    rate.set(title="learning rate", xlabel="step")
    for name in [key for key in validation[0] if key.startswith("ap_")] if validation else []:
        ap.plot([int(row["epoch"]) for row in validation], [float(row[name]) for row in validation], label=name[3:])
    ap.set(title="validation AP at IoU 0.5", xlabel="epoch", ylim=(0, 1))
    if validation:
        ap.legend(fontsize="small")
    for axes in (losses, rate, ap):
        axes.grid(alpha=0.3)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.13, wspace=0.2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
    return True
