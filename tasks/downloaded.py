"""
The tasks that are downloaded: general conversations, school and exam questions, mathematics, and who nanochat is.

reads   task_data/, which fetch() fills (python prepare.py --tasks=1)
"""
import contextlib
import functools
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq

from plumbing.common import base_path
from plumbing.download import HUB, download, problem_inside, problem_with_parquet
from tasks import spelling
from tasks.task import Task, must_be, shuffled

PARQUET = "%s-00000-of-00001.parquet"
SOURCES = {     # folder below task_data/: where its files come from, which files
    "smoltalk": (f"{HUB}/datasets/HuggingFaceTB/smol-smoltalk/resolve/main/data/",
                 [f"train-{i:05d}-of-00004.parquet" for i in range(4)] + [PARQUET % "test"]),
    # all/ and not auxiliary_train/, where every row is wrapped once more
    "mmlu": (f"{HUB}/datasets/cais/mmlu/resolve/main/all/", [PARQUET % "auxiliary_train", PARQUET % "test"]),
    "gsm8k": (f"{HUB}/datasets/openai/gsm8k/resolve/main/main/", [PARQUET % "train", PARQUET % "test"]),
    "arc": (f"{HUB}/datasets/allenai/ai2_arc/resolve/main/",
            [PARQUET % f"ARC-{subset}/{split}" for subset in ("Easy", "Challenge") for split in ("train", "test")]),
    "humaneval": (f"{HUB}/datasets/openai/openai_humaneval/resolve/main/openai_humaneval/",
                  [PARQUET % "test"]),           # its task: evals/humaneval.py
    "identity": ("https://karpathy-public.s3.us-west-2.amazonaws.com/", ["identity_conversations.jsonl"]),
    "words": ("https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/", ["words_alpha.txt"]),
}
FETCH = "run: python prepare.py --tasks=1"


class ParquetRows:
    """Rows of parquet files as dicts, shuffled; their number comes from the footers, the text at first use."""

    def __init__(self, paths, columns):
        self.paths, self.columns, num_rows = paths, columns, 0
        for path in paths:
            with opened(path) as file:
                num_rows += file.metadata.num_rows
        self.order = shuffled(num_rows)

    @functools.cached_property
    def table(self):
        """The columns of all files, about as large as the text, unlike objects."""
        tables = []
        for path in self.paths:
            with opened(path) as file:
                if missing := set(self.columns) - set(file.schema_arrow.names):
                    raise pa.ArrowInvalid(f"it has no column {min(missing)!r}")
                tables.append(file.read(self.columns))
        return pa.concat_tables(tables)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.table.slice(int(self.order[i]), 1).to_pylist()[0]


@contextlib.contextmanager
def opened(path):
    """A parquet file; SystemExit with the remedy when it is missing, or turns out to be damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise SystemExit(f"{path}: not here; {FETCH}") from None
    except (pa.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"{path}: damaged ({reason}); delete it and {FETCH}") from None


def from_parquet(task, names, columns, convert, size):
    """The Task of some files in a folder of SOURCES."""
    load = functools.partial(ParquetRows, [base_path("task_data", task, name) for name in names], columns)
    return Task(f"{task} {names[0].partition('-0')[0]}", load, convert, size)


def smoltalk(split, size=0):
    """General conversations (460K train, 24K test)."""
    must_be("split", split, ("train", "test"))
    names = [name for name in SOURCES["smoltalk"][1] if name.startswith(split)]
    return from_parquet("smoltalk", names, ["messages"], None, size)


def mmlu(split, size=0):
    """Exam questions of 57 subjects (14K test); train: the auxiliary set of school ones (100K)."""
    must_be("split", split, ("train", "test"))
    name = PARQUET % ("auxiliary_train" if split == "train" else "test")
    return from_parquet("mmlu", [name], ["question", "choices", "answer"], choice_row, size)


def arc(subset, split, size=0):
    """School science questions; subset: Easy or Challenge."""
    must_be("subset", subset, ("Easy", "Challenge"))
    must_be("split", split, ("train", "test"))
    columns = ["question", "choices", "answerKey"]
    return from_parquet("arc", [PARQUET % f"ARC-{subset}/{split}"], columns, choice_row, size)


def choice_row(row):
    """
    A question of MMLU or ARC with its choices lettered, answered by the letter alone.

    Word for word the original nanochat's prompt: published weights were trained on it. A small model binds a letter
    better that stands after its choice, and one without a space before it: "A" is the token of the answer, " A" another.
    """
    if "answerKey" in row:      # ARC; one row in 25 numbers its choices 1 2 3 4: here they are A B C D by position
        choices, right = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    else:
        choices, right = row["choices"], row["answer"]
    letters = list("ABCDEFGHIJ"[:len(choices)])
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    prompt = (f"Multiple Choice question: {row['question']}\n{lines}\n"
              "Respond only with the letter of the correct answer.")
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[right]}],
            "grading": "letter", "answer": letters[right], "letters": letters}


def gsm8k(split, size=0):
    """School mathematics in words; the calculations become calls of the calculator."""
    must_be("split", split, ("train", "test"))
    return from_parquet("gsm8k", [PARQUET % split], ["question", "answer"], gsm8k_row, size)


def gsm8k_row(row):
    """
    "... 48/2 = <<48/2=24>>24 clips. #### 24": what stands in << >> is a call and its result, which is kept as the data
    set writes it ("4.80", where our calculator says "4.8").
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", row["answer"])):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts += [{"type": "text", "text": piece}]
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}],
            "grading": "number", "answer": row["answer"].rpartition("####")[2].strip()}


def identity_file():
    """The original's 1,000 conversations about nanochat; a JSON list of messages per line."""
    return Task("identity file", load_identity_file)


def load_identity_file():
    path = base_path("task_data", "identity", "identity_conversations.jsonl")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: not here; {FETCH}")
    if problem := problem_with_identity_file(path):
        raise SystemExit(f"{path}: damaged ({problem}); delete it and {FETCH}")
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    # A few end with a question that nobody answers; there is nothing to learn from it.
    rows = [row[:-1] if row[-1]["role"] == "user" else row for row in rows]
    return [{"messages": rows[i]} for i in shuffled(len(rows))]


def tests(embedded, who):
    """The tests by name; see tasks.all_tests."""
    return {} if embedded else {"ARC-Easy": arc("Easy", "test"), "ARC-Challenge": arc("Challenge", "test"),
                                "MMLU": mmlu("test"), "GSM8K": gsm8k("test")}


def problem_with_identity_file(path):
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


PROBLEM_WITH = {"words_alpha.txt": spelling.problem_with_words,
                "identity_conversations.jsonl": problem_with_identity_file}


def fetch(verify=False, missing=True):
    """
    Download into task_data/ what the tasks need.

    verify: read what is there already to its end; missing: fetch also what is not there
    """
    for task, (url, files) in SOURCES.items():
        for name in files:
            path, problem_with = base_path("task_data", task, name), PROBLEM_WITH.get(name, problem_with_parquet)
            if missing or os.path.exists(path):
                look = (lambda path: problem_with(path) or problem_inside(path)) if verify else problem_with
                num_bytes = download(url + name, path, look)
                state = f"{num_bytes / 1e6:.1f} MB" if num_bytes else "there"
                print(f"task_data/{task}/{name}   {state}", flush=True)
