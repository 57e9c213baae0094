"""
Evaluate the base model: bits per byte, samples of text, and CORE.

reads   base_checkpoints/<model_tag>/, tokenizer/, base_data/, eval_bundle/ (fetched, 162 MB)
writes  base_checkpoints/<model_tag>/eval.json, and core.csv beside it
run     python base_eval.py
        python base_eval.py -a bpb,samples            what needs no download
        python base_eval.py --core_max_per_task=100   a rough CORE
        torchrun --standalone --nproc_per_node=2 base_eval.py
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import math
import os
import time

import torch

from checkpoint import find_checkpoint, load_model, sha_of
from data import VAL_SHARD, shard_path, text_streams
from evals.core import evaluate_core, fetch_bundle, gpt2_scores
from evals.metrics import evaluate_bpb, print_samples
from evals.saved import read_results, write_results
from plumbing.budget import eval_rows
from plumbing.common import RANK, atomic_write, base_path, duration, print0
from plumbing.configurator import configure
from plumbing.machine import finish, start

tasks = "bpb,samples,core"     # -a: what to evaluate
model_tag = ""                 # which model, like d12; "" = the only one there is
step = 0                       # training step of the checkpoint; 0 = the newest
eval_tokens = 10485760         # tokens scored of each text (20 x 524,288); at most, and for 0, a tenth of those trained
device_batch_size = 0          # rows of text read at a time; 0 = as in training
core_max_per_task = 0          # items of each CORE task; 0 = all, 91,000 in 22 tasks
resume = 0                     # 1 = keep what eval.json already has of this checkpoint and these settings
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
config = configure(globals())  # python base_eval.py config/x.py --core_max_per_task=500

SETTINGS = dict(bpb=dict(eval_tokens=eval_tokens), samples=dict(), core=dict(max_per_task=core_max_per_task))

parts = [part.strip() for part in tasks.split(",")]
if set(parts) - set(SETTINGS):
    raise SystemExit(f"tasks={tasks}: must be some of {','.join(SETTINGS)}")

folder, meta = find_checkpoint("base", model_tag, step)
machine = start(device, dtype, meta)
model, tokenizer = load_model(folder, meta, machine)
path = os.path.join(folder, "eval.json")

# results of the same weights stay; what is evaluated now takes the place of its part
fresh = dict(step=meta["step"], checkpoint=sha_of(meta), settings={}, seconds={})
results = fresh | read_results(path, checkpoint=sha_of(meta))
if resume:
    parts = [part for part in parts if results["settings"].get(part) != SETTINGS[part]]
    if not parts:
        print0(f"base_eval: finished already, see {path}")
        finish()
        raise SystemExit(0)


def keep(part, seconds, **values):
    """Add one part's numbers to eval.json at once: what comes after may fail."""
    results.update(values)
    results["settings"][part], results["seconds"][part] = SETTINGS[part], round(seconds, 1)
    write_results(path, results)
    print0(f"{part}: {duration(seconds)}")


print0(f"{folder}, step {meta['step']}, on {machine.name} in {machine.dtype_name}")
if "core" in parts:
    bundle = fetch_bundle()                  # before anything else: it may fail

if "bpb" in parts:
    clock = time.perf_counter()
    T, B = model.config.sequence_len, device_batch_size or meta["device_batch_size"]
    _, num_rows = eval_rows(T, meta["rows"] * T, meta["num_iterations"], 0, 0, eval_tokens or math.inf)
    # the first shard is enough of what it was trained on: 52 million tokens
    for shard in (shard_path(VAL_SHARD), base_path("base_data", meta["shards"][0])):
        if not os.path.exists(shard):
            raise SystemExit(f"{shard}: not here; fetch it with python prepare.py -n 1")
    train, val = text_streams(meta["shards"][:1], tokenizer)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).long().to(machine.device)
    bpb = {}
    for split, stream in (("val", val), ("train", train)):
        bpb[f"{split}_bpb"] = evaluate_bpb(model, stream, token_bytes, num_rows, B, T, machine.device)
        print0(f"{split} bpb {bpb[f'{split}_bpb']:.4f}")
    keep("bpb", time.perf_counter() - clock, **bpb)

if "samples" in parts:
    clock = time.perf_counter()
    samples = print_samples(model, tokenizer)
    keep("samples", time.perf_counter() - clock, samples=samples)

if "core" in parts:
    clock = time.perf_counter()
    gpt2 = gpt2_scores(bundle)

    def show(label, result):
        """One row: ours, then GPT-2's centered scores from the bundle, which are of the whole tasks."""
        theirs = "".join(f"{row.get(label, math.nan):9.4f}" for row in gpt2.values())
        accuracy = f"{result['accuracy']:.4f}" if "accuracy" in result else ""
        print0(f"{label:33}{result.get('n', ''):>6}{accuracy:>10}{result['centered']:10.4f} |{theirs} |"
               f"{result['seconds']:7.1f}")

    sizes = "".join(f"{'GPT-2' if size == 'small' else size:>9}" for size in gpt2)
    print0(f"{'task':33}{'items':>6}{'accuracy':>10}{'centered':>10} |{sizes} |seconds")
    scores, core = evaluate_core(model, tokenizer, core_max_per_task, show)
    seconds = time.perf_counter() - clock
    show("CORE", dict(centered=core, seconds=seconds))
    too_long = {label: result["too_long"] for label, result in scores.items() if result["too_long"]}
    if too_long:
        print0(f"items counted as wrong, because the answer alone is longer than the context: {too_long}")
    if RANK == 0:
        with atomic_write(os.path.join(folder, "core.csv"), "w") as f:
            f.write("Task,Accuracy,Centered,Items\n")
            f.writelines(f"{label},{result['accuracy']:.6f},{result['centered']:.6f},{result['n']}\n"
                         for label, result in scores.items())
            f.write(f"CORE,,{core:.6f},\n")
    keep("core", seconds, core=core, tasks=scores, gpt2_core={size: row["CORE"] for size, row in gpt2.items()})

print0(f"base_eval: written to {path}")
finish()
