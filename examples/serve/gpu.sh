#!/usr/bin/env bash
# What a machine with a GPU of 80 GB and vLLM can show: answers of every method in bfloat16, and the table of throughput
# at the shapes of InternVL3-8B. DRY=1 runs the same way at small sizes anywhere, which shows nothing about a GPU.
#     examples/serve/gpu.sh outputs/serving
set -euo pipefail
out=${1:?folder for the results}
mkdir -p "$out" && out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1
prompts=(--prompts 20)
shapes=(--size 7b --requests 4 --rounds 3)
if [ -n "${DRY:-}" ]; then
    prompts=(--prompts 3)
    shapes=(--size small --concurrency 1 --requests 1 --rounds 1)
fi
cd "$(dirname "$0")/../.."
python examples/serve/check_answers.py --dtype bfloat16 "${prompts[@]}" | tee "$out/answers.txt"
python examples/benchmark_serving.py --dtype bfloat16 "${shapes[@]}" --output "$out/throughput.json" | tee "$out/throughput.md"
