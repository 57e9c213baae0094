#!/usr/bin/env bash
# The full run on one GPU: the model sees 20 tokens per parameter, the tasks one epoch.
#
#     bash run_single_a100.sh                       conservative below 80 GB of GPU memory, else aggressive
#     CONFIG=balanced bash run_single_a100.sh       one of the rows below
#     CONFIG=aggressive DATA_SHARDS=40 BASE_ITERATIONS=1000 bash run_single_a100.sh
#     PLAN=1 bash run_single_a100.sh                only say what it would do
#
# A stage that is finished is skipped and one that was interrupted goes on, so the same command
# can be given again at any time.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # typed: sh run...
set -euo pipefail
cd "$(dirname "$0")"
[ $# = 0 ] || { echo "$0: settings go in front, like CONFIG=balanced DATA_SHARDS=40 bash $0" >&2; exit 1; }

memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1) || memory=
case "$memory" in *[!0-9]*) memory=0 ;; esac      # a board that shares the computer's memory names none
if [ -z "$memory" ] && [ "${PLAN:-0}" = 0 ]; then
    echo "run_single_a100.sh: there is no NVIDIA GPU here; bash run_realistic.sh makes a tiny model on a CPU" >&2
    exit 1
fi
if [ -z "${CONFIG:-}" ]; then
    if [ "${memory:-0}" -ge 79000 ]; then CONFIG=aggressive; else CONFIG=conservative; fi
    echo "CONFIG=$CONFIG, because the GPU has ${memory:-no} MiB of memory"
fi

# what each configuration is, where it isn't set from outside; pipeline.sh says what each name means
configuration() {
    case "$CONFIG" in
        conservative) : "${DEPTH:=12}" "${MAX_SEQ_LEN:=1024}" "${TOTAL_BATCH_SIZE:=131072}" "${DATA_SHARDS:=80}" "${SAVE_EVERY:=1400}" ;;
        balanced)     : "${DEPTH:=14}" "${MAX_SEQ_LEN:=1536}" "${TOTAL_BATCH_SIZE:=262144}" "${DATA_SHARDS:=120}" "${SAVE_EVERY:=500}" ;;  # 168 rows: 258,048
        aggressive)   : "${DEPTH:=16}" "${MAX_SEQ_LEN:=2048}" "${TOTAL_BATCH_SIZE:=524288}" "${DATA_SHARDS:=160}" "${SAVE_EVERY:=180}" ;;
        maximum)      : "${DEPTH:=18}" "${MAX_SEQ_LEN:=2048}" "${TOTAL_BATCH_SIZE:=524288}" "${DATA_SHARDS:=200}" "${SAVE_EVERY:=150}" ;;
        *) echo "CONFIG=$CONFIG: must be conservative, balanced, aggressive or maximum (run_realistic.sh has the short runs)" >&2; exit 1 ;;
    esac
    : "${MAX_CHARS:=2000000000}" "${CORE_METRIC_EVERY:=2000}"
}
. ./pipeline.sh
