#!/bin/sh
# Everything a change has to pass: lint, format, types, import contracts, tests. Serves laptop, pre-commit and CI.
#   scripts/check.sh [options of pytest]
#   scripts/check.sh --static              all but the tests
set -eu
cd -- "$(dirname -- "$0")/.."
. scripts/python.sh
project_python=$("$python" scripts/environment.py --dev)
static=
if [ "${1:-}" = --static ]; then
    static=yes
    shift
fi

step() {
    printf '\n== %s\n' "$1"
    shift
    "$project_python" "$@"
}

step 'lint (ruff check)' -m ruff check .
step 'format (ruff format --check)' -m ruff format --check .
step 'types (mypy)' -m mypy
step 'import contracts (import-linter)' -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
[ -n "$static" ] || {
    printf '\n== tests (pytest)\n'
    # Last, so that pytest's own closing line ends the output.
    exec ./scripts/test "$@"
}
