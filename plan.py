"""
Say what a run will be before it starts: tokens, steps, disk, memory, hours, and what would fit into a night here.

Real steps of every stage are timed on this machine, with random tokens. Without a GPU the steps are reckoned for the
card named by --gpu, from a prediction; the tiny run is made on the CPU, so it is timed there.

run     python plan.py --depth=12 --num_iterations=500
        python plan.py --gpu=H100
        CONFIG=small PLAN=1 bash run_realistic.sh
"""
import difflib
import math
import os
import re
import subprocess
from types import SimpleNamespace

from plumbing import stop
from plumbing.budget import (CARD_GB, CPU_BYTES, KEEP, SHARD_BYTES, SHARD_TOKENS, card_bytes, checkpoint_bytes,
                             flops_per_token, largest_depth, micro_batch, model_shape, num_params, peak_bytes, peak_flops,
                             rows_per_step, usable_bytes)
from plumbing.common import ROOT, base_path, duration
from plumbing.configurator import configure

depth = 12                     # layers
head_dim = 0                   # 0 = 128, or 64 at odd depths
max_seq_len = 1024             # tokens in a row
total_batch_size = 524288      # tokens per optimizer step
num_iterations = 0             # base steps; 0 = target_param_data_ratio tokens per parameter
target_param_data_ratio = 20.0
mid_iterations = 0             # 0 = one epoch, about 0.4 billion tokens
sft_iterations = 0             # 0 = one epoch, about 720 steps of 32 conversations
rl = False                     # 1 = reinforcement learning after it
rl_iterations = 0              # 0 = one epoch of GSM8K, 467 steps of 16 problems with 16 answers to each
num_shards = 0                 # shards of text to download
vocab_size = 65536
device_batch_size = 0          # rows per micro-batch; 0 = the most that fit
sft_batch_size = 4             # conversations per micro-batch of fine-tuning; 0 = the most that fit
core_metric_every = 0          # steps between evaluations of CORE while training; 0 = never
core_items = 0                 # items of each CORE task after it; 0 = all
eval_problems = 0              # problems of each chat task; 0 = all
num_processes = 1              # GPUs
gradient_checkpointing = False # 1 = less memory, slower
tiny = False                   # 1 = the tiny run: no download, short tests, on a CPU where there is no GPU
gpu = ""                       # a card that is not here, to reckon for: A100, "A100 80GB", H100; "" = what is here
measure = True                 # 0 = only what needs no step to be timed
known = ""                     # names of the drivers' variables, for the next one
given = ""                     # names of the variables that are set; one that is nearly a known name ends the run
config = configure(globals(), show=False)
stop.listen()

NAMES = dict(base="pretraining", mid="mid-training", sft="fine-tuning", rl="reinforcement", report="report, questions")
PROGRAMS = dict(base=3, mid=3, sft=2, rl=2, report=3)       # that a stage starts: to train, to test, to ask questions
SHARD_DISK = SHARD_BYTES + 2 * SHARD_TOKENS           # the parquet file and its tokens
TASK_DISK = 1.6e9              # conversations and questions, and the tokens made from them
CORE_ITEMS = 91037             # in 22 tasks
CORE_TOKENS = 600              # that one is read in: 530 in rows of 1,024, 725 in rows of 2,048
MID_EPOCH = 0.4e9              # tokens of mid-training's conversations
SFT_EPOCH, RL_EPOCH = 720, 467  # steps of fine-tuning, and of reinforcement learning
# What the stages read. Measured 2026-11, of the tiny run on its own conversations, of the others on real ones but for
# SmolTalk's, which were not at hand: they are taken to have 700 tokens, with which fine-tuning's have 400 on average.
DATA = dict(
    tiny=dict(mid_scored=0.61,                        # share of the tokens that are scored: what the assistant says
              sft_row=141, sft_scored=0.17,           # a conversation filled up to its micro-batch's longest; likewise
              bpb=0.06, last_bpb=dict(base=222e3, mid=12e3),    # tokens evaluated, per token trained and at the end
              sft_every=15, sft_val=100,              # steps between evaluations of fine-tuning, conversations in one
              quick=0,                                # answers written in each of its tests
              answers=(18, 200, 100), longest=54,     # chat_eval.py's questions; tokens of the longest answer of 16
              rl=dict(answers=128, row=170, longest=140, cost=12.0, every=20, tested=400)),    # see RL
    full=dict(mid_scored=0.62, sft_row=800, sft_scored=0.3, bpb=0.02, last_bpb=dict(base=3 * 10485760, mid=10485760),
              sft_every=100, sft_val=400, quick=400, answers=(1319, 164, 256, 200, 18), longest=400,
              rl=dict(answers=256, row=320, longest=256, cost=2.0, every=60, tested=3200)))
