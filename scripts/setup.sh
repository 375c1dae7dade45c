#!/usr/bin/env bash
# Makes .venv from the lock, once; does nothing when it is there. Sourced by demo.sh and test.sh.
#
# Another lock or interpreter: LOCK=my.lock PYTHON=/path/to/python3.11 scripts/demo.sh
# On a GPU machine use your own environment instead: pip install '.[gpu]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOCK=${LOCK:-requirements-cpu.lock}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
STAMP="$VENV/installed-from"
WANTED="$(cat "$LOCK" pyproject.toml | sha256sum)"

if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
    echo "Installing from $LOCK into $VENV: two to five minutes, once"
    # Without pip, it was begun and not finished.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$VENV"
    pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
    # The sdists in the lock are built without isolation, so what they build with comes first.
    build_tools=$(grep -E '^(setuptools|wheel|ninja|py-cpuinfo)==' "$LOCK")
    pip install --quiet $build_tools
    # The CPU build of torch stands in PyTorch's own index, which uv knows by name; pip finds it
    # where the machine's configuration or a mirror offers it.
    torch=$(grep -E '^torch==' "$LOCK")
    pip install --quiet --no-deps "$torch" || {
        pip install --quiet uv
        "$VENV/bin/uv" pip install --python "$VENV/bin/python" --torch-backend cpu --no-deps "$torch"
    }
    # --no-deps: the lock is complete, and resolving would bring packages that break CPU torch.
    pip install --no-deps --no-build-isolation --requirement "$LOCK" |
        awk -v total="$(grep -c == "$LOCK")" '
            /^(Collecting|Requirement already)/ { printf "\r%d of %d packages", ++n, total; fflush() }
            /^Installing/ { printf "\ninstalling them ...\n"; fflush() }'
    pip install --quiet --no-deps --no-build-isolation --editable .
    echo "$WANTED" > "$STAMP"
fi
