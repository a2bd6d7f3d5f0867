# Sourced by the other scripts: sets $python to a Python that can make the project's environment, or explains and leaves.
# What happens after that is written once, in environment.py, so that `python scripts/demo.py` does the same elsewhere.

_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_makes_environments() {
    # With DYDIT_USE_CURRENT none is made, and the first Python is the one that is meant.
    [ "${DYDIT_USE_CURRENT:-0}" != 0 ] || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

_explain_and_leave() {
    printf '%s\n  why: %s\n  fix: %s\n' "$1" "$2" "$3" >&2
    exit 2
}

if [ -n "${DYDIT_PYTHON:-}" ]; then
    _new_enough "$DYDIT_PYTHON" || _explain_and_leave \
        "DYDIT_PYTHON names no Python that dydit can use: $DYDIT_PYTHON" \
        "it did not run, or is older than Python 3.11." \
        "set DYDIT_PYTHON to a Python of 3.11 or newer, or unset it."
    python=$DYDIT_PYTHON
else
    # The first that can make environments wins; one that cannot is kept, and environment.py says what it lacks.
    python=
    for _candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        _new_enough "$_candidate" || continue
        [ -n "$python" ] || python=$_candidate
        if _makes_environments "$_candidate"; then
            python=$_candidate
            break
        fi
    done
    [ -n "$python" ] || _explain_and_leave \
        "no Python of 3.11 or newer was found." \
        "looked for python3, python3.13, python3.12, python3.11, python3.14 and python on the PATH." \
        "install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python), or set DYDIT_PYTHON to its path."
fi
