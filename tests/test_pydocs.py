"""Laws of the embedded corpus, on whatever Python runs the tests."""
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

import data
from conftest import ROOT, run_script
from plumbing import common
from tasks import pydocs


def test_the_corpus_is_the_same_every_time_from_source_that_is_parsed_and_never_run():
    code = ("import sys; from tasks.pydocs import digest, docstrings, documents; "
            "print(digest(''.join(documents())), digest(repr(list(docstrings('train')))), *sys.modules)")
    env = dict(os.environ, PYTHONHASHSEED="1")
    *digests, loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env).decode().split(maxsplit=2)
    texts = "".join(pydocs.documents()), repr(list(pydocs.docstrings("train")))
    assert digests == list(map(pydocs.digest, texts))
    assert "tasks.pydocs" in loaded.split()
    assert not {"this", "antigravity", "turtle", "tkinter", "pydoc_data.topics"} & set(loaded.split())


def test_the_corpus_is_a_few_megabytes_without_duplicates():
    documents, docstrings = pydocs.documents(), [doc for _, _, _, doc in pydocs.entries()]
    assert 1.5e6 < sum(len(text.encode()) for text in documents) < 4e6
    assert len(set(docstrings)) == len(docstrings) >= len(documents) == len(set(documents))
    assert all(text.strip() for text in documents)


def test_the_split_is_by_document_and_about_five_percent():
    documents = pydocs.documents()
    share = sum(map(pydocs.is_validation, documents)) / len(documents)
    assert 0.035 < share < 0.065


def test_a_document_is_a_title_and_a_docstring():
    documents = "\n\n\n".join(pydocs.documents())
    assert "json.dumps(obj, *, skipkeys=False" in documents
    assert "class fractions.Fraction\n\n" in documents and "module textwrap\n\n" in documents
    assert "str.split(self, /, sep=None, maxsplit=-1)\n\n" in documents


def test_tests_and_installed_packages_stay_out():
    modules = [name.split(".") for kind, name, _, _ in pydocs.entries() if kind == "module"]
    parts = {part for module in modules for part in module[:-1]} | {module[0] for module in modules}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "pytest", "numpy"}


def test_a_broken_or_missing_source_is_skipped(tmp_path, monkeypatch):
    good = '"""Good."""\nif True:\n    def f(a, b=2):\n        """Do it."""\n'
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "zero.py").write_bytes(b"\0\0")
    (tmp_path / "latin.py").write_bytes(b"# \xe9 without a coding line\n")
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(pydocs.topic_entries()) == []
    found = [entry for entry in pydocs.library_entries() if entry[3]]
    assert found == [("module", "good", "module good", "Good."),
                     ("function", "good.f", "good.f(a, b=2)", "Do it.")]


def test_a_topic_inside_a_longer_topic_is_left_out(tmp_path, monkeypatch):
    page = "It was a long page with more than forty characters in it."
    topics = {"if": f"If\n\n{page}", "compound": f"Compound\n\n{page}\n\nAnd then some.",
              "pass": "Do nothing."}
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [name for _, name, _, _ in pydocs.topic_entries()] == ["compound", "pass"]


def test_functions_are_answers_to_what_does_it_do():
    rows = [row["messages"] for split in ("train", "test") for row in pydocs.docstrings(split)]
    names = [asked["content"].removeprefix("What does ").removesuffix(" do?") for asked, _ in rows]
    assert len(names) == len(set(names)) > 1500
    assert {"len", "str.split", "list.append", "json.dumps", "textwrap.dedent"} <= set(names)
    assert [kind for kind, *_ in pydocs.entries()[:100]] == ["builtin"] * 100, "of two names of one thing the short one is kept"
    for name, sentence in zip(names, (answer["content"] for _, answer in rows)):
        assert sentence.endswith(".") and sentence[0].isupper() and "\n" not in sentence
        assert not any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("doc, sentence", [
    ("Return the number of items\nin a list. And more.", "Return the number of items in a list."),
    ("S.find(sub[, a]) -> int\n\nReturn the lowest index in S.", "Return the lowest index in S."),
    ("Use it for lists, e.g. for [1, 2]. Then more.", "Use it for lists, e.g. for [1, 2]."),
    ("no capital letter in front of it.", ""), ("Short.", ""),
    ("Without a full stop in the paragraph", "")])
def test_the_first_sentence(doc, sentence):
    assert pydocs.first_sentence(doc) == sentence


def test_shards_are_written_once_and_never_over_downloaded_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path))
    run_script("prepare.py", "--embedded=1")
    train, val = data.shard_path(0), data.shard_path(data.VAL_SHARD)
    texts = list(data.read_texts(train))
    assert not set(texts) & set(data.read_texts(val))
    assert sorted(texts + list(data.read_texts(val))) == sorted(pydocs.documents())
    assert pq.read_metadata(train).num_row_groups > 3
    before = os.stat(train).st_mtime_ns
    run_script("prepare.py", "--embedded=1")
    assert os.stat(train).st_mtime_ns == before and "is there" in capsys.readouterr().out
    pq.write_table(pq.read_table(train).replace_schema_metadata({}), train)
    with pytest.raises(SystemExit, match="downloaded shard or own text is here"):
        run_script("prepare.py", "--embedded=1")


def test_words_are_plain_lowercase_words():
    words = pydocs.words()
    assert words == sorted(set(words)) and len(words) > 2000
    assert {"string", "module", "value"} <= set(words)
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)
