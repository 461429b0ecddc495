#!/usr/bin/env bash
# Trains on a Slurm cluster, one process for each GPU.
#
#   NODES=2 GPUS=8 launch/slurm.sh --config=FILE --workdir=DIR
#
# submits a job; in an allocation of yours (salloc) it trains there. Arguments go to spo_jax.main.
# This folder and the workdir must be on a disk that all nodes share. A minute before its time is
# up, or when it is preempted, the run is told to stop: it saves, ends with status 75, and the job
# goes back into the queue, where it goes on when its turn comes.
#
# Variables:
#   NODES=1       nodes
#   GPUS=8        GPUs of a node; 0: one process a node, on its CPUs
#   CPUS=8        CPU cores of a process
#   TIME=24:00:00 of one turn
#   NAME=spo_jax  of the job
#   LOG=slurm-%j.log  what the job prints
#   SBATCH_PARTITION, SBATCH_ACCOUNT, ...  are read by sbatch itself
#   EXTRAS=cuda (none with GPUS=0), PYTHON, VENV  of the environment, see launch/environment.sh
#   DRY_RUN=1     prints the commands, and runs none
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/lib.sh ]] || here=launch # a job runs a copy of the script, in the submitter's folder
source "$here/lib.sh"
GPUS=${GPUS:-8}

submit() {
  local options=(
    --job-name="${NAME:-spo_jax}"
    --nodes="${NODES:-1}"
    --cpus-per-task="${CPUS:-8}"
    --time="${TIME:-24:00:00}"
    --output="${LOG:-slurm-%j.log}"
    --open-mode=append
    --requeue
    --signal=TERM@60
  )
  if [[ $GPUS == 0 ]]; then
    options+=(--ntasks-per-node=1)
  else
    # All GPUs of a node are seen by all of its processes: each takes its own, and can reach others.
    options+=(--ntasks-per-node="$GPUS" --gpus-per-node="$GPUS")
  fi
  run sbatch "${options[@]}" launch/slurm.sh "$@"
}

train() {
  local status=0
  if [[ $GPUS != 0 ]]; then
    run export EXTRAS="${EXTRAS:-cuda}"
  fi
  run source launch/environment.sh
  run srun --kill-on-bad-exit=1 python -m spo_jax.main "$@" || status=$?
  remark "if it ends with status $SAVED:"
  if [[ $status == "$SAVED" ]] || dry_run; then
    run scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}

help_if_asked "$@"
need_flags "$@"
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  train "$@"
else
  submit "$@"
fi
