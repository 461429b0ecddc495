#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine, as a JobSet: a pod on each host of the slice.
#
#   launch/gke.sh image           builds the image and pushes it
#   launch/gke.sh run ARGUMENTS   starts spo_jax.main on every host
#   launch/gke.sh logs            follows the log of host 0
#   launch/gke.sh delete          tells the run to save, and deletes the JobSet
#   launch/gke.sh show ARGUMENTS  prints the manifest, launch/gke/jobset.yaml filled in
#
# The cluster, which kubectl must be logged in to, needs JobSet (https://jobset.sigs.k8s.io) and a
# node pool with the slice. ARGUMENTS go to spo_jax.main: give --workdir=/runs/NAME and a bucket for
# the checkpoints, --config.checkpoint.folder=gs://BUCKET/RUN. After a preemption or a crash all pods
# begin again, and the run with its newest checkpoint; after a mistake in ARGUMENTS they do not. So
# does a run that was deleted: delete, then run.
#
# Variables:
#   IMAGE=...      where the image is pushed and pulled, without default
#   NAME=spo-jax   of the JobSet
#   ACCELERATOR=tpu-v5-lite-podslice, TOPOLOGY=4x4  the slice
#   CHIPS=4        of a host
#   SPOT=1         only on spot machines
#   CLAIM=...      a PersistentVolumeClaim that all hosts may mount, for /runs; without it what is
#                  there, metrics and report, ends with the pods
#   SERVICE_ACCOUNT=default  of Kubernetes, which may write to the bucket
#   NAMESPACE=default
#   RESTARTS=100   most times that all pods begin again
#   DRY_RUN=1      prints the commands, and runs none
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME=${NAME:-spo-jax}
NAMESPACE=${NAMESPACE:-default}
TOPOLOGY=${TOPOLOGY:-4x4}
CHIPS=${CHIPS:-4}

# A text as JSON, which is YAML too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

# The container's arguments. Kubernetes would put the value of a variable in place of $(NAME).
arguments() {
  local word list=
  for word in "$@"; do
    word=${word//"\$("/"\$\$("}
    list+="${list:+, }$(json "$word")"
  done
  printf '[%s]' "$list"
}

hosts() {
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)*$ && $CHIPS =~ ^[1-9][0-9]*$ ]] ||
    mistake "TOPOLOGY '$TOPOLOGY' is no grid such as 4x4, or CHIPS '$CHIPS' no number"
  local chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS == 0)) || mistake "TOPOLOGY $TOPOLOGY has no multiple of CHIPS $CHIPS"
  echo $((chips / CHIPS))
}

# Fills in one name of the manifest.
fill() {
  manifest=${manifest//"__$1__"/"$2"}
}

# Drops the lines of the manifest that are for when a variable has a value, or for when it has none.
choose() {
  local other=with
  [[ -z ${!1:-} ]] || other=without
  manifest=$(grep -v "# $other $1\$" <<< "$manifest")
}

show() {
  local manifest hosts
  hosts=$(hosts)
  manifest=$(< launch/gke/jobset.yaml)
  choose SPOT
  choose CLAIM
  fill NAME "$(json "$NAME")"
  fill RESTARTS "${RESTARTS:-100}"
  fill HOSTS "$hosts"
  fill CHIPS "$CHIPS"
  fill ACCELERATOR "$(json "${ACCELERATOR:-tpu-v5-lite-podslice}")"
  fill TOPOLOGY "$(json "$TOPOLOGY")"
  fill SERVICE_ACCOUNT "$(json "${SERVICE_ACCOUNT:-default}")"
  fill CLAIM "$(json "${CLAIM:-}")"
  fill IMAGE "$(json "$IMAGE")"
  fill ARGUMENTS "$(arguments "$@")"
  printf '%s\n' "$manifest"
}

image() {
  run docker build --file=launch/docker/Dockerfile.tpu --tag="$IMAGE" .
  run docker push "$IMAGE"
}

start() {
  local manifest
  manifest=$(show "$@")
  if dry_run; then
    echo "$(quoted launch/gke.sh show "$@") | $(kube create --filename=-)"
  else
    kube create --filename=- <<< "$manifest"
  fi
}

logs() {
  local labels=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0
  kube logs --selector="$labels" --tail=100 --follow
}

delete() {
  kube delete jobset "$NAME"
}

kube() {
  run kubectl --namespace="$NAMESPACE" "$@"
}

help_if_asked "$@"
[[ $# -gt 0 ]] || mistake "no subcommand"
command=$1
shift
case $command in
  image) need_nothing "$@" && need IMAGE ;;
  run | show) need_flags "$@" && need IMAGE ;;
  logs | delete) need_nothing "$@" ;;
  *) mistake "unknown subcommand '$command'" ;;
esac
if [[ $command == run ]]; then
  start "$@"
else
  "$command" "$@"
fi
