"""The server: OpenAI's API, what may come in, many clients at once, and a training run that is watched."""
import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import httpx
import pytest
import torch
from fastapi import Request

import serving
from conftest import ROOT, run_script
from evals import live
from plumbing import common, packages, stop, web
from plumbing.common import Log, Progress
from plumbing.web import Guard, Wrong, json_object, new_app, page_headers
from serving import Job, Writer
from test_chat_cli import SPECIAL, TOKENIZER, model_that_says, save

HI = [dict(role="user", content="hello")]
CALL = "Hi [6*7 = 42]🙂"        # the answer of sft/d1 to everything
PARTS = [dict(type="text", text="Hi "), dict(type="python", text="6*7"), dict(type="python_output", text="42"),
         dict(type="text", text="🙂")]


def make_base(folder):
    """A base folder with models that say what is known: sft/d1 calls the calculator, mid/endless never ends."""
    TOKENIZER.save(str(folder / "tokenizer"), {})
    call = [SPECIAL("<|python_start|>"), *b"6*7", SPECIAL("<|python_end|>"), SPECIAL("<|output_end|>")]
    reply = [SPECIAL("<|assistant_start|>"), *b"Hi ", *call, *"🙂".encode(), SPECIAL("<|assistant_end|>")]
    save(folder / "chatsft_checkpoints" / "d1", model_that_says(reply, context=100))
    save(folder / "mid_checkpoints" / "endless", model_that_says([SPECIAL("<|assistant_start|>"), *b"xx"], context=5000))
    save(folder / "base_checkpoints" / "d1", model_that_says(b"Q: abc.", context=100))
    return folder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def until(is_so, seconds=10):
    """Whether something comes to be so."""
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


