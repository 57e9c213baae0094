"""
Talk to the models: a page in the browser, and OpenAI's API for other programs. The page also shows a training run.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/, report/, ui.html
writes  nothing: a chat is kept in the browser it was had in, and nowhere else
run     python chat_web.py                        then open http://127.0.0.1:8000
        curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
             -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

One thread, the writer, has the models and does all that takes long; the event loop only passes on what it writes. Requests
are taken in the order in which they come.
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
packages.require("fastapi", "uvicorn")
import asyncio
import gc
import json
import os
import queue
import random
import threading
import time
import traceback
import uuid
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from fastapi import Request
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse

from chat import StopStrings, TextStream, TooLong, prompt_of
from checkpoint import FOLDERS, find_checkpoint, load_model, path_of, read_meta, sha_of, stage_folder, tags_of
from engine import Batch, Reply
from evals import live
from plumbing import stop
from plumbing.budget import num_params
from plumbing.common import ROOT, base_path
from plumbing.configurator import configure, shown
from plumbing.machine import start
from plumbing.web import Guard, Wrong, json_object, listen, new_app, page_headers, serve

source = ""                    # -i: whose model answers when a request names none: base, mid, sft; "" = the furthest there is
model_tag = ""                 # which of the stage's models that is, like d12; "" = the newest
host = "127.0.0.1"             # address to listen at; 0.0.0.0 = all of this computer's, for others in its network
port = 8000                    # TCP port
api_key = ""                   # what requests must bring; needed where others can reach the server; "" = nothing
cors = ""                      # an origin, like https://example.org, whose pages may use the API; "" = none but our own
slots = 8                      # replies of a model that are written side by side
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
config = configure(globals(), show=False)

KEPT = 2                       # models in memory at a time: the page asks two the same question
WAITING = 4                    # replies for each slot that may wait; then the server says that it is full
PIECE = 256                    # tokens of a prompt that are read between two tokens of the replies that are being written
MOST_CHARS = 200               # of a stop string
ROLES = ("system", "developer", "user", "assistant")

if source or model_tag:
    stage_folder(source or "base", model_tag or "any")         # what can be neither ends here
if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
    raise SystemExit(f"host={host}: others could reach the server there; choose an --api_key=, which they then need, or leave "
                     "host out")
if device:
    start(device, dtype)                                       # a device that is not here ends here


# what there is: found on the disk at every request, so a model that is being trained can be talked to
def model_info(stage, tag):
    """What the API tells about a model, {} where it is not there (any more)."""
    folder = stage_folder(stage, tag)
    meta = read_meta(folder)
    try:
        shape = SimpleNamespace(**meta["model_config"])
        return dict(id=f"{stage}/{tag}", object="model", owned_by="nanochat", stage=stage, tag=tag, step=meta["step"],
                    created=int(os.path.getmtime(path_of(folder, "meta", meta["step"]))),
                    context=shape.sequence_len, parameters=num_params(shape)["total"], chats=stage != "base")
    except (KeyError, FileNotFoundError):
        return {}


def models():
    """All models, those of the furthest stage last; one of them is the default."""
    found = [info for stage in FOLDERS for tag in tags_of(stage) if (info := model_info(stage, tag))]
    wanted = [info for info in found if source in ("", info["stage"]) and model_tag in ("", info["tag"])]
    default = max(wanted, key=lambda info: (list(FOLDERS).index(info["stage"]), info["created"]), default=None)
    return [info | dict(default=info is default) for info in found]


def model_named(name):
    """The model with a name, "" = the default; raises Wrong where there is none."""
    there = models()
    for info in there:
        if name == info["id"] or not name and info["default"]:
            return info
    names = ", ".join(info["id"] for info in there)
    raise Wrong(404, f"model {shown(name)}: there is none of that name; there are: {names}" if names else
                "no model has been trained here yet; bash run_realistic.sh makes one, and /training shows it growing",
                "model", "model_not_found")


# between the event loop and the writer
@dataclass(eq=False)
class Job:
    """A request: what it asks of the writer, and the queue on which its answer comes, in the event loop."""
    model: str                 # "sft/d12"; "" = the default
    chat: bool                 # else a text is gone on with
    prompt: object             # function: tokenizer, context -> ids, turns left out; raises ValueError
    n: int                     # replies
    max_tokens: int
    seed: int
    stops: list
    parts: bool                # whether calls of the calculator are parts of their own
    options: dict              # of Reply
    top: int                   # likeliest tokens to tell of; -1 = none, nor the token's own probability
    events: asyncio.Queue = field(default_factory=asyncio.Queue)     # a dict, then Pieces; a Wrong ends it
    open: int = 0              # replies that have not ended
    gone: bool = False         # nobody waits for it any more


@dataclass
class Piece:
    """What a token has added to a reply."""
    index: int
    texts: list = field(default_factory=list)                  # (kind, text)
    tokens: int = 0            # 0 for the one that ends a reply
    entry: dict | None = None  # the token and how likely it was
    finish: str = ""           # "stop", "length"; "gone"


class Writing:
    """A reply while it is written: its tokens in, Pieces out."""

    def __init__(self, job, index, reply):
        self.job, self.index, self.reply, self.tokenizer = job, index, reply, reply.tokenizer
        self.text, self.kind, self.stops = TextStream(reply.tokenizer, brackets=not job.parts), "text", StopStrings(job.stops)

    def feed(self, token, drawn):
        ended = drawn and token in (self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>"))
        piece = Piece(self.index, tokens=int(not ended))
        if not ended:
            self.add(piece, self.text.feed(token))
            if self.job.top >= 0:
                piece.entry = self.entry(token, drawn)
        if self.reply.left == 0 and not self.stops.found:
            self.add(piece, self.text.flush())
        if self.stops.found:
            piece.finish = "stop"
        elif self.reply.left == 0:
            piece.texts.append((self.kind, self.stops.flush()))
            piece.finish = "stop" if ended else "length"
        return piece

    def add(self, piece, text):
        """Put text into a piece, up to a stop string; what may be the beginning of one waits, but not beyond its part."""
        kind = self.text.kind if self.job.parts else "text"
        if kind != self.kind:
            piece.texts.append((self.kind, self.stops.flush()))
            self.kind, self.stops = kind, StopStrings(self.job.stops)
        piece.texts.append((kind, self.stops.feed(text)))

    def entry(self, token, drawn):
        """A token with the logarithm of its probability, and those that were likeliest."""
        if not drawn:
            return self.named(token, 0.0) | dict(top_logprobs=[], forced=True)
        logprob, likeliest = self.reply.noted
        return self.named(token, logprob) | dict(top_logprobs=[self.named(*pair) for pair in likeliest[:self.job.top]])

    def named(self, token, logprob):
        special = token >= len(self.tokenizer.ranks)
        return dict(token=self.tokenizer.decode([token]), logprob=max(-9999.0, logprob),         # no infinity in JSON
                    bytes=None if special else list(self.tokenizer.decode_bytes([token])))


class Model:
    """A model in memory and the replies that it writes."""

    def __init__(self, name):
        self.name = name
        folder, meta = find_checkpoint(*name.split("/", 1))
        self.sha, self.used = sha_of(meta), 0.0
        self.model, self.tokenizer = load_model(folder, meta, start(device, dtype, meta))
        self.context = self.model.config.sequence_len
        self.batch, self.writing = Batch(self.model, slots, self.context, PIECE), {}

    def begin(self, job):
        """Put the replies of a job into the batch -> what is said first; raises Wrong or ValueError where its prompt won't do."""
        ids, dropped = job.prompt(self.name, self.tokenizer, self.context)
        for index in range(job.n):
            reply = Reply(self.tokenizer, ids, min(job.max_tokens, self.context), seed=((job.seed << 20) + index) % 2**63,
                          **job.options)
            self.writing[reply] = Writing(job, index, reply)
            self.batch.add(reply)
        return dict(model=self.name, prompt_tokens=len(ids), dropped=dropped)

    def step(self):
        """The next token of every reply -> list of (job, Piece)."""
        pieces = []
        for reply, writing in list(self.writing.items()):
            if writing.job.gone:
                pieces.append((writing.job, Piece(writing.index, finish="gone")))
                self.end(reply)
        for reply, token, drawn in self.batch.step():
            writing = self.writing[reply]
            piece = writing.feed(token, drawn)
            pieces.append((writing.job, piece))
            if piece.finish:
                self.end(reply)
        return pieces

    def end(self, reply):
        self.batch.remove(reply)
        del self.writing[reply]


