"""
Pretrain the base model: predict the next token of plain text.

reads   base_data/*.parquet (through data.py), tokenizer/
writes  base_checkpoints/<model_tag>/{model,optim,meta}_NNNNNN.*, log.jsonl
run     python base_train.py --depth=12
        python base_train.py config/tiny_base.py --resume=1
        torchrun --standalone --nproc_per_node=2 base_train.py --depth=12
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import time

import torch

from checkpoint import (checkpoint_to_resume, load_optimizers, load_weights, require_finite, save_checkpoint,
                        stage_folder, tokenizer_of)
from data import text_streams, train_shards
from evals import core, metrics
from model import GPT, GPTConfig, compiled
from muon import build_optimizers, lr_multiplier, set_schedule
from plumbing import budget, stop
from plumbing.common import Log, Progress, due, duration, print0
from plumbing.configurator import configure
from plumbing.fit import fit_micro_batch
from plumbing.machine import choose_numerics, clip, finish, last_pass, leave, own_memory, start, to_device

# model
depth = 12                     # layers; the one dial of model size: width is 64 x depth
head_dim = 0                   # dimensions of an attention head; 0 = 128, or 64 at odd depths
max_seq_len = 1024             # T, tokens in a row, and the context of the model
model_tag = ""                 # folder of the checkpoints; "" = d<depth>
# length of the run
num_iterations = 0             # optimizer steps; 0 = from target_param_data_ratio
target_param_data_ratio = 20.0  # training tokens per parameter when num_iterations is 0
num_shards = 0                 # train on shards 0 ... n-1, waiting for those not there yet; 0 = all there are now
# batch
total_batch_size = 524288      # tokens per optimizer step, rounded to a multiple of 8 rows
device_batch_size = 0          # B, rows per micro-batch; 0 = the largest that fits; changes the speed, not the training
gradient_checkpointing = False  # 1 = activations are made again in the backward pass: less memory, slower
# optimizer
matrix_lr = 0.02               # Muon, the matrices
embedding_lr = 0.2             # AdamW, the token table; scaled by (n_embd / 768)^-0.5
unembedding_lr = 0.004         # AdamW, the output head; scaled likewise
grad_clip = 1.0                # largest norm of the whole gradient; 0 = no clipping
warmup_ratio = 0.0             # share of the run with rising learning rates
warmdown_ratio = 0.2           # share of the run with falling learning rates
final_lr_frac = 0.0            # where they fall to, as a share of the full rate
# evaluation and checkpoints
eval_every = 250               # steps between evaluations of bits per byte; 0 = only at the end
eval_tokens = 0                # tokens of such an evaluation; 0 = 2 % of those trained between two
final_eval_tokens = 10485760   # tokens of the one at the end (20 x 524,288)
sample_every = 2000            # steps between samples of text; 0 = only at the end
core_metric_every = 2000       # steps between evaluations of CORE (a download of 162 MB); 0 = never
core_metric_max_per_task = 500  # items of each task then; 0 = all
save_every = 0                 # steps between checkpoints; 0 = only at the end
resume = 0                     # 1 = continue from the newest checkpoint, if there is one
seed = 42                      # of the first weights; nothing else in the run is random: the data has its order
# machine
run = ""                       # name of the run in wandb; "" = log.jsonl alone
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = bfloat16 from the A100 on, timed on a CPU
compile_model = True           # torch.compile on a GPU; on a CPU it would take longer than it saves
config = configure(globals())  # flags and config files replace the values above; config keeps all of them

# a finished stage ends here, an unfinished one continues
checkpoint_dir = stage_folder("base", model_tag or f"d{depth}")
lock = stop.only_one(f"{checkpoint_dir}.lock")                    # a second run is refused here
meta = checkpoint_to_resume("base", checkpoint_dir, config, resume)
start_step = meta["step"] if meta else 0
tokenizer = tokenizer_of(checkpoint_dir, meta)
machine = start(device, dtype, meta)

# the model and the length of the run: all sizes follow from depth
model_config = GPTConfig(sequence_len=max_seq_len, vocab_size=tokenizer.vocab_size,
                         **budget.model_shape(depth, head_dim))
params, flops = budget.num_params(model_config), budget.flops_per_token(model_config)
rows = budget.rows_per_step(total_batch_size, max_seq_len)
tokens_per_step = rows * max_seq_len
total_steps = num_iterations or round(target_param_data_ratio * params["total"] / tokens_per_step)
if total_steps < 1:
    raise SystemExit(f"num_iterations={num_iterations}, target_param_data_ratio={target_param_data_ratio}: "
                     "no step to train")
needed = budget.state_bytes(model_config) if machine.device.type == "cpu" else 4 * params["total"]
if needed > own_memory():
    raise SystemExit(f"depth={depth}: {params['total']:,} parameters need {needed / 1e9:.0f} GB of memory, this "
                     f"computer has {own_memory() / 1e9:.0f} GB; lower depth (for the drivers: DEPTH)")
token_seconds = choose_numerics(machine, dtype, meta and meta["machine"], checkpoint_dir,    # on a CPU by timing
                                lambda: GPT(model_config), rows)

if core_metric_every:
    core.fetch_bundle()                                          # now, so that what is missing is missed at once

# the data: the list of shards goes into the checkpoint, so that a resumed run reads the same stream
shards = meta["shards"] if meta else train_shards(num_shards)
train_stream, val_stream = text_streams(shards, tokenizer, meta.get("tokens", ()) if meta else ())
token_bytes = torch.from_numpy(tokenizer.token_bytes()).long().to(machine.device)
few_rows, many_rows = budget.eval_rows(max_seq_len, tokens_per_step, total_steps, eval_every, eval_tokens,
                                       final_eval_tokens)

# weights, optimizers, and where a run that stopped had got to
torch.manual_seed(seed)                                         # the same first weights on every rank
model = GPT(model_config, machine.dtype, gradient_checkpointing)
if meta:
    load_weights(checkpoint_dir, model, meta)
model.to(machine.device)
optimizers = build_optimizers(model, matrix_lr, embedding_lr, unembedding_lr)
if compile_model and machine.device.type == "cuda":
    model = compiled(model)
B, forward = fit_micro_batch(machine, model, optimizers, rows, device_batch_size, meta)
if meta:
    load_optimizers(checkpoint_dir, optimizers, meta)
print0(f"d{depth}: {params['total']:,} parameters, {total_steps * tokens_per_step:,} tokens in "
       f"{budget.steps_text(total_steps, rows, max_seq_len, B)}")
if token_seconds:
    print0(f"about {duration(token_seconds * total_steps * tokens_per_step)} for all steps")

val_bpb = meta["val_bpb"] if meta else None
log = Log(checkpoint_dir, start_step, run, config)
progress = Progress(log, start_step, total_steps, flops, machine.peak_flops, meta and meta["progress"],
                    budget.checkpoint_bytes(model_config))
stopping = False                  # Ctrl-C, kill, a closed terminal: the step is finished and saved
stop.finish_steps()

for step in range(start_step, total_steps + 1):
    last = step == total_steps

    # once in a while: bits per byte, which go into the checkpoint; save; and only then samples and CORE, which may fail
    if due(step, eval_every, last):
        val_bpb = metrics.evaluate_bpb(model, val_stream, token_bytes, many_rows if last else few_rows,
                                       B, max_seq_len, machine.device)
        print0(f"step {step:5d}/{total_steps} | val bpb {val_bpb:.4f}")
        log.write(step, val_bpb=val_bpb)
    if step > start_step and (stopping or due(step, save_every, last)):
        save_checkpoint(checkpoint_dir, step, model, optimizers, dict(
            stage="base", num_iterations=total_steps, val_bpb=val_bpb, progress=progress.state(),
            shards=shards, tokens=train_stream.counts(), config=config,
            tokenizer=tokenizer.fingerprint, params=params, flops_per_token=flops, rows=rows,
            device_batch_size=B, machine=machine.describe(), peak_memory=machine.peak_memory()), wait=last or stopping)
    if stopping:
        leave(step, resume)
    if due(step, sample_every, last):
        log.write(step, samples=metrics.print_samples(model, tokenizer))
    if core_metric_every and due(step, core_metric_every, last) and not stop.is_near():
        with stop.cut_short():                                  # minutes, which a signal need not wait for
            _, core_score = core.evaluate_core(model, tokenizer, core_metric_max_per_task)
            print0(f"step {step:5d}/{total_steps} | CORE {core_score:.4f}")
            log.write(step, core=core_score)
    if last:
        break

    # one optimizer step: the loss summed over all targets of the step, divided by their number
    machine.synchronize()
    clock = time.perf_counter()
    x, y = train_stream.step_batch(step, rows, max_seq_len)
    multiplier = lr_multiplier(step, total_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
    rates = set_schedule(optimizers, multiplier, step)
    train_loss = torch.zeros((), device=machine.device)
    for first in range(0, len(x), B):
        micro = slice(first, first + B)
        last_pass(forward, first + B >= len(x))
        loss = forward(to_device(x[micro], machine.device), to_device(y[micro], machine.device)) / tokens_per_step
        loss.backward()
        train_loss += loss.detach()
    train_loss, grad_norm, stopping = clip(model, train_loss, grad_clip)            # the ranks agree whether one is to stop
    require_finite(checkpoint_dir, step, rows, train_loss, grad_norm)               # a run that has diverged ends here
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    machine.synchronize()
    progress.update(step, train_loss, grad_norm, rates, tokens_per_step, time.perf_counter() - clock)

print0(f"base_train: {total_steps} steps in {duration(progress.seconds)}, val bpb {val_bpb:.4f}, "
       f"peak memory {machine.peak_memory() / 1e9:.1f} GB")
finish()
