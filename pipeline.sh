# The stages in order, for both drivers, which set CONFIG, define the table of values and source this file.
# Each stage decides by itself whether it is finished, has to go on or begins; see checkpoint.py.
[ -n "${CONFIG:-}" ] || { echo "pipeline.sh: it is a part of the drivers; run: bash run_realistic.sh" >&2; exit 1; }

# what may be set from outside: what is set is said, and plan.py refuses a name that is nearly one of these
VARIABLES="CONFIG DEPTH MAX_SEQ_LEN TOTAL_BATCH_SIZE BASE_ITERATIONS MID_ITERATIONS SFT_ITERATIONS DATA_SHARDS MAX_CHARS
    VOCAB_SIZE SAVE_EVERY CORE_METRIC_EVERY CORE_ITEMS EVAL_PROBLEMS DEVICE_BATCH_SIZE SFT_BATCH_SIZE GRADIENT_CHECKPOINTING
    MODEL_TAG BASE_TAG RL RL_ITERATIONS NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT WANDB_RUN NANOCHAT_BASE_DIR
    NANOCHAT_MIRROR HF_ENDPOINT PLAN PYTHON"
printf 'settings:'
for name in $VARIABLES; do
    if [ -n "${!name:-}" ]; then printf ' %s=%s' "$name" "${!name}"; fi
done
echo

case "${NPROC:-1}${NNODES:-1}${NODE_RANK:-0}" in
    *[!0-9]*) echo "NPROC, NNODES and NODE_RANK must be whole numbers" >&2; exit 1 ;;
esac
if [ "${NNODES:-1}" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "NNODES=$NNODES: MASTER_ADDR must name the first machine, NODE_RANK say which this one is (0, 1, ...)" >&2
    exit 1
fi
if [ "$((10#${NODE_RANK:-0}))" -ge "$((10#${NNODES:-1}))" ]; then
    echo "NODE_RANK=$NODE_RANK: the first of NNODES=${NNODES:-1} machines is 0, so it must be below that" >&2
    exit 1
fi
case "${RL:-0}" in 0|1) ;; *) echo "RL=$RL: must be 1, reinforcement learning after fine-tuning, or 0" >&2; exit 1 ;; esac
configuration                         # the driver's table: the values of $CONFIG
# DEPTH                                 layers; the one dial of model size
# MAX_SEQ_LEN                           tokens in a row, and the context of the chat
# TOTAL_BATCH_SIZE                      tokens in an optimizer step
# DATA_SHARDS                           training shards to download, 95 MB each
# SAVE_EVERY                            steps between checkpoints: about 15 minutes of an A100, half a minute of a tiny run
# MAX_CHARS                             the tokenizer is trained on so many characters
: "${VOCAB_SIZE:=65536}"                # tokens in the vocabulary
: "${BASE_ITERATIONS:=0}"               # optimizer steps; 0 = 20 tokens per parameter
: "${MID_ITERATIONS:=0}" "${SFT_ITERATIONS:=0}"    # 0 = one epoch of the mixture
: "${RL:=0}" "${RL_ITERATIONS:=0}"      # 1 = reinforcement learning after fine-tuning; its steps, 0 = one epoch of GSM8K
: "${CORE_METRIC_EVERY:=0}"             # steps between evaluations of CORE while training; 0 = never
: "${CORE_ITEMS:=0}"                    # items of each CORE task; 0 = all
: "${EVAL_PROBLEMS:=0}"                 # problems of each chat task; 0 = all
: "${DEVICE_BATCH_SIZE:=0}"             # rows per micro-batch; 0 = the most that fit
: "${SFT_BATCH_SIZE:=}"                 # conversations per micro-batch; empty = 4, in tiny the most that fit
: "${GRADIENT_CHECKPOINTING:=0}"        # 1 = less memory, slower
: "${NPROC:=1}"                         # GPUs of this machine, or processes on a CPU
: "${NNODES:=1}" "${NODE_RANK:=0}"      # machines, and which of them this is: 0 is the first
: "${MASTER_ADDR:=}" "${MASTER_PORT:=29500}"    # where the machines meet: the first one's address
: "${WANDB_RUN:=}"                      # name of the run in wandb; empty = log.jsonl alone
: "${MODEL_TAG:=d$DEPTH}"               # folder of the checkpoints: another one trains beside the first
: "${BASE_TAG:=$MODEL_TAG}"             # folder of the base model; set both to go on from a base model that is there

