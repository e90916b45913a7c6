#!/bin/sh
# From nothing to a scored segmentation of made-up neuropil: sh train/demo.sh [FOLDER]. `make demo` installs first.
set -eu
folder=${1:-demo}
export EMJAX_DEMO="$folder"
start=$(date +%s)
said() { printf '\n== %s (%s s)\n' "$1" "$(($(date +%s) - start))"; }

rm -rf "$folder"
mkdir -p "$folder"
said "making two volumes of neuropil: one to train on, one to test"
python -m emjax.prepare phantom --output "$folder/train.zarr" --shape 96,160,160 --seed 1
python -m emjax.prepare phantom --output "$folder/test.zarr" --shape 48,128,128 --seed 2
said "training"
python -m emjax.train --config configs/demo/phantom.py --workdir "$folder/run"
python -m emjax.train --config configs/demo/phantom.py:untrained --workdir "$folder/untrained"
for run in untrained run; do
  said "segmenting the test volume with the network in $folder/$run"
  python -m emjax.segment --checkpoint "$folder/$run" --input "$folder/test.zarr/raw" --output "$folder/$run.zarr"
done
said "the untrained network's score, to compare with"
python -m emjax.evaluate --segmentation "$folder/untrained.zarr" --labels "$folder/test.zarr/labels" --json "$folder/untrained.json"
said "the trained network's score"
python -m emjax.evaluate --segmentation "$folder/run.zarr" --labels "$folder/test.zarr/labels" \
  --image "$folder/test.zarr/raw" --affinities "$folder/run.prediction.zarr" \
  --json "$folder/run.json" --report "$folder/report"
said "done: open $folder/report/index.html"
