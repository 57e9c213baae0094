"""
Talk to the models: a page in the browser, and OpenAI's API for other programs. The page shows a training run as well.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/, report/, ui.html
writes  nothing: a chat is kept in the browser it was had in, and nowhere else
run     python chat_web.py                        then open http://127.0.0.1:8000
        curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
             -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

From a request to its answer: a route below checks what is asked and makes a Job of it, the Writer of serving.py writes
the replies, and whole() or stream() puts them into the API's words.
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
packages.require("fastapi", "uvicorn")
import asyncio
import gc
import json
import os
import random
import time
import uuid

from fastapi import Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse

from chat import TooLong, content_of, prompt_of
from checkpoint import stage_folder
from evals import live
from plumbing import stop
from plumbing.common import ROOT, base_path
from plumbing.configurator import configure, shown
from plumbing.machine import start
from plumbing.web import Guard, Wrong, is_loopback, json_object, listen, new_app, page_headers, serve
from serving import Job, Writer, model_named, models

source = ""                    # -i: whose model answers where none is named: base, mid, sft, rl; "" = the furthest there is
model_tag = ""                 # which of the stage's models that is, like d12; "" = the newest
host = "127.0.0.1"             # address to listen at; 0.0.0.0 = all that this computer has, for others in its network
port = 8000                    # TCP port
api_key = ""                   # what requests must bring, needed where others can reach the server; "" = nothing
cors = ""                      # an origin, like https://example.org, whose pages may use the API; "" = only our own page
slots = 8                      # replies of a model that are written side by side
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
config = configure(globals(), show=False)

TOKENS = (1, 10**9)            # of a reply; it ends with the context at the latest
MOST_CHARS = 200               # of a stop string
ROLES = ("system", "developer", "user", "assistant")           # developer is the API's newer word for system

if source or model_tag:
    stage_folder(source or "base", model_tag or "any")         # what can be no stage and no tag ends here
if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
    raise SystemExit("api_key: must be of letters, digits and signs that a header can carry: printable ASCII, no spaces")
if not is_loopback(host) and not api_key:
    raise SystemExit(f"host={host}: others could use the server there; choose an --api_key=, which their requests then need")
if device:
    start(device, dtype)                                       # without: the GPU is taken when there is something to write
app, writer = new_app(), Writer(slots, device, dtype, source, model_tag)


# what is asked
def number(asked, name, default, low, high, kind=int):
    """A number of a request, None counting as left out; raises Wrong where it is none, or not from low to high."""
    value = asked.get(name)
    if value is None:
        return default
    if type(value) not in (int, kind) or not low <= value <= high:
        whole = "whole " if kind is int else ""
        raise Wrong(400, f"{name}={shown(value)}: must be a {whole}number from {low:,} to {high:,}", name)
    return value


def job_of(asked, chat, prompt, top):
    """The Job that a request makes; raises Wrong."""
    name, stops, stream_options = (default if asked.get(key) is None else asked[key] for key, default in
                                   (("model", ""), ("stop", []), ("stream_options", {})))
    if not isinstance(name, str):
        raise Wrong(400, f"model={shown(name)}: must be a name, like sft/d12", "model")
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and len(s) <= MOST_CHARS for s in stops):
        raise Wrong(400, f"stop={shown(stops)}: must be one to four strings of at most {MOST_CHARS} characters", "stop")
    if asked.get("stream") not in (None, True, False) or not isinstance(stream_options, dict):
        raise Wrong(400, "stream: must be true or false, and stream_options an object", "stream")
    options = dict(temperature=number(asked, "temperature", 0.6, 0, 100, float), top_k=number(asked, "top_k", 50, 0, 10**9),
                   top_p=max(1e-9, number(asked, "top_p", 1.0, 0, 1, float)), likeliest=max(top, 1) if top >= 0 else 0)
    return Job(name, chat, prompt, options=options, n=number(asked, "n", 1, 1, slots), stops=stops, top=top,
               max_tokens=number(asked, "max_completion_tokens", None, *TOKENS) or number(asked, "max_tokens", 256, *TOKENS),
               seed=number(asked, "seed", random.SystemRandom().getrandbits(32), -2**63, 2**63 - 1),
               parts=chat and asked.get("parts") is True)


def chat_prompt(messages):
    """What makes a prompt of messages once the model is known; raises Wrong."""
    if not isinstance(messages, list) or not messages:
        raise Wrong(400, 'messages: must be a list, like [{"role": "user", "content": "Hello"}]', "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Wrong(400, f"messages[{i}]: must have a role, one of {', '.join(ROLES)}, and a content", "messages")
    messages = [message | dict(role="system") if message["role"] == "developer" else message for message in messages]

    def prompt(model, max_tokens):
        if model.name.startswith("base/"):
            raise Wrong(400, f"{model.name} goes on with a text and knows no chat: ask it at /v1/completions", "model")
        return prompt_of(model.tokenizer, messages, model.context, max_tokens)
    return prompt


def text_prompt(text):
    """The same for a text, or its tokens, that a model is to go on with."""
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], str):
        text = text[0]
    tokens = isinstance(text, list) and text and all(type(token) is int for token in text)
    if not tokens and not isinstance(text, str):
        raise Wrong(400, f"prompt={shown(text)}: must be a text, a list with one, or a list of tokens", "prompt")

    def prompt(model, max_tokens):
        ids = text if tokens else [model.tokenizer.bos, *model.tokenizer.encode(text)]
        if not all(0 <= token < model.tokenizer.vocab_size for token in ids):
            raise Wrong(400, f"prompt: a token must be from 0 to {model.tokenizer.vocab_size - 1:,}", "prompt")
        if len(ids) >= model.context:
            raise TooLong(f"that is {len(ids)} tokens long and the context of this model holds {model.context}; take less")
        return ids, 0
    return prompt


# what is answered
async def answer(asked, job):
    """Have a job written -> the response, whole or bit by bit."""
    writer.submit(job)
    response = None
    try:
        head = await job.events.get()
        if isinstance(head, Wrong):
            raise head
        about = dict(id=f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}", created=int(time.time()),
                     model=head.model, object="chat.completion" if job.chat else "text_completion")
        if head.dropped_turns:
            about["dropped_turns"] = head.dropped_turns
        if asked.get("stream"):
            with_usage = (asked.get("stream_options") or {}).get("include_usage") is True
            response = Stream(stream(job, head, about, with_usage), job)
            return response
        return await whole(job, head, about)
    finally:
        job.gone = response is None                            # it is over, or wrong, or cancelled as the client is gone


class Stream(StreamingResponse):
    """Server-sent events; when they end, however they do, nobody waits any more."""
    media_type = "text/event-stream"

    def __init__(self, content, job):
        super().__init__(content)
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.gone = True


async def deltas(job):
    """The Deltas of a job, in lists of what has come at a time; raises Wrong."""
    while job.open or not job.events.empty():
        come = [await job.events.get()]
        while not job.events.empty():
            come.append(job.events.get_nowait())
        if isinstance(come[-1], Wrong):
            raise come[-1]
        yield come


def usage(head, tokens):
    return dict(prompt_tokens=head.prompt_tokens, completion_tokens=tokens, total_tokens=head.prompt_tokens + tokens)


def logprobs(job, entries, offset=0):
    """Tokens and their probabilities as the API has them, None where not asked for; offset: characters before the first."""
    if job.top < 0:
        return None
    if job.chat:
        return {"content": entries}
    lengths = [len(entry["token"]) for entry in entries]
    return {"tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": [offset + sum(lengths[:i]) for i in range(len(lengths))]}


async def whole(job, head, about):
    """All replies of a job at once."""
    texts, entries, finish, tokens = [[] for _ in range(job.n)], [[] for _ in range(job.n)], [""] * job.n, 0
    async for come in deltas(job):
        for delta in come:
            texts[delta.index] += delta.texts
            entries[delta.index] += [delta.entry] if delta.entry else []
            tokens, finish[delta.index] = tokens + delta.tokens, delta.finish
    choices = []
    for i in range(job.n):
        content = content_of(texts[i])
        said = {"message": dict(role="assistant", content=content)} if job.chat else {"text": content}
        choices.append(dict(index=i, **said, logprobs=logprobs(job, entries[i]), finish_reason=finish[i]))
    return JSONResponse(about | dict(choices=choices, usage=usage(head, tokens)))


async def stream(job, head, about, with_usage):
    """The replies of a job as server-sent events, a chunk for a token."""
    about |= dict(object="chat.completion.chunk") if job.chat else {}
    about |= dict(usage=None) if with_usage else {}
    tokens, lengths = 0, [0] * job.n                           # lengths: characters of each reply so far

    def event(**content):
        return f"data: {json.dumps(about | content)}\n\n"

    def chunk(i, delta, text="", entries=(), finish=None):
        content = dict(delta=delta) if job.chat else dict(text=text)
        told = logprobs(job, entries, lengths[i]) if entries else None
        lengths[i] += sum(len(entry["token"]) for entry in entries)
        return event(choices=[dict(index=i, **content, logprobs=told, finish_reason=finish)])

    def chunks(delta):
        entries = [delta.entry] if delta.entry else []
        for kind, text in delta.texts:
            if text or entries:
                yield chunk(delta.index, dict(content=text, type=kind) if job.parts else dict(content=text), text, entries)
                entries = []
        if delta.finish:
            yield chunk(delta.index, {}, finish=delta.finish)

    try:
        for i in range(job.n if job.chat else 0):
            yield chunk(i, dict(role="assistant", content=""))
        about.pop("dropped_turns", None)                       # said once
        async for come in deltas(job):
            yield "".join(chunk for delta in come for chunk in chunks(delta))
            tokens += sum(delta.tokens for delta in come)
        if with_usage:
            yield event(choices=[], usage=usage(head, tokens))
        yield "data: [DONE]\n\n"
    except Wrong as wrong:                                     # too late for a status
        yield f"data: {json.dumps(wrong.content())}\n\n"


# the routes of the API
@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    asked = json_object(await request.body())
    if asked.get("logprobs") not in (None, True, False):
        raise Wrong(400, "logprobs: must be true or false; how many is top_logprobs", "logprobs")
    top = number(asked, "top_logprobs", 0, 0, 20)
    return await answer(asked, job_of(asked, True, chat_prompt(asked.get("messages")), top if asked.get("logprobs") else -1))


@app.post("/v1/completions")
async def completions(request: Request):
    asked = json_object(await request.body())
    if asked.get("echo"):
        raise Wrong(400, "echo: the prompt is not given back here", "echo")
    return await answer(asked, job_of(asked, False, text_prompt(asked.get("prompt")), number(asked, "logprobs", -1, 0, 20)))


@app.get("/v1/models")
def list_models():
    return dict(object="list", data=models(source, model_tag))


@app.get("/v1/models/{name:path}")
def one_model(name: str):
    return model_named(name, models(source, model_tag)) if name else list_models()


@app.api_route("/health", methods=["GET", "HEAD"])
async def health():
    busy = writer.busy()
    return dict(status="ok", slots_per_model=slots, busy=busy, waiting=writer.open - busy)


# and of the page
@app.get("/")
def page():
    with open(os.path.join(ROOT, "ui.html"), encoding="utf-8") as f:
        html = f.read()
    return HTMLResponse(html, headers=page_headers(html))


@app.get("/training")
def training():
    return dict(runs=live.runs())


@app.get("/training/{stage}/{tag}")
def training_rows(stage: str, tag: str, after: str = ""):
    return found(stage, tag, "log", lambda folder: JSONResponse(live.rows_after(folder, after)))


@app.get("/training/{stage}/{tag}/report")
def training_report(stage: str, tag: str):
    def read(_):
        with open(base_path("report", f"{tag}.md"), encoding="utf-8", errors="replace") as f:
            return dict(markdown=f.read())
    return found(stage, tag, "report card", read)


@app.get("/training/{stage}/{tag}/curves.png")
def training_curves(stage: str, tag: str):
    path = base_path("report", tag, "curves.png")
    return found(stage, tag, "picture", lambda _: os.stat(path) and FileResponse(path))


def found(stage, tag, what, read):
    """read(folder of a run); raises Wrong where there is no such run, or no such file of it."""
    try:
        return read(stage_folder(stage, tag))
    except SystemExit as error:
        raise Wrong(404, str(error)) from None
    except OSError:                                            # or its name is too long for one
        raise Wrong(404, f"{stage}/{tag}: there is no {what} of it (yet)") from None


listener = listen(host, port)
there = models(source, model_tag)
default = [info["id"] for info in there if info["default"]]
if default:
    answering = default[0]
else:
    wanted = "/".join(filter(None, (source, model_tag))) or "model"
    answering = f"no {wanted} yet, but its training can be watched"
    if there:
        answering += f"; there are {', '.join(info['id'] for info in there)}"
address = f"[{host}]" if ":" in host else host
print(f"{answering}: open http://{address}:{port} (Ctrl-C ends)", flush=True)
gc.freeze()                    # the packages are no garbage: to look through them would stop everybody for a quarter of a second
stop.finish_steps("the replies that are being written")
asyncio.run(serve(Guard(app, host, api_key, cors), listener, writer))
raise SystemExit(128 + stop.asked)
