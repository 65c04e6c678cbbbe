"""``python -m benchmarks.compare OLD NEW``: fails where our times grew by more than 5 % from OLD to NEW.

A case is slower where both its median and its minimum grew beyond the limit: what other programs do to a run
seldom moves both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .contenders import OURS
from .table import milliseconds


def slower(old: dict[str, Any], new: dict[str, Any], limit: float = 1.05) -> tuple[list[str], list[str]]:
    """Compares two results files.

    Args:
        old, new: as `benchmarks.run` writes them.
        limit: growth that passes.

    Returns:
        A line for every case in both, and those of the cases that fail: slower, or no longer timed.

    Raises:
        ValueError: the files are from different devices, or share no case.
    """
    for what in ("name", "threads"):
        if old["device"].get(what) != new["device"].get(what):
            raise ValueError(f"different {what}: {old['device'].get(what)}, {new['device'].get(what)}")
    lines, failed = [], []
    for name, before in old["cases"].items():
        if name not in new["cases"] or OURS not in before["times"]:
            continue
        a, b = before["times"][OURS], new["cases"][name]["times"].get(OURS)
        if b is None:
            line = f"{name}: no longer timed: {new['cases'][name]['left_out'].get(OURS)}"
            failed.append(line)
        else:
            growth = {what: b[what] / a[what] for what in ("median", "min")}
            change = f"{milliseconds(a['median'])} -> {milliseconds(b['median'])} ms"
            line = f"{name}: {change} ({growth['median'] - 1:+.1%})"
            if min(growth.values()) > limit:
                failed.append(line)
        lines.append(line)
    if not lines:
        raise ValueError("no case of ours in both files")
    return lines, failed


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if nothing is slower, 1 if something is, 2 if the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Fails on a slow-down.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=5.0, metavar="PERCENT", help="default: 5")
    args = parser.parse_args(argv)
    try:
        old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
        lines, failed = slower(old, new, 1 + args.limit / 100)
    except (OSError, ValueError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    if failed:
        print(f"\nslower by more than {args.limit:g} %:\n" + "\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
