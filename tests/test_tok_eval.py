"""
The tokenizer's evaluation: right numbers, and an end also where the references can't be had.

The references are made here and put in the place of tiktoken's, so nothing is fetched.
"""
import json
import os
import re
import runpy
import sys
import threading
import time

import pytest
from tiktoken_ext import openai_public

from conftest import ROOT
from data import VAL_SHARD, shard_path, write_shard
from plumbing import common
from tokenizer import Tokenizer

BYTES = [bytes([i]) for i in range(256)]


def single_bytes():
    return dict(name="bytes", pat_str=r"\s+|\S+", special_tokens={"<|endoftext|>": 256},
                mergeable_ranks={token: rank for rank, token in enumerate(BYTES)})


def broken():
    raise ConnectionError("there is no network")


def hanging():
    threading.Event().wait(600)
    return single_bytes()


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """A base folder with a tokenizer of bytes and pairs of letters, and two shards."""
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path))
    monkeypatch.setattr(openai_public, "ENCODING_CONSTRUCTORS",
                        dict(gpt2=single_bytes, cl100k_base=single_bytes, broken=broken, hanging=hanging))
    Tokenizer([*BYTES, b"th", b"er", b"aa"]).save(str(tmp_path / "tokenizer"), {})
    write_shard(shard_path(0), ["a" * 400, "bb " * 100])
    write_shard(shard_path(VAL_SHARD), ["ab" * 50])
    return tmp_path