# its own tokenizer and text for the tiny model, so that a later demo run does not find them in its way
if [ "$CONFIG" = tiny ]; then NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-~/.cache/nanochat/tiny}; fi
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-~/.cache/nanochat}
case "$NANOCHAT_BASE_DIR" in
    /*) ;;
    "~"|"~/"*) home=~; NANOCHAT_BASE_DIR=$home${NANOCHAT_BASE_DIR#"~"} ;;      # given in quotes, as the stages read it
    *) NANOCHAT_BASE_DIR=$OLDPWD/$NANOCHAT_BASE_DIR ;;                 # where the driver was called
esac

# what plan.py needs to know; with PLAN=flags it asks for them itself, for each row of the drivers' tables
plan_flags=(--depth="$DEPTH" --max_seq_len="$MAX_SEQ_LEN" --total_batch_size="$TOTAL_BATCH_SIZE" --vocab_size="$VOCAB_SIZE"
    --num_iterations="$BASE_ITERATIONS" --mid_iterations="$MID_ITERATIONS" --sft_iterations="$SFT_ITERATIONS"
    --num_shards="$DATA_SHARDS" --num_processes="$((10#$NPROC * 10#$NNODES))" --gradient_checkpointing="$GRADIENT_CHECKPOINTING"
    --device_batch_size="$DEVICE_BATCH_SIZE" --sft_batch_size="${SFT_BATCH_SIZE:-4}" --core_metric_every="$CORE_METRIC_EVERY"
    --core_items="$CORE_ITEMS" --eval_problems="$EVAL_PROBLEMS" --rl="$RL" --rl_iterations="$RL_ITERATIONS")
if [ "$CONFIG" = tiny ]; then plan_flags+=(--tiny=1 --head_dim="$(of base head_dim)" --sft_batch_size="${SFT_BATCH_SIZE:-0}"); fi
plan() { "$1" plan.py "${plan_flags[@]}" --known="$VARIABLES" --given="$(compgen -e)" "${@:2}"; }
# a CPU thread that has nothing to do looks for work some microseconds long, then sleeps: sleeping at once makes a step
# 1.4 times slower on a quiet machine; for a busy one plumbing/machine.py finds by timing that one thread is faster than two
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} PYTHONUNBUFFERED=1
# s: torchrun's patience with ranks that finish a step and save; torch 2.11 knows only its own 30. And where ranks do not
# come together, the one line of plumbing/launch.py instead of 40 of torch's inside
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-FATAL}

# Ctrl-C, kill and a closed terminal: what runs is told to save and end, a second time it has to; the code is a shell's
# for the signal
child= downloads= told= told_at=0
tell() {
    if [ -n "$told" ] && [ $((SECONDS - told_at)) -lt 2 ]; then return; fi      # the same signal, by another way
    if [ -n "$told" ]; then                                                     # with torchrun's ranks
        kill -KILL $(ps -o pid= --ppid "$child" 2>/dev/null) "$child" 2>/dev/null || true
    fi
    told=$1 told_at=$SECONDS
    if [ -z "$child" ]; then exit "$told"; fi
    kill -TERM "$child" 2>/dev/null || true
}
ended() {
    local code=${told:-$1}
    kill $(jobs -p) 2>/dev/null || true
    if [ "$code" -ge 128 ] && [ "$code" != 141 ]; then            # 141: whoever read this has gone
        echo "pipeline: ended with code $code; the same command goes on" >&2 || true
    fi
    exit "$code"
}
trap 'tell 130' INT; trap 'tell 143' TERM; trap 'tell 129' HUP; trap 'ended $?' EXIT

# before anything is downloaded; it needs a Python but no packages, and with torch it can time steps
case "${PLAN:-0}" in
    0) how=(--measure=0) ;;
    flags) printf '%s\n' "${plan_flags[@]}"; exit 0 ;;
    1) how=(--measure=1) ;;
    *) how=(--gpu="$PLAN") ;;         # the name of a card that is not here
esac
if [ "${PLAN:-0}" != 0 ] && [ -x .venv/bin/python ]; then plan .venv/bin/python "${how[@]}"
elif python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then plan python3 "${how[@]}"
else . ./setup.sh; plan python "${how[@]}"; fi
if [ "${PLAN:-0}" != 0 ]; then exit 0; fi
if [ "$BASE_TAG" != "$MODEL_TAG" ] && [ ! -d "$NANOCHAT_BASE_DIR/base_checkpoints/$BASE_TAG" ]; then
    echo "BASE_TAG=$BASE_TAG: there is no base model of that name in $NANOCHAT_BASE_DIR/base_checkpoints, to go on from" >&2
    exit 1
fi

. ./setup.sh
if [ "$CONFIG" != tiny ] && nvidia-smi >/dev/null 2>&1 &&
        ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "pipeline: there is a GPU, but this torch can't use it; update the NVIDIA driver," \
        "or install a torch built for it into .venv" >&2
    exit 1
fi
# one driver in a folder: the lock belongs to this shell, and is free when it ends, however it ends
if [ "$NODE_RANK" = 0 ]; then
    { mkdir -p "$NANOCHAT_BASE_DIR" && [ -w "$NANOCHAT_BASE_DIR" ]; } 2>/dev/null ||
        { echo "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR: can't be written; name a folder that can" >&2; exit 1; }
    exec 9<>"$NANOCHAT_BASE_DIR/.lock"
    python -c 'import sys; from plumbing.stop import only_one; only_one(sys.argv[1], open(9, "r+"), sys.argv[2])' \
        "$NANOCHAT_BASE_DIR/.lock" $$
fi
if [ "$CONFIG" = tiny ]; then
    base_flags=(config/tiny_base.py) mid_flags=(config/tiny_mid.py) rl_flags=(config/tiny_rl.py)
    sft_flags=(config/tiny_sft.py ${SFT_BATCH_SIZE:+"--device_batch_size=$SFT_BATCH_SIZE"})
    base_tests=(--tasks=bpb,samples) chat_tests=(--embedded=1 --max_tokens=160) references=    # tests of its own, no download
else
    base_flags=(--core_metric_every="$CORE_METRIC_EVERY") mid_flags=(--embedded=0) rl_flags=(--task=gsm8k)
    sft_flags=(--device_batch_size="${SFT_BATCH_SIZE:-4}")
    base_tests=(--core_max_per_task="$CORE_ITEMS") chat_tests=(--max_problems="$EVAL_PROBLEMS") references=gpt2,cl100k_base
fi
# every command is shown as it can be typed; what is no training runs on the first machine alone, in the folder all of them see
show() { printf '$'; printf ' %q' "$@"; echo; }
run() { if [ "$NODE_RANK" = 0 ]; then show "$@"; follow "$@"; fi; }
# in the background, so that this shell hears signals at once; 9 is its lock, not the command's
follow() {
    local code
    "$@" 9>&- & child=$!
    while true; do                                    # a signal ends the wait alone
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    if [ -n "$told" ]; then exit "$told"; fi
    return "$code"
}
# the launcher of the training stages: torchrun only where there are several processes; what follows -- is not for it
if [ "$NNODES" = 1 ] && [ "$NPROC" = 1 ]; then launcher=(python)
elif [ "$NNODES" = 1 ]; then launcher=(python -m plumbing.launch --standalone --nproc_per_node="$NPROC" --)
else
    launcher=(python -m plumbing.launch --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC"
              --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --rdzv_conf=timeout=3600 --)   # the others wait an hour
fi
launch() { show "${launcher[@]}" "$@"; follow "${launcher[@]}" "$@"; }
# the same question after each stage: a base model goes on with it, mid-training teaches to answer
ask() { run python chat_cli.py -i "$1" --model_tag="$2" --max_tokens=48 -p "${3:-Who are you?}"; }
printf '$ source .venv/bin/activate; export NANOCHAT_BASE_DIR=%q\n' "$NANOCHAT_BASE_DIR"
# a headline per stage, and how long each one took, for the end
times=("$(printf '%6d s  set-up' "$SECONDS")") name= begin=$SECONDS
stage() {
    if [ -n "$name" ]; then times+=("$(printf '%6d s  %s' $((SECONDS - begin)) "$name")"); fi
    name=$1 begin=$SECONDS
    if [ -n "$name" ]; then printf '\n=== %s\n' "$name"; fi
}

stage "1. text"
if [ "$CONFIG" = tiny ]; then
    run python prepare.py --embedded=1
elif [ "$NODE_RANK" = 0 ]; then
    show python prepare.py -n "$DATA_SHARDS" --tasks=1
    python prepare.py -n "$DATA_SHARDS" --tasks=1 9>&- &     # goes on while the tokenizer and the model train
    downloads=$!
fi

stage "2. tokenizer"
run python tok_train.py --max_chars="$MAX_CHARS" --vocab_size="$VOCAB_SIZE" --num_shards="$DATA_SHARDS"
run python tok_eval.py --references="$references" --resume=1

stage "3. pretraining: the next token of plain text"
launch base_train.py "${base_flags[@]}" --model_tag="$BASE_TAG" --depth="$DEPTH" --max_seq_len="$MAX_SEQ_LEN" \
    --total_batch_size="$TOTAL_BATCH_SIZE" --num_iterations="$BASE_ITERATIONS" --num_shards="$DATA_SHARDS" \
    --device_batch_size="$DEVICE_BATCH_SIZE" --gradient_checkpointing="$GRADIENT_CHECKPOINTING" \
    --save_every="$SAVE_EVERY" --run="$WANDB_RUN" --resume=1
launch base_eval.py --model_tag="$BASE_TAG" --resume=1 --device_batch_size="$DEVICE_BATCH_SIZE" "${base_tests[@]}"
ask base "$BASE_TAG"

if [ -n "$downloads" ]; then
    wait "$downloads" || { echo "pipeline: the downloads failed, see above; run again to go on" >&2; exit 1; }
    downloads=
fi

stage "4. mid-training: the chat format and many small tasks"
launch mid_train.py "${mid_flags[@]}" --source_tag="$BASE_TAG" --model_tag="$MODEL_TAG" --num_iterations="$MID_ITERATIONS" \
    --device_batch_size="$DEVICE_BATCH_SIZE" --gradient_checkpointing="$GRADIENT_CHECKPOINTING" \
    --save_every="$SAVE_EVERY" --run="$WANDB_RUN" --resume=1
launch chat_eval.py --source=mid --model_tag="$MODEL_TAG" --resume=1 "${chat_tests[@]}"
ask mid "$MODEL_TAG"

stage "5. fine-tuning: answers"
launch chat_sft.py "${sft_flags[@]}" --source_tag="$MODEL_TAG" --model_tag="$MODEL_TAG" --num_iterations="$SFT_ITERATIONS" \
    --gradient_checkpointing="$GRADIENT_CHECKPOINTING" \
    --save_every="$SAVE_EVERY" --run="$WANDB_RUN" --resume=1
launch chat_eval.py --source=sft --model_tag="$MODEL_TAG" --resume=1 "${chat_tests[@]}"

last=sft
if [ "$RL" = 1 ]; then
    last=rl
    stage "6. reinforcement learning: what was right becomes likelier"
    launch chat_rl.py "${rl_flags[@]}" --source_tag="$MODEL_TAG" --model_tag="$MODEL_TAG" --num_iterations="$RL_ITERATIONS" \
        --gradient_checkpointing="$GRADIENT_CHECKPOINTING" --run="$WANDB_RUN" --resume=1
    launch chat_eval.py --source=rl --model_tag="$MODEL_TAG" --resume=1 "${chat_tests[@]}"
fi

stage "$((6 + RL)). report and first questions"
run python report.py --model_tag="$MODEL_TAG"
ask "$last" "$MODEL_TAG"
ask "$last" "$MODEL_TAG" "Spell the word 'garden'"
stage ""
printf '\n'; printf '%s\n' "${times[@]}"; printf '%6d s  in all\n\n' "$SECONDS"
printf 'Talk to it:   NANOCHAT_BASE_DIR=%q .venv/bin/python chat_cli.py -i %s --model_tag=%q\n' \
    "$NANOCHAT_BASE_DIR" "$last" "$MODEL_TAG"
printf 'in a browser: NANOCHAT_BASE_DIR=%q .venv/bin/python chat_web.py\n' "$NANOCHAT_BASE_DIR"
