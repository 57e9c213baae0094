"""
Checkpoints: written so that a crash at any moment leaves the one before intact.

A step is three kinds of files in the stage's folder: model_NNNNNN.pt, optim_NNNNNN_rankR.pt and,
last of all, meta_NNNNNN.json with the sizes and sha256 of the others. No meta, no checkpoint.
Tensors are saved and loaded as data (weights_only), never as code.
"""
import hashlib
import json
import os
import re

import torch

from budget import KEEP
from common import RANK, WORLD_SIZE, atomic_write, base_path, print0
from model import GPT, GPTConfig
from runtime import barrier
from tokenizer import load_tokenizer

FOLDERS = dict(base="base_checkpoints", mid="mid_checkpoints", sft="chatsft_checkpoints", rl="chatrl_checkpoints")
SCRIPTS = dict(base="base_train.py", mid="mid_train.py", sft="chat_sft.py", rl="chat_rl.py")

# knobs that may differ when a run is continued: they change how it runs or what it prints
FREE_KNOBS = {"run", "resume", "model_tag", "device", "dtype", "device_batch_size", "compile_model", "gradient_checkpointing",
              "save_every", "eval_every", "eval_tokens", "eval_examples", "sample_every", "eval_metrics_every",
              "eval_metrics_max_problems", "core_metric_every", "core_metric_max_per_task", "final_eval_tokens"}


def save_checkpoint(folder, step, model, optimizers, meta):
    """
    Write one step; every rank calls it, each saves its own share of the optimizer's state.

    meta: JSON data; "step", "model_config" and "files" are added. Older steps are removed after.
    """
    os.makedirs(folder, exist_ok=True)
    if RANK == 0:
        remove_leftovers(folder)
    barrier()                                                    # before any rank writes
    if RANK == 0:
        save_tensors(path_of(folder, "model", step), model.state_dict())
    save_tensors(path_of(folder, "optim", step), [o.state_dict() for o in optimizers])
    barrier()                                                    # all shares are on the disk
    if RANK == 0:
        names = [os.path.basename(path_of(folder, "model", step)),
                 *(os.path.basename(path_of(folder, "optim", step, r)) for r in range(WORLD_SIZE))]
        files = {name: fingerprint(os.path.join(folder, name)) for name in names}
        config = vars(model.config)
        with atomic_write(path_of(folder, "meta", step), "w") as f:
            json.dump(dict(step=step, **meta, model_config=config, world_size=WORLD_SIZE, files=files), f, indent=1)
        for old in steps_in(folder)[:-KEEP]:
            remove_step(folder, old)
        print0(f"saved {path_of(folder, 'model', step)}")
    barrier()


def save_tensors(path, data):
    """torch.save to a file that appears whole; a full disk is an OSError, as in any other file."""
    with atomic_write(path) as f:
        try:
            torch.save(data, f)
        except RuntimeError as error:                            # torch's zip writer hides the cause
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def path_of(folder, kind, step, rank=RANK):
    name = {"model": f"model_{step:06d}.pt", "meta": f"meta_{step:06d}.json",
            "optim": f"optim_{step:06d}_rank{rank}.pt"}[kind]
    return os.path.join(folder, name)


def fingerprint(path):
    """[size in bytes, sha256] of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]


def steps_in(folder):
    """Steps with a complete checkpoint, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"meta_(\d{6,})\.json", name)))


def remove_leftovers(folder):
    """Remove what a crash in the middle of saving has left: files of a step that has no meta."""
    whole = steps_in(folder)
    for name in os.listdir(folder):
        part = re.fullmatch(r"(model|optim|meta)_(\d{6,})(_rank\d+)?\.(pt|json)(\.\d+\.tmp)?", name)
        if part and (part[5] or int(part[2]) not in whole):
            os.remove(os.path.join(folder, name))


def remove_step(folder, step):
    """Remove one step's files, the meta first, so that what is left is never taken for whole."""
    os.remove(path_of(folder, "meta", step))
    for name in os.listdir(folder):
        if re.fullmatch(rf"(model|optim)_{step:06d}(_rank\d+)?\.pt", name):
            os.remove(os.path.join(folder, name))


