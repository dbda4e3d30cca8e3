#!/usr/bin/env bash
# The oldest supported versions, in a fresh virtual environment, without diffusers:
#
#   tests/with_oldest.sh              # what depends most on versions; .ci/run does this
#   tests/with_oldest.sh tests        # the whole suite, or any other arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
export PATH="$venv/bin:$PATH"

pip install -q -c constraints-oldest.txt -e . pytest pytest-benchmark matplotlib 'setuptools>=77'
pip list | grep -E '^(torch|triton|numpy|safetensors|typer) '
if [ $# -eq 0 ]; then
  set -- tests/{test_package,compilation/test_{compile_time,cpp_build},ops/test_cpp_ops,sampling/test_{executions,graph},cli/test_{app,models,sample},checkpoints/test_{brought,damaged}}.py
fi
pytest "$@"
