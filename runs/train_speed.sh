#!/bin/sh
# Every published speed of training: shapes on one GPU and on two, long rows, adapters. On NVIDIA H200s, a quarter of an
# hour for each number of GPUs.
#   runs/train_speed.sh GPUS [RESULTS]        PYTHON=python3 to choose another interpreter
set -eu
cd "$(dirname "$0")/.."
gpus=${1:?how many GPUs: 1 or 2}
results=${2:-results}
python=${PYTHON:-python}
run="$python"
test "$gpus" -eq 1 || run="$python -m torch.distributed.run --standalone --nproc-per-node $gpus"

speed="runs/train_speed.py --out $results/train_speed.jsonl --profile $results/profiles"
$run $speed --shape qwen2.5-1.5b --seq-len 4096 --rows 2
$run $speed --shape qwen2.5-1.5b --seq-len 4096 --rows 4
$run $speed --shape qwen2.5-1.5b --seq-len 4096 --rows 4 --activation-checkpointing
if test "$gpus" -gt 1; then
    $run $speed --shape qwen3-8b --seq-len 4096 --rows 1 --activation-checkpointing
    exit
fi
$run $speed --shape python-17m --seq-len 1024 2048 --rows 32
long="$python runs/long_sequences.py --out $results/long_sequences.jsonl"
$long --rows 4
$long --model qwen2.5-1.5b --activation-checkpointing
