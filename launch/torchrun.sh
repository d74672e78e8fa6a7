#!/bin/bash
# A recipe on machines without a scheduler: run this on each of them. Started again after a stop, it goes on.
#
#   RECIPE=qwen2.5-1.5b OUT=/shared/run launch/torchrun.sh [flags of tidar train]
#   RECIPE=qwen3-8b OUT=/shared/run NODES=2 HOST=first-machine JOB=name launch/torchrun.sh [flags of tidar train]
#
# OUT must be on a file system that all of them see. Other settings, with what they are by default:
#   VENV=.venv  GPUS=(all of the machine)  PORT=29500  RESTARTS=3
set -euo pipefail
: "${RECIPE:?name a recipe or a .toml file}" "${OUT:?name a folder that all machines see}"

where=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    : "${HOST:?name the first machine}" "${JOB:?name the job}"
    where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29500}" --rdzv-id "$JOB")
fi
resume=()
if [ -e "$OUT/latest" ]; then resume=(--resume); fi

gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec "${VENV:-.venv}/bin/torchrun" "${where[@]}" \
    --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}" \
    -m tidar train "$RECIPE" --out "$OUT" --device "${DEVICE:-cuda}" ${resume[@]+"${resume[@]}"} "$@"
