"""
Generate text: a trained model and its tokenizer in, tokens out, with the calculator in between.

in    a GPT, a Tokenizer, prompts as lists of token ids; no file and no knob is read here
out   Engine.generate (step by step), Engine.generate_batch (whole replies to many prompts),
      TextStream (tokens to text that can be shown as it comes)

The keys and values of tokens already seen are kept (KVCache), so a new token costs one pass over one position instead
of the whole text. All rows of a batch stand at the same position: they are read up to the end of the shortest prompt;
then, token by token, a row with prompt left takes the next of its prompt instead of the one drawn, and likewise what
the calculator has answered. So neither the model nor the cache needs a mask, and a row does not notice its neighbours.
"""
import codecs
import unicodedata
from collections import deque
from dataclasses import dataclass, field

import torch

from plumbing.calculator import calculate
from tokenizer import SPECIAL_TOKENS, Tokenizer


class KVCache:
    """
    The keys and values of every layer for all tokens so far, in memory that is taken once.

    kv (n_layer, 2, B, H_kv, max_len, D) in the model's compute type; from .length on not written yet and never read
    """

    def __init__(self, model, B, max_len):
        config = model.config
        D = config.n_embd // config.n_head
        self.kv = torch.empty(config.n_layer, 2, B, config.n_kv_head, max_len, D,
                              dtype=model.compute_dtype, device=model.device)
        self.length = 0

    def append(self, layer, k, v):
        """Add k, v (B, H_kv, T, D) of the new tokens -> all of the layer's (B, H_kv, T_all, D)."""
        end = self.length + k.size(2)
        assert end <= self.kv.size(4), f"the cache holds {self.kv.size(4)} tokens, not {end}"
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def advance(self, T):
        """Count T tokens as seen; once per forward pass, when every layer has appended."""
        self.length += T


def sample_next(logits, temperature, top_k, generator):
    """
    Draw one token for each row of logits (B, V) float32 -> (B,) int64.

    temperature  0 = always the likeliest token; 1 = as the model has it; more = wilder
    top_k        only so many of the likeliest tokens can be drawn; 0, or V and more = all
    """
    assert temperature >= 0 and top_k >= 0, f"temperature={temperature}, top_k={top_k}: not below 0"
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)               # exactly k, whatever is tied
    # below a millionth the division could overflow; there it is the likeliest token anyway
    probs = torch.softmax(logits / max(temperature, 1e-6), dim=-1)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1), every row on its own
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


@dataclass
class Reply:
    """
    One reply while it is written: which token stands next, and when the calculator is asked.

    The model writes <|python_start|> expression <|python_end|>; then the result is put in as
    <|output_start|> result <|output_end|>, and the model goes on as if it had written that.
    """
    tokenizer: Tokenizer
    unread: deque              # the rest of the prompt, where a shorter one sets the pace
    left: int                  # tokens it may still get, drawn or forced
    forced: deque = field(default_factory=deque)               # the calculator's answer, still to be put in
    call: list | None = None   # tokens of the open expression; None outside of one

    def take(self, drawn):
        """Settle on the next token -> (token, is it part of the reply, was it drawn)."""
        if self.unread:
            return self.unread.popleft(), False, False
        if self.left == 0:                                     # ended: any token, nobody looks
            return self.tokenizer.bos, False, False
        self.left -= 1
        if self.forced:
            return self.forced.popleft(), True, False
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
        return drawn, True, True


