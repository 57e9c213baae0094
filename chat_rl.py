"""
Reinforcement learning: the model answers, and what was right becomes likelier. Optional, after fine-tuning.

Each step draws some answers to each of some problems, grades them (1 = right, 0 = wrong), and takes one step of the policy
gradient, REINFORCE: an answer's advantage is its reward less the mean reward of its prompt's answers; rollouts.py has the
formula. The answers come from the model as it is, so there is no ratio to clip; no reference model holds it back, so
whatever is not rewarded may drift.

They are drawn with temperature and top_k, and the gradient is that of the model's own probabilities, of all tokens and at
temperature 1, as in the original nanochat: exact with temperature=1 and top_k=0, a little beside it elsewhere.

reads   chatsft_checkpoints/<model_tag>/, tokenizer/, task_data/ (from tasks/)
writes  chatrl_checkpoints/<model_tag>/{model,optim,meta}_NNNNNN.*, log.jsonl
run     python chat_rl.py
        python chat_rl.py config/tiny_rl.py --resume=1
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import time

import torch

from checkpoint import (checkpoint_to_resume, find_parent, finish_writing, load_model, load_optimizers, require_finite,
                        save_checkpoint, stage_folder)
from engine import seed_of
from muon import build_optimizers, lr_multiplier, set_schedule
from plumbing import budget, stop
from plumbing.common import RANK, WORLD_SIZE, Log, Progress, due, duration, print0
from plumbing.configurator import configure
from plumbing.fit import fit_micro_batch
from plumbing.machine import clip, finish, last_pass, leave, start, sum_over_ranks, to_device
from rollouts import Rollouts, advantages, evaluate_pass_at_k, policy_batches
from tasks import gsm8k, is_right, spelling_bee

# where from
source = "sft"                 # -i: the stage whose model is trained on: sft, or mid
source_tag = ""                # which model of that stage; "" = the one with model_tag, or the only one there is
model_tag = ""                 # folder of the checkpoints; "" = as that model's
# what is rewarded
task = "gsm8k"                 # gsm8k: mathematics in words; spelling_bee: counting a letter, which needs no download
max_new_tokens = 256           # longest answer, in tokens
temperature = 1.0              # of the answers; 1 = as the model has it
top_k = 50                     # drawn among so many of the likeliest tokens; 0 = among all
# length of the run
num_iterations = 0             # optimizer steps; 0 = one epoch of the problems
# batch
examples_per_step = 16         # problems per optimizer step
num_samples = 16               # answers to each
device_batch_size = 0          # B, most answers per micro-batch; 0 = what fits; never changes the training
gradient_checkpointing = False  # 1 = less memory, slower
# optimizer
matrix_lr = 0.02               # Muon, the matrices
embedding_lr = 0.2             # AdamW, the token table
unembedding_lr = 0.004         # AdamW, the output head
init_lr_frac = 0.05            # the share of these rates that the run begins with; from there they fall to 0
# evaluation and checkpoints
eval_every = 60                # steps between evaluations on held-out problems; 0 = only at the end
eval_examples = 400            # problems of such an evaluation
eval_samples = 8               # answers to each
save_every = 60                # steps between checkpoints, which are made before an evaluation as well; 0 = only then
resume = 0                     # 1 = continue from the newest checkpoint, if there is one
# machine
run = ""                       # name of the run in wandb; "" = log.jsonl alone
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in the stage before
config = configure(globals())
if source not in ("sft", "mid"):
    raise SystemExit(f"source={source}: must be sft or mid; a base model answers no questions")

SPELLING_BEE_ROWS = 8000       # problems of an epoch, about as many as GSM8K has


def even_bee(split, count):
    """
    The first questions of SpellingBee, but for two in three of those whose answer is 1: 43 % are left.

    Of all of them 69 % have it, and then a tiny model's reward rises as it says 1 to everything. measured 2026-11, tiny, 60
    steps of 16 x 8 answers, of 150 drawn answers to all kinds: before 60 were right, 59 said 1 and 55 calls of the calculator
    found the number; after training on all kinds (init_lr_frac=0.05) 94, 123 and 57; on these (0.1) 101, 115 and 64.
    """
    bee = spelling_bee(4 * count, split, varied=not source_meta["config"].get("embedded"))    # worded as the model has learned it
    rows = (bee[i] for i in range(4 * count))
    return [row for i, row in enumerate(rows) if row["answer"] != "1" or i % 3 == 0][:count]


# a finished stage ends here, an unfinished one continues
source_folder, source_meta, parent = find_parent(source, source_tag, model_tag)
checkpoint_dir = stage_folder("rl", model_tag or parent["tag"])
lock = stop.only_one(f"{checkpoint_dir}.lock")                    # a second run is refused here
meta = checkpoint_to_resume("rl", checkpoint_dir, config, resume, parent)
start_step = meta["step"] if meta else 0
machine = start(device, dtype, meta or source_meta)

# weights: those where this stage had got to, or the stage before's
model, tokenizer = load_model(checkpoint_dir if meta else source_folder, meta or source_meta, machine,
                              gradient_checkpointing)
optimizers = build_optimizers(model, matrix_lr * init_lr_frac, embedding_lr * init_lr_frac, unembedding_lr * init_lr_frac)

# the batch: a rank answers its share of the problems of a step
if examples_per_step < WORLD_SIZE:
    raise SystemExit(f"examples_per_step={examples_per_step} for {WORLD_SIZE} processes: each needs one")
share = slice(RANK * examples_per_step // WORLD_SIZE, (RANK + 1) * examples_per_step // WORLD_SIZE)
max_seq_len = model.config.sequence_len
B, forward = fit_micro_batch(machine, model, optimizers, examples_per_step * num_samples, device_batch_size, meta)
if meta:
    load_optimizers(checkpoint_dir, optimizers, meta)

# the problems
if task == "gsm8k":
    train_data, test_data = gsm8k("train"), gsm8k("test")
else:
    train_data, test_data = even_bee("train", SPELLING_BEE_ROWS), even_bee("test", eval_examples)
rollouts = Rollouts(model, tokenizer, is_right, max_new_tokens, temperature, top_k)

total_steps = meta["num_iterations"] if meta else num_iterations or max(1, len(train_data) // examples_per_step)
print0(f"{len(train_data):,} problems, {total_steps * examples_per_step / len(train_data):.2f} epochs in {total_steps:,} "
       f"steps of {examples_per_step} problems, {num_samples} answers to each ({B} at a time)")

log = Log(checkpoint_dir, start_step, run, config)
progress = Progress(log, start_step, total_steps, 0, 0, meta and meta["progress"], budget.checkpoint_bytes(model.config),
                    quantity="reward")
stopping = False                  # Ctrl-C, kill, a closed terminal: the step is finished and saved
said = False                      # that there was a step with nothing to learn from
stop.finish_steps()

for step in range(start_step, total_steps + 1):
    last = step == total_steps

    # once in a while: save, then the held-out problems, which take minutes
    test_due = eval_every and step == 0 or due(step, eval_every, last)
    if step > start_step and (stopping or test_due or due(step, save_every, last)):
        save_checkpoint(checkpoint_dir, step, model, optimizers, dict(
            stage="rl", num_iterations=total_steps, progress=progress.state(), config=config, source=parent,
            tokenizer=tokenizer.fingerprint, rows=examples_per_step, conversations=len(train_data), device_batch_size=B,
            machine=machine.describe(), peak_memory=machine.peak_memory()), wait=last or stopping)
    if stopping:
        leave(step, resume)
    if test_due and not stop.is_near():
        with stop.cut_short():                                  # a signal need not wait for its end
            passed = evaluate_pass_at_k(rollouts, test_data, eval_examples, eval_samples)
            print0(f"step {step:5d}/{total_steps} | " + ", ".join(f"pass@{k} {part:.4f}" for k, part in passed.items()))
            log.write(step, **{f"pass@{k}": part for k, part in passed.items()})
    if test_due and stop.is_near():                             # the same command begins with this test again
        finish_writing()
        leave(step, resume)
    if last:
        break

    # one optimizer step: answers to this rank's share of the problems, each with a seed of its own
    machine.synchronize()
    clock = time.perf_counter()
    numbers = range(step * examples_per_step, (step + 1) * examples_per_step)[share]
    groups = rollouts([train_data[n % len(train_data)] for n in numbers],
                      [[seed_of(step, n, i) for i in range(num_samples)] for n in numbers])
    for group in groups:
        for answer, advantage in zip(group, advantages([answer.reward for answer in group])):
            answer.advantage = advantage
    answers = [answer for group in groups for answer in group]
    num_tokens, reward, num_mixed = sum_over_ranks(
        [sum(sum(answer.drawn) for answer in answers), sum(answer.reward for answer in answers),
         sum(any(answer.advantage for answer in group) for group in groups)], machine.device)
    sampled = time.perf_counter()

    # the policy gradient, summed over all drawn tokens of the step, divided by their number
    rates = set_schedule(optimizers, lr_multiplier(step, total_steps, 0.0, 1.0, 0.0), step)
    policy_loss = torch.zeros((), device=machine.device)
    batches = policy_batches(answers, B, max_seq_len) if num_mixed else []
    for i, (x, y, weights) in enumerate(batches):
        last_pass(forward, i == len(batches) - 1)
        loss = forward(to_device(x, machine.device), to_device(y, machine.device), weights=to_device(weights, machine.device))
        loss = loss / num_tokens
        loss.backward()
        policy_loss += loss.detach()
    policy_loss, grad_norm, stopping = clip(model, policy_loss, 0)                  # the ranks agree whether one is to stop
    require_finite(checkpoint_dir, step, examples_per_step, policy_loss, grad_norm)     # a run that has diverged ends here
    for optimizer in optimizers if num_mixed else ():                               # momentum alone does not move the weights
        optimizer.step()
    if not num_mixed and not said:
        print0(f"step {step:5d}: no problem has right and wrong answers, so there is nothing to learn from; such steps "
               "change nothing")
        said = True
    model.zero_grad(set_to_none=True)
    machine.synchronize()
    progress.update(step, reward / (examples_per_step * num_samples), grad_norm, rates, num_tokens, time.perf_counter() - clock,
                    policy_loss=policy_loss, mixed=num_mixed / examples_per_step, sampling_ms=1000 * (sampled - clock))

print0(f"chat_rl: {total_steps} steps in {duration(progress.seconds)}, peak memory {machine.peak_memory() / 1e9:.1f} GB")
finish()
