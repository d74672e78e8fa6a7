#!/bin/sh
# Every published speed on a GPU: steps against their floors, decoding by method on held-out files, and what the host
# asks of the GPU meanwhile. On one NVIDIA H200 some minutes once kernels are compiled.
#   runs/bench.sh [RESULTS]        PYTHON=python3 to choose another interpreter
set -eu
cd "$(dirname "$0")/.."
results=${1:-results}
run="${PYTHON:-python} -m tidar bench"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Held-out texts of 512 tokens, and four of them behind one another for long prefixes.
${PYTHON:-python} - "$folder" <<'EOF'
import gzip, json, sys
texts = [json.loads(line)["text"] for line in gzip.open("results/holdout_prompts.jsonl.gz", "rt")]
long = ["\n".join((texts + texts)[n : n + 4]) for n in range(len(texts))]
for name, lines in (("short", texts), ("long", long)):
    with open(f"{sys.argv[1]}/{name}", "w") as file:
        file.writelines(json.dumps(text) + "\n" for text in lines)
EOF
prompts=$folder/short

$run step --prefix 512 --record "$results/bench_step.jsonl"
$run step --prefix 512 --sampled --record "$results/bench_step.jsonl"
$run step --prefix 512 --adapter-rank 64 --record "$results/bench_step.jsonl"
$run step --prefix 512 --adapter-rank 256 --record "$results/bench_step.jsonl"
$run step --size qwen2.5-1.5b --draft-len 16 8 4 --record "$results/bench_step.jsonl"
$run step --size qwen2.5-1.5b --adapter-rank 64 --record "$results/bench_step.jsonl"
$run step --size qwen3-8b --draft-len 16 8 4 --record "$results/bench_step.jsonl"
$run step --size qwen3-8b --weights fp8 --record "$results/bench_step.jsonl"
$run step --size qwen3-8b --weights int8 --record "$results/bench_step.jsonl"
$run decode --prompts "$prompts" --count 64 --baselines --record "$results/bench_decode.jsonl"
$run decode --prompts "$prompts" --count 64 --temperature 0.8 --top-p 0.95 --record "$results/bench_decode.jsonl"
$run decode --prompts "$prompts" --count 128 --batch 4 16 64 --record "$results/bench_decode.jsonl"
for tokens in 128 1792; do
    test $tokens -le 512 || prompts=$folder/long
    $run decode --prompts "$prompts" --prompt-tokens $tokens --count 64 --batch 1 4 16 64 --record "$results/bench_decode.jsonl"
done
$run step --prefix 512 --deterministic --record "$results/bench_step.jsonl"
$run decode --prompts "$folder/short" --count 32 --deterministic --record "$results/bench_decode.jsonl"
$run step --size qwen3-32b --parts --prefix 1024 2048 4096 --record "$results/bench_parts.jsonl"
${PYTHON:-python} runs/replay.py --step "$results/bench_step.jsonl" --decode "$results/bench_decode.jsonl"
${PYTHON:-python} runs/host_profile.py --write "$results/host_calls.jsonl"
