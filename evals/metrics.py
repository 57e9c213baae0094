"""
How good a model is: bits per byte of text, loss on answers, and right answers to questions.

Everything is passed in; nothing here opens a file. Several ranks share the rows and add up their sums.
"""
import hashlib
import math
from collections import Counter
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from chat import printable, text_of
from engine import Engine
from plumbing.common import RANK, WORLD_SIZE, print0
from plumbing.machine import in_halves, sum_over_ranks, to_device

# what a base model is asked to go on with: facts, a riddle, a list, an opinion, some algebra
PROMPTS = ["The capital of France is", "The chemical symbol of gold is",
           "If yesterday was Friday, then tomorrow will be", "The opposite of hot is",
           "The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is"]
GUESSING = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}   # share that chance has right; 0 for all others
TIE = 1e-4                     # nats: choices whose (mean) losses are this close count as equal


@torch.no_grad()
def evaluate_bpb(model, stream, token_bytes, num_rows, B, T, device):
    """
    Bits per byte: how many bits the model needs for a byte of text it has not seen.

    Unlike the loss per token it does not depend on the tokenizer. Special tokens stand for no byte and do not count.

    stream       data.TokenStream; its first num_rows rows are scored, at most one epoch; 0 = all of it
    token_bytes  (V,) int64 tensor on the device: bytes each token stands for
    """
    num_rows = min(num_rows or math.inf, max(1, (stream.num_tokens - 1) // T))
    nats, num_bytes = 0.0, 0
    for first in range(RANK * B, num_rows, WORLD_SIZE * B):
        x, y = (to_device(a, device) for a in stream.batch_at(first, min(B, num_rows - first), T))
        losses, _ = model.score(x, y)
        size = token_bytes[y[y >= 0]]
        nats += losses[size > 0].sum().item()
        num_bytes += size.sum().item()
    nats, num_bytes = sum_over_ranks([nats, num_bytes], device)
    if num_bytes == 0:
        raise SystemExit(f"bits per byte: none of the {num_rows} rows scored has a token to learn; use longer rows")
    return nats / math.log(2) / num_bytes


def print_samples(model, tokenizer):
    """The likeliest 16 tokens after each of PROMPTS, printed -> list of (prompt, text)."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    replies = Engine(model, tokenizer).generate_batch(ids, max_tokens=16)
    samples = [(prompt, text_of(tokenizer, reply)) for prompt, reply in zip(PROMPTS, replies)]
    for prompt, text in samples:
        print0(f"  {prompt} |{printable(text)!r}")
    return samples


@torch.no_grad()
def evaluate_loss(model, batches, device):
    """Mean loss in nats over the scored tokens of (x, y) numpy batches; each rank passes its own."""
    nats, num_targets = 0.0, 0
    for x, y in batches:
        nats += model.score(to_device(x, device), to_device(y, device))[0].sum().item()
        num_targets += int((y >= 0).sum())
    nats, num_targets = sum_over_ranks([nats, num_targets], device)
    return nats / max(1, num_targets)


def evaluate_task(engine, task, check, max_problems=0, max_tokens=256, batch_size=16):
    """
    Test a model on a task -> (right ones, problems); max_problems 0 = all of them.

    A multiple choice is decided by the logits of the letters, anything else by a greedy answer, which
    check(conversation, answer) -> bool judges (tasks.is_right).
    """
    model, tokenizer, context = engine.model, engine.tokenizer, engine.model.config.sequence_len
    problems = [task[i] for i in range(RANK, min(max_problems or len(task), len(task)), WORLD_SIZE)]
    if "letters" in task[0]:
        batches = [problems[first:first + batch_size] for first in range(0, len(problems), batch_size)]
        right = sum(sum(in_halves(partial(right_letters, model, tokenizer), batch)) for batch in batches)
    else:
        room = context - min(max_tokens, context // 2)           # at least half the context for the question
        prompts = [crop(tokenizer.render_for_completion(problem), room) for problem in problems]
        replies = engine.generate_batch(prompts, max_tokens, temperature=0, batch_size=batch_size) if prompts else []
        right = sum(check(problem, text_of(tokenizer, reply)) for problem, reply in zip(problems, replies))
    return tuple(int(n) for n in sum_over_ranks([right, len(problems)], model.device))


@torch.no_grad()
def right_letters(model, tokenizer, problems):
    """
    A batch of multiple choices -> whether each has the highest logit after the question at the right letter, a list.

    Rows are filled up at the right, where a causal model sees nothing. Logits of 16 bits are often equal: see choose.
    """
    # the first token of a reply comes behind a special one, so nothing can join the letter
    tokens = {letter: tokenizer.encode(letter) for problem in problems for letter in problem["letters"]}
    for letter, ids in tokens.items():
        if len(ids) != 1:
            raise SystemExit(f"the choice {letter!r} is {len(ids)} tokens in this vocabulary, and can't be compared by "
                             "one logit; leave the multiple choice tasks out (-a)")
    prompts = [crop(tokenizer.render_for_completion(problem), model.config.sequence_len) for problem in problems]
    idx = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    logits = model(idx.to(model.device), positions=last.to(model.device))      # (B, V)
    right = []
    for problem, row in zip(problems, logits):
        ids = [tokens[letter][0] for letter in problem["letters"]]
        choice = choose((-row[ids]).tolist(), ticket_of([problem["messages"][-2]["content"]]))
        right.append(problem["letters"][choice] == problem["answer"])
    return right


def centered(share, guessing):
    """The share of right answers on a line where guessing is 0 and all right is 1."""
    return (share - guessing) / (1 - guessing)


def constant_share(problems):
    """
    The share of some problems that one and the same answer to all of them would have right.

    Of the counts of a letter two thirds are 1: a score there means something only beside this. 0 for programs.
    """
    answers = [problem.get("answer") for problem in problems]
    return Counter(answers).most_common(1)[0][1] / len(answers) if None not in answers else 0.0


def crop(ids, length):
    """The first token, <|bos|>, and the last ones of a prompt: at most `length` in all."""
    return ids if len(ids) <= length else [ids[0], *ids[len(ids) - length + 1:]]


def choose(losses, ticket):
    """
    The choice of the lowest loss; among equal ones (within TIE) the item's ticket decides.

    So a model that sees no difference scores what guessing does; the first choice may be right too often or too rarely.
    """
    assert all(map(math.isfinite, losses)), f"losses {losses}: the model computes no numbers"
    equal = [i for i, loss in enumerate(losses) if loss <= min(losses) + TIE]
    return equal[ticket % len(equal)]


def ticket_of(texts):
    """A large number that depends on the texts of an item alone."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).digest()[:8], "big")
