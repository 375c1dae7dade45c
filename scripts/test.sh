#!/usr/bin/env bash
# The whole test suite, real vLLM and DeepSpeed included (about 25 minutes on two cores).
#
#   scripts/test.sh [pytest arguments]           e.g. scripts/test.sh -m 'not vllm and not slow'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$VENV/bin/python" -m pytest "$@"
