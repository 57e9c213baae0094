"""
The models that are talked to, in one thread, for any number of people who ask at once.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/, at every request: a model that is being trained can be talked to
in      Jobs, from an event loop
out     for each reply of a job, token by token, Deltas, on the job's queue in that loop

The thread reads the prompt, which may mean to load a model first, and writes the replies of all jobs side by side, in a
Batch for each model. Jobs are begun in the order in which they come.
"""
import asyncio
import os
import queue
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from chat import StopStrings, TextStream, TooLong
from checkpoint import FOLDERS, find_checkpoint, load_model, path_of, read_meta, sha_of, stage_folder, tags_of
from engine import Batch, Reply, seed_of
from plumbing import stop
from plumbing.budget import num_params
from plumbing.configurator import shown
from plumbing.machine import is_out_of_memory, start
from plumbing.web import Wrong

KEPT = 2                     # models in memory at a time: the page asks two the same question
WAITING = 4                  # replies for each slot that may wait for one; then the server says that it is full
PIECE = 256                  # tokens of a prompt that are read between two tokens of the replies that are being written


def models(source="", model_tag=""):
    """What the API tells of each model, as dicts. The default is the newest of the furthest stage, or of what the knobs name."""
    found = [info for stage in FOLDERS for tag in tags_of(stage) if (info := model_info(stage, tag))]
    wanted = [info for info in found if source in ("", info["stage"]) and model_tag in ("", info["tag"])]
    # a folder that was copied or renamed is in nobody's way
    default = max(wanted, default=None, key=lambda info: (
        list(FOLDERS).index(info["stage"]), not info["copied"], info["created"]))
    return [info | dict(default=info is default) for info in found]


def model_info(stage, tag):
    """A model's part of models(); {} where it is damaged, or just being removed."""
    folder = stage_folder(stage, tag)
    meta = read_meta(folder)
    try:
        shape = SimpleNamespace(**meta["model_config"])
        return dict(id=f"{stage}/{tag}", object="model", owned_by="nanochat", stage=stage, tag=tag, step=meta["step"],
                    copied=meta.get("tag", tag) != tag,
                    created=int(os.path.getmtime(path_of(folder, "meta", meta["step"]))),
                    context=shape.sequence_len, parameters=num_params(shape)["total"], chats=stage != "base")
    except (KeyError, FileNotFoundError):
        return {}


def model_named(name, there):
    """The one of models() that has a name, "" = the default; raises Wrong where none has."""
    for info in there:
        if name == info["id"] or not name and info["default"]:
            return info
    message = "what this server was started for is not there yet"
    if name:
        message = f"model={shown(name)}: there is none of that name"
    message += f"; there are: {', '.join(info['id'] for info in there)}"
    if not there:
        message = "there is no model yet: bash run_realistic.sh trains one"
    raise Wrong(404, message, "model", "model_not_found")


@dataclass(eq=False)
class Job:
    """What one request asks for, and where its answer goes."""
    model: str                 # "sft/d12"; "" = the default
    chat: bool                 # False = a text is gone on with
    prompt: object             # function of a Model and max_tokens -> (ids, turns left out); raises Wrong, ValueError
    n: int                     # replies
    max_tokens: int            # of each
    seed: int
    stops: list                # strings that end a reply
    parts: bool                # whether a call of the calculator and its result are told from text
    top: int                   # likeliest tokens to tell of beside each token; -1 = and nothing of the token itself
    options: dict              # of Reply
    events: asyncio.Queue = field(default_factory=asyncio.Queue)     # a Head, then Deltas; a Wrong ends it
    open: int = 0              # replies that have not ended; counted in the event loop
    gone: bool = False         # nobody waits for it any more: its replies end within a token


@dataclass
class Head:
    """What is known of an answer before its first token."""
    model: str
    prompt_tokens: int
    dropped_turns: int         # the oldest ones, left out because the context is full


