"""
One measurement on this machine with random tokens: what bench/gpu_day.sh asks a process of its own for.

reads   nothing
writes  its figures, one JSON object in the last line that it prints
run     python -m bench.measure --what=fit --depth=20                 the micro-batch that fits, against the formula
        python -m bench.measure --what=fit --depth=20 --gigabytes=24   the same on a card of that size
        python -m bench.measure --what=memory --depth=12              memory of a training step
        python -m bench.measure --what=decode --depth=12              generation
"""
import json
import statistics
import time
from types import SimpleNamespace

import torch

from engine import Engine
from model import GPT, GPTConfig, compiled
from muon import build_optimizers
from plumbing import budget, fit
from plumbing.configurator import configure
from plumbing.machine import cores, start

what = ""                      # device, fit, memory or decode
depth = 12                     # layers
gigabytes = 0.0                # fit: memory of the card that is played; 0 = the one there is
device = ""                    # cuda or cpu; "" = the best there is
config = configure(globals(), show=False)

SEQUENCE_LEN = {12: 1024, 14: 1536}      # as the configurations have it; 2,048 from there on
MICRO_BATCH = {12: 64, 14: 42}           # memory: rows, as in the predictions; 16 from there on
TOY = dict(sequence_len=64, vocab_size=512)    # on a CPU
PROMPT, REPLY = 512, 128                 # decode: tokens

machine = start(device)
gpu = machine.device.type == "cuda"
shape = dict(sequence_len=SEQUENCE_LEN.get(depth, 2048), vocab_size=65536) if gpu else TOY
model_config = GPTConfig(**shape, **budget.model_shape(depth))
T = model_config.sequence_len


def describe_device():
    """What the results are labelled with."""
    found = dict(device=machine.name if gpu else f"CPU, {cores()} cores", gpu=gpu, dtype=machine.dtype_name,
                 torch=torch.__version__)
    if gpu:
        found.update(gigabytes=round(torch.cuda.mem_get_info()[1] / 1e9, 1), cuda=torch.version.cuda,
                     capability=list(torch.cuda.get_device_capability()))
    return found


def trainable():
    """A model and its optimizers as base_train.py has them."""
    torch.manual_seed(42)
    model = GPT(model_config, machine.dtype).to(machine.device)
    optimizers = build_optimizers(model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004)
    return compiled(model) if gpu else model, optimizers


def play_card(num_bytes):
    """
    From here on the GPU has num_bytes of memory: that is what it says is free, and what torch can take of it.

    What a process needs before torch takes anything (CUDA itself) counts as on a card of that size.
    """
    free, total = torch.cuda.mem_get_info()
    if num_bytes > total:
        raise SystemExit(f"gigabytes={gigabytes:g}: this card has {total / 1e9:.0f}")
    left, limit = num_bytes - (total - free), torch.cuda.set_per_process_memory_fraction
    machine.free_bytes = budget.usable_bytes(left)
    torch.cuda.set_per_process_memory_fraction = lambda share: limit(min(share * num_bytes, left) / total)
    torch.cuda.set_per_process_memory_fraction(1.0)


def measure_fit():
    """The micro-batch found for a step of 524,288 tokens, what was tried on the way, and what the formula says."""
    if gigabytes and gpu:
        play_card(gigabytes * 1e9)
    elif gigabytes:
        machine.free_bytes = gigabytes * 1e6                     # a toy model, a toy card
    rows, tries, attempt = budget.rows_per_step(524288 if gpu else 4096, T), [], fit.attempt
    guess = budget.micro_batch(rows, 1, 0, machine.free_bytes, model_config, machine.dtype.itemsize)
    model, optimizers = trainable()

    def watched(machine, model, optimizers, B, rest):
        clock = time.perf_counter()
        speed = attempt(machine, model, optimizers, B, rest)
        tries.append(dict(B=B, speed=speed, peak_bytes=machine.peak_memory(), seconds=time.perf_counter() - clock,
                          reserved_bytes=torch.cuda.max_memory_reserved() if gpu else None))
        return speed

    fit.attempt = watched
    fit.write_json = lambda path, content: None                  # nor is it kept
    fit.read_json = lambda path: {}                              # the search is what is measured, not what it left
    clock = time.perf_counter()
    B, _ = fit.fit_micro_batch(machine, model, optimizers, rows, 0, None)
    seconds = time.perf_counter() - clock
    if not gpu:                                                  # where nothing is tried
        fit.attempt(machine, model, optimizers, B, 0)
    best = next(one for one in tries if one["B"] == B and one["speed"])
    checkpointing = model.gradient_checkpointing
    tried = [f"{one['B']}: " + (f"{one['speed']:,.0f} tok/s" if one["speed"] else "no room") for one in tries]
    return dict(sequence_len=T, rows=rows, micro_batch_guessed=guess, micro_batch=B, tokens_per_second=best["speed"],
                mfu=mfu(best["speed"]), **beside_formula(B, checkpointing, best["peak_bytes"]),
                reserved_bytes=best["reserved_bytes"], search_seconds=seconds, gradient_checkpointing=checkpointing,
                compiled=model.compiled_parts is not None, tried=", ".join(tried))


