"""``python -m benchmarks.table``: results as Markdown; ``--into FILE`` writes them between the markers there.

These are ``<!-- benchmarks NAME -->`` and ``<!-- /benchmarks -->``, NAME the results file's without suffix.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .contenders import OURS

MEDIANS = "Milliseconds: medians (quartiles) of one interleaved run."
SMALL = 0.05  # of a case's time: kernels that take less are not worth a row
BOUNDS = (
    "By ncu: percent of what each unit could do in the kernel's time; where none is near its peak, what its "
    f"warps wait for most. Without kernels that take less than {100 * SMALL:g} % of the work's time."
)
RESULTS = Path(__file__).parent / "results"


def milliseconds(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(name: str, record: dict[str, Any]) -> str:
    """One case on one line, for the terminal."""
    cells = [f"{n} {milliseconds(t['median'])} ms" for n, t in record["times"].items()]
    cells += [f"{n}: {reason}" for n, reason in record["left_out"].items()]
    verdict = {True: " [met]", False: " [NOT MET]", None: ""}[record.get("met")]
    return f"{name}: {', '.join(cells)}{verdict}"


def render(report: dict[str, Any]) -> str:
    """The tables in Markdown: where it was measured, then cases against peers and time against length, or
    what bounds each kernel."""
    if "kernels" in report:
        return _where(report) + " " + BOUNDS + "\n\n" + _bounds(report["kernels"]) + "\n"
    cases = report["cases"].values()
    parts = [f"{_where(report)} {MEDIANS}{_missing(cases)}"]
    plain = [record for record in cases if "series" not in record]
    if plain:
        rows = [_row(record) for record in plain]
        head = ("work", "ours", "peers (times ours)", "required", "met", "goal")
        parts.append(_markdown(head, rows))
    for operator in dict.fromkeys(record["series"] for record in cases if "series" in record):
        points = [record for record in cases if record.get("series") == operator]
        names = list(dict.fromkeys(name for record in points for name in record["times"]))
        rows = [[str(p["length"]), *(_median(p["times"].get(name)) for name in names)] for p in points]
        parts.append(_markdown((f"{operator}, length", *(f"{name} ms" for name in names)), rows))
    return "\n\n".join(parts) + "\n"


def into(text: str, name: str, rendered: str) -> str:
    """The text with what is between the markers of `name` replaced. Raises ValueError without markers."""
    begin, end = f"<!-- benchmarks {name} -->", "<!-- /benchmarks -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {begin} ... {end} to write between")
    return pattern.sub(lambda _: f"{begin}\n{rendered}{end}", text, count=1)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables, or writes them into a file."""
    about = "A results file as Markdown."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=about)
    parser.add_argument("results", nargs="*", type=Path, help="default: all of benchmarks/results/")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write between the markers in FILE")
    args = parser.parse_args(argv)
    for path in args.results or sorted(RESULTS.glob("*.json")):
        rendered = render(json.loads(path.read_text()))
        if args.into is None:
            print(rendered)
            continue
        try:
            args.into.write_text(into(args.into.read_text(), path.stem, rendered))
        except ValueError as error:
            print(f"benchmarks.table: {args.into}: {error}", file=sys.stderr)
            return 1
    return 0


def _where(report: dict[str, Any]) -> str:
    device = report["device"]
    about = [device["name"]]
    if "threads" in device:
        about.append(f"{device['cores']} cores, {device['threads']} threads, {device['instruction_set']}")
    if "cuda" in device:
        about.append(f"CUDA {device['cuda']}")
    about += [f"{name} {version}" for name, version in report["versions"].items()]
    return f"{'; '.join(about)}; {report['date']}, commit {report['commit']}."


def _bounds(kernels: list[dict[str, Any]]) -> str:
    from .bounds import UNITS, bound

    spent: dict[str, float] = {}
    for kernel in kernels:
        spent[kernel["case"]] = spent.get(kernel["case"], 0) + kernel["launches"] * kernel["ms"]
    rows, before = [], None
    for kernel in kernels:
        if kernel["launches"] * kernel["ms"] < SMALL * spent[kernel["case"]]:
            continue
        launches = f" ({kernel['launches']} launches)" if kernel["launches"] > 1 else ""
        percents = [f"{kernel['percent'][unit]:.0f}" for unit in UNITS]
        title = kernel["title"] if kernel["case"] != before else ""
        before = kernel["case"]
        name = f"`{kernel['kernel']}`{launches}"
        rows.append([title, name, milliseconds(kernel["ms"]), *percents, bound(kernel)])
    return _markdown(("work", "kernel", "ms", *UNITS, "bound by"), rows)


def _missing(cases: Iterable[dict[str, Any]]) -> str:
    """The peers that were not there, once for all rows."""
    names = {name for record in cases for name, reason in record["left_out"].items() if _absent(reason)}
    return f" Not installed: {', '.join(sorted(names))}." if names else ""


def _absent(reason: str) -> bool:
    return reason.startswith("not installed")


def _median(times: dict[str, Any] | None) -> str:
    return "" if times is None else milliseconds(times["median"])


def _row(record: dict[str, Any]) -> list[str]:
    times, left_out = record["times"], record["left_out"]
    if OURS in times:
        t = times[OURS]
        ours = f"**{milliseconds(t['median'])}** ({milliseconds(t['q1'])}-{milliseconds(t['q3'])})"
    else:
        ours = left_out[OURS]
    peers = []
    for name, t in times.items():
        if name != OURS:
            ratio = record.get("ratios", {}).get(name)
            peers.append(f"{name} {_median(t)}" + (f" ({ratio:.3g} x)" if ratio is not None else ""))
    peers += [f"{n}: {reason}" for n, reason in left_out.items() if n != OURS and not _absent(reason)]
    met = {True: "yes", False: "no", None: ""}[record.get("met")]
    goal = f"{record['goal_ms']:g}" if "goal_ms" in record else ""
    return [record["title"], ours, "; ".join(peers), record.get("must", ""), met, goal]


def _markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
