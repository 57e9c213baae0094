"""The terminal: one question, a conversation, its commands, long talks, Ctrl-C, and what people get wrong."""
import contextlib
import io
import os
import pty
import runpy
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from checkpoint import FOLDERS, save_checkpoint
from conftest import ROOT
from engine import Engine
from model import GPT, GPTConfig
from plumbing import common
from tasks.downloaded import load_identity_file
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
    assert (out, err, code) == (ANSWER, "", 0)                 # whole characters; no special token, no bell; no remark
    header, = chat("--model_tag=d1")[1].splitlines()
    assert "sft model" in header and "d1, step 5" in header and "context 100" in header


def test_a_file_of_questions_is_answered_line_by_line(chat):
    out, err, code = chat("--model_tag=d1", stdin="hello\n\n   \nclear\nagain\r\nQUIT\nnever asked\n")
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
    assert out == ANSWER * 7                                   # the prompts are not in it: it does not go to a screen
    assert err.count("left out") >= 3 and "left out of our turns, from the oldest on: 1" in err


@pytest.fixture
def asked(monkeypatch):
    """What the engine is asked: (prompt as text, temperature, seed) of each answer."""
    calls, generate = [], Engine.generate

    def recorded(self, batch, max_tokens, temperature, top_k, seed):
        calls.append((TOKENIZER.decode(batch[0]), temperature, seed))
        return generate(self, batch, max_tokens, temperature, top_k, seed)

    monkeypatch.setattr(Engine, "generate", recorded)
    return calls


def turn(question, last=False):
    said = "Hi <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>🙂\x1b\x07"
    return (f"<|user_start|>{question}<|user_end|><|assistant_start|>"
            + ("" if last else said + "<|assistant_end|>"))


def test_what_the_model_is_given(chat, asked):
    """The newest whole turns, in order, and another seed for every answer."""
    chat("--model_tag=d1", stdin="ask 1\nask 2\nask 3\nask 4\nclear\nask 5\n", terminal=True)
    # a turn is 27 tokens, the one being asked 8, and 25 of the 100 are kept for the answer
    one, two, three, four = (turn(f"ask {i}") for i in (1, 2, 3, 4))
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + text for text in (
        turn("ask 1", True), one + turn("ask 2", True), one + two + turn("ask 3", True),
        two + three + turn("ask 4", True), turn("ask 5", True))]
    assert [seed for _, _, seed in asked] == [42, 43, 44, 45, 46]
    del asked[:]
    chat("--model_tag=d1", stdin="ask 1\nask 2\n")              # a file: no question sees the one before
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + turn("ask 1", True), "<|bos|>" + turn("ask 2", True)]


def test_retry_asks_the_last_question_again_and_forgets_its_answer(chat, asked):
    out, err, _ = chat("--model_tag=d1", stdin="/retry\na\nb\n/retry\n/RETRY\n/clear\n/retry\n", terminal=True)
    assert out == ANSWER * 5 and "(nothing was asked yet)" in err
    assert asked[1][0] == asked[2][0] == asked[3][0] == "<|bos|>" + turn("a") + turn("b", True)
    assert asked[4][0] == "<|bos|>" + turn("b", True)           # of what was before, nothing is left
    assert [seed for _, _, seed in asked] == [42, 43, 44, 45, 46]
    del asked[:]
    chat("--model_tag=d1", stdin="y\n" + "y" * 99 + "\n/retry\nz\n", terminal=True)     # what was refused is refused again
    assert asked[1][0] == "<|bos|>" + turn("y") + turn("z", True)
    del asked[:]
    chat("--model_tag=d1", stdin="a\n/retry\nb\n/retry\n")
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + turn(question, True) for question in "aabb"]


def test_a_system_message_stands_before_the_conversation_until_clear(chat, asked):
    lines = "/system\na\n/system  Be\tbrief. \nb\n/system\n/system " + "s" * 300 + "\n/system\n/clear\nc\n"
    err = chat("--model_tag=d1", stdin=lines, terminal=True)[1]
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + text for text in (
        turn("a", True), turn("Be\tbrief.\n\na") + turn("b", True), turn("c", True))]
    assert "there is no system message" in err and err.count("(system: Be\tbrief.)") == 3 and "say it shorter" in err
    del asked[:]
    chat("--model_tag=d1", stdin="/system S\na\nb\n")          # of a file it is for every line
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + turn(f"S\n\n{question}", True) for question in "ab"]


