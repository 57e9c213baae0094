"""
The report card: what was trained, what it cost and what came out, in one page with curves.

A function of the files that the stages have left, so it can be made at any time; what is not there yet is said.

reads   <stage>_checkpoints/<model_tag>/{meta_NNNNNN.json,log.jsonl,eval.json,chat_eval.json},
        tokenizer/{meta.json,eval.json}
writes  report/<model_tag>.md and report/<model_tag>/curves.png below the base folder, and both here
run     python report.py --model_tag=d12
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import functools
import math
import os
import platform
import shutil
import statistics
import subprocess
from urllib.parse import quote

from checkpoint import FOLDERS, SCRIPTS, is_finished
from chat import printable
from evals.curves import at_end, draw, series
from evals.metrics import GUESSING, centered
from evals.results import TITLES, find_tag, read_run
from plumbing.common import atomic_write, base_path, duration, read_json, standard_error
from plumbing.configurator import configure

model_tag = ""                 # which model; "" = the only one there is
copy_to = "report.md"          # a copy beside the scripts, report_TAG.md where that is another model's; "" = none
gpu_hour_price = 0.0           # what one GPU costs in an hour, in your money; 0 = no price
config = configure(globals(), show=False)
if copy_to and not copy_to.endswith(".md"):
    raise SystemExit(f"copy_to={copy_to!r}: must be a file whose name ends in .md, or empty for none")

HERE = os.path.dirname(os.path.abspath(__file__))
# The original nanochat's d20, 561M parameters, from its own report of October 2025.
D20 = {
    "CORE": dict(base=0.2219),
    "ARC-Easy": dict(mid=0.3561, sft=0.3876),
    "ARC-Challenge": dict(mid=0.2875, sft=0.2807),
    "MMLU": dict(mid=0.3111, sft=0.3151),
    "GSM8K": dict(mid=0.0250, sft=0.0455, rl=0.0758),
    "HumanEval": dict(mid=0.0671, sft=0.0854),
    "ChatCORE, five tasks": dict(mid=0.0730, sft=0.0884),
}
VERDICTS = [(0.9, "yes"), (0.6, "mostly"), (0.2, "sometimes"), (0.02, "rarely"), (-math.inf, "no")]
remarks = []                   # what a reader of the report has to know about missing or doubtful files


def git_state():
    """Commit of the scripts and whether they were changed since; "" outside of a repository of theirs."""
    git = functools.partial(subprocess.check_output, cwd=HERE, text=True, stderr=subprocess.DEVNULL, timeout=20)
    try:
        top, commit = git(["git", "rev-parse", "--show-toplevel", "--short=10", "HEAD"]).splitlines()
        if os.path.realpath(top) != os.path.realpath(HERE):          # unpacked inside of another project
            return ""
        changes = git(["git", "status", "--porcelain", "-uno"])
    except (OSError, subprocess.SubprocessError):                    # no git, no repository, no commit
        return ""
    return f"{commit}, " + ("with changes (dirty)" if changes else "clean")


# the sections: each function returns a list of paragraphs in markdown
def table(rows, head=("", "")):
    """A markdown table; empty with no rows."""
    lines = [[str(value).replace("|", "\\|").replace("\n", " ") for value in line]
             for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def plural(number, noun):
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def header(tag, runs):
    """Title, model, machine, versions."""
    known = next((run["meta"] for run in runs.values() if "model_config" in run["meta"]), {})
    shape, params = known.get("model_config"), known.get("params")
    parts = [f"# Report card of {tag}"]
    if shape:
        parts.append((f"{params['total']:,} parameters: " if params else "") +
                     f"{plural(shape['n_layer'], 'layer')}, width {shape['n_embd']}, "
                     f"{plural(shape['n_head'], 'head')}, context {shape['sequence_len']:,}, "
                     f"vocabulary {shape['vocab_size']:,}.")
    machines = {}                                                # text -> the stages it holds for
    for stage, run in runs.items():
        if machine := run["meta"].get("machine"):
            name, count = machine.get("name", "?"), machine.get("world_size", 1)
            on_cpu = machine.get("device") == "cpu" and "threads" in machine
            text = ", ".join(filter(None, [
                f"{count} x {name}" if count > 1 else name, machine.get("dtype", "?"),
                plural(machine["threads"], "thread") if on_cpu else "", f"torch {machine.get('torch', '?')}",
                f"Python {machine['python']}" if "python" in machine else ""]))
            machines.setdefault(text, []).append(TITLES[stage])
    rows = [("machine" if len(machines) == 1 else f"machine: {', '.join(stages)}", text)
            for text, stages in machines.items()]
    rows += [("commit of the scripts now", git_state()),
             ("this page made with", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")]
    return [*parts, table([row for row in rows if row[1]])]


def stage_rows(run):
    """How far a stage is, what it took and what came out of it, as (name, value) rows; "" where it is not known."""
    meta, log = run["meta"], run["log"]
    learned = "reward" if run["stage"] == "rl" else "loss"
    reached = max([meta.get("step", 0), *(step + 1 for step in series(log, learned)[0][-1:])])
    total = meta.get("num_iterations")
    saved = f"checkpoint of step {meta['step']:,}" if meta else "no checkpoint yet"
    steps = f"{reached:,} of {total:,}" if total else f"{reached:,}"
    yield "steps", steps if total and is_finished(meta) else f"{steps}, not finished; {saved}"
    rows, conversations = meta.get("rows", 0), meta.get("conversations")
    if "shards" in meta:
        yield "data", f"{plural(len(meta['shards']), 'shard')} of text, {rows:,} rows per step"
    elif run["stage"] == "rl" and meta:
        yield "data", (f"{conversations:,} problems, {rows:,} per step with {meta['config']['num_samples']} answers to each, "
                       f"{meta['step'] * rows / conversations:.2f} epochs")
    elif conversations:
        epochs = f", {meta['step'] * rows / conversations:.2f} epochs" if run["stage"] == "sft" else ""
        yield "data", f"{conversations:,} conversations, {rows:,} rows per step{epochs}"
    tokens = int(meta.get("progress", {}).get("tokens", 0))
    per_parameter = f", {tokens / meta['params']['total']:.1f} per parameter" if "params" in meta else ""
    work = f", {tokens * meta['flops_per_token']:.1e} FLOP" if "flops_per_token" in meta else ""
    yield "tokens drawn" if run["stage"] == "rl" else "tokens trained on", f"{tokens:,}{per_parameter}{work}" if tokens else ""
    yield "training time", duration(run["seconds"])
    speed, mfu = series(log, "tokens_per_second")[1], series(log, "mfu")[1]
    yield "tokens per second, median", f"{statistics.median(speed):,.0f}" if speed else ""
    if mfu:
        yield "MFU, median", f"{100 * statistics.median(mfu):.1f} %"
    elif speed and run["stage"] != "rl":
        yield "MFU, median", "not known: no peak for this machine in plumbing/budget.py"
    memory, B = meta.get("peak_memory"), meta.get("device_batch_size", "?")
    yield "memory, peak", f"{memory / 1e9:.1f} GB, micro-batches of {B} rows" if memory else ""
    losses, text = series(log, "loss")[1], run["text"]
    yield "training loss, nats per token", \
        f"{losses[0]:.3f} at first, {at_end(losses):.3f} at the end" if losses else ""
    rewards, mixed = series(log, "reward")[1], series(log, "mixed")[1]
    few = max(1, min(5, len(rewards) // 2))
    yield "reward, the share of right answers", \
        f"{statistics.fmean(rewards[:few]):.3f} at first, {at_end(rewards):.3f} at the end" if rewards else ""
    for key in dict.fromkeys(key for row in log for key in row if key.startswith("pass@")):
        steps, passed = series(log, key)
        yield f"{key} on held-out problems", \
            f"{passed[0]:.3f} at step {steps[0]}, {passed[-1]:.3f} at step {steps[-1]}" if passed else ""
    yield "problems with right and wrong answers, median", f"{100 * statistics.median(mixed):.0f} %" if mixed else ""
    for key, unit in (("val_bpb", "bits per byte"), ("val_loss", "nats per token")):
        yield f"validation, {unit}", f"{run[key]:.4f}" if run[key] is not None else ""
    yield "evaluated once more, bits per byte", (f"{text['train_bpb']:.4f} on training text, {text['val_bpb']:.4f} on "
                                                 "validation text" if "train_bpb" in text else "")


def abilities(runs):
    """What the newest stage with a test has right, in words and with a standard error."""
    newest = {name: (stage, *numbers) for stage, run in runs.items() for name, numbers in run["answers"].items()}
    rows = []
    for name, (stage, right, total) in newest.items():
        share, error = right / total, standard_error(right, total)
        chance = max(GUESSING.get(name, 0.0), runs[stage]["chat"].get("tasks", {}).get(name, {}).get("constant", 0.0))
        least = chance if 0.01 < chance < 1 else 0.0             # that says nothing about what it knows
        verdict = "no better than guessing" if least and share - 2 * error <= least else \
            next(word for bound, word in VERDICTS if centered(share, least) >= bound)
        rows.append((name, verdict, f"{right:,} of {total:,}", f"{100 * share:.1f} % ± {100 * error:.1f}",
                     f"{100 * chance:.0f} %" if chance > 0.01 else "", TITLES[stage].lower()))
    skipped = [f"{name}: skipped, {task['skipped']}." for run in runs.values()
               for name, task in run["chat"].get("tasks", {}).items() if "skipped" in task]
    if not rows and not skipped:
        return []
    return ["## What it can and can't do",
            "Measured on held-out questions; ± is one standard error. Right for 90 % is a yes, for 60 % mostly, for "
            "20 % sometimes, for 2 % rarely; the part is counted that guessing does not explain. Guessing: what chance "
            "has right in a multiple choice, or one answer given to all where that is more (100 %: all have the same).",
            table(rows, ("", "", "right", "share", "guessing", "after")), *dict.fromkeys(skipped)]


def summary(runs):
    """The table of the stages, with the original's d20 in brackets."""
    ours = {}                                                    # row -> {stage: number}
    for stage, run in runs.items():
        text, chat = run["text"], run["chat"]
        numbers = {"validation, bits per byte": text.get("val_bpb", run["val_bpb"]),
                   "validation, nats per token": run["val_loss"], "CORE": text.get("core"),
                   **{name: right / total for name, (right, total) in run["answers"].items()},
                   "ChatCORE, five tasks": chat.get("chatcore5"), "ChatCORE": chat.get("chatcore")}
        for name, number in numbers.items():
            if number is not None:
                ours.setdefault(name, {})[stage] = number
    names = dict.fromkeys(["validation, bits per byte", "validation, nats per token", *D20, *ours])
    names = [name for name in names if name in ours or name in D20]
    rows, columns = [], [stage for stage in FOLDERS if stage != "rl" or stage in runs]
    for name in sorted(names, key=lambda name: (name not in ours, name.startswith("ChatCORE"))):
        cells = []
        for stage in columns:
            number, theirs = ours.get(name, {}).get(stage), D20.get(name, {}).get(stage)
            mine = f"{number:.4f}" if number is not None else "-" if theirs else ""
            cells.append(mine + (f" ({theirs:.4f})" if theirs else ""))
        rows.append((name, *cells))
    return ["## Summary", table(rows, ("", *map(str.upper, columns))),
            "In brackets: the original nanochat's d20 (561M parameters, 11.2 billion tokens, 8 GPUs for 4 hours). "
            "Bits per byte of BASE are of plain text, those of MID of an assistant's answers: compare them with other "
            "runs, not with each other."]


