#!/usr/bin/env bash
# All tests, set-up included:   bash run_tests.sh          (arguments go to pytest: -k tokenizer)
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
if command -v cargo >/dev/null; then
    cargo test --quiet --manifest-path rustbpe/Cargo.toml    # the crate's own tests
fi
python -m pytest "$@"
