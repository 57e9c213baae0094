#!/usr/bin/env bash
# From raw text to a chat model in one command, sized for an evening at most.
#
#     bash run_realistic.sh                      tiny where there is no GPU (minutes), demo where there is one
#     CONFIG=small bash run_realistic.sh         one of the rows below
#     CONFIG=demo DEPTH=8 bash run_realistic.sh  every value can be set from outside
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

#          layers  tokens   tokens of  steps              shards     characters  tokens in    steps between  evaluated: items of a
#                  in a row one step   base   mid   sft   of text    for the tokenizer        checkpoints    CORE task, problems
case "$CONFIG" in
    tiny)   set --  2   256     2048    800  1200    60     0          10000000    4096    200              0    0 ;;
    demo)   set -- 12  1024   524288    500   200   100    10         500000000   65536    300            100  100 ;;
    small)  set -- 14  1536   524288   2000   500   200    22         500000000   65536    250            250  200 ;;
    medium) set -- 16  2048   524288   5000  1000   500    52         500000000   65536    180            500  500 ;;
    *) echo "CONFIG=$CONFIG: must be tiny, demo, small or medium (run_single_a100.sh has the full runs)" >&2; exit 1 ;;
esac
. ./pipeline.sh
