"""
Generate text: a trained model and its tokenizer in, tokens out, with the calculator in between.

in    a GPT, a Tokenizer, prompts as lists of token ids; no file and no knob is read here
out   Engine.generate (step by step), Engine.generate_batch (whole replies to many prompts), Batch (replies that
      begin and end whenever they do)

The keys and values of tokens already seen are kept (KVCache), so a new token costs one pass over one position instead
of the whole text. Each row of the cache stands at a position of its own, so replies of all lengths share a pass: one
that is over leaves, and the next one takes its place. A row does not notice its neighbours: it sees its own text alone
and draws with random numbers of its own.
"""
import copy
import hashlib
import math
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from plumbing.calculator import calculate
from tokenizer import Tokenizer

STRIDE_CPU = 64        # tokens of each prompt that are read at a time, at least: fewer take almost as long
STRIDE_GPU = 1024      # assumed, not measured: there another pass costs more than tokens that only fill up
READ_ALIKE = 256       # a graph reads a multiple of so many positions; assumed as well
REPEATS = 16           # passes of a shape before it is worth a graph; assumed as well


class KVCache:
    """
    The keys and values of every layer for the tokens of some rows, in memory that is taken once.

    kv       (n_layer, 2, B, H_kv, max_len, D) in the model's compute type
    lengths  tokens that each row holds, a list; what lies behind them is overwritten before it is read
    used     rows that take part in a pass: the first ones
    """

    def __init__(self, model, B, max_len):
        config = model.config
        assert max_len <= config.sequence_len, f"{max_len} tokens in a context of {config.sequence_len}"
        # zeros, as what nobody may see is still multiplied, by 0
        self.kv = torch.zeros(config.n_layer, 2, B, config.n_kv_head, max_len, config.n_embd // config.n_head,
                              dtype=model.compute_dtype, device=model.device)
        self.row, self.head, self.position = (torch.arange(self.kv.size(dim), device=model.device) for dim in (2, 3, 4))
        self.lengths, self.used = [0] * B, B

    def begin(self, T):
        """
        Say that T tokens of each row follow; rows of different lengths take one token at a time.

        returns  their positions: a slice for all rows, or (B, 1)
        """
        lengths, device = self.lengths[:self.used], self.kv.device
        low, high = min(lengths), max(lengths)
        end = high + T
        assert end <= self.kv.size(4), f"the cache holds {self.kv.size(4)} tokens, not {end}"
        assert low == high or T == 1, "rows of different lengths take one token at a time"
        if low != high:
            return self.begin_at(torch.tensor(lengths, device=device)[:, None], end)
        self.layers = self.views(end)
        self.places, self.mask = (slice(None), slice(None), slice(low, end)), causal_mask(T, end, device)
        return slice(low, end)

    def begin_at(self, at, end):
        """Say that a token of each row follows at its position in `at` (B, 1), and that `end` tokens are looked at."""
        # what the layers have in common is made once: views of their memory, where to write, whom nobody may see
        self.layers = self.views(end)
        self.places = self.row[:self.used, None, None], self.head[:, None], at[:, :, None]
        unseen = self.position[:end] > at
        # -inf is added to a score; of True and False every layer would make that anew, as some kernels would of rows whose
        # beginnings are no multiple of 8 apart
        mask = torch.zeros(len(at), 1, 1, math.ceil(end / 8) * 8, dtype=self.kv.dtype, device=at.device)[..., :end]
        self.mask = mask.masked_fill_(unseen[:, None, None], -torch.inf)           # (B, 1, 1, end)
        return at

    def views(self, end):
        """(keys, values) of each layer, (B, H_kv, end, D) both."""
        return list(zip(*self.kv[:, :, :self.used, :, :end].unbind(1)))

    def append(self, layer, k, v):
        """Add k, v (B, H_kv, T, D) of the new tokens -> the layer's keys and values (B, H_kv, end, D), and the mask."""
        keys, values = self.layers[layer]
        keys[self.places], values[self.places] = k, v
        return keys, values, self.mask

    def advance(self, T):
        """Count T tokens as seen; once per forward pass, when every layer has appended."""
        self.lengths[:self.used] = [length + T for length in self.lengths[:self.used]]

    def copy(self, row, other, other_row, length):
        """Row `row` becomes the first `length` tokens of a row of another cache, or of this one."""
        self.kv[:, :, row, :, :length] = other.kv[:, :, other_row, :, :length]
        self.lengths[row] = length


