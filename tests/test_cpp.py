"""The Catch2 cases of the torch-free kernels, each an item here, once per instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_ops import _C

BUILD = Path(__file__).parents[1] / "build"
# That of this Python's build; else of any, kernels alone (MAMBA_OPS_TORCH=OFF) included.
BINARIES = [
    path
    for folder in (str(sys.implementation.cache_tag), "**")
    for path in sorted(BUILD.glob(f"{folder}/tests/cpp/mamba_ops_tests"))
]


def listed(binary: Path) -> list[str]:
    """Names of the cases: Catch2 2 has an option for that, Catch2 3 lists nothing else at low verbosity."""
    for options in (["--list-test-names-only"], ["--list-tests", "--verbosity", "quiet"]):
        done = subprocess.run([binary, *options], capture_output=True, text=True, timeout=60)
        names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if names and "rror" not in done.stderr:  # version 2 returns the number of cases
            return names
    raise RuntimeError(f"{binary} lists no cases: {done.stdout}{done.stderr}")


CASES = [(binary, name) for binary in BINARIES[:1] for name in listed(binary)]


@pytest.mark.skipif(not BINARIES, reason="no mamba_ops_tests under build/: the C++ tests are not built")
def test_the_binary_has_cases() -> None:
    assert CASES


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize(("binary", "name"), CASES, ids=[name for _, name in CASES])
def test_catch2(binary: Path, name: str, isa: str) -> None:
    pattern = name.replace("\\", "\\\\").replace(",", "\\,").replace("[", "\\[")
    environment = os.environ | {"MAMBA_OPS_CPU_ISA": isa}
    done = subprocess.run([binary, pattern], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No test cases matched" not in done.stdout + done.stderr
