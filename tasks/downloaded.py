"""
What the chat model learns from and is asked: conversations of every task, and checks of answers.

reads   task_data/, which fetch() fills; spelling, counting, our own identity and questions about
        Python's functions are made here and need no file
gives   task objects: len(task), task[i] -> conversation; a few bytes when pickled, read when used

A conversation is a dict with "messages"; where an answer can be checked it also has "kind"
(how: see check), "answer" (the short right answer) and, for a choice, "letters".
"""
import functools
import hashlib
import json
import os
import re
from decimal import Decimal, InvalidOperation

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import identity as identity_templates
from tasks import pydocs
from tasks import spelling
from plumbing.common import base_path
from plumbing.download import HUB, download

PARQUET = "%s-00000-of-00001.parquet"
SOURCES = {     # folder below task_data/: where its files come from, which files
    "smoltalk": (f"{HUB}/datasets/HuggingFaceTB/smol-smoltalk/resolve/main/data/",
                 [f"train-{i:05d}-of-00004.parquet" for i in range(4)] + [PARQUET % "test"]),
    # all/ and not auxiliary_train/, where every row is wrapped once more
    "mmlu": (f"{HUB}/datasets/cais/mmlu/resolve/main/all/",
             [PARQUET % "auxiliary_train", PARQUET % "test"]),
    "gsm8k": (f"{HUB}/datasets/openai/gsm8k/resolve/main/main/",
              [PARQUET % "train", PARQUET % "test"]),
    "arc": (f"{HUB}/datasets/allenai/ai2_arc/resolve/main/",
            [PARQUET % f"ARC-{subset}/{split}" for subset in ("Easy", "Challenge")
             for split in ("train", "test")]),
    "humaneval": (f"{HUB}/datasets/openai/openai_humaneval/resolve/main/openai_humaneval/",
                  [PARQUET % "test"]),           # its task: humaneval.py
    "identity": ("https://karpathy-public.s3.us-west-2.amazonaws.com/",
                 ["identity_conversations.jsonl"]),
    "words": ("https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/",
              ["words_alpha.txt"]),
}
FETCH = "run: python prepare.py -n 0 --tasks=1"
SHUFFLE = 42            # rows of a file come in this order, so that the first n are a fair sample

# ---------------------------------------------------------------------------------------------
# 1. Task objects


class Task:
    """
    Rows turned into conversations, one at a time.

    label: says what is in it, options included; caches of conversations are named after it
    load: () -> sequence of raw rows, called at first use; convert: raw row -> conversation. Both
        are picklable (a function of a module or its partial); the rows themselves never travel.
    size: take only so many rows; 0 = all
    """

    def __init__(self, label, load, convert, size=0):
        self.label, self.load, self.convert, self.size = label, load, convert, size

    @functools.cached_property
    def rows(self):
        return self.load()

    def __len__(self):
        return min(self.size, len(self.rows)) if self.size else len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"{self!r}: no row {i}")
        return self.convert(self.rows[i])

    def __repr__(self):
        return f"{self.label} x {len(self)}"

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "rows"}


class Mixture:
    """All rows of all tasks in one fixed random order; see mixture()."""

    def __init__(self, tasks, seed):
        self.tasks, self.seed = list(tasks), seed

    @functools.cached_property
    def ends(self):
        """ends[k]: rows in tasks 0 .. k"""
        return np.cumsum([len(task) for task in self.tasks])

    @functools.cached_property
    def order(self):
        return shuffled(len(self), self.seed)

    def __len__(self):
        return int(self.ends[-1]) if self.tasks else 0

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"mixture: no row {i} of {len(self)}")
        row = int(self.order[i])
        k = int(np.searchsorted(self.ends, row, side="right"))
        return self.tasks[k][row - (int(self.ends[k - 1]) if k else 0)]

    def __repr__(self):
        return f"mixture {self.seed} of " + " + ".join(map(repr, self.tasks))

    def __getstate__(self):
        return {"tasks": self.tasks, "seed": self.seed}


def mixture(tasks, seed=42):
    """Tasks interleaved, always in the same way; one that is listed twice counts twice."""
    return Mixture(tasks, seed)


def shuffled(n, seed):
    """0 .. n-1 in random order. RandomState: numpy promises that its stream never changes."""
    return np.random.RandomState(seed).permutation(n)


class ParquetRows:
    """Rows of parquet files as dicts; the number comes from the footers, the text at first use."""

    def __init__(self, paths, columns):
        self.paths, self.columns = paths, columns
        self.order = shuffled(sum(open_parquet(path).metadata.num_rows for path in paths), SHUFFLE)

    @functools.cached_property
    def table(self):
        return pa.concat_tables([read_parquet(path, self.columns) for path in self.paths])

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.table.slice(int(self.order[i]), 1).to_pylist()[0]


