"""
Time a training step of ours on this machine with random tokens, and beside it, if asked, the original's way.

Every variant lives in a process of its own, whose memory is then its own. They take turns, one at work while the others
wait, so that a busy machine is busy for all of them; the table shows the median of the turns, and the slowest and the
fastest. The first steps (what torch loads when it is first used, compilation) are start-up and no part of the speed.

reads   nothing
writes  a JSON line per variant, where asked
run     python -m bench.train                                                in the project folder
        python -m bench.train --compare=1 --depth=12 --json=results.jsonl
"""
import contextlib
import datetime
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from json import dumps, loads

import numpy as np
import torch

import model as textbook
from bench import reference
from model import GPT, GPTConfig
from muon import build_optimizers, set_schedule
from plumbing import budget
from plumbing.common import ROOT, WORLD_SIZE
from plumbing.configurator import configure
from plumbing.machine import clip, is_out_of_memory, start, to_device

depth = 0                      # layers; 0 = 12 on a GPU, else 2
max_seq_len = 0                # T, tokens in a row; 0 = 1,024 on a GPU, else 256
vocab_size = 0                 # V; 0 = 65,536 on a GPU, else 4,096
rows = 0                       # of an optimizer step; 0 = 128 on a GPU, else 8
device_batch_size = 0          # B, most rows of a micro-batch; 0 = as many as have 32,768 tokens
steps = 0                      # timed in a turn; 0 = 10 on a GPU, else 4
turns = 3                      # of each variant
compare = False                # 1 = the original's way as well (bench/reference.py), and the ratios
compile_model = ""             # 1 = compiled as well as eager, 0 = eager alone; "" = 1 on a GPU, else 0
dtype = ""                     # float32 or bfloat16; "" = bfloat16 on NVIDIA GPUs from the A100 on, else float32
device = ""                    # cuda, mps or cpu; "" = the best there is
threads = 0                    # CPU threads; 0 = as many as torch takes
seed = 42                      # of the first weights and of the tokens
json = ""                      # file to which a JSON line per variant is appended; "" = none
measure = ""                   # set by this script itself: the one variant to run in this process
config = configure(globals(), show=False)

NAMES = {"ours": "ours", "reference": "original's way"}
PARTS = ("forward, backward", "clip", "Muon", "AdamW", "the rest")
RATES = dict(matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004)        # as base_train.py has them
WARM_STEPS = 2                 # of the start-up; and each turn begins with one that finds its caches again

if WORLD_SIZE > 1:
    raise SystemExit("bench.train measures one process; run it without torchrun")
if compile_model not in ("", "0", "1"):
    raise SystemExit(f"compile_model={compile_model}: must be 0 or 1, or empty for what suits the device")
if threads:
    torch.set_num_threads(threads)
machine = start(device, dtype)
gpu = machine.device.type == "cuda"

