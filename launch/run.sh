#!/usr/bin/env bash
# Makes the environment and trains, on whatever this machine has.
#
#   launch/run.sh            SPO-tree on the embedded task
#   launch/run.sh ARGUMENTS  of spo_jax.main, such as --config=configs/grpo.py --workdir=runs/grpo
#
# Variables:
#   EXTRAS, PYTHON, VENV  of the environment, see launch/environment.sh
#   DRY_RUN=1  prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
help_if_asked "$@"
if [[ $# -eq 0 ]]; then
  set -- --config=configs/spo_tree.py --workdir=runs/spo_tree
fi
need_flags "$@"
run source launch/environment.sh
run exec python -m spo_jax.main "$@"
