"""A C++ program finds the installed package with CMake and calls its operators without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mamba_ops

SOURCE = Path(__file__).parent / "cpp" / "dispatcher"
PACKAGE = Path(mamba_ops.__file__).parent

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler on the PATH")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on the PATH")
def test_a_program_without_python(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(
        "cmake", "-S", SOURCE, "-B", tmp_path, *(["-GNinja"] if shutil.which("ninja") else []),
        f"-DCMAKE_PREFIX_PATH={PACKAGE}",
        f"-DTORCH_DIR={Path(torch.__file__).parent}",
    )  # fmt: skip
    run("cmake", "--build", tmp_path)
    printed = run(tmp_path / "dispatcher")
    assert f"mamba_ops {mamba_ops.__version__} on {mamba_ops._C.cpu_isa()}" in printed
    assert "causal_conv1d: relative error" in printed and "selective_scan: relative error" in printed
