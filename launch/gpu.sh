#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process.
#
#   launch/gpu.sh --config=configs/spo_tree.py --workdir=runs/spo_tree
#
# Arguments go to spo_jax.main. On several machines without a scheduler, start it on each with the
# same arguments and --coordinator=HOST:PORT --num_processes=N --process_id=I; HOST is the machine
# of process 0. They share the workdir, or --config.checkpoint.folder.
#
# Variables:
#   RESTART=1  goes on when the run has saved and ended, as it does on SIGTERM (status 75); SIGTERM
#              to this script ends both
#   XLA_PYTHON_CLIENT_MEM_FRACTION=0.94  share of a GPU's memory that JAX takes
#   EXTRAS=cuda, PYTHON, VENV  of the environment, see launch/environment.sh
#   DRY_RUN=1  prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Runs a command again and again while it ends with SAVED, unless this script is told to end.
restarting() {
  local status=$SAVED child ended=
  trap 'ended=1; kill -TERM "$child" 2> /dev/null || true' TERM INT
  while [[ $status == "$SAVED" && -z $ended ]]; do
    "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    # A signal ends `wait` before the child has ended.
    while kill -0 "$child" 2> /dev/null; do
      status=0
      wait "$child" || status=$?
    done
  done
  return "$status"
}

help_if_asked "$@"
need_flags "$@"
run export EXTRAS="${EXTRAS:-cuda}"
run export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}"
run source launch/environment.sh
if [[ ${RESTART:-} == 1 ]] && ! dry_run; then
  restarting python -m spo_jax.main "$@"
else
  [[ ${RESTART:-} != 1 ]] || remark "again while it ends with status $SAVED:"
  run exec python -m spo_jax.main "$@"
fi