def costs(runs, tokenizer):
    """Where the time went, and what it is in GPU-hours."""
    parts = [("tokenizer", tokenizer.get("seconds", 0.0), 1)]
    for stage, run in runs.items():
        count = run["meta"].get("machine", {}).get("world_size", 1)
        tested = sum(run["text"].get("seconds", {}).values()) + run["chat"].get("seconds", 0.0)
        parts += [(TITLES[stage].lower(), run["seconds"], count),
                  (f"evaluation after {TITLES[stage].lower()}", tested, count)]
    seconds, hours = sum(part[1] for part in parts), sum(part[1] * part[2] for part in parts) / 3600
    rows = [(name, duration(part)) for name, part, _ in parts if part]
    on_gpu = any(run["meta"].get("machine", {}).get("device") == "cuda" for run in runs.values())
    cost = f"{hours:.2f} GPU-hours" if on_gpu else f"{hours:.2f} hours of a computer without an NVIDIA GPU"
    price = f", at {gpu_hour_price:g} an hour: {gpu_hour_price * hours:.2f}" if gpu_hour_price and on_gpu else ""
    return ["## Time and cost", table([*rows, ("in all", f"{duration(seconds)} ({cost}{price})")]),
            "Downloads, starting up, saving and evaluations during training are not in it, nor steps that were "
            "done twice after a crash: a rented GPU runs some percent longer."]


