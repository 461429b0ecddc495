#!/usr/bin/env bash
# Makes the environment, lints, and runs the tests. Arguments go to pytest.
# EXTRAS=test,parity installs PyTorch too, without which the tests that compare with it are skipped.
export EXTRAS=${EXTRAS:-test}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
exec python -m pytest --numprocesses=2 "$@"
