"""
What a run has left on the disk, also in the middle of it: all as one dict, and remarks about what is damaged or old.

reads   <stage>_checkpoints/<model_tag>/{meta_NNNNNN.json,log.jsonl,eval.json,chat_eval.json}
"""
import os

from checkpoint import FOLDERS, path_of, sha_of, sources, stage_folder, steps_in, tags_of
from evals.curves import series
from plumbing.common import base_path, names_in, read_json, read_log

TITLES = dict(base="Pretraining", mid="Mid-training", sft="Fine-tuning", rl="Reinforcement learning")


def newest_meta(folder, remarks):
    """The meta of the newest checkpoint that is not damaged, {} where there is none."""
    metas = (read_json(path_of(folder, "meta", step), remarks) for step in reversed(steps_in(folder)))
    return next(filter(None, metas), {})


def read_run(tag, remarks):
    """
    {stage: read_stage()} of a model and of those it came from, which may have other tags; rl, which is optional, only
    where there is something of it.

    A stage that was trained from another checkpoint than the one there now adds a remark.
    """
    runs, tags = {}, {}
    for stage in reversed(FOLDERS):
        runs[stage] = read_stage(stage, tags.get(stage, tag), remarks)
        for source in sources(runs[stage]["meta"] if runs[stage] else {}):
            tags.setdefault(source["stage"], source.get("tag", tag))
    runs = {stage: run for stage, run in reversed(runs.items()) if run or stage != "rl"}
    for stage, run in runs.items():
        source = run and run["meta"].get("source") or {}
        parent = runs.get(source.get("stage"))
        if parent and sha_of(parent["meta"]) != source.get("sha256"):
            remarks.append(f"{TITLES[stage]} started from another {source['stage']} checkpoint "
                           f"(step {source.get('step')}) than the one there now.")
    return runs


def read_stage(stage, tag, remarks):
    """
    All there is about a stage, or None if it has left nothing.

    returns  dict: stage; meta of the newest checkpoint, {} if missing; log, its rows; text (eval.json) and chat
             (chat_eval.json), {} if missing or of another checkpoint; seconds of training; val_bpb and val_loss, the
             last ones or None; answers, {test: (right, total)}, from chat, else from the last test while training
    """
    folder = base_path(FOLDERS[stage], tag)
    meta, log = newest_meta(folder, remarks), read_log(folder, remarks)
    if not meta and not log:
        return None
    run = dict(stage=stage, meta=meta, log=log)
    scripts = dict(text=("eval.json", "base_eval.py"), chat=("chat_eval.json", f"chat_eval.py -i {stage}"))
    for key, (name, script) in scripts.items():
        found = read_json(os.path.join(folder, name), remarks)
        fits = found.get("checkpoint") == sha_of(meta)
        run[key] = found if fits else {}
        if found and not fits:
            remarks.append(f"{TITLES[stage]}: `{name}` is of another checkpoint (step {found.get('step', '?')}) than "
                           f"the one there now, so its numbers are not shown; run again: `python {script}`")
    for key in ("val_bpb", "val_loss"):
        run[key] = meta[key] if meta.get(key) is not None else next(reversed(series(log, key)[1]), None)
    # the log may be ahead of the newest checkpoint
    run["seconds"] = max([meta.get("progress", {}).get("seconds", 0.0), *series(log, "seconds")[1][-1:]])
    tests = [(row["test"], row) for row in log if "test" in row] + [*run["chat"].get("tasks", {}).items()]
    run["answers"] = {name: (test["right"], test["total"]) for name, test in tests
                      if "right" in test and test.get("total")}
    return run


def find_tag(model_tag):
    """The model asked for, or the only one that any stage has worked on; SystemExit if there are several or none."""
    parents = [base_path(name) for name in FOLDERS.values()]
    found = {tag for parent in parents for tag in names_in(parent)
             if steps_in(os.path.join(parent, tag)) or os.path.exists(os.path.join(parent, tag, "log.jsonl"))}
    names = ", ".join(sorted(found)) or "none"
    if model_tag and model_tag not in found:
        raise SystemExit(f"{base_path()}: nothing trained as {model_tag!r} here; there is: {names}")
    # what is nothing but folders that were copied or renamed counts only by its name
    saved = [(tag, newest_meta(stage_folder(name, tag), [])) for name in FOLDERS for tag in tags_of(name)]
    own = {tag for tag, meta in saved if meta.get("tag", tag) == tag}
    found = found - ({tag for tag, _ in saved} - own) or found
    if not model_tag and len(found) != 1:
        raise SystemExit(f"{base_path()}: holds several models; choose one with --model_tag= from {names}" if found else
                         f"{base_path()}: nothing was trained here yet; run base_train.py first")
    return model_tag or found.pop()