# rl: answers in a step, tokens in the rows that are trained on, of the longest answer of a step; what a pass over all its
# answers costs, in passes over 16 (measured for the tiny run, whose CPU spends most on random numbers; for a GPU assumed: it
# is busy starting kernels); steps between evaluations, and answers in one.
# Share of its bf16 peak that a training step reaches, PREDICTED from the code that is generated for d12 (d18: 4 more),
# right to 15 %; for any other card the lowest.
PREDICTED_MFU = {"A100": 0.69, "A800": 0.69, "H200": 0.53, "H100": 0.47, "RTX 4090": 0.72}


def misspelt(given, known):
    """(name, the known name it was meant to be) of a variable that is nearly one of the drivers', or None."""
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85) \
            or [other for other in known if len(other) > 3 and sorted(other) == sorted(name.upper())]      # DEPHT
        if near and near[0] not in ("PLAN", "PYTHON") and not name.startswith("WANDB_"):     # these have many of their own
            return name, near[0]


def gpu_here():
    """(name, bytes of memory) of the first NVIDIA GPU, or ("", 0)."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        name, megabytes = lines[0].split(", ")
        megabytes = int(megabytes) if megabytes.isdigit() else 0     # a board that shares the computer's memory names none
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return "", 0
    return name, (megabytes * 2 ** 20 or card_bytes(name))


def configurations():
    """{CONFIG: the flags that the drivers give this script}, asked of the drivers, which have the tables."""
    found = {}
    for driver in ("run_realistic.sh", "run_single_a100.sh"):
        with open(os.path.join(ROOT, driver), encoding="utf-8") as f:
            names = re.findall(r"^ +(\w+)\) +:", f.read(), re.MULTILINE)
        for name in names:                           # without what is set from outside for the run that is planned
            unset = [f"-u{variable}" for variable in ("NNODES", "NODE_RANK", *known.split())]
            ask = ["env", *unset, f"CONFIG={name}", "PLAN=flags", "bash", driver]
            lines = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
            found[name] = [line for line in lines if line.startswith("--")]
    return found


def data_of(k):
    """What a run with the knobs k reads."""
    return DATA["tiny" if k.tiny else "full"]


def model_of(k):
    """What a GPTConfig says, for the knobs k; without torch."""
    return SimpleNamespace(sequence_len=k.max_seq_len, vocab_size=k.vocab_size, **model_shape(k.depth, k.head_dim))


def stages(k):
    """{stage: (steps, tokens in a step, tokens that are only scored)} of a run with the knobs k."""
    data, step = data_of(k), rows_per_step(k.total_batch_size, k.max_seq_len) * k.max_seq_len
    base = k.num_iterations or max(1, round(k.target_param_data_ratio * num_params(model_of(k))["total"] / step))
    mid, sft = k.mid_iterations or max(1, round(MID_EPOCH / step)), k.sft_iterations or SFT_EPOCH
    row = min(data["sft_row"], k.max_seq_len)
    # bits per byte while training; at its end of at most a tenth as much, and once more of two texts; CORE
    scored = {stage: step * n * data["bpb"] + min(data["last_bpb"][stage], step * n * most)
              for stage, n, most in (("base", base, 0.3), ("mid", mid, 0.1))}
    if not k.tiny:
        evaluations = base // k.core_metric_every if k.core_metric_every else 0
        scored["base"] += CORE_TOKENS * (min(CORE_ITEMS, 22 * k.core_items or CORE_ITEMS) + evaluations * 22 * 500)
    found = dict(base=(base, step, scored["base"]), mid=(mid, step, scored["mid"]),
                 sft=(sft, 32 * row, (sft // data["sft_every"] + 1) * data["sft_val"] * row))
    if k.rl:
        found["rl"] = k.rl_iterations or RL_EPOCH, data["rl"]["answers"] * min(data["rl"]["row"], k.max_seq_len), 0
    return found | dict(report=(0, 0, 0))


def answer_passes(k, stage):
    """Passes over one token of 16 answers that the tests of a stage take."""
    if stage not in ("mid", "sft", "rl"):
        return 0
    data, most = data_of(k), k.max_seq_len // 2      # tokens that an answer may have
    batches = sum(-(-min(n, k.eval_problems or n) // 16) for n in data["answers"])
    passes = batches * min(data["longest"], most)
    if stage == "sft":                               # its tests while training
        passes += (stages(k)["sft"][0] // 200 + 1) * -(-data["quick"] // 16) * 128
    if stage == "rl":                                # the answers that it learns from, and those of its evaluations
        rl, steps = data["rl"], stages(k)["rl"][0]
        drawn = steps + (steps // rl["every"] + 2) * rl["tested"] / rl["answers"]      # as many as in so many steps
        passes += drawn * min(rl["longest"], most) * rl["cost"]
    return passes


def seconds(k, speed):
    """
    {stage: (seconds of training, of all else)} with the knobs k.

    speed  of one device, dict(base, mid, sft, score, score_sft: FLOP/s, the last two of evaluations; answer: seconds
           of a pass per layer; start: of a program; begin: of each stage before its first step)
    """
    flops, result = flops_per_token(model_of(k)), {}
    for stage, (steps, step_tokens, scored) in stages(k).items():
        training = steps * step_tokens * flops / speed.get("sft" if stage == "rl" else stage, 1.0) / k.num_processes
        score = speed["score_sft" if stage == "sft" else "score"]
        tests = scored * flops / 3 / score + answer_passes(k, stage) * speed["answer"] * k.depth
        result[stage] = training, tests / k.num_processes + PROGRAMS[stage] * speed["start"] + speed["begin"][stage]
    return result


def predicted(name):
    """(speed of a card that is not measured, see seconds(); the share of its peak that is reckoned with)."""
    mfu = next((mfu for card, mfu in PREDICTED_MFU.items() if card in name), min(PREDICTED_MFU.values()))
    speed = mfu * peak_flops(name)
    # assumed: what is not compiled, or small, is half as fast; a layer's 20 kernels for one token take 20 microseconds
    # each to be started from Python, a program 10 seconds, compiling and fitting the micro-batch 90
    return dict(base=speed, mid=speed, sft=speed / 2, score=speed / 2, score_sft=speed / 2, answer=4e-4, start=10.0,
                begin=dict(base=90.0, mid=90.0, sft=20.0, rl=20.0, report=0.0)), mfu


def memory_of(k, gpu_bytes):
    """
    (rows of a micro-batch, bytes of memory) of a training step with the knobs k, on a GPU or (0 bytes) a CPU.

    Where not one row fits gradient checkpointing goes on, as it does in training.
    """
    rows, model, value = rows_per_step(k.total_batch_size, k.max_seq_len), model_of(k), 2 if gpu_bytes else 4
    free = usable_bytes(gpu_bytes) if gpu_bytes else CPU_BYTES
    for checkpointing in (k.gradient_checkpointing, True):
        B = micro_batch(rows, k.num_processes, k.device_batch_size, free, model, value, checkpointing)
        need = peak_bytes(model, B, value, checkpointing)
        if fits(need, gpu_bytes):
            break
    return B, need


def fits(need, gpu_bytes):
    """Whether so many bytes find room on a card of gpu_bytes; a CPU (0 bytes) has what it needs."""
    return not gpu_bytes or need < gpu_bytes


def show_times(k, speed):
    """The stages as a table; without the columns of times where the speed is not known (None)."""
    times = seconds(k, speed) if speed else {}
    print(f"  {'':18}{'steps':>7}{'tokens a step':>15}{'in all':>9}" + (f"{'training':>10}{'the rest':>10}" if speed else ""))
    for stage, (steps, tokens, _) in stages(k).items():
        training, rest = map(duration, times[stage]) if speed else ("", "")
        size = f"{steps:>7,}{tokens:>15,}{steps * tokens / 1e6:>8,.1f}M{training:>10}" if steps else " " * 41
        if steps or speed:                           # the report has no steps, only a time
            print(f"  {NAMES[stage]:18}{size}{rest:>10}".rstrip())


def show_choices(speed, gpu_bytes):
    """Which rows of the drivers' tables would fit into some hours, at the speed of the model that was planned."""
    hours = {}
    for name, flags in configurations().items():
        knobs = configure(dict(config, __file__=__file__), flags, show=False)
        k = SimpleNamespace(**knobs | dict(num_processes=num_processes))
        if rows_per_step(k.total_batch_size, k.max_seq_len) < num_processes:
            continue
        took = sum(map(sum, seconds(k, speed).values())) / 3600
        B, need = memory_of(k, gpu_bytes)
        hours[name] = took if fits(need, gpu_bytes) else math.inf
        how = f"{B} rows at a time" if fits(need, gpu_bytes) else "too much"
        print(f"  CONFIG={name:13}d{k.depth:<3}{took:>9,.1f} h{need / 1e9:>7.1f} GB, {how}")
    for limit in (1, 4, 12, 24):
        print(f"  in {limit:>2} h: {', '.join(name for name, h in hours.items() if h <= limit) or 'none of them'}")


