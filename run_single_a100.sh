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
[ $# = 0 ] || { echo "$0: settings go in front, like CONFIG=demo DEPTH=4 bash $0" >&2; exit 1; }

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

#          layers  tokens   tokens of  steps (0: 20 tokens  shards     characters  tokens in    steps between  evaluated: items of a
#                  in a row one step   a parameter, 1 epoch) of text   for the tokenizer        checkpoints    CORE task, problems
case "$CONFIG" in   #                  base   mid   sft                                                     (0: all)
    conservative) set -- 12 1024 131072    0     0     0    80        2000000000   65536   1400              0    0 ;;
    balanced)     set -- 14 1536 262144    0     0     0   120        2000000000   65536    500              0    0 ;;  # 168 rows: 258,048
    aggressive)   set -- 16 2048 524288    0     0     0   160        2000000000   65536    180              0    0 ;;
    maximum)      set -- 18 2048 524288    0     0     0   200        2000000000   65536    150              0    0 ;;
    *) echo "CONFIG=$CONFIG: must be conservative, balanced, aggressive or maximum (run_realistic.sh has the short runs)" >&2; exit 1 ;;
esac
CORE_METRIC_EVERY=${CORE_METRIC_EVERY:-2000}
. ./pipeline.sh
