"""``python -m benchmarks.run``: times our operators and their peers in one run and writes what came out.

Every contender's results are compared with plain torch first; one whose results are wrong is not timed.
A whole run writes benchmarks/results/DEVICE.json and its pictures; a part of it (--only, --quick) writes
only where --out says.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plots, table
from .cases import Case, Must, select
from .contenders import OURS, Contender, Inputs, Results, Run
from .timing import Clock, Times, interleave

RESULTS = Path(__file__).parent / "results"

PACKAGES = (
    "mamba_ops", "torch", "transformers", "mambapy", "mamba_ssm", "causal_conv1d", "flash-linear-attention"
)  # fmt: skip
CHECKED_TOKENS = 2048
BUDGET_S, QUICK_BUDGET_S = {"cpu": 3.0, "cuda": 0.5}, 0.05  # of timed calls, for each contender of a case

# Relative error (2-norm) beyond which a result is wrong. The decay's gradients are, in a chunked form, small
# differences of large sums.
LIMIT = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DECAY_LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DECAY_GRADIENTS = ("grad A", "grad A_log", "grad dt", "grad dt_bias", "grad delta", "grad delta_bias")


def main(argv: list[str] | None = None) -> int:
    """Runs the cases asked for. Returns 1 if a result of ours is missing or wrong, 2 if no case matches."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    chosen = select(args.device, args.quick, args.only)
    if not chosen:
        print(f"benchmarks.run: no case of {args.device} matches {args.only!r}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {**provenance(device), "quick": args.quick, "cases": {}}
    clock, budget_s = Clock(device), QUICK_BUDGET_S if args.quick else BUDGET_S[args.device]
    for case in chosen:
        record = measure(case, clock, budget_s, report["device"]["name"])
        report["cases"][case.name] = record
        print(table.line(case.name, record), flush=True)
    print("\n" + table.render(report))
    whole = not (args.only or args.quick)
    out = args.out or (RESULTS / f"{report['device']['slug']}.json" if whole else None)
    if out is not None:
        save(report, out)
        written = [out, *(plots.draw(report, out) if whole else ())]
        print("\n".join(f"written: {path}" for path in written))
    return 0 if all(OURS in record["times"] for record in report["cases"].values()) else 1


def save(report: dict[str, Any], out: Path) -> None:
    """Writes a results file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def measure(case: Case, clock: Clock, budget_s: float, device_name: str) -> dict[str, Any]:
    """Checks and times one case: its entry in the results file."""
    torch._dynamo.reset()
    runs, errors, left_out = check(case)
    times = interleave(runs, clock, budget_s)
    record: dict[str, Any] = {
        "title": case.title,
        "dtype": str(case.dtype).removeprefix("torch."),
        "times": {name: t.to_dict() for name, t in times.items()},
        "errors": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "left_out": left_out,
    }
    if OURS in times:
        ours = times[OURS].median
        record["ratios"] = {name: round(t.median / ours, 3) for name, t in times.items() if name != OURS}
    if case.series:
        record["series"], record["length"] = case.series
    if case.goal_ms:
        record["goal_ms"] = case.goal_ms
    if case.must:
        record |= judge(case.must, times, device_name)
    return record


def check(case: Case) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Runs every contender once and compares it with the truth.

    Returns:
        What to time, the largest relative error, and why a contender is left out; each by contender.
    """
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    try:
        inputs = case.make()
    except ImportError as missing:
        return runs, errors, {c.name: _first_line(missing) for c in case.contenders}
    truth: Results | None = None
    for contender in case.contenders:
        if case.series and contender.longest and case.series[1] > contender.longest:
            left_out[contender.name] = f"not tried beyond {contender.longest}"
            continue
        try:
            results = checked_results(case, contender, inputs)
            if results and truth is None:
                truth = true_results(case, inputs)
            if results and truth:
                errors[contender.name] = compare(results, truth, case, 1 if contender.name == OURS else 10)
            runs[contender.name] = contender.prepare(inputs)
        except ModuleNotFoundError as missing:
            left_out[contender.name] = f"not installed ({missing.name})"
        except Exception as failure:  # whatever a library raises
            left_out[contender.name] = _first_line(failure)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return runs, errors, left_out


def checked_results(case: Case, contender: Contender, inputs: Inputs) -> Results:
    """What the contender makes of the inputs; of its gradients, to which every token adds, those of a call
    on the first CHECKED_TOKENS tokens."""
    results = contender.prepare(inputs)()
    first = {name: _first_tokens(case, name, value) for name, value in inputs.items()}
    if all(first[name] is inputs[name] for name in inputs):
        return results
    gradients = [name for name in results if name.startswith("grad ")]
    short = contender.prepare(first)() if gradients else {}
    return results | {name: short[name] for name in gradients}


def true_results(case: Case, inputs: Inputs) -> Results:
    """What the case is checked against: the first CHECKED_TOKENS tokens in float64 (float32 on CUDA).

    Empty where that is a peer's result and the peer is missing or fails: then ours is timed unchecked.
    """
    if case.truth is None:
        try:
            return case.contenders[1].prepare(inputs)()
        except Exception:  # told where the peer's own turn comes
            return {}

    def exact(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = _first_tokens(case, name, value)
        return value.to(torch.float32 if value.is_cuda else torch.float64)

    return case.truth.prepare({name: exact(name, value) for name, value in inputs.items()})()


def compare(results: Results, truth: Results, case: Case, slack: float) -> float:
    """The largest relative error of the results. Raises ValueError beyond `slack` times the limit."""
    worst = 0.0
    for name, true in truth.items():
        got = _first_tokens(case, name, results[name]).double()
        error = (torch.linalg.vector_norm(got - true) / torch.linalg.vector_norm(true.double())).item()
        limits = DECAY_LIMIT if name in DECAY_GRADIENTS else LIMIT
        limit = slack * (limits[case.dtype] if case.limit is None else case.limit)
        if not error <= limit:
            raise ValueError(f"wrong result: {name} has a relative error of {error:.2g}, limit {limit:.2g}")
        worst = max(worst, error)
    return worst


def judge(must: Must, times: dict[str, Times], device_name: str) -> dict[str, Any]:
    """The demand in words and, where it can be told, whether it is met."""
    words = {
        "faster": f"{must.value:g} x faster than {must.than}",
        "share": f"at most {must.value:g} x the time of {must.than}",
        "ms": f"{must.value:g} ms" + (f" on an {must.than}" if must.than else ""),
    }[must.kind]
    verdict: dict[str, Any] = {"must": words}
    if OURS not in times or (must.than not in (device_name if must.kind == "ms" else times)):
        return verdict
    ours = times[OURS].median
    if must.kind == "ms":
        return verdict | {"met": ours <= must.value}
    theirs = times[must.than].median
    met = must.value * ours <= theirs if must.kind == "faster" else ours <= must.value * theirs
    return verdict | {"met": met}


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions, date and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        about: dict[str, Any] = {"name": name, "cuda": torch.version.cuda}
    else:
        name = _cpu_name()
        about = {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        about["instruction_set"] = torch.backends.cpu.get_cpu_capability()
        with contextlib.suppress(ImportError):
            from mamba_ops._C import cpu_isa

            about["instruction_set"] = cpu_isa()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device.type}-{name}".lower()).strip("-")
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": {"slug": slug, **about},
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _first_tokens(case: Case, name: str, value: Any) -> Any:
    if case.time is None or name not in case.time or value.shape[case.time[name]] <= CHECKED_TOKENS:
        return value
    return value.narrow(case.time[name], 0, CHECKED_TOKENS)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(RESULTS.parent), *words], capture_output=True, text=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError):
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain") else "") or "unknown"
    return "unknown"


def _first_line(failure: Exception) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "Times mamba_ops and its peers in one run."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=about)
    option = parser.add_argument
    option("--only", metavar="PATTERN", help="cases whose name holds this shell pattern: 'ssd/*/bfloat16'")
    option("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default: %(default)s")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    option("--quick", action="store_true", help="miniature cases, to try the harness")
    option("--out", type=Path, metavar="FILE", help="default, of a full run: benchmarks/results/DEVICE.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