# the sizes, adapted to the machine
T = max_seq_len or (1024 if gpu else 256)
V = vocab_size or (65536 if gpu else 4096)
step_rows = rows or (128 if gpu else 8)
turn_steps = steps or (10 if gpu else 4)
most_rows = device_batch_size or max(1, 32768 // T)
B = budget.even_batch(step_rows, most_rows)
model_config = GPTConfig(sequence_len=T, vocab_size=V, **budget.model_shape(depth or (12 if gpu else 2)))
modes = ["compiled", "eager"] if compile_model == "1" or gpu and not compile_model else ["eager"]


class Variant:
    """One way to train a model, on random tokens, at work in this process."""

    def __init__(self, variant, mode, config):
        torch.manual_seed(seed)                                  # the same first weights for every variant
        compiled = mode == "compiled"
        if variant == "ours":
            self.model, self.clip = GPT(config, machine.dtype).to(machine.device), clip
            self.optimizers = build_optimizers(self.model, **RATES)
            compiler = textbook.compiled                         # each of its parts
        else:
            self.model, self.clip = reference.PlainGPT(config, machine.dtype).to(machine.device), reference.clip
            self.optimizers = reference.build_optimizers(self.model, **RATES, compiled=compiled)
            compiler = functools.partial(torch.compile, dynamic=False)
        self.forward = compiler(self.model) if compiled else self.model
        rng = np.random.default_rng(seed)
        batches = [rng.integers(config.vocab_size, size=(step_rows, config.sequence_len + 1)) for _ in range(4)]
        self.batches = [(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])) for ids in batches]
        self.num_steps = 0

    def step(self, by_part):
        """
        One optimizer step, as in base_train.py.

        by_part  wait for the device after each part, which a training run does not do
        returns  loss, seconds, {part: seconds}
        """
        parts = dict.fromkeys(PARTS, 0.0)
        machine.synchronize()
        begin = clock = time.perf_counter()

        def lap(part):
            nonlocal clock
            if by_part:
                machine.synchronize()
                clock, before = time.perf_counter(), clock
                parts[part] += clock - before

        x, y = self.batches[self.num_steps % len(self.batches)]
        set_schedule(self.optimizers, 1.0, self.num_steps)
        train_loss = torch.zeros((), device=machine.device)
        lap("the rest")
        for first in range(0, len(x), B):
            micro = slice(first, first + B)
            loss = self.forward(to_device(x[micro], machine.device), to_device(y[micro], machine.device)) / x.size
            loss.backward()
            train_loss += loss.detach()
        lap("forward, backward")
        train_loss, *_ = self.clip(self.model, train_loss, 1.0)
        lap("clip")
        for optimizer, part in zip(self.optimizers, ("AdamW", "Muon")):
            optimizer.step()
            lap(part)
        self.model.zero_grad(set_to_none=True)
        lap("the rest")
        machine.synchronize()
        self.num_steps += 1
        return train_loss, time.perf_counter() - begin, parts

    def turn(self):
        """
        Some steps, the first of which does not count.

        returns  dict(seconds of a step, ms = {part: of a step}, both medians, loss after the last step, peak_bytes)
        """
        self.move(machine.device)
        self.step(by_part=False)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = [self.step(by_part=not gpu) for _ in range(turn_steps)]
        apart = [self.step(by_part=True) for _ in range(turn_steps)] if gpu else taken
        return dict(seconds=statistics.median(seconds for _, seconds, _ in taken), loss=apart[-1][0],
                    ms={part: 1000 * statistics.median(parts[part] for _, _, parts in apart) for part in PARTS},
                    peak_bytes=machine.peak_memory())

    def rest(self):
        """Leave the whole GPU to the others."""
        if gpu:
            self.move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def move(self, device):
        """Weights and optimizer state to another device, where they are not there already."""
        if self.model.device != device:
            self.model.to(device)
            for optimizer in self.optimizers:
                optimizer.load_state_dict(optimizer.state_dict())   # takes the state to where its parameters are


