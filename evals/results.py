"""
What a run has left on the disk, for whoever wants to look at it, also in the middle of the run.

reads   <stage>_checkpoints/<model_tag>/{meta_NNNNNN.json,log.jsonl,eval.json,chat_eval.json}
out     read_stage: all of it as one dict, and remarks about what is damaged or out of date
"""
import os

from checkpoint import FOLDERS, path_of, sha_of, sources, stage_folder, steps_in, tags_of
from evals.curves import series
from evals.saved import read_json
from plumbing.common import base_path, read_log

TITLES = dict(base="Pretraining", mid="Mid-training", sft="Fine-tuning")


def newest_meta(folder, remarks):
    """The meta of the newest checkpoint that is not damaged, {} where there is none."""
    metas = (read_json(path_of(folder, "meta", step), remarks) for step in reversed(steps_in(folder)))
    return next(filter(None, metas), {})


def read_run(tag, remarks):
    """{stage: read_stage()} of a model and of those it came from, which may have other tags."""
    runs, tags = {}, {}
    for stage in reversed(FOLDERS):
        runs[stage] = read_stage(stage, tags.get(stage, tag), remarks)
        for source in sources(runs[stage]["meta"] if runs[stage] else {}):
            tags.setdefault(source["stage"], source.get("tag", tag))
    return dict(reversed(runs.items()))


def read_stage(stage, tag, remarks):
    """
    All there is about a stage, or None if it has left nothing.

    returns  dict: stage, meta (of the newest checkpoint), log (rows), text (eval.json) and chat
             (chat_eval.json), the last two only if they are of that checkpoint; {} or [] if missing
    """
    folder = base_path(FOLDERS[stage], tag)
    run = dict(stage=stage, meta=newest_meta(folder, remarks), log=[r for r in read_log(folder) if "step" in r])
    if not run["meta"] and not run["log"]:
        return None
    scripts = dict(text=("eval.json", "base_eval.py"), chat=("chat_eval.json", f"chat_eval.py -i {stage}"))
    for key, (name, script) in scripts.items():
        found = read_json(os.path.join(folder, name), remarks)
        fits = found.get("checkpoint") == sha_of(run["meta"])
        run[key] = found if fits else {}
        if found and not fits:
            remarks.append(f"{TITLES[stage]}: `{name}` is of another checkpoint (step {found.get('step', '?')}) than "
                           f"the one there now, so its numbers are not shown; run again: `python {script}`")
    return run


def find_tag(model_tag):
    """The model asked for, or the only one that any stage has worked on; SystemExit if there are several or none."""
    parents = [base_path(name) for name in FOLDERS.values()]
    found = {tag for parent in parents if os.path.isdir(parent) for tag in os.listdir(parent)
             if steps_in(os.path.join(parent, tag)) or os.path.exists(os.path.join(parent, tag, "log.jsonl"))}
    names = ", ".join(sorted(found)) or "none"
    if model_tag and model_tag not in found:
        raise SystemExit(f"{base_path()}: nothing trained as {model_tag!r} here; there is: {names}")
    copies = {tag for name in FOLDERS for tag in tags_of(name)
              if newest_meta(stage_folder(name, tag), []).get("tag", tag) != tag}
    found = found - copies or found              # a folder that was copied or renamed counts only by its name
    if not model_tag and len(found) != 1:
        raise SystemExit(f"{base_path()}: holds several models; choose one with --model_tag= from {names}" if found else
                         f"{base_path()}: nothing was trained here yet; run base_train.py first")
    return model_tag or found.pop()


def chain_remarks(runs):
    """A remark for each stage that was trained from another checkpoint than the one there now."""
    for stage, run in runs.items():
        source = run["meta"].get("source") or {}
        parent = runs.get(source.get("stage"))
        if parent and sha_of(parent["meta"]) != source.get("sha256"):
            yield (f"{TITLES[stage]} started from another {source['stage']} checkpoint (step {source.get('step')}) "
                   "than the one there now.")


def seconds_of(run):
    """Seconds of training so far: the log may be ahead of the newest checkpoint."""
    logged = [row["seconds"] for row in run["log"] if isinstance(row.get("seconds"), (int, float))]
    return max([run["meta"].get("progress", {}).get("seconds", 0.0), *logged[-1:]])


def validation(run, key):
    """The last val_bpb or val_loss of a stage, None if there was none."""
    logged = series(run["log"], key)[1]
    return run["meta"].get(key) if run["meta"].get(key) is not None else logged[-1] if logged else None


def answers(run):
    """{test: (right, total)} of a stage: from its evaluation, else from the last test during training."""
    found = {row["test"]: (row["right"], row["total"]) for row in run["log"] if "test" in row and row.get("total")}
    tested = run["chat"].get("tasks", {})
    return found | {name: (task["right"], task["total"]) for name, task in tested.items() if task.get("total")}
