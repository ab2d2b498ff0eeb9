#!/bin/sh
# Makes the environment of `make contract`: .venv-contract, with google-deepmind/gemma in it, which
# needs Python 3.12.
#
#   PYTHON=...   the interpreter to build on (default: the first of 3.13, 3.12 that works)
set -eu
cd "$(dirname "$0")/.."
venv=.venv-contract
constraints=tests/contract/constraints.txt

works() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13.*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
        works "$candidate" && { printf '%s' "$candidate"; return; }
    done
    echo "google-deepmind/gemma needs Python 3.12 or newer with the venv module: none found." >&2
    echo "Name one: make contract PYTHON=/path/to/python3.13" >&2
    exit 1
}

python=$(find_python)
PYTHON=$python VENV=$venv CONSTRAINTS=$constraints sh .ci/venv.sh model dev

installed=$venv/.installed-gm
key=$(cksum <$constraints)
[ "$(cat "$installed" 2>/dev/null)" = "$key" ] || {
    # gm leads to several of Google's cloud clients.  pip searches their versions for a quarter of
    # an hour; uv for some seconds.
    $venv/bin/python -m pip install --disable-pip-version-check --no-input uv
    $venv/bin/python -m uv pip install --python $venv/bin/python --compile-bytecode \
        -c $constraints gemma
    echo "$key" >"$installed"
}