class Writer(threading.Thread):
    """The thread that has the models."""

    def __init__(self):
        super().__init__(daemon=True)
        self.inbox, self.queue, self.models = queue.SimpleQueue(), deque(), []
        self.open = 0          # replies asked for that have not ended; counted in the event loop alone

    # these three run in the event loop
    def submit(self, job):
        """Take a job on; raises Wrong where too many wait, or the server is about to end."""
        if stop.asked:
            raise Wrong(503, "the server is about to end; ask again when it is back", headers={"Retry-After": "30"})
        if self.open + job.n > slots * (1 + WAITING):
            raise Wrong(503, f"{self.open} replies are being written or wait for it, which is all this server takes; try again "
                             "in some seconds", headers={"Retry-After": "5"})
        job.open = job.n
        self.open += job.n
        self.inbox.put(job)

    def deliver(self, events):
        """Hand pieces, or what has gone wrong, to those who wait for them."""
        for job, event in events:
            ended = job.open if isinstance(event, Wrong) else int(isinstance(event, Piece) and event.finish != "")
            job.open -= ended
            self.open -= ended
            job.events.put_nowait(event)

    def busy(self):
        return min(self.open, sum(len(model.batch.rows) + len(model.batch.reading) for model in list(self.models)))

    # and the rest in the thread
    def run(self):
        while self.take_in():
            for model in [model for model in self.models if model.writing]:
                try:
                    self.tell(model.step())
                except Exception as error:
                    self.models.remove(model)
                    jobs = {writing.job for writing in model.writing.values()}
                    self.tell([(job, wrong_of(error)) for job in jobs])

    def tell(self, events):
        self.loop.call_soon_threadsafe(self.deliver, events)

    def take_in(self):
        """Begin what has come, as far as there is room; wait where there is nothing to do -> False at the end."""
        working = any(model.writing for model in self.models)
        while not self.inbox.empty() or not (self.queue or working):
            job = self.inbox.get()
            if job is None:
                return False
            self.queue.append(job)
        while self.queue:
            job = self.queue[0]
            try:
                if job.gone:
                    raise Wrong(499, "the client is gone")
                model = self.model_for(job.model)
                if model is None:
                    break                                      # all that are in memory are at work
                self.tell([(job, model.begin(job))])
            except (Exception, SystemExit) as error:
                self.tell([(job, wrong_of(error))])
            self.queue.popleft()
        return True

    def model_for(self, name):
        """The model with a name, loaded where it is not, or has been trained further; None where there is no room now."""
        name = model_named(name)["id"]
        sha = sha_of(read_meta(stage_folder(*name.split("/", 1))))
        model = next((model for model in self.models if (model.name, model.sha) == (name, sha)), None)
        if model is None:
            while len(self.models) >= KEPT:
                idle = [model for model in self.models if not model.writing]
                if not idle:
                    return None
                self.models.remove(min(idle, key=lambda model: (model.name != name, model.used)))
            gc.collect()
            model = Model(name)
            self.models.append(model)
        model.used = time.monotonic()
        return model


