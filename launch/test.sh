#!/usr/bin/env bash
# Makes the environment, lints, and runs the tests.
#
#   launch/test.sh [ARGUMENTS]  of pytest
#
# Variables:
#   EXTRAS=test  test,parity installs PyTorch too, without which the tests that compare with it are
#                skipped
#   PYTHON, VENV of the environment, see launch/environment.sh
#   DRY_RUN=1    prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
help_if_asked "$@"
run export EXTRAS="${EXTRAS:-test}"
run source launch/environment.sh
run ruff check .
run ruff format --check .
run exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
