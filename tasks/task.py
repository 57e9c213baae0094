"""
What a task is: rows turned into conversations, mixed for training, and checked where there is a right answer.

A conversation is a dict with "messages"; where an answer can be checked it also has "kind"
(how: see check), "answer" (the short right answer) and, for a choice, "letters".
"""
import functools
import hashlib
import importlib
import json
import os
import re
import zlib
from decimal import Decimal, InvalidOperation

import numpy as np

SHUFFLE = 42            # rows of a file come in this order, so that the first n are a fair sample
TEST_SHARE = 10         # one word in so many is kept for the test


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
    """All rows of all tasks in one fixed random order; a task that is listed twice counts twice."""

    def __init__(self, tasks, seed=42):
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


def shuffled(n, seed):
    """0 .. n-1 in random order. RandomState: numpy promises that its stream never changes."""
    return np.random.RandomState(seed).permutation(n)


def in_test(text):
    """Whether a word or name belongs to the test: by its hash, so no seed and no order mixes the splits."""
    return zlib.crc32(text.encode()) % TEST_SHARE == 0


def all_tests(embedded, who):
    """
    {name: task} of what a chat model can be asked: whatever a file in this folder gives in a function tests().

    embedded: only what needs no download, worded as the tiny model learns it; who: see identity.who_is
    """
    found = {}
    for name in sorted(os.listdir(os.path.dirname(os.path.abspath(__file__)))):
        if name.endswith(".py"):
            module = importlib.import_module(f"tasks.{name[:-3]}")
            found |= module.tests(embedded, who) if hasattr(module, "tests") else {}
    return found


def must_be(name, value, allowed):
    assert value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}"


def made(label, row, size, **options):
    """The Task whose row i is row(i, **options)."""
    must_be("split", options["split"], ("train", "test"))
    text = json.dumps(options, sort_keys=True)       # goes into the label, shortened
    label = f"{label} {options['split']} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Task(label, functools.partial(range, size), functools.partial(row, **options))


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