def open_parquet(path):
    """The file, its footer read; SystemExit with the remedy when it is missing or damaged."""
    if not os.path.exists(path):
        raise SystemExit(f"{path}: not here; {FETCH}")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def read_parquet(path, columns):
    """The columns of a file as an Arrow table: about as large as the text, unlike objects."""
    missing = set(columns) - set(open_parquet(path).schema_arrow.names)
    if missing:
        raise damaged(path, f"it has no column {min(missing)!r}")
    try:
        return open_parquet(path).read(columns)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def damaged(path, error):
    """The exception for a file that is there but no good."""
    lines = str(error).splitlines() or [type(error).__name__]
    return SystemExit(f"{path}: damaged ({lines[0]}); delete it and {FETCH}")


def task_file(task, name):
    """Where a file of SOURCES lies."""
    return base_path("task_data", task, name)


def from_parquet(task, names, columns, convert, size):
    """The Task of some files in a folder of SOURCES."""
    load = functools.partial(ParquetRows, [task_file(task, name) for name in names], columns)
    return Task(f"{task} {names[0].partition('-0')[0]}", load, convert, size)


def must_be(name, value, allowed):
    assert value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}"


# ---------------------------------------------------------------------------------------------
# 2. Tasks that are downloaded


def smoltalk(split, size=0):
    """General conversations (460K train, 24K test)."""
    must_be("split", split, ("train", "test"))
    names = [name for name in SOURCES["smoltalk"][1] if name.startswith(split)]
    return from_parquet("smoltalk", names, ["messages"], smoltalk_row, size)


def smoltalk_row(row):
    return {"messages": row["messages"]}


def mmlu(split, size=0):
    """Exam questions of 57 subjects (14K test); train: the auxiliary set of school ones (100K)."""
    must_be("split", split, ("train", "test"))
    name = PARQUET % ("auxiliary_train" if split == "train" else "test")
    return from_parquet("mmlu", [name], ["question", "choices", "answer"], mmlu_row, size)


def mmlu_row(row):
    return multiple_choice(row["question"], row["choices"], row["answer"])


def arc(subset, split, size=0):
    """School science questions; subset: Easy or Challenge."""
    must_be("subset", subset, ("Easy", "Challenge"))
    must_be("split", split, ("train", "test"))
    columns = ["question", "choices", "answerKey"]
    return from_parquet("arc", [PARQUET % f"ARC-{subset}/{split}"], columns, arc_row, size)


def arc_row(row):
    # One row in 25 numbers its choices 1 2 3 4; here they are A B C D by position.
    right = row["choices"]["label"].index(row["answerKey"])
    return multiple_choice(row["question"], row["choices"]["text"], right)


def multiple_choice(question, choices, right):
    """
    A question with lettered choices, answered by the letter alone.

    right: index of the right choice
    Word for word the original nanochat's prompt: published weights were trained on it. A small
    model binds a letter better that stands after its choice, and one without a space before it:
    "A" is the token of the answer, " A" is another one.
    """
    letters = list("ABCDEFGHIJ"[:len(choices)])
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return {"messages": [{"role": "user", "content": prompt},
                         {"role": "assistant", "content": letters[right]}],
            "kind": "letter", "answer": letters[right], "letters": letters}


def gsm8k(split, size=0):
    """School mathematics in words; the calculations become calls of the calculator."""
    must_be("split", split, ("train", "test"))
    return from_parquet("gsm8k", [PARQUET % split], ["question", "answer"], gsm8k_row, size)


def gsm8k_row(row):
    """
    "... 48/2 = <<48/2=24>>24 clips. #### 24": what stands in << >> is a call and its result.

    The result is kept as the data set writes it ("4.80", where our calculator says "4.8").
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression},
                      {"type": "python_output", "text": result}]
        elif piece:
            parts += [{"type": "text", "text": piece}]
    return {"messages": [{"role": "user", "content": row["question"]},
                         {"role": "assistant", "content": parts}],
            "kind": "number", "answer": row["answer"].rpartition("####")[2].strip()}


def identity_file():
    """The original's 1,000 conversations about nanochat; a JSON list of messages per line."""
    return Task("identity file", load_identity_file, identity_file_row)


def load_identity_file():
    path = task_file("identity", "identity_conversations.jsonl")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: not here; {FETCH}")
    problem = check_identity_file(path)
    if problem:
        raise damaged(path, problem)
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [rows[i] for i in shuffled(len(rows), SHUFFLE)]


def identity_file_row(messages):
    # A few end with a question that nobody answers; there is nothing to learn from it.
    return {"messages": messages[:-1] if messages[-1]["role"] == "user" else messages}


# ---------------------------------------------------------------------------------------------
# 3. Tasks that are made here


