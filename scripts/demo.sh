#!/usr/bin/env bash
# The main job on two CPU cores: base model, vLLM, gateway, training with early stopping, summary.
#
#   scripts/demo.sh [section.key=value ...]      e.g. scripts/demo.sh run.seed=1 run.output=runs/one
#   scripts/demo.sh --overwrite                  once more, over what the last one left in runs/demo
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$VENV/bin/python" -m espo_rl.base_model --out runs/base
"$VENV/bin/python" -m espo_rl.run arithmetic "$@"
