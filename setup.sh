# The one place that installs anything. Sourced by the drivers and by run_tests.sh:
#     . ./setup.sh
# makes .venv with the packages of pyproject.toml and our Rust crate, and puts it first in PATH.
# Seconds when all is there; asks nothing.

stop() { echo "setup: $*" >&2; exit 1; }

# what the environment is made from: when one of these changes, it is brought up to date
stamp=$(cat setup.sh pyproject.toml rustbpe/Cargo.* rustbpe/pyproject.toml rustbpe/build.rs rustbpe/src/* 2>/dev/null | cksum)

if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || ! .venv/bin/python -c "" 2>/dev/null; then
    echo "setup: making .venv (once: some minutes, mostly the download of torch)"
    command -v cc >/dev/null || stop "no C compiler found, which Rust links with; install one (Debian, Ubuntu: apt install gcc)"
    if command -v uv >/dev/null; then
        .venv/bin/python -c "" 2>/dev/null || uv venv --quiet --python '>=3.10,<3.15' .venv || stop "uv could not make .venv"
        # auto: the small CPU build of torch where there is no NVIDIA GPU; from elsewhere, so it may be out of reach
        install() {
            uv pip install --quiet --python .venv/bin/python --torch-backend=auto "$@" 2>/dev/null ||
                uv pip install --quiet --python .venv/bin/python "$@"
        }
    else
        python=${PYTHON:-python3}
        command -v "$python" >/dev/null || stop "no $python found; install Python 3.10 or newer, or uv"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            stop "$("$python" --version) is too old; install Python 3.10 or newer (PYTHON=/path/to/it is used), or uv"
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            "$python" -m venv --clear .venv || stop "python could not make .venv (Debian, Ubuntu: apt install python3-venv)"
        fi
        install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
    fi
    install -e '.[test,plot,web]' || stop "the packages could not be installed (no network, or no room on the disk? see above)"
    if ! command -v cargo >/dev/null; then
        echo "setup: no Rust here, so the build fetches one of its own, which stays out of your system"
    elif ! cargo --version >/dev/null 2>&1; then
        stop "cargo is here but does not run ($(cargo --version 2>&1 | head -1)); with rustup: rustup default stable"
    fi
    install --force-reinstall --no-deps ./rustbpe ||
        stop "rustbpe/ did not build; install Rust from https://rustup.rs and run this again"
    .venv/bin/python -c 'from tokenizer import import_rustbpe; import_rustbpe()' || stop "rustbpe/ built, but it cannot be used"
    echo "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