def causal_mask(T, T_all, device):
    """Which of T_all tokens the last T of them see, (T, T_all); None where attention knows: all of them are new, or one."""
    return None if T in (1, T_all) else torch.ones(T, T_all, dtype=torch.bool, device=device).tril(T_all - T)


class GraphedStep:
    """
    A pass over one new token of each row as a CUDA graph: one call starts all its kernels, hundreds, of which most
    take less time than it takes to start them.

    A graph repeats the same kernels on the same memory. So what changes from pass to pass is in a tensor, and how many
    rows and positions take part is rounded up: there is a graph for each such shape, once it has had REPEATS passes.
    source: CUDA C++ Programming Guide, "CUDA Graphs"
    """
    possible = True            # until it turns out that it is not

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        # the new token of each row, and its position
        self.now = torch.zeros(2, cache.kv.size(2), dtype=torch.int64, device=model.device)
        self.passes, self.graphs = Counter(), {}               # both by (rows, positions)
        # of the memory that the graphs work in: they run one after the other, so it can be the same
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def __call__(self, tokens):
        """The new tokens of the cache's first rows, a list -> logits (B, V) of what follows, until the next call."""
        cache, B, shape = self.cache, len(tokens), self.kv_shape(len(tokens))
        now = torch.zeros(self.now.shape, dtype=torch.int64)   # a row that takes no part writes where the next one begins
        now[:, :B] = torch.tensor([tokens, cache.lengths[:B]])
        self.now.copy_(now)
        if self.possible and self.passes[shape] == REPEATS:
            self.capture(shape)
        if shape in self.graphs:
            replay, logits = self.graphs[shape]
            replay()
        else:
            logits = self.run(shape)
        self.passes[shape] += 1
        cache.used = B
        cache.advance(1)
        return logits[:B]

    def kv_shape(self, B):
        """How much of the cache a pass over B rows takes: (rows, positions), so that few graphs will do."""
        _, _, slots, _, max_len, _ = self.cache.kv.shape
        end = math.ceil((max(self.cache.lengths[:B]) + 1) / READ_ALIKE) * READ_ALIKE
        return min(slots, 1 << (B - 1).bit_length()), min(max_len, end)

    def run(self, shape):
        """The pass itself, with nothing in it that is not the same the next time."""
        rows, end = shape
        self.cache.used = rows
        cache = SimpleNamespace(begin=lambda T: self.cache.begin_at(self.now[1, :rows, None], end),
                                append=self.cache.append, advance=lambda T: None)
        return self.model(self.now[0, :rows, None], kv_cache=cache)[:, -1]

    def capture(self, shape):
        """Make the graph of a shape, where that is possible."""
        try:
            self.graphs[shape] = captured(lambda: self.run(shape), self.pool)
        except RuntimeError as error:
            GraphedStep.possible = False
            why = str(error).partition("\n")[0]
            print(f"(no CUDA graph: {why}; generation goes on without, slower)", file=sys.stderr)


def captured(function, pool):
    """(a function that repeats what `function` does on a GPU, what it returns: the same tensors each time)"""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):     # of a server, other threads go on meanwhile
        result = function()
    return graph.replay, result