if wrong := misspelt(given.split(), known.split()):
    raise SystemExit(f"{wrong[0]} is set, which nothing reads: did you mean {wrong[1]}? (unset {wrong[0]} to go on without)")
if gpu and not (peak_flops(gpu) and card_bytes(gpu)):
    raise SystemExit(f"gpu={gpu}: must be one of {', '.join(CARD_GB)}; 'A100 80GB' is one of that size")
k = SimpleNamespace(**config)
here, gpu_bytes = gpu_here()
steps, step_tokens, _ = stages(k)["base"]
params, tokens = num_params(model_of(k))["total"], steps * step_tokens
checkpoints = ((3 + rl) * KEEP + 1) * checkpoint_bytes(model_of(k))     # of each stage, and the one being written
disk = (num_shards * SHARD_DISK + TASK_DISK if num_shards else 0) + checkpoints
print(f"plan: d{depth}, {params / 1e6:.1f}M parameters, rows of {max_seq_len:,} tokens, vocabulary {vocab_size:,}")
print(f"  tokens  base {tokens / 1e6:,.1f}M, {tokens / params:.1f} per parameter"
      + (f"; {num_shards} shards hold about {num_shards * SHARD_TOKENS / 1e6:,.0f}M" if num_shards else ""))
print(f"  disk    about {disk / 1e9:.1f} GB in {base_path()}")

