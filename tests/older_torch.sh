#!/usr/bin/env bash
# The operator tests of one built package, unchanged, under another torch: tests/older_torch.sh WHEEL ENVIRONMENT [TORCH]
# makes the virtual environment ENVIRONMENT (or takes it as it is) with TORCH (2.11.*) and the wheel.
set -euo pipefail
wheel=$(realpath "$1") environment=$(realpath -m "$2") torch=${3:-2.11.*}
tests=$(cd "$(dirname "$0")" && pwd)

[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
. "$environment/bin/activate"
python -m pip install -q "torch==$torch" numpy pytest pytest-xdist hypothesis
python -m pip install -q --no-deps --force-reinstall "$wheel"

# Away from the source tree, whose own mamba_ops would come first.
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
mkdir "$away/tests"
for file in __init__ conftest cases compare layer_cases \
  test_causal_conv1d test_selective_scan test_ssd test_norm test_add_norm test_state_update test_determinism test_isa; do
  cp "$tests/$file.py" "$away/tests/"
done
cd "$away"
python -c 'import mamba_ops, torch; print("torch", torch.__version__, "with", mamba_ops.__path__[0], mamba_ops.build_info())'
python -m pytest -q -n 2 -p no:cacheprovider tests
