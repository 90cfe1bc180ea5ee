#!/bin/bash
# redraft adapt as a job of a Ray cluster, on one of its nodes: RAY_ADDRESS=http://head:8265 examples/ray_job.sh
set -euo pipefail

: "${TARGET:?the fine-tuned model, a folder or Hub id}" "${DRAFT:?its draft}" "${PROMPTS:?a file of prompts}"

ray job submit --entrypoint-num-gpus "${GPUS:-8}" --runtime-env-json '{"pip": ["redraft"]}' -- \
  torchrun --standalone --nproc-per-node "${GPUS:-8}" \
  -m redraft adapt --target "$TARGET" --draft "$DRAFT" --prompts "$PROMPTS" --out "${OUT:-redraft-run}"