card, speed, where = gpu or here or ("" if tiny else "A100"), None, ""
if measure and not gpu and (here or tiny):
    try:
        import torch

        from bench.steps import measure as measured
        if here and not torch.cuda.is_available():
            raise OSError("there is a GPU, but this torch can't use it")
        print("timing real steps of every stage ...", flush=True)
        share = -(-rows_per_step(total_batch_size, max_seq_len) // num_processes)
        batch, sft_batch = (share, device_batch_size), (-(-32 // num_processes), sft_batch_size)
        speed, B, need = measured(vars(model_of(k)), batch, sft_batch, data_of(k), gradient_checkpointing)
        where = "measured" + (f" on one, reckoned for {num_processes}" if num_processes > 1 else "")
    except Exception as error:                       # no torch yet, another than ours, or a broken one
        print(f"  not measured: {(str(error) or repr(error)).splitlines()[0]:.80}")
if not speed and peak_flops(card):
    speed, mfu = predicted(card)
    gpu_bytes = gpu_bytes if card == here else card_bytes(card)
    B, need = memory_of(k, gpu_bytes)
    where = f"PREDICTED for {num_processes} x {card} ({gpu_bytes / 1e9:.0f} GB) at {100 * mfu:.0f} % of its peak" + (
        "" if here else ", there is no GPU here (PLAN= or --gpu= names another card)")
if speed:
    remedy = f"a shorter MAX_SEQ_LEN, or DEPTH={largest_depth(usable_bytes(gpu_bytes), model_of(k), 2)} or less"
    if B > 1:
        remedy = "a lower DEVICE_BATCH_SIZE, or 0, which finds what fits"
    print(f"  memory  {need / 1e9:.1f} GB, " + (
        f"in micro-batches of {B} rows" if fits(need, gpu_bytes) else f"which the card has not: take {remedy}"))
    total = sum(map(sum, seconds(k, speed).values()))
    print(f"  time    {duration(total)}, {where}; set-up, downloads and tokenizer on top")
else:
    print("  time    PLAN=1 measures it, once set-up is done")
show_times(k, speed)
if speed and measure:
    show_choices(speed, gpu_bytes)
