# Sourced by the shell scripts of this folder, which share one virtual environment. It is made on
# first use, and extended when a script needs more extras.
#
#   ensure_venv EXTRAS    such as `ensure_venv hf,plot`; afterwards "$VENV_PYTHON" has these extras
#
# PYTHON names the interpreter to build from (default python3; 3.10 or newer).

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV_DIR=$REPO_ROOT/.venv
VENV_PYTHON=$VENV_DIR/bin/python
VENV_STAMP=$VENV_DIR/infllm-flex.stamp

_venv_fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# The union of two comma-separated lists, sorted.
_venv_union() {
    printf '%s\n' "${1//,/$'\n'}" "${2//,/$'\n'}" | sed '/^$/d' | LC_ALL=C sort -u | paste -sd, -
}

# A checksum of both requirement files and the extras; the packages are installed anew if it changes.
_venv_fingerprint() {
    { cat "$REPO_ROOT/pyproject.toml" "$REPO_ROOT/constraints.txt" && printf '%s\n' "$1"; } | cksum
}

_venv_check_python() {
    local python=$1
    command -v "$python" >/dev/null 2>&1 ||
        _venv_fail "no '$python' found: install Python 3.10 or newer, or set PYTHON to one"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        _venv_fail "$("$python" -V 2>&1) is too old: set PYTHON to Python 3.10 or newer"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        _venv_fail "'$python' cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt-get install python3-venv)"
}

_venv_create() {
    local python=${PYTHON:-python3}
    _venv_check_python "$python"
    printf 'Making %s with %s\n' "$VENV_DIR" "$("$python" -V 2>&1)"
    "$python" -m venv --clear "$VENV_DIR" || _venv_fail "could not make $VENV_DIR"
}

_venv_install() {
    local extras=$1
    printf 'Installing infllm-flex[%s] into %s (once; a few minutes)\n' "$extras" "$VENV_DIR"
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        printf '%s\n' "No NVIDIA driver here. The default torch wheel carries CUDA (gigabytes); for the small CPU wheel" \
            "set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before the first run."
    fi
    # Removed first: an interrupted installation must not look like a complete one.
    rm -f "$VENV_STAMP"
    (cd "$REPO_ROOT" && "$VENV_PYTHON" -m pip install --disable-pip-version-check \
        -c constraints.txt -e ".[$extras]") || _venv_fail "pip could not install infllm-flex[$extras]; see above"
    printf '%s\n%s\n' "$(_venv_fingerprint "$extras")" "$extras" >"$VENV_STAMP"
}

ensure_venv() {
    local wanted=$1 installed='' recorded='' extras
    [ -f "$REPO_ROOT/constraints.txt" ] || _venv_fail "constraints.txt is missing from $REPO_ROOT"
    if [ -f "$VENV_STAMP" ]; then
        { read -r recorded; read -r installed; } <"$VENV_STAMP"
    fi
    extras=$(_venv_union "$installed" "$wanted")
    # Make the environment anew where its interpreter is gone or it is incomplete.
    if ! "$VENV_PYTHON" -c '' 2>/dev/null ||
        { [ -z "$recorded" ] && ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; }; then
        _venv_create
        recorded=''
    fi
    if [ "$recorded" != "$(_venv_fingerprint "$extras")" ]; then
        _venv_install "$extras"
    fi
}