def tok_eval(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tok_eval.py", *flags])
    return runpy.run_path(os.path.join(ROOT, "tok_eval.py"))


def result(base_dir):
    return json.loads((base_dir / "tokenizer/eval.json").read_text())


def test_the_numbers(base_dir, monkeypatch, capsys):
    tok_eval(monkeypatch)
    found, shown = result(base_dir), capsys.readouterr().out
    assert found["vocab_sizes"] == {"ours": 268, "GPT-2": 257, "GPT-4": 257} and found["missing"] == {}
    assert list(found["texts"]) == ["news", "code", "math", "science", "Korean", "train", "validation"]
    assert found["texts"]["train"] == dict(bytes=700, tokens={"ours": 500, "GPT-2": 700, "GPT-4": 700})
    assert found["texts"]["validation"]["tokens"]["ours"] == 100
    assert all(text["bytes"] == text["tokens"]["GPT-2"] for text in found["texts"].values())
    assert re.search(r"train +700 +1\.400 +1\.000 +1\.000 +1\.400 +1\.400\n", shown)
    for num_chars, num_bytes in ((450, 450), (0, 700)):                  # 0 = all
        tok_eval(monkeypatch, f"--num_chars={num_chars}")
        assert result(base_dir)["texts"]["train"]["bytes"] == num_bytes


@pytest.mark.parametrize("name, why", [("broken", "there is no network"), ("hanging", "no answer within 1 seconds")])
def test_a_reference_that_cannot_be_had_costs_little_time_and_one_line(base_dir, monkeypatch, capsys, name, why):
    clock = time.monotonic()
    tok_eval(monkeypatch, f"--references=gpt2,{name}", "--fetch_seconds=1")
    assert time.monotonic() - clock < 300
    lines = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert len(lines) == 1 and why in lines[0]
    found = result(base_dir)
    assert why in found["missing"][name] and set(found["vocab_sizes"]) == {"ours", "GPT-2"}


def test_the_network_is_asked_once(base_dir, monkeypatch, capsys):
    asked = []
    makers = openai_public.ENCODING_CONSTRUCTORS
    for name in ("gpt2", "broken"):
        monkeypatch.setitem(makers, name, lambda make=makers[name], name=name: asked.append(name) or make())
    tok_eval(monkeypatch, "--references=gpt2,broken")
    first, said = result(base_dir), capsys.readouterr().out
    again = re.search(r"to ask again: rm (\S+); python tok_eval.py", said)[1]
    assert sorted(asked) == ["broken", "gpt2"]
    tok_eval(monkeypatch, "--references=gpt2,broken")
    assert len(asked) == 2 and result(base_dir) == first and again in capsys.readouterr().out
    os.remove(again)
    tok_eval(monkeypatch, "--references=gpt2,broken")
    assert asked[2:] == ["broken"]
    for damage in ("", "[1]", '{"name": "gpt2"}', '{"pat_str": 3, "mergeable_ranks": {"a": "b"}}'):
        (base_dir / "references/gpt2.json").write_text(damage)
        tok_eval(monkeypatch, "--references=gpt2")                       # asks, or says that it has none
        assert ("GPT-2" in result(base_dir)["vocab_sizes"]) == (damage in ("", "[1]"))


def test_ours_alone(base_dir, monkeypatch):
    tok_eval(monkeypatch, "--references=")
    assert list(result(base_dir)["vocab_sizes"]) == ["ours"]


def test_what_is_there_already(base_dir, monkeypatch, capsys):
    tok_eval(monkeypatch, "--references=broken")
    with pytest.raises(SystemExit) as done:
        tok_eval(monkeypatch, "--references=broken", "--resume=1")
    assert done.value.code == 0 and "finished already" in capsys.readouterr().out
    tok_eval(monkeypatch, "--references=gpt2", "--resume=1")             # other settings
    assert "GPT-2" in result(base_dir)["vocab_sizes"]
    Tokenizer([*BYTES, b"th"]).save(str(base_dir / "tokenizer"), {})     # another tokenizer
    tok_eval(monkeypatch, "--references=gpt2", "--resume=1")
    assert result(base_dir)["vocab_sizes"]["ours"] == 266


@pytest.mark.parametrize("damage", ['{"fingerprint": "a', "[1, 2]", ""])
def test_a_damaged_file_is_said_in_one_line_and_made_again(base_dir, monkeypatch, capsys, damage):
    path = base_dir / "tokenizer/eval.json"
    path.write_text(damage)
    tok_eval(monkeypatch, "--references=", "--resume=1")
    assert capsys.readouterr().out.count("eval.json: damaged, so it is made again\n") == 1
    assert list(result(base_dir)["vocab_sizes"]) == ["ours"]


def test_missing_shards_and_odd_text(base_dir, monkeypatch, capsys):
    os.remove(shard_path(VAL_SHARD))
    write_shard(shard_path(0), [" " * 300_000, "", "x"])                 # more white space than tiktoken's stack holds
    tok_eval(monkeypatch)
    assert result(base_dir)["texts"]["train"]["bytes"] == 300_001
    assert "validation text: left out" in capsys.readouterr().out and "validation" not in result(base_dir)["texts"]


def test_what_a_user_may_get_wrong(base_dir, monkeypatch):
    wrong = {"--references=gpt5": "tiktoken has gpt2", "--num_chars=-1": "num_chars=-1: must be 0", "--fetch_seconds=0": "fetch_seconds=0.* must be 1"}
    for flag, said in wrong.items():
        with pytest.raises(SystemExit, match=said):
            tok_eval(monkeypatch, flag)
    os.remove(base_dir / "tokenizer/meta.json")
    with pytest.raises(SystemExit, match="no tokenizer here; run: python tok_train.py"):
        tok_eval(monkeypatch)


def test_the_texts_are_what_they_are_called(base_dir, monkeypatch):
    texts = tok_eval(monkeypatch, "--references=")["TEXTS"]
    assert all(600 <= len(text.encode()) <= 1100 for text in texts.values())
    assert sum("가" <= c <= "힣" for c in texts["Korean"]) > len(texts["Korean"]) / 2
    names = {}
    exec(texts["code"], names)                                           # a program that runs
    graph = names["Graph"]()
    for edge in (("a", "b", 1), ("b", "c", 1), ("a", "c", 5)):
        graph.add_edge(*edge)
    assert graph.distances("a") == {"a": 0, "b": 1, "c": 2}
