#!/usr/bin/env bash
# The GPU checks on a machine with NVIDIA GPUs. Carry the repository (git archive); everything else comes by set-up.
set -euo pipefail
cd "$(dirname "$0")/../.."
make setup ACCELERATOR=gpu
.venv/bin/pytest tests/gpu "$@"
