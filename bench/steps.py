"""
What the stages spend their time with, timed: optimizer steps, evaluation and answers, with random tokens.

plan.py makes hours of it. Nothing is read, and nothing written but fit.json, which the real start then finds.
"""
import subprocess
import sys
import time

import numpy as np
import torch

from engine import KVCache, in_compute_dtype
from model import GPT, GPTConfig, compiled
from muon import build_optimizers, set_schedule
from plumbing.budget import flops_per_token
from plumbing.common import ROOT
from plumbing.fit import fit_micro_batch
from plumbing.machine import clip, start, time_numerics, to_device, use_numerics
from tasks import simple_spelling

SECONDS = 3            # that each thing is repeated for, and at least twice


def timed(machine, work, *args):
    """Mean seconds of work(*args), of which the first time does not count."""
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        clock = time.perf_counter()
        work(*args)
        machine.synchronize()
        times.append(time.perf_counter() - clock)
    return sum(times[1:]) / (len(times) - 1)


def batches(machine, rows, B, T, vocab_size, scored=1.0):
    """rows random rows of T tokens in micro-batches (x, y) of at most B; of the targets a share `scored` counts."""
    random = np.random.default_rng(0)
    for first in range(0, rows, B):
        x = random.integers(vocab_size, size=(min(B, rows - first), T))
        yield to_device(x, machine.device), to_device(np.where(random.random(x.shape) < scored, x, -1), machine.device)


def step(model, forward, optimizers, micro_batches):
    """One optimizer step as the stages make it, at a rate of 0."""
    set_schedule(optimizers, 0.0, 0)
    for x, y in micro_batches():
        loss = forward(x, y) / x.numel()
        loss.backward()
    clip(model, loss.detach(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def score(model, micro_batches):
    for x, y in micro_batches():
        model.score(x, y)


@torch.inference_mode()
def answer(model, passes):
    """So many tokens of 16 answers at a time, each the likeliest."""
    cache, idx = KVCache(model, 16, passes), torch.zeros(16, 1, dtype=torch.long, device=model.device)
    for _ in range(passes):
        idx = model(idx, kv_cache=cache)[:, -1].argmax(dim=-1, keepdim=True)


def measure(shape, batch, sft_batch, data, gradient_checkpointing):
    """
    (speed, B, bytes of memory) of this machine, in one process.

    shape      what a GPTConfig takes, as a dict
    batch      (rows of a step that a process has, rows of a micro-batch; 0 = fitted); sft_batch: of fine-tuning
    data       dict(mid_scored, sft_row, sft_scored): what the conversations are like, see plan.py
    speed      dict(base, mid, sft, score, score_sft: FLOP/s; answer: seconds of a pass per layer; start: of a program;
               begin: of each stage before its first step), as plan.py takes it
    """
    (rows, asked), (sft_rows, sft_B), config = batch, sft_batch, GPTConfig(**shape)
    machine, clock = start(), time.perf_counter()
    T, V, flops, cuda = config.sequence_len, config.vocab_size, flops_per_token(config), machine.device.type == "cuda"
    if machine.device.type == "cpu":
        use_numerics(machine, "", time_numerics(GPT(config), rows))
    model = GPT(config, machine.dtype, gradient_checkpointing).to(machine.device)
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    B, forward = fit_micro_batch(machine, compiled(model) if cuda else model, optimizers, rows, asked, None)
    begin = time.perf_counter() - clock

    def step_speed(rows, B, T, scored):
        seconds = timed(machine, step, model, forward, optimizers, lambda: batches(machine, rows, B, T, V, scored))
        return rows * T * flops / seconds

    speed = dict(base=step_speed(rows, B, T, 1.0))
    speed["mid"] = speed["base"] if cuda else step_speed(rows, B, T, data["mid_scored"])     # a CPU skips the others
    speed["score"] = B * T * flops / 3 / timed(machine, score, model, lambda: batches(machine, B, B, T, V))
    memory, model.compiled_parts = machine.peak_memory(), None               # fine-tuning and answers are not compiled
    sft_B, row = min(sft_rows, sft_B or sft_rows), min(data["sft_row"], T)
    speed["sft"] = step_speed(sft_rows, sft_B, row, data["sft_scored"])
    speed["score_sft"] = sft_B * row * flops / 3 / timed(
        machine, score, model, lambda: batches(machine, sft_B, sft_B, row, V, data["sft_scored"]))
    speed["answer"] = timed(machine, answer, in_compute_dtype(model), min(32, T)) / min(32, T) / config.n_layer
    clock = time.perf_counter()
    subprocess.run([sys.executable, "chat_sft.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    speed["start"] = time.perf_counter() - clock
    clock = time.perf_counter()
    simple_spelling(1, "test")[0]                                # reads all words, as two programs of a stage do
    words = 2 * (time.perf_counter() - clock)
    return speed | dict(begin=dict(base=begin, mid=words + begin * cuda, sft=words, rl=words, report=0.0)), B, memory
