"""
The tasks that are downloaded: general conversations, school and exam questions, mathematics, and who nanochat is.

reads   task_data/, which fetch() fills (python prepare.py -n 0 --tasks=1)
"""
import functools
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq

from plumbing.common import base_path
from plumbing.download import HUB, download
from tasks import spelling
from tasks.task import SHUFFLE, Task, must_be, shuffled

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
                  [PARQUET % "test"]),           # its task: evals/humaneval.py
    "identity": ("https://karpathy-public.s3.us-west-2.amazonaws.com/",
                 ["identity_conversations.jsonl"]),
    "words": ("https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/",
              ["words_alpha.txt"]),
}
FETCH = "run: python prepare.py -n 0 --tasks=1"


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


def tests(embedded, who):
    """The tests by name; see tasks.all_tests."""
    return {} if embedded else {"ARC-Easy": arc("Easy", "test"), "ARC-Challenge": arc("Challenge", "test"),
                                "MMLU": mmlu("test"), "GSM8K": gsm8k("test")}


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