def wrong_of(error):
    """What a client is told of an error, whatever it was."""
    if isinstance(error, Wrong):
        return error
    if isinstance(error, TooLong):
        return Wrong(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, ValueError):
        return Wrong(400, str(error), "messages")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return Wrong(503, "out of memory: fewer --slots= need less, or another program uses it", headers={"Retry-After": "30"})
    if isinstance(error, SystemExit):
        return Wrong(500, str(error))
    traceback.print_exception(error)
    return Wrong(500, f"the model can't be run: {type(error).__name__}: {str(error)[:200]}")


# what a request may ask for
def number(asked, name, default, low, high, whole=False):
    """A number among the fields of a request; raises Wrong where it is none, or not in its range."""
    value = asked.get(name)
    if value is None:
        return default
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        raise Wrong(400, f"{name}={shown(value)}: must be a {'whole ' if whole else ''}number from {low:,} to {high:,}", name)
    return value


def job_of(asked, chat, prompt, top):
    """The Job that a request asks for; raises Wrong."""
    name, strings = asked.get("model") or "", asked.get("stop") or []
    if not isinstance(name, str):
        raise Wrong(400, f"model={shown(name)}: must be a name, like sft/d12", "model")
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, list) or len(strings) > 4 or not all(isinstance(s, str) and len(s) <= MOST_CHARS for s in strings):
        raise Wrong(400, f"stop={shown(strings)}: must be a string or up to 4, of at most {MOST_CHARS} characters", "stop")
    most = "max_tokens" if asked.get("max_completion_tokens") is None else "max_completion_tokens"
    seed = number(asked, "seed", random.SystemRandom().getrandbits(32), -2**63, 2**63 - 1, whole=True)
    options = dict(temperature=number(asked, "temperature", 0.6, 0, 100), top_k=number(asked, "top_k", 50, 0, 10**9, whole=True),
                   top_p=max(1e-9, number(asked, "top_p", 1.0, 0, 1)), likeliest=max(top, 1) if top >= 0 else 0)
    return Job(name, chat, prompt, number(asked, "n", 1, 1, slots, whole=True), number(asked, most, 256, 1, 10**9, whole=True),
               seed, strings, asked.get("parts") is True, options, top)


