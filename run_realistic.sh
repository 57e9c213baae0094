#!/usr/bin/env bash
# From raw text to a chat model in one command, sized for an evening at most.
#
#     bash run_realistic.sh                      tiny where there is no GPU (minutes), demo where there is one
#     CONFIG=small bash run_realistic.sh         one of the rows below
#     CONFIG=demo DEPTH=8 bash run_realistic.sh  every value can be set from outside
#     RL=1 bash run_realistic.sh                 with reinforcement learning at its end
#     PLAN=1 bash run_realistic.sh               only say what it would do
#
# A stage that is finished is skipped and one that was interrupted goes on, so the same command
# can be given again at any time.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # typed: sh run...
set -euo pipefail
cd "$(dirname "$0")"
[ $# = 0 ] || { echo "$0: settings go in front, like CONFIG=demo DEPTH=4 bash $0" >&2; exit 1; }

if [ -z "${CONFIG:-}" ]; then
    if nvidia-smi >/dev/null 2>&1; then CONFIG=demo; echo "CONFIG=demo, because there is a GPU"
    else CONFIG=tiny; echo "CONFIG=tiny, because there is no NVIDIA GPU: embedded text, minutes on a CPU"; fi
fi

# what each configuration is, where it isn't set from outside; pipeline.sh says what each name means
of() { sed -n "s/^$2 = \([0-9]*\).*/\1/p" "config/tiny_$1.py"; }       # a value of the tiny run, whose stages have files
configuration() {
    case "$CONFIG" in
        tiny)   : "${DEPTH:=$(of base depth)}" "${MAX_SEQ_LEN:=$(of base max_seq_len)}"
                : "${TOTAL_BATCH_SIZE:=$(of base total_batch_size)}" "${SAVE_EVERY:=$(of base save_every)}"
                : "${BASE_ITERATIONS:=$(of base num_iterations)}" "${MID_ITERATIONS:=$(of mid num_iterations)}"
                : "${SFT_ITERATIONS:=$(of sft num_iterations)}" "${RL_ITERATIONS:=$(of rl num_iterations)}"
                : "${DATA_SHARDS:=0}" "${MAX_CHARS:=10000000}" "${VOCAB_SIZE:=4096}" ;;
        demo)   : "${DEPTH:=12}" "${MAX_SEQ_LEN:=1024}" "${TOTAL_BATCH_SIZE:=524288}" "${DATA_SHARDS:=10}" "${SAVE_EVERY:=300}"
                : "${BASE_ITERATIONS:=500}" "${MID_ITERATIONS:=200}" "${SFT_ITERATIONS:=100}" "${RL_ITERATIONS:=60}"
                : "${CORE_ITEMS:=100}" "${EVAL_PROBLEMS:=100}" ;;
        small)  : "${DEPTH:=14}" "${MAX_SEQ_LEN:=1536}" "${TOTAL_BATCH_SIZE:=524288}" "${DATA_SHARDS:=22}" "${SAVE_EVERY:=250}"
                : "${BASE_ITERATIONS:=2000}" "${MID_ITERATIONS:=500}" "${SFT_ITERATIONS:=200}" "${RL_ITERATIONS:=120}"
                : "${CORE_ITEMS:=250}" "${EVAL_PROBLEMS:=200}" ;;
        medium) : "${DEPTH:=16}" "${MAX_SEQ_LEN:=2048}" "${TOTAL_BATCH_SIZE:=524288}" "${DATA_SHARDS:=52}" "${SAVE_EVERY:=180}"
                : "${BASE_ITERATIONS:=5000}" "${MID_ITERATIONS:=1000}" "${SFT_ITERATIONS:=500}" "${RL_ITERATIONS:=240}"
                : "${CORE_ITEMS:=500}" "${EVAL_PROBLEMS:=500}" ;;
        *) echo "CONFIG=$CONFIG: must be tiny, demo, small or medium (run_single_a100.sh has the full runs)" >&2; exit 1 ;;
    esac
    : "${MAX_CHARS:=500000000}"
}
. ./pipeline.sh
