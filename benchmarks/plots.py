"""Pictures of a results file: time against length, and our time against every peer's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .contenders import OURS

_COLOURS = ("#0b6e4f", "#d1495b", "#30638e", "#edae49", "#6f4e7c", "#8d99ae")


def draw(report: dict[str, Any], results: Path) -> list[Path]:
    """Draws what the report holds beside its file, as NAME-KIND.png; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        return []
    where = f"{report['device']['name']}, torch {report['versions'].get('torch')}, {report['date']}"
    cases = list(report["cases"].values())
    written = []
    for operator in dict.fromkeys(record["series"] for record in cases if "series" in record):
        points = [record for record in cases if record.get("series") == operator]
        name = "-".join([results.stem, *re.findall(r"\w+", operator)])
        written.append(_lengths(operator, points, where, results.with_name(f"{name}.png")))
    bars = [record for record in cases if "series" not in record and record.get("ratios")]
    if bars:
        written.append(_bars(bars, where, results.with_name(f"{results.stem}-peers.png")))
    return written


def _lengths(operator: str, points: list[dict[str, Any]], where: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for i, name in enumerate(dict.fromkeys(name for p in points for name in p["times"])):
        timed = sorted((p["length"], p["times"][name]) for p in points if name in p["times"])
        lengths = [length for length, _ in timed]
        colour = _COLOURS[i % len(_COLOURS)]
        median, q1, q3 = ([t[what] for _, t in timed] for what in ("median", "q1", "q3"))
        axes.plot(lengths, median, "o-", color=colour, label=name, ms=4, lw=2.4 if name == OURS else 1.3)
        axes.fill_between(lengths, q1, q3, color=colour, alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds (median, quartiles)")
    ticks = [p["length"] for p in points]
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.minorticks_off()
    work = points[-1]["title"].replace(f" l{points[-1]['length']}", "")
    axes.set_title(f"{work}\n{where}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _bars(records: list[dict[str, Any]], where: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    rows = [(record, name, ratio) for record in records for name, ratio in record["ratios"].items()]
    names = list(dict.fromkeys(name for _, name, _ in rows))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.27 * (len(rows) + len(records))), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for record in records:
        first = y
        for name, ratio in record["ratios"].items():
            axes.barh(y, ratio, color=_COLOURS[1 + names.index(name) % (len(_COLOURS) - 1)], height=0.85)
            axes.text(ratio * 1.05, y, f"{ratio:.3g} x  {name}", va="center", fontsize=7)
            y += 1
        ticks.append((first + y - 1) / 2)
        labels.append(f"{record['title']}\nours: {record['times'][OURS]['median']:.3g} ms")
        y += 0.6
    axes.axvline(1, color=_COLOURS[0], lw=2)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(ratio for *_, ratio in rows) * 0.8), max(ratio for *_, ratio in rows) * 8)
    axes.set_xlabel("the peer's time in units of ours (median; the line is mamba_ops)")
    axes.set_title(where, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
