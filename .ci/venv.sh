#!/bin/sh
# Makes a virtual environment and installs this package in it, editable, with the extras given as
# arguments: `sh .ci/venv.sh app model`.  Does nothing when they are already there.
#
#   PYTHON=...       the interpreter to build on (default: the first of 3.13, 3.12, 3.11 that works)
#   VENV=...         the folder of the environment (default: .venv)
#   CONSTRAINTS=...  a file of exact versions to hold to
#   INSTALLER=pip    let pip install, which takes some four times as long as uv
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

say() { printf '%s\n' "$*" >&2; }

# A version manager's shim may be on PATH for a Python that it will not run: always try it.
works() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        works "$candidate" && { printf '%s' "$candidate"; return; }
    done
    say "No Python 3.11 or newer with the venv module was found."
    say "Install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name it:"
    say "    make run PYTHON=/path/to/python3.13"
    exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Scripts and the editable install hold absolute paths, so a moved folder needs a new environment.
made_for="$venv/.made-for"
fresh() {
    [ -f "$made_for" ] && "$venv/bin/python" -c '' 2>/dev/null || return 1
    version=${PYTHON:+$(version_of "$PYTHON")}
    [ "$(cat "$made_for")" = "${version:-$(version_of "$venv/bin/python")} $(pwd -P)" ]
}

if [ -n "${PYTHON:-}" ] && ! works "$PYTHON"; then
    say "PYTHON=$PYTHON is not a Python 3.11 or newer with the venv module."
    exit 1
fi
if ! fresh; then
    python=$(find_python)
    if [ -d "$venv" ]; then
        if [ ! -f "$made_for" ]; then
            say "$venv is there but was not made by this Makefile: move it away, or set VENV=..."
            exit 1
        fi
        say "$venv was made for another Python or another folder: making it again."
        rm -rf "$venv"
    fi
    say "Making $venv with $("$python" --version)"
    mkdir "$venv"
    echo unfinished >"$made_for"
    "$python" -m venv "$venv"
    echo "$(version_of "$venv/bin/python") $(pwd -P)" >"$made_for"
fi

key="$(cat pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"} | cksum)"
missing=
extras=
wanted=$*
for extra in $wanted; do
    extras="$extras${extras:+,}$extra"
    [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" = "$key" ] || missing=yes
done
[ -n "$missing" ] || exit 0

say "Installing gemma_nb[$extras]"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"; }
# uv needs a quarter of pip's time.  What it cannot find, pip may know a place for: pip's own
# settings are not uv's.
set -- ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".[$extras]"
if [ "${INSTALLER:-uv}" = pip ] || ! pip --quiet uv || ! "$venv/bin/python" -m uv pip install \
    --python "$venv/bin/python" --compile-bytecode "$@"; then
    pip "$@"
fi
# As they do with what they copy: where Python is told to write no bytecode, each start would
# compile the source anew, which takes some tenths of a second.
"$venv/bin/python" -m compileall -q gemma_nb
for extra in $wanted; do
    echo "$key" >"$venv/.installed-$extra"
done