def beside_formula(B, checkpointing, peak_bytes):
    """What the formula says for state and rows, the peak, and what is above it: a chunk of logits, workspaces."""
    row = budget.row_bytes(model_config, machine.dtype.itemsize, checkpointing)
    formula = budget.state_bytes(model_config) + B * row
    return dict(formula_bytes=formula, peak_bytes=peak_bytes, above_formula_bytes=peak_bytes - formula if gpu else None)


def mfu(speed):
    return speed * budget.flops_per_token(model_config) / machine.peak_flops if machine.peak_flops else None


def measure_memory():
    """Memory of training steps: what is kept for the way back, and the most at a time."""
    B = MICRO_BATCH.get(depth, 16) if gpu else 2
    model, optimizers = trainable()
    idx = torch.arange(B * T, device=machine.device).view(B, T) * 7919 % model_config.vocab_size
    held = torch.cuda.memory_allocated if gpu else lambda: 0
    for turn in range(3):                                        # compiles, makes the optimizers' state, counts
        if gpu and turn == 2:
            torch.cuda.reset_peak_memory_stats()
        before = held()
        loss = model(idx, idx)
        kept = held() - before
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    # in values of the model's width, per token and layer; the head's gradient, float32, is none of them
    value = B * T * model_config.n_embd * model_config.n_layer * machine.dtype.itemsize
    return dict(sequence_len=T, micro_batch=B, kept_bytes=kept if gpu else None,
                kept_values=(kept - 4 * model.lm_head.weight.numel()) / value if gpu else None,
                kept_values_by_formula=10 + 4 / model_config.n_layer, **beside_formula(B, False, machine.peak_memory()),
                reserved_bytes=torch.cuda.max_memory_reserved() if gpu else None,
                compiled=model.compiled_parts is not None)


def measure_decode():
    """Generation with first weights, 1 row and 8: the prompt, and the tokens after it."""
    prompt, reply = (PROMPT, REPLY) if gpu else (32, 16)
    # never drawn, so no reply ends early
    tokenizer = SimpleNamespace(vocab_size=model_config.vocab_size, bos=-1, special=lambda name: -1)
    engine = Engine(GPT(model_config, machine.dtype).to(machine.device).eval(), tokenizer)
    results = []
    for B in (1, 8):
        prompts = [[(7919 * (i + row)) % model_config.vocab_size for i in range(prompt)] for row in range(B)]
        for _ in range(2):                                       # the first one warms up
            clocks = [time.perf_counter()]
            for _ in engine.generate(prompts, max_tokens=reply, temperature=1.0, top_k=50):
                clocks.append(time.perf_counter())               # tokens are numbers by now: the device is done
        # the middle one: on a GPU one of the first is captured as a graph, which takes longer
        per_token = statistics.median(after - before for before, after in zip(clocks[1:], clocks[2:]))
        results.append(dict(batch=B, prompt_tokens=prompt, new_tokens=len(clocks) - 1, tokens_per_second=B / per_token,
                            token_ms=1000 * per_token, first_token_ms=1000 * (clocks[1] - clocks[0])))
    return results


measures = dict(device=describe_device, fit=measure_fit, memory=measure_memory, decode=measure_decode)
if what not in measures:
    raise SystemExit(f"what={what}: must be one of {', '.join(measures)}")
print(json.dumps(measures[what]()))