def made(label, row, size, **options):
    """The Task whose row i is row(i, **options)."""
    must_be("split", options["split"], ("train", "test"))
    text = json.dumps(options, sort_keys=True)       # goes into the label, shortened
    label = f"{label} {options['split']} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Task(label, functools.partial(range, size), functools.partial(row, **options))


def identity(name, maker, facts, size=0, split="train"):
    """
    The model says who it is, in many wordings.

    facts: sentences divided by ; (may be empty, and so may maker)
    size: 0 = 1,000 for train; for test each wording that is never trained on, once
    """
    held_out = len(identity_templates.held_out_questions())
    size = size or (held_out if split == "test" else 1000)
    return made("identity", identity_templates.conversation, size,
                name=name, maker=maker, facts=facts, split=split)


def simple_spelling(size, split, pseudo=0.0, pieces=()):
    """
    Spell the word 'apple' -> a-p-p-l-e.

    pseudo: share of invented words in training, glued from pieces, lowercase strings such as
        tokenizer.letter_tokens(): they teach how each token is spelled wherever it stands, where
        there are few words. The test has real words only.
    """
    assert not pseudo or pieces, "invented words need pieces"
    return made(f"spelling {word_source()}", spelling.spelling_row, size,
                split=split, pseudo=pseudo, pieces=tuple(pieces))


def spelling_bee(size, split, varied=True):
    """
    How many 'r' are in 'strawberry'? -> counted by hand, checked with Python, then "#### 3".

    varied: many wordings and quotes; False = the plain one, for a model too small for more
    """
    return made(f"counting {word_source()}", spelling.counting_row, size,
                split=split, varied=varied)


def word_source():
    """Which words the spelling tasks take, for their labels."""
    return "words_alpha" if spelling.word_list() else "embedded"


def docstrings(split, size=0):
    """What does str.split do? -> the first sentence of its documentation in this Python."""
    must_be("split", split, ("train", "test"))
    load = functools.partial(load_docstrings, split)
    return Task(f"docstrings {split}", load, docstring_row, size)


def load_docstrings(split):
    rows = sorted(row for row in set(map(tuple, pydocs.functions()))
                  if spelling.in_test(row[0]) == (split == "test"))
    return [rows[i] for i in shuffled(len(rows), SHUFFLE)]


def docstring_row(row):
    name, sentence = row
    return {"messages": [{"role": "user", "content": f"What does {name} do?"},
                         {"role": "assistant", "content": sentence}]}


# ---------------------------------------------------------------------------------------------
# 4. Checks of generated answers

NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def check(conversation, answer):
    """
    Whether a generated answer is right. answer: the assistant's text, calculator calls included.

    exact     the whole text, up to white space around it (spelling)
    number    the number after "####" (GSM8K, counting): "1,000" is "1000" is "1000.0"
    letter    the first letter or word is the right choice: "B", "B.", "(B) because"
    identity  the model's name stands in the text
    """
    kind, right = conversation.get("kind"), conversation.get("answer")
    if kind == "exact":
        return answer.strip() == right
    if kind == "number":
        found = re.search(rf"####\s*\$?\s*({NUMBER})", answer)
        return bool(found) and as_number(found[1]) == as_number(right)
    if kind == "letter":
        found = re.match(r"\W*(\w+)", answer)
        return bool(found) and found[1] == right
    if kind == "identity":
        return bool(re.search(rf"(?<!\w){re.escape(right)}(?!\w)", answer, re.IGNORECASE))
    raise ValueError(f"a conversation of kind {kind!r} has no check")


def as_number(text):
    """The exact value of "1,000.50"; None for what is no number."""
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def reference_answer(conversation):
    """The last message as the text that a perfect model would give, calculator included."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# ---------------------------------------------------------------------------------------------
# 5. Fetching


def check_identity_file(path):
    """What is wrong with the identity conversations, "" for nothing."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
    except (UnicodeDecodeError, json.JSONDecodeError):
        return "it is not one JSON list per line"
    for number, row in enumerate(rows, 1):
        messages = row if isinstance(row, list) and row else [None]
        if not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            return f"line {number} is not a list of messages with role and content"
    return "" if rows else "it is empty"


CHECKS = {"words_alpha.txt": spelling.check_words,
          "identity_conversations.jsonl": check_identity_file}


def fetch(names=()):
    """Download into task_data/ what the tasks in names (keys of SOURCES; none = all) need."""
    unknown = set(names) - set(SOURCES)
    if unknown:
        raise SystemExit(f"tasks: {min(unknown)!r} is none of {', '.join(SOURCES)}")
    for task in names or SOURCES:
        url, files = SOURCES[task]
        for name in files:
            num_bytes = download(url + name, task_file(task, name), CHECKS.get(name))
            state = f"{num_bytes / 1e6:.1f} MB" if num_bytes else "there"
            print(f"task_data/{task}/{name}   {state}", flush=True)
