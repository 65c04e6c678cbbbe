"""The benchmark commands: a run in miniature, its table, the comparison of two, and the peers' results."""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baselines, bounds, compare, contenders, run, table
from benchmarks.cases import UPDATES, Case, Must
from benchmarks.contenders import OURS, Contender, Fresh
from benchmarks.timing import Clock, Times, interleave
from mamba_ops import reference
from tests import cases

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of a run in miniature, made by the command."""
    path = tmp_path_factory.mktemp("benchmarks") / "out.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--threads", "1", "--only", "conv", "--out"]
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "causal_conv1d" in done.stdout
    return path


def test_results_file(results: Path) -> None:
    report = json.loads(results.read_text())
    (record,) = report["cases"].values()
    assert report["device"]["threads"] == 1 and report["versions"]["torch"]
    for name in (OURS, "torch"):
        t = record["times"][name]
        assert 0 < t["min"] <= t["q1"] <= t["median"] <= t["q3"] and t["runs"] >= 5
        assert record["errors"][name] < 1e-5
    assert record["ratios"]["torch"] == pytest.approx(
        record["times"]["torch"]["median"] / record["times"][OURS]["median"], rel=0.01
    )


def test_table_goes_between_the_markers(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- benchmarks {results.stem} -->\nold\n<!-- /benchmarks -->\nafter\n")
    for _ in range(2):
        assert table.main([str(results), "--into", str(readme)]) == 0
    text = readme.read_text()
    assert (
        text.startswith("before\n") and text.endswith("<!-- /benchmarks -->\nafter\n") and "old" not in text
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| causal_conv1d")]
    ours = json.loads(results.read_text())["cases"]["causal_conv1d/both/float32"]["times"][OURS]
    assert f"**{table.milliseconds(ours['median'])}**" in row and " x)" in row
    readme.write_text("no markers")
    assert table.main([str(results), "--into", str(readme)]) == 1
    assert readme.read_text() == "no markers"


def _change(report: dict[str, Any], edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    for record in changed["cases"].values():
        edit(record)
    return changed


def test_compare_finds_a_slow_down(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads(results.read_text())

    def verdict(new: dict[str, Any]) -> int:
        (tmp_path / "new.json").write_text(json.dumps(new))
        return compare.main([str(results), str(tmp_path / "new.json")])

    def grow(**factors: float) -> Callable[[dict[str, Any]], Any]:
        return lambda record: record["times"][OURS].update(
            {what: record["times"][OURS][what] * factor for what, factor in factors.items()}
        )

    assert verdict(old) == 0
    assert verdict(_change(old, grow(median=1.04, min=1.04))) == 0
    assert verdict(_change(old, grow(median=1.5, min=1.0))) == 0
    assert verdict(_change(old, grow(median=1.1, min=1.06))) == 1
    assert "causal_conv1d/both/float32" in capsys.readouterr().out.split("slower by more than 5 %")[1]
    assert verdict(_change(old, lambda record: record["times"].pop(OURS))) == 1
    assert verdict(old | {"device": old["device"] | {"name": "another"}}) == 2
    assert verdict(old | {"cases": {}}) == 2


def _scan_case(ours: Contender) -> Case:
    inputs = cases.selective_scan(1, 4, 16, 2, options=("D", "z"))
    truth = Contender("truth", lambda inputs: lambda: {"y": baselines.scan_recurrence(**inputs)})
    return Case("scan", "scan", lambda: inputs, (ours, truth), truth, must=Must("faster", 2, "truth"))


@pytest.mark.parametrize("wrong", [False, True])
def test_long_calls_are_checked_on_their_first_tokens(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    monkeypatch.setattr(run, "CHECKED_TOKENS", 12)
    inputs = cases.selective_scan(1, 4, 40, 2, options=("D", "z"))

    def scan(**given: torch.Tensor) -> torch.Tensor:
        y = baselines.scan_recurrence(**given)
        return torch.cat([2 * y[..., :1], y[..., 1:]], -1) if wrong else y

    truth = contenders.peer("truth", baselines.scan_recurrence, "both")
    time = {"u": 2, "delta": 2, "z": 2, "B": 2, "C": 2, "y": 2}
    case = Case(
        "scan", "scan", lambda: inputs, (contenders.peer(OURS, scan, "both"), truth), truth, time=time
    )
    _, errors, left_out = run.check(case)
    assert (OURS in errors, OURS in left_out) == (not wrong, wrong)


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.001, False)])
def test_a_wrong_result_is_not_timed(factor: float, right: bool) -> None:
    def prepare(inputs: cases.Inputs) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: {"y": factor * baselines.scan_recurrence(**inputs)}

    record = run.measure(_scan_case(Contender(OURS, prepare)), Clock(torch.device("cpu")), 0.01, "cpu")
    assert (OURS in record["times"]) == ("met" in record) == ("ratios" in record) == right
    assert record["left_out"].get(OURS, "").startswith("" if right else "wrong result: y")
    assert "truth" in record["times"]


def test_a_missing_library_is_told() -> None:
    def absent(inputs: cases.Inputs) -> Callable[[], dict[str, torch.Tensor]]:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    runs, errors, left_out = run.check(_scan_case(Contender(OURS, absent)))
    assert left_out == {OURS: "not installed (nowhere)"} and list(runs) == list(errors) == ["truth"]


def test_judgement() -> None:
    def times(**medians: float) -> dict[str, Times]:
        return {name: Times(ms, ms, ms, ms, 5) for name, ms in medians.items()}

    def met(must: Must, device: str = "cpu", **medians: float) -> Any:
        return run.judge(must, times(**medians), device).get("met")

    assert met(Must("faster", 3, "peer"), mamba_ops=1, peer=3) is True
    assert met(Must("faster", 3, "peer"), mamba_ops=1, peer=2.9) is False
    assert met(Must("faster", 3, "peer"), mamba_ops=1) is None
    assert met(Must("share", 1.6, "peer"), mamba_ops=1.6, peer=1) is True
    assert met(Must("share", 1.6, "peer"), mamba_ops=1.7, peer=1) is False
    assert met(Must("ms", 2, "H200"), "NVIDIA H200", mamba_ops=2) is True
    assert met(Must("ms", 2, "H200"), "NVIDIA H200", mamba_ops=2.1) is False
    assert met(Must("ms", 2, "H200"), "NVIDIA A100", mamba_ops=1) is None


def test_interleaving_takes_turns() -> None:
    order: list[str] = []

    def clock(call: Callable[[], Any]) -> float:
        call()
        return 40.0 if order[-1] == "a" else 120.0

    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = interleave(runs, clock, budget_s=0.4, min_runs=3)  # type: ignore[arg-type]
    assert {name: t.runs for name, t in found.items()} == {"a": 10, "b": 4}
    turn = ["a", "a", "a", "b"]  # the short one runs twice in its turn, after a run that is not counted
    assert order[4:] == turn * 4 + ["a", "a", "a"]


def test_a_run_in_a_process_of_its_own_times_itself() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock(Fresh("print('some words'); print(2.5)")) == 2.5
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        clock(Fresh("1 / 0"))


@pytest.mark.parametrize("peer", ["scan_recurrence", "scan_mambapy"])
def test_scan_peers_do_the_same_work(peer: str) -> None:
    if peer == "scan_mambapy":
        pytest.importorskip("mambapy")
    options = ("D", "z", "delta_bias", "delta_softplus")
    inputs = cases.selective_scan(2, 5, 37, 3, options=options, dtype=torch.float64)
    torch.testing.assert_close(getattr(baselines, peer)(**inputs), reference.selective_scan(**inputs))


@pytest.mark.parametrize("share_groups", [False, True])
def test_ssd_peers_do_the_same_work(share_groups: bool) -> None:
    options = ("D", "z", "dt_bias", "dt_softplus")
    inputs = cases.ssd(2, 48, 4, 6, 5, options=options, dtype=torch.float64)
    y = baselines.ssd_listing(**inputs, chunk_size=16, share_groups=share_groups)
    torch.testing.assert_close(y, reference.ssd(**inputs))


@pytest.mark.parametrize("operator", UPDATES)
def test_update_peers_do_the_same_work(operator: str) -> None:
    _, _, plain, options = UPDATES[operator]
    inputs = getattr(cases, operator)(3, options=options, dtype=torch.float64)
    y = plain(**inputs)
    torch.testing.assert_close(y, getattr(reference, operator)(**inputs))


def test_the_gpu_is_busy_while_the_host_queues_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: Any) -> float:
            return 1.0

    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    clock = Clock(torch.device("cpu"))
    clock._flush = torch.empty(1)

    def run() -> dict[str, torch.Tensor]:
        time.sleep(0.005)
        return {}

    assert [clock(run), clock(run)] == [1.0, 1.0]
    assert cycles[0] == 2_000_000 and cycles[1] >= 1.5 * 0.005 * 2e9
    del run
    assert not clock._ahead  # a call that is gone leaves no inputs behind


def _ncu_log(launches: list[tuple[str, dict[str, float]]]) -> list[str]:
    """As ncu prints it: names, units, a row for each launch; 1 where nothing else is given."""
    metrics = [bounds.TIME, *(unit + bounds.OF_PEAK for unit in bounds.UNITS.values())]
    metrics += [bounds._wait(name) for name in bounds.WAITS.values()]
    rows = [["ID", "Kernel Name", *metrics], ["", "", "us", *["%"] * (len(metrics) - 1)]]
    for i, (name, figures) in enumerate(launches):
        rows.append([str(i), name, *(f"{figures.get(metric, 1):,}" for metric in metrics)])
    return ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)]


def test_bounds_of_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of launches of one kernel the longest counts; a unit near its peak is the bound, or else a wait."""
    memory, slow = bounds.UNITS["memory"] + bounds.OF_PEAK, bounds._wait("barrier")
    first = ("fwd", {bounds.TIME: 1500.0, memory: 20})
    log = _ncu_log([first, ("bwd", {bounds.TIME: 900, slow: 4}), ("fwd", {bounds.TIME: 2500.0, memory: 91})])
    fwd, bwd = bounds.kernels(log)
    assert (fwd["kernel"], fwd["launches"], fwd["ms"], fwd["percent"]["memory"]) == ("fwd", 2, 2.5, 91)
    assert bounds.bound(fwd) == "memory"
    assert bounds.bound(bwd) == f"latency: barriers, {400 / (len(bounds.WAITS) + 3):.0f} %"
    tiny = {**bwd, "kernel": "reduce", "ms": 0.1}
    report = {"device": {"name": "GPU"}, "versions": {}, "date": "2026-01-01", "commit": "c"}
    path = tmp_path / "gpu-bounds.json"
    path.write_text(
        json.dumps(report | {"kernels": [{"case": "c", "title": "work", **k} for k in (fwd, bwd, tiny)]})
    )
    assert table.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| work | `fwd` (2 launches) | 2.5 | 91 |" in printed and "`bwd`" in printed
    assert "reduce" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_bounds_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert bounds.main([]) == 2 and "no CUDA device" in capsys.readouterr().err
    assert bounds.main(["--only", "nothing"]) == 2
    assert "no case matches 'nothing'" in capsys.readouterr().err
