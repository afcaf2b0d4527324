#!/usr/bin/env bash
# Trains the weights that come with the package, stage after stage:  scripts/train_weights.sh DATA [RUNS]
#
# DATA holds what docs/training.md lists; RUNS (default: runs) gets a folder for each stage. Stopped at any moment and
# started again, it goes on where it was. The stages and their configurations are those of the shipped weights
# (benchmarks/results/*_training*/config.toml). The one named gpu ran for 100 seconds on an H200 and, for its last epoch and
# a fifth, on a CPU; the others ran on one core of a CPU.
set -euo pipefail
data=$(cd "${1:?usage: scripts/train_weights.sh DATA [RUNS]}" && pwd)
mkdir -p "${2:-runs}"
runs=$(cd "${2:-runs}" && pwd)
configurations=$(cd "$(dirname "$0")/../benchmarks/results" && pwd)
export FF_USE_FUSED=${FF_USE_FUSED:-1}

stage() { # name, section.option=value...
  local name=$1
  shift
  featherface train "$runs/$name" --resume --config "$configurations/$name/config.toml" --data "$data" "${@/#/--set=}"
}

stage v2_training
stage v2_training_large model.weights="$runs/v2_training/final.safetensors"
featherface average "$runs/v2_training/final.safetensors" "$runs/v2_training_large/final.safetensors" \
  --share 0.3 --share 0.7 -o "$runs/v2_average.safetensors"
stage v2_training_multibox model.weights="$runs/v2_average.safetensors"
stage v2_training_long model.weights="$runs/v2_training_multibox/final.safetensors"
featherface average "$runs/v2_average.safetensors" "$runs/v2_training_long/final.safetensors" \
  --share 0.3 --share 0.7 -o "$runs/v2_average_long.safetensors"
stage v2_training_wide model.weights="$runs/v2_training_long/final.safetensors"
stage v2_training_zoom model.weights="$runs/v2_average_long.safetensors"
featherface average "$runs/v2_training_zoom/final.safetensors" "$runs/v2_training_wide/final.safetensors" \
  "$runs/v2_average_long.safetensors" --share 0.35 --share 0.25 --share 0.4 -o "$runs/v2_average_wide.safetensors"
stage v2_training_muon model.weights="$runs/v2_average_wide.safetensors"
featherface average "$runs/v2_training_muon/final.safetensors" "$runs/v2_average_wide.safetensors" \
  --share 0.7 --share 0.3 -o "$runs/v2_average_muon.safetensors"
stage v2_training_restart model.weights="$runs/v2_average_muon.safetensors"
featherface average "$runs/v2_training_restart/final.safetensors" "$runs/v2_average_muon.safetensors" \
  --share 0.7 --share 0.3 -o "$runs/v2_average_restart.safetensors"
stage v2_training_annealed model.weights="$runs/v2_average_restart.safetensors"
stage v2_ultra_training model.transfer_weights="$runs/v2_training_long/final.safetensors"
stage v2_ultra_training_zoom model.weights="$runs/v2_ultra_training/final.safetensors"
stage v2_ultra_training_sizes model.weights="$runs/v2_ultra_training_zoom/final.safetensors"
stage v2_ultra_training_gpu model.weights="$runs/v2_ultra_training_sizes/final.safetensors"
stage v2_ultra_training_muon model.weights="$runs/v2_ultra_training_gpu/final.safetensors"
stage v2_ultra_training_annealed model.weights="$runs/v2_ultra_training_muon/final.safetensors"
stage v2_ultra_training_mild model.weights="$runs/v2_ultra_training_annealed/final.safetensors"
echo "V2: $runs/v2_training_annealed/final.safetensors; Ultra: $runs/v2_ultra_training_mild/final.safetensors"
