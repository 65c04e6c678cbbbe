"""``python -m benchmarks.bounds``: what bounds our CUDA kernels in the benchmark's cases, by Nsight Compute.

Every kernel of a case is profiled once, at the clocks that the GPU takes, its caches emptied before. A whole
run writes benchmarks/results/DEVICE-bounds.json, of which ``python -m benchmarks.table`` makes a table.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import run, table
from .cases import Case, select

TIME = "gpu__time_duration.sum"
OF_PEAK = ".avg.pct_of_peak_sustained_elapsed"
# Percent of what the unit could do in the kernel's time.
UNITS = {
    "memory": "dram__throughput",
    "L2": "lts__throughput",
    "L1 and shared memory": "l1tex__throughput",
    "tensor cores": "sm__pipe_tensor_cycles_active",
    "special functions": "sm__inst_executed_pipe_xu",
    "issue slots": "sm__inst_issued",
}
# Warps that wait for it, or issue, on average, for each instruction issued.
WAITS = {
    "loads from memory": "long_scoreboard",
    "shared memory or special functions": "short_scoreboard",
    "the queue to shared memory": "mio_throttle",
    "the queue to L1": "lg_throttle",
    "barriers": "barrier",
    "products of a warpgroup": "gmma",
    "the instruction before": "wait",
    "a busy unit": "math_pipe_throttle",
    "code": "no_instruction",
    "constants": "imc_miss",
    "branches": "branch_resolving",
    "fences": "membar",
    "sleep": "sleeping",
    "stores at the end": "drain",
    "dispatch": "dispatch_stall",
    "another warp's turn": "not_selected",
    "": "selected",
}
NOT_ALONE = ("layer", "model", "first-call", "selective_scan/both/bfloat16/b1-d2048-l1048576")
NEAR_PEAK = 75  # percent from which a unit counts as the bound


def main(argv: list[str] | None = None) -> int:
    """Profiles the cases asked for. Returns 2 if no case matches, or if ncu is missing or fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--only", metavar="PATTERN", help="cases whose name holds this shell pattern: 'ssd/*/bfloat16'")
    option("--out", type=Path, metavar="FILE", help="default, of a full run: in benchmarks/results")
    option("--case", help=argparse.SUPPRESS)  # in the process that is profiled
    args = parser.parse_args(argv)
    if args.case:
        call_once(next(case for case in select("cuda", False, None) if case.name == args.case))
        return 0
    chosen = profiled(args.only)
    complaint = (
        f"no case matches {args.only!r}"
        if not chosen
        else "no CUDA device"
        if not torch.cuda.is_available()
        else "ncu (Nsight Compute) is not on the PATH"
        if shutil.which("ncu") is None
        else ""
    )
    if complaint:
        print(f"benchmarks.bounds: {complaint}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {**run.provenance(torch.device("cuda")), "kernels": []}
    for case in chosen:
        try:
            log = profile(case)
        except subprocess.CalledProcessError as failure:
            print(f"benchmarks.bounds: {case.name}: {failure.stdout[-2000:]}", file=sys.stderr)
            return 2
        report["kernels"] += [{"case": case.name, "title": case.title, **kernel} for kernel in kernels(log)]
        print(case.name, flush=True)
    print("\n" + table.render(report))
    out = args.out or (args.only is None and run.RESULTS / f"{report['device']['slug']}-bounds.json")
    if out:
        run.save(report, out)
        print(f"written: {out}")
    return 0


def profiled(only: str | None = None) -> list[Case]:
    """The cases of operators but for the series: forward and backward where there are both."""
    cases = {
        case.name: case
        for case in select("cuda", False, only)
        if case.series is None and not case.name.startswith(NOT_ALONE)
    }
    return [case for name, case in cases.items() if _both(name) == name or _both(name) not in cases]


def call_once(case: Case) -> None:
    """Calls the case's operator, the last time for the profiler."""
    call = case.contenders[0].prepare(case.make())
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def profile(case: Case) -> list[str]:
    """ncu's CSV of the case's kernels. Raises CalledProcessError where ncu fails."""
    metrics = [TIME, *(unit + OF_PEAK for unit in UNITS.values()), *map(_wait, WAITS.values())]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        ncu = ["ncu", "--csv", "--page", "raw", "--log-file", str(log), "--print-kernel-base", "function"]
        ncu += ["--kernel-name-base", "demangled", "--kernel-name", "regex:mamba_ops"]
        ncu += ["--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(metrics)]
        command = [*ncu, sys.executable, "-m", "benchmarks.bounds", "--case", case.name]
        root = Path(__file__).resolve().parents[1]
        subprocess.run(
            command, cwd=root, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return log.read_text().splitlines()


def kernels(log: Iterable[str]) -> list[dict[str, Any]]:
    """The kernels of a log, in the order of their first launches; figures are those of the longest launch."""
    rows = csv.reader(line for line in log if line.startswith('"'))
    head, units = next(rows), next(rows)
    scale = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "nsecond": 1e-6, "usecond": 1e-3}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells = dict(zip(head, row, strict=True))

        def number(metric: str, cells: dict[str, str] = cells) -> float:
            return float(cells[metric].replace(",", ""))

        ms = number(TIME) * scale[units[head.index(TIME)]]
        waits = {words: number(_wait(name)) for words, name in WAITS.items()}
        kernel = {
            "ms": round(ms, 5),
            "percent": {words: round(number(unit + OF_PEAK), 1) for words, unit in UNITS.items()},
            "waits": {w: round(100 * n / sum(waits.values()), 1) for w, n in waits.items() if w},
        }
        name = cells["Kernel Name"]
        before = found.get(name, {"launches": 0, "ms": 0.0})
        longest = kernel if kernel["ms"] >= before["ms"] else before
        found[name] = {**longest, "kernel": name, "launches": before["launches"] + 1}
    return list(found.values())


def bound(kernel: dict[str, Any]) -> str:
    """What bounds a kernel: a unit near its peak, or else the latency that its warps wait for most."""
    unit, percent = max(kernel["percent"].items(), key=lambda item: item[1])
    if percent >= NEAR_PEAK:
        return unit
    wait, share = max(kernel["waits"].items(), key=lambda item: item[1])
    return f"latency: {wait}, {share:.0f} %"


def _both(name: str) -> str:
    return name.replace("/forward/", "/both/")


def _wait(name: str) -> str:
    return f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"


if __name__ == "__main__":
    sys.exit(main())