def test_temperature_is_set_shown_and_never_wrong(chat, asked):
    wrong = ["nan", "-1", "abc", "1e999", "0,5", "2000000", "1 2", "True"]
    lines = ["/temperature", "a", "/temperature 1.5", "a", *(f"/temperature {text}" for text in wrong), "/temperature", "a"]
    _, err, code = chat("--model_tag=d1", stdin="\n".join(lines))
    assert [warmth for _, warmth, _ in asked] == [0, 1.5, 1.5] and code == 0
    assert "(temperature 0)" in err and err.count("(temperature 1.5)") == 2
    refused = [line for line in err.splitlines() if "must be" in line]
    assert len(refused) == len(wrong) and all("temperature" in line for line in refused)


def test_a_saved_conversation_can_be_trained_on(chat, asked, tmp_path):
    path = tmp_path / "task_data" / "identity" / "identity_conversations.jsonl"
    path.parent.mkdir(parents=True)
    err = chat("--model_tag=d1", stdin=f"/system S\na 'ü'\nb\n/save {path}\nc\n", terminal=True)[1]
    assert f"(saved as {path})" in err
    common.BASE_DIR = str(tmp_path)                             # chat has it put back
    conversation, = load_identity_file()
    ids, mask = TOKENIZER.render_conversation(conversation)
    assert TOKENIZER.decode(ids) == "<|bos|>" + turn("S\n\na 'ü'") + turn("b")
    assert asked[2][0].startswith(TOKENIZER.decode(ids)[:60]) and sum(mask) == 30


def test_save_overwrites_nothing_and_says_what_is_wrong(chat, tmp_path):
    there = tmp_path / "there"
    there.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    wrong = [there, tmp_path, tmp_path / "link", tmp_path / "none" / "x", f"{tmp_path}/none/", "", tmp_path / ("x" * 300)]
    err = chat("--model_tag=d1", stdin="\n".join([f"/save {tmp_path}/new", "a", *(f"/save {path}" for path in wrong)]))[1]
    assert len(err.splitlines()) == 2 + len(wrong) and "saved" not in err
    assert err.count("a new file") == len(wrong) and err.splitlines()[-1].startswith(f"({tmp_path}/xxx") and "can't be written" in err
    assert there.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_slashes(chat, asked):
    """What looks like a command and is none is refused in one line; whatever else has a slash is a question."""
    lines = ["/nope", "/etc is what?", "/clear the table", "/quit now", "//nope x", "/usr/bin is what?", "/", "a /clear", "/2", "///"]
    err = chat("--model_tag=d1", stdin="\n".join(lines))[1]
    assert err.count("no such command; /help lists them, //") == 4
    assert [prompt for prompt, _, _ in asked] == ["<|bos|>" + turn(text, True) for text in (
        "/nope x", "/usr/bin is what?", "/", "a /clear", "/2", "//")]
    help_text = chat("--model_tag=d1", stdin="/help\n/exit\nb\n")[1]
    assert len(asked) == 6 and all(f"/{name}" in help_text for name in ("retry", "clear", "system", "temperature", "save", "quit"))
    assert all(len(line) <= 40 for line in help_text.splitlines()[1:])


def test_commands_of_a_base_model(chat):
    out, err, code = chat("-i=base", "--max_tokens=2", stdin="a\n/retry\n/system S\n/save x\nb\n")
    assert (out, code) == ("abc\nabc\nbc.\n", 0) and err.count("there is no conversation") == 2


def test_a_line_of_ten_megabytes_is_one_line_at_once(chat):
    for line in ("x" + " " * 10**7 + "x", "/system " + "y" * 10**7, "y" * 10**7):
        out, err, code = chat("--model_tag=d1", stdin=line + "\nshort\n")
        assert (out, code) == (("" if line[0] == "/" else "\n") + ANSWER, 0) and "characters are too many for a context of 100 tokens" in err
        assert len(err) < 1000


def test_message_longer_than_the_context(chat):
    out, err, code = chat("--model_tag=d1", stdin="y" * 500 + "\nshort\n")
    assert (out, code) == ("\n" + ANSWER, 0)   # the conversation goes on, and the answers stand in the questions' order
    assert "say it shorter" in err
    out, err, code = chat("-p", "y" * 500, "--model_tag=d1")
    assert out == "" and code.startswith("prompt: that is 504 tokens long") and "\n" not in code
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
    assert err.decode().count("(stopped; once more leaves)") == 2 and "Traceback" not in err.decode()
    assert len(out) < 2 * 40_000               # streamed: it did not wait for the whole answer


