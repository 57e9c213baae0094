"""
The report card: one table per stage, from nothing but the files that the stages have left.

reads   <stage>_checkpoints/<model_tag>/{meta_NNNNNN.json,log.jsonl}, tokenizer/meta.json
writes  report/<model_tag>.md below the base folder, and report.md here
run     python report.py --model_tag=d12
"""
import json
import os

from checkpoint import FOLDERS, SCRIPTS, find_folder, is_finished, read_meta
from common import atomic_write, base_path, duration, read_log
from configurator import configure

model_tag = ""                 # which model; "" = the only one there is
copy_to = "report.md"          # a copy beside the scripts; "" = none
config = configure(globals(), show=False)

TITLES = dict(base="Pretraining", mid="Mid-training", sft="Fine-tuning", rl="Reinforcement learning")


def stage_rows(meta, log):
    """What a stage was and came to, as (name, value) rows."""
    progress, machine = meta["progress"], meta["machine"]
    steps = [row for row in log if "loss" in row]
    speed = progress["tokens"] / max(progress["seconds"], 1e-9)
    mfu = [row["mfu"] for row in steps if row.get("mfu")]
    yield "steps", f"{meta['step']:,} of {meta['num_iterations']:,}" + ("" if is_finished(meta) else " (not finished)")
    yield "tokens trained on", f"{progress['tokens']:,}"
    yield "training time", f"{duration(progress['seconds'])} ({speed:,.0f} tokens per second)"
    if mfu:
        yield "MFU (median)", f"{100 * sorted(mfu)[len(mfu) // 2]:.1f} %"
    yield "memory (peak)", f"{meta['peak_memory'] / 1e9:.1f} GB"
    yield "machine", f"{machine['name']}, {machine['dtype']}, torch {machine['torch']}"
    if steps:
        yield "training loss, first and last", f"{steps[0]['loss']:.3f}, {steps[-1]['loss']:.3f} nats per token"
    if meta.get("val_bpb") is not None:
        yield "validation", f"{meta['val_bpb']:.4f} bits per byte"
    if meta.get("val_loss") is not None:
        yield "validation", f"{meta['val_loss']:.4f} nats per token"


def table(rows):
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def tokenizer_rows():
    """The tokenizer's own numbers, as tok_train.py left them."""
    with open(base_path("tokenizer", "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    yield "tokens", f"{meta['vocab_size']:,}"
    for name in ("bytes_per_token", "chars", "seconds"):
        if name in meta:
            yield name.replace("_", " "), f"{meta[name]:,.2f}" if isinstance(meta[name], float) else f"{meta[name]:,}"


tag = os.path.basename(find_folder("base", model_tag))
parts = [f"# Report card of {tag}", "## Tokenizer", table(tokenizer_rows())]
total_seconds, tests = 0.0, {}
for stage, folder_name in FOLDERS.items():
    folder = base_path(folder_name, tag)
    meta, log = read_meta(folder), read_log(folder)
    if meta is None:
        if stage != "rl":
            parts += [f"## {TITLES[stage]}", f"Not run yet: `python {SCRIPTS[stage]}`"]
        continue
    if stage == "base":
        model = meta["model_config"]
        parts.insert(1, f"{meta['params']['total']:,} parameters: {model['n_layer']} layers, width {model['n_embd']}, "
                        f"{model['n_head']} heads, context {model['sequence_len']}, vocabulary {model['vocab_size']:,}.")
    total_seconds += meta["progress"]["seconds"]
    tests |= {row["test"]: (stage, row["right"], row["total"]) for row in log if "test" in row}
    parts += [f"## {TITLES[stage]}", table(stage_rows(meta, log))]
if tests:
    parts += ["## What it can and can't do", "Measured on questions that it has not seen in training.",
              table((name, f"{right} of {total} ({stage})") for name, (stage, right, total) in tests.items())]
parts += [f"Training time of all stages: {duration(total_seconds)}."]

text = "\n\n".join(parts) + "\n"
path = base_path("report", f"{tag}.md")
for target in filter(None, (path, copy_to)):
    with atomic_write(target, "w") as f:
        f.write(text)
print("\n".join(f"{name}: {right} of {total}" for name, (_, right, total) in tests.items()))
print(f"the report card: {path}" + (f" and {copy_to}" if copy_to else ""))
