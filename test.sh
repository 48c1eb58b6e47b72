#!/usr/bin/env bash
# Installs what the tests need into .venv and runs lint, types and tests. LADING_VENV names another place.
set -euo pipefail
cd "$(dirname "$0")"
venv="${LADING_VENV:-.venv}"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest -n auto "$@"