def in_compute_dtype(model):
    """
    The model with its weights in the type that they are multiplied in, so that no token waits until they are cast.

    The logits are the same to the last bit: what is float32 but for the weights stays so.
    """
    if model.compute_dtype == torch.float32 or model.lm_head.weight.dtype == model.compute_dtype:
        return model
    cast = {id(p): torch.nn.Parameter(p.to(model.compute_dtype), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)                          # which takes what is in this dict for copied already


def seed_of(*names):
    """A seed that is a function of some names and numbers alone; of 32 bits, as a CPU's generator looks at no more."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:4], "big")


@dataclass(eq=False)
class Reply:
    """
    One reply while it is written: how it is drawn, and when the calculator is asked.

    temperature  0 = always the likeliest token; 1 = as the model has it; more = wilder
    top_k        only so many of the likeliest tokens can be drawn; 0 = all
    top_p        only the likeliest tokens that together have this probability can be drawn; 1 = all
    likeliest    so many of the tokens that could have come are noted, with what the model gave each; 0 = none

    The model writes <|python_start|> expression <|python_end|>; then the result is put in as
    <|output_start|> result <|output_end|>, and the model goes on as if it had written that.
    """
    tokenizer: Tokenizer
    prompt: list               # ids
    left: int = 256            # tokens it may still get, drawn or forced
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    likeliest: int = 0
    noted: tuple | None = None                                 # of the last token: its log-probability, [(id, that), ...]
    generator: torch.Generator | None = None                   # of its own random numbers, made when it joins
    forced: deque = field(default_factory=deque)               # the calculator's answer, still to be put in
    call: list | None = None   # tokens of the open expression; None outside of one

    def __post_init__(self):
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1, \
            f"temperature={self.temperature}, top_k={self.top_k}: not below 0; top_p={self.top_p}: above 0, at most 1"

    def take(self, drawn):
        """Settle on the next token -> (token, was it drawn)."""
        self.left -= 1
        if self.forced:
            return self.forced.popleft(), False
        special = self.tokenizer.special
        if drawn in (special("<|assistant_end|>"), special("<|bos|>")):
            self.left = 0
        elif drawn == special("<|python_start|>"):
            self.call = []
        elif drawn == special("<|python_end|>") and self.call is not None:
            result = calculate(self.tokenizer.decode(self.call))
            self.call = None
            if result is not None:                             # not arithmetic it knows: the model goes on
                output = self.tokenizer.encode(result)
                self.forced.extend([special("<|output_start|>"), *output, special("<|output_end|>")])
        elif self.call is not None:
            self.call.append(drawn)
        return drawn, True


def likeliest(logits, count, token):
    """Of one row of logits (V,): the log-probability of token, and the count likeliest as (id, log-probability)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    return logprobs[token].item(), list(zip(ids.tolist(), values.tolist()))


def draw(logits, replies):
    """
    One token for each row of logits (B, V) float32, as its reply wants it -> list of B ids.

    A logit less the logarithm of an exponential random number is highest at token i with just the
    probability softmax(logits)[i]: so a row needs V random numbers of its own, and nothing of other rows.
    source: the Gumbel-max trick, arXiv 1411.0030
    """
    best, V = logits.argmax(dim=-1), logits.size(-1)
    if all(reply.temperature == 0 for reply in replies):
        return best.tolist()
    temperature, top_p = (torch.tensor([[getattr(reply, name)] for reply in replies], device=logits.device)
                          for name in ("temperature", "top_p"))
    most = [reply.top_k if 0 < reply.top_k < V else V for reply in replies]
    cut = [k for k, reply in zip(most, replies) if k < V or reply.top_p < 1]
    logits = logits / temperature.clamp(min=1e-6)              # below a millionth the division could overflow
    if cut:
        ranks, top_k = max(cut), torch.tensor(most, device=logits.device)[:, None]
        values, ids = logits.topk(ranks, dim=-1)               # exactly k, whatever is tied
        values = values.masked_fill(torch.arange(ranks, device=logits.device) >= top_k, -torch.inf)
        probs = torch.softmax(values, dim=-1)
        values = values.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, -torch.inf)
        whole = (top_k == V) & (top_p == 1)
        logits = torch.where(whole, logits, torch.full_like(logits, -torch.inf).scatter(1, ids, values))
    noise = torch.empty_like(logits)
    for row, reply in zip(noise, replies):
        row.exponential_(generator=reply.generator)
    drawn = (logits - noise.clamp(min=1e-38).log()).argmax(dim=-1)
    return torch.where(temperature[:, 0] == 0, best, drawn).tolist()


