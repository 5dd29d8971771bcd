#!/usr/bin/env bash
# A training of ddjax on a Cloud TPU slice: make the slice, install, train, come back after preemptions.
#
#   launch/tpu_vm.sh create                     ask for the slice, and wait for it
#   launch/tpu_vm.sh install                    this checkout, on all of its hosts
#   launch/tpu_vm.sh train --config configs/cifar10.py --workdir gs-mounted/run
#   launch/tpu_vm.sh logs | status | stop | delete
#   launch/tpu_vm.sh supervise --config ... --workdir ...    all of it again whenever the slice is preempted
#
# Says what it would do with DRY_RUN=1. Settings, from the environment:
#   NAME, ZONE                 needed
#   TYPE=v5litepod-16          the slice;  VERSION=v2-alpha-tpuv5-lite  its software
#   SPOT=1                     preemptible, cheaper
#   BUCKET=my-bucket           mounted as /mnt/bucket on every host (a workdir has to be seen by all of them)
# From nothing to a running job: docs/launch.md.
set -euo pipefail

NAME=${NAME:-}
ZONE=${ZONE:-}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-}
BUCKET=${BUCKET:-}
UNIT=ddjax-train

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 1
}

say() { # show a command, and run it unless this is a rehearsal
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}

tpu() { say gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

everywhere() { tpu ssh --worker=all --command="$1"; }

state() { # READY, PREEMPTED, ... or nothing where there is no such slice
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2> /dev/null || true
}

create() {
  local options=(--accelerator-type="$TYPE" --version="$VERSION")
  if [ -n "$SPOT" ]; then options+=(--spot); fi
  tpu create "${options[@]}"
}

install() {
  local root archive
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=$(mktemp -d)/ddjax.tar.gz
  say git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  say gcloud compute tpus tpu-vm scp "$archive" "$NAME:ddjax.tar.gz" --zone="$ZONE" --worker=all
  everywhere "mkdir -p ddjax && tar -xzf ddjax.tar.gz -C ddjax && python3 -m venv venv && venv/bin/pip install -q -U pip && venv/bin/pip install -q -e 'ddjax[tpu]'"
  if [ -n "$BUCKET" ]; then
    everywhere "sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket && (mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs $BUCKET /mnt/bucket)"
  fi
}

train() {
  [ "$#" -gt 0 ] || fail "train takes the arguments of ddjax train: --config ... --workdir ..."
  local arguments
  arguments=$(printf ' %q' "$@")
  # A unit of systemd outlives the connection, and gets SIGTERM, with time to save, when the machine is taken away.
  everywhere "cd ddjax && sudo systemctl reset-failed $UNIT 2> /dev/null; sudo systemd-run --unit=$UNIT --uid=\$(id -u) --working-directory=\$PWD --setenv=HOME=\$HOME --setenv=DDJAX_CLUSTER=tpu --property=TimeoutStopSec=90 \$HOME/venv/bin/ddjax train --stopped-status 75$arguments"
}

logs() { tpu ssh --worker=0 --command="journalctl -u $UNIT -f -n 50 -o cat"; }
status() { everywhere "systemctl show $UNIT -p ActiveState -p SubState -p ExecMainStatus"; }
stop() { everywhere "sudo systemctl stop $UNIT"; } # SIGTERM: saves
delete() { tpu delete --quiet; }

finished() { # whether the training on host 0 has ended well
  local found
  found=$(gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="systemctl is-active -q $UNIT && echo running || systemctl show $UNIT -p Result --value") || return 2
  case $found in
    running) return 1 ;;
    success) return 0 ;;
    *) return 3 ;;
  esac
}

supervise() {
  [ "$#" -gt 0 ] || fail "supervise takes the arguments of ddjax train: --config ... --workdir ..."
  local how
  while true; do
    case $(state) in
      READY)
        how=0
        finished || how=$?
        case $how in
          0) echo "the training is done" && return 0 ;;
          1) ;; # it runs
          2) echo "the slice does not answer; once more in a minute" >&2 ;;
          3) stop || true && train "$@" ;;
        esac
        ;;
      '') create && install && train "$@" ;;
      PREEMPTED | TERMINATED | FAILED) delete && create && install && train "$@" ;;
      *) ;; # on its way
    esac
    [ -z "${DRY_RUN:-}" ] || return 0
    sleep 60
  done
}

case ${1:-} in
  create | install | train | logs | status | stop | delete | supervise) ;;
  *) fail "expected create, install, train, supervise, logs, status, stop or delete, got '${1:-}'" ;;
esac
[ -n "$NAME" ] && [ -n "$ZONE" ] || fail "set NAME and ZONE, such as NAME=ddjax ZONE=us-west4-a"
command -v gcloud > /dev/null || [ -n "${DRY_RUN:-}" ] || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
"$@"
