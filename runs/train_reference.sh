#!/usr/bin/env bash
# The reference checkpoint, from this machine's Python packages to a trained TiDAR and its AR control, on one GPU.
#
#     runs/train_reference.sh WORKDIR [STAGE ...]      stages: corpus base tidar rollout control (all by default), adapters
#
# WORKDIR receives corpus/ and run/NAME/{model,metrics.jsonl,checkpoints}. A stage that was cut off goes on where it
# stopped when it is called again.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$1
shift
mkdir -p "$work"
cd "$work"
train() {
    local recipe=$1
    shift
    local resume=()
    [ -e "run/$recipe/latest" ] && resume=(--resume)
    python3 "$repo/runs/train.py" "$recipe" "${resume[@]}" "$@"
}
for stage in "${@:-corpus base tidar rollout control}"; do
    for one in $stage; do
        case $one in
            corpus) [ -e corpus/stats.json ] || python3 "$repo/runs/corpus.py" --out corpus ;;
            base) train python-17m-ar ;;
            tidar) train python-17m ;;
            rollout) train python-17m-rollout ;;
            control) train python-17m-control ;;
            adapters) train python-17m-adapters ;;
            *) echo "unknown stage $one" >&2; exit 2 ;;
        esac
    done
done