class Batch:
    """
    Replies that are written side by side, in the rows of one cache.

    A reply added waits until a row is free; its prompt is read, `piece` tokens a step, while the others go on; then it
    joins them. One that is over leaves, and the last row moves to its place.
    """

    def __init__(self, model, slots, max_len, piece=0):
        self.model, self.slots, self.piece = in_compute_dtype(model), slots, piece or max_len
        self.stride = STRIDE_CPU if model.device.type == "cpu" else STRIDE_GPU
        self.cache = KVCache(model, slots, max_len)
        self.graphed_step = GraphedStep(self.model, self.cache) if model.device.type == "cuda" else None
        self.waiting = deque()
        self.reading = []      # replies whose prompts are being read, into a cache of their own
        self.rows = []         # replies that are being written, in the order of the cache's rows
        self.logits = torch.empty(0, model.config.vocab_size, device=model.device)     # (B, V) of what follows in each row

    def add(self, reply):
        """A Reply joins; it ends when it has no tokens left to get, or max_len are reached."""
        self.waiting.append(reply)

    def remove(self, reply):
        """Take a reply out, wherever it stands."""
        if reply in self.waiting:
            self.waiting.remove(reply)
        reply.left = 0                                         # if its prompt is being read, it leaves when it joins

    @torch.inference_mode()
    def step(self):
        """The next token of every reply that is being written -> list of (reply, token, was it drawn)."""
        self.read()
        drawn = draw(self.logits, self.rows) if self.rows else []
        settled = [(reply, *reply.take(token)) for reply, token in zip(self.rows, drawn) if reply.left]
        following = {reply: token for reply, token, _ in settled}
        for row, reply in enumerate(self.rows):
            if reply.likeliest and reply in following:
                reply.noted = likeliest(self.logits[row], reply.likeliest, following[reply])
        for row in reversed(range(len(self.rows))):            # the last token of a text is never looked up
            reply = self.rows[row]
            if reply.left == 0 or self.cache.lengths[row] + 1 >= self.cache.kv.size(4):
                reply.left, last = 0, self.rows.pop()
                if last is not reply:
                    self.rows[row] = last
                    self.cache.copy(row, self.cache, len(self.rows), self.cache.lengths[len(self.rows)])
        if self.rows:
            self.logits = self.follow([following[reply] for reply in self.rows])
        return settled

    def follow(self, tokens):
        """The new token of each row, a list -> logits (B, V) of what follows."""
        if self.graphed_step:
            return self.graphed_step(tokens)
        self.cache.used = len(tokens)
        return self.model(torch.tensor(tokens, device=self.model.device)[:, None], kv_cache=self.cache)[:, -1]

    def read(self):
        """Read `piece` tokens of the prompts of those who come in; who is through has a row and logits from then on."""
        if not self.reading:
            free = self.slots - len(self.rows)
            if not (free and self.waiting):
                return
            come = [self.waiting.popleft() for _ in range(min(len(self.waiting), free))]
            self.reading = sorted(come[::-1], key=lambda reply: len(reply.prompt), reverse=True)
            self.prompts = list(dict.fromkeys(tuple(reply.prompt) for reply in self.reading))   # equal ones are read once
            self.read_cache = KVCache(self.model, len(self.prompts), len(self.prompts[0]))
        device, stop = self.model.device, self.read_cache.lengths[0] + self.piece
        while self.reading and (done := self.read_cache.lengths[0]) < stop:
            # to the end of the shortest prompt, or a stride; what it lacks is filled up at the right, where a causal
            # model sees nothing
            end = min(stop, len(self.prompts[0]), max(len(self.prompts[-1]), done + self.stride))
            idx = [prompt[done:end] + (0,) * (end - len(prompt)) for prompt in self.prompts]
            last = [min(end, len(prompt)) - done - 1 for prompt in self.prompts]
            self.read_cache.used = len(idx)
            logits = self.model(torch.tensor(idx, device=device), kv_cache=self.read_cache,
                                positions=torch.tensor(last, device=device))
            held, joined = self.logits[:len(self.rows)], []
            while self.reading and len(self.reading[-1].prompt) <= end:
                reply = self.reading.pop()
                joined.append(self.prompts.index(tuple(reply.prompt)))
                self.cache.copy(len(self.rows), self.read_cache, joined[-1], len(reply.prompt))
                reply.generator = torch.Generator(device).manual_seed(reply.seed)
                self.rows.append(reply)
            self.logits = torch.cat((held, logits[joined]))
            self.prompts = [prompt for prompt in self.prompts if len(prompt) > end]
        if not self.reading:
            self.read_cache = None


