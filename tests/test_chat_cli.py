"""The terminal: one question, a conversation, long talks, Ctrl-C, and what people get wrong."""
import io
import os
import pty
import runpy
import signal
import subprocess
import sys

import pytest
import torch

from checkpoint import FOLDERS, save_checkpoint
from conftest import ROOT
from engine import Engine
from model import GPT, GPTConfig
from plumbing import common
from tokenizer import Tokenizer

SCRIPT = os.path.join(ROOT, "chat_cli.py")
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])        # a token per byte
SPECIAL = TOKENIZER.special


def model_that_says(tokens, context):
    """A real model whose next token depends on the last alone: each of tokens calls the next."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=context, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1,
                       n_kv_head=1, n_embd=128)
    model = GPT(config)            # its layers start as the identity, so embedding meets head
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding /= embedding.norm(dim=1, keepdim=True)
        for token, follower in zip(tokens, tokens[1:]):
            model.lm_head.weight[follower] += embedding[token]
    return model


def save(folder, model, step=5):
    meta = dict(stage="sft", num_iterations=5, config={}, tokenizer=TOKENIZER.fingerprint)
    save_checkpoint(str(folder), step, model, [], meta)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base folder with models that answer "Hi [6*7 = 42]🙂" to everything, or "x" for ever."""
    folder = tmp_path_factory.mktemp("base")
    TOKENIZER.save(str(folder / "tokenizer"), {})
    call = [SPECIAL("<|python_start|>"), *b"6*7", SPECIAL("<|python_end|>")]
    reply = [*b"Hi ", *call, SPECIAL("<|output_end|>"), *"🙂".encode(), 0x1b, 0x07,
             SPECIAL("<|assistant_end|>")]
    friendly = model_that_says([SPECIAL("<|assistant_start|>"), *reply], context=100)
    endless = model_that_says([SPECIAL("<|assistant_start|>"), *b"xx"], context=50_000)
    save(folder / "chatsft_checkpoints" / "d1", friendly)
    save(folder / "chatsft_checkpoints" / "endless", endless)
    save(folder / "base_checkpoints" / "d1", model_that_says(b"Q: abc.", context=100))
    return folder


@pytest.fixture
def chat(base_dir, monkeypatch, capsys):
    """chat(*flags, stdin="...") runs the script in this process -> (stdout, stderr, exit code)"""
    def run(*flags, stdin="", folder=base_dir, terminal=False):
        monkeypatch.setattr(common, "BASE_DIR", str(folder))
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--device=cpu", "--temperature=0", *flags])
        lines = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
        code = 0
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return out, err, code
    return run


ANSWER = "Hi [6*7 = 42]🙂\n"


def test_one_question(chat):
    out, err, code = chat("-p", "hello", "--model_tag=d1")
    assert (out, code) == (ANSWER, 0)          # whole characters; no special token, no bell
    header, = err.splitlines()
    assert "sft model" in header and "d1, step 5" in header and "context 100" in header


def test_a_file_of_questions_is_answered_line_by_line(chat):
    out, err, code = chat("--model_tag=d1", stdin="hello\n\n   \nclear\nagain\nQUIT\nnever asked\n")
    assert (out, code) == (ANSWER * 2, 0)
    assert "a new conversation" in err
    out, _, code = chat("--model_tag=d1", stdin="no newline at the end")
    assert (out, code) == (ANSWER, 0)


def test_input_that_is_no_text_is_survived(chat):
    assert chat("--model_tag=d1", stdin=b"\xff\xfe \xf0\x9f\n")[0] == ANSWER
    assert chat("-p", "\udcff\x1b[2J", "--model_tag=d1")[0] == ANSWER


def test_base_model_goes_on_with_the_text(chat):
    out, err, code = chat("-p", "Q", "-i", "base", "--max_tokens=6")
    assert (out, code) == ("Q: abc.\n", 0)
    assert "cut short by max_tokens=6" in err
    assert chat("-i=base", "--max_tokens=2", stdin="a\nb\n")[0] == "abc\nbc.\n"


def test_furthest_stage(chat, tmp_path):
    model = model_that_says([SPECIAL("<|assistant_start|>"), *b"ok", SPECIAL("<|bos|>")], 50)
    TOKENIZER.save(str(tmp_path / "tokenizer"), {})
    assert "no checkpoint of any stage" in chat("-i", "", folder=tmp_path)[2]
    for stage in ("base", "mid", "sft"):
        save(tmp_path / FOLDERS[stage] / "d1", model)
        (tmp_path / "chatsft_checkpoints" / "empty").mkdir(parents=True, exist_ok=True)
        assert f"({stage} model" in chat("-i", "", "-p", "x", "--max_tokens=3", folder=tmp_path)[1]