class Terminal:
    """The script at a terminal of 40 columns; what it shows comes from read()."""

    def __init__(self, base_dir, *flags):
        environment = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), TERM="dumb", COLUMNS="40", PYTHONIOENCODING="utf-8")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, SCRIPT, "--device=cpu", "--temperature=0", *flags], environment)
        self.shown = ""
        self.read("Ctrl-C stops an answer)\r\n> ")

    def read(self, end, seconds=60):
        """What is shown up to `end`; it must come."""
        deadline = time.monotonic() + seconds
        while end not in self.shown:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            try:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:                                    # it has ended
                raise AssertionError(self.shown) from None
        text, _, self.shown = self.shown.partition(end)
        return text

    def type(self, text, end=""):
        time.sleep(0.5)                                        # as a person: readline may not see a signal at once
        os.write(self.fd, text.encode())
        return self.read(end) if end else ""

    def code(self):
        """The exit code, when it has ended."""
        with contextlib.suppress(OSError):                     # which reading raises, then
            while select.select([self.fd], [], [], 60)[0]:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            os.kill(self.pid, signal.SIGKILL)                  # a minute of silence
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        assert "Traceback" not in self.shown, self.shown
        return os.waitstatus_to_exitcode(status)


def test_ctrl_c_twice_leaves(base_dir):
    def terminal():
        return Terminal(base_dir, "--model_tag=endless", "--max_tokens=40000")

    chat = terminal()
    chat.type("hello\n", "xxx")
    chat.type("\x03", "(stopped; once more leaves)\r\n> ")      # the first one stops the answer
    chat.type("abc", "abc")
    chat.type("\x03", "ends)\r\n> ")                            # one with a line typed takes that
    chat.type("/temperature\n", "(temperature 0)\r\n> ")
    chat.type("\x03", "(once more, quit or Ctrl-D ends)\r\n> ")
    chat.type("\x03")                                  # at the prompt, twice in a row
    assert chat.code() == 130 and chat.shown.strip().endswith("stopped")
    chat = terminal()
    chat.type("hello\n", "xxx")
    chat.type("\x03", "(stopped; once more leaves)\r\n> ")
    chat.type("\x03")
    assert chat.code() == 130


def test_what_was_typed_is_at_hand_the_next_time(base_dir):
    history = base_dir / "chat_history"
    history.write_text("".join(f"question {i}\n" for i in range(3000)))
    history.chmod(0o644)
    chat = Terminal(base_dir, "--model_tag=d1")
    assert "question 2999" in chat.type("\x1b[A\n", "42]")
    chat.type("Grüße\n", "42]")
    chat.type("\x04")
    assert chat.code() == 0
    lines = history.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1001 and [line for line in lines if "question" not in line][-1] == "Grüße"
    assert history.stat().st_mode & 0o777 == 0o600
    history.unlink()
    history.mkdir()                                            # no history can be had: nothing else is amiss
    chat = Terminal(base_dir, "--model_tag=d1")
    chat.type("hello\n", "42]")
    chat.type("quit\n")
    assert chat.code() == 0
    history.rmdir()


def test_a_pipe_ends_on_either_side(base_dir):
    """Whoever reads has gone, or nobody has opened the input: no traceback."""
    def start(flags, **streams):
        return subprocess.Popen([sys.executable, SCRIPT, "--device=cpu", "--temperature=0", *flags], stderr=subprocess.PIPE,
                                env=dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), PYTHONIOENCODING="utf-8"), **streams)

    process = start(["--model_tag=endless", "--max_tokens=40000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"a\nb\n")
    process.stdin.close()
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.wait(60) == 141 and b"Traceback" not in process.stderr.read()
    process = start(["--model_tag=d1", "-p", "x"], preexec_fn=lambda: os.close(0), stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (out.decode(), err, process.returncode) == (ANSWER, b"", 0)
    lost = b"(output: No space left on device; what is printed is lost until there is room)\n"
    for flags, before in ((["-p", "x"], 0), ([], 1)):
        with open("/dev/full", "wb") as full:
            process = start(["--model_tag=d1", *flags], stdin=subprocess.PIPE, stdout=full)
        err = process.communicate(b"x\n", timeout=60)[1].splitlines(keepends=True)
        assert (err[before], len(err), process.returncode) == (lost, before + 1, 1), err


def test_ctrl_c_ends_a_file_of_questions(base_dir):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--device=cpu", "--model_tag=endless", "--max_tokens=40000"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir)))
    process.stdin.write(b"a\nb\nc\n")
    process.stdin.flush()
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(err.splitlines()) == 2 and err.endswith(b"stopped\n"), err