@dataclass
class Delta:
    """What a token adds to a reply."""
    index: int                 # of the reply
    texts: list = field(default_factory=list)                  # (kind, text), mostly one
    tokens: int = 0            # 0 for the token that ends a reply, which is not counted
    entry: dict | None = None  # the token, its log-probability, and the likeliest ones
    finish: str = ""           # "stop", "length" or "gone" where it is the last


class Writing:
    """A reply while it is written: tokens in, Deltas out."""

    def __init__(self, job, index, reply):
        self.job, self.index, self.reply, self.tokenizer = job, index, reply, reply.tokenizer
        self.text, self.stops = TextStream(reply.tokenizer, brackets=not job.parts), StopStrings(job.stops)
        self.kind = "text"     # of what was shown last

    def feed(self, token, drawn):
        """The Delta that a token makes."""
        ends = drawn and token in (self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>"))
        delta = Delta(self.index, tokens=int(not ends))
        if not ends:
            self.show(self.text.feed(token), delta)
            delta.entry = self.entry(token, drawn) if self.job.top >= 0 else None
        if self.reply.left == 0:
            self.show(self.text.flush(), delta)
            delta.texts.append((self.kind, self.stops.flush()))
            delta.finish = "stop" if ends else "length"
        if self.stops.found:
            delta.finish = "stop"
        return delta

    def show(self, text, delta):
        """Add text to a delta, up to a stop string. What may be the beginning of one waits, in text of one kind."""
        kind = self.text.kind if self.job.parts else "text"
        if kind != self.kind and not self.stops.found:
            delta.texts.append((self.kind, self.stops.flush()))
            self.kind, self.stops = kind, StopStrings(self.job.stops)
        delta.texts.append((kind, self.stops.feed(text)))

    def entry(self, token, drawn):
        if not drawn:                                          # the calculator's, and no matter of probability
            return self.named(token, 0.0) | dict(top_logprobs=[], forced=True)
        logprob, likeliest = self.reply.noted
        return self.named(token, logprob) | dict(top_logprobs=[self.named(*pair) for pair in likeliest[:self.job.top]])

    def named(self, token, logprob):
        data = self.tokenizer.decode_bytes([token])
        return dict(token=data.decode(errors="replace"), logprob=max(-9999.0, logprob),          # JSON has no infinity
                    bytes=list(data) if token < len(self.tokenizer.ranks) else None)


class Model:
    """A model in memory and the replies that it is writing."""

    def __init__(self, name, slots, device, dtype):
        folder, meta = find_checkpoint(*name.split("/", 1))
        self.name, self.sha, self.used = name, "", 0.0         # sha: of the newest weights when it was loaded
        model, self.tokenizer = load_model(folder, meta, start(device, dtype, meta))
        self.context, self.writing = model.config.sequence_len, {}
        self.batch = Batch(model, slots, self.context, PIECE)  # which alone keeps the weights, in the type they are multiplied in

    def begin(self, job):
        """Put the replies of a job into the batch -> Head; raises Wrong or ValueError where the prompt won't do."""
        ids, dropped = job.prompt(self, job.max_tokens)
        for index in range(job.n):
            reply = Reply(self.tokenizer, ids, job.max_tokens, seed=seed_of(job.seed, index), **job.options)
            self.writing[reply] = Writing(job, index, reply)
            self.batch.add(reply)
        return Head(self.name, len(ids), dropped)

    def let_go(self):
        """End the replies that nobody waits for -> list of (job, Delta)."""
        gone = [reply for reply, writing in self.writing.items() if writing.job.gone]
        return [(writing.job, Delta(writing.index, finish="gone")) for writing in map(self.end, gone)]

    def step(self):
        """The next token of every reply -> list of (job, Delta)."""
        deltas = []
        for reply, token, drawn in self.batch.step():
            writing = self.writing[reply]
            delta = writing.feed(token, drawn)
            deltas.append((writing.job, delta))
            if delta.finish:
                self.end(reply)
        return deltas

    def end(self, reply):
        self.batch.remove(reply)
        return self.writing.pop(reply)


class Writer(threading.Thread):
    """
    The thread that has the models; for its arguments see the knobs of chat_web.py.

    loop  the event loop, to be set before start()
    open  replies asked for that have not ended
    """

    def __init__(self, slots, device="", dtype="", source="", model_tag=""):
        super().__init__(daemon=True)
        self.slots, self.numerics, self.default, self.open = slots, (device, dtype), (source, model_tag), 0
        self.inbox, self.queue, self.models = queue.SimpleQueue(), deque(), []

    # in the event loop
    def submit(self, job):
        """Take a job on; raises Wrong where that would be too many, or the server is about to end."""
        if stop.asked:
            raise Wrong(503, "the server is about to end", headers={"Retry-After": "30"})
        if self.open + job.n > self.slots * (1 + WAITING):
            raise Wrong(503, f"{self.open} replies are being written or wait for it: no more are taken for some seconds",
                        headers={"Retry-After": "5"})
        job.open = job.n
        self.open += job.n
        self.inbox.put(job)

    def deliver(self, events):
        """Put what the thread has to tell on the queues of those who wait for it."""
        for job, event in events:
            ended = job.open if isinstance(event, Wrong) else int(isinstance(event, Delta) and event.finish != "")
            job.open, self.open = job.open - ended, self.open - ended
            job.events.put_nowait(event)

    def busy(self):
        """How many replies have a slot; the others of `open` wait."""
        return min(self.open, sum(len(model.batch.rows) + len(model.batch.reading) for model in list(self.models)))

    async def end(self):
        """Leave off, whatever is under way."""
        self.inbox.put(None)
        await asyncio.to_thread(self.join, 10)

    # in the thread
    def run(self):
        while self.take_in():
            self.write()

    def write(self):
        """A token of every reply."""
        for model in [model for model in self.models if model.writing]:
            self.tell(model.let_go())
            try:
                self.tell(model.step())
            except Exception as error:                         # its cache is half written: it is loaded anew when asked for
                self.models.remove(model)
                jobs = {writing.job for writing in model.writing.values()}
                self.tell([(job, wrong_of(error, job)) for job in jobs])

    def tell(self, events):
        if events:
            self.loop.call_soon_threadsafe(self.deliver, events)

    def take_in(self):
        """Begin the jobs that have come; wait for one where there is nothing to do -> False at the end."""
        while not self.inbox.empty() or not (self.queue or any(model.writing for model in self.models)):
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
                    break
                self.tell([(job, model.begin(job))])
            except (Exception, SystemExit) as error:
                self.tell([(job, wrong_of(error, job))])
            self.queue.popleft()
        return True

    def model_for(self, name):
        """The Model of a name, loaded where it is not or was trained further; None while all in memory are at work."""
        name = model_named(name, models(*self.default))["id"]
        sha = sha_of(read_meta(stage_folder(*name.split("/", 1))))
        model = next((model for model in self.models if (model.name, model.sha) == (name, sha)), None)
        if model is None:
            idle = [model for model in self.models if not model.writing]
            idle.sort(key=lambda model: (model.name == name, -model.used))       # the last one goes first
            while len(self.models) >= KEPT:
                if not idle:
                    return None
                self.models.remove(idle.pop())
            try:
                model = Model(name, self.slots, *self.numerics)
            except torch.OutOfMemoryError:                     # who asks again finds more
                self.models = [model for model in self.models if model.writing]
                raise
            self.models.append(model)
        model.sha, model.used = sha, time.monotonic()
        return model


def wrong_of(error, job):
    """What the client is told of an error; one that nobody has thought of is printed."""
    if isinstance(error, Wrong):
        return error
    if isinstance(error, ValueError):
        return Wrong(400, str(error), "messages" if job.chat else "prompt",
                     "context_length_exceeded" if isinstance(error, TooLong) else None)
    if is_out_of_memory(error):
        return Wrong(503, "out of memory: another program may be using it, and fewer --slots= need less",
                     headers={"Retry-After": "30"})
    if isinstance(error, SystemExit):                          # of the loader: one line
        return Wrong(500, str(error))
    traceback.print_exception(error)
    return Wrong(500, f"the model can't be run: {type(error).__name__}: {str(error)[:200]}")
