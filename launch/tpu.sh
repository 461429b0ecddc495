#!/usr/bin/env bash
# Trains on a TPU VM, or on all workers of a pod slice: the same command on each.
#
#   launch/tpu.sh create            makes the slice
#   launch/tpu.sh setup             copies the last commit to every worker and makes its environment
#   launch/tpu.sh run ARGUMENTS     starts spo_jax.main on every worker, in the background
#   launch/tpu.sh tail              follows the log of worker 0
#   launch/tpu.sh stop              tells the run to save and end
#   launch/tpu.sh resume ARGUMENTS  watches until the run is done: makes the slice where there is none
#                                   or it was taken away, sets it up, and starts the run again
#   launch/tpu.sh fetch FOLDER      copies a workdir from worker 0 to here
#   launch/tpu.sh delete            deletes the slice, with all that is on its disks
#
# ARGUMENTS go to spo_jax.main. Workers share no disk, and a slice that was taken away has lost its
# disks: give a bucket for the checkpoints, --config.checkpoint.folder=gs://BUCKET/RUN. Of a slice
# with several workers, gcloud wants your key in the agent: ssh-add ~/.ssh/google_compute_engine.
#
# Variables:
#   ZONE=us-west4-a, TYPE=v5litepod-16  or others, without default; TYPE is for create and resume
#   NAME=spo-jax  of the slice
#   VERSION       of its software; by default what goes with TYPE
#   PROJECT       by default gcloud's own
#   SPOT=1        cheaper, may be taken away at any time
#   QUEUED=1      made by a queued resource, which waits for free machines
#   POLL=60       seconds between two looks of resume
#   CRASHES=5     resume gives up after so many exit statuses other than 0, 2 (a mistake in ARGUMENTS:
#                 it gives up at once) and 75 (told to stop)
#   DRY_RUN=1     prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME=${NAME:-spo-jax}
TARBALL=build/$NAME.tar.gz
FAILED=1

# gcloud compute tpus GROUP VERB, with what all of them need behind it.
tpus() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet
}

# Runs a shell command on workers: an index, or all.
on() {
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

worker() {
  quoted bash spo_jax/launch/worker.sh "$@"
}

# The image that goes with a type of TPU.
version() {
  case $TYPE in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local common=(--accelerator-type="$TYPE" ${SPOT:+--spot})
  local version=${VERSION:-$(version)}
  if [[ -n ${QUEUED:-} ]]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" "${common[@]}" --runtime-version="$version"
  else
    tpus tpu-vm create "$NAME" "${common[@]}" --version="$version"
  fi
}

delete() {
  if [[ -n ${QUEUED:-} ]]; then
    tpus queued-resources delete "$NAME" --force
  else
    tpus tpu-vm delete "$NAME"
  fi
}

setup() {
  if [[ -n $(git status --porcelain) ]]; then
    echo "tpu.sh: what is not committed is not copied" >&2
  fi
  run mkdir -p "$(dirname "$TARBALL")" &&
    run git archive --format=tar.gz --output="$TARBALL" HEAD &&
    tpus tpu-vm scp "$TARBALL" "$NAME:spo_jax.tar.gz" --worker=all &&
    on all "mkdir -p spo_jax && tar -xzf spo_jax.tar.gz -C spo_jax && $(worker setup)"
}

start() {
  on all "$(worker start "$@")"
}

stop() {
  on all "$(worker stop)"
}

follow() {
  on 0 "tail -n 100 -F spo_jax/runs/worker/log"
}

fetch() {
  run mkdir -p "$1" && tpus tpu-vm scp "$NAME:spo_jax/$1/*" "$1" --worker=0 --recurse
}

describe() {
  tpus tpu-vm describe "$NAME" --format='value(state)'
}

describe_request() {
  tpus queued-resources describe "$NAME" --format='value(state.state)'
}

# State of the slice, or of the request for it; ABSENT if there is neither.
slice_state() {
  local state=ACTIVE
  if [[ -n ${QUEUED:-} ]]; then
    state=$(describe_request) || state=ABSENT
  fi
  if [[ $state == ACTIVE ]]; then
    state=$(describe) || state=ABSENT
  fi
  echo "$state"
}

# State of the run, as worker.sh tells it; nothing if worker 0 cannot be reached.
run_state() {
  on 0 "if [ -d spo_jax ]; then $(worker state); else echo none; fi" || true
}

say() {
  echo "$(date '+%F %T') $1"
}

# A step of resume: one that fails is tried again at a later look.
attempt() {
  say "$1"
  "$@" || say "$1 failed"
}

renew() {
  delete && create
}

begin() {
  setup && start "$@"
}

begin_again() {
  stop && start "$@"
}

resume() {
  local state crashes=0
  while true; do
    state=$(slice_state 2> /dev/null)
    [[ $state == READY ]] || say "slice: $state"
    case $state in
      READY) look "$@" ;;
      ABSENT) attempt create ;;
      # Only a new one helps.
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) attempt renew ;;
    esac
    sleep "${POLL:-60}"
  done
}

# One look at a slice that is there.
look() {
  local state
  state=$(run_state)
  case $state in
    running | '') return ;;
    0)
      say "the run is done"
      exit 0
      ;;
    "$MISTAKE")
      say "the run says that its arguments are wrong: launch/tpu.sh tail"
      exit "$MISTAKE"
      ;;
    none)
      attempt begin "$@"
      return
      ;;
    "$SAVED" | lost) ;;
    *) crashes=$((crashes + 1)) ;;
  esac
  if ((crashes >= ${CRASHES:-5})); then
    say "the run has crashed $crashes times, the last time with status $state"
    exit "$FAILED"
  fi
  say "run: $state"
  attempt begin_again "$@"
}

# What resume does for a slice that was taken away.
plan_of_resume() {
  remark "every ${POLL:-60} s:"
  [[ -z ${QUEUED:-} ]] || describe_request
  describe
  remark "if the slice was taken away:"
  renew
  remark "if it is there:"
  run_state
  remark "if it is new:"
  begin "$@"
  remark "if the run has ended before it was done:"
  begin_again "$@"
}

help_if_asked "$@"
[[ $# -gt 0 ]] || mistake "no subcommand"
command=$1
shift
case $command in
  create | setup | tail | stop | delete) need_nothing "$@" ;;
  run | resume) need_flags "$@" ;;
  fetch) [[ $# -eq 1 ]] || mistake "fetch needs one folder" ;;
  *) mistake "unknown subcommand '$command'" ;;
esac
need ZONE
case $command in create | resume) need TYPE ;; esac
case $command in
  run) start "$@" ;;
  tail) follow ;;
  resume) if dry_run; then plan_of_resume "$@"; else resume "$@"; fi ;;
  *) "$command" "$@" ;;
esac
