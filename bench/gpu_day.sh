#!/usr/bin/env bash
# Everything that only a GPU can answer, in order of worth; without one the same with toy sizes on the CPU.
#
#     bash bench/gpu_day.sh                                  all of it; by guess, 75 minutes of an H200
#     MINUTES=9 bash bench/gpu_day.sh                        begins nothing that would end later; says what is left
#     PART=fit,decode bash bench/gpu_day.sh                  some parts, by name or number: bench/day.py has the list
#     DATA=/data/nanochat OUT=results bash bench/gpu_day.sh  the stages learn from what is in DATA
#
# What OUT/results.jsonl has a result of is not measured again, so the same command goes on where a killed one was, and
# on another machine a copy of that file does. OUT gets three files: results.jsonl, table.md and log.txt, every output.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
OUT=${OUT:-$base/gpu_day}             # results, in a folder of their own
DATA=${DATA:-}                        # a folder like NANOCHAT_BASE_DIR with base_data/, and tokenizer/, task_data/ if they
                                      # are there; empty = the documentation inside this Python
if [ -z "${PYTHON:-}" ]; then         # needs the packages of pyproject.toml; rustbpe only for stages, resume, curve
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}   # set it where there is no git

# tokenizer, tokens and checkpoints go to a base folder of their own; DATA is linked into it and stays as it is
export NANOCHAT_BASE_DIR=$base/gpu_day_work/embedded
if [ -n "$DATA" ]; then
    DATA=$(cd "$DATA" && pwd) || exit 1
    if ! ls "$DATA"/base_data/shard_*.parquet >/dev/null 2>&1; then
        echo "DATA=$DATA: no base_data/shard_*.parquet in it" >&2
        exit 1
    fi
    NANOCHAT_BASE_DIR=$base/gpu_day_work/$(basename "$DATA")
    mkdir -p "$NANOCHAT_BASE_DIR/base_data"
    ln -sf "$DATA"/base_data/* "$NANOCHAT_BASE_DIR/base_data/"
    for folder in tokenizer task_data; do
        if [ -d "$DATA/$folder" ] && [ ! -e "$NANOCHAT_BASE_DIR/$folder" ]; then
            ln -s "$DATA/$folder" "$NANOCHAT_BASE_DIR/$folder"
        fi
    done
fi
gpu=0; if [ -n "${CUDA_VISIBLE_DEVICES-0}" ] && nvidia-smi >/dev/null 2>&1; then gpu=1; fi
exec "$PYTHON" -m bench.day --gpu="$gpu" --out="$OUT" --minutes="${MINUTES:-0}" --part="${PART:-}" --commit="$COMMIT" "$@"
