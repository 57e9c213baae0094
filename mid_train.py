"""
Midtrain the base model: the chat format, tool use and many small tasks, at full learning rate.

The loop is base_train's; what differs is the data, a mixture of conversations in which only what
the assistant says is scored, and that the weights come from the base model.

The original nanochat scores every token. Measured 2026-11 (d4, vocabulary 8,192, 1.1 M tokens of
pretraining, then 250 steps of 4,096 tokens either way): bits per byte of held-out answers 2.662 so
and 2.603 with every token scored; right letters 154 and 156 of 600 in ARC-Easy, 141 and 142 of 600
in MMLU, both guessing. A base that has hardly begun gains from each word it reads; what a whole
base gains is not measured yet.

reads   base_checkpoints/<model_tag>/, tokenizer/, task_data/ (from tasks/)
writes  mid_checkpoints/<model_tag>/{model,optim,meta}_NNNNNN.*, log.jsonl
run     python mid_train.py
        python mid_train.py config/tiny_mid.py --resume=1
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import os
import shutil
import time

import torch

from checkpoint import (checkpoint_to_resume, find_parent, load_model, load_optimizers, require_finite, save_checkpoint,
                        stage_folder)
from data import conversation_streams, epoch_tokens
from evals import metrics
from model import compiled
from muon import build_optimizers, lr_multiplier, set_schedule
from plumbing import budget, stop
from plumbing.common import Log, Progress, due, duration, print0
from plumbing.configurator import configure
from plumbing.fit import fit_micro_batch
from plumbing.machine import clip, finish, last_pass, leave, start, sum_over_ranks, to_device
from tasks import Mixture, docstrings, gsm8k, identity, identity_file, mmlu, simple_spelling, smoltalk, spelling_bee

# where from
source_tag = ""                # which base model; "" = the one with model_tag, or the only one there is
model_tag = ""                 # folder of the checkpoints; "" = as the base model's
# the mixture
embedded = False               # 1 = only tasks that need no download
assistant_name = ""            # what the model is called; "" = nanochat's own identity, which is downloaded
assistant_maker = "the people who ran this training"  # who made it; counts where assistant_name is set
assistant_facts = ""           # what it says about itself, sentences divided by ; likewise
identity_rows = 1000           # conversations about that, where they are made here
spelling_rows = 200000         # SimpleSpelling: spell a word
spelling_bee_rows = 80000      # SpellingBee: count a letter in a word
# length of the run
num_iterations = 0             # optimizer steps; 0 = one epoch of the mixture
# batch
total_batch_size = 0           # tokens per optimizer step; 0 = as in pretraining
device_batch_size = 0          # B, rows per micro-batch; 0 = the most that fit; never changes the training
gradient_checkpointing = False  # 1 = less memory, slower
# optimizer
matrix_lr = 0.02               # Muon, the matrices
embedding_lr = 0.2             # AdamW, the token table
unembedding_lr = 0.004         # AdamW, the output head
init_lr_frac = 1.0             # the share of these rates that is used
grad_clip = 1.0                # largest norm of the whole gradient; 0 = no clipping
warmup_ratio = 0.0             # share of the run with rising learning rates
warmdown_ratio = 0.2           # share of the run with falling learning rates
final_lr_frac = 0.0            # where they fall to, as a share of the full rate
# evaluation and checkpoints
eval_every = 150               # steps between evaluations of bits per byte; 0 = only at the end
eval_tokens = 0                # tokens of such an evaluation; 0 = 2 % of those trained between two
final_eval_tokens = 10485760   # tokens of the one at the end (20 x 524,288)
save_every = 0                 # steps between checkpoints; 0 = only at the end
resume = 0                     # 1 = continue from the newest checkpoint, if there is one
# machine
run = ""                       # name of the run in wandb; "" = log.jsonl alone
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in pretraining
compile_model = True           # torch.compile on a GPU
config = configure(globals())

# a finished stage ends here, an unfinished one continues
base_folder, base_meta, source = find_parent("base", source_tag, model_tag)
checkpoint_dir = stage_folder("mid", model_tag or source["tag"])
lock = stop.only_one(f"{checkpoint_dir}.lock")                    # a second run is refused here
meta = checkpoint_to_resume("mid", checkpoint_dir, config, resume, source)
start_step = meta["step"] if meta else 0
machine = start(device, dtype, meta or base_meta)

# weights: those where this stage had got to, or the base model's
model, tokenizer = load_model(checkpoint_dir if meta else base_folder, meta or base_meta, machine, gradient_checkpointing)
optimizers = build_optimizers(model, matrix_lr * init_lr_frac, embedding_lr * init_lr_frac, unembedding_lr * init_lr_frac)
if compile_model and machine.device.type == "cuda":
    model = compiled(model)

# the batch: by default as large as in pretraining
max_seq_len, flops = model.config.sequence_len, budget.flops_per_token(model.config)
rows = budget.rows_per_step(total_batch_size, max_seq_len) if total_batch_size else base_meta["rows"]
tokens_per_step = rows * max_seq_len
B, forward = fit_micro_batch(machine, model, optimizers, rows, device_batch_size, meta)
if meta:
    load_optimizers(checkpoint_dir, optimizers, meta)

# the mixture: what the model is to become is decided here
who = dict(name=assistant_name or "nanochat", maker=assistant_maker, facts=assistant_facts)
own_identity = identity(**who, size=identity_rows) if embedded or assistant_name else identity_file()
if not embedded:
    train_data = Mixture([
        smoltalk("train"),                                      # 460K conversations about everything
        mmlu("train"),                                          # 100K questions: a letter for an answer
        gsm8k("train"),                                         # 8K: mathematics in words, with the calculator
        own_identity, own_identity,                             # 1K, twice: who it is
        simple_spelling(spelling_rows, "train"),                # 200K: the letters behind the tokens
        spelling_bee(spelling_bee_rows, "train"),               # 80K: counting them, by hand and with the calculator
    ])
    val_data = Mixture([smoltalk("test"), mmlu("test", 5200), gsm8k("test", 420)])
else:
    train_data = Mixture([
        own_identity,
        docstrings("train", 1500),
        spelling_bee(spelling_bee_rows, "train", varied=False),
        simple_spelling(spelling_rows, "train", pseudo=0.6, pieces=tokenizer.letter_tokens()),
    ])
    val_data = Mixture([identity(**who, split="test"), docstrings("test", 100), simple_spelling(100, "test"),
                        spelling_bee(50, "test", varied=False)])
token_dir = os.path.join(checkpoint_dir, "tokens")
train_stream, val_stream = conversation_streams(token_dir, train_data, val_data, tokenizer)
token_bytes = torch.from_numpy(tokenizer.token_bytes()).long().to(machine.device)

epoch_steps = epoch_tokens(train_stream, train_data) / tokens_per_step
total_steps = meta["num_iterations"] if meta else num_iterations or max(1, round(epoch_steps))
few_rows, many_rows = budget.eval_rows(max_seq_len, tokens_per_step, total_steps, eval_every, eval_tokens,
                                       final_eval_tokens)
print0(f"{len(train_data):,} conversations, {total_steps / epoch_steps:.2f} epochs in "
       f"{budget.steps_text(total_steps, rows, max_seq_len, B)}")

val_bpb = meta["val_bpb"] if meta else None
log = Log(checkpoint_dir, start_step, run, config)
progress = Progress(log, start_step, total_steps, flops, machine.peak_flops, meta and meta["progress"],
                    budget.checkpoint_bytes(model.config))
stopping = False                  # Ctrl-C, kill, a closed terminal: the step is finished and saved
stop.finish_steps()

for step in range(start_step, total_steps + 1):
    last = step == total_steps

    # once in a while: bits per byte of the answers, then save
    if due(step, eval_every, last):
        val_bpb = metrics.evaluate_bpb(model, val_stream, token_bytes, many_rows if last else few_rows,
                                       B, max_seq_len, machine.device)
        print0(f"step {step:5d}/{total_steps} | val bpb {val_bpb:.4f}")
        log.write(step, val_bpb=val_bpb)
    if step > start_step and (stopping or due(step, save_every, last)):
        save_checkpoint(checkpoint_dir, step, model, optimizers, dict(
            stage="mid", num_iterations=total_steps, val_bpb=val_bpb, progress=progress.state(),
            config=config, source=source,
            tokenizer=tokenizer.fingerprint, flops_per_token=flops, rows=rows, conversations=len(train_data),
            device_batch_size=B, machine=machine.describe(), peak_memory=machine.peak_memory()), wait=last or stopping)
    if stopping:
        leave(step, resume)
    if last:
        break

    # one optimizer step: the loss summed over all scored tokens of the step, divided by their number
    machine.synchronize()
    clock = time.perf_counter()
    x, y = train_stream.step_batch(step, rows, max_seq_len)
    [num_targets] = sum_over_ranks([(y >= 0).sum()], machine.device)
    multiplier = lr_multiplier(step, total_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
    rates = set_schedule(optimizers, multiplier, step)
    train_loss = torch.zeros((), device=machine.device)
    for first in range(0, len(x), B):
        micro = slice(first, first + B)
        last_pass(forward, first + B >= len(x))
        loss = forward(to_device(x[micro], machine.device), to_device(y[micro], machine.device))
        loss = loss / max(1, num_targets)
        loss.backward()
        train_loss += loss.detach()
    train_loss, grad_norm, stopping = clip(model, train_loss, grad_clip)            # the ranks agree whether one is to stop
    require_finite(checkpoint_dir, step, rows, train_loss, grad_norm)               # a run that has diverged ends here
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    machine.synchronize()
    progress.update(step, train_loss, grad_norm, rates, tokens_per_step, time.perf_counter() - clock)

print0(f"mid_train: {total_steps} steps in {duration(progress.seconds)}, val bpb {val_bpb:.4f}, "
       f"peak memory {machine.peak_memory() / 1e9:.1f} GB")
finish()
shutil.rmtree(token_dir, ignore_errors=True)                    # what is in there can be made again
