#!/bin/sh
# Makes the environment of looking inside beside TransformerLens: .venv-inside.  TransformerLens
# wants versions of libraries of its own, so it stays apart from what `make bench` compares with.
#
#   PYTHON=...   the interpreter to build on, as of venv.sh
set -eu
cd "$(dirname "$0")/.."
venv=.venv-inside

VENV=$venv sh .ci/venv.sh model
installed=$venv/.installed-transformer-lens
key="transformer-lens==4.3.0"
[ "$(cat "$installed" 2>/dev/null)" = "$key" ] || {
    $venv/bin/python -m pip install --disable-pip-version-check --no-input "$key"
    echo "$key" >"$installed"
}
