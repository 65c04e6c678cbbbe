"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.checkpoint import replacing


def draw(path: Path, history: list[dict[str, Any]], baselines: dict[str, float], title: str) -> str:
    """Draws training and held-out bits per byte against the bytes seen, with the baselines as lines.

    Args:
        path: the PNG file to write; it is replaced whole.
        history: entries with "bytes" and either of "train" and "held_out".
        baselines: bits per byte by name.
        title: above the picture.

    Returns:
        One line for the user: where the picture is, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the curve: matplotlib is not installed (pip install matplotlib)"
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("train", "training rows", "-"), ("held_out", "held-out text", "o-")):
        points = [(entry["bytes"] / 1e6, entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    for (name, bits), dash in zip(baselines.items(), (":", "--", "-."), strict=False):
        axes.axhline(bits, linestyle=dash, color="0.4", label=f"{name}: {bits:.2f}")
    axes.set(xlabel="million bytes seen", ylabel="bits per byte", title=title)
    axes.set_ylim(top=min(6.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return f"curve: {path}"
