"""
Speed of generation: our engine beside a cache that grows by concatenation, and beside no cache at all.

All three draw the likeliest token of the same random model after the same random prompts, in turns; each token is
timed, and the middle time counts, so that what else a machine does in between disturbs little. The last line of a model
is what one cache with rows that join and leave is for: requests of different lengths, all at once and one after the
other.

run     python -m bench.engine
        python -m bench.engine --depths=8 --batches=8 --contexts=1024
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import functools
import statistics
import time
from types import SimpleNamespace

import torch

from engine import REPEATS, Batch, Reply, causal_mask
from model import GPT, GPTConfig
from plumbing.budget import model_shape
from plumbing.configurator import configure
from plumbing.machine import start

depths = "2,8"                 # sizes of model
batches = "1,8"                # rows at a time
contexts = "64,1024"           # tokens that a row holds at the end
vocab_size = 4096
new_tokens = 16                # tokens of a row that are timed; on a GPU at least 48, of which the first are without a graph
no_cache = True                # 0 = leave out the way without a cache, which is slow
turns = 3                      # each way is timed so often, in turns
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = bfloat16 on a GPU that has it, else float32
config = configure(globals(), show=False)

# ends no reply and knows no calculator: only the model's time counts
TOKENIZER = SimpleNamespace(special=lambda name: -1, encode=lambda text: [], decode=lambda ids: "")


class GrowingCache:
    """The plain way: each token's keys and values are put behind the others, in new memory."""

    def __init__(self):
        self.layers, self.length = {}, 0

    def begin(self, T):
        return slice(self.length, self.length + T)

    def append(self, layer, k, v):
        if layer in self.layers:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return k, v, causal_mask(k.size(2) - self.length, k.size(2), k.device)

    def advance(self, T):
        self.length += T


def ours(model, prompts, count, graphed=True):
    batch = Batch(model, len(prompts), len(prompts[0]) + count + 2)     # one more than is asked for: it is looked up as well
    batch.graphed_step = batch.graphed_step if graphed else None
    for prompt in prompts:
        batch.add(Reply(TOKENIZER, prompt, count + 2, temperature=0.0))
    while True:
        yield [token for _, token, _ in batch.step()]


@torch.inference_mode()
def growing(model, prompts, count):
    cache, idx = GrowingCache(), torch.tensor(prompts, device=model.device)
    while True:
        idx = model(idx, kv_cache=cache)[:, -1].argmax(dim=-1, keepdim=True)
        yield idx[:, 0].tolist()


@torch.inference_mode()
def uncached(model, prompts, count):
    idx = torch.tensor(prompts, device=model.device)
    while True:
        idx = torch.cat((idx, model(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        yield idx[:, -1].tolist()


def seconds_of(way, model, prompts, count):
    """(seconds of each token after the first, these tokens) of one way to go on from prompts."""
    steps, seconds, tokens = way(model, prompts, count), [], []
    next(steps)                                                  # the prompt is read
    for _ in range(count):
        clock = time.perf_counter()
        tokens.append(next(steps))                               # on the CPU, as numbers: the device has finished
        seconds.append(time.perf_counter() - clock)
    return seconds, tokens


def written(model, requests, slots):
    """Seconds that requests (prompt, tokens wanted) take, so many at a time."""
    batch = Batch(model, slots, max(len(prompt) + count for prompt, count in requests))
    for prompt, count in requests:
        batch.add(Reply(TOKENIZER, prompt, count, temperature=0.0))
    machine.synchronize()
    clock = time.perf_counter()
    while batch.waiting or batch.rows or batch.reading:
        batch.step()
    machine.synchronize()
    return time.perf_counter() - clock


machine = start(device, dtype)
num_timed = max(new_tokens, 3 * REPEATS if machine.device.type == "cuda" else 0)
if min(map(int, contexts.split(","))) < num_timed + 3:
    raise SystemExit(f"contexts={contexts}: each must hold a prompt and the {num_timed + 2} new tokens")
print(f"{machine.name}, {machine.dtype_name}, {machine.threads} CPU threads, vocabulary {vocab_size:,}; tokens per second")
ways = dict(ours=ours, growing=growing, **({"no cache": uncached} if no_cache else {}))
if machine.device.type == "cuda":
    ways["no graph"] = functools.partial(ours, graphed=False)
print(f"{'model':8}{'batch':>6}{'context':>9}" + "".join(f"{name:>12}" for name in ways) + "".join(
    f"   ours / {name}" for name in list(ways)[1:]))
for depth in map(int, depths.split(",")):
    model = GPT(GPTConfig(sequence_len=max(map(int, contexts.split(","))), vocab_size=vocab_size, **model_shape(depth)),
                machine.dtype).to(machine.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for B in map(int, batches.split(",")):
        for context in map(int, contexts.split(",")):
            length = context - num_timed - 2
            prompts = torch.randint(vocab_size, (B, length), generator=torch.Generator().manual_seed(1)).tolist()
            timed = {name: [] for name in ways}
            for _ in range(turns):
                tokens = {}
                for name, way in ways.items():
                    seconds, tokens[name] = seconds_of(way, model, prompts, num_timed)
                    timed[name] += seconds
            same = machine.dtype_name != "float32" or all(tokens[name] == tokens["ours"] for name in ways)
            speed = {name: B / statistics.median(times) for name, times in timed.items()}
            ratios = "".join(f"{speed['ours'] / speed[name]:{10 + len(name)}.2f}" for name in list(ways)[1:])
            print(f"d{depth:<7}{B:6}{context:9,}" + "".join(f"{speed[name]:12,.0f}" for name in ways) + ratios
                  + ("" if same else "  other tokens"))
    context = model.config.sequence_len
    requests = [([i] * (context // 16 * (i + 1)), context // 4 - i * context // 64) for i in range(8)]
    total, slots, alone = sum(count for _, count in requests), [], []
    for _ in range(turns):
        slots.append(written(model, requests, 8))
        alone.append(sum(written(model, [request], 1) for request in requests))
    slots, alone = (total / statistics.median(times) for times in (slots, alone))
    print(f"d{depth}: 8 requests of different lengths, prompts read: {slots:,.0f} together, {alone:,.0f} one after the other, "
          f"{slots / alone:.2f}x")