def read_meta(folder, step=0):
    """The meta of a step, 0 = the newest; None where the folder holds no checkpoint."""
    steps = steps_in(folder)
    if not steps:
        return None
    if step and step not in steps:
        raise SystemExit(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    with open(path_of(folder, "meta", step or steps[-1]), encoding="utf-8") as f:
        return json.load(f)


def is_finished(meta):
    """The one rule for a finished stage: its newest checkpoint is of its last step."""
    return meta is not None and meta["step"] == meta["num_iterations"]


def read_tensors(folder, name, meta):
    """The content of one checkpoint file on the CPU, after its size and sha256 are found right."""
    path = os.path.join(folder, name)
    remedy = f"remove {path_of(folder, 'meta', meta['step'])} to go back to the checkpoint before"
    if not os.path.exists(path):
        raise SystemExit(f"{path}: missing; {remedy}")
    if fingerprint(path) != meta["files"][name]:
        raise SystemExit(f"{path}: damaged, it is not what was saved; {remedy}")
    return torch.load(path, map_location="cpu", weights_only=True)


def continue_from(folder, config, resume, source=None):
    """
    The meta to continue from, or None to start at step 0; ends the run where neither is right.

    config  the knobs of this run; those that shape the training must be the old ones
    source  {"sha256": ...} of the checkpoint the stage starts from: a stage trained from another
            one is never taken for finished
    """
    meta = read_meta(folder)
    if meta is None:
        return None
    beside = "move the folder away to train anew" + ("" if source else ", or train beside it with another --model_tag")
    if not resume:
        raise SystemExit(f"{folder}: holds a checkpoint of step {meta['step']}; --resume=1 continues it, or {beside}")
    changed = [k for k, v in config.items() if k in meta["config"] and k not in FREE_KNOBS and meta["config"][k] != v]
    if changed:
        k = changed[0]
        raise SystemExit(f"{folder}: trained with {k}={meta['config'][k]!r}, this run asks for {config[k]!r}; "
                         f"set it back, or {beside}")
    if source and meta["source"]["sha256"] != source["sha256"]:
        raise SystemExit(f"{folder}: was trained from another {source['stage']} checkpoint than the one there now; "
                         "move the folder away to train this stage again")
    return meta


def check_tokenizer(folder, meta, tokenizer):
    """End the run where a checkpoint was made with another vocabulary than the one in place."""
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise SystemExit(f"{folder}: was trained with another tokenizer than the one in {base_path('tokenizer')}; "
                         "put its own back, or move the folder away")


def check_finished(folder, meta):
    """End the run where the stage before has not reached its last step."""
    if not is_finished(meta):
        raise SystemExit(f"{folder}: only at step {meta['step']} of {meta['num_iterations']}; finish it first, with "
                         f"{SCRIPTS[meta['stage']]} --resume=1")


def micro_batch_of(meta):
    """The micro-batch of the run that is continued, so that it rounds alike; 0 where it must be chosen anew."""
    return meta["device_batch_size"] if meta and meta["world_size"] == WORLD_SIZE else 0


def load_weights(folder, model, meta):
    """Copy the weights of a checkpoint into the model; names and shapes must be the same."""
    state = read_tensors(folder, os.path.basename(path_of(folder, "model", meta["step"])), meta)
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in state.items()})


def load_optimizers(folder, optimizers, meta):
    """Continue the optimizers; saved by another number of ranks, Muon's state is shared out anew."""
    count, step = meta["world_size"], meta["step"]
    ranks = [RANK] if count == WORLD_SIZE else range(count)
    saved = [read_tensors(folder, os.path.basename(path_of(folder, "optim", step, r)), meta) for r in ranks]
    adamw, muon = optimizers
    adamw.load_state_dict(saved[0][0])
    if count == WORLD_SIZE:
        muon.load_state_dict(saved[0][1])
    else:
        print0(f"the run was saved by {count} processes and continues on {WORLD_SIZE}: right, but not bit for bit")
        muon.load_state_dict(muon.take_share([s[1] for s in saved]))


def find_folder(stage, model_tag=""):
    """The folder of a stage's model; without a tag the only one there is, never a guess."""
    parent = base_path(FOLDERS[stage])
    tags = sorted(t for t in (os.listdir(parent) if os.path.isdir(parent) else []) if steps_in(os.path.join(parent, t)))
    if model_tag in tags:
        return os.path.join(parent, model_tag)
    if not tags or model_tag:
        wanted = os.path.join(parent, model_tag) if model_tag else parent
        raise SystemExit(f"{wanted}: no checkpoint here; run {SCRIPTS[stage]} first"
                         + (f" or choose --model_tag from {', '.join(tags)}" if tags else ""))
    if len(tags) > 1:
        raise SystemExit(f"{parent}: holds several models; choose one with --model_tag= from {', '.join(tags)}")
    return os.path.join(parent, tags[0])


def load_model(stage, machine, model_tag="", step=0, gradient_checkpointing=False):
    """
    A trained model on the machine's device -> (model, tokenizer, meta, folder).

    stage   base, mid, sft or rl
    raises  SystemExit where there is none, or where its tokenizer is not the one in place
    """
    if stage not in FOLDERS:
        raise SystemExit(f"source={stage}: must be one of {', '.join(FOLDERS)}")
    folder = find_folder(stage, model_tag)
    meta, tokenizer = read_meta(folder, step), load_tokenizer()
    check_tokenizer(folder, meta, tokenizer)
    model = GPT(GPTConfig(**meta["model_config"]), machine.dtype, gradient_checkpointing)
    load_weights(folder, model, meta)
    return model.to(machine.device), tokenizer, meta, folder


def source_of(stage, meta):
    """What a later stage keeps of the checkpoint it starts from: enough to tell it from another."""
    name = f"model_{meta['step']:06d}.pt"
    return dict(stage=stage, step=meta["step"], sha256=meta["files"][name][1], config=meta["config"],
                source=meta.get("source"))