def chat_prompt(asked):
    """The messages of a request, to be made a prompt when the model is known."""
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Wrong(400, 'messages: must be a list, like [{"role": "user", "content": "Hello"}]', "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Wrong(400, f"messages[{i}]: must have a role, one of {', '.join(ROLES)}, and a content", "messages")
    messages = [message | dict(role="system") if message["role"] == "developer" else message for message in messages]
    most = number(asked, "max_completion_tokens", None, 1, 10**9, True) or number(asked, "max_tokens", 256, 1, 10**9, True)

    def prompt(model, tokenizer, context):
        if model.startswith("base/"):
            raise Wrong(400, f"{model} is a base model, which goes on with a text and knows no chat: ask it at /v1/completions",
                        "model")
        return prompt_of(tokenizer, messages, context, most)
    return prompt


def text_prompt(asked):
    """The text, or the tokens, that a request wants to be gone on with."""
    text = asked.get("prompt")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], str):
        text = text[0]
    tokens = isinstance(text, list) and text and all(type(token) is int for token in text)
    if not tokens and not isinstance(text, str):
        raise Wrong(400, f"prompt={shown(text)}: must be a text, a list with one, or a list of tokens", "prompt")

    def prompt(model, tokenizer, context):
        ids = text if tokens else [tokenizer.bos, *tokenizer.encode(text)]
        if not all(0 <= token < tokenizer.vocab_size for token in ids):
            raise Wrong(400, f"prompt: a token must be from 0 to {tokenizer.vocab_size - 1}", "prompt")
        if len(ids) >= context:
            raise TooLong(f"that is {len(ids)} tokens long and the context of this model holds {context}; take a shorter text")
        return ids, 0
    return prompt


