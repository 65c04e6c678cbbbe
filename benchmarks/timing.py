"""Timing of contenders in turn: bursts, warm-up, samples in milliseconds, and what is kept of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from weakref import WeakKeyDictionary

import torch

from .contenders import Fresh, Run

_BURST_MS = 100.0  # of one contender before the next one's turn: it is timed with its own data in the caches
_MAX_BURST = 10
_MAX_RUNS, _PROCESSES = 200, 2


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender on one case.

    Attributes:
        median, min, q1, q3: of the timed runs.
        runs: how many were timed.
    """

    median: float
    min: float
    q1: float
    q3: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(round(median, 4), round(min(samples), 4), round(q1, 4), round(q3, 4), len(samples))

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


_AHEAD_CYCLES, _CYCLES_PER_S = 2_000_000, 2e9  # at least a millisecond
_LONGEST_AHEAD_S = 0.02  # whole models take the host longer: they are timed as they run


class Clock:
    """Milliseconds of one call: wall time on the CPU; on CUDA between events, the L2 cache flushed before.

    The GPU is kept busy before that, for half as long again as the host took to queue the call the last
    time: what is timed is the GPU's work, not the gaps in which it would wait for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush: torch.Tensor | None = None
        self._ahead: WeakKeyDictionary[Run, int] = WeakKeyDictionary()
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, run: Run) -> float:
        if isinstance(run, Fresh):
            return run.milliseconds()
        if self._flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(self._ahead.get(run, _AHEAD_CYCLES))
        self._flush.zero_()
        begin.record()
        start = time.perf_counter()
        run()
        queued_s = time.perf_counter() - start
        end.record()
        end.synchronize()
        if queued_s < _LONGEST_AHEAD_S:
            self._ahead[run] = max(_AHEAD_CYCLES, int(1.5 * queued_s * _CYCLES_PER_S))
        return float(begin.elapsed_time(end))


def interleave(runs: Mapping[str, Run], clock: Clock, budget_s: float, min_runs: int = 5) -> dict[str, Times]:
    """Times the contenders in turn, so that whatever else the machine does hits all of them.

    Args:
        runs: what to call, by name.
        clock: measures one call.
        budget_s: seconds of timed calls per contender.
        min_runs: samples at least, even beyond the budget; two where one call takes longer than the budget.

    Returns:
        The times by name.
    """
    fresh = {name: run for name, run in runs.items() if isinstance(run, Fresh)}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    samples |= {name: [clock(run) for _ in range(_PROCESSES)] for name, run in fresh.items()}
    waiting = set(runs) - set(fresh)
    guess = {name: clock(runs[name]) for name in runs if name in waiting}
    guess |= {name: clock(runs[name]) for name in guess if guess[name] < 1e3 * budget_s}
    collecting = gc.isenabled()
    gc.disable()
    try:
        while waiting:
            for name in [n for n in runs if n in waiting]:
                burst = max(1, min(_MAX_BURST, int(_BURST_MS / max(guess[name], 1e-3))))
                if burst > 1:
                    clock(runs[name])  # brings its data back into the caches
                samples[name] += [clock(runs[name]) for _ in range(burst)]
                spent = sum(samples[name]) / 1e3
                enough = 2 if guess[name] > 1e3 * budget_s else min_runs
                if len(samples[name]) >= _MAX_RUNS or (spent >= budget_s and len(samples[name]) >= enough):
                    waiting.discard(name)
    finally:
        if collecting:
            gc.enable()
    return {name: Times.of(values) for name, values in samples.items()}
