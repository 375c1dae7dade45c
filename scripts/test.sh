#!/usr/bin/env bash
# The tests: those that are fast two at a time, then those with a real vLLM and the slow ones alone
# (about 25 minutes on two cores in all).
#
#   scripts/test.sh [pytest arguments]           e.g. scripts/test.sh -m 'not vllm and not slow'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# A process a core: threads besides would only wait for each other.
at_once() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -n 2 --dist loadgroup "$@"; }

if [ $# -gt 0 ]; then
    at_once "$@"
    exit
fi
status=0
at_once -m 'not vllm and not slow' || status=$?
"$VENV/bin/python" -m pytest -m 'vllm or slow' || status=$?
exit "$status"
