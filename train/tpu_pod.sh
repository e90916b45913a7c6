#!/bin/bash
# One training run on a Cloud TPU pod slice: every host runs the same command, and JAX joins them by itself.
#
#   TPU=my-v5e-64 ZONE=us-west4-a train/tpu_pod.sh configs/affinity_unet/fib25.py gs://bucket/runs/fib25
#
# Change: TPU, ZONE, and in the configuration data.batch_size (a multiple of the number of chips) and the paths of the
# volumes (gs://... is read directly). The code must lie on every host in ~/emjax (`gcloud ... scp --worker=all`).
# A pre-empted slice: create it again and run the same command, it goes on from the last checkpoint.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
config=${1:?usage: TPU=NAME ZONE=ZONE train/tpu_pod.sh CONFIG WORKDIR [--config.field=value ...]}
workdir=${2:?usage: TPU=NAME ZONE=ZONE train/tpu_pod.sh CONFIG WORKDIR [--config.field=value ...]}
shift 2
rest=$(printf ' %q' "$@")

gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
  set -e
  cd ~/emjax
  [ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'; }
  .venv/bin/python -m emjax.train --config '$config' --workdir '$workdir'$rest
"