# the answers
async def answer(asked, job):
    """Have a job written -> the response, whole or as a stream."""
    options = asked.get("stream_options") or {}
    if asked.get("stream") not in (None, True, False) or not isinstance(options, dict):
        raise Wrong(400, "stream must be true or false, stream_options an object", "stream")
    writer.submit(job)
    response = None
    try:
        head = await job.events.get()
        if isinstance(head, Wrong):
            raise head
        about = dict(id=f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}", created=int(time.time()), model=head["model"],
                     object="chat.completion" if job.chat else "text_completion")
        if head["dropped"]:
            about["dropped_turns"] = head["dropped"]
        if asked.get("stream"):
            response = Stream(job, stream(job, about, head, options.get("include_usage") is True))
            return response
        return await whole(job, about, head)
    finally:
        job.gone = response is None                            # over, gone wrong, or cancelled as the client is gone


class Stream(StreamingResponse):
    """What is sent bit by bit; at its end, whichever, nobody waits any more."""

    def __init__(self, job, content):
        super().__init__(content, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.gone = True


async def pieces(job):
    """The Pieces of all replies of a job, as they come; raises Wrong."""
    while job.open or not job.events.empty():
        piece = await job.events.get()
        if isinstance(piece, Wrong):
            raise piece
        yield piece


def usage(head, tokens):
    return dict(prompt_tokens=head["prompt_tokens"], completion_tokens=tokens, total_tokens=head["prompt_tokens"] + tokens)


def logprobs(job, entries, offset=0):
    """The tokens of a reply, or of a chunk of it, as the API wants to have them; None where they were not asked for."""
    if job.top < 0:
        return None
    if job.chat:
        return {"content": entries}
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {"tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets}


async def whole(job, about, head):
    """All of an answer in one piece."""
    texts, entries = [[] for _ in range(job.n)], [[] for _ in range(job.n)]
    finish, tokens = [""] * job.n, 0
    async for piece in pieces(job):
        texts[piece.index] += [(kind, text) for kind, text in piece.texts if text]
        entries[piece.index] += [piece.entry] if piece.entry else []
        tokens, finish[piece.index] = tokens + piece.tokens, piece.finish
    choices = []
    for index in range(job.n):
        content = {"text": "".join(text for _, text in texts[index])}
        if job.chat:
            content = {"message": {"role": "assistant", "content": joined(texts[index])}}
        choices.append(dict(index=index, **content, logprobs=logprobs(job, entries[index]), finish_reason=finish[index]))
    return about | dict(choices=choices, usage=usage(head, tokens))


def joined(texts):
    """The content of a message: its text, or its parts where the calculator was called."""
    if all(kind == "text" for kind, _ in texts):
        return "".join(text for _, text in texts)
    parts = []
    for kind, text in texts:
        if not parts or parts[-1]["type"] != kind:
            parts.append({"type": kind, "text": ""})
        parts[-1]["text"] += text
    return parts


async def stream(job, about, head, with_usage):
    """An answer bit by bit, as server-sent events."""
    about |= dict(object="chat.completion.chunk") if job.chat else {}
    about |= dict(usage=None) if with_usage else {}
    tokens, lengths = 0, [0] * job.n

    def event(index, content, finish=None, entries=()):
        choice = dict(index=index, **content, logprobs=logprobs(job, entries, lengths[index]) if entries else None,
                      finish_reason=finish)
        return f"data: {json.dumps(about | dict(choices=[choice]))}\n\n"

    def content_of(kind, text):
        if not job.chat:
            return {"text": text}
        return {"delta": {"content": text, "type": kind} if job.parts else {"content": text}}

    try:
        for index in range(job.n) if job.chat else ():
            yield event(index, {"delta": {"role": "assistant", "content": ""}})
        about.pop("dropped_turns", None)                       # said once
        async for piece in pieces(job):
            tokens += piece.tokens
            entries = [piece.entry] if piece.entry else []
            texts = [(kind, text) for kind, text in piece.texts if text] or [(piece.texts[0][0], "") for _ in entries]
            for kind, text in texts:
                yield event(piece.index, content_of(kind, text), None, entries)
                lengths[piece.index] += sum(len(entry["token"]) for entry in entries)
                entries = []
            if piece.finish:
                yield event(piece.index, {"delta": {}} if job.chat else {"text": ""}, piece.finish)
        if with_usage:
            yield f"data: {json.dumps(about | dict(choices=[], usage=usage(head, tokens)))}\n\n"
        yield "data: [DONE]\n\n"
    except Wrong as wrong:                                     # it has begun, so it can't be a status any more
        yield f"data: {json.dumps(wrong.content())}\n\n"


# the routes
app, writer = new_app(), Writer()


@app.get("/health")
async def health():
    busy = writer.busy()
    return dict(status="ok", slots=slots, busy=busy, waiting=writer.open - busy)


@app.get("/v1/models")
def list_models():
    return {"object": "list", "data": models()}


@app.get("/v1/models/{name:path}")
def one_model(name: str):
    return model_named(name)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    asked = json_object(await request.body())
    if asked.get("logprobs") not in (None, True, False):
        raise Wrong(400, "logprobs: must be true or false; top_logprobs says how many", "logprobs")
    top = number(asked, "top_logprobs", 0, 0, 20, whole=True)
    return await answer(asked, job_of(asked, True, chat_prompt(asked), top if asked.get("logprobs") else -1))


@app.post("/v1/completions")
async def completions(request: Request):
    asked = json_object(await request.body())
    top = number(asked, "logprobs", -1, 0, 20, whole=True)
    return await answer(asked, job_of(asked | dict(parts=False), False, text_prompt(asked), top))


def folder_of(stage, tag):
    """Where a run is; raises Wrong for what can be none."""
    try:
        return stage_folder(stage, tag)
    except SystemExit as error:
        raise Wrong(404, str(error)) from None


@app.get("/training")
def training():
    return {"runs": live.runs()}


@app.get("/training/{stage}/{tag}")
def training_rows(stage: str, tag: str, after: str = ""):
    folder = folder_of(stage, tag)
    try:
        return live.rows_after(stage, tag, after)
    except FileNotFoundError:
        raise Wrong(404, f"{folder}: nothing was trained there") from None


@app.get("/training/{stage}/{tag}/report")
def training_report(stage: str, tag: str):
    folder_of(stage, tag)
    try:
        with open(base_path("report", f"{tag}.md"), encoding="utf-8", errors="replace") as f:
            return {"markdown": f.read()}
    except FileNotFoundError:
        raise Wrong(404, f"no report card of {tag} yet; python report.py --model_tag={tag} makes one") from None


@app.get("/training/{stage}/{tag}/curves.png")
def training_curves(stage: str, tag: str):
    folder_of(stage, tag)
    path = base_path("report", tag, "curves.png")
    if not os.path.isfile(path):
        raise Wrong(404, f"no picture of {tag} yet; python report.py --model_tag={tag} draws one")
    return FileResponse(path)


@app.get("/")
def page():
    with open(os.path.join(ROOT, "ui.html"), encoding="utf-8") as f:
        html = f.read()
    return HTMLResponse(html, headers=page_headers(html))


listener = listen(host, port)
names = [info["id"] for info in models() if info["default"]]
print(f"{names[0] if names else 'no model yet, but the training can be watched'}: open http://"
      f"{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends)", flush=True)
stop.finish_steps("the replies that are being written")


async def main():
    writer.loop = asyncio.get_running_loop()
    writer.start()
    await serve(Guard(app, host, api_key, cors), listener, lambda: writer.open)
    writer.inbox.put(None)


asyncio.run(main())
raise SystemExit(128 + stop.asked)
