"""
What a task is: rows turned into conversations, mixed for training, and graded where there is a right answer.

A conversation is a dict of plain data:

    messages   [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]
    grading    how an answer is judged: exact, number, letter or identity (see is_right); only where one can be
    answer     the short right answer, likewise
    letters    the choices' letters: the evaluation then compares their logits instead of letting the model write

content is a text. An assistant's may be a list of parts instead, {"type": ..., "text": ...}, of type text, python (a
call of the calculator) and python_output (its result); spelling.counting_row has one of each.

A new task is a function that returns a Task: made() for rows that follow from their number, as in spelling.py;
Task() itself for rows that are read from somewhere, as in downloaded.py. all_tests() finds it where its file has

    def tests(embedded, who):
        return {"what the model is tested in": my_task("test")}
"""
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

TEST_SHARE = 10         # one word in so many is kept for the test
GRADINGS = ("exact", "number", "letter", "identity")   # see is_right


@dataclass(eq=False)
class Task:
    """
    Rows turned into conversations, one at a time.

    load and convert are functions of a module or partials of one: a task travels to other processes, its rows never do.
    """
    label: str                 # says what is in it, options included; caches of conversations are named after it
    load: Callable             # () -> sequence of rows, called at first use
    convert: Callable = None   # row -> conversation; None where rows are conversations
    size: int = 0              # take only so many rows; 0 = all

    @functools.cached_property
    def rows(self):
        return self.load()

    def __len__(self):
        return min(self.size, len(self.rows)) if self.size else len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"{self!r}: no row {i}")
        conversation = self.convert(self.rows[i]) if self.convert else self.rows[i]
        grading = conversation.get("grading", "exact")
        if grading not in (*GRADINGS, "program"):                # programs are judged in evals/humaneval.py
            raise SystemExit(f"{self.place(i)}: grading must be one of {', '.join(GRADINGS)}, not {grading!r}")
        return conversation

    def place(self, i):
        """Where conversation i comes from, for messages."""
        return f"{self.label}, row {i}"

    def __repr__(self):
        return f"{self.label} x {len(self)}"

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "rows"}


class Mixture(Task):
    """All rows of all tasks in one fixed random order; a task that is listed twice counts twice."""

    def __init__(self, tasks, seed=42):
        starts = np.cumsum([0, *map(len, tasks)])       # rows in the tasks before task k, then in all
        super().__init__(f"mixture {seed} of " + " + ".join(map(repr, tasks)),
                         functools.partial(shuffled, starts[-1], seed), functools.partial(mixed_row, tasks, starts))

    def place(self, i):
        task, row = part_of(*self.convert.args, self.rows[i])
        return task.place(row)


def part_of(tasks, starts, row):
    """The task in which a mixture's row lies, and which of the task's rows it is."""
    k = np.searchsorted(starts, row, side="right") - 1
    return tasks[k], int(row - starts[k])


def mixed_row(tasks, starts, row):
    """The conversation of a mixture's row."""
    task, i = part_of(tasks, starts, row)
    return task[i]


def shuffled(n, seed=42):
    """
    0 .. n-1 in random order: so are the rows of a file taken, and the first of them are a fair sample.

    RandomState: numpy promises that its stream never changes.
    """
    return np.random.RandomState(seed).permutation(n)


def in_test(text):
    """Whether a word or name belongs to the test: by its hash, so no seed and no order mixes the splits."""
    return zlib.crc32(text.encode()) % TEST_SHARE == 0


def all_tests(embedded, who):
    """
    {name: task} of what a chat model can be asked: whatever a file in this folder returns from a function tests().

    embedded: only what needs no download, worded as the tiny model learns it
    who: what the model should say of itself, dict(name, maker, facts): see identity.who_is
    """
    found = {}
    for _, name, _ in pkgutil.iter_modules([os.path.dirname(__file__)]):
        module = importlib.import_module(f"tasks.{name}")
        new = module.tests(embedded, who) if hasattr(module, "tests") else {}
        if twice := found.keys() & new.keys():
            raise SystemExit(f"tasks/{name}.py: another file has a test named {', '.join(sorted(twice))}, too; each needs "
                             "a name of its own")
        found |= new
    return found


def must_be(name, value, allowed):
    assert value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}"


def made(label, row, size, **options):
    """
    The Task whose conversation i is row(i, **options), for i in 0 .. size-1; nothing is stored.

    options: plain values, a split among them; the label gets a hash of them
    """
    assert size > 0, f"{label}: size={size}, it takes 1 or more rows"
    must_be("split", options["split"], ("train", "test"))
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    label = f"{label} {options['split']} {digest[:8]}"
    return Task(label, functools.partial(range, size), functools.partial(row, **options))


NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def is_right(conversation, answer):
    """
    Whether a generated answer is right. answer: the assistant's text, calculator calls included.

    exact     the whole text, up to white space around it (spelling)
    number    the number after "####" (GSM8K, counting): "1,000" is "1000" is "1000.0"
    letter    the first letter or word is the right choice: "B", "B.", "(B) because"
    identity  the model's name stands in the text
    """
    grading, right = conversation.get("grading"), conversation.get("answer")
    if grading == "exact":
        return answer.strip() == right
    if grading == "number":
        found = re.search(rf"####\s*\$?\s*({NUMBER})", answer)
        return bool(found) and Decimal(found[1].replace(",", "")) == Decimal(right.replace(",", ""))
    if grading == "letter":
        found = re.match(r"\W*(\w+)", answer)
        return bool(found) and found[1] == right
    if grading == "identity":
        return bool(re.search(rf"(?<!\w){re.escape(right)}(?!\w)", answer, re.IGNORECASE))
    raise SystemExit(f"a conversation with grading {grading!r} can't be judged; what tests() of a file in tasks/ returns "
                     f"needs one of {', '.join(GRADINGS)}")
