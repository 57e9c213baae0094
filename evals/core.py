"""
CORE: how much a base model knows and can do, from 22 tasks that take no chat format.

in    a model, its tokenizer, and the bundle of tasks (fetched once, 162 MB) in eval_bundle/
out   accuracy per task, centred so that guessing is 0 and all right is 1, and their mean: CORE
      source: DataComp-LM, arXiv 2406.11794; GPT-2 scores 0.114 (small) to 0.257 (xl)

A prompt shows solved examples of the task (shots) and then the item. Three kinds of task:
multiple_choice   one context, several continuations: the one of the lowest mean loss is chosen
schema            several contexts, one continuation: the context that makes it likeliest is
language_modeling one continuation: right where every token of it is the model's likeliest

The texts, the order of the items and the examples drawn for each are those of the original nanochat, so a whole
evaluation compares with its numbers. Three differences: it draws from the rows that max_per_task leaves, here a cap
leaves the prompts as they are; it takes the first of equal choices, here see metrics.choose; it reads more than the
model's context, here make_item cuts.
"""
import csv
import json
import os
import random
import shutil
import time
import zipfile
import zlib
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from engine import KVCache, causal_mask
from evals.metrics import centered, choose, ticket_of
from plumbing.common import RANK, WORLD_SIZE, base_path
from plumbing.download import download, locked
from plumbing.machine import barrier, in_halves, sum_over_ranks

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
REMEDY = f"remove {base_path('eval_bundle')} to fetch the bundle anew"
GPT2 = dict(small="openai-community-gpt2.csv", medium="openai-community-gpt2-medium.csv",
            large="openai-community-gpt2-large.csv", xl="openai-community-gpt2-xl.csv")
ORDER_SEED, SHOTS_SEED = 1337, 1234  # the original's: of the items' order; of item i's shots, + i
CHUNK = 512                    # items rendered at a time: 2 million tokens as Python lists, 80 MB
TOKENS_GPU, TOKENS_CPU = 2 ** 14, 2 ** 12  # read in one pass; a GPU holds 2 GB for them at depth 20


class CoreTask(NamedTuple):
    label: str
    file: str                  # below eval_data/
    kind: str                  # multiple_choice, schema or language_modeling
    shots: int                 # solved examples before each item
    delimiter: str             # between a context and its continuation
    baseline: float            # percent right that count as 0


MC, SCHEMA, LM = "multiple_choice", "schema", "language_modeling"
ANSWER = "\nAnswer: "
# Copied from core.yaml and eval_meta_data.csv of the bundle, the baselines too. Guessing gets something
# else in boolq (62 is the share of "yes"; guessing gets 50), language_identification (9.1; 25),
# commonsense_qa and lsat_ar (20; 25, of five choices the bundle has four), so guessing everywhere gives
# a CORE of -0.001. jeopardy's has_categories would average over its five subjects; the original's score doesn't.
TASKS = [
    CoreTask("hellaswag_zeroshot", "language_understanding/hellaswag.jsonl", MC, 0, " ", 25),
    CoreTask("jeopardy", "world_knowledge/jeopardy_all.jsonl", LM, 10, ANSWER, 0),
    CoreTask("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata.jsonl", LM, 10, " ", 0),
    CoreTask("arc_easy", "world_knowledge/arc_easy.jsonl", MC, 10, ANSWER, 25),
    CoreTask("arc_challenge", "world_knowledge/arc_challenge.jsonl", MC, 10, ANSWER, 25),
    CoreTask("copa", "commonsense_reasoning/copa.jsonl", MC, 0, " ", 50),
    CoreTask("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl", MC, 10, " ", 20),
    CoreTask("piqa", "commonsense_reasoning/piqa.jsonl", MC, 10, ANSWER, 50),
    CoreTask("openbook_qa", "commonsense_reasoning/openbook_qa.jsonl", MC, 0, " ", 25),
    CoreTask("lambada_openai", "language_understanding/lambada_openai.jsonl", LM, 0, " ", 0),
    CoreTask("hellaswag", "language_understanding/hellaswag.jsonl", MC, 10, " ", 25),
    CoreTask("winograd", "language_understanding/winograd_wsc.jsonl", SCHEMA, 0, " ", 50),
    CoreTask("winogrande", "language_understanding/winogrande.jsonl", SCHEMA, 0, " ", 50),
    CoreTask("bigbench_dyck_languages", "symbolic_problem_solving/bigbench_dyck_languages.jsonl", LM, 10, " ", 0),
    CoreTask("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl", MC, 3, " ", 20),
    CoreTask("bigbench_cs_algorithms", "symbolic_problem_solving/bigbench_cs_algorithms.jsonl", LM, 10, " ", 0),
    CoreTask("bigbench_operators", "symbolic_problem_solving/bigbench_operators.jsonl", LM, 10, " ", 0),
    CoreTask("bigbench_repeat_copy_logic", "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl", LM, 10, " ", 0),
    CoreTask("squad", "reading_comprehension/squad.jsonl", LM, 10, " ", 0),
    CoreTask("coqa", "reading_comprehension/coqa.jsonl", LM, 0, " ", 0),
    CoreTask("boolq", "reading_comprehension/boolq.jsonl", MC, 10, ANSWER, 62),
    CoreTask("bigbench_language_identification", "language_understanding/bigbench_language_identification.jsonl",
             MC, 10, " ", 9.1)]


