"""
Talk to a model in the terminal, from any stage.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/
writes  nothing; the answer goes to stdout, remarks in (parentheses) to stderr
run     python chat_cli.py -p "Why is the sky blue?"      one answer
        python chat_cli.py -i base                        a conversation, until quit or Ctrl-D

A base model knows no questions and answers: it goes on with the text it is given.
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import contextlib
import random
import sys

from chat import TextStream, printable
from checkpoint import FOLDERS, find_checkpoint, load_model, tags_of
from engine import Engine
from plumbing import stop
from plumbing.common import base_path
from plumbing.configurator import configure
from plumbing.machine import start

prompt = ""                    # -p: ask this, print the answer and end; "" = a conversation
source = "sft"                 # -i: whose model: base, mid, sft; "" = the furthest there is
model_tag = ""                 # which of the stage's models, like d12; "" = the only one
step = 0                       # training step of the checkpoint; 0 = the newest
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
temperature = 0.6              # 0 = always the likeliest token, 1 = as trained, more = wilder
top_k = 50                     # draw among so many of the likeliest tokens; 0 = among all
max_tokens = 256               # longest answer, in tokens
seed = 42                      # the same seed gives the same answers; 0 = others every time
config = configure(globals(), show=False)  # the screen belongs to the conversation

if prompt and not prompt.strip():
    raise SystemExit("prompt: there is nothing in it to answer; leave it out for a conversation")


def note(text):
    """A remark of the program's own, kept apart from the model's words."""
    print(f"({text})", file=sys.stderr, flush=True)


def fit(turns, turn):
    """
    The prompt: <|bos|>, the earlier turns and this one. raises ValueError when it is too long

    The oldest turns are taken out of `turns`, whole, until a quarter of the context (or
    max_tokens, if that is less) is left for the answer. Half a turn would confuse the model.
    """
    if len(turn) + 1 >= context:
        raise ValueError(f"that is {len(turn)} tokens long and the context of this model holds {context}; "
                         "say it shorter")
    room = context - min(max_tokens, context // 4) - 1 - len(turn)
    dropped = 0
    while turns and sum(map(len, turns)) > room:
        turns.pop(0)
        dropped += 1
    if dropped:
        note(f"the context of {context} tokens is full: the oldest {dropped} of our turns left out")
    return [tokenizer.bos, *(token for old in turns for token in old), *turn]


def answer(text, turns, answer_seed):
    """
    Print the answer to a text as it is written, and add both to turns, a list of tokens each -> did Ctrl-C stop it.

    raises ValueError, one line, when the text does not fit the context
    """
    question = {"messages": [{"role": "user", "content": text}]}
    turn = tokenizer.encode(text) if stage == "base" else tokenizer.render_for_completion(question)[1:]    # fit adds <|bos|>
    prompt_ids, stream, reply, stopped = fit(turns, turn), TextStream(tokenizer), [], False
    if stage == "base":                                # shown before its continuation, so that both are one text
        print(printable(text), end="", flush=True)
    try:
        for (token,), _ in engine.generate([prompt_ids], max_tokens, temperature, top_k, answer_seed):
            reply.append(token)
            print(printable(stream.feed(token)), end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(printable(stream.flush()), flush=True)
    if stopped:
        note("stopped")
    elif reply[-1] not in engine.ends:
        note(f"cut short: the context of {context} tokens is full" if len(reply) < max_tokens
             else f"cut short by max_tokens={max_tokens}")
    if stage != "base":
        said = [token for token in reply if token not in engine.ends]
        turns.append([*turn, *said, tokenizer.special("<|assistant_end|>")])
    return stopped


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
terminal = sys.stdin.isatty()
first_seed = seed or random.SystemRandom().getrandbits(32)
millions = sum(p.numel() for p in model.parameters()) / 1e6
note(f"{stage} model {folder}, step {meta['step']}: {millions:.1f}M parameters, "
     f"context {context} tokens, on {machine.name}")

stop.ctrl_c_is_mine()                                  # it stops an answer, not the program
if prompt:
    try:
        stopped = answer(prompt.strip(), [], first_seed)
    except ValueError as error:
        raise SystemExit(f"prompt: {error}") from None
    raise SystemExit(130 if stopped else 0)            # 130: what a shell expects after Ctrl-C
if terminal:
    with contextlib.suppress(ImportError):             # arrow keys and history, where there is one
        import readline  # noqa: F401
    note("quit, exit or Ctrl-D ends, clear starts over, Ctrl-C stops an answer")

# read, answer, remember, until the end of the input; in a file of questions each line stands for itself
turns, asked = [], 0
while True:
    try:
        text = input("> " if terminal else "").strip()
    except EOFError:
        break
    except KeyboardInterrupt:                          # at the prompt it only empties the line
        if not terminal:
            raise SystemExit(130) from None
        note("quit, exit or Ctrl-D ends")
        continue
    if text.lower() in ("quit", "exit"):
        break
    if text.lower() == "clear":
        turns = []
        note("a new conversation")
    elif text:
        try:
            answer(text, turns if terminal else [], first_seed + asked)
        except ValueError as error:
            note(error)
        asked += 1                                     # asked again, a question is drawn anew
