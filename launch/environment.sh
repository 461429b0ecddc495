#!/usr/bin/env bash
# Makes the virtual environment if it is missing, and puts it first on the PATH; to be sourced.
# Variables: PYTHON (default python3), VENV (default .venv), EXTRAS (such as test, cuda, tpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "spo_jax needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1)" >&2
  exit 2
fi
# The stamp names what was installed: another set of requirements is installed again.
stamp=$(cat requirements.txt pyproject.toml <(echo "${EXTRAS:-}") | cksum | cut -d' ' -f1)
if [[ ! -f "$VENV/installed-$stamp" ]]; then
  [[ -d "$VENV" ]] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  # Setuptools warns of folders that have a package's name, which here are the packages themselves.
  PYTHONWARNINGS=ignore "$VENV/bin/python" -m pip install --quiet --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$VENV/installed-$stamp"
fi
VENV=$(cd "$VENV" && pwd)
export PATH="$VENV/bin:$PATH"