class Running:
    """chat_web.py in a process of its own."""

    def __init__(self, base_dir, *flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_NUM_THREADS="1", HF_ENDPOINT="http://127.0.0.1:9")
        self.process = subprocess.Popen([sys.executable, "chat_web.py", f"--port={self.port}", "--device=cpu", *flags], cwd=ROOT, env=env,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.line = self.process.stdout.readline()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def chat(self, messages=HI, **asked):
        return self.http.post("/v1/chat/completions", json=dict(messages=messages, temperature=0) | asked)

    def text(self, prompt, **asked):
        return self.http.post("/v1/completions", json=dict(prompt=prompt, model="base/d1", temperature=0) | asked)

    def chunks(self, path="/v1/chat/completions", **asked):
        """The events of a streamed answer, [DONE] left out."""
        with self.http.stream("POST", path, json=dict(temperature=0, stream=True) | asked) as response:
            assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def health(self):
        return self.http.get("/health").json()

    def is_quiet(self):
        """Whether soon nothing is written any more."""
        return until(lambda: self.health() == dict(status="ok", slots_per_model=2, busy=0, waiting=0))

    def end(self, *signals):
        """(exit code, what it has said on stderr) after some signals, None = as it is."""
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        self.http.close()
        return self.process.returncode, err


@pytest.fixture(scope="module")
def server(base_dir):
    running = Running(base_dir, "--slots=2")
    yield running
    code, err = running.end()
    assert code == 143 and err == "stopping after the replies that are being written; once more to leave at once\n", err


def error_of(response, status, words="", code=None):
    """That an answer is an error in OpenAI's shape with this status and these words -> its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"] and "\n" not in error["message"]
    assert len(error["message"]) < 500 and (code is None or error["code"] == code)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error["message"]


# what is answered
def test_the_first_line_says_who_answers_and_where(server):
    assert server.line == f"sft/d1: open {server.url} (Ctrl-C ends)\n"


def test_models(server):
    there = server.http.get("/v1/models").json()
    assert there["object"] == "list" and [model["id"] for model in there["data"]] == ["base/d1", "mid/endless", "sft/d1"]
    sft = server.http.get("/v1/models/sft/d1").json()
    assert sft == there["data"][2] and sft.pop("created") > 1.7e9 and sft == dict(
        id="sft/d1", object="model", owned_by="nanochat", stage="sft", tag="d1", step=5, context=100, parameters=264448,
        chats=True, default=True, copied=False)
    assert [model["chats"] for model in there["data"]] == [False, True, True]
    error_of(server.http.get("/v1/models/sft/d2"), 404, "there are: base/d1", "model_not_found")
    assert server.http.get("/v1/models/").json() == there and server.http.head("/health").status_code == 200


def test_a_copy_is_in_nobody_s_way(base_dir, tmp_path, monkeypatch):
    shutil.copytree(base_dir, tmp_path / "base")
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path / "base"))
    sft = tmp_path / "base/chatsft_checkpoints"
    shutil.copytree(sft / "d1", sft / "d1.old")                  # newer by its time
    assert [info["id"] for info in serving.models() if info["default"]] == ["sft/d1"]
    assert [info["id"] for info in serving.models(model_tag="d1.old") if info["default"]] == ["sft/d1.old"]
    there = serving.models(source="rl")
    assert not any(info["default"] for info in there)
    with pytest.raises(Wrong, match="what this server was started for is not there yet; there are: base/d1, mid/endless, sft/d1"):
        serving.model_named("", there)


def test_an_answer(server):
    answer = server.chat().json()
    assert answer["object"] == "chat.completion" and answer["model"] == "sft/d1" and answer["id"].startswith("chatcmpl-")
    choice, = answer["choices"]
    assert choice == dict(index=0, message=dict(role="assistant", content=CALL), logprobs=None, finish_reason="stop")
    # <|bos|>, the question in its marks, <|assistant_start|>; the end token is not counted
    assert answer["usage"] == dict(prompt_tokens=9, completion_tokens=16, total_tokens=25)
    assert server.chat(parts=True).json()["choices"][0]["message"]["content"] == PARTS
    cut = server.chat(max_tokens=3).json()["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"] == "Hi "
    assert server.chat(max_tokens=9, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_a_streamed_answer_is_the_same(server):
    chunks = server.chunks(messages=HI, stream_options=dict(include_usage=True))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({chunk["id"] for chunk in chunks}) == 1
    *chunks, usage = chunks
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 25 and all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == dict(role="assistant", content="")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == CALL
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    deltas = [chunk["choices"][0]["delta"] for chunk in server.chunks(messages=HI, parts=True)][1:-1]
    assert [(delta["type"], delta["content"]) for delta in deltas] == [
        *(("text", c) for c in "Hi "), *(("python", c) for c in "6*7"), *(("python_output", c) for c in "42"), ("text", "🙂")]
    text = server.chunks("/v1/completions", model="base/d1", prompt="Q", max_tokens=4, stream_options=dict(include_usage=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in text[:-1]) == ": ab" and text[-2]["choices"][0]["finish_reason"] == "length"
    assert text[-1]["usage"]["prompt_tokens"] == 2


def test_how_likely_each_token_was(server):
    entries = server.chat(logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries if entry.get("forced")] == ["<|output_start|>", "4", "2", "<|output_end|>"]
    assert all(entry["logprob"] == 0 and entry["top_logprobs"] == [] for entry in entries if entry.get("forced"))
    drawn = [entry for entry in entries if not entry.get("forced")]
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] == entry["top_logprobs"][0]["logprob"] < 0 for entry in drawn)
    assert bytes(b for entry in entries for b in entry["bytes"] or []).decode() == "Hi 6*742🙂"
    assert [entry["token"] for entry in entries if entry["bytes"] is None][:2] == ["<|python_start|>", "<|python_end|>"]
    # streamed, each token comes with its chunk, also where there is nothing to show yet
    chunks = server.chunks(messages=HI, logprobs=True)
    streamed = [entry for chunk in chunks if chunk["choices"][0]["logprobs"] for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert [entry["logprob"] for entry in streamed] == [entry["logprob"] for entry in entries] and not streamed[0]["top_logprobs"]
    old = server.text("Q", max_tokens=4, logprobs=2).json()["choices"][0]["logprobs"]
    assert old["tokens"] == list(": ab") and old["text_offset"] == [0, 1, 2, 3] and len(old["top_logprobs"][0]) == 2
    assert old["token_logprobs"][0] == old["top_logprobs"][0][":"]
    old = server.chunks("/v1/completions", model="base/d1", prompt="Q", max_tokens=3, logprobs=0)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in old[:-1]] == [[0], [1], [2]]


def test_stop_strings(server):
    for stop_at, text in (("*", "Hi [6"), (["nothing", " ["], "Hi"), ("42]", "Hi [6*7 = "), (["", "H"], ""), ("🙂🙂", CALL)):
        choice = server.chat(stop=stop_at).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        chunks = server.chunks(messages=HI, stop=stop_at)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert server.chat(stop="i", parts=True).json()["choices"][0]["message"]["content"] == "H"
    assert server.chat(stop="7", parts=True).json()["choices"][0]["message"]["content"] == [PARTS[0], dict(type="python", text="6*")]
    # it ends the writing, not only the showing
    assert server.chat(model="mid/endless", max_tokens=4900, stop="xxx").json()["usage"]["completion_tokens"] <= 4
    assert server.is_quiet()


def test_several_replies_and_seeds(server):
    def wild(**asked):
        return [choice["text"] for choice in server.text("Q", temperature=5, top_k=0, max_tokens=20, **asked).json()["choices"]]

    assert wild(seed=3, n=2) == wild(seed=3, n=2) != wild(seed=4, n=2) and len(set(wild(seed=3, n=2))) == 2
    assert wild(seed=-3) == wild(seed=-3) and wild(seed=3) == wild(seed=3, n=2)[:1] and wild() != wild()
    assert wild(seed=3, top_p=0) == [": abc." + server.text("Q: abc.", max_tokens=14).json()["choices"][0]["text"]]
    chunks = server.chunks(messages=HI, n=2)
    for i in range(2):
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == i) == CALL
    assert len(server.chat(n=2).json()["choices"]) == 2


def test_what_a_conversation_may_look_like(server):
    def tokens(messages):
        return server.chat(messages, max_tokens=1).json()["usage"]["prompt_tokens"]

    plain = tokens([dict(role="system", content="s"), dict(role="user", content="ab")])
    assert plain == tokens([dict(role="developer", content="s"), dict(role="user", content=[dict(type="text", text="a"),
                                                                                           dict(type="text", text="b")])])
    # what was answered goes back as it was: the call with its marks, the result with its own
    said = dict(role="assistant", content=PARTS)
    assert tokens([*HI, said, *HI]) == 9 + 16 + 1 + 8
    # what looks like a special token is text
    assert tokens([dict(role="user", content="<|bos|>")]) == 4 + len("<|bos|>")


def test_a_base_model_goes_on_with_a_text(server):
    assert server.text("Q", max_tokens=6).json()["choices"][0]["text"] == ": abc."
    assert server.text(["Q"], max_tokens=6).json()["choices"][0]["text"] == ": abc."
    by_token = server.text([TOKENIZER.bos, *b"Q"], max_tokens=6).json()
    assert by_token["choices"][0]["text"] == ": abc." and by_token["object"] == "text_completion"
    assert by_token["usage"]["prompt_tokens"] == 2
    error_of(server.chat(model="base/d1"), 400, "/v1/completions")


def test_prompts_about_as_long_as_the_context(server):
    for length, status in ((98, 200), (99, 200), (100, 400), (101, 400), (5000, 400)):
        answer = server.text([66] * length)
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["usage"]["completion_tokens"] == 100 - length
        else:
            error_of(answer, 400, "the context of this model holds 100", "context_length_exceeded")
        answer = server.chat([dict(role="user", content="y" * (length - 4))])
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["choices"][0]["finish_reason"] == "length"
        else:
            error_of(answer, 400, "say it shorter", "context_length_exceeded")
    long_talk = [dict(role=("user", "assistant")[i % 2], content="abcde") for i in range(21)]
    answer = server.chat(long_talk, max_tokens=20).json()
    assert answer["dropped_turns"] == 5 and answer["usage"]["prompt_tokens"] == 79
    chunks = server.chunks(messages=long_talk, max_tokens=20)
    assert chunks[0]["dropped_turns"] == 5 and "dropped_turns" not in chunks[1]


def test_a_model_that_appears_or_is_trained_further_is_there_at_once(server, base_dir):
    save(base_dir / "mid_checkpoints" / "new", model_that_says([SPECIAL("<|assistant_start|>"), *b"one", TOKENIZER.bos], 50))
    assert server.chat(model="mid/new").json()["choices"][0]["message"]["content"] == "one"
    save(base_dir / "mid_checkpoints" / "new", model_that_says([SPECIAL("<|assistant_start|>"), *b"two", TOKENIZER.bos], 50), step=6)
    assert server.chat(model="mid/new").json()["choices"][0]["message"]["content"] == "two"
    for path in (base_dir / "mid_checkpoints" / "new").iterdir():
        os.remove(path)
    error_of(server.chat(model="mid/new"), 404, "none of that name")


def test_the_official_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()][-1] == "sft/d1" and client.models.retrieve("base/d1").owned_by == "nanochat"
    answer = client.chat.completions.create(model="sft/d1", messages=HI, temperature=0, n=2, logprobs=True, top_logprobs=2)
    assert answer.choices[1].message.content == CALL and answer.usage.total_tokens == 9 + 2 * 16
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "H"
    pieces = list(client.chat.completions.create(model="", messages=HI, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == CALL
    assert pieces[-1].usage.completion_tokens == 16 and pieces[-2].choices[0].finish_reason == "stop"
    text = client.completions.create(model="base/d1", prompt="Q", max_tokens=6, temperature=0, stop=".", logprobs=1)
    assert text.choices[0].text == ": abc" and text.choices[0].logprobs.tokens[0] == ":"
    assert "".join(piece.choices[0].text for piece in client.completions.create(
        model="base/d1", prompt="Q", max_tokens=6, temperature=0, stream=True)) == ": abc."
    with pytest.raises(openai.NotFoundError, match="none of that name"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="sft/d1", messages=[dict(role="user", content="y" * 200)])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="sft/d1", messages=HI, temperature=-1)


# what is refused
BAD = [(dict(messages=[]), "messages"), (dict(messages="hi"), "messages"), (dict(messages=None), "messages"), ({}, "messages"),
       (dict(messages=[1]), "messages[0]"), (dict(messages=[dict(role="user")]), "content"),
       (dict(messages=[dict(role="god", content="x")]), "role"), (dict(messages=[dict(content="x")]), "role"),
       (dict(messages=[dict(role="user", content=3)]), "content"), (dict(messages=[dict(role=["user"], content="x")]), "role"),
       (dict(messages=[dict(role="user", content=[dict(type="image_url", text="x")])]), "type"),
       (dict(messages=[dict(role="user", content=[dict(type="python", text="x")])]), "type"),
       (dict(messages=[dict(role="user", content=[3])]), "type"),
       (dict(messages=[dict(role="assistant", content="x")]), "last message must be from the user"),
       (dict(messages=[*HI, *HI]), "must be from the assistant"), (dict(messages=[*HI, dict(role="system", content="x"), *HI]), "must be"),
       (dict(messages=[dict(role="system", content="x")]), "user"), (dict(model=3), "model"), (dict(model=["sft/d1"]), "model"),
       (dict(temperature="hot"), "temperature"), (dict(temperature=-1), "temperature"), (dict(temperature=1e999), "no number"),
       (dict(temperature=float("nan")), "no number"), (dict(temperature=True), "temperature"), (dict(temperature=10**400), "temperature"),
       (dict(top_p=2), "top_p"), (dict(top_k=-1), "top_k"), (dict(top_k=1.5), "top_k"), (dict(seed=2**64), "seed"),
       (dict(seed="x"), "seed"), (dict(max_tokens=0), "max_tokens"), (dict(max_tokens=1.5), "max_tokens"),
       (dict(max_completion_tokens=-1), "max_completion_tokens"), (dict(n=0), "n=0"), (dict(n=3), "from 1 to 2"), (dict(n=[1]), "n=[1]"),
       (dict(stop=3), "stop"), (dict(stop=["a"] * 5), "stop"), (dict(stop=[3]), "stop"), (dict(stop="x" * 201), "stop"),
       (dict(stop={"a": 1}), "stop"), (dict(logprobs=3), "logprobs"), (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
       (dict(stream="yes"), "stream"), (dict(stream_options=3), "stream")]


@pytest.mark.parametrize("asked, words", BAD, ids=[str(asked)[:50] for asked, _ in BAD])
def test_a_wrong_request_is_answered_with_a_line_that_helps(server, asked, words):
    body = asked if "messages" in asked or not asked else dict(messages=HI) | asked
    answer = server.http.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    error_of(answer, 400, words)


@pytest.mark.parametrize("asked, words", [
    (dict(prompt=None), "prompt"), (dict(prompt=[]), "prompt"), (dict(prompt=["a", "b"]), "prompt"), (dict(prompt=[-1]), "from 0 to 264"),
    (dict(prompt=[10**30]), "from 0 to 264"), (dict(prompt=[True]), "prompt"), (dict(prompt=[[1]]), "prompt"), (dict(prompt={}), "prompt"),
    (dict(echo=True), "echo"), (dict(logprobs=True), "logprobs"), (dict(logprobs=21), "logprobs")], ids=str)
def test_a_wrong_text_likewise(server, asked, words):
    error_of(server.http.post("/v1/completions", json=dict(model="base/d1", prompt="x") | asked), 400, words)


@pytest.mark.parametrize("body, words", [
    (b"", "no JSON"), (b"{", "no JSON"), (b"[]", "object"), (b"3", "object"), (b"\xff", "UTF-8"), (b'"\\ud800"', "half a character"),
    (b'{"model": "\\ud800"}', "half a character"), (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"), (b"[" * 10**5, "too deep"),
    (b'{"a":' * 990 + b"1" + b"}" * 990, "messages"), (b"9" * 5000, "no JSON"), (b'{"a": 1}{', "no JSON"), (b"\0", "no JSON")], ids=range(14))
def test_a_body_that_is_no_request(server, body, words):
    for path in ("/v1/chat/completions", "/v1/completions"):
        message = error_of(server.http.post(path, content=body, headers={"content-type": "application/json"}), 400)
        assert words in message or words == "messages"


def test_pages_that_are_not_there(server):
    for method, path, status in (("GET", "/nothing", 404), ("POST", "/v1/models", 405), ("GET", "/v1/chat/completions", 405),
                                 ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("OPTIONS", "/v1/models", 405),
                                 ("GET", "/%00", 404), ("GET", "/" + "a" * 5000, 404),
                                 ("GET", "/training/base/" + "🙂" * 100, 404)):          # 400 bytes, more than a file's name may have
        answer = server.http.request(method, path, headers={"content-type": "application/json"})
        error_of(answer, status)
        assert ("allow" in answer.headers) == (status == 405)


def random_value(rng, depth=0):
    return rng.choice([
        lambda: None, lambda: rng.choice([True, False]), lambda: rng.choice([0, 1, -1, 2**31, 2**63, -2**70, 10**40, 0.5, -0.0, 1e308]),
        lambda: rng.choice(["", "user", "assistant", "system", "\0", "🙂", "a" * 300, "<|bos|>", "sft/d1", "base/d1", "../..", "text"]),
        lambda: [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))] if depth < 4 else [],
        lambda: {rng.choice(["role", "content", "type", "text", "x"]): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
        if depth < 4 else {}, lambda: HI, lambda: [dict(role="user", content=random_value(rng, depth + 1))] if depth < 4 else []])()


FIELDS = ["model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
          "top_k", "seed", "stop", "n", "logprobs", "top_logprobs", "parts", "echo"]


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.full)])
def test_random_requests_never_break_anything(server, count):
    rng, seen = random.Random(count), Counter()
    for _ in range(count):
        body = dict(messages=HI, prompt="Q") | {name: random_value(rng) for name in rng.sample(FIELDS, rng.randint(0, 4))}
        data = json.dumps(body).encode()
        if rng.random() < 0.2:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) * rng.randint(0, 2) + data[at + 1:]
        answer = server.http.post(rng.choice(["/v1/chat/completions", "/v1/completions"]), content=data,
                                  headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), (data, answer.text)
        assert '"error"' not in answer.text or answer.status_code != 200, (data, answer.text)
        if answer.status_code != 200:
            error_of(answer, answer.status_code)
        seen[answer.status_code] += 1
    assert seen[200] > count / 20 < seen[400] and server.is_quiet()


# many at once
def open_stream(server, **asked):
    """A socket on which an endless answer comes."""
    body = json.dumps(dict(model="mid/endless", messages=HI, max_tokens=4900, stream=True) | asked).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def test_who_goes_frees_the_slot(server):
    for asked, wait in ((dict(), 0.3), (dict(), 0.0), (dict(stream=False), 0.2), (dict(n=2), 0.1), (dict(stream=False, n=2), 0.0)):
        connections = [open_stream(server, **asked) for _ in range(3)]
        if wait:
            assert until(lambda: server.health() == dict(status="ok", slots_per_model=2, busy=2, waiting=3 * asked.get("n", 1) - 2))
            time.sleep(wait)
        for connection in connections:
            connection.close()
        assert server.is_quiet(), (asked, wait, server.health())
    half = socket.create_connection(("127.0.0.1", server.port))                   # goes before it has said all
    half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
    half.close()
    assert server.chat().json()["choices"][0]["message"]["content"] == CALL


def test_full_is_503_with_a_time_to_come_back(server):
    waiting = [open_stream(server) for _ in range(2)]
    assert until(lambda: server.health()["busy"] == 2)
    statuses, threads = [], []
    for i in range(8):                                            # four for each of the two slots may wait
        threads.append(threading.Thread(target=lambda: statuses.append(server.chat(model="mid/endless", max_tokens=5).status_code)))
        threads[-1].start()
        assert until(lambda: server.health()["waiting"] > i)
    full = server.chat()
    error_of(full, 503, "no more are taken for some seconds")
    assert full.headers["retry-after"] == "5"
    for connection in waiting:
        connection.close()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8


def test_fifty_clients_and_two_hundred_idle_connections(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    statuses = []

    async def load():
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
            async def ask(i):
                answer = await http.post("/v1/chat/completions", json=dict(messages=HI, temperature=0, max_tokens=90, n=1 + i % 2,
                                                                           model=("sft/d1", "mid/endless")[i % 2]))
                assert answer.status_code == 503 or len(answer.json()["choices"]) == 1 + i % 2
                statuses.append(answer.status_code)

            async def watch():
                while len(statuses) < 50:
                    answer = await http.get("/health")
                    assert answer.status_code == 200 and answer.json()["busy"] <= 2 * answer.json()["slots_per_model"]
                    await asyncio.sleep(0.02)

            await asyncio.gather(watch(), *(ask(i) for i in range(50)))

    asyncio.run(load())
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 6 and server.is_quiet()
    for connection in idle:
        connection.close()


class Alone(Writer):
    """A Writer in the test's own thread."""

    def __init__(self, slots):
        super().__init__(slots, "cpu")
        self.loop = SimpleNamespace(call_soon_threadsafe=lambda function, events: function(events))

    def job(self, model="", n=1, chat=True, tokens=5):
        made = Job(model, chat, lambda model, most: ([TOKENIZER.bos, SPECIAL("<|assistant_start|>")], 0), n, tokens, 0, [], False, -1,
                   dict(temperature=0.0, top_k=0, top_p=1.0, likeliest=0))
        self.submit(made)
        return made

    def turn(self):
        self.take_in()
        self.write()

    def last_of(self, job):
        """The last that a job is told, when all jobs have ended."""
        while self.open:
            self.turn()
        return [job.events.get_nowait() for _ in range(job.events.qsize())][-1]


@pytest.fixture
def loaded(base_dir, monkeypatch):
    """The folders of the models that are loaded from the base folder."""
    folders, load = [], serving.load_model
    monkeypatch.setattr(common, "BASE_DIR", str(base_dir))
    monkeypatch.setattr(serving, "load_model", lambda folder, *args: folders.append(folder) or load(folder, *args))
    return folders


def test_a_model_that_breaks_is_one_answer_and_the_server_goes_on(loaded, monkeypatch, capsys):
    def failing(*_):
        raise errors.pop()

    writer = Alone(2)
    job, last_of = writer.job, writer.last_of
    assert last_of(job()).finish == "length" and len(loaded) == 1
    for errors, status, words in (([torch.OutOfMemoryError("x")], 503, "out of memory"), ([RuntimeError("device lost")], 500, "device lost")):
        two, other, left = job(n=2), job("mid/endless"), job()
        writer.take_in()
        left.gone = True
        next(model for model in writer.models if model.name == "sft/d1").batch.step = failing
        wrong = last_of(two)
        assert isinstance(wrong, Wrong) and wrong.status == status and words in str(wrong) and two.open == 0
        assert last_of(other).finish == "length" and [model.name for model in writer.models] == ["mid/endless"]
        assert last_of(job()).finish == "length"
    assert capsys.readouterr().err.count("Traceback") == 1        # of what nobody has thought of
    assert len(loaded) == 4 and len(writer.models) == 2
    # a third model takes the place of the one that was not asked for longest, once that has nothing to write
    writes, waits, comes = job("mid/endless"), job(), job("base/d1", chat=False)
    writer.take_in()
    assert waits.events.qsize() == 1 and comes.events.empty(), "both in memory have something to write"
    assert last_of(comes).finish == last_of(waits).finish == last_of(writes).finish == "length"
    assert last_of(job("mid/endless")).finish == "length"
    assert {model.name for model in writer.models} == {"base/d1", "mid/endless"}
    monkeypatch.setattr(serving, "load_model", failing)
    errors = [torch.OutOfMemoryError("x")]
    assert last_of(job("sft/d1")).status == 503 and not writer.models, "what is idle makes room for the next try"


def test_the_first_come_is_the_first_served_and_who_goes_makes_room(loaded):
    writer, begun = Alone(2), []
    jobs = [writer.job(tokens=15) for _ in range(6)]
    for _ in range(3):
        writer.turn()
    assert [job.events.qsize() for job in jobs] == [4, 4, 1, 1, 1, 1] and writer.busy() == 2 and writer.open == 6
    jobs[0].gone = jobs[4].gone = True
    writer.turn()                                                # not a token more; the next one's prompt is read
    writer.turn()
    assert jobs[0].events.qsize() == 5 and [job.open for job in jobs] == [0, 1, 1, 1, 0, 1] and jobs[2].events.qsize() > 1
    while writer.open:
        writer.turn()
        begun += [job for job in jobs if job.events.qsize() > 2 and job not in begun]
    assert begun == [*jobs[:4], jobs[5]]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(loaded, base_dir):
    folder = base_dir / "mid_checkpoints" / "hurt"
    for step in (5, 6):
        save(folder, model_that_says([SPECIAL("<|assistant_start|>"), *b"ok", TOKENIZER.bos], 50), step=step)
    (folder / "model_000006.pt").write_bytes(b"damaged")
    writer = Alone(1)
    for _ in range(3):
        assert writer.last_of(writer.job("mid/hurt")).finish == "stop"
    assert len(loaded) == 1
    shutil.rmtree(folder)


# who may come in
def through(guard, method="GET", path="/health", headers=(), messages=({"body": b""},), seconds=None):
    """(status, headers, body) of what a Guard answers to a request whose body comes in messages; the last is repeated."""
    sent, left = [], [*messages]

    async def receive():
        if len(left) > 1:
            return {"type": "http.request", **left.pop(0)}
        if seconds and left[0].get("more_body"):
            await asyncio.sleep(seconds)
            return {"type": "http.request", **left[0]}
        return {"type": "http.request", **left.pop()} if left else await asyncio.Future()

    async def send(message):
        sent.append(message)

    scope = dict(type="http", method=method, path=path, raw_path=path.encode(), query_string=b"", http_version="1.1", scheme="http",
                 headers=[(name.encode(), value.encode()) for name, value in (dict(host="127.0.0.1:8000") | dict(headers)).items()])
    asyncio.run(guard(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, body


@pytest.fixture
def app():
    app = new_app()
    app.add_api_route("/health", lambda: "well")

    async def echo(request: Request):
        return json_object(await request.body())

    def broken():
        raise ZeroDivisionError
    app.add_api_route("/v1/echo", echo, methods=["POST"])
    app.add_api_route("/broken", broken)
    return app


def test_a_page_of_another_site_gets_nothing(app):
    guard = Guard(app, "127.0.0.1")
    for host, status in (("localhost", 200), ("localhost:8000", 200), ("127.0.0.1", 200), ("127.9.9.9:1", 200), ("[::1]:8000", 200),
                         ("LOCALHOST", 200), ("evil.org", 403), ("127.0.0.1.evil.org", 403), ("localhost.evil.org:8000", 403), ("", 403),
                         ("0.0.0.0:8000", 403), ("192.168.1.2", 403), ("[::]", 403), ("localhost:8000:9", 403), ("é", 403)):
        assert through(guard, headers=dict(host=host))[0] == status, host
    assert through(Guard(app, "box"), headers=dict(host="BOX:8000"))[0] == 200
    json_type, body = {"content-type": "application/json; charset=utf-8"}, [{"body": b"{}"}]
    assert through(guard, "POST", "/v1/echo", json_type, body)[0] == 200
    for other in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {"content-type": "application/jsonx"}):
        assert through(guard, "POST", "/v1/echo", other, body)[0] == 415
    _, headers, _ = through(guard, "POST", "/v1/echo", json_type | dict(origin="https://a.org"), body)
    assert not [name for name in headers if name.startswith("access-control")] and headers["x-content-type-options"] == "nosniff"
    named = Guard(app, "127.0.0.1", cors="https://a.org")
    status, headers, _ = through(named, "OPTIONS", "/v1/echo", dict(origin="https://a.org"))
    assert status == 204 and headers["access-control-allow-origin"] == "https://a.org"
    assert not [name for name in through(named, headers=dict(origin="https://b.org"))[1] if name.startswith("access-control")]


def test_the_key(app):
    guard = Guard(app, "0.0.0.0", "sécret", "https://a.org")
    json_type, body = {"content-type": "application/json"}, [{"body": b"{}"}]
    for key, status in (("Bearer sécret", 200), ("bearer  sécret ", 200), ("Bearer secret", 401), ("sécret", 401), ("Basic sécret", 401),
                        ("Bearer ", 401), ("", 401)):
        status_now, _, answer = through(guard, "POST", "/v1/echo", json_type | dict(authorization=key), body)
        assert status_now == status and (status == 200 or b"invalid_api_key" in answer), key
    assert through(guard)[0] == 200 and through(guard, "OPTIONS", "/v1/echo")[0] == 204
    assert through(guard, path="/training")[0] == 401 and through(guard, path="/v1/models")[0] == 401


def test_bodies_that_are_long_or_slow(app, monkeypatch):
    monkeypatch.setattr(web, "BODY_SECONDS", 0.2)
    guard, json_type = Guard(app, "127.0.0.1"), {"content-type": "application/json"}
    piece = {"body": b" " * 10**5, "more_body": True}
    assert through(guard, "POST", "/v1/echo", json_type, [*[piece] * 9, {"body": b"{}"}])[0] == 200
    status, headers, answer = through(guard, "POST", "/v1/echo", json_type, [*[piece] * 10, {"body": b"{}"}])
    assert status == 413 and headers["connection"] == "close" and b"longer than 1,000,000 bytes" in answer
    status, headers, answer = through(guard, "POST", "/v1/echo", json_type, [{"body": b" ", "more_body": True}], seconds=0.03)
    assert status == 408 and headers["connection"] == "close" and b"not ended" in answer
    assert through(guard, "POST", "/v1/echo", json_type, [{"body": b" ", "more_body": True}], seconds=60)[0] == 408
    assert through(guard, "POST", "/v1/echo", json_type, [*[piece] * 11, piece], seconds=0.03)[0] == 413
    asks_first = json_type | {"content-length": "2000000", "expect": "100-continue"}
    assert through(guard, "POST", "/v1/echo", asks_first, [piece], seconds=60)[0] == 413, "at once, nothing is read"


def test_a_mistake_of_ours_is_printed_and_one_answer(app, capsys):
    status, _, answer = through(Guard(app, "127.0.0.1"), path="/broken")
    assert status == 500 and b"a mistake in the server" in answer and "ZeroDivisionError" in capsys.readouterr().err


def test_a_page_can_run_and_load_nothing_but_its_own():
    policy = page_headers("<style>p{}</style><script>\nf()\n</script>")["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy and "*" not in policy
    assert policy != page_headers("<style>p{}</style><script>f()</script>")["content-security-policy"]


def test_bodies_on_a_real_connection(server):
    """A gigabyte, without a length, is read and thrown away; a header that comes byte by byte disturbs nobody."""
    def memory():
        with open(f"/proc/{server.process.pid}/status", encoding="utf-8") as f:
            return int(next(line for line in f if line.startswith("VmRSS")).split()[1]) / 1024

    slow = socket.create_connection(("127.0.0.1", server.port))
    slow.sendall(b"P")
    before = memory() if sys.platform == "linux" else 0
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 50 + b"0\r\n\r\n")
        slow.sendall(b"O")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    if before:
        assert memory() - before < 30
    slow.close()
    for nonsense in (b"\0\0\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /health\r\n\r\n", b"\r\n" * 9 + b"?",
                     b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10**6 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            with contextlib.suppress(ConnectionError):             # an end without an answer will do as well
                connection.settimeout(10)
                connection.sendall(nonsense)
                assert connection.recv(1000)[:13] in (b"HTTP/1.1 400 ", b""), nonsense[:50]
    assert server.health()["status"] == "ok"


# the training view
def test_a_run_is_watched_while_it_grows(server, base_dir):
    folder = base_dir / "base_checkpoints" / "run"
    assert server.http.get("/training").json() == dict(runs=[])
    error_of(server.http.get("/training/base/run"), 404, "no log")
    folder.mkdir()
    lock = stop.only_one(f"{folder}.lock")
    log = Log(str(folder), 0)
    progress = Progress(log, 0, 100, 1.0, 0.0)
    progress.update(0, 8.0, 1.0, dict(matrix_lr=0.02), 1000, 0.5)
    run, = server.http.get("/training").json()["runs"]
    assert run.pop("updated") > 1.7e9 and run == dict(id="base/run", stage="base", tag="run", running=True, step=1, num_iterations=100)
    first = server.http.get("/training/base/run").json()
    assert [row.get("loss") for row in first["rows"]] == [None, 8.0] and first["running"] and not first["restarted"]
    assert first["seconds_left"] == 99 * 0.5 and first["num_iterations"] == 100
    log.write(1, samples=[["a", "b"]])
    log.file.write(b'{"step": 2, "lo')                           # half a row
    second = server.http.get("/training/base/run", params=dict(after=first["cursor"])).json()
    assert second["rows"] == [dict(step=1, samples=[["a", "b"]])]
    assert server.http.get("/training/base/run", params=dict(after=second["cursor"])).json()["rows"] == []
    lock.close()
    resumed = Log(str(folder), 1)                                # goes on from step 1: what was logged of it and after is gone
    resumed.write(1, loss=7.0)
    third = server.http.get("/training/base/run", params=dict(after=second["cursor"])).json()
    assert third["restarted"] and [row["step"] for row in third["rows"]] == [0, 0, 1] and not third["running"]
    assert third["seconds_left"] is None
    for nonsense in ("x", "-1", "9" * 100, "\0", "12", "5-00000000"):
        assert server.http.get("/training/base/run", params=dict(after=nonsense)).json()["restarted"]


def test_rows_that_are_damaged_are_no_more_than_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "num_iterations": "x"}\n{"step": 1, "ms": "x"}\n{"step": 2, "ms": 1.5}\n')
    lock = stop.only_one(f"{tmp_path}.lock")
    got = live.rows_after(str(tmp_path), "")
    lock.close()
    assert len(got["rows"]) == 3 and got["running"] and got["num_iterations"] is None and got["seconds_left"] is None


def test_a_long_log_comes_in_pieces(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(dict(step=i, loss=1.0)) + "\n" for i in range(11_000)) + "[]\nnull\n\xff\n")
    cursor, steps = "", []
    for count in (5000, 5000, 1000, 0):
        got = live.rows_after(str(tmp_path), cursor)
        cursor, steps = got["cursor"], steps + [row["step"] for row in got["rows"]]
        assert len(got["rows"]) == count and not got["restarted"]
    assert steps == list(range(11_000))


def test_a_lock_is_seen_and_not_disturbed(tmp_path):
    folder = str(tmp_path / "run")
    assert not stop.is_at_work(folder)
    lock = stop.only_one(f"{folder}.lock")
    assert stop.is_at_work(folder)
    lock.close()
    assert not stop.is_at_work(folder)
    with open(f"{folder}.lock", "w", encoding="utf-8") as f:      # of a process that was killed
        f.write(f"process 999999999 on {socket.gethostname()}, since then,")
    assert not stop.is_at_work(folder)


def test_the_report_and_nothing_else_is_given_out(server, base_dir):
    error_of(server.http.get("/training/base/d1/report"), 404, "no report card")
    (base_dir / "report" / "d1").mkdir(parents=True)
    (base_dir / "report" / "d1.md").write_text("# Report card of d1\n")
    (base_dir / "report" / "d1" / "curves.png").write_bytes(b"\x89PNG")
    (base_dir / "secret.md").write_text("secret")
    assert server.http.get("/training/base/d1/report").json() == dict(markdown="# Report card of d1\n")
    picture = server.http.get("/training/base/d1/curves.png")
    assert picture.content == b"\x89PNG" and picture.headers["content-type"] == "image/png"
    for path in ("base/..%2fsecret/report", "base/../report", "base/%2e%2e/report", "base/..", "..%2f..%2fetc/passwd", "rl2/d1", "base/%00",
                 "base/d1%2f..%2f..%2fsecret/report", "base/" + "a" * 200, "base/d1%0a"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)            # which leaves the path as it is
        connection.request("GET", f"/training/{path}")
        answer = connection.getresponse()
        assert answer.status == 404 and b"# " not in answer.read(), path


# how it begins and ends
@pytest.mark.parametrize("flags, says", [
    (["--host=0.0.0.0"], "choose an --api_key="), (["--source=gpt"], "must be one of"), (["--model_tag=a/b"], "plain name"),
    (["--port=0"], "port=0"), (["--api_key=clé"], "printable ASCII"), (["--slots=0"], "slots=0"), (["--host=nowhere.invalid", "--api_key=x"], "host=nowhere.invalid"),
    (["--host=203.0.113.1", "--api_key=x"], "can't be listened at"), (["--device=tpu"], "device=tpu")])
def test_what_can_not_begin_is_one_line(base_dir, monkeypatch, flags, says):
    monkeypatch.setattr(common, "BASE_DIR", str(base_dir))
    with pytest.raises(SystemExit) as error:
        run_script("chat_web.py", *flags)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line(base_dir, monkeypatch):
    monkeypatch.setattr(common, "BASE_DIR", str(base_dir))
    with socket.socket() as s, pytest.raises(SystemExit, match="another --port="):
        s.bind(("127.0.0.1", 0))
        s.listen()
        run_script("chat_web.py", f"--port={s.getsockname()[1]}")


def test_it_begins_with_nothing_there_and_ends_with_what_it_has_begun(tmp_path):
    server = Running(tmp_path, "--slots=1")
    assert server.line.startswith("no model yet") and server.http.get("/v1/models").json() == dict(object="list", data=[])
    error_of(server.chat(), 404, "bash run_realistic.sh trains one")
    make_base(tmp_path)
    assert server.chat().json()["choices"][0]["message"]["content"] == CALL
    running = open_stream(server, max_tokens=1500)
    assert b"200 OK" in running.recv(1000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    error_of(server.chat(), 503, "about to end")
    received = b""
    while data := running.recv(65536):
        received += data
    assert b'"finish_reason": "length"' in received and b"[DONE]" in received
    code, err = server.end(signal.SIGCONT)
    assert code == 143 and len(err.splitlines()) == 1


def test_a_second_signal_leaves_at_once(base_dir):
    server = Running(base_dir)
    stream = open_stream(server)
    stream.recv(1000)
    server.process.send_signal(signal.SIGINT)
    time.sleep(1.1)                                              # a terminal's Ctrl-C may come twice in a moment
    code, err = server.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in err
    with contextlib.suppress(ConnectionError):
        assert b"[DONE]" not in b"".join(iter(lambda: stream.recv(65536), b""))   # the answer was not waited for
    stream.close()


def test_packages_that_are_missing_are_one_line():
    with pytest.raises(SystemExit) as error:
        packages.require("torch", "no_such_package", "nor_this")
    assert str(error.value).startswith("no_such_package, nor_this: not installed") and "\n" not in str(error.value)
