"""Builds mamba_ops with CMake; CMakeLists.txt alone describes the build, this file only drives it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_HEADER = "torch/include/torch/csrc/stable/library.h"

# purelib is the environment that pip installs into, also inside an isolated build.
SITES = [sysconfig.get_path("purelib"), *sys.path]
HAS_TORCH = any(Path(site, TORCH_HEADER).is_file() for site in SITES)
WITH_CUDA = os.environ.get("MAMBA_OPS_WITH_CUDA", "AUTO").upper()


def build_requirements() -> list[str]:
    """What this machine lacks for the build: torch's headers, and nvcc where it comes from PyPI."""
    need = [] if HAS_TORCH else ["torch>=2.10"]
    if WITH_CUDA == "WHEEL":
        if not HAS_TORCH:
            sys.exit("MAMBA_OPS_WITH_CUDA=WHEEL needs torch in the environment first: pip install torch")
        parts = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl", "cuda-runtime")
        need += [f"nvidia-{part}==13.0.*" for part in parts]
    return need


def tool(name: str) -> str:
    """The program of this Python's environment, also when that is not activated, else the one on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path) or sys.exit(f"mamba_ops: {name} not found: pip install {name}")


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake into the source tree (editable) or the wheel's folder."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" / (sys.implementation.cache_tag or "python")
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # always named: the one in the cache may be gone
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMAMBA_OPS_WITH_CUDA={WITH_CUDA}",
            f"-DMAMBA_OPS_SITES={';'.join(dict.fromkeys(s for s in SITES if s))}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(prefix)], check=True)


setup(
    ext_modules=[Extension("mamba_ops._C", sources=[])],  # marks the wheel as platform-specific
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements(),
)
