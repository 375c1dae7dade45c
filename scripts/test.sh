#!/usr/bin/env bash
# The tests: those that are fast two files at a time, then those with a real vLLM and the slow ones
# alone (about 40 minutes on two cores in all).
#
#   scripts/test.sh [pytest arguments]           e.g. scripts/test.sh -m 'not vllm and not slow'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tests() { "$VENV/bin/python" -m pytest "$@"; }
# A process a core: threads besides would only wait for each other.
two_at_a_time() { OMP_NUM_THREADS=1 tests -n 2 --dist loadfile "$@"; }

case "$*" in
"")
    status=0
    two_at_a_time -m 'not vllm and not slow' || status=$?
    tests -m 'vllm or slow' || status=$?
    exit "$status"
    ;;
*'not vllm'*) two_at_a_time "$@" ;;
*) tests "$@" ;; # one vLLM is as much as two cores bear
esac
