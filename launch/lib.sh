# shellcheck shell=bash
# What the launchers share: usage, mistakes, and commands that are run or, with DRY_RUN=1, printed.
# To be sourced; goes to the root of the repository.
set -euo pipefail
SCRIPT=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)/$(basename "${BASH_SOURCE[1]}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Exit statuses of a run that was told to stop, which the same command resumes, and of one whose
# arguments are wrong.
# shellcheck disable=SC2034
SAVED=75 MISTAKE=2

# The comment at the head of the script is its usage text.
usage() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$SCRIPT"
}

mistake() {
  echo "$(basename "$SCRIPT"): $1" >&2
  echo >&2
  usage >&2
  exit "$MISTAKE"
}

# Prints usage and ends where the first word asks for it.
help_if_asked() {
  case ${1:-} in
    -h | --help)
      usage
      exit 0
      ;;
  esac
}

# Each of these variables must have a value.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || mistake "$name is not set"
  done
}

# What follows the subcommand, or the script, must be flags of spo_jax.main.
need_flags() {
  [[ $# -gt 0 ]] || mistake "give the arguments of spo_jax.main, such as --config=FILE --workdir=DIR"
  [[ $1 == -* ]] || mistake "unexpected argument '$1'"
}

need_nothing() {
  [[ $# -eq 0 ]] || mistake "unexpected argument '$1'"
}

# Prints words as one line that a shell reads as the same words.
quoted() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word=${word//"'"/"$quote"}
      word="'$word'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

dry_run() {
  [[ ${DRY_RUN:-} == 1 ]]
}

# Runs a command, or prints it.
run() {
  if dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}

# A dry run's remark on the commands below it.
remark() {
  if dry_run; then
    echo "# $1"
  fi
}
