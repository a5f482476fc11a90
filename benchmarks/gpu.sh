#!/usr/bin/env bash
# What only a GPU can show, in ten minutes: the gpu tests, then time a step and peak memory of the floor, full
# fine-tuning, PEFT, ours and ours fused, in turn, with their limits (benchmarks/training.py, GPU_LIMITS).
#
#     benchmarks/gpu.sh           writes benchmarks/results/training_<model>_<device>….json
#     benchmarks/gpu.sh --list    prints the commands
#
# The most telling come first. What does not fit into the time is named, and so is what failed; the exit code is 0
# when everything ran and every limit held.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_IN_ALL:-570}
python=${PYTHON:-python}
training="$python -m benchmarks.training --device cuda --check --rounds 15"
ways="floor,full,peft,fused"

commands=("$python -m pytest -m gpu -q -p no:cacheprovider")
for precision in bf16-true bf16-mixed; do
    for batch in 128 8; do
        commands+=("$training --model vit_base --batch $batch --precision $precision --against $ways")
    done
    commands+=("$training --model resnet50 --batch 256 --precision $precision --against floor,full,peft")
    commands+=("$training --model wav2vec2_large --batch 16 --precision $precision --against $ways")
    commands+=("$training --model vit_base --batch 512 --precision $precision --against $ways")
done
for precision in bf16-true bf16-mixed; do
    for run in "vit_base --batch 128" "resnet50 --batch 256" "wav2vec2_large --batch 16"; do
        commands+=("$training --model $run --precision $precision --against floor,full,peft --compile")
    done
done

if [ "${1:-}" = --list ]; then
    printf '%s\n' "${commands[@]}"
    exit
fi
$python -c 'import sys, torch
torch.cuda.is_available() or sys.exit("torch sees no CUDA device: nothing is measured")' || exit 2
status=0
for command in "${commands[@]}"; do
    left=$((seconds - SECONDS))
    if [ "$left" -lt 20 ]; then
        echo "LEFT OUT, no time: $command"
        status=1
        continue
    fi
    echo "== $command"
    timeout "$left" $command || { echo "FAILED ($?): $command"; status=1; }
done
exit $status
