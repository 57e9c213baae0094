"""
Talk to a model in the terminal, from any stage.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/
writes  chat_history, for the arrow keys, and what /save names; the answer goes to stdout, remarks in (parentheses) to stderr
run     python chat_cli.py -p "Why is the sky blue?"      just the answer
        python chat_cli.py -i base                        a conversation, until quit or Ctrl-D; /help lists the commands
        python chat_cli.py < questions.txt                each line is a question that stands for itself

A base model knows no questions and answers: it goes on with the text it is given.
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import atexit
import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys

from chat import TextStream, printable, prompt_of, reply_parts
from checkpoint import FOLDERS, find_checkpoint, load_model, tags_of
from engine import Engine
from plumbing import stop
from plumbing.common import atomic_write, base_path
from plumbing.configurator import configure
from plumbing.machine import start

prompt = ""                    # -p: ask this, print the answer and end; "" = a conversation
source = "sft"                 # -i: whose model: base, mid, sft, rl; "" = the furthest there is
model_tag = ""                 # which of the stage's models, like d12; "" = the only one
step = 0                       # training step of the checkpoint; 0 = the newest
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
temperature = 0.6              # 0 = always the likeliest token, 1 = as trained, more = wilder
top_k = 50                     # draw among so many of the likeliest tokens; 0 = among all
max_tokens = 256               # longest answer, in tokens
seed = 42                      # the same seed gives the same answers; 0 = others every time
config = configure(globals(), show=False)  # the screen belongs to the conversation

HELP = """/retry         the last question again
/clear         a new conversation
/system TEXT   what stands before it
/temperature X 0 = no chance, 1 = wild
/save FILE     the conversation as JSON
//...          a text that begins with /
Ctrl-C         stops an answer
/quit, Ctrl-D  leaves, as Ctrl-C twice"""

if prompt and not prompt.strip():
    raise SystemExit("prompt: there is nothing in it to answer; leave it out for a conversation")


def note(text):
    """A remark of the program's own, kept apart from the model's words."""
    print(f"({text})", file=sys.stderr, flush=True)


def answer(earlier, text, warmth, answer_seed):
    """
    Print the answer to a text as it is written -> (question and answer as messages, did Ctrl-C stop it).

    There are no messages of a base model, and none where Ctrl-C came before the answer began.
    raises ValueError, one line, when the text does not fit the context
    """
    question, reply, stream, stopped = {"role": "user", "content": text}, [], TextStream(tokenizer), False
    try:
        with stop.ctrl_c_is_mine(terminal):
            prompt_ids, left_out = ([tokenizer.bos, *tokenizer.encode(text)], 0) if stage == "base" else \
                prompt_of(tokenizer, [*earlier, question], context, max_tokens)
            if left_out:
                note(f"the context of {context} tokens is full: left out of our turns, from the oldest on: {left_out}")
            for (token,), _ in engine.generate([prompt_ids], max_tokens, warmth, top_k, answer_seed):
                if stage == "base" and not reply:      # shown before its continuation, so that both are one text
                    print(printable(text), end="")
                reply.append(token)
                print(printable(stream.feed(token)), end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(printable(stream.flush()), flush=True)
    if stopped:
        note("stopped; once more leaves")
    elif reply[-1] not in engine.ends:
        note(f"cut short: the context of {context} tokens is full" if len(reply) < max_tokens
             else f"cut short by max_tokens={max_tokens}")
    said = reply_parts(tokenizer, [token for token in reply if token not in engine.ends])
    return [question, {"role": "assistant", "content": said}] if reply and stage != "base" else [], stopped


def keep_history(path):
    """At the end: what was typed, the newest 1,000 lines, for the arrow keys of the next conversation."""
    with contextlib.suppress(OSError):                 # a disk that is full is no matter here
        readline.write_history_file(path)
        os.chmod(path, 0o600)


sys.stdin = sys.stdin or open(os.devnull)              # None: closed by who has started this
for stream in (sys.stdin, sys.stdout):                 # bytes or letters that do not fit: no crash
    with contextlib.suppress(AttributeError):
        stream.reconfigure(errors="replace")
there = [name for name in FOLDERS if model_tag in tags_of(name) or not model_tag and tags_of(name)]
stage = source or (there[-1] if there else "")
if not stage:
    raise SystemExit(f"{base_path()}: no checkpoint of any stage here; run: bash run_realistic.sh")
folder, meta = find_checkpoint(stage, model_tag, step)
machine = start(device, dtype, meta)
model, tokenizer = load_model(folder, meta, machine)
engine, context = Engine(model, tokenizer), model.config.sequence_len
seeds = itertools.count(seed or random.SystemRandom().getrandbits(32))     # asked again, a question is drawn anew
terminal, readline = sys.stdin.isatty() and not prompt, None
on_screen = terminal and sys.stdout.isatty()
if not (prompt and source):                            # else the answer alone: who asks knows whom
    note(f"{stage} model {folder}, step {meta['step']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
         f"context {context} tokens, on {machine.name}")

if prompt:
    try:
        answer([], prompt.strip(), temperature, next(seeds))
    except ValueError as error:
        raise SystemExit(f"prompt: {error}") from None
    raise SystemExit(int(stop.lost))
if terminal:
    with contextlib.suppress(ImportError, OSError):    # arrow keys and what was typed before, where there are any
        import readline
        readline.set_history_length(1000)
        atexit.register(keep_history, base_path("chat_history"))
        readline.read_history_file(base_path("chat_history"))
    note("/help lists the commands, quit or Ctrl-D ends, Ctrl-C stops an answer")

# read, answer, remember, until the end of the input; in a file of questions each line stands for itself
system, turns, before = [], [], []                     # messages; before the last question there were those in `before`
question, warmth, stopped = "", temperature, False     # the last one, the temperature now, whether Ctrl-C came last
longest = max(4096, context * max(map(len, tokenizer.ranks)))      # characters that could fit into the context, or name a file
while True:
    try:
        with stop.ctrl_c_is_mine(terminal):
            if terminal and not on_screen:             # into a file or a pipe goes only what the model says
                print("> ", end="", file=sys.stderr, flush=True)
            text, stopped = input("> " if on_screen else "").strip(), False
    except EOFError:
        print(end="\n" if terminal else "", file=sys.stderr)      # the shell goes on in a line of its own
        break
    except KeyboardInterrupt:                          # it empties the line; with nothing in it, a second one leaves
        if stopped and not (readline and readline.get_line_buffer()):
            stop.told(signal.SIGINT, None)
        stopped = True
        note("once more, quit or Ctrl-D ends")
        continue
    # a word after a slash is a command, unlike "/usr/bin is what?"; these three are without one, too
    command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?|(quit|exit|clear)", text, re.DOTALL | re.IGNORECASE)
    try:
        if len(text) > longest:                        # not even counted: that could take minutes
            raise ValueError(f"{len(text):,} characters are too many for a context of {context} tokens; say it shorter")
        match ((command[1] or command[3]).lower(), command[2] or "") if command else ("", text):
            case "", "":
                pass
            case "quit" | "exit", "":
                break
            case "help", "":
                note(HELP)
            case "clear", "":
                system, turns, before = [], [], []
                note("a new conversation")
            case "system" | "save", _ if stage == "base":
                raise ValueError("a base model goes on with a text: there is no conversation")
            case "system", words:
                if words:
                    new = {"role": "system", "content": words}         # tried out, as it may be too long
                    prompt_of(tokenizer, [new, {"role": "user", "content": ""}], context, max_tokens)
                    system = [new]
                note(f"system: {printable(system[0]['content'])}" if system else "there is no system message")
            case "temperature", number:
                if number:
                    warmth = configure(dict(config, __file__=__file__), [f"--temperature={number}"], show=False)["temperature"]
                note(f"temperature {warmth:g}")
            case "save", path:
                path = os.path.expanduser(path)
                if not (turns and path) or os.path.lexists(path) or not os.path.isdir(os.path.dirname(path) or "."):
                    raise ValueError("/save FILE: after an answer, to a new file in a folder that is there")
                with atomic_write(path, "w") as f:     # a line as in identity_conversations.jsonl
                    f.write(json.dumps(system + turns, ensure_ascii=False) + "\n")
                note(f"saved as {path}")
            case "retry", "" if not question:
                raise ValueError("nothing was asked yet")
            case ("", _) | ("retry", ""):
                if not command:
                    question, before = re.sub("^//", "/", text), turns if terminal else []
                said, stopped = answer(system + before, question, warmth, next(seeds))
                turns = before + said if said else turns
            case _:
                raise ValueError(f"{text[:30]!r}: no such command; /help lists them, //... is for the model")
    except (ValueError, SystemExit) as error:          # SystemExit: of a knob or a disk, with a line; a signal goes on
        if isinstance(error, stop.Stopped):
            raise
        note(error)
        if not (terminal or command):                  # each question of a file has a line, this one an empty one
            print(flush=True)
raise SystemExit(int(stop.lost))