class Engine:
    """Generation with one model, as it is now (one that is trained on needs another Engine), and its tokenizer."""

    def __init__(self, model, tokenizer):
        assert model.config.vocab_size == tokenizer.vocab_size, \
            f"the model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}"
        self.model, self.tokenizer = in_compute_dtype(model), tokenizer        # cast once, for all that is asked
        self.ends = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}

    def replies(self, prompts, max_tokens, temperature, top_k, seed):
        """
        Replies to prompts, each with a seed of its own -> (list of Reply, tokens that the longest text may have).

        raises ValueError, one line, when a prompt is empty or leaves no room for an answer
        """
        context, lengths = self.model.config.sequence_len, [len(prompt) for prompt in prompts]
        if not 0 < min(lengths) <= max(lengths) < context:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens; the model takes "
                             f"1 to {context - 1}, so that an answer fits into its context")
        replies = [Reply(self.tokenizer, list(prompt), max_tokens, temperature, top_k, seed=seed_of(seed, i))
                   for i, prompt in enumerate(prompts)]
        return replies, min(context, max(lengths) + max_tokens)

    def generate(self, prompts, max_tokens=256, temperature=1.0, top_k=0, seed=0):
        """
        Go on from prompts, a row each. The same prompt in several rows gives as many samples, each drawn by itself.

        yields (tokens, drawn) per step, two lists with an entry per row: the token, None when its reply has ended;
            True where the model drew it, False where the calculator forced it.
            The <|assistant_end|> or <|bos|> that ends a reply is yielded too.
        ends when all rows have, or after max_tokens of each, or where the model's context is full
        raises ValueError, one line, when a prompt is empty or leaves no room for an answer
        """
        replies, longest = self.replies(prompts, max_tokens, temperature, top_k, seed)
        batch = Batch(self.model, len(replies), longest)
        for reply in replies:
            batch.add(reply)
        while any(reply.left for reply in replies):
            settled = {reply: (token, drawn) for reply, token, drawn in batch.step()}
            rows = [settled.get(reply, (None, False)) for reply in replies]
            yield [token for token, _ in rows], [drawn for _, drawn in rows]

    def generate_batch(self, prompts, max_tokens=256, temperature=0.0, top_k=0, seed=0, batch_size=16):
        """
        One reply to each of many prompts -> list of ids in the same order, the end token left out.

        The replies are those of generate, up to rounding. batch_size rows are held in memory at once, fewer where it
        runs out; prompts of about equal length share a batch, and the next one joins when one is over.
        """
        if not prompts:
            return []
        rows = min(batch_size, len(prompts))
        try:
            return self.write(prompts, max_tokens, temperature, top_k, seed, rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        return self.generate_batch(prompts, max_tokens, temperature, top_k, seed, rows // 2)

    def write(self, prompts, max_tokens, temperature, top_k, seed, batch_size):
        """generate_batch with just so many rows."""
        replies, longest = self.replies(prompts, max_tokens, temperature, top_k, seed)
        written = {reply: [] for reply in replies}
        batch = Batch(self.model, min(batch_size, len(replies)), longest)
        for reply in sorted(replies, key=lambda reply: len(reply.prompt)):
            batch.add(reply)
        while any(reply.left for reply in replies):
            for reply, token, _ in batch.step():
                if token not in self.ends:
                    written[reply].append(token)
        return list(written.values())