def samples(runs):
    """What the base model goes on with."""
    texts = runs["base"]["text"].get("samples", []) if "base" in runs else []
    if not texts:
        return []
    lines = [f"{prompt} | {printable(text)}".replace("\n", "\\n").replace("```", "'''") for prompt, text in texts]
    return ["## Samples", "After pretraining: the prompt, a bar, and the likeliest words after it.",
            "\n".join(["```text", *lines, "```"])]


def tokenizer_part(meta):
    """Vocabulary and compression, from tok_train.py and tok_eval.py."""
    if not meta:
        return ["## Tokenizer", "Not trained yet: `python tok_train.py`"]
    seen = meta.get("seen", {})
    rows = [("vocabulary", f"{meta.get('vocab_size', 0):,} tokens"),
            ("learned from", f"{seen.get('chars', 0):,} characters, {seen.get('documents', 0):,} documents"),
            ("training time", duration(meta.get("seconds", 0)))]
    if "val_bytes_per_token" in meta:
        rows.append(("validation text", f"{meta['val_bytes_per_token']:.3f} bytes per token"))
    parts, result = ["## Tokenizer", table(rows)], read_json(base_path("tokenizer", "eval.json"), remarks)
    if result and result.get("fingerprint") != meta.get("fingerprint"):
        remarks.append("`tokenizer/eval.json` is of another tokenizer, so it is not shown: `python tok_eval.py`")
    elif result:
        names = list(result["vocab_sizes"])                      # ours first
        rows = [(name, *(f"{text['bytes'] / text['tokens'][n]:.3f}" for n in names),
                 *(f"{text['tokens'][n] / text['tokens'][names[0]]:.2f}" for n in names[1:]))
                for name, text in result["texts"].items()]
        sizes = [f"{name} ({size:,})" for name, size in result["vocab_sizes"].items()]
        ratio = "; the last columns: how many tokens the others need for one of ours (above 1: ours is shorter)"
        parts += ["Bytes per token, higher is better" + (ratio if names[1:] else "") + ".",
                  table(rows, ("text", *sizes, *(f"{n} / ours" for n in names[1:])))]
        if result.get("missing"):
            parts.append(f"Without {', '.join(result['missing'])}: not on this machine, and not to be fetched.")
    return parts


