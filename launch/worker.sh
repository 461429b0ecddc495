#!/usr/bin/env bash
# One machine's part of a run on several; launch/tpu.sh calls it on each worker.
#
#   launch/worker.sh setup            makes the environment, with a newer Python where it is needed
#   launch/worker.sh start ARGUMENTS  starts spo_jax.main in the background
#   launch/worker.sh state            prints `running`, the exit status of a run that has ended, `lost`
#                                     if it was killed with its machine, or `none`
#   launch/worker.sh stop             tells the run to save and end, and waits until it has
#
# Its log, process id and exit status are in runs/worker/.
#
# Variables:
#   EXTRAS=tpu, PYTHON, VENV  of the environment, see launch/environment.sh
#   GRACE=60   seconds that a run has to save; then it is killed
#   DRY_RUN=1  prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
FOLDER=runs/worker

setup() {
  # The Python of a TPU VM's image may be too old.
  if [[ -z ${PYTHON:-} ]] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    run python3 -m pip install --quiet --user uv
    run python3 -m uv python install 3.12
    export PYTHON=python3.12
    dry_run || PYTHON=$(python3 -m uv python find 3.12)
  fi
  run source launch/environment.sh
}

start() {
  [[ $(state) != running ]] || fail "a run is under way: stop it first"
  # Made by setup, perhaps with another Python than the system's.
  export PYTHON=${PYTHON:-${VENV:-.venv}/bin/python}
  run source launch/environment.sh
  run mkdir -p "$FOLDER"
  run rm -f "$FOLDER/pid" "$FOLDER/status"
  if dry_run; then
    echo "$(quoted nohup setsid bash launch/worker.sh supervise "$@") < /dev/null >> $FOLDER/log 2>&1 &"
    return
  fi
  nohup setsid bash launch/worker.sh supervise "$@" < /dev/null >> "$FOLDER/log" 2>&1 &
  for _ in {1..100}; do
    [[ ! -s $FOLDER/pid ]] || return 0
    sleep 0.1
  done
  fail "the run did not start, see $FOLDER/log"
}

# Of `start`: runs to the end, and keeps the exit status.
supervise() {
  local status=0
  if dry_run; then
    quoted python -m spo_jax.main "$@"
    return
  fi
  python -m spo_jax.main "$@" &
  echo $! > "$FOLDER/pid"
  wait $! || status=$?
  echo "$status" > "$FOLDER/status"
}

state() {
  if [[ -s $FOLDER/status ]]; then
    cat "$FOLDER/status"
  elif [[ ! -s $FOLDER/pid ]]; then
    echo none
  elif kill -0 "$(cat "$FOLDER/pid")" 2> /dev/null; then
    echo running
  else
    echo lost
  fi
}

stop() {
  [[ $(state) == running ]] || return 0
  run kill -TERM "$(cat "$FOLDER/pid")"
  ! dry_run || return 0
  for ((second = 0; second < ${GRACE:-60}; second++)); do
    sleep 1
    [[ $(state) == running ]] || return 0
  done
  kill -KILL "$(cat "$FOLDER/pid")"
}

fail() {
  echo "worker.sh: $1" >&2
  exit 1
}

help_if_asked "$@"
[[ $# -gt 0 ]] || mistake "no subcommand"
command=$1
shift
export EXTRAS=${EXTRAS:-tpu}
case $command in
  setup | state | stop) need_nothing "$@" ;;
  start | supervise) need_flags "$@" ;;
  *) mistake "unknown subcommand '$command'" ;;
esac
"$command" "$@"
