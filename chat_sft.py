"""
Supervised fine-tuning: the model learns to answer, from a small mixture of good answers.

One conversation per row, filled up to the longest of its micro-batch; only what the assistant
says is scored.

reads   mid_checkpoints/<model_tag>/, tokenizer/, task_data/ (from tasks/)
writes  chatsft_checkpoints/<model_tag>/{model,optim,meta}_NNNNNN.*, log.jsonl
run     python chat_sft.py
        python chat_sft.py config/tiny_sft.py --resume=1
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import time

import torch

from checkpoint import (checkpoint_to_resume, find_parent, load_model, load_optimizers, require_finite, save_checkpoint,
                        stage_folder)
from data import rank_batches
from engine import Engine
from evals import metrics
from muon import build_optimizers, lr_multiplier, set_schedule
from plumbing import budget, stop
from plumbing.common import Log, Progress, due, duration, print0
from plumbing.configurator import configure
from plumbing.fit import fit_micro_batch
from plumbing.machine import clip, finish, last_pass, leave, start, sum_over_ranks, to_device
from tasks import (Mixture, all_tests, arc, docstrings, gsm8k, identity, identity_file, is_right, simple_spelling,
                   smoltalk, spelling_bee, who_is)

# where from
source = "mid"                 # -i: the stage whose model is tuned, mid or base
source_tag = ""                # which model of that stage; "" = the one with model_tag, or the only one there is
model_tag = ""                 # folder of the checkpoints; "" = as that model's
# the mixture
embedded = False               # 1 = only tasks that need no download
identity_rows = 1000           # conversations about who the model is, where they are made here
spelling_rows = 300            # SimpleSpelling: spell a word
spelling_bee_rows = 300        # SpellingBee: count a letter in a word
# length of the run
num_iterations = 0             # optimizer steps; 0 = one epoch of the mixture
# batch
target_examples_per_step = 32  # conversations per optimizer step
device_batch_size = 4          # B, most conversations per micro-batch; 0 = what fits; never changes the training
gradient_checkpointing = False  # 1 = less memory, slower
# optimizer
matrix_lr = 0.02               # Muon, the matrices
embedding_lr = 0.2             # AdamW, the token table
unembedding_lr = 0.004         # AdamW, the output head
init_lr_frac = 0.02            # the share of these rates that is used
grad_clip = 1.0                # largest norm of the whole gradient; 0 = no clipping
warmup_ratio = 0.0             # share of the run with rising learning rates
warmdown_ratio = 1.0           # share of the run with falling learning rates: all of it
final_lr_frac = 0.0            # where they fall to, as a share of the full rate
# evaluation and checkpoints
eval_every = 100               # steps between evaluations of the loss on held-out answers; 0 = only at the end
eval_examples = 400            # conversations of such an evaluation
eval_metrics_every = 200       # steps between tests on the tasks themselves; 0 = never (chat_eval.py has more)
eval_metrics_max_problems = 200  # problems per task in such a test; 0 = all
save_every = 0                 # steps between checkpoints; 0 = only at the end
resume = 0                     # 1 = continue from the newest checkpoint, if there is one
# machine
run = ""                       # name of the run in wandb; "" = log.jsonl alone
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in the stage before
config = configure(globals())

# those of chat_eval.py's tests that are made while training
QUICK_TESTS = ("MMLU", "ARC-Easy", "says its name", "spells a word", "counts a letter")

# a finished stage ends here, an unfinished one continues
source_folder, source_meta, parent = find_parent(source, source_tag, model_tag)
checkpoint_dir = stage_folder("sft", model_tag or parent["tag"])
lock = stop.only_one(f"{checkpoint_dir}.lock")                    # a second run is refused here
meta = checkpoint_to_resume("sft", checkpoint_dir, config, resume, parent)
start_step = meta["step"] if meta else 0
machine = start(device, dtype, meta or source_meta)

# weights: those where this stage had got to, or the stage before's
model, tokenizer = load_model(checkpoint_dir if meta else source_folder, meta or source_meta, machine,
                              gradient_checkpointing)
optimizers = build_optimizers(model, matrix_lr * init_lr_frac, embedding_lr * init_lr_frac, unembedding_lr * init_lr_frac)

# the batch
rows, max_seq_len, flops = target_examples_per_step, model.config.sequence_len, budget.flops_per_token(model.config)
B, forward = fit_micro_batch(machine, model, optimizers, rows, device_batch_size, meta)
if meta:
    load_optimizers(checkpoint_dir, optimizers, meta)

# the mixture; who the model is was settled in mid-training
who = who_is(source_meta)
own_name = embedded or source_meta["config"].get("assistant_name")
own_identity = identity(**who, size=identity_rows) if own_name else identity_file()
if not embedded:
    train_data = Mixture([
        arc("Easy", "train"), arc("Challenge", "train"),        # 2.3K and 1.1K questions: a letter for an answer
        gsm8k("train"),                                         # 8K: mathematics in words, with the calculator
        smoltalk("train", 10000),                               # 10K conversations about everything
        own_identity,                                           # 1K: who it is
        simple_spelling(spelling_rows, "train"),                # 300: the letters behind the tokens
        spelling_bee(spelling_bee_rows, "train"),               # 300: counting them
    ])
    val_data = Mixture([smoltalk("test")])
else:
    train_data = Mixture([
        own_identity,
        docstrings("train", 300),
        spelling_bee(spelling_bee_rows, "train", varied=False),
        simple_spelling(spelling_rows, "train", pseudo=0.6, pieces=tokenizer.letter_tokens()),
    ])
    val_data = Mixture([identity(**who, split="test"), docstrings("test", 100), simple_spelling(100, "test")])
tests = {name: test for name, test in all_tests(embedded, who).items() if name in QUICK_TESTS}

total_steps = meta["num_iterations"] if meta else num_iterations or max(1, len(train_data) // rows)
print0(f"{len(train_data):,} conversations, {total_steps * rows / len(train_data):.2f} epochs in "
       f"{budget.steps_text(total_steps, rows, max_seq_len, B)}")

val_loss = meta["val_loss"] if meta else None
log = Log(checkpoint_dir, start_step, run, config)
progress = Progress(log, start_step, total_steps, flops, machine.peak_flops, meta and meta["progress"],
                    budget.checkpoint_bytes(model.config))
stopping = False                  # Ctrl-C, kill, a closed terminal: the step is finished and saved
stop.finish_steps()

for step in range(start_step, total_steps + 1):
    last = step == total_steps

    # once in a while: the loss on held-out answers, then save; what may fail comes after
    if due(step, eval_every, last):
        batches = rank_batches(val_data, 0, min(eval_examples, len(val_data)), B, tokenizer, max_seq_len)
        val_loss = metrics.evaluate_loss(model, batches, machine.device)
        print0(f"step {step:5d}/{total_steps} | val loss {val_loss:.4f}")
        log.write(step, val_loss=val_loss)
    if step > start_step and (stopping or due(step, save_every, last)):
        save_checkpoint(checkpoint_dir, step, model, optimizers, dict(
            stage="sft", num_iterations=total_steps, val_loss=val_loss, progress=progress.state(), config=config,
            source=parent, tokenizer=tokenizer.fingerprint, flops_per_token=flops, rows=rows,
            conversations=len(train_data), device_batch_size=B, machine=machine.describe(),
            peak_memory=machine.peak_memory()), wait=last or stopping)
    if stopping:
        leave(step, resume)
    if eval_metrics_every and due(step, eval_metrics_every, last) and not stop.is_near():
        with stop.cut_short():                                  # minutes, which a signal need not wait for
            for name, task in tests.items():
                right, total = metrics.evaluate_task(Engine(model, tokenizer), task, is_right,
                                                     eval_metrics_max_problems, max_tokens=128)
                print0(f"step {step:5d}/{total_steps} | {name}: {right} of {total}")
                log.write(step, test=name, right=right, total=total)
    if last:
        break

    # one optimizer step: the loss summed over all scored tokens of the step, divided by their number
    machine.synchronize()
    clock = time.perf_counter()
    batches = list(rank_batches(train_data, step * rows, rows, B, tokenizer, max_seq_len))
    num_tokens, num_targets = sum_over_ranks([sum(x.size for x, y in batches), sum((y >= 0).sum() for x, y in batches)],
                                             machine.device)
    multiplier = lr_multiplier(step, total_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
    rates = set_schedule(optimizers, multiplier, step)
    train_loss = torch.zeros((), device=machine.device)
    for i, (x, y) in enumerate(batches):
        last_pass(forward, i == len(batches) - 1)
        loss = forward(to_device(x, machine.device), to_device(y, machine.device)) / max(1, num_targets)
        loss.backward()
        train_loss += loss.detach()
    train_loss, grad_norm, stopping = clip(model, train_loss, grad_clip)            # the ranks agree whether one is to stop
    require_finite(checkpoint_dir, step, rows, train_loss, grad_norm)               # a run that has diverged ends here
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    machine.synchronize()
    progress.update(step, train_loss, grad_norm, rates, num_tokens, time.perf_counter() - clock)

print0(f"chat_sft: {total_steps} steps in {duration(progress.seconds)}, val loss {val_loss:.4f}, "
       f"peak memory {machine.peak_memory() / 1e9:.1f} GB")
finish()
