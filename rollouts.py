"""
Rollouts: answers that a model draws, the reward of each, and what a policy gradient learns from them.

in    a model and its tokenizer, problems (conversations with a right answer, see tasks/task.py), seeds
out   Rollouts (answers with their rewards), advantages, policy_batches (what the loss is taken of), pass_at_k

The policy gradient (REINFORCE) makes every token that was drawn likelier, as often as the advantage of its answer says, and
less likely where that is negative:

    loss = - sum over answers of advantage * sum over its drawn tokens of log p(token), / number of drawn tokens of the step

The number is that of all answers of the step, of those without an advantage too: so each token weighs the same, whichever
answer and prompt it belongs to (token-level normalisation), and a step with few prompts that can teach something has a
small gradient. The prompt and what the calculator put in are no choices of the model's, and are not scored; the
<|assistant_end|> that it drew is one.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from chat import text_of
from data import pad_batch
from engine import Batch, Reply, seed_of
from evals.metrics import crop
from model import GPT
from plumbing.common import RANK, WORLD_SIZE
from plumbing.machine import sum_over_ranks
from tokenizer import Tokenizer

SLOTS = 256                    # answers that are written side by side; fewer where the memory runs out


@dataclass
class Answer:
    """prompt and ids: tokens; drawn: of each of ids, the end included, 1 where the model drew it, 0 where it was forced."""
    prompt: list
    ids: list = field(default_factory=list)
    drawn: list = field(default_factory=list)
    reward: float = 0.0
    advantage: float = 0.0


@dataclass
class Rollouts:
    """How answers are drawn, and what they are worth: reward(conversation, text) -> number."""
    model: GPT
    tokenizer: Tokenizer
    reward: Callable
    max_new_tokens: int
    temperature: float
    top_k: int
    slots: int = SLOTS

    def __call__(self, problems, seeds):
        """
        Answers to problems, graded, a list of lists: as many to a problem as seeds, a list of lists, has for it.

        Each has random numbers of its own: it does not depend, but for rounding, on what is drawn beside it.
        """
        groups = None
        while groups is None:
            try:
                groups = self.write(problems, seeds)
            except torch.OutOfMemoryError:
                if self.slots == 1:
                    raise
                self.slots //= 2                                 # the same answers, fewer at a time, from now on
        for problem, group in zip(problems, groups):
            for answer in group:
                answer.reward = float(self.reward(problem, text_of(self.tokenizer, answer.ids)))
        return groups

    def write(self, problems, seeds):
        """The answers, not graded yet."""
        context, answers = self.model.config.sequence_len, {}    # reply -> its answer
        room = context - min(self.max_new_tokens, context // 2)  # at least half the context for the question
        for problem, own_seeds in zip(problems, seeds):
            prompt = crop(self.tokenizer.render_for_completion(problem), room)
            for seed in own_seeds:
                reply = Reply(self.tokenizer, prompt, self.max_new_tokens, self.temperature, self.top_k, seed=seed)
                answers[reply] = Answer(prompt)
        longest = max(len(reply.prompt) for reply in answers) + self.max_new_tokens
        batch = Batch(self.model, min(self.slots, len(answers)), min(context, longest))
        for reply in answers:
            batch.add(reply)
        while any(reply.left for reply in answers):
            for reply, token, drawn in batch.step():
                answers[reply].ids.append(token)
                answers[reply].drawn.append(int(drawn))
        written = iter(answers.values())
        return [[next(written) for _ in own_seeds] for own_seeds in seeds]


def advantages(rewards):
    """
    How much better each answer to a prompt is than the mean of them; all 0 where all are worth the same.

    They are not divided by their deviation: that would make a prompt that is nearly always right, or wrong, count more.
    """
    mean = sum(rewards) / len(rewards)
    return [reward - mean if min(rewards) < max(rewards) else 0.0 for reward in rewards]


def policy_batches(answers, B, T):
    """
    What a rank's answers teach -> list of (x, y, weights), at most B rows each; see model(x, y, weights=weights).

    Answers without an advantage are left out. A rank that has no others gives one of them, whose gradient is 0: all ranks
    take part in adding up.
    returns x, y: (B, T') int64, y = -1 where nothing was drawn; weights: (B,) float32, the advantages
    """
    kept = sorted((a for a in answers if a.advantage), key=lambda a: len(a.prompt) + len(a.ids)) or answers[:1]
    batches = []
    for first in range(0, len(kept), B):
        rows = kept[first:first + B]
        x, y = pad_batch([(a.prompt + a.ids, [0] * len(a.prompt) + a.drawn) for a in rows], T)
        batches.append((x, y, np.array([a.advantage for a in rows], np.float32)))
    return batches


def pass_at_k(right, total, k):
    """
    Probability that of k answers, taken at random from `total` of which `right` are right, one is right.

    source: Chen et al., arXiv 2107.03374: without its bias, unlike 1 - (1 - right / total)^k
    """
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def evaluate_pass_at_k(rollouts, task, num_problems, num_samples):
    """
    {k: pass@k} on the first problems of a task, for k = 1 and num_samples, from so many answers to each.

    The answers are drawn with the same random numbers every time. Several ranks share the problems.
    """
    numbers = range(RANK, min(num_problems, len(task)), WORLD_SIZE)
    seeds = [[seed_of("test", n, i) for i in range(num_samples)] for n in numbers]
    groups = rollouts([task[n] for n in numbers], seeds) if seeds else []
    right = [sum(answer.reward > 0 for answer in group) for group in groups]
    ks = sorted({1, num_samples})
    sums = [sum(pass_at_k(c, num_samples, k) for c in right) for k in ks]
    *sums, total = sum_over_ranks([*sums, len(right)], rollouts.model.device)
    return {k: one / total for k, one in zip(ks, sums)}
