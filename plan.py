"""
Say what a run will be before it starts: parameters, tokens, steps, disk, memory, time.

run     python plan.py --depth=12 --num_iterations=500
"""
import difflib
import subprocess
from types import SimpleNamespace

from plumbing import stop
from plumbing.budget import (CPU_BYTES, KEEP, SHARD_BYTES, SHARD_TOKENS, checkpoint_bytes, flops_per_token,
                             micro_batch, model_shape, num_params, peak_flops, row_bytes, rows_per_step, state_bytes,
                             usable_bytes)
from plumbing.common import base_path, duration
from plumbing.configurator import configure

depth = 12                     # layers
head_dim = 0                   # 0 = 128, or 64 at odd depths
max_seq_len = 1024             # tokens in a row
total_batch_size = 524288      # tokens per optimizer step
num_iterations = 0             # base steps; 0 = target_param_data_ratio tokens per parameter
target_param_data_ratio = 20.0
mid_iterations = 0             # 0 = one epoch, about 0.4 billion tokens
sft_iterations = 0             # 0 = one epoch, about 720 steps of 32 conversations
num_shards = 0                 # shards of text to download
vocab_size = 65536
device_batch_size = 0          # rows per micro-batch; 0 = the most that fit
num_processes = 1              # GPUs
gradient_checkpointing = False # 1 = less memory, slower
known = ""                     # names of the drivers' variables, for the next one
given = ""                     # names of the variables that are set; one that is nearly a known name ends the run
config = configure(globals(), show=False)
stop.listen()

SHARD_DISK = SHARD_BYTES + 2 * SHARD_TOKENS   # the parquet file and its tokens
TASK_DISK = 1.6e9              # conversations and questions, and the tokens made from them
MFU = 0.60                     # share of the peak of a compiled run; assumed, not measured


def misspelt(given, known):
    """(name, the known name it was meant to be) of a variable that is nearly one of the drivers', or None."""
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
        if near and near[0] not in ("PLAN", "PYTHON") and not name.startswith("WANDB_"):     # these have many of their own
            return name, near[0]


def gpu():
    """(name, bytes of memory) of the first NVIDIA GPU, or ("", 0)."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        name, megabytes = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return "", 0
    return name, int(megabytes) * 2 ** 20


def cpu_speed(model, rows):
    """FLOP/s of this machine's cores in training, timed for some seconds; 0.0 where torch is not installed yet."""
    try:
        from model import GPT, GPTConfig
        from plumbing.machine import time_numerics
    except Exception:                            # no torch yet, another than ours, or a broken one
        return 0.0
    print("timing a training step ...", flush=True)
    return flops_per_token(model) / time_numerics(GPT(GPTConfig(**vars(model))), rows)["seconds_per_token"]


if wrong := misspelt(given.split(), known.split()):
    raise SystemExit(f"{wrong[0]} is set, which nothing reads: did you mean {wrong[1]}? (unset {wrong[0]} to go on without)")
model = SimpleNamespace(sequence_len=max_seq_len, vocab_size=vocab_size, **model_shape(depth, head_dim))
params, flops = num_params(model), flops_per_token(model)
rows = rows_per_step(total_batch_size, max_seq_len)
step_tokens = rows * max_seq_len
base_steps = num_iterations or round(target_param_data_ratio * params["total"] / step_tokens)
mid_steps = mid_iterations or round(0.4e9 / step_tokens)
sft_steps = sft_iterations or 720
tokens = dict(base=base_steps * step_tokens, mid=mid_steps * step_tokens, sft=sft_steps * 32 * min(400, max_seq_len))
name, memory = gpu()
speed = MFU * peak_flops(name or "A100") if name or num_shards else cpu_speed(model, rows)
memory = memory or (40e9 if num_shards else 0)         # planned without a GPU: for an A100 with 40 GB
B = micro_batch(rows, num_processes, device_batch_size, usable_bytes(memory) if memory else CPU_BYTES, model,
                        2 if memory else 4, gradient_checkpointing)
gpu_bytes = state_bytes(model) + B * row_bytes(model, 2, gradient_checkpointing) + 4e9
checkpoints = (3 * KEEP + 1) * checkpoint_bytes(model)   # of three stages, and the one being written
disk = num_shards * SHARD_DISK + (TASK_DISK if num_shards else 0) + checkpoints

print(f"plan: d{depth}, {params['total'] / 1e6:.1f}M parameters, rows of {max_seq_len:,} tokens, vocabulary {vocab_size:,}")
print(f"  steps   base {base_steps:,}, mid {mid_steps:,} of {step_tokens:,} tokens; fine-tuning {sft_steps:,} of 32 conversations")
print(f"  tokens  base {tokens['base'] / 1e6:,.1f}M ({tokens['base'] / params['total']:.1f} per parameter), mid {tokens['mid'] / 1e6:,.1f}M"
      + (f"; {num_shards} shards hold about {num_shards * SHARD_TOKENS / 1e6:,.0f}M" if num_shards else ""))
print(f"  disk    about {disk / 1e9:.1f} GB in {base_path()}")
if num_shards:
    print(f"  memory  about {gpu_bytes / 1e9:.0f} GB of a GPU's, with micro-batches of {B} rows")
where = (f"{num_processes} x " if num_processes > 1 else "") + (name or ("an A100" if num_shards else "these CPU cores"))
if speed:
    seconds = {stage: n * flops / speed / (num_processes if name or num_shards else 1) for stage, n in tokens.items()}
    print(f"  time    on {where}: base {duration(seconds['base'])}, mid {duration(seconds['mid'])}, fine-tuning "
          f"{duration(seconds['sft'])}, without downloads and tests")
else:
    print(f"  time    unknown: there is no entry for {name} in plumbing/budget.py" if name else
          "  time    pretraining begins with timing a step and says what it will take; after set-up PLAN=1 does that, too")