def stage_part(stage, run):
    """One stage's section; CORE beside GPT-2, with its tasks folded away."""
    if run is None:
        return [f"## {TITLES[stage]}", f"Not run yet: `python {SCRIPTS[stage]}`"]
    parts, text = [f"## {TITLES[stage]}", table([row for row in stage_rows(run) if row[1]])], run["text"]
    if text.get("core") is not None:
        most = text.get("settings", {}).get("core", {}).get("max_per_task")
        gpt2 = ", ".join(f"{size} {value:.4f}" for size, value in text.get("gpt2_core", {}).items())
        rows = [(label, f"{task['accuracy']:.4f}", f"{task['centered']:.4f}", f"{task['n']:,}")
                for label, task in text.get("tasks", {}).items()]
        parts += [f"CORE {text['core']:.4f}" + (f" (on at most {most:,} items of a task)" if most else "") +
                  (f"; GPT-2: {gpt2}." if gpt2 else "."), "<details><summary>CORE, task by task</summary>",
                  table(rows, ("task", "accuracy", "centered", "items")), "</details>"]
    if layers := run["chat"].get("sandbox"):
        parts.append(f"HumanEval's programs ran behind: {', '.join(layers)}.")
    if knobs := run["meta"].get("config"):
        parts += ["<details><summary>All knobs</summary>",
                  " ".join(f"`{name}={value!r}`" for name, value in knobs.items()), "</details>"]
    return parts


# the page
tag = find_tag(model_tag)
stages = read_run(tag, remarks)
runs = {stage: run for stage, run in stages.items() if run}
tokenizer = read_json(base_path("tokenizer", "meta.json"), remarks)
page_path, picture = base_path("report", f"{tag}.md"), base_path("report", tag, "curves.png")
no_picture = draw([(TITLES[stage], run["log"]) for stage, run in runs.items()], picture)    # why there is none

middle = [*abilities(runs), *samples(runs), *costs(runs, tokenizer), *tokenizer_part(tokenizer)]
last = [part for stage, run in stages.items() for part in stage_part(stage, run)]
first = [*header(tag, runs), *summary(runs)]
if remarks:
    first.insert(1, "\n".join(f"- **{remark}**" for remark in remarks))

copy = os.path.join(HERE, copy_to) if copy_to else ""
if copy and os.path.exists(copy):
    with open(copy, encoding="utf-8", errors="replace") as f:
        if f.readline().strip() != f"# Report card of {tag}":    # of another model, and stays
            copy = f"_{tag}".join(os.path.splitext(copy))
pages = {page_path: ""} | ({copy: "report/"} if copy else {})    # page -> the folder of the picture as seen from it
for path, prefix in pages.items():
    curves = (f"No picture: {no_picture}." if no_picture else
              f"![Loss, bits per byte and speed of the stages]({prefix}{quote(tag)}/curves.png)")
    with atomic_write(path, "w") as f:
        f.write("\n\n".join(filter(None, [*first, "## Curves", curves, *middle, *last])) + "\n")
if copy and not no_picture:                                      # the copy shows a picture beside itself
    beside = os.path.join(os.path.dirname(copy), "report", tag, "curves.png")
    with open(picture, "rb") as source, atomic_write(beside) as f:
        shutil.copyfileobj(source, f)
for name, (right, total) in {n: a for run in runs.values() for n, a in run["answers"].items()}.items():
    print(f"{name}: {right} of {total}")
written = page_path + (f" and {os.path.basename(copy)}" if copy else "")
print(f"the report card: {written}" + (f", without a picture: {no_picture}" if no_picture else ""))