# the bundle
def fetch_bundle():
    """The folder eval_bundle/, fetched and unpacked where it isn't there yet. Every rank calls this, one works."""
    folder, archive = base_path("eval_bundle"), base_path("eval_bundle.zip")
    if RANK == 0 and not os.path.isdir(folder):
        os.makedirs(base_path(), exist_ok=True)
        with locked(f"{archive}.lock"):                      # not two processes at once
            if not os.path.isdir(folder):
                download(BUNDLE_URL, archive, lambda path: "" if zipfile.is_zipfile(path) else "no whole zip file")
                unpack(archive, folder)
                os.remove(archive)
    barrier()
    return folder


def unpack(archive, folder):
    """What CORE reads of the zip, into the folder, which appears when all is there."""
    needed = {f"eval_bundle/eval_data/{task.file}" for task in TASKS}
    temporary = f"{folder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)             # of a process that was killed
    try:
        with zipfile.ZipFile(archive) as source:
            held = set(source.namelist())
            if needed - held:
                raise SystemExit(f"{archive}: holds no {min(needed - held)}; it is another bundle than {BUNDLE_URL}")
            source.extractall(temporary, held & needed.union(f"eval_bundle/{name}" for name in GPT2.values()))
        os.rename(os.path.join(temporary, "eval_bundle"), folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SystemExit(f"{archive}: damaged ({error}); remove it to fetch it anew") from None
    except OSError as error:
        raise SystemExit(f"{temporary}: {error.strerror or error}; free some disk space, then run again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def gpt2_scores(folder):
    """{"small": {label: centred score, ..., "CORE": ...}, ...} as far as the bundle has them."""
    scores = {}
    for size, name in GPT2.items():
        if os.path.exists(os.path.join(folder, name)):
            with open(os.path.join(folder, name), encoding="utf-8", newline="") as f:
                rows = [[cell.strip() for cell in row] for row in csv.reader(f)][1:]
            scores[size] = {row[0]: float(row[2]) for row in rows if len(row) == 3}
    return scores


def read_rows(folder, task):
    """The items of a task, in the original's order: a shuffle, so that the first n are a sample."""
    path, rows = os.path.join(folder, "eval_data", task.file), []
    if not os.path.exists(path):
        raise SystemExit(f"{path}: missing; {REMEDY}")
    wanted = {MC: {"query", "choices", "gold"}, SCHEMA: {"context_options", "continuation", "gold"},
              LM: {"context", "continuation"}}[task.kind]
    with open(path, encoding="utf-8", newline="") as f:
        for number, line in enumerate(f, 1):
            try:
                rows.append(json.loads(line))
                missing = wanted - set(rows[-1])
            except (ValueError, TypeError):
                missing = {"whole line of JSON"}
            if missing:
                raise SystemExit(f"{path} line {number}: no {min(missing)}; {REMEDY}")
    if len(rows) <= task.shots:
        raise SystemExit(f"{path}: {len(rows)} rows, {task.label} shows {task.shots} and asks another; {REMEDY}")
    random.Random(ORDER_SEED).shuffle(rows)
    return rows


# prompts
def draw_shots(rows, i, n):
    """The n rows shown before row i: never row i, and the same whoever asks."""
    others = random.Random(SHOTS_SEED + i).sample(range(len(rows) - 1), n)
    return [rows[j + (j >= i)] for j in others]


def render(task, row, shots):
    """
    The texts to compare: one per choice; in language modeling without and with the continuation.

    The parts are joined as they stand, also where a query ends in a space: the scores others publish are of these
    texts. Only contexts of language modeling are trimmed.
    """
    if task.kind == MC:
        solved = [shot["query"] + task.delimiter + shot["choices"][shot["gold"]] for shot in shots]
        asked = [row["query"] + task.delimiter + choice for choice in row["choices"]]
    elif task.kind == SCHEMA:
        solved = [shot["context_options"][shot["gold"]] + task.delimiter + shot["continuation"] for shot in shots]
        asked = [context + task.delimiter + row["continuation"] for context in row["context_options"]]
    else:
        solved = [shot["context"].strip() + task.delimiter + shot["continuation"] for shot in shots]
        prompt = row["context"].strip() + task.delimiter
        # " cat" is one token: a prompt that ended in the space would not be the start of the text
        asked = [prompt.rstrip(), prompt + row["continuation"]]
    return ["\n\n".join([*solved, text]) for text in asked]


class Item(NamedTuple):
    prompts: list              # token ids of every choice, <|bos|> first
    starts: list               # where in each the tokens begin that are scored
    shared: int                # tokens that all prompts have in common, before any scored one
    gold: int                  # number of the right choice
    ticket: int                # a number drawn from the texts; breaks ties


def common_length(lists):
    """How many first elements all the lists share."""
    first, last = min(lists), max(lists)         # in between, what these two share all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def make_item(task, row, texts, tokenizer, context):
    """The texts as prompts cut to the context -> Item; None where the scored tokens alone don't fit."""
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    if task.kind == SCHEMA:                      # the same end after different beginnings
        same = min(common_length([prompt[::-1] for prompt in prompts]), min(map(len, prompts)) - 1)
        starts = [len(prompt) - same for prompt in prompts]
    else:                                        # different ends after the same beginning
        begin = common_length(prompts)
        prompts = prompts[1:] if task.kind == LM else prompts
        starts = [min(begin, min(map(len, prompts)) - 1)] * len(prompts)   # each has one token at least
    # Cut behind <|bos|>, the same for all choices, so that they are judged after the same words.
    # The last token is never read, only predicted: context + 1 tokens fit.
    cut = max(0, max(map(len, prompts)) - (context + 1))
    cuts = [min(cut, start - 1) for start in starts]
    prompts = [prompt[:1] + prompt[1 + n:] for prompt, n in zip(prompts, cuts)]
    starts = [start - n for start, n in zip(starts, cuts)]
    if max(map(len, prompts)) > context + 1:
        return None
    shared = min(common_length(prompts), min(starts) - 1) if len(prompts) > 1 else 0
    return Item(prompts, starts, shared, row.get("gold", 0), ticket_of(texts))


# scores
class SharedPrefix(NamedTuple):
    """A cache to read from: the choices of an item go on from the prefix that was read once."""
    cache: KVCache             # a row per item
    items: torch.Tensor        # (R,) int64: the item that each row of choices is of
    length: int                # tokens of the prefix

    def begin(self, T):
        return slice(self.length, self.length + T)

    def append(self, layer, k, v):
        kept, T = self.cache.kv[layer][:, self.items], k.size(2)     # (2, R, H, length, D), of one layer
        return torch.cat((kept[0], k), dim=2), torch.cat((kept[1], v), dim=2), causal_mask(T, self.length + T, k.device)

    def advance(self, T):
        """Nothing is kept of the choices."""


def batches(items, budget):
    """Groups of items that are read in one pass of at most `budget` tokens; alike ones together."""
    group, num_rows, longest = [], 0, 0
    for item in sorted(items, key=lambda item: (item.shared, max(map(len, item.prompts)))):
        num_rows, longest = num_rows + len(item.prompts), max(longest, *map(len, item.prompts))
        shared = (group or [item])[0].shared     # by the whole group: they come in ascending order
        if group and (len(group) + 1) * shared + num_rows * (longest - shared) > budget:
            yield group
            group, num_rows, longest = [], len(item.prompts), max(map(len, item.prompts))
        group.append(item)
    if group:
        yield group


@torch.no_grad()
def read(model, items):
    """
    One pass over the prompts of some items -> for each item a list of (mean loss, all greedy).
    What the choices of each item share, as far as all items have so much, is read once per item.
    Prompts of different lengths are filled up at the right, where a causal model doesn't see it.
    """
    rows = [(k, prompt, start) for k, item in enumerate(items) for prompt, start in zip(item.prompts, item.starts)]
    shared, prefix = min(item.shared for item in items), None
    if shared:
        cache = KVCache(model, len(items), shared)
        idx = torch.tensor([item.prompts[0][:shared] for item in items], device=model.device)
        model(idx, kv_cache=cache, positions=torch.zeros(len(items), dtype=torch.long, device=model.device))
        prefix = SharedPrefix(cache, torch.tensor([k for k, _, _ in rows], device=model.device), shared)
    x = pad_sequence([torch.tensor(prompt[shared:-1]) for _, prompt, _ in rows], batch_first=True)
    y = pad_sequence([torch.tensor([-1] * (start - 1 - shared) + prompt[start:]) for _, prompt, start in rows],
                     batch_first=True, padding_value=-1)
    losses, best = model.score(x.to(model.device), y.to(model.device), kv_cache=prefix)
    sizes = [len(prompt) - start for _, prompt, start in rows]
    # float64: the mean of equal losses is that loss, whatever their number
    losses, hits = losses.cpu().double().split(sizes), (best.cpu() == y[y >= 0]).split(sizes)
    scores = iter([(loss.mean().item(), hit.all().item()) for loss, hit in zip(losses, hits)])
    return [[next(scores) for _ in item.prompts] for item in items]


def is_right(task, item, scores):
    """Whether the scores of an item's prompts, (mean loss, all greedy) each, make it a right one."""
    if task.kind == LM:
        return scores[0][1]
    choice = choose([loss for loss, _ in scores], item.ticket)
    return item.prompts[choice] == item.prompts[item.gold]   # a few items offer the same text twice


def evaluate_core_task(model, tokenizer, task, rows, max_per_task=0):
    """
    The items that a model gets right, of at most the first max_per_task (0 = all) -> (right, asked, too long).

    Over all ranks. An item whose scored tokens don't fit into the model's context counts as asked and wrong.
    """
    numbers = range(RANK, min(max_per_task or len(rows), len(rows)), WORLD_SIZE)
    budget = TOKENS_CPU if model.device.type == "cpu" else TOKENS_GPU
    right = too_long = 0
    for first in range(0, len(numbers), CHUNK):
        items = [make_item(task, rows[i], render(task, rows[i], draw_shots(rows, i, task.shots)), tokenizer,
                           model.config.sequence_len) for i in numbers[first:first + CHUNK]]
        too_long += items.count(None)
        for group in batches([item for item in items if item], budget):
            right += sum(is_right(task, item, scores) for item, scores in zip(group, in_halves(partial(read, model), group)))
    return tuple(int(n) for n in sum_over_ranks([right, len(numbers), too_long], model.device))


def evaluate_core(model, tokenizer, max_per_task=0, report=lambda label, result: None):
    """
    All tasks -> ({label: dict(accuracy, centered, n, too_long, seconds)}, CORE); all in 0 ... 1.

    max_per_task: items of each task, 0 = all; report: called after each task, for the whole takes minutes to hours
    """
    folder, results = fetch_bundle(), {}
    for task in TASKS:
        clock = time.perf_counter()
        right, n, too_long = evaluate_core_task(model, tokenizer, task, read_rows(folder, task), max_per_task)
        results[task.label] = dict(accuracy=right / n, centered=centered(right / n, task.baseline / 100), n=n,
                                   too_long=too_long, seconds=round(time.perf_counter() - clock, 3))
        report(task.label, results[task.label])
    return results, sum(result["centered"] for result in results.values()) / len(results)