def work(variant, mode):
    """In a process of its own: start up, then a turn for each line on stdin, each answered by a JSON line."""
    try:
        floor = 0
        if not gpu:                                              # what torch itself takes, once everything is loaded
            smallest = GPTConfig(sequence_len=8, vocab_size=32, **budget.model_shape(1))
            Variant(variant, "eager", smallest).step(by_part=True)
            floor = machine.peak_memory()
        begin = time.perf_counter()
        worker = Variant(variant, mode, model_config)
        for _ in range(WARM_STEPS):
            worker.step(by_part=False)
        answer = dict(startup_seconds=time.perf_counter() - begin)
        worker.rest()
        print(dumps(answer), flush=True)
        for _ in sys.stdin:
            answer = worker.turn()
            answer["peak_bytes"] -= floor
            worker.rest()
            print(dumps(answer), flush=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(dumps(dict(failed="out of memory")), flush=True)


class Worker:
    """The process of one variant, seen from outside, and what it has answered so far."""

    def __init__(self, variant, mode):
        self.variant, self.mode, self.turns, self.failed = variant, mode, [], ""
        self.label = f"{NAMES[variant]}, {mode}"
        flags = [f"--{knob}={value}" for knob, value in config.items() if knob != "measure"]
        self.errors = tempfile.TemporaryFile(mode="w+", errors="replace")
        command = [sys.executable, "-m", "bench.train", *flags, f"--measure={variant}-{mode}"]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors)
        self.startup_seconds = self.answer().get("startup_seconds")

    def answer(self):
        """The next JSON line; where there is none to come, {} and the reason in self.failed."""
        for line in self.process.stdout:
            if line.startswith("{"):
                answer = loads(line)
                self.failed = answer.get("failed", "")
                return answer
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip() and not line.startswith(" ")]
        named = [line for line in lines if "Error: " in line]
        killed = self.process.wait() == -9                       # by the kernel, which then needs its memory back
        self.failed = "out of memory" if killed else "failed: " + ["without a word", *lines, *named][-1][:200]
        return {}

    def take_turn(self):
        with contextlib.suppress(BrokenPipeError):               # it is gone: what it left behind says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        answer = self.answer()
        if not self.failed:
            self.turns.append(answer)

    def end(self):
        """The process ends by itself when nobody speaks to it any more; one that does not is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def result(self):
        """All of it in one row: what, on what, and how fast; or why not."""
        row = dict(variant=self.variant, mode=self.mode, **about)
        if self.failed:
            return dict(row, failed=self.failed)
        speeds = [step_rows * T / turn["seconds"] for turn in self.turns]
        speed = statistics.median(speeds)
        mfu = speed * budget.flops_per_token(model_config) / machine.peak_flops if machine.peak_flops else None
        return dict(row, tokens_per_second=speed, lowest=min(speeds), highest=max(speeds), mfu=mfu,
                    peak_bytes=max(turn["peak_bytes"] for turn in self.turns), startup_seconds=self.startup_seconds,
                    step_ms=statistics.median(1000 * turn["seconds"] for turn in self.turns),
                    ms={part: statistics.median(turn["ms"][part] for turn in self.turns) for part in PARTS},
                    loss=self.turns[-1]["loss"])


def print_table(results):
    """The rows of all variants, the ratios of those that both ways have, and the parts of a step."""
    print(f"\n{'':<26}{'tok/s':>9}{'slowest ... fastest turn':>26}{'MFU':>8}{'peak MB':>9}{'start-up s':>12}"
          f"{'loss':>8}")
    of = {}
    for row in results:
        label = f"{NAMES[row['variant']]}, {row['mode']}"
        if "failed" in row:
            print(f"{label:<26}  {row['failed']}")
            continue
        of[row["variant"], row["mode"]] = row
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "-"
        print(f"{label:<26}{row['tokens_per_second']:>9,.0f}{row['lowest']:>14,.0f} ...{row['highest']:>8,.0f}{mfu:>8}"
              f"{row['peak_bytes'] / 1e6:>9,.0f}{row['startup_seconds']:>12.1f}{row['loss']:>8.3f}")
    for mode in modes:
        if ("ours", mode) in of and ("reference", mode) in of:
            ours, plain = of["ours", mode], of["reference", mode]
            speed = ours["tokens_per_second"] / plain["tokens_per_second"]
            memory = ours["peak_bytes"] / max(1, plain["peak_bytes"])
            print(f"{'ours / original, ' + mode:<26}{speed:>8.2f}x{'':>34}{memory:>8.2f}x")
    print(f"\n{'ms of a step':<26}" + "".join(f"{part:>19}" for part in PARTS) + f"{'in all':>10}")
    for row in of.values():
        print(f"{NAMES[row['variant']] + ', ' + row['mode']:<26}" +
              "".join(f"{row['ms'][part]:>19,.1f}" for part in PARTS) + f"{row['step_ms']:>10,.1f}")
    if gpu:
        print("the parts are from steps of their own, with a wait after each part: so they add up to more")
    elif "compiled" in modes:
        print("on a CPU the memory of a compiled variant has the compiler in it")


def append_line(path, row):
    """A JSON line at the end of the file, in a single write, so that others may append to it at the same time."""
    with open(path, "ab+", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        cut_short = f.read(1) not in (b"", b"\n")               # what was killed while it wrote a line
        f.write(b"\n" * cut_short + dumps(row).encode() + b"\n")


if measure:
    work(*measure.split("-"))
    raise SystemExit
if json:
    try:
        open(json, "ab").close()                                # now, before anything is measured for nothing
    except OSError as error:
        raise SystemExit(f"json={json}: {error.strerror}") from None

name = f"{machine.name}, {machine.dtype_name}" + ("" if gpu else f", {machine.threads} CPU threads")
print(f"d{model_config.n_layer}, T {T:,}, V {V:,}: {budget.num_params(model_config)['total']:,} parameters; steps of "
      f"{step_rows * T:,} tokens ({step_rows} rows, {B} at a time) on {name}; {turns} turns of {turn_steps} steps",
      flush=True)
about = dict(date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **machine.describe(),
             **vars(model_config), rows=step_rows, device_batch_size=B, steps=turn_steps, turns=turns)
workers = []
try:
    for mode in modes:
        for variant in NAMES if compare else ["ours"]:
            worker = Worker(variant, mode)
            workers.append(worker)
            print(f"start-up: {worker.label}: " + (worker.failed or f"{worker.startup_seconds:.1f} s"), flush=True)
    for turn_number in range(turns):
        for worker in workers:
            if not worker.failed:
                worker.take_turn()
                speed = worker.failed or f"{step_rows * T / worker.turns[-1]['seconds']:,.0f} tok/s"
                print(f"turn {turn_number + 1}: {worker.label}: {speed}", flush=True)
finally:
    for worker in workers:
        worker.end()
results = [worker.result() for worker in workers]
print_table(results)
for row in results if json else []:
    append_line(json, row)
if all(worker.failed for worker in workers):
    raise SystemExit("bench.train: no variant could be measured")
