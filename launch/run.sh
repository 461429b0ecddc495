#!/usr/bin/env bash
# Makes the environment and trains. Arguments go to spo_jax.main; the default is SPO-tree on the embedded task.
#   launch/run.sh
#   launch/run.sh --config=configs/grpo.py --workdir=runs/grpo
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ $# -eq 0 ]]; then
  set -- --config=configs/spo_tree.py --workdir=runs/spo_tree
fi
exec python -m spo_jax.main "$@"
