#!/usr/bin/env bash
# Sets up and passes all tests: builds the package and the C++ tests into the active virtual environment (.venv, made
# here, where none is active) and runs pytest with the given arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

has_header() { echo "#include <$1>" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; }

# What only the system's package manager has, as far as it can be asked: CMake says what is missing after that.
wanted=()
command -v "${CXX:-c++}" >/dev/null || wanted+=(g++)
has_header catch2/catch_test_macros.hpp || has_header catch2/catch.hpp || wanted+=(catch2)
if [ ${#wanted[@]} -gt 0 ] && command -v apt-get >/dev/null; then
  root=()
  [ "$(id -u)" = 0 ] || root=(sudo -n)
  "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq "${wanted[@]}" ||
    echo "tests/run.sh: could not install ${wanted[*]}" >&2
fi

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
python -c 'import torch' 2>/dev/null || python -m pip install -q torch
python -m pip install -q 'setuptools>=77' 'cmake>=3.25' ninja 'pybind11>=2.13'
python -m pip install -q --no-build-isolation -e '.[test]'

build=build/$(python -c 'import sys; print(sys.implementation.cache_tag)')
cmake -S . -B "$build" -DMAMBA_OPS_TESTS=ON >/dev/null
cmake --build "$build"
exec python -m pytest "$@"