def test_long_talk_drops_the_oldest_turns(chat):
    out, err, _ = chat("--model_tag=d1", stdin="abcde\n" * 7, terminal=True)
    out = out.replace("> ", "")
    assert out == ANSWER * 7
    assert err.count("left out") >= 3 and "the oldest 1 of our turns" in err


def test_what_the_model_is_given(chat, monkeypatch):
    """The newest whole turns, in order, and another seed for every answer."""
    prompts, seeds, generate = [], [], Engine.generate

    def recorded(self, batch, max_tokens, temperature, top_k, seed):
        prompts.extend(map(TOKENIZER.decode, batch))
        seeds.append(seed)
        return generate(self, batch, max_tokens, temperature, top_k, seed)

    def turn(i, last=False):
        said = "Hi <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>🙂\x1b\x07"
        return (f"<|user_start|>ask {i}<|user_end|><|assistant_start|>"
                + ("" if last else said + "<|assistant_end|>"))

    monkeypatch.setattr(Engine, "generate", recorded)
    chat("--model_tag=d1", stdin="ask 1\nask 2\nask 3\nask 4\nclear\nask 5\n", terminal=True)
    # a turn is 27 tokens, the one being asked 8, and 25 of the 100 are kept for the answer
    assert prompts == ["<|bos|>" + text for text in (
        turn(1, True), turn(1) + turn(2, True), turn(1) + turn(2) + turn(3, True),
        turn(2) + turn(3) + turn(4, True), turn(5, True))]
    assert seeds == [42, 43, 44, 45, 46]
    del prompts[:]
    chat("--model_tag=d1", stdin="ask 1\nask 2\n")              # a file: no question sees the one before
    assert prompts == ["<|bos|>" + turn(1, True), "<|bos|>" + turn(2, True)]


def test_message_longer_than_the_context(chat):
    out, err, code = chat("--model_tag=d1", stdin="y" * 500 + "\nshort\n")
    assert (out, code) == (ANSWER, 0)          # the conversation goes on
    assert "say it shorter" in err
    out, err, code = chat("-p", "y" * 500, "--model_tag=d1")
    assert out == "" and code.startswith("prompt: that is 503 tokens long") and "\n" not in code
    # 90 letters, 3 specials and <|bos|> leave room for 6 tokens
    out, err, code = chat("-p", "y" * 90, "--model_tag=d1")
    assert out == "Hi [6*]\n" and "the context of 100 tokens is full" in err and code == 0


@pytest.mark.parametrize("flag, says", [
    ("--temperature=-1", "temperature=-1.0: must be"), ("--temperature=1e999", "temperature=inf"),
    ("--prompt= ", "nothing in it to answer"), ("--top_k=-1", "top_k=-1: must be"), ("--max_tokens=0", "max_tokens=0: must be"),
    ("--source=gpt", "source=gpt: must be one of"),
    ("--source=mid", "run mid_train.py first"), ("--model_tag=d9", "no checkpoint here"),
    ("--step=7", "no checkpoint of step 7"), ("--temprature=1", "did you mean temperature"),
])
def test_wrong_flags_end_in_one_line(chat, flag, says):
    tag = [] if flag.startswith("--model_tag") else ["--model_tag=d1"]
    out, _, code = chat("-p", "x", *tag, flag)
    assert out == "" and says in code and "\n" not in code


def test_seed(chat):
    def wild(*flags):
        return chat("-i", "base", "--temperature=3", "--top_k=0", "--max_tokens=40", *flags)[0]

    assert wild("-p", "Q", "--seed=1") == wild("-p", "Q", "--seed=1") != wild("-p", "Q", "--seed=2")
    assert wild("-p", "Q", "--seed=0") != wild("-p", "Q", "--seed=0")


def test_ctrl_c_stops_the_answer_and_not_the_program(base_dir):
    """In a terminal: an endless answer is interrupted, then the prompt comes back."""
    master, slave = pty.openpty()
    environment = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), PYTHONIOENCODING="utf-8")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--device=cpu", "--model_tag=endless", "--temperature=0",
         "--max_tokens=40000"],
        stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def read_up_to(byte):
        while process.stdout.read(1) != byte:
            assert process.poll() is None

    try:
        for _ in range(2):                     # the second answer comes after the first was stopped
            os.write(master, b"hello\n")
            read_up_to(b"x")
            process.send_signal(signal.SIGINT)
            read_up_to(b"\n")                  # else the next signal meets the prompt
        os.write(master, b"quit\n")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(master)
        os.close(slave)
    assert process.returncode == 0, err.decode()
    assert err.decode().count("(stopped)") == 2 and "Traceback" not in err.decode()
    assert len(out) < 2 * 40_000               # streamed: it did not wait for the whole answer