class Engine:
    """Generation with one model and its tokenizer."""

    def __init__(self, model, tokenizer):
        assert model.config.vocab_size == tokenizer.vocab_size, \
            f"the model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}"
        self.model, self.tokenizer = model, tokenizer
        self.ends = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}

    @torch.inference_mode()
    def generate(self, prompts, max_tokens=256, temperature=1.0, top_k=0, seed=0):
        """
        Go on from prompts, a row each. The same prompt in several rows gives as many samples, each drawn by itself.

        yields (tokens, drawn) per step, two lists with an entry per row: the token, None before the row's reply
            begins and when it has ended; True where the model drew it, False where the calculator forced it.
            The <|assistant_end|> or <|bos|> that ends a reply is yielded too.
        ends when all rows have, or after max_tokens of each, or where the model's context is full
        raises ValueError, one line, when a prompt is empty or leaves no room for an answer
        """
        context = self.model.config.sequence_len
        lengths = [len(prompt) for prompt in prompts]
        if not 0 < min(lengths) <= max(lengths) < context:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens; the model takes "
                             f"1 to {context - 1}, so that an answer fits into its context")
        generator = torch.Generator(self.model.device).manual_seed(seed)
        last = min(context, max(lengths) + max_tokens)         # tokens the longest text may have
        rows = [Reply(self.tokenizer, deque(prompt[min(lengths):]), max_tokens) for prompt in prompts]
        cache, logits = self.prefill(prompts, min(lengths), last)
        while True:
            drawn = sample_next(logits, temperature, top_k, generator).tolist()
            settled = [row.take(token) for row, token in zip(rows, drawn)]
            if any(shown for _, shown, _ in settled):
                yield ([token if shown else None for token, shown, _ in settled],
                       [was_drawn for _, _, was_drawn in settled])
            # the last token of a text is never looked up, so it needs no pass and no place
            if cache.length + 1 >= last or not any(row.left for row in rows):
                return
            idx = torch.tensor([[token] for token, _, _ in settled], device=self.model.device)
            logits = self.model(idx, kv_cache=cache)[:, -1]    # (B, V)

    def generate_batch(self, prompts, max_tokens=256, temperature=0.0, top_k=0, seed=0, batch_size=16):
        """
        One reply to each of many prompts -> list of ids in the same order, the end token left out.

        At temperature 0 the replies are those of generate, up to rounding. batch_size rows are
        held in memory at once; prompts of about equal length share a batch.
        """
        replies = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            for tokens, _ in self.generate([prompts[i] for i in rows], max_tokens, temperature, top_k, seed + start):
                for i, token in zip(rows, tokens):
                    if token is not None and token not in self.ends:
                        replies[i].append(token)
        return replies

    def prefill(self, prompts, length, max_len):
        """The first `length` tokens of every prompt -> (cache, logits (B, V) of what follows)."""
        B = len(prompts)
        once = B > 1 and all(prompt == prompts[0] for prompt in prompts)        # samples of one prompt
        idx = torch.tensor([prompt[:length] for prompt in (prompts[:1] if once else prompts)], device=self.model.device)
        cache = KVCache(self.model, len(idx), length if once else max_len)
        end = torch.full((len(idx),), length - 1, device=self.model.device)
        logits = self.model(idx, kv_cache=cache, positions=end)    # not of the whole prompt: (B, V)
        if once:                                                # computed once, then copied into every row
            one, cache = cache, KVCache(self.model, B, max_len)
            cache.kv[..., :length, :], cache.length = one.kv, length
            logits = logits.expand(B, -1)
        return cache, logits


class TextStream:
    """
    Tokens in, text out as soon as it is whole: never half a character, never a special token.

    A token may end inside a character of several bytes; those bytes wait for the next token.
    Bytes that are no UTF-8 become U+FFFD. A call of the calculator reads [12*7 = 84].
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.names = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.state = ""                # of the tool: "" "call" "called" "result"

    def feed(self, token):
        """The text that token completes; often its own, "" while a character is open."""
        name = self.names.get(token)
        if name is None:
            text = self.decoder.decode(self.tokenizer.decode_bytes([token]))
            # a call without a result ends where the text goes on
            return self.close() + text if self.state == "called" else text
        text = self.decoder.decode(b"", final=True)                # a special ends every character
        if name == "<|python_start|>":
            text, self.state = text + self.close() + "[", "call"
        elif name == "<|python_end|>" and self.state == "call":
            self.state = "called"
        elif name == "<|output_start|>" and self.state == "called":
            text, self.state = text + " = ", "result"
        elif name == "<|output_end|>" and self.state == "result":
            text += self.close()
        return text

    def flush(self):
        """What is still open when the reply is over."""
        return self.decoder.decode(b"", final=True) + self.close()

    def close(self):
        """End the brackets of a call, if there are any."""
        text, self.state = "]" if self.state else "", ""
        return text


def text_of(tokenizer, ids):
    """A whole reply as text, as TextStream shows it."""
    stream = TextStream(tokenizer)
    return "".join(stream.feed(token) for token in ids) + stream.flush()


def printable(text):
    """text with its newlines and tabs, without other control characters: they could repaint or rename a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
