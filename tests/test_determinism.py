"""Bitwise equal results: run to run, for any number of threads, from many at once, after a fork."""

import hashlib
import os
import select
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import mamba_ops
from tests import cases, layer_cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS, Inputs
from tests.compare import Results, evaluate

# Few rows and long sequences, where threads share a sequence, and many rows.
CASES: dict[str, tuple[str, Callable[..., Inputs], dict[str, Any]]] = {
    "scan long": (
        "selective_scan",
        cases.selective_scan,
        {"b": 1, "d": 9, "l": 3000, "options": SCAN_OPTIONS},
    ),
    "scan wide": ("selective_scan", cases.selective_scan, {"b": 2, "d": 200, "l": 150, "groups": (2, 2)}),
    "scan packed": (
        "selective_scan",
        cases.selective_scan,
        {"b": 1, "d": 40, "l": 900, "pack": "cu_seqlens"},
    ),
    "ssd long": ("ssd", cases.ssd, {"b": 1, "l": 2000, "h": 2, "p": 16, "n": 16, "options": SSD_OPTIONS}),
    "ssd wide": ("ssd", cases.ssd, {"b": 3, "l": 200, "h": 8, "p": 16, "n": 16, "groups": (2, 4)}),
    "ssd packed": ("ssd", cases.ssd, {"b": 1, "l": 900, "pack": "cu_seqlens", "options": SSD_OPTIONS}),
    "conv long": ("causal_conv1d", cases.causal_conv1d, {"b": 1, "d": 5, "l": 9000, "options": CONV_OPTIONS}),
    "conv wide": ("causal_conv1d", cases.causal_conv1d, {"b": 3, "d": 300, "l": 100, "layout": "transposed"}),
    "conv packed": ("causal_conv1d", cases.causal_conv1d, {"b": 2, "d": 100, "l": 3000, "pack": "seq_idx"}),
    "norm": ("rms_norm_gated", lambda **kw: cases.rms_norm_gated(900, 96, group_size=48, **kw), {}),
    "add norm": ("add_rms_norm", lambda **kw: cases.add_rms_norm(900, 96, **kw), {}),
    "conv step": ("causal_conv1d_update", cases.causal_conv1d_update, {"b": 40, "d": 300, "rows": 64}),
    "scan step": ("selective_state_update", cases.selective_state_update, {"b": 40, "d": 300, "rows": 64}),
    "ssd step": ("ssd_state_update", cases.ssd_state_update, {"b": 40, "h": 8, "p": 32, "n": 32, "rows": 64}),
}


def results(case: str, dtype: torch.dtype = torch.float32) -> Results:
    name, make, sizes = CASES[case]
    loss = () if name.endswith("update") else ("y", "final_state")
    return evaluate(getattr(mamba_ops, name), make(dtype=dtype, **sizes), loss)


def assert_bitwise(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert torch.equal(value, expected[key]), f"{key} differs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_and_runs(case: str, dtype: torch.dtype) -> None:
    expected = results(case, dtype)
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        assert_bitwise(results(case, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", layer_cases.LAYER_OPERATORS)
def test_whole_layers_with_as_many_threads(name: str, dtype: torch.dtype) -> None:
    """Their matrix products are torch's, which sums differently with more threads."""
    inputs = layer_cases.full(name, 300, dtype=dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        expected = evaluate(getattr(mamba_ops, name), inputs, layer_cases.LOSS)
        for _ in range(3):
            assert_bitwise(evaluate(getattr(mamba_ops, name), inputs, layer_cases.LOSS), expected)


def test_callers_in_many_threads() -> None:
    expected = {case: results(case) for case in CASES}
    with ThreadPoolExecutor(4) as pool:
        runs = [(case, pool.submit(results, case)) for _ in range(3) for case in CASES]
        for case, run in runs:
            assert_bitwise(run.result(), expected[case])


def digest() -> bytes:
    total = hashlib.sha256()
    for case in CASES:
        for value in results(case).values():
            total.update(value.contiguous().numpy().tobytes())
    return total.digest()


def compare_with_a_forked_child() -> None:
    expected = digest()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(send, digest())
        finally:
            os._exit(0)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], 60)
    if not ready:
        os.kill(child, 9)
    assert ready, "the child hangs"
    assert os.read(receive, 64) == expected
    os.waitpid(child, 0)


def test_a_forked_child() -> None:
    """As a DataLoader worker: forked from a process that has used the operators, one thread of its own.

    In a process of its own: one that has used a GPU cannot be forked.
    """
    code = "from tests import test_determinism; test_determinism.compare_with_a_forked_child()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
